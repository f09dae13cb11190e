"""SIGKILL at random moments, half of them while files are saved: every run resumes and ends as if never killed.

python soak/killed.py 200
"""

import io
import os
import random
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

from shared import STEPS, Work, before, check, small_experiment, train

import experiment.run
import models.weights

EVERY_STEP, EVERY_EPOCH = "0", "1000"  # minutes between checkpoints


def prepare(kill_at: int, script) -> None:
    """Kills the process at a moment of saving, by number: half of a write is done, or a call is about to be made.

    It writes a byte per moment to moments.txt, and one per step, before the checkpoint that may follow, to steps.txt.
    """
    save_to, take_step = models.weights.save_to, experiment.run.Run.step
    moment = before(partial(note, "moments.txt"), partial(os.kill, os.getpid(), signal.SIGKILL), kill_at)

    def save_in_halves(file, contents) -> None:
        whole = io.BytesIO()
        save_to(whole, contents)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        moment()
        file.write(whole.getvalue()[whole.tell() // 2 :])

    def step(*arguments) -> None:
        take_step(*arguments)
        note("steps.txt")

    for name in ("fsync", "link", "replace"):
        setattr(os, name, before(getattr(os, name), moment))
    Path.unlink = before(Path.unlink, moment)
    experiment.run.save_to = models.weights.save_to = save_in_halves
    experiment.run.Run.step = step


def note(name: str) -> None:
    with Path(name).open("a") as file:
        file.write(".")


def noted(work: Work, name: str) -> int:
    return len((work.folder / name).read_text()) if (work.folder / name).exists() else 0


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    rng, early, wholes, lengths = random.Random(count), [], {}, {}

    def case(i: int) -> None:
        while_saving, code = i % 2 == 0, 0
        while code == 0:  # until a kill comes before the end, and after there is something to lose
            minutes = rng.choice([EVERY_STEP, EVERY_EPOCH])
            kill_at = rng.randrange(1, noted(wholes[minutes], "moments.txt") + 1) if while_saving else 0
            options = f"training.checkpoint_minutes={minutes}", f"data.workers={int(rng.random() < 0.05)}"
            started = time.monotonic()
            work = Work(folder).start(train, partial(prepare, kill_at), "--set", options[0], "--set", options[1])
            if not while_saving:
                time.sleep(rng.uniform(0, lengths[minutes]))
                work.process.kill()
            code, taken = work.wait(), noted(work, "steps.txt")
            if code == 0:  # the machine is faster than it was
                lengths[minutes] = time.monotonic() - started
            elif not taken and not any(work.folder.glob("assets/logs/train_*/checkpoint*.pt")):
                early.append(i)
                code = 0
        assert code == -signal.SIGKILL, work.output
        work.end_as(wholes[minutes], train, None, "--resume")
        epoch, step = map(int, re.search(r"Resumed at epoch (\d+), step (\d+)", work.output).groups())
        lost = taken - (epoch - 1) * STEPS - step + 1
        assert 0 <= lost <= (1 if minutes == EVERY_STEP else STEPS), f"{lost} lost of {taken}\n{work.output}"

    with small_experiment() as folder:
        for minutes in (EVERY_STEP, EVERY_EPOCH):
            wholes[minutes], started = Work(folder), time.monotonic()
            options = "--set", f"training.checkpoint_minutes={minutes}"
            wholes[minutes].end_as(wholes[minutes], train, partial(prepare, 0), *options)
            lengths[minutes] = time.monotonic() - started
        code = check("SIGKILL, resumed to the same bits, at most one interval lost", [(case, i) for i in range(count)])
    print(f"({len(early)} more kills came before there was anything to lose)")
    return code


if __name__ == "__main__":
    sys.exit(main())
