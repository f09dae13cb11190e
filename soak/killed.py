"""SIGKILL at random moments, half of them while files are saved: every run resumes and ends as if never killed.

python soak/killed.py 200
"""

import functools
import io
import os
import random
import signal
import sys
import time
from pathlib import Path

from warm import STEPS, drop, ends_as, output, place_of_its_own, report, small_experiment, start
from warm import wait as wait_for

import experiment.run
import models.weights

EVERY_STEP, EVERY_EPOCH = "0", "1000"  # minutes between checkpoints


def note_steps() -> None:
    """Writes a line to steps.txt for every step that was taken, before the checkpoint that may follow it."""
    step = experiment.run.Run.step

    def noting(run, *arguments) -> None:
        step(run, *arguments)
        with Path("steps.txt").open("a") as file:
            file.write(f"{run.state.epoch} {run.state.batch}\n")

    experiment.run.Run.step = noting


class SavingMoments:
    """Counts the moments of saving (half of a write done, a call about to be made); kills this process at one."""

    def __init__(self, kill_at: int | None):
        self.count, self.kill_at = 0, kill_at

    def moment(self) -> bool:
        self.count += 1
        return self.count == self.kill_at

    def before(self, function):
        @functools.wraps(function)
        def call(*arguments, **options):
            if self.moment():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def install(self) -> None:
        for name in ("fsync", "link", "replace"):
            setattr(os, name, self.before(getattr(os, name)))
        Path.unlink = self.before(Path.unlink)
        Path("moments.txt").unlink(missing_ok=True)
        save_to = models.weights.save_to

        def half(file, contents):
            if self.moment():
                whole = io.BytesIO()
                save_to(whole, contents)
                file.write(whole.getvalue()[: whole.tell() // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return save_to(file, contents)

        experiment.run.save_to = models.weights.save_to = half


def prepare(script, kill_at: int | None = None) -> None:
    note_steps()
    moments = SavingMoments(kill_at)
    moments.install()
    if kill_at is None:
        main = script.main

        def counted():
            code = main()
            Path("moments.txt").write_text(str(moments.count))
            return code

        script.main = counted


def position(text: str) -> int:
    """Steps that were done according to a line such as "0 2" or a pair of epoch and batch."""
    epoch, batch = map(int, text.split())
    return epoch * STEPS + batch


def steps_taken(folder: Path) -> int:
    path = folder / "steps.txt"
    return position(path.read_text().splitlines()[-1]) if path.is_file() else 0


def resumed_at(text: str) -> int:
    for line in text.splitlines():
        if line.startswith("Resumed at epoch "):
            epoch, step = line.removeprefix("Resumed at epoch ").split(", step ")
            return (int(epoch) - 1) * STEPS + int(step) - 1
    return 0


def has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("assets/logs/train_*/checkpoint*.pt"))


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    rng, began = random.Random(count), time.monotonic()
    right = tried = early = 0
    with small_experiment() as experiment_folder:
        references, moments, lengths = {}, {}, {}
        for minutes in (EVERY_STEP, EVERY_EPOCH):
            folder = place_of_its_own(experiment_folder, f"whole{minutes}")
            started = time.monotonic()
            options = ("--set", f"training.checkpoint_minutes={minutes}")
            if wait_for(start(folder, *options, prepare=prepare)):
                raise SystemExit(output(folder))
            lengths[minutes] = time.monotonic() - started
            moments[minutes] = int((folder / "moments.txt").read_text())
            (folder / "moments.txt").unlink()
            references[minutes] = folder
        while tried < count:
            while_saving, minutes = tried % 2 == 0, rng.choice([EVERY_STEP, EVERY_EPOCH])
            kill_at = rng.randrange(1, moments[minutes] + 1) if while_saving else 0
            workers = "1" if rng.random() < 0.05 else "0"
            folder = place_of_its_own(experiment_folder, "killed")
            options = ("--set", f"training.checkpoint_minutes={minutes}", "--set", f"data.workers={workers}")
            started = time.monotonic()
            pid = start(folder, *options, prepare=functools.partial(prepare, kill_at=kill_at))
            if not while_saving:
                time.sleep(rng.uniform(0, lengths[minutes]))
                os.kill(pid, signal.SIGKILL)
            code = wait_for(pid)
            if code != -signal.SIGKILL and code != 0:
                print(f"killed, it ended with {code}:\n{output(folder)}")
                return 1
            if code == 0:  # it was over already: the machine is faster than it was
                lengths[minutes] = time.monotonic() - started
                drop(folder)
                continue
            taken = steps_taken(folder)
            (folder / "out.txt").unlink(missing_ok=True)
            if not has_checkpoint(folder):  # nothing was lost: it had not begun
                early += taken == 0
                good = taken == 0
                drop(folder)
                if good:
                    continue
                tried += 1
                continue
            tried += 1
            code = wait_for(start(folder, "--resume"))
            text = output(folder)
            lost = taken - resumed_at(text)
            allowed = 1 if minutes == EVERY_STEP else STEPS
            good = code == 0 and 0 <= lost <= allowed and ends_as(folder, references[minutes])
            right += good
            if not good:
                print(
                    f"saving {kill_at}, every {minutes}, workers {workers}: exit {code}, {lost} lost of {taken}\n{text}"
                )
            drop(folder)
    print(f"({early} more kills came before there was anything to lose)")
    return report(
        "SIGKILL, resumed to the same bits, at most one interval lost", right, tried, time.monotonic() - began
    )


if __name__ == "__main__":
    sys.exit(main())
