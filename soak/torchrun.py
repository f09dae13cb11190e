"""Two processes of torchrun: one is killed and the job restarts, or the job is asked to stop and is resumed.

python soak/torchrun.py          every case
python soak/torchrun.py 1        the first one alone
"""

import os
import runpy
import shutil
import signal
import sys
from functools import partial

import torch.distributed.run
from shared import OTHER_JOB, ROOT, STEPS, Work, before, check, small_experiment, tell

from experiment import data, distillation, run, runtime

VALIDATION = STEPS + 1  # the call of to_float that is validation's first; a process sees every step
KILLED = (("1", VALIDATION + 2), ("0", 2), ("1", VALIDATION), ("0", 0), ("1", 1))  # which process, at which call
STOPPED = ((signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGTERM, True))  # with what, and the whole group?


def torchrun(rank: str, when: int, restarts: int, *options: str) -> None:
    """Runs a job of two processes; `rank` and `when` are for `process`."""
    job = [__file__, rank, str(when), "--set", "training.batch_size=2", "--set", "training.checkpoint_minutes=0"]
    torch.distributed.run.main(["--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}", *job, *options])


def process() -> None:
    """A process of the job. That of `rank`, in the job's first life, is killed at a call, or tells if none restarts."""
    rank, when = sys.argv.pop(1), int(sys.argv.pop(1))
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (rank, "0"):
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        act = tell if os.environ["TORCHELASTIC_MAX_RESTARTS"] == "0" else kill
        if when == 0:
            runtime.start_runtime = before(runtime.start_runtime, act)
        else:
            data.to_float = distillation.to_float = before(data.to_float, act, when)
    sys.argv[0] = str(ROOT / "train_darionet.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


def killed(whole: Work, folder, rank: str, when: int) -> None:
    """The job restarts by itself, and touches no other job's newer run."""
    work = Work(folder)
    other = shutil.copytree(whole.run, work.folder / "assets" / "logs" / OTHER_JOB)
    times = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    work.end_as(whole, torchrun, rank, when, 1)
    assert "exitcode: -9" in work.output and (when == 0 or "Resumed at epoch" in work.output), work.output
    assert times == {path: path.stat().st_mtime_ns for path in other.rglob("*")}, "another job's run was touched"


def stopped(whole: Work, folder, number: int, group: bool, when: int) -> None:
    """The job is asked to stop, and a new one resumes it."""
    work = Work(folder).start(torchrun, "0", when, 0)
    work.stop(number, group)
    resume = ("--resume", str(work.run.relative_to(work.folder)))
    assert f"torchrun --nproc_per_node=2 train_darionet.py {' '.join(resume)}" in work.output, work.output
    assert run.is_whole(work.run / "checkpoint.pt"), "no whole checkpoint"
    work.end_as(whole, torchrun, "none", 0, 0, *resume)


def main() -> int:
    with small_experiment() as folder:
        whole = Work(folder)
        whole.end_as(whole, torchrun, "none", 0, 0)
        cases = [(killed, whole, folder, *one) for one in KILLED]
        cases += [(stopped, whole, folder, *how, when) for how in STOPPED for when in (2, VALIDATION + 2)]
        count = int(sys.argv[1]) if len(sys.argv) > 1 else len(cases)
        return check("torchrun: restarted or resumed to the same bits", cases[:count])


if __name__ == "__main__":
    sys.exit(process() if "TORCHELASTIC_RESTART_COUNT" in os.environ else main())
