"""Freed memory is kept for the next tensor: in every process that computes, and in those that read images."""

import os
import subprocess
import sys
import time

import pytest
from conftest import python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc and OpenMP; processors in /proc")

FAULTS = """
import multiprocessing, resource
import torch

from experiment.data import batches
from experiment.runtime import start_runtime

def faults():  # of pages, by forty tensors of 32 MB, made and freed: 8192 pages each
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.zeros(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

class Dataset(torch.utils.data.Dataset):
    paths = ["a"]
    def __getitem__(self, index):
        return index, torch.tensor(list(faults().to_bytes(4, "big")), dtype=torch.uint8).view(1, 1, 4)

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    print(faults())
    start_runtime("float32")
    print(faults())
    for batch in batches(Dataset(), [[0]], 1):
        print(int.from_bytes(bytes(batch.images.flatten().tolist()), "big"))
"""


def numbers_of(code: str, folder, threads: str) -> list[float]:
    """The numbers that a program prints, with so many threads."""
    ended = python(code, folder, OMP_NUM_THREADS=threads, RANK="0", WORLD_SIZE="1")  # as torchrun sets them
    assert ended.returncode == 0, ended.stderr
    return [float(line) for line in ended.stdout.split()]


def test_freed_memory_is_kept(tmp_path):
    without, in_the_script, in_a_worker = numbers_of(FAULTS, tmp_path, "1")
    assert without > 200_000, "without the setting there are as many as pages"
    assert max(in_the_script, in_a_worker) < 100_000


WAITING = """
import time
import torch

def waiting():  # seconds of processor time of thirty waits of 20 ms, each after work that two threads share
    values, before = torch.ones(2**17), time.process_time()
    for _ in range(30):
        values.exp_()
        time.sleep(0.02)
    return time.process_time() - before

print(waiting())
from experiment.runtime import wait_without_spinning
wait_without_spinning()
print(waiting())
"""


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="it takes two cores")
def test_threads_that_wait_leave_the_processor_to_others(tmp_path):
    spinning, sleeping = numbers_of(WAITING, tmp_path, "2")
    assert sleeping < spinning / 2


def test_a_script_that_ends_at_once_ends_with_its_own_code(tmp_path):
    """Not in an abort, since a thread was still within torch."""
    code = "import sys, experiment.runtime; experiment.runtime.wait_without_spinning(); sys.exit(2)"
    for _ in range(2):
        ended = python(code, tmp_path, OMP_NUM_THREADS="2")
        assert (ended.returncode, ended.stderr) == (2, "")


def test_other_programs_are_seen(monkeypatch):
    from experiment.runtime import processors_in_use

    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        assert processors_in_use(0.5) > 0.3
    finally:
        busy.kill()
    monkeypatch.setattr("pathlib.Path.read_text", lambda *arguments, **options: "cpu")
    assert processors_in_use(0.01) == 0  # on a system that does not say
