"""Stopped anywhere, with any number of workers: the resumed run ends in the same bits, having seen the same images."""

import signal
from pathlib import Path

import pytest
import torch
from conftest import checkpoint, last_line, one_line, same_state, stop_after

from experiment.data import epoch_batches
from experiment.runtime import Runtime

pytestmark = pytest.mark.usefixtures("no_figures")

# Calls of to_float: an epoch has three steps, then two batches of validation; the stop comes in the call after `calls`.
FIRST, MIDDLE, END, VALIDATION, LAST_EPOCH, LAST_STEP, LAST_VALIDATION = 0, 1, 2, 4, 5, 7, 9
STOPS = [(calls, 0) for calls in (FIRST, MIDDLE, END, VALIDATION, LAST_EPOCH, LAST_STEP, LAST_VALIDATION)]
STOPS += [(FIRST, 1), (MIDDLE, 4), (END, 1), (LAST_STEP, 4)]


def test_every_stop_point_and_number_of_workers(start, experiment, monkeypatch):
    whole = checkpoint(last_line(start("train_darionet")))
    for calls, workers in STOPS:
        with monkeypatch.context() as patch:
            stop_after(patch, calls, signal.SIGTERM)
            stopped = start("train_darionet", "--set", f"data.workers={workers}")
        assert stopped.code == 143, (calls, workers, stopped.err)
        folder = last_line(stopped)
        resumed = start("train_darionet", "--resume", folder)
        assert resumed.code == 0, (calls, workers, resumed.err)
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
CHANGES += ["transformations.scale=0.5", "darionet.weights=other.pt", "data.val=test"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_matters_is_refused_by_name(start, experiment, monkeypatch, change):
    with monkeypatch.context() as patch:
        stop_after(patch, 0, signal.SIGTERM)
        folder = last_line(start("train_darionet"))
    before = (Path(folder) / "checkpoint.pt").read_bytes()
    one_line(start("train_darionet", "--resume", "--set", change), change.partition("=")[0], "set it back")
    assert (Path(folder) / "checkpoint.pt").read_bytes() == before
