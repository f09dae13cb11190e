"""Two processes of torchrun: one is killed and the job restarts, or the job is asked to stop and is resumed.

python soak/torchrun.py          every case
python soak/torchrun.py 1        the first one alone
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from warm import ROOT, STEPS, checkpoint, place_of_its_own, report, same, small_experiment

from experiment.run import FILE, is_whole

# Runs train_darionet.py; the process RANK does what SIGNALS and WHEN say, in the job's first life alone.
SCRIPT = f"""
import os, runpy, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import experiment.data, experiment.distillation, experiment.runtime

rank, when = sys.argv.pop(1), sys.argv.pop(1)
calls = []

def at(function, number):
    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            if rank == "stop":
                open("here", "w").close()
                time.sleep(1)
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == ("0" if rank == "stop" else rank):
    if when == "0":
        experiment.runtime.start_runtime = at(experiment.runtime.start_runtime, 1)
    else:
        experiment.data.to_float = experiment.distillation.to_float = at(experiment.data.to_float, int(when))
sys.argv[0] = {str(ROOT / "train_darionet.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OPTIONS = ("--set", "training.batch_size=2", "--set", "training.checkpoint_minutes=0")
VALIDATION = STEPS + 1  # the call of to_float that is validation's first; a process sees every step
KILLED = (("1", VALIDATION + 2), ("0", 2), ("1", VALIDATION), ("0", 0), ("1", 1))  # which process, at which call


def torchrun(folder: Path, rank: str, when: int, *options: str, restarts: int = 1) -> subprocess.Popen:
    """Starts the job in `folder`, in a group of its own; its output goes to out.txt."""
    (folder / "job.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"--max-restarts={restarts}", "job.py", rank, str(when), *OPTIONS, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "out.txt").open("w") as file:
        return subprocess.Popen(
            command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def add_decoy(folder: Path, reference: Path) -> Path:
    """Another job's run, newer than any: nothing may touch it."""
    decoy = folder / "assets" / "logs" / "train_29990101-000000_another-job"
    shutil.copytree(next((reference / "assets" / "logs").iterdir()), decoy)
    return decoy


def own_runs(folder: Path) -> list[Path]:
    return sorted(run for run in (folder / "assets" / "logs").iterdir() if "_2999" not in run.name)


def fault_of(folder: Path, reference: Path) -> str | None:
    """None where the job's run ended as the reference did."""
    state = torch.load(own_runs(folder)[-1] / FILE, weights_only=True)
    weights = [torch.load(place / "DarioNet.pt", weights_only=True) for place in (folder, reference)]
    if not same(state, checkpoint(reference)) or not same(*weights):
        return "another result"
    left = [path.name for path in own_runs(folder)[-1].rglob(".*")]
    return f"left {left}" if left else None


def killed(folder: Path, reference: Path, rank: str, when: int) -> str | None:
    """One process is killed at a call; the job restarts by itself."""
    decoy = add_decoy(folder, reference)
    before = {path.name: path.stat().st_mtime_ns for path in decoy.rglob("*")}
    code = torchrun(folder, rank, when).wait(180)
    text = (folder / "out.txt").read_text()
    if code or "exitcode: -9" not in text:
        return f"exit {code}\n{text}"
    if when > 0 and "Resumed at epoch" not in text:
        return f"it began anew\n{text}"
    if any("train_darionet.py" in line and line.startswith("Traceback") for line in text.splitlines()):
        return text
    if before != {path.name: path.stat().st_mtime_ns for path in decoy.rglob("*")}:
        return "another job's run was touched"
    return fault_of(folder, reference)


def stopped(folder: Path, reference: Path, number: int, group: bool, when: int) -> str | None:
    """The job is asked to stop at a call, and resumed by a new one."""
    job = torchrun(folder, "stop", when, restarts=0)
    end = time.monotonic() + 120
    while not (folder / "here").exists() and time.monotonic() < end:
        time.sleep(0.02)
    sent = time.monotonic()
    (os.killpg if group else os.kill)(job.pid, number)
    job.wait(60)
    seconds = time.monotonic() - sent
    text = (folder / "out.txt").read_text()
    run = own_runs(folder)[-1]
    if f"torchrun --nproc_per_node=2 train_darionet.py --resume {run.relative_to(folder)}" not in text or not is_whole(
        run / FILE
    ):
        return f"no checkpoint\n{text}"
    if seconds > 10:
        return f"it took {seconds:.1f} s"
    code = torchrun(folder, "none", 0, "--resume", str(run.relative_to(folder))).wait(180)
    return f"resumed: {code}\n{(folder / 'out.txt').read_text()}" if code else fault_of(folder, reference)


def main() -> int:
    began = time.monotonic()
    cases = [(f"process {rank} killed at call {when}", killed, (rank, when)) for rank, when in KILLED]
    for number, group in ((signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGTERM, True)):
        for when in (2, VALIDATION + 2):
            to = "its group" if group else "torchrun"
            cases.append((f"{number.name} to {to} at call {when}", stopped, (number, group, when)))
    cases = cases[: int(sys.argv[1]) if len(sys.argv) > 1 else None]
    right = 0
    with small_experiment() as shared:
        reference = place_of_its_own(shared, "whole")
        if torchrun(reference, "none", 0).wait(180):
            raise SystemExit((reference / "out.txt").read_text())
        for i, (name, check, arguments) in enumerate(cases):
            fault = check(place_of_its_own(shared, f"case{i}"), reference, *arguments)
            right += fault is None
            if fault:
                print(f"{name}: {fault}", flush=True)
    return report("torchrun: restarted or resumed to the same bits", right, len(cases), time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
