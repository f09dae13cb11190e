"""What the long checks share: a small experiment, and training in forked children of this process.

Forking after the imports saves every child their seconds. Nothing is computed here before a fork: torch's threads do
not survive one.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import CLASSES, draw_folder, load_script, write_parameters  # noqa: E402
from torchvision.models import get_model  # noqa: E402

from experiment import plots  # noqa: E402
from experiment.script import run_script  # noqa: E402
from models.classifier import save_classifier  # noqa: E402
from models.files import PARTIAL  # noqa: E402

CLOCKS = ("seconds", "images_per_second", "resolved", "run")
EPOCHS, STEPS = 2, 3  # of a whole run


@contextlib.contextmanager
def small_experiment() -> Iterator[Path]:
    """A folder with drawn images, a small classifier and parameters.json: 12 images for training, 6 for validation."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        folder = Path(name)
        draw_folder(folder / "train", 4)
        draw_folder(folder / "val", 2)
        torch.manual_seed(0)
        network = get_model("resnet18", weights=None, num_classes=len(CLASSES))
        save_classifier(network.state_dict(), CLASSES, folder / "classifier.pt")
        training = {"epochs": EPOCHS, "precision": "float32"}
        write_parameters(folder / "parameters.json", training=training)
        yield folder


def place_of_its_own(experiment: Path, name: str) -> Path:
    """A working directory that shares the images and the classifier of `experiment`."""
    folder = experiment / name
    folder.mkdir()
    for shared in ("train", "val", "classifier.pt", "parameters.json"):
        (folder / shared).symlink_to(experiment / shared)
    return folder


def start(folder: Path, *arguments: str, prepare: Callable = lambda script: None, group: bool = False) -> int:
    """Forks a child that runs train_darionet.py in `folder`; returns its process id. Its output goes to out.txt."""
    pid = os.fork()
    if pid:
        return pid
    code = 70  # a fault of this file
    try:
        if group:
            os.setpgid(0, 0)
        os.chdir(folder)
        with Path("out.txt").open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        plots.image_grid = plots.training_curves = lambda *arguments, **options: None  # most of such a run's time
        script = load_script("train_darionet")
        prepare(script)
        sys.argv = ["train_darionet.py", *arguments]
        try:
            run_script(script.main)
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
    finally:
        os._exit(code)


def wait(pid: int, limit: float = 120) -> int:
    """The child's exit code, minus the signal where one killed it; a child that hangs is killed and raises."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} hangs")


def output(folder: Path) -> str:
    return (folder / "out.txt").read_text()


def run_folder(folder: Path) -> Path:
    return sorted((folder / "assets" / "logs").iterdir())[-1]


def checkpoint(folder: Path) -> dict:
    """The checkpoint of the newest run in a working directory."""
    return torch.load(run_folder(folder) / "checkpoint.pt", weights_only=True)


def same(a: object, b: object) -> bool:
    """Whether two states are equal to the bit, clocks aside."""
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in CLOCKS)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def ends_as(folder: Path, reference: Path) -> bool:
    """Whether a finished run left what the uninterrupted one left: state, weights, note; in its folder no other file.

    Beside the weights, kills leave hidden files: one of each kill at most.
    """
    weights = [torch.load(place / "DarioNet.pt", weights_only=True) for place in (folder, reference)]
    files = [
        {p.relative_to(run_folder(place)) for p in run_folder(place).rglob("*")}
        | {p.name for p in place.iterdir() if not is_left(p)}
        for place in (folder, reference)
    ]
    return (
        same(checkpoint(folder), checkpoint(reference))
        and same(*weights)
        and files[0] - {"steps.txt"} == files[1] - {"steps.txt"}
        and sum(map(is_left, folder.iterdir())) <= 1
    )


def is_left(path: Path) -> bool:
    """Whether it is what a killed process was writing."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)


def drop(folder: Path) -> None:
    shutil.rmtree(folder)


def report(what: str, right: int, total: int, seconds: float) -> int:
    """Prints the counted line; returns the exit code."""
    print(f"{what}: {right} of {total} ({seconds:.0f} s)", flush=True)
    return 0 if right == total else 1
