"""What the tests share: drawn images, a small experiment, and a way to start a script as a user would."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model

from experiment import data, distillation, evaluation, plots
from experiment.script import run_script
from models.classifier import save_classifier
from models.rrdbnet import RRDBNet
from models.weights import save_weights

ROOT = Path(__file__).parent.parent
CLASSES = ["checks", "discs", "stripes"]
Result = namedtuple("Result", "code out err")


def pytest_configure() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and the scripts would leave it so


def draw(kind: str, seed: int, side: int = 40) -> Image.Image:
    """A small coloured picture of one of CLASSES."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] + rng.uniform(0, 9)
    mask = {
        "checks": (x // 6 + y // 6) % 2,
        "discs": ((x % 12 - 6) ** 2 + (y % 12 - 6) ** 2 < 16) * 1.0,
        "stripes": y // 5 % 2,
    }[kind]
    colours = rng.integers(0, 256, (2, 3))
    return Image.fromarray((mask[..., None] * colours[0] + (1 - mask[..., None]) * colours[1]).astype(np.uint8))


def draw_folder(folder: Path, per_class: int, classes: list[str] = CLASSES) -> Path:
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            draw(name, 1000 * c + i).save(folder / name / f"{i}.png")
    return folder


def load_script(name: str):
    """A top-level script as a module (`test` is also the name of a standard package)."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(monkeypatch, capfd):
    """Calls start("train_darionet", "--set", ...) -> Result(code, out, err), in this process to save the imports."""
    monkeypatch.setitem(plots.STYLE, "savefig.dpi", 50)  # half the time of a figure

    def call(script: str, *arguments) -> Result:
        module = load_script(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(module.main)
        return Result(stop.value.code, *capfd.readouterr())

    return call


FIGURES = ("class_bars", "decision_strip", "degradation", "f1_difference", "image_grid", "panels")
FIGURES += ("pipeline_figure", "report", "results_table", "training_curves")


@pytest.fixture
def no_figures(monkeypatch):
    """For tests whose numbers are ordinary: figures are half the time of a small run."""
    for name in FIGURES:
        monkeypatch.setattr(plots, name, lambda *arguments, **options: None)


def write_parameters(path: Path, **sections) -> Path:
    """The parameters of a small experiment in the working directory, with `sections` on top."""
    values = {
        "transformations": {"resize_size": 36, "train_crop_size": 32, "val_crop_size": 32},
        "training": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3},
        "test": {"batch_size": 4},
        "data": {
            "train_original": "train_original",
            "train": "train",
            "val_original": "val_original",
            "val": "val",
            "test": "test",
            "train_fraction": 0.5,
            "workers": 0,
        },
        "classifier": {"architecture": "resnet18", "weights": "classifier.pt"},
        "darionet": {"features": 8, "blocks": 1, "growth": 4, "initial_weights": None, "weights": "DarioNet.pt"},
    }
    for section, changes in sections.items():
        values[section] = values[section] | changes
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> Path:
    """A working directory with drawn images in class folders, a small classifier and parameters.json."""
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "train", 4)
    draw_folder(tmp_path / "val", 2)
    draw_folder(tmp_path / "test", 3)
    torch.manual_seed(0)
    network = get_model("resnet18", weights=None, num_classes=len(CLASSES))
    save_classifier(network.state_dict(), CLASSES, tmp_path / "classifier.pt")
    write_parameters(tmp_path / "parameters.json")
    return tmp_path


@pytest.fixture
def trained(experiment) -> Path:
    """The same with (random) weights of a DarioNet."""
    torch.manual_seed(1)
    save_weights(RRDBNet(8, 1, 4), experiment / "DarioNet.pt", {"loss": {"logits": 1.0}})
    return experiment


def one_line(result: Result, *parts: str) -> None:
    """Asserts that a script refused with exit code 2 and one line on stderr that holds `parts`."""
    assert result.code == 2, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    for part in parts:
        assert part in lines[0]


# What a run leaves


def last_line(result: Result) -> Path:
    """The folder that a script names last."""
    return Path(result.out.strip().splitlines()[-1])


def results_of(result: Result) -> dict:
    return json.loads((last_line(result) / "results.json").read_text())


def read_csv(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


CLOCKS = ("seconds", "images_per_second")


def same_state(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a if k not in CLOCKS)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


# Processes and signals


def stop_after(monkeypatch, steps: int, number: int) -> None:
    """Sends this process a signal in the middle of the step after `steps`."""
    calls, to_float = [], data.to_float

    def counting(images, device):
        calls.append(1)
        if len(calls) == steps + 1:
            os.kill(os.getpid(), number)
        return to_float(images, device)

    for module in (data, distillation, evaluation):
        monkeypatch.setattr(module, "to_float", counting)


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a program of its own in this folder, with these variables; it can import the project."""
    (folder / "script.py").write_text(code)
    options = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(ROOT)} | environment, "timeout": 100}
    return subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, **options)


def in_a_child(work):
    """Runs work() in a forked process, asserts that it returned, and gives what the process used."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage


def as_nobody(folder: Path) -> None:
    """Makes a child a user other than root, whom nothing refuses; it may read `folder` and not write into it."""
    for path in (folder.parent.parent, folder.parent, folder):
        path.chmod(0o555 if path == folder else 0o755)
    if os.getuid() == 0:
        os.setuid(65534)
