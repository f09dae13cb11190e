"""A loss that stops being a number, through the script: no step is taken, it is counted, and the run ends in time."""

import math
from pathlib import Path

import torch
from conftest import last_line, one_line, read_csv

from experiment import distillation
from experiment.run import FILE, PREVIOUS, is_whole, load_checkpoint
from models.weights import load_generator


def spoil(monkeypatch, steps: set[int]) -> None:
    """Makes the loss of these steps, counted over the run from 0, not finite; validation stays as it is."""
    loss, calls = distillation.distillation_loss, []

    def spoilt(*arguments, **options):
        losses = loss(*arguments, **options)
        if torch.is_grad_enabled():
            if len(calls) in steps:
                losses.total = losses.total * (math.nan, math.inf, -math.inf)[len(calls) % 3]
            calls.append(1)
        return losses

    monkeypatch.setattr(distillation, "distillation_loss", spoilt)


def skipped(folder: Path) -> list[str]:
    """How many steps of each epoch were not taken."""
    return [row["skipped_steps"] for row in read_csv(folder / "history.csv")]


def test_bad_steps_change_no_weight_and_are_counted(start, experiment, monkeypatch):
    spoil(monkeypatch, {0, 1, 2})
    result = start("train_darionet", "--set", "training.epochs=1")
    assert result.code == 0, result.err
    folder = last_line(result)
    after, before = (torch.load(folder / name, weights_only=True) for name in (FILE, PREVIOUS))
    assert before["state"]["epoch"] == 0 and after["state"]["epoch"] == 1
    assert all(tensor.equal(after["network"][key]) for key, tensor in before["network"].items())
    assert not after["optimizer"]["state"]
    assert skipped(folder) == ["3"]


def test_ten_in_a_row_stop_the_run_and_the_checkpoint_stands(start, experiment, monkeypatch):
    """Three steps an epoch: one bad step among good ones, then three bad epochs, and the tenth begins the fifth."""
    options = ("--set", "training.epochs=6")
    with monkeypatch.context() as patch:
        spoil(patch, {1, *range(3, 100)})
        refused = start("train_darionet", *options)
        one_line(refused, "not finite 10 times in a row", "start a new run", "the last checkpoint stands")
    folder = next(Path("assets/logs").iterdir())
    assert skipped(folder) == ["1", "3", "3", "3"]
    assert is_whole(folder / FILE) and is_whole(folder / PREVIOUS)
    best = load_generator(folder / "best.pt")
    stands = load_checkpoint(folder)["network"]
    assert all(tensor.equal(best[key]) and tensor.isfinite().all() for key, tensor in stands.items())
    resumed = start("train_darionet", "--resume")
    assert resumed.code == 0 and "Resumed at epoch 5, step 1" in resumed.out
