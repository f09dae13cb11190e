"""Trains DarioNet's rival: a copy of the classifier that learns to read small images, enlarged by interpolation.

    python examples/adapt_classifier.py --parameters my_parameters.json --output adapted.pth
    python examples/adapt_classifier.py --output adapted.pth --enlarge RealESRGAN_x4plus.pth   reads rebuilt images
    python examples/adapt_classifier.py --resume                          goes on with the one that was stopped last
    python test.py --parameters my_parameters.json --rival Adapted adapted.pth

It answers what a classifier that may change would gain. All but the copy is DarioNet's: images (no labels), reduction,
and loss, that of the copy's scores on the enlarged image against the frozen original's on the image itself, with
training.loss and the rest of `training`; pixels in the loss are left out, no weight of the copy moves them. BatchNorm
keeps its statistics, those of the published weights: small batches would only blur them. --output has the weights of
the best validation loss, and FILE.json beside it says how its images were enlarged, as test.py has to do it.
"""

import copy
import json
import math
import os
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # started as a file, python finds the packages beside it

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from experiment.checkpoint import State, load_checkpoint, refuse_changes, run_to_resume, save_checkpoint, to_cpu
from experiment.data import ImageTree, Loader, Transform, batches_until_stopped, epoch_batches
from experiment.distillation import (
    TERMS,
    Losses,
    Views,
    ema_update,
    learning_rate_at,
    psnr_db,
    refuse_unreadable,
    step,
    validate,
)
from experiment.evaluation import open_restore
from experiment.metrics import write_csv, write_json
from experiment.parameters import read_parameters, run_script, script_parser
from experiment.runtime import (
    DTYPES,
    LOGS,
    Stopper,
    duration,
    new_run_folder,
    out_of_memory_is_one_line,
    progress_bar,
    seed_without_tf32,
    start_runtime,
)
from models.classifier import FrozenClassifier, open_classifier, save_classifier
from models.darionet import prepare, write_note
from models.errors import InputError
from models.scaler import RandomReduction, Reduction
from models.weights import refuse_unwritable_weights


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--output", metavar="FILE", help="the adapted classifier's weights")
    parser.add_argument(
        "--enlarge",
        metavar="HOW",
        help="bilinear (the default), bicubic, nearest, or an upscaler: a file, or a name as darionet.initial_weights",
    )
    parser.add_argument("--resume", nargs="?", const="latest", metavar="RUN", help="go on with a stopped run")
    arguments = parser.parse_args()
    with Stopper() as stopper:
        # Set-up
        folder = run_to_resume(LOGS, arguments.resume, "adapt")
        checkpoint = None if folder is None else load_checkpoint(folder)
        default = "parameters.json" if folder is None else folder / "parameters.json"
        parameters = read_parameters(arguments.parameters or default, arguments.set)
        t, training, data = parameters.transformations, parameters.training, parameters.data
        begun_with = {} if checkpoint is None else json.loads(checkpoint["resolved"])["options"]
        output = arguments.output or begun_with.get("output")
        enlarge = arguments.enlarge or begun_with.get("enlarge", "bilinear")
        refuse_output(output, {"classifier.weights": parameters.classifier[0].weights, "--enlarge": enlarge})
        weights = {name: weight for name, weight in training.loss.model_dump().items() if weight and name != "pixels"}
        if not weights:
            raise InputError("training.loss: pixels alone teach a classifier nothing: set logits, as in logits 1")
        runtime = start_runtime(training.precision)
        if runtime.processes > 1:
            raise InputError("one process adapts a classifier: start it with python, not with torchrun")
        seed_without_tf32(training.seed)
        loader = partial(Loader, workers=data.workers, pin_memory=runtime.device.type == "cuda")
        train_set, val_set = ImageTree(data.train), ImageTree(data.val, Transform(t.resize_size, t.val_crop_size))
        class_sizes = Counter(map(train_set.folder_of, range(len(train_set))))
        teacher = open_classifier(**parameters.classifier[0].model_dump())
        prepare(teacher, runtime.device)
        for key in ("train_crop_size", "val_crop_size"):
            teacher.require(getattr(t, key), f"transformations.{key}")
        targets = val_set.targets(teacher.class_names)
        student = trainable_copy(teacher)
        average = None
        if training.ema_decay is not None:
            average = AveragedModel(student, multi_avg_fn=partial(ema_update, decay=training.ema_decay))
        evaluated = student if average is None else average.module  # what is validated and written
        reduction = Reduction(t.scale, t.interpolation, t.antialias)
        random = None if t.random_reduction is None else RandomReduction(reduction, **t.random_reduction.model_dump())
        restore = open_restore(enlarge, reduction, runtime.device)
        betas = (0.9, training.adam_beta2)
        optimizer = torch.optim.Adam(student.parameters(), lr=training.learning_rate, betas=betas, fused=True)
        scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        state = State()
        remembered = {"state": state, "network": student.network, "optimizer": optimizer, "scaler": scaler}
        remembered |= {} if average is None else {"average": average}
        resolved = parameters.model_dump() | {
            "options": {"enlarge": enlarge, "output": output},
            "used_precision": runtime.precision,
            "images": {"data.train": train_set.fingerprint(), "data.val": val_set.fingerprint()},
            "classifier_weights": teacher.fingerprint(),
        }
        if checkpoint is not None:
            refuse_changes(json.loads(checkpoint["resolved"]), resolved)
            for key, thing in remembered.items():
                thing.load_state_dict(checkpoint[key])
        folder = new_run_folder("adapt") if folder is None else folder
        write_json(folder / "parameters.json", parameters.model_dump())
        terms = " + ".join(f"{weight:g} x {name}" for name, weight in weights.items())
        print(f"A copy of {parameters.classifier[0].architecture} learns to read small images, enlarged: {enlarge}")
        print(f"Images: {len(train_set)} in {train_set.root}; validation: {len(val_set)} in {val_set.root}")
        print(f"Reduction: {random or reduction}; loss: {terms}; Adam, learning rate {training.learning_rate:g}")
        print(f"{training.epochs} epochs, batch size {training.batch_size}; {runtime.describe()}")
        print(f"Run folder: {folder}")

        def remember() -> None:
            states = {key: to_cpu(thing.state_dict()) for key, thing in remembered.items()}
            save_checkpoint(folder, states | {"resolved": json.dumps(resolved)}, state.epoch == training.epochs)

        def loss(images: Tensor, indices: Tensor, reader: FrozenClassifier, key: str | None = None) -> Losses:
            """Of `reader` on the enlarged images against the teacher on `images`; `key` draws a random reduction."""
            reduce = reduction if random is None or key is None else random.drawn(key, indices.tolist())
            with torch.no_grad():
                views = Views(images, reduce(images), restore, [teacher])
                enlarged, on_original = views.rebuilt, views.on_original
            on_enlarged = [reader.look(enlarged)]
            views.known["on_rebuilt"] = on_enlarged  # read by the copy, not by the teacher
            total = torch.stack([weight * TERMS[name](views) for name, weight in weights.items()]).sum()
            return Losses(total, {}, psnr_db(enlarged, images), on_enlarged[0].logits, on_original[0].logits)

        if checkpoint is None:
            remember()  # what can't be written should fail now, not after an epoch

        # Training
        order = {"seed": training.seed, "shuffle": training.shuffle, "limit": training.batches_per_epoch}
        size = training.batch_size
        steps_per_epoch = len(epoch_batches(len(train_set), size, epoch=0, **order))
        total_steps = steps_per_epoch * training.epochs
        schedule = (total_steps, training.learning_rate, training.schedule, training.warmup_steps)
        flips = (t.random_horizontal_flip_probability, t.random_vertical_flip_probability)
        first, saved = state.epoch * steps_per_epoch + state.batch, time.monotonic()
        begun, estimated = time.perf_counter(), False
        for epoch in range(state.epoch, training.epochs):
            train_set.transform = Transform(t.resize_size, t.train_crop_size, *flips, training.seed, epoch)
            left = epoch_batches(len(train_set), size, epoch=epoch, **order)[state.batch :]
            bar = progress_bar(
                steps_per_epoch, f"epoch {epoch + 1}/{training.epochs}", training.verbose, initial=state.batch
            )
            started = time.perf_counter()
            with bar, out_of_memory_is_one_line(runtime, size, "training.batch_size"):
                for batch in batches_until_stopped(loader(train_set, left), stopper):
                    done = step(
                        batch,
                        partial(loss, reader=student, key=f"{training.seed}/{epoch}/{state.batch}"),
                        student,
                        optimizer,
                        scaler,
                        runtime,
                        learning_rate=learning_rate_at(epoch * steps_per_epoch + state.batch, *schedule),
                        clip_norm=training.gradient_clip_norm,
                        stop=stopper.requested,
                    )
                    if average is not None and done.taken:
                        average.update_parameters(student)
                    now = time.perf_counter()
                    state.count(done, now - started)
                    started = now
                    if done.unreadable:
                        write_csv(folder / "unreadable.csv", state.unreadable_rows(train_set.paths))
                        refuse_unreadable(state.unreadable, train_set, class_sizes)
                    bar.set_postfix_str(state.summary(), refresh=False)
                    bar.update()
                    at = epoch * steps_per_epoch + state.batch
                    if not estimated and now - begun > 5:  # seconds
                        estimated = True
                        seconds = (total_steps - at) * (now - begun) / (at - first)
                        bar.write(f"Training to go: {duration(seconds)}, and the validation of every epoch")
                    if time.monotonic() - saved > 60 * training.checkpoint_minutes:
                        remember()
                        saved = time.monotonic()
                    if done.stops:
                        break
            if stopper.requested:
                break

            # Validation, and what an epoch leaves
            batches = [list(range(len(val_set)))[i : i + size] for i in range(0, len(val_set), size)]
            with progress_bar(len(batches), "validation", training.verbose, leave=False) as bar:
                reads = partial(loss, reader=evaluated)
                scores = validate(reads, loader(val_set, batches), targets, runtime, stopper, bar)
            if scores is None:
                break
            row, improved = state.end_epoch(learning_rate_at((epoch + 1) * steps_per_epoch - 1, *schedule), scores)
            if improved:
                names = {"architecture": parameters.classifier[0].architecture}
                names |= {"mean": evaluated.mean.flatten().tolist(), "std": evaluated.std.flatten().tolist()}
                save_classifier(evaluated.network, evaluated.class_names, output, **names)
                note = {
                    **reduction.note(),
                    "random_reduction": parameters.model_dump()["transformations"]["random_reduction"],
                    "enlarge": enlarge,
                    "classifier": parameters.classifier[0].model_dump(),
                    "loss": weights,
                    "run": str(folder),
                }
                write_note(output, note)
            write_csv(folder / "history.csv", state.history)
            remember()
            saved = time.monotonic()
            print(
                f"epoch {epoch + 1}/{training.epochs}: loss {row['train_loss']:.4f}; validation loss "
                f"{row['val_loss']:.4f}, agreement {row['val_agreement']:.4f}; "
                f"{row['images_per_second']:.1f} images/s, {row['seconds']:.0f} s{' (best so far)' if improved else ''}"
            )
        if state.epoch < training.epochs:
            remember()
            print(f"Stopped in epoch {state.epoch + 1}. To go on: add --resume {folder}")
            print(folder)
            return stopper.code
    if state.unreadable:
        print(f"{len(state.unreadable)} training images could not be read: {folder / 'unreadable.csv'}")
    if lost := state.history[-1]["val_unreadable"]:
        print(f"{lost} of {len(val_set)} validation images could not be read and were not scored")
    if not math.isfinite(state.best):
        raise InputError("the validation loss was never finite, so nothing was written: lower training.learning_rate")
    print(f"Weights of the best validation loss ({state.best:.4f}): {output}")
    print(folder)
    return 0


def trainable_copy(teacher: FrozenClassifier) -> FrozenClassifier:
    """A copy whose weights take gradients; like every FrozenClassifier it stays in evaluation mode."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.folded = dict.fromkeys(DTYPES.values())  # no folded copies: gradients would not reach the weights
    return student


def refuse_output(output: str | None, others: dict[str, str | None]) -> None:
    """Raises InputError where --output is missing, can't be written, or would overwrite one of the `others`."""
    if output is None:
        raise InputError("--output is missing: name the file to write the adapted classifier to")
    for key, path in others.items():
        if path is not None and os.path.realpath(path) == os.path.realpath(output):
            raise InputError(f"--output {output}: the same file as {key}, which it would overwrite")
    refuse_unwritable_weights(output, "--output")


if __name__ == "__main__":
    run_script(main)
