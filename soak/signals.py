"""Ctrl-C and SIGTERM in every phase, to the process alone and to its whole group: exit code, checkpoint, resume.

python soak/signals.py        every case
python soak/signals.py 6      every sixth
"""

import functools
import itertools
import multiprocessing.process
import os
import signal
import sys
import time
from pathlib import Path

from warm import (
    STEPS,
    drop,
    ends_as,
    output,
    place_of_its_own,
    report,
    run_folder,
    small_experiment,
    start,
    wait,
)

import experiment.distillation
import experiment.run
from experiment.run import FILE, is_whole

PHASES = ("parameters are read", "networks are built", "workers start", "training", "validation", "saving")
LONGEST = 10  # seconds from the signal to the end


def prepare(script, phase: str, pipe: int) -> None:
    """Tells the parent, through `pipe`, when the child is in `phase`, and stays there a moment."""
    reached = []

    def at(number: int, function):
        calls = itertools.count(1)

        @functools.wraps(function)
        def call(*arguments, **options):
            if next(calls) == number and not reached:
                reached.append(True)
                os.write(pipe, b"here")
                time.sleep(0.2)
            return function(*arguments, **options)

        return call

    if phase == PHASES[0]:
        script.read_parameters = at(1, script.read_parameters)
    elif phase == PHASES[1]:
        script.open_classifier = at(1, script.open_classifier)
    elif phase == PHASES[2]:
        process = multiprocessing.process.BaseProcess
        process.start = at(2, process.start)
    elif phase in PHASES[3:5]:
        number = 2 if phase == "training" else STEPS + 1
        script.to_float = experiment.distillation.to_float = at(number, script.to_float)
    else:
        experiment.run.save_to = at(2, experiment.run.save_to)


def case(folder: Path, reference: Path, phase: str, number: int, group: bool, workers: int) -> str | None:
    """None where all is as promised, else what is not."""
    ear, mouth = os.pipe()
    options = ("--set", f"data.workers={workers}")
    pid = start(folder, *options, prepare=functools.partial(prepare, phase=phase, pipe=mouth), group=True)
    os.close(mouth)
    told = os.read(ear, 4)
    os.close(ear)
    sent = time.monotonic()
    (os.killpg if group else os.kill)(pid, number)
    code = wait(pid)
    seconds = time.monotonic() - sent
    if not told:
        return f"it never came there: {code}\n{output(folder)}"
    if phase in PHASES[:2]:  # there is nothing to resume yet
        if code != 128 + number or "Traceback" in output(folder):
            return f"exit {code}\n{output(folder)}"
        if wait(start(folder)):
            return output(folder)
        return None if ends_as(folder, reference) else "another result"
    text = output(folder)
    if code != 128 + number or "Traceback" in text or "--resume assets/logs/train_" not in text:
        return f"exit {code}\n{text}"
    if seconds > LONGEST or not is_whole(run_folder(folder) / FILE):
        return f"{seconds:.1f} s, a whole checkpoint: {is_whole(run_folder(folder) / FILE)}"
    if wait(start(folder, "--resume")):
        return output(folder)
    return None if ends_as(folder, reference) else "another result"


def main() -> int:
    every, began = int(sys.argv[1]) if len(sys.argv) > 1 else 1, time.monotonic()
    right = total = 0
    with small_experiment() as shared:
        reference = place_of_its_own(shared, "whole")
        if wait(start(reference)):
            raise SystemExit(output(reference))
        numbers, groups, workers = (signal.SIGINT, signal.SIGTERM), (False, True), (0, 2)
        cases = [c for c in itertools.product(PHASES, numbers, groups, workers) if c[0] != "workers start" or c[3]]
        for phase, number, group, count in cases[::every]:
            folder = place_of_its_own(shared, "stopped")
            fault = case(folder, reference, phase, number, group, count)
            total += 1
            right += fault is None
            if fault:
                to = "the group" if group else "the process"
                print(f"{signal.Signals(number).name} to {to} while {phase}, {count} workers: {fault}")
            drop(folder)
    what = "SIGINT and SIGTERM: the documented code, a whole checkpoint within 10 s, resumed to the same bits"
    return report(what, right, total, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
