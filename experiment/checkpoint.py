"""Atomic save and exact resume of a training run; which run to go on with, and who may write its weights."""

import contextlib
import errno
import filecmp
import hashlib
import json
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from experiment.distillation import Step
from models.errors import InputError
from models.files import flush_to_disk, replace, write_atomically, write_text
from models.weights import load_file, save_to

FILE = "checkpoint.pt"
PREVIOUS = "checkpoint_previous.pt"
BEST = "best.pt"
JOB = "torchrun.json"  # which of torchrun's jobs the run belongs to
VERSION = 2
MARK = b"\nSHA-256 "  # torch and zip ignore what stands after the archive: this, and the checksum of all before it
TRAILER = len(MARK) + 64
# What a resumed run may change: it alters neither the images nor the steps. Images and the classifier are compared by
# what they are ("images", "classifier_weights"), not by where they lie; the rest of "data" and "test" is not read.
FREE = ("test", "data", "classifier.weights", "training.more_teachers.weights") + tuple(
    f"training.{key}" for key in ("verbose", "save", "checkpoint_minutes", "tensorboard")
)
BAD_STEPS_IN_A_ROW = 10  # not finite: then the run gives up


@dataclass
class State:
    """Where a training run stands: all that it remembers beside its network, optimiser and scaler."""

    epoch: int = 0  # the one in progress, from 0
    batch: int = 0  # the next one of it
    images: int = 0  # of the epoch so far, like the sums that follow
    loss: float = 0.0
    psnr_db: float = 0.0
    seconds: float = 0.0
    skipped: int = 0  # steps not taken, their loss was not finite
    bad_in_a_row: int = 0
    best: float = math.inf  # validation loss
    history: list[dict] = field(default_factory=list)  # a row an epoch
    unreadable: dict[int, str] = field(default_factory=dict)  # index of a training image -> reason, of the whole run

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, values: dict) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def count(self, done: Step, seconds: float) -> None:
        """Adds a step that took `seconds`.

        Raises:
            InputError: it is the tenth in a row that could not be taken.
        """
        self.batch += 1
        self.seconds += seconds
        self.unreadable |= done.unreadable
        if done.taken:
            self.images += done.images
            self.loss += done.loss
            self.psnr_db += done.psnr_db
            self.bad_in_a_row = 0
        elif done.images:
            self.skipped += 1
            self.bad_in_a_row += done.bad
        if self.bad_in_a_row >= BAD_STEPS_IN_A_ROW:
            raise InputError(
                f"the loss was not finite {BAD_STEPS_IN_A_ROW} times in a row: start a new run with a lower learning "
                "rate or training.precision float32, from this one's best.pt if it has one; the last checkpoint stands"
            )

    def means(self) -> tuple[float, float, float]:
        """Loss (infinite without images), PSNR in dB and images/s of the epoch so far."""
        n = max(1, self.images)
        return self.loss / n if self.images else math.inf, self.psnr_db / n, self.images / max(self.seconds, 1e-9)

    def unreadable_rows(self, paths: list[str]) -> list[dict]:
        """Rows of unreadable.csv; `paths` are those of all training images."""
        return [{"image": paths[i], "reason": reason} for i, reason in sorted(self.unreadable.items())]

    def summary(self) -> str:
        return "loss {:.4f}, {:.2f} dB, {:.1f} images/s".format(*self.means())

    def end_epoch(self, learning_rate: float, scores: dict) -> tuple[dict, bool]:
        """The row of history.csv, and whether its validation loss is the best; the next epoch is in progress then."""
        loss, psnr, speed = self.means()
        row = {
            "epoch": self.epoch + 1,
            "learning_rate": learning_rate,
            "train_loss": loss,
            "train_psnr_db": psnr,
            **scores,
            "seconds": round(self.seconds, 2),
            "images_per_second": round(speed, 2),
            "skipped_steps": self.skipped,
            "unreadable": len(self.unreadable),
        }
        improved = row["val_loss"] < self.best
        self.history.append(row)
        self.best = min(self.best, row["val_loss"])
        kept = ("bad_in_a_row", "best", "history", "unreadable")
        self.load_state_dict(asdict(State()) | {name: getattr(self, name) for name in kept} | {"epoch": self.epoch + 1})
        return row, improved


def save_checkpoint(folder: Path, state: dict, finished: bool = False) -> None:
    """Writes FOLDER/checkpoint.pt, tensors and plain values and a checksum; the one before is checkpoint_previous.pt.

    Whenever it is killed, a whole one of the two stands. `finished` says that the run has nothing left to do.

    Raises:
        OSError: it can't be written; the one before stands.
    """
    path = folder / FILE

    def write(file: BinaryIO) -> None:
        write_checked({"version": VERSION, "finished": finished} | state, file)
        if is_whole(path):  # a damaged one must not take the place of a good one
            keep(path, folder / PREVIOUS)

    write_atomically(path, write)


def keep(path: Path, copy: Path) -> None:
    """Gives the file a second name; where the file system has no hard links, the second in place of the first."""
    try:
        copy.unlink(missing_ok=True)
        os.link(path, copy)
    except OSError:
        replace(path, copy)


def write_checked(state: dict, file: BinaryIO) -> None:
    """`torch.save`, then the checksum of what it wrote."""
    checked = Checksum(file)
    save_to(checked, state)
    file.write(MARK + checked.sha256.hexdigest().encode())
    file.flush()
    flush_to_disk(file.fileno())
    if os.fstat(file.fileno()).st_size != checked.size + TRAILER:
        raise OSError(errno.EIO, "the disk holds less than was written")


class Checksum:
    """A file for writing that keeps the SHA-256 and the size of what was meant to be written."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def is_whole(path: Path) -> bool:
    """Whether the file is there, and its checksum is that of its contents."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - TRAILER
            file.seek(max(0, size))
            trailer = file.read()
            file.seek(0)
            sha256 = hashlib.sha256()
            while block := file.read(min(2**20, size - file.tell())):
                sha256.update(block)
    except (OSError, ValueError):
        return False
    return size > 0 and trailer == MARK + sha256.hexdigest().encode()


def load_checkpoint(folder: Path) -> dict:
    """What `save_checkpoint` wrote; the one before, and a line that says so, where the last one is damaged.

    Raises:
        InputError: no checkpoint, or none that is whole.
    """
    paths = [path for path in (folder / FILE, folder / PREVIOUS) if path.is_file()]
    if not paths:
        raise InputError(f"{folder}: no {FILE} to resume from; start without --resume")
    path = next(filter(is_whole, paths), None)
    if path is None:
        raise InputError(f"{paths[0]}: not a whole checkpoint (its checksum differs), nor is there another")
    if path.name == PREVIOUS:
        fault = "is damaged" if paths[0] != path else "is missing"
        print(f"{folder / FILE} {fault}: going on from the one before, {path}")
    state = load_file(path)
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise InputError(
            f"{path}: not a checkpoint of this version of train_darionet.py: go on with the version that wrote it, or "
            "start a new run"
        )
    return state


def run_folder_of(path: str | Path) -> Path:
    """The run that `path` names: its folder, or a file in it."""
    path = Path(path)
    places = [path, *path.parents] if path.exists() else []
    return next((p for p in places if (p / FILE).is_file() or (p / PREVIOUS).is_file()), path)


def run_to_resume(logs: Path, choice: str | None, kind: str = "train") -> Path | None:
    """The run to go on with: the job's own where torchrun starts it again, that of `--resume`, or None.

    Raises:
        InputError: there is none that "latest" could mean.
    """
    job = job_id()
    if job is not None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # after a process was lost
        if (run := run_of_job(logs, job)) is not None:
            return run
    elif job is not None and os.environ.get("RANK", "0") == "0":
        forget_job(logs, job)
    if choice is None:
        return None
    return latest_run(logs, kind) if choice == "latest" else run_folder_of(choice)


def latest_run(logs: Path, kind: str = "train") -> Path:
    """The run KIND_<stamp> in `logs` whose checkpoint was written last, an unfinished one where there is any.

    Raises:
        InputError: there is none.
    """
    runs = runs_with_checkpoint(logs, kind)
    if not runs:
        raise InputError(f"{logs}: no training run with a checkpoint; start without --resume")
    return next((run for run in reversed(runs) if not is_finished(run)), runs[-1])


def is_finished(run: Path) -> bool:
    """Whether its last checkpoint says so."""
    with contextlib.suppress(InputError):
        state = load_file(run / FILE)
        return isinstance(state, dict) and state.get("finished") is True
    return False


def runs_with_checkpoint(logs: Path, kind: str = "train") -> list[Path]:
    """The training runs in `logs`, by the time when they last wrote a checkpoint."""
    times = {}
    for path in [path for name in (FILE, PREVIOUS) for path in logs.glob(f"{kind}_*/{name}") if path.is_file()]:
        times[path.parent] = max(times.get(path.parent, 0), path.stat().st_mtime_ns)
    return sorted(times, key=lambda run: (times[run], run))


def job_id() -> str | None:
    """The name of torchrun's job, the same in every process and after a restart; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name == "none":  # torchrun's default over several machines
        name = ":".join(os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT"))
    return name


def remember_job(folder: Path, job: str | None) -> None:
    """Notes in a run's folder which of torchrun's jobs it belongs to, if any."""
    if job is not None:
        write_text(folder / JOB, json.dumps(job))


def run_of_job(logs: Path, job: str | None) -> Path | None:
    """The newest run in `logs` that belongs to this job; None without any."""
    runs = (run for run in reversed(runs_with_checkpoint(logs)) if job is not None and job_of(run) == job)
    return next(runs, None)


def forget_job(logs: Path, job: str) -> None:
    """Takes the job's name from older runs: a user may have given it to an earlier job as well."""
    for note in logs.glob(f"train_*/{JOB}"):
        if job_of(note.parent) == job:
            note.unlink(missing_ok=True)


def job_of(run: Path) -> object:
    try:
        return json.loads((run / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def claim(path: str | Path | None, run: str | Path) -> Iterator[None]:
    """Holds the weights `path`, if any, for the one run that writes them: a note FILE.training beside it says whose.

    A note whose process is gone is ignored; one from another machine is said.

    Raises:
        InputError: a run on this machine holds it and lives.
    """
    if path is None:
        yield
        return
    note = Path(f"{os.path.realpath(path)}.training")
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "run": str(run)}
    other = holder(note)
    if other and other["host"] != mine["host"]:
        print(f"Note: {path} is also written by {other['run']} on {other['host']}, if that still runs ({note})")
    elif other and other["pid"] != mine["pid"] and lives(other["pid"]):
        raise InputError(
            f"{path}: {other['run']} (process {other['pid']}) is writing it: wait for that run, or name another file; "
            f"if there is no such run, remove {note}"
        )
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        if note.exists():  # stale
            note.unlink()
        with note.open("x", encoding="utf-8") as file:
            json.dump(mine, file)
    except FileExistsError:
        raise InputError(f"{path}: another run has just begun to write it ({note})") from None
    except OSError:  # a folder where nothing can be written says so when the weights are
        pass
    try:
        yield
    finally:
        if holder(note) == mine:
            note.unlink(missing_ok=True)


def holder(note: Path) -> dict | None:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return {"host": str(found["host"]), "pid": int(found["pid"]), "run": str(found["run"])}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's
        return True
    except (OSError, OverflowError):
        return False
    return pid > 0


def refuse_changes(before: dict, now: dict, prefix: str = "") -> None:
    """Raises InputError for the first parameter that matters and differs from the run's."""
    for key in sorted(before.keys() | now.keys()):
        name = prefix + key
        old, new = before.get(key), now.get(key)
        if any(f"{name}.".startswith(f"{free}.") for free in FREE):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            refuse_changes(old, new, f"{name}.")
        elif are_sections(old) and are_sections(new) and len(old) == len(new):  # several classifiers
            for one, other in zip(old, new, strict=True):
                refuse_changes(one, other, f"{name}.")
        elif old != new:
            raise InputError(f"the run was started with {name} {old}, now it is {new}: set it back, or start a new run")


def where_best(run: Path | None, weights: str | None) -> str | None:
    """The file of a run's best weights: `weights`, unless another run has written it since; else best.pt of the run.

    `run` is None in torchrun's other processes, which don't look.
    """
    if run is None:
        return weights
    if weights is None:
        return str(run / BEST)
    with contextlib.suppress(OSError):  # no such file any more
        if filecmp.cmp(run / BEST, weights, shallow=False):
            return weights
    return f"{run / BEST}; {weights} does not hold them"


def are_sections(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


class RandomNumbers:
    """The state of torch's own random numbers, for a checkpoint: dropout draws from them."""

    @staticmethod
    def state_dict() -> dict:
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    @staticmethod
    def load_state_dict(state: dict) -> None:
        torch.set_rng_state(state["cpu"])
        if len(state["cuda"]) == torch.cuda.device_count():  # another machine draws other numbers anyway
            torch.cuda.set_rng_state_all(state["cuda"])


def to_cpu(state: object) -> object:
    """A copy of nested dicts and lists with every tensor on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [to_cpu(value) for value in state]
    return state
