"""SIGKILL at drawn moments, half of them while files are saved: every run resumes and ends as if never killed.

python soak/killed.py 200
"""

import io
import itertools
import os
import random
import re
import signal
import sys
from functools import partial
from pathlib import Path

from shared import STEPS, Work, before, check, small_experiment, train

import experiment.distillation
import experiment.run
import models.weights

EVERY_STEP, EVERY_EPOCH = "0", "1000"  # minutes between checkpoints
EARLY, SAVING, BATCH, STEP = ".sbt"  # kinds of moments


def prepare(kill_at: int, script) -> None:
    """Kills the process at a moment, by number, and writes the kind of each moment that comes to moments.txt.

    Moments are: half of a write is done, or a call is about to be made that changes files (early ones are those before
    the first checkpoint, when there is nothing to lose); a batch of training or validation has come; a step is done,
    but not saved.
    """
    save_to, take_step, numbers = models.weights.save_to, experiment.run.Run.step, itertools.count(1)

    def moment(kind: str) -> None:
        if kind == SAVING and not any(Path().glob("assets/logs/train_*/checkpoint.pt")):
            kind = EARLY
        with Path("moments.txt").open("a") as file:
            file.write(kind)
        if next(numbers) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_in_halves(file, contents) -> None:
        whole = io.BytesIO()
        save_to(whole, contents)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        moment(SAVING)
        file.write(whole.getvalue()[whole.tell() // 2 :])

    def step(*arguments) -> None:
        take_step(*arguments)
        moment(STEP)

    saving = partial(moment, SAVING)
    for name in ("fsync", "link", "replace"):
        setattr(os, name, before(getattr(os, name), saving))
    Path.unlink = before(Path.unlink, saving)
    experiment.run.save_to = models.weights.save_to = save_in_halves
    script.to_float = experiment.distillation.to_float = before(script.to_float, partial(moment, BATCH))
    experiment.run.Run.step = step


def moments(work: Work) -> str:
    """A letter for every moment that came."""
    return (work.folder / "moments.txt").read_text()


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    rng, wholes = random.Random(count), {}

    def case(i: int) -> None:
        minutes = rng.choice([EVERY_STEP, EVERY_EPOCH])
        kinds = SAVING if i % 2 == 0 else BATCH + STEP
        kill_at = rng.choice([n for n, kind in enumerate(moments(wholes[minutes]), 1) if kind in kinds])
        options = f"training.checkpoint_minutes={minutes}", f"data.workers={int(rng.random() < 0.05)}"
        work = Work(folder).start(train, partial(prepare, kill_at), "--set", options[0], "--set", options[1])
        assert work.wait() == -signal.SIGKILL, work.output
        taken = moments(work).count(STEP)
        work.end_as(wholes[minutes], train, None, "--resume")
        epoch, step = map(int, re.search(r"Resumed at epoch (\d+), step (\d+)", work.output).groups())
        lost = taken - (epoch - 1) * STEPS - step + 1
        assert 0 <= lost <= (1 if minutes == EVERY_STEP else STEPS), f"{lost} lost of {taken}\n{work.output}"

    with small_experiment() as folder:
        for minutes in (EVERY_STEP, EVERY_EPOCH):
            wholes[minutes] = Work(folder)
            options = "--set", f"training.checkpoint_minutes={minutes}"
            wholes[minutes].end_as(wholes[minutes], train, partial(prepare, 0), *options)
        return check("SIGKILL, resumed to the same bits, at most one interval lost", [(case, i) for i in range(count)])


if __name__ == "__main__":
    sys.exit(main())
