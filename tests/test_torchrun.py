"""Two processes on a CPU, started as a user would: they do what one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, ROOT, last_line, read_csv

from models.weights import load_generator

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def torchrun(*command) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*TORCHRUN, *map(str, command)], capture_output=True, text=True, timeout=240, env=environment)


@pytest.mark.usefixtures("no_figures")
def test_training_and_test_of_two_processes(start, experiment):
    (experiment / "train" / CLASSES[0] / "1.png").write_bytes(b"broken")
    (experiment / "test" / CLASSES[0] / "1.png").write_bytes(b"broken")
    # A greater learning rate, and Adam makes steps of roundings.
    exact = ["--set", "training.precision=float32", "--set", "training.learning_rate=1e-5"]
    two = torchrun(ROOT / "train_darionet.py", *exact, "--set", "training.batch_size=2")
    assert two.returncode == 0, two.stderr
    lines = two.stdout.strip().splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2  # one process says it
    assert len(list(Path("assets/logs").iterdir())) == 1
    folder = Path(lines[-1])
    weights = load_generator("DarioNet.pt")
    Path("DarioNet.pt").unlink()
    one = start("train_darionet", *exact, "--set", "training.batch_size=4")
    other = last_line(one)
    for mine, theirs in zip(read_csv(folder / "history.csv"), read_csv(other / "history.csv"), strict=True):
        for key in ("train_loss", "val_loss", "val_accuracy", "val_agreement", "val_psnr_db", "unreadable"):
            assert float(mine[key]) == pytest.approx(float(theirs[key]), rel=1e-3), key
    assert read_csv(folder / "unreadable.csv") == read_csv(other / "unreadable.csv")
    for key, tensor in load_generator("DarioNet.pt").items():
        torch.testing.assert_close(weights[key], tensor, atol=3e-5, rtol=0)  # six steps move a weight by up to 6e-5
        assert (weights[key] - tensor).abs().mean() < 2e-6, key

    two = torchrun(ROOT / "test.py")
    assert two.returncode == 1  # torchrun's own code for any failure: here an image could not be read
    folder = Path(two.stdout.strip().splitlines()[-1])
    other = last_line(start("test"))
    mine, theirs = (json.loads((f / "results.json").read_text()) for f in (folder, other))
    assert mine["unreadable"] == theirs["unreadable"] and len(mine["unreadable"]) == 1
    for a, b in zip(mine["variants"], theirs["variants"], strict=True):
        for key in set(a) - {"seconds", "images_per_second", "name"}:
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
    rows, others = (
        [(r["image"], r["variant"], r["predicted"]) for r in read_csv(f / "predictions.csv")] for f in (folder, other)
    )
    assert rows == others


def test_a_failed_process_ends_the_job(experiment):
    """Instead of waiting for it."""
    lines = "import os, runpy, sys", "if os.environ['RANK'] == '1':", "    sys.exit(3)"
    script = experiment / "one_fails.py"
    script.write_text("\n".join([*lines, f"runpy.run_path('{ROOT / 'train_darionet.py'}', run_name='__main__')"]))
    assert torchrun(script).returncode != 0


REASONS = [({"MASTER_ADDR": "127.0.0.1"}, 1, "EADDRINUSE"), ({}, 2, "torchrun")]


@pytest.mark.parametrize(("address", "code", "message"), REASONS)
def test_what_keeps_a_job_from_starting_is_said(experiment, address, code, message):
    """Another program has the master port; a batch system sets WORLD_SIZE alone."""
    with socket.create_server(("", 0)) as server:
        job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(server.getsockname()[1])} | address
        command = [sys.executable, ROOT / "train_darionet.py"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | job)
    assert result.returncode == code
    assert len(result.stderr.strip().splitlines()) == 1 and message in result.stderr and "is gone" not in result.stderr
