"""Atomic save and exact resume of a training run."""

import errno
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from experiment.distillation import Step
from models.errors import InputError
from models.weights import load_file, save_to, write_atomically

FILE = "checkpoint.pt"
PREVIOUS = "checkpoint_previous.pt"
JOB = "torchrun.json"  # which of torchrun's jobs the run belongs to
VERSION = 1
MARK = b"\nSHA-256 "  # torch and zip ignore what stands after the archive: this, and the checksum of all before it
TRAILER = len(MARK) + 64
# What a resumed run may change: it alters neither the images nor the steps.
FREE = ("training.verbose", "training.save", "training.checkpoint_minutes", "data.workers")


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
                f"the loss was not finite {BAD_STEPS_IN_A_ROW} times in a row: lower training.learning_rate, "
                "or set training.precision to float32; the last checkpoint stands"
            )

    def means(self) -> tuple[float, float, float]:
        """Loss (infinite without images), PSNR in dB and images/s of the epoch so far."""
        n = max(1, self.images)
        return self.loss / n if self.images else math.inf, self.psnr_db / n, self.images / max(self.seconds, 1e-9)

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


def save_checkpoint(folder: Path, state: dict) -> None:
    """Writes FOLDER/checkpoint.pt, tensors and plain values and a checksum; the one before is checkpoint_previous.pt.

    Whenever it is killed, a whole one of the two stands.

    Raises:
        OSError: it can't be written; the one before stands.
    """
    path = folder / FILE

    def write(file: BinaryIO) -> None:
        write_checked({"version": VERSION} | state, file)
        if is_whole(path):  # a damaged one must not take the place of a good one
            keep(path, folder / PREVIOUS)

    write_atomically(path, write)


def keep(path: Path, copy: Path) -> None:
    """Gives the file a second name; where the file system has no hard links, the second in place of the first."""
    try:
        copy.unlink(missing_ok=True)
        os.link(path, copy)
    except OSError:
        os.replace(path, copy)


def write_checked(state: dict, file: BinaryIO) -> None:
    """`torch.save`, then the checksum of what it wrote."""
    checked = Checksum(file)
    save_to(checked, state)
    file.write(MARK + checked.sha256.hexdigest().encode())
    file.flush()
    os.fsync(file.fileno())
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
        raise InputError(f"{path}: not a checkpoint of this version of train_darionet.py")
    return state


def latest_run(logs: Path) -> Path:
    """The newest training run in `logs` that has a checkpoint.

    Raises:
        InputError: there is none.
    """
    runs = runs_with_checkpoint(logs)
    if not runs:
        raise InputError(f"{logs}: no training run with a checkpoint; start without --resume")
    return runs[-1]


def runs_with_checkpoint(logs: Path) -> list[Path]:
    """The training runs in `logs`, oldest first."""
    return sorted({path.parent for name in (FILE, PREVIOUS) for path in logs.glob(f"train_*/{name}")})


def remember_job(folder: Path, launchers: list[str]) -> None:
    """Notes in a run's folder which launchers (of torchrun's processes) it belongs to."""
    write_atomically(folder / JOB, lambda file: file.write(json.dumps(sorted(set(launchers))).encode()))


def run_of_job(logs: Path, launchers: list[str]) -> Path | None:
    """The newest run in `logs` that one of these launchers (of torchrun's processes) started; None without any."""
    for run in reversed(runs_with_checkpoint(logs)):
        try:
            started_by = json.loads((run / JOB).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if set(started_by) & set(launchers):
            return run
    return None


def refuse_changes(before: dict, now: dict, prefix: str = "") -> None:
    """Raises InputError for the first parameter that matters and differs from the run's."""
    for key in sorted(before.keys() | now.keys()):
        name = prefix + key
        old, new = before.get(key), now.get(key)
        if name == "test" or name in FREE:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            refuse_changes(old, new, f"{name}.")
        elif old != new:
            raise InputError(f"the run was started with {name} {old}, now it is {new}: set it back, or start a new run")


def to_cpu(state: object) -> object:
    """A copy of nested dicts and lists with every tensor on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [to_cpu(value) for value in state]
    return state
