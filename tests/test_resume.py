"""Stopped anywhere, with any number of workers: the resumed run ends in the same bits, having seen the same images."""

import signal
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, checkpoint, draw, last_line, one_line, same_state, stop_after
from torchvision.models import get_model

from experiment.data import epoch_batches
from experiment.runtime import Runtime
from models.classifier import save_classifier

pytestmark = pytest.mark.usefixtures("no_figures")

# Calls of to_float: an epoch has three steps, then two batches of validation; the stop comes in the call after `calls`.
FIRST, MIDDLE, END, VALIDATION, LAST_EPOCH, LAST_STEP, LAST_VALIDATION = 0, 1, 2, 4, 5, 7, 9
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
STOPS = [(FIRST, 0, INT), (MIDDLE, 0, TERM), (END, 0, HUP), (VALIDATION, 0, TERM), (LAST_EPOCH, 0, INT)]
STOPS += [(LAST_STEP, 0, TERM), (LAST_VALIDATION, 0, INT)]
STOPS += [(FIRST, 1, TERM), (MIDDLE, 4, INT), (END, 1, TERM), (LAST_STEP, 4, HUP)]


def test_every_stop_point_and_number_of_workers(start, experiment, monkeypatch):
    whole = checkpoint(last_line(start("train_darionet")))
    for calls, workers, number in STOPS:
        with monkeypatch.context() as patch:
            stop_after(patch, calls, number)
            stopped = start("train_darionet", "--set", f"data.workers={workers}")
        assert stopped.code == 128 + number, (calls, workers, stopped.err)
        folder = last_line(stopped)
        assert f"python train_darionet.py --resume {folder}" in stopped.out
        resumed = start("train_darionet", "--resume", folder)
        assert resumed.code == 0 and last_line(resumed) == folder, (calls, workers, resumed.err)
        found = checkpoint(folder)
        assert same_state(found, whole | {"resolved": found["resolved"]}), (calls, workers)


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "size", "processes"), [(12, 4, 2), (33, 3, 2), (101, 2, 4)])
def test_any_number_of_processes_sees_the_same_images(count, size, processes, shuffle, limit):
    options = {"seed": 3, "epoch": 1, "shuffle": shuffle, "limit": limit}
    together = epoch_batches(count, size * processes, **options)
    ranks = [Runtime(torch.device("cpu"), "float32", rank, processes) for rank in range(processes)]
    for batch in together:
        parts = [rank.part(batch) for rank in ranks]
        assert sorted(sum(parts, [])) == sorted(batch)
    seen = [index for batch in together for index in batch]
    assert len(set(seen)) == len(seen) == (count if limit is None else min(count, limit * size * processes))


CHANGES = ["training.seed=1", "training.batch_size=3", "training.precision=float32", 'training.loss={"pixels":1}']
CHANGES += ["training.shuffle=false", "transformations.scale=0.5", "classifier.head=fc", "darionet.weights=other.pt"]
CHANGES += ["data.val=test"]


def test_a_change_that_matters_is_refused_by_name(start, experiment, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 0, signal.SIGTERM)
        folder = last_line(start("train_darionet"))
    before = (folder / "checkpoint.pt").read_bytes()
    resume = ("train_darionet", "--resume")
    for change in CHANGES:
        one_line(start(*resume, "--set", change), change.partition("=")[0], "set it back")
    rate = "training.learning_rate 0.001, now it is 0.01: set it back, or start a new run"
    one_line(start(*resume, "--set", "training.learning_rate=0.01"), rate)
    for part in ("train", "val"):
        image = Path(part, "discs", "new.png")
        draw("discs", 99).save(image)
        one_line(start(*resume), f"images.data.{part}", "set it back")
        image.unlink()
    save_classifier(get_model("resnet18", weights=None, num_classes=len(CLASSES)), CLASSES, "classifier.pt")
    one_line(start(*resume), "classifier_weights", "set it back")
    one_line(start(*resume, "nowhere"), "nowhere: no checkpoint.pt")
    assert (folder / "checkpoint.pt").read_bytes() == before
