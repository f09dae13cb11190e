"""What the long tests share: a small experiment, training in children of this process, and what two runs left.

Forking after the imports saves every child their seconds. torch computes nothing here: its threads do not survive one.
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torchvision.models import get_model

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import CLASSES, draw_folder, load_script, same_state, write_parameters  # noqa: E402

from experiment import plots  # noqa: E402
from experiment.script import run_script  # noqa: E402
from models.classifier import save_classifier  # noqa: E402
from models.files import PARTIAL  # noqa: E402

STEPS = 3  # of an epoch; a run has two
OTHER_JOB = "train_29990101-000000_another-job"  # a run folder that is never a test's own
NOTES = {"moments.txt", "here"}  # files that the tests write into a working directory


@contextlib.contextmanager
def small_experiment() -> Iterator[Path]:
    """A folder with drawn images, a small classifier and parameters.json: 12 images for training, 6 for validation."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        folder = Path(name, "experiment")
        draw_folder(folder / "train", 4)
        draw_folder(folder / "val", 2)
        torch.manual_seed(0)
        network = get_model("resnet18", weights=None, num_classes=len(CLASSES))
        save_classifier(network, CLASSES, folder / "classifier.pt")
        write_parameters(folder / "parameters.json", training={"epochs": 2, "precision": "float32"})
        yield folder


class Work:
    """A working directory with the files of an experiment, and the process in it."""

    def __init__(self, experiment: Path):
        self.folder = Path(tempfile.mkdtemp(dir=experiment.parent))
        shutil.copytree(experiment, self.folder, copy_function=os.link, dirs_exist_ok=True)

    def start(self, main: Callable, *arguments) -> "Work":
        """Forks a process, in a group of its own, that calls `main` in the folder; its output goes to out.txt."""

        def child() -> None:
            os.setpgid(0, 0)
            os.chdir(self.folder)
            with Path("out.txt").open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            main(*arguments)

        self.process = multiprocessing.get_context("fork").Process(target=child)
        self.process.start()
        return self

    def wait(self) -> int | None:
        """The exit code, or minus the signal that killed the process; None if it hangs."""
        self.process.join(180)
        return self.process.exitcode

    def stop(self, number: int, group: bool) -> int | None:
        """Sends a signal to the process or to its group when it calls `tell`; the exit code, within 10 s."""
        while not (self.folder / "here").exists() and self.process.exitcode is None:
            time.sleep(0.01)
        sent = time.monotonic()
        (os.killpg if group else os.kill)(self.process.pid, number)
        code = self.wait()
        assert time.monotonic() - sent < 10, "it took too long"
        return code

    def end_as(self, reference: "Work", main: Callable, *arguments) -> None:
        """Goes on with `main`; asserts that it leaves what the reference left, beside its weights one hidden file."""
        assert self.start(main, *arguments).wait() == 0, self.output
        assert same_state(self.left(), reference.left()), f"another result\n{self.output}"
        assert len(list(self.folder.glob(f".*{PARTIAL}"))) <= 1, "hidden files"

    def left(self) -> list:
        """State, weights with their note, and the names of all files."""
        names = {path.name for path in self.folder.iterdir() if not path.name.endswith(PARTIAL)} - NOTES
        files = sorted(names) + sorted(str(path.relative_to(self.run)) for path in self.run.rglob("*"))
        checkpoint, weights = map(torch.load, (self.run / "checkpoint.pt", self.folder / "DarioNet.pt"))
        del checkpoint["resolved"], weights["trained_for"]["run"]  # they may differ
        return [files, checkpoint, weights]

    @property
    def output(self) -> str:
        return (self.folder / "out.txt").read_text()

    @property
    def run(self) -> Path:
        """The newest run folder."""
        return max(run for run in (self.folder / "assets" / "logs").iterdir() if run.name != OTHER_JOB)


def train(prepare: Callable | None, *arguments: str) -> None:
    """Runs train_darionet.py, after `prepare` has changed the module."""
    plots.image_grid = plots.training_curves = lambda *arguments, **options: None  # most of such a run's time
    script = load_script("train_darionet")
    if prepare:
        prepare(script)
    sys.argv = ["train_darionet.py", *arguments]
    run_script(script.main)


def before(function: Callable, act: Callable[[], object], number: int | None = None) -> Callable:
    """`function`, but `act` is called before each of its calls, or before that of a number alone."""
    calls = itertools.count(1)

    def call(*arguments, **options):
        if number in (None, next(calls)):
            act()
        return function(*arguments, **options)

    return call


def tell() -> None:
    """Tells `Work.stop` that the moment has come, and stays there a while."""
    Path("here").touch()
    time.sleep(0.5)


def check(what: str, cases: list[tuple]) -> int:
    """Calls every case, a function and its arguments; prints what is not as it asserts, and a count. The exit code."""
    began, right = time.monotonic(), 0
    for function, *arguments in cases:
        try:
            function(*arguments)
            right += 1
        except AssertionError as fault:
            print(f"{arguments}: {fault}", flush=True)
    print(f"{what}: {right} of {len(cases)} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(right < len(cases))
