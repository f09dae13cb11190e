"""A loss that stops being a number, through the script: no step is taken, it is counted, and the run ends in time."""

import csv
import math
from pathlib import Path

import pytest
import torch
from conftest import one_line

from experiment import distillation
from experiment.run import FILE, PREVIOUS, is_whole, load_checkpoint
from models.weights import load_generator


def spoil(monkeypatch, steps: set[int], factor: float) -> None:
    """Makes the loss of these steps, counted over the run from 0, not finite; validation stays as it is."""
    loss, calls = distillation.distillation_loss, []

    def spoilt(*arguments, **options):
        losses = loss(*arguments, **options)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) - 1 in steps:
                losses.total = losses.total * factor
        return losses

    monkeypatch.setattr(distillation, "distillation_loss", spoilt)


def history(folder: Path) -> list[dict]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_bad_steps_change_no_weight_and_are_counted(start, experiment, monkeypatch, factor):
    spoil(monkeypatch, {0, 1, 2}, factor)
    result = start("train_darionet", "--set", "training.epochs=1")
    assert result.code == 0, result.err
    folder = Path(result.out.splitlines()[-1])
    after, before = (torch.load(folder / name, weights_only=True) for name in (FILE, PREVIOUS))
    assert before["state"]["epoch"] == 0 and after["state"]["epoch"] == 1
    assert all(tensor.equal(after["network"][key]) for key, tensor in before["network"].items())
    assert not after["optimizer"]["state"]
    assert history(folder)[0]["skipped_steps"] == "3"


def test_one_bad_step_among_good_ones(start, experiment, monkeypatch):
    spoil(monkeypatch, {1}, math.nan)
    folder = Path(start("train_darionet").out.splitlines()[-1])
    assert [row["skipped_steps"] for row in history(folder)] == ["1", "0"]
    assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(folder)["network"].values())


def test_ten_in_a_row_stop_the_run_and_the_checkpoint_stands(start, experiment, monkeypatch):
    """Three steps an epoch: one good epoch, three bad ones, and the tenth bad step begins the fifth."""
    options = ("--set", "training.epochs=6")
    with monkeypatch.context() as patch:
        spoil(patch, set(range(3, 100)), math.nan)
        refused = start("train_darionet", *options)
        one_line(refused, "not finite 10 times in a row", "start a new run", "the last checkpoint stands")
    folder = next(Path("assets/logs").iterdir())
    assert [row["skipped_steps"] for row in history(folder)] == ["0", "3", "3", "3"]
    assert is_whole(folder / FILE) and is_whole(folder / PREVIOUS)
    best = load_generator(folder / "best.pt")
    stands = load_checkpoint(folder)["network"]
    assert all(tensor.equal(best[key]) for key, tensor in stands.items())
    resumed = start("train_darionet", "--resume")
    assert resumed.code == 0 and "Resumed at epoch 5, step 1" in resumed.out
