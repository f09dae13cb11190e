"""Ctrl-C and SIGTERM in every phase, to the process alone and to its whole group: exit code, checkpoint, resume.

python soak/signals.py        every case
python soak/signals.py 6      every sixth
"""

import itertools
import signal
import sys
from functools import partial
from multiprocessing.process import BaseProcess

from shared import STEPS, Work, before, check, small_experiment, tell, train

import experiment.distillation
import experiment.run

EARLY = ("parameters are read", "networks are built")  # there is nothing to resume yet
PHASES = (*EARLY, "workers start", "training", "validation", "saving")


def prepare(phase: str, script) -> None:
    """Makes the script tell when it is in `phase`."""
    if phase == "parameters are read":
        script.read_parameters = before(script.read_parameters, tell)
    elif phase == "networks are built":
        script.open_classifier = before(script.open_classifier, tell)
    elif phase == "workers start":
        BaseProcess.start = before(BaseProcess.start, tell, 2)
    elif phase == "saving":
        experiment.run.save_to = before(experiment.run.save_to, tell, 2)
    else:
        number = 2 if phase == "training" else STEPS + 1
        script.to_float = experiment.distillation.to_float = before(script.to_float, tell, number)


def stopped(whole: Work, folder, phase: str, number: int, group: bool, workers: int) -> None:
    work = Work(folder).start(train, partial(prepare, phase), "--set", f"data.workers={workers}")
    assert work.stop(number, group) == 128 + number and "Traceback" not in work.output, work.output
    if phase not in EARLY:
        assert experiment.run.is_whole(work.run / "checkpoint.pt"), "no whole checkpoint"
        assert "--resume assets/logs/train_" in work.output, work.output
    work.end_as(whole, train, None, *(() if phase in EARLY else ["--resume"]))


def main() -> int:
    with small_experiment() as folder:
        whole = Work(folder)
        whole.end_as(whole, train, None)
        cases = itertools.product(
            [partial(stopped, whole, folder)], PHASES, (signal.SIGINT, signal.SIGTERM), (False, True), (0, 2)
        )
        cases = [one for one in cases if one[1] != "workers start" or one[-1]]
        what = "SIGINT and SIGTERM: the documented code, a whole checkpoint within 10 s, resumed to the same bits"
        return check(what, cases[:: int(sys.argv[1]) if len(sys.argv) > 1 else 1])


if __name__ == "__main__":
    sys.exit(main())
