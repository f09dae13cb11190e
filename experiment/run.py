"""A training run: its folder and locks, where it stands, its steps, what it saves, and how it is resumed exactly."""

import contextlib
import json
import math
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from experiment.data import Batch, ImageTree, batches, epoch_batches
from experiment.distillation import Losses, ema_update, validate
from experiment.metrics import log_to_tensorboard, require_tensorboard, write_csv, write_json
from experiment.runtime import LOGS, Runtime, Stopper, new_run_folder, progress_bar
from models.errors import InputError
from models.files import remove_partials, replace, write_atomically
from models.weights import load_file, save_to, save_weights

FILE, PREVIOUS, BEST = "checkpoint.pt", "checkpoint_previous.pt", "best.pt"
VERSION = 3  # of the checkpoint
BAD_STEPS_IN_A_ROW = 10  # the run gives up after as many losses that are not finite
UNREADABLE_FREE = 1000  # of more images than that at most one in a thousand may be unreadable
# A resumed run may change these: they alter neither the images nor the steps. Images and classifiers are compared by
# what they are ("images", "classifier_weights"), batches by their size over all processes.
FREE = ("test", "data", "classifier.weights", "training.batch_size", "training.epochs") + tuple(
    f"training.{key}" for key in ("verbose", "save", "checkpoint_minutes", "tensorboard", "recompute", "compile")
)


@dataclass
class State:
    """Where a run stands: all that it remembers beside its networks, optimizer and scaler."""

    epoch: int = 0  # the one in progress, from 0
    batch: int = 0  # the next one of it
    images: int = 0  # of the epoch so far, like the sums that follow
    loss: float = 0.0
    psnr_db: float = 0.0
    seconds: float = 0.0
    skipped: int = 0  # steps not taken: their loss was not finite
    bad_in_a_row: int = 0
    updates: int = 0  # of the averaged weights, in the whole run
    best: float = math.inf  # validation loss
    history: list[dict] = field(default_factory=list)  # a row per epoch
    unreadable: dict[int, str] = field(default_factory=dict)  # index of a training image -> reason, in the whole run

    def means(self) -> tuple[float, float, float]:
        """Loss (infinite without images), PSNR in dB and images/s of the epoch so far."""
        n = max(1, self.images)
        return self.loss / n if self.images else math.inf, self.psnr_db / n, self.images / max(self.seconds, 1e-9)


@dataclass
class Run:
    """What every training loop repeats; the loop itself stays in its script."""

    kind: str  # the start of a new folder's name
    folder: Path | None  # of a run to resume; None for a new one
    runtime: Runtime
    parameters: dict
    shared: dict  # plain values, beside the parameters, that a resumed run has to share with this one
    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module | None  # a copy of the network for averaged weights, which move at `training.ema_decay`
    output: str | None  # the file that the script writes the best weights to. No other run may write it meanwhile

    def __post_init__(self) -> None:
        self.training, self.resolved = self.parameters["training"], {"parameters": self.parameters} | self.shared
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.runtime.precision == "fp16")
        self.saved = {"network": self.network, "optimizer": self.optimizer, "scaler": self.scaler}
        if self.average is not None:
            self.saved["average"] = self.average
        self.state, self.stopper = State(), Stopper()
        self.stopped = False  # a signal asked to stop, and every process knows

    def __enter__(self) -> "Run":
        require_tensorboard(self.training["tensorboard"])
        is_main, is_new = self.runtime.is_main, self.folder is None
        with contextlib.ExitStack() as exits:
            exits.enter_context(self.stopper)
            if is_main and is_new:
                self.folder = new_run_folder(self.kind, job_suffix())
            if is_main:
                for path in filter(None, (self.folder / FILE, self.output)):
                    exits.enter_context(claimed(path))
            self.folder = self.runtime.gather(self.folder)[0]
            if not is_new:
                self.load()
            if is_main:
                remove_partials(self.folder)
                write_json(self.folder / "parameters.json", self.parameters)
            print(f"Run folder: {self.folder}")
            if is_new:
                self.save()  # what can't be written should fail now, not after an epoch
            else:
                print(f"Resumed at epoch {self.state.epoch + 1}, step {self.state.batch + 1}")
            self.saved_at = time.monotonic()
            self.exits = exits.pop_all()
        return self

    def __exit__(self, *exception) -> bool | None:
        return self.exits.__exit__(*exception)

    def save(self) -> None:
        """Writes the checkpoint; the one before is kept."""
        if self.runtime.is_main:
            checkpoint = {name: part.state_dict() for name, part in self.saved.items()}
            checkpoint |= {"state": asdict(self.state), "resolved": json.dumps(self.resolved)}
            save_checkpoint(self.folder, checkpoint | {"finished": self.state.epoch >= self.training["epochs"]})
        self.saved_at = time.monotonic()

    def load(self) -> None:
        checkpoint = load_checkpoint(self.folder)
        resolved = json.loads(checkpoint["resolved"])
        refuse_changes(resolved, self.resolved)
        was, now = resolved["parameters"]["training"]["epochs"], self.training["epochs"]
        if now != was and self.training["schedule"] == "cosine":
            print(f"Note: the learning rate goes on as the cosine of {now} epochs; it was that of {was}")
        for name, part in self.saved.items():
            part.load_state_dict(checkpoint[name])
        self.state = State(**checkpoint["state"])

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, from 0; ends early after a stop signal."""
        while self.state.epoch < self.training["epochs"] and not self.stopped:
            yield self.state.epoch

    def batches(self, dataset: ImageTree, of_epoch: list[list[int]], workers: int) -> Iterator[Batch]:
        """This process's part of the batches of an epoch that are left; each has to be given to `step`.

        `of_epoch` are those of all processes. Saves every `training.checkpoint_minutes`; ends after a stop signal.
        """
        state = self.state
        left = [self.runtime.part(batch) for batch in of_epoch[state.batch :]]
        title = f"epoch {state.epoch + 1}/{self.training['epochs']}"
        with progress_bar(len(of_epoch), title, self.training["verbose"], initial=state.batch) as bar:
            started = time.perf_counter()
            for batch in batches(dataset, left, workers, self.runtime.device.type == "cuda", self.stopper):
                lost = len(state.unreadable)
                yield batch
                now = time.perf_counter()
                state.seconds += now - started
                started = now
                bar.set_postfix_str("loss {:.4f}, {:.2f} dB, {:.1f} images/s".format(*state.means()), refresh=False)
                bar.update()
                if len(state.unreadable) > lost:
                    self.refuse_unreadable(dataset)
                if time.monotonic() - self.saved_at > 60 * self.training["checkpoint_minutes"]:
                    self.save()
                if self.stopped:
                    break
        self.stopped = self.stopper.agree(*self.runtime.sum_numbers(self.stopper.requested))

    def step(self, losses: Losses | None, batch: Batch, learning_rate: float) -> None:
        """Backward, average over the processes, clip, step, count. Not taken if loss or gradient are not finite.

        `losses` is None if none of this process's part could be read; the step is that of one process with all parts.
        """
        runtime, state, own = self.runtime, self.state, len(batch.images)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=runtime.widest, device=runtime.device)  # loss and PSNR, over images
        if losses is not None:
            self.scaler.scale(losses.total).backward()
            sums += torch.stack([losses.total.detach() * own, losses.psnr_db.sum()])
        count, stops, unreadable = runtime.sum_numbers(own, self.stopper.requested, len(batch.unreadable))
        state.batch += 1
        if unreadable:
            for part in runtime.gather(batch.unreadable):
                state.unreadable.update(part)
        self.stopped = self.stopper.agree(stops)
        if not count:
            return
        average_gradients(self.network, own, count, runtime)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.training["gradient_clip_norm"] or math.inf)
        total, psnr, norm = torch.cat([runtime.sum(sums), norm.to(sums).view(1)]).tolist()  # the one wait for a GPU
        if math.isfinite(total) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            state.images += int(count)
            state.loss += total
            state.psnr_db += psnr
            state.bad_in_a_row = 0
            if self.average is not None:
                ema_update(self.average, self.network, self.training["ema_decay"], state.updates)
                state.updates += 1
        else:
            state.skipped += 1
            # Gradients that overflow because they are scaled are no fault yet: the scaler halves its scale.
            settling = self.scaler.is_enabled() and math.isfinite(total) and self.scaler.get_scale() >= 1
            state.bad_in_a_row += not settling
        self.scaler.update()
        if state.bad_in_a_row >= BAD_STEPS_IN_A_ROW:
            fault = f"the loss was not finite {BAD_STEPS_IN_A_ROW} times in a row; the last checkpoint stands"
            raise InputError(f"{fault}: start a new run with a lower learning rate or training.precision float32")

    def refuse_unreadable(self, images: ImageTree) -> None:
        """Lists the unreadable images; raises InputError if they are over 0.1 % of more than 1000, or all."""
        lost, count = self.state.unreadable, len(images)
        if self.runtime.is_main:
            rows = [{"image": images.paths[i], "reason": reason} for i, reason in sorted(lost.items())]
            write_csv(self.folder / "unreadable.csv", rows)
        if len(lost) > (max(1, count // 1000) if count > UNREADABLE_FREE else count - 1):
            listed = self.folder / "unreadable.csv"
            raise InputError(f"{len(lost)} of {count} training images can't be read: mend or remove those in {listed}")

    def validate(
        self, loss: Callable[[Tensor], Losses], dataset: ImageTree, targets: list[int], batch_size: int, workers: int
    ) -> dict | None:
        """The scores of `distillation.validate` on a folder, of which this process reads its part of the batches."""
        lists = epoch_batches(len(dataset), batch_size, seed=0, epoch=0, shuffle=False, limit=None)
        own = self.runtime.part(lists)
        with progress_bar(len(own), "validation", self.training["verbose"], leave=False) as bar:
            arriving = batches(dataset, own, workers, stopper=self.stopper)
            return validate(loss, arriving, targets, self.runtime, self.stopper, bar)

    def end_epoch(self, learning_rate: float, scores: dict) -> tuple[dict, bool]:
        """The row of history.csv, and whether its validation loss is the best; the next epoch is in progress then."""
        state = self.state
        loss, psnr, speed = state.means()
        row = {"epoch": state.epoch + 1, "learning_rate": learning_rate, "train_loss": loss, "train_psnr_db": psnr}
        row |= scores | {"seconds": round(state.seconds, 2), "images_per_second": round(speed, 2)}
        row |= {"skipped_steps": state.skipped, "unreadable": len(state.unreadable)}
        self.state = State(
            epoch=state.epoch + 1,
            bad_in_a_row=state.bad_in_a_row,
            updates=state.updates,
            best=min(state.best, row["val_loss"]),
            history=[*state.history, row],
            unreadable=state.unreadable,
        )
        if self.runtime.is_main:
            write_csv(self.folder / "history.csv", self.state.history)
        return row, row["val_loss"] < state.best

    def log(self, row: dict, improved: bool, picture: Path | None = None) -> None:
        """Says on one line what `end_epoch` gave; TensorBoard, if wanted, shows it, too, and the picture."""
        accuracy = "" if row["val_accuracy"] is None else f"accuracy {row['val_accuracy']:.4f}, "
        print(
            f"epoch {row['epoch']}/{self.training['epochs']}: loss {row['train_loss']:.4f}; "
            f"validation loss {row['val_loss']:.4f}, {row['val_psnr_db']:.2f} dB, {accuracy}"
            f"agreement {row['val_agreement']:.4f}; {row['images_per_second']:.1f} images/s, "
            f"{row['seconds']:.0f} s{' (best so far)' if improved else ''}"
        )
        if self.training["tensorboard"] and self.runtime.is_main:
            log_to_tensorboard(self.folder / "tensorboard", row, picture)

    def save_weights(self, network: nn.Module, note: dict) -> None:
        """Writes the best weights to best.pt and `output`; `note` says what they were trained for."""
        for path in filter(None, (self.folder / BEST, self.output)):
            save_weights(network, path, note | {"run": str(self.folder)})

    def finish(self, command: str) -> int:
        """Prints how the run ended; `command` with --resume goes on with it. The exit code."""
        state = self.state
        if state.epoch < self.training["epochs"]:
            self.save()
            if self.runtime.processes > 1:
                starter = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"
                command = command.replace("python", starter, 1)
            print(f"Stopped in epoch {state.epoch + 1}. To go on: {command} --resume {self.folder}\n{self.folder}")
            return self.stopper.code
        if state.unreadable:
            print(f"{len(state.unreadable)} training images could not be read: {self.folder / 'unreadable.csv'}")
        if lost := state.history[-1]["val_unreadable"]:
            print(f"{lost} validation images could not be read and were not scored")
        if not math.isfinite(state.best):
            remedy = "lower training.learning_rate, or set training.precision to float32"
            raise InputError(f"the validation loss was never finite, so no weights were written: {remedy}")
        print(f"Weights of the best validation loss ({state.best:.4f}): {self.output or self.folder / BEST}")
        print(self.folder)
        return 0


def average_gradients(network: nn.Module, own: int, count: float, runtime: Runtime) -> None:
    """Turns gradients of means over each process's `own` images into that of the mean over all `count` images."""
    if runtime.processes == 1:
        return
    parameters = list(network.parameters())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = runtime.sum(torch.cat([gradient.flatten() for gradient in gradients]) * (own / count))
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(gradient.view_as(parameter))  # in the parameter's layout


# Checkpoints


def save_checkpoint(folder: Path, state: dict) -> None:
    """Writes checkpoint.pt; the one before is checkpoint_previous.pt. A kill leaves a whole one of the two."""
    path, previous = folder / FILE, folder / PREVIOUS

    def write(file) -> None:
        save_to(file, {"version": VERSION} | state)
        if is_whole(path):  # a damaged one must not take the place of a good one
            try:
                previous.unlink(missing_ok=True)
                os.link(path, previous)
            except OSError:  # no hard links here
                replace(path, previous)

    write_atomically(path, write)


def is_whole(path: Path) -> bool:
    """Whether the file exists, and the checksums that torch wrote into its archive hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile reports damage as one of many exceptions
        return False


def load_checkpoint(folder: Path) -> dict:
    """What `save_checkpoint` wrote; the one before, and a line that says so, if the last one is damaged or missing."""
    state = None
    for path in filter(is_whole, (folder / FILE, folder / PREVIOUS)):
        with contextlib.suppress(InputError):  # damage between the checksums
            state = load_file(path)
            break
    if state is None:
        raise InputError(f"{folder / FILE}: not a whole checkpoint, nor is {PREVIOUS}: start a new run")
    if path.name == PREVIOUS:
        print(f"{folder / FILE} is damaged or missing: going on from the one before, {path}")
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise InputError(f"{path}: not a checkpoint of this version of the program: start a new run")
    return state


def refuse_changes(before: dict, now: dict, prefix: str = "") -> None:
    """Raises InputError for the first value that matters and differs from the run's."""
    for key in sorted(before.keys() | now.keys()):
        name = prefix + key
        old, new = before.get(key), now.get(key)
        if any(f"{name}.".startswith(f"{free}.") for free in FREE):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            refuse_changes(old, new, "" if key == "parameters" else f"{name}.")
        elif old != new:
            raise InputError(f"the run was started with {name} {old}, now it is {new}: set it back, or start a new run")


# Which run


def run_to_resume(choice: str | None, kind: str = "train") -> Path | None:
    """The run to go on with: the job's own if torchrun starts it again, that of `--resume`, or None."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (runs := newest_runs(f"{kind}_*{job_suffix()}")):
        return runs[0]  # a process was lost
    if choice is None:
        return None
    if choice == "latest":
        runs = newest_runs(f"{kind}_*")
        if not runs:
            raise InputError(f"{LOGS}: no training run with a checkpoint; start without --resume")
        return next((run for run in runs if not is_finished(run)), runs[0])
    path = Path(choice)
    path = path.parent if path.is_file() else path
    if not any(path.glob("checkpoint*.pt")):
        raise InputError(f"{path}: no {FILE} to resume from; start without --resume")
    return path


def newest_runs(pattern: str) -> list[Path]:
    """The run folders that match, by the time of their last checkpoint, the newest first."""
    checkpoints = sorted(LOGS.glob(f"{pattern}/checkpoint*.pt"), key=lambda path: -path.stat().st_mtime_ns)
    return list(dict.fromkeys(path.parent for path in checkpoints))


def is_finished(run: Path) -> bool:
    """Whether its last checkpoint says so."""
    with contextlib.suppress(InputError):
        return load_file(run / FILE).get("finished", False)
    return False


def job_suffix() -> str:
    """The name of torchrun's job for the run's folder, the same after a restart; empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name == "none":  # torchrun's default
        name = ":".join(os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT"))
    return "_" + re.sub(r"[^A-Za-z0-9-]", "-", name)[:60] if name else ""


@contextlib.contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """Holds `path` by a lock on a hidden file beside it, which ends with the process; refused if another has it."""
    path = Path(os.path.realpath(path))
    lock = FileLock(path.with_name(f".{path.name}.lock"), blocking=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(f"{path}: another run is writing it: wait for that run, or name another file") from None
    except (OSError, NotImplementedError):  # a file system without locks; what can't be written says so itself
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()
