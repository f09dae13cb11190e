"""Distils DarioNet: teaches an RRDBNet to rebuild small images for a frozen classifier.

    python train_darionet.py                                     parameters.json
    python train_darionet.py --parameters examples/shapes/parameters.json
    python train_darionet.py --set training.epochs=1 --set training.batch_size=8
    python train_darionet.py --resume                            goes on with the newest run
    python train_darionet.py --resume assets/logs/train_20260101-120000
    torchrun --nproc_per_node=4 train_darionet.py                one process a GPU; training.batch_size is each one's

The loss is the mean squared error between the classifier's scores (before the softmax) on the original image and on the
image that was reduced and rebuilt (training.loss adds pixels and features). Everything is written to
assets/logs/train_<stamp>/, and the weights of the best validation loss to darionet.weights as well.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the seconds of the imports ends it without a traceback

import json
import math
import os
import time
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import torch
from tqdm import tqdm

from experiment import plots
from experiment.checkpoint import (
    forget_job,
    job_id,
    latest_run,
    load_checkpoint,
    refuse_changes,
    remember_job,
    run_folder_of,
    run_of_job,
    save_checkpoint,
    to_cpu,
)
from experiment.data import ImageFolder, Transform, epoch_batches, make_loader, to_float
from experiment.distillation import (
    Progress,
    distillation_loss,
    learning_rate_at,
    train_epoch,
    unreadable_check,
    validate,
)
from experiment.metrics import write_csv, write_json
from experiment.parameters import Parameters, read_parameters, run_script, script_parser
from experiment.runtime import (
    DTYPES,
    Stopper,
    choose_runtime,
    compiled,
    make_deterministic,
    new_run_folder,
    out_of_memory,
)
from models.classifier import FrozenClassifier
from models.darionet import build_darionet, write_note
from models.errors import InputError
from models.files import check_writable, remove_partials
from models.pipeline import Pipeline
from models.weights import save_file

SAMPLES = 6  # validation images in the strip of every epoch
ESTIMATE_AFTER = 10  # seconds of training


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="RUN",
        help="go on with a run: its folder in assets/logs (default: the newest)",
    )
    arguments = parser.parse_args()
    folder, state = None, None
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # by torchrun, after a process was lost
        folder = run_of_job(Path("assets/logs"), job_id())
    elif job_id() is not None and os.environ["RANK"] == "0":
        forget_job(Path("assets/logs"), job_id())
    if folder is None and arguments.resume:
        folder = latest_run(Path("assets/logs")) if arguments.resume == "latest" else run_folder_of(arguments.resume)
    if folder is not None:
        state = load_checkpoint(folder)
    default = "parameters.json" if folder is None else folder / "parameters.json"
    parameters = read_parameters(arguments.parameters or default, arguments.set)
    with Stopper() as stopper:
        run = Run(parameters, stopper)
        if state is not None:
            run.restore(state)
        if folder is None and run.runtime.is_main:
            folder = new_run_folder("train")
        return run.train(folder)


class Run:
    """One training run: its images, its networks, and where it stands."""

    def __init__(self, parameters: Parameters, stopper: Stopper):
        self.parameters = parameters
        self.stopper = stopper
        t, training, data, d = parameters.transformations, parameters.training, parameters.data, parameters.darionet
        self.runtime = choose_runtime(training.precision)
        make_deterministic(training.seed)

        self.train_set = ImageFolder(data.train)
        self.val_set = ImageFolder(data.val, Transform(t.resize_size, t.val_crop_size))
        self.steps_per_epoch = len(self.batches(epoch=0))
        self.total_steps = self.steps_per_epoch * training.epochs
        self.check_unreadable = unreadable_check([self.train_set.folder_of(i) for i in range(len(self.train_set))])
        self.loader = partial(make_loader, workers=data.workers, pin_memory=self.runtime.device.type == "cuda")

        classifier = FrozenClassifier(parameters.classifier.architecture, parameters.classifier.weights)
        classifier.to(self.runtime.device, memory_format=torch.channels_last)
        for key in ("train_crop_size", "val_crop_size"):
            classifier.require(getattr(t, key), f"transformations.{key}")
        if self.runtime.precision != "float32":
            classifier.fold(DTYPES[self.runtime.precision])
        self.targets = self.val_set.targets(classifier.class_names)
        self.network = build_darionet(d.features, d.blocks, d.growth, d.initial_weights, self.runtime.device)
        self.network.recompute = training.recompute
        scaling = {"scale": t.scale, "interpolation": t.interpolation, "antialias": t.antialias}
        self.pipeline = Pipeline("DarioNet", classifier, upscaler=self.network, **scaling)
        loss = partial(distillation_loss, **training.loss.model_dump())
        self.loss = compiled(loss) if training.compile and self.runtime.device.type == "cuda" else loss
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=training.learning_rate, fused=True)
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.runtime.precision == "fp16")

        self.epoch = 0  # the one in progress, from 0
        self.progress = Progress()  # within it
        self.history: list[dict] = []
        self.best = math.inf  # validation loss
        self.estimated = self.resumed = False

    def restore(self, state: dict) -> None:
        """Goes back to where `checkpoint` stood.

        Raises:
            InputError: the run was started with other parameters, or another number of processes.
        """
        refuse_changes(json.loads(state["parameters"]), self.resolved)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        self.resumed = True

    def checkpoint(self) -> None:
        if not self.runtime.is_main:
            return
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "progress": asdict(self.progress),
            "history": self.history,
            "best": self.best,
            "parameters": json.dumps(self.resolved),
        }
        save_checkpoint(self.folder, to_cpu(state), finished=self.epoch == self.parameters.training.epochs)
        self.saved = time.monotonic()

    def train(self, folder: Path | None) -> int:
        """Trains to the end or a signal; returns the exit code. Only the main process has a folder."""
        self.folder = folder
        if self.runtime.is_main:
            if self.resumed:
                remove_partials(folder)
            if job_id() is not None:
                remember_job(folder, job_id())
            write_json(folder / "parameters.json", self.parameters.model_dump())
            self.announce()
            if self.parameters.training.save:
                try:
                    check_writable(self.parameters.darionet.weights)
                except OSError as error:
                    place = self.parameters.darionet.weights
                    raise InputError(f"{place}: can't be written ({error.strerror}); change darionet.weights") from None
        if not self.epoch and not self.progress.batch:
            self.checkpoint()  # what can't be written should fail now, not after an epoch
        self.saved = time.monotonic()
        epochs = self.parameters.training.epochs
        while self.epoch < epochs:
            if not self.agreed_to_stop():
                self.train_epoch()
            scores = None if self.agreed_to_stop() else self.validate()
            if scores is not None:
                self.finish_epoch(scores)
            if self.agreed_to_stop() and self.epoch < epochs:
                self.checkpoint()
                if self.runtime.is_main:
                    started = "python"
                    if self.runtime.processes > 1:
                        started = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"
                    command = f"{started} train_darionet.py --resume {folder}"
                    print(f"Stopped in epoch {self.epoch + 1}. To go on: {command}")
                    print(folder)
                return self.stopper.code
        if not self.runtime.is_main:
            return 0
        if self.progress.unreadable:
            print(f"{len(self.progress.unreadable)} training images could not be read: {folder / 'unreadable.csv'}")
        if self.history[-1]["val_unreadable"]:
            print(f"{self.history[-1]['val_unreadable']} validation images could not be read and were not scored")
        if not math.isfinite(self.best):
            raise InputError(
                "the validation loss was never finite, so no weights were written: lower training.learning_rate, "
                "or set training.precision to float32"
            )
        if self.parameters.training.save:
            print(f"Weights of the best validation loss ({self.best:.4f}): {self.parameters.darionet.weights}")
        print(folder)
        return 0

    def agreed_to_stop(self) -> bool:
        """Whether any of the processes was asked to stop: then all of them do."""
        stops = any(self.runtime.gather(self.stopper.requested))
        if stops:
            self.stopper.stop_with_others()
        return stops  # and not what has come since: all have to do the same

    @cached_property
    def resolved(self) -> dict:
        """The parameters and what they meet here: what a resumed run has to share with this one."""
        return self.parameters.model_dump() | {
            "processes": self.runtime.processes,
            "used_precision": self.runtime.precision,  # what "auto" is here
            "images": {"data.train": self.train_set.fingerprint(), "data.val": self.val_set.fingerprint()},
            "classifier_weights": self.pipeline.classifier.fingerprint(),
        }

    def batches(self, epoch: int) -> list[list[int]]:
        """The epoch's batches of indices into the training images."""
        training = self.parameters.training
        return epoch_batches(
            len(self.train_set),
            training.batch_size * self.runtime.processes,
            seed=training.seed,
            epoch=epoch,
            shuffle=training.shuffle,
            limit=training.batches_per_epoch,
        )

    def bar(self, total: int, description: str, **options) -> tqdm:
        """A progress bar, on terminals alone."""
        verbose = self.parameters.training.verbose and self.runtime.is_main
        return tqdm(total=total, desc=description, disable=None if verbose else True, **options)

    def learning_rate(self, batch: int) -> float:
        training = self.parameters.training
        step = self.epoch * self.steps_per_epoch + batch
        return learning_rate_at(
            step, self.total_steps, training.learning_rate, training.schedule, training.warmup_steps
        )

    def train_epoch(self) -> None:
        """Trains on what is left of the epoch, or until a signal asks to stop."""
        t, training = self.parameters.transformations, self.parameters.training
        self.train_set.transform = Transform(
            t.resize_size,
            t.train_crop_size,
            t.random_horizontal_flip_probability,
            t.random_vertical_flip_probability,
            training.seed,
            self.epoch,
        )
        left = [self.runtime.part(batch) for batch in self.batches(self.epoch)[self.progress.batch :]]
        bar = self.bar(self.steps_per_epoch, f"epoch {self.epoch + 1}/{training.epochs}", initial=self.progress.batch)
        try:
            train_epoch(
                self.pipeline,
                self.loss,
                self.optimizer,
                self.scaler,
                self.loader(self.train_set, left),
                self.runtime,
                self.progress,
                learning_rate=self.learning_rate,
                gradient_clip_norm=training.gradient_clip_norm,
                check_unreadable=self.check_unreadable,
                after_step=self.after_step,
                stopper=self.stopper,
                bar=bar,
            )
        except torch.OutOfMemoryError:
            raise out_of_memory(self.runtime, training.batch_size, "training.batch_size") from None
        finally:
            bar.close()
            self.list_unreadable()

    def after_step(self) -> None:
        """Says once how long the run will take, and saves a checkpoint every checkpoint_minutes."""
        if self.runtime.is_main and not self.estimated:
            self.estimate()
        if time.monotonic() - self.saved > 60 * self.parameters.training.checkpoint_minutes:
            self.checkpoint()

    def estimate(self) -> None:
        """Says how long the run will take, once there are some seconds of training to tell from."""
        p = self.progress
        trained = p.seconds + sum(row["seconds"] for row in self.history)
        if trained <= ESTIMATE_AFTER:
            return
        self.estimated = True
        images = p.images + sum(row["seconds"] * row["images_per_second"] for row in self.history)
        steps = self.total_steps - self.epoch * self.steps_per_epoch - p.batch
        seconds = steps * self.parameters.training.batch_size * self.runtime.processes * trained / max(1, images)
        tqdm.write(f"Training to go: {duration(seconds)}, at {images / trained:.1f} images/s")

    def validate(self) -> dict | None:
        """The scores on the validation images; None where a signal asked to stop."""
        size = self.parameters.training.batch_size
        batches = [list(range(i, min(i + size, len(self.val_set)))) for i in range(0, len(self.val_set), size)]
        batches = self.runtime.part(batches)
        with self.bar(len(batches), "validation", leave=False) as bar:
            loader = self.loader(self.val_set, batches)
            return validate(self.pipeline, self.loss, loader, self.targets, self.runtime, self.stopper, bar)

    def finish_epoch(self, scores: dict) -> None:
        """Writes history, figures, weights and a checkpoint; the next epoch is in progress afterwards."""
        p = self.progress
        loss, psnr = p.summary()
        row = {
            "epoch": self.epoch + 1,
            "learning_rate": self.learning_rate(self.steps_per_epoch - 1),
            "train_loss": loss,
            "train_psnr_db": psnr,
            **scores,
            "seconds": round(p.seconds, 2),
            "images_per_second": round(p.images / max(p.seconds, 1e-9), 2),
            "skipped_steps": p.skipped,
            "unreadable": len(p.unreadable),
        }
        self.history.append(row)
        improved = row["val_loss"] < self.best
        self.best = min(self.best, row["val_loss"])
        if self.runtime.is_main:
            self.write_epoch(row, improved)
        self.epoch += 1
        self.progress = p.new_epoch()
        self.checkpoint()

    def write_epoch(self, row: dict, improved: bool) -> None:
        """Writes what an epoch leaves, and prints its line."""
        weights = self.parameters.darionet.weights
        if improved:
            for path in [self.folder / "best.pt"] + ([weights] if self.parameters.training.save else []):
                save_file(to_cpu(self.network.state_dict()), path)
                write_note(path, self.provenance())
        write_csv(self.folder / "history.csv", self.history)
        plots.training_curves(self.history, self.folder / "curves.png")
        self.draw_samples(self.folder / "samples" / f"epoch_{self.epoch + 1:02d}.png")
        accuracy = "" if row["val_accuracy"] is None else f"accuracy {row['val_accuracy']:.4f}, "
        print(
            f"epoch {row['epoch']}/{self.parameters.training.epochs}: loss {row['train_loss']:.4f}; "
            f"validation loss {row['val_loss']:.4f}, {row['val_psnr_db']:.2f} dB, {accuracy}"
            f"agreement {row['val_agreement']:.4f}; {row['images_per_second']:.1f} images/s, "
            f"{row['seconds']:.0f} s{' (best so far)' if improved else ''}"
        )

    @torch.no_grad()
    def draw_samples(self, path: Path) -> None:
        """A strip of validation images from all over the folder: original, small, bilinear, DarioNet."""
        spread = range(0, len(self.val_set), max(1, len(self.val_set) // SAMPLES))
        images = [image for _, image in map(self.val_set.__getitem__, spread) if isinstance(image, torch.Tensor)]
        if not images:
            return
        originals = to_float(torch.stack(images[:SAMPLES]), self.runtime.device)
        with self.runtime.autocast():
            small, rebuilt, _ = self.pipeline(originals)
        bilinear = Pipeline("Bilinear", self.pipeline.classifier, scale=None).restore(small, originals.shape[-2:])
        plots.image_grid({"original": originals, "small": small, "bilinear": bilinear, "DarioNet": rebuilt}, None, path)

    def provenance(self) -> dict:
        """What the weights were trained for; stands beside them, so that others can say when their input differs."""
        t = self.parameters.transformations
        return {
            "scale": t.scale,
            "interpolation": t.interpolation,
            "antialias": t.antialias,
            "classifier": self.parameters.classifier.model_dump(),
            "loss": self.parameters.training.loss.model_dump(),
            "run": str(self.folder),
        }

    def list_unreadable(self) -> None:
        if not self.runtime.is_main:
            return
        rows = [{"image": self.train_set.paths[i], "reason": r} for i, r in sorted(self.progress.unreadable.items())]
        if rows:
            write_csv(self.folder / "unreadable.csv", rows)

    def announce(self) -> None:
        """Prints what will be done, and on what."""
        t, training, d = self.parameters.transformations, self.parameters.training, self.parameters.darionet
        terms = " + ".join(f"{weight:g} x {name}" for name, weight in training.loss.model_dump().items() if weight)
        count = sum(p.numel() for p in self.network.parameters())
        print(f"DarioNet: {d.blocks} blocks, {count:,} parameters, from {d.initial_weights or 'random weights'}")
        print(f"Classifier: {self.parameters.classifier.architecture}, {self.parameters.classifier.weights}, frozen")
        print(f"Images: {len(self.train_set)} in {self.train_set.root}")
        print(f"Validation: {len(self.val_set)} in {self.val_set.root}")
        print(
            f"Scaler: x{t.scale} {t.interpolation}{', antialiased' if t.antialias else ''}; crops: {t.train_crop_size}"
        )
        print(f"Loss: {terms}; Adam, learning rate {training.learning_rate:g} ({training.schedule})")
        print(f"Steps: {training.epochs} epochs of {self.steps_per_epoch}, batch size {training.batch_size}")
        print(f"Machine: {self.runtime.describe()}")
        if self.resumed and self.epoch == training.epochs:
            print(f"This run is finished: all of its {self.epoch} epochs are done")
        elif self.resumed:
            print(f"Resumed at epoch {self.epoch + 1}, step {self.progress.batch + 1}")
        print(f"Run folder: {self.folder}")


def duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min" if minutes else "less than a minute"


if __name__ == "__main__":
    run_script(main)
