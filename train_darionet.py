"""Distils DarioNet: teaches an RRDBNet to rebuild small images for a frozen classifier.

    python train_darionet.py                                     parameters.json
    python train_darionet.py --parameters examples/shapes/parameters.json
    python train_darionet.py --set training.epochs=1 --set training.batch_size=8
    python train_darionet.py --resume                            goes on with the run that was stopped last
    python train_darionet.py --resume assets/logs/train_20260101-120000
    torchrun --nproc_per_node=4 train_darionet.py                one process a GPU; training.batch_size is each one's

The loss is the mean squared error between the classifier's scores (before the softmax) on the original image and on the
image that was reduced and rebuilt; training.loss adds other terms. Everything is written to
assets/logs/train_<stamp>/, and the weights of the best validation loss to darionet.weights as well.
"""

import json
import math
import os
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from experiment import plots
from experiment.checkpoint import (
    BEST,
    State,
    claim,
    job_id,
    load_checkpoint,
    refuse_changes,
    remember_job,
    run_to_resume,
    save_checkpoint,
    to_cpu,
    where_best,
)
from experiment.data import ImageTree, Loader, Transform, batches_until_stopped, epoch_batches, to_float
from experiment.distillation import (
    distillation_loss,
    ema_update,
    learning_rate_at,
    refuse_unreadable,
    step,
    validate,
)
from experiment.metrics import BASELINE, OURS, log_to_tensorboard, require_tensorboard, write_csv, write_json
from experiment.parameters import Parameters, read_parameters, run_script, script_parser
from experiment.runtime import (
    LOGS,
    Runtime,
    Stopper,
    agreed_to_stop,
    compiled,
    duration,
    new_run_folder,
    out_of_memory_is_one_line,
    progress_bar,
    seed_without_tf32,
    start_runtime,
)
from models.classifier import FrozenClassifier, open_classifier
from models.darionet import build_darionet, prepare, write_note
from models.errors import InputError
from models.files import remove_partials
from models.pipeline import Enlarge, Pipeline, Upscale
from models.scaler import RandomReduction, Reduction
from models.weights import refuse_unwritable_weights, save_file

SAMPLES = 6  # validation images in the strip of every epoch


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="RUN",
        help="go on with a run: its folder in assets/logs (default: the one that was stopped last)",
    )
    arguments = parser.parse_args()
    with Stopper() as stopper:
        # Set-up: parameters, images, networks, and where the run stands.
        folder = run_to_resume(LOGS, arguments.resume)
        checkpoint = None if folder is None else load_checkpoint(folder)
        default = "parameters.json" if folder is None else folder / "parameters.json"
        parameters = read_parameters(arguments.parameters or default, arguments.set)
        t, training, data, d = parameters.transformations, parameters.training, parameters.data, parameters.darionet
        require_tensorboard(training.tensorboard)
        runtime = start_runtime(training.precision)
        seed_without_tf32(training.seed)
        is_cuda = runtime.device.type == "cuda"
        loader = partial(Loader, workers=data.workers, pin_memory=is_cuda)
        flips = (t.random_horizontal_flip_probability, t.random_vertical_flip_probability)

        train_set, val_set = ImageTree(data.train), ImageTree(data.val, Transform(t.resize_size, t.val_crop_size))
        class_sizes = Counter(map(train_set.folder_of, range(len(train_set))))
        reduction = Reduction(t.scale, t.interpolation, t.antialias)
        random = None if t.random_reduction is None else RandomReduction(reduction, **t.random_reduction.model_dump())
        teachers = [open_teacher(c.model_dump(), parameters, runtime) for c in parameters.classifier]
        targets = val_set.targets(teachers[0].class_names)
        size, start = (d.features, d.blocks, d.growth), None if checkpoint else d.initial_weights
        network = build_darionet(*size, start, runtime.device, runtime.memory_format)
        network.recompute = training.recompute
        average = None
        if training.ema_decay is not None:
            average = AveragedModel(network, multi_avg_fn=partial(ema_update, decay=training.ema_decay))
        evaluated = network if average is None else average.module  # what is validated and written

        options = {"teachers": teachers, "weights": training.loss.model_dump()}
        loss = partial(distillation_loss, **options, clamp_gradient=training.clamp_gradient)
        loss = compiled(loss) if training.compile and is_cuda else loss
        restore, evaluated_restore = (Upscale(n, t.interpolation, t.antialias) for n in (network, evaluated))
        betas = (0.9, training.adam_beta2)
        optimizer = torch.optim.Adam(network.parameters(), lr=training.learning_rate, betas=betas, fused=True)
        scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        state = State()
        remembered = {"state": state, "network": network, "optimizer": optimizer, "scaler": scaler}
        remembered |= {} if average is None else {"average": average}

        resolved = parameters.model_dump() | {  # what a resumed run has to share with this one
            "processes": runtime.processes,
            "used_precision": runtime.precision,  # what "auto" is here
            "images": {"data.train": train_set.fingerprint(), "data.val": val_set.fingerprint()},
            "classifier_weights": [teacher.fingerprint() for teacher in teachers],
        }
        if checkpoint is not None:
            refuse_changes(json.loads(checkpoint["resolved"]), resolved)
            for name, thing in remembered.items():
                thing.load_state_dict(checkpoint[name])

        def remember() -> None:
            if runtime.is_main:
                states = {name: to_cpu(thing.state_dict()) for name, thing in remembered.items()}
                save_checkpoint(folder, states | {"resolved": json.dumps(resolved)}, state.epoch == training.epochs)

        if runtime.is_main:
            folder = new_run_folder("train") if folder is None else folder
            remove_partials(folder)
            write_json(folder / "parameters.json", parameters.model_dump())
            remember_job(folder, job_id())
            announce(parameters, runtime, train_set, val_set, random or reduction)
            if state.epoch == training.epochs:
                print("This run is finished: a new one starts without --resume")
            elif checkpoint is not None:
                print(f"Resumed at epoch {state.epoch + 1}, step {state.batch + 1}")
            print(f"Run folder: {folder}")
            if training.save:
                refuse_unwritable_weights(d.weights, "darionet.weights")
        with claim(d.weights if training.save and runtime.is_main else None, folder):
            if checkpoint is None:
                remember()  # what can't be written should fail now, not after an epoch

            # Training
            size = training.batch_size * runtime.processes
            order = {"seed": training.seed, "shuffle": training.shuffle, "limit": training.batches_per_epoch}
            epoch_steps = len(epoch_batches(len(train_set), size, epoch=0, **order))
            total_steps = epoch_steps * training.epochs
            first = state.epoch * epoch_steps + state.batch
            saved, begun, estimated = time.monotonic(), time.perf_counter(), False
            schedule = (total_steps, training.learning_rate, training.schedule, training.warmup_steps)
            for epoch in range(state.epoch, training.epochs):
                train_set.transform = Transform(t.resize_size, t.train_crop_size, *flips, training.seed, epoch)
                left = epoch_batches(len(train_set), size, epoch=epoch, **order)[state.batch :]
                title = f"epoch {epoch + 1}/{training.epochs}"
                bar = progress_bar(epoch_steps, title, training.verbose, initial=state.batch)
                started = time.perf_counter()
                with bar, out_of_memory_is_one_line(runtime, training.batch_size, "training.batch_size"):
                    for batch in batches_until_stopped(loader(train_set, list(map(runtime.part, left))), stopper):
                        key = f"{training.seed}/{epoch}/{state.batch}"
                        reduce = reduction if random is None else random.drawn(key, batch.indices.tolist())
                        done = step(
                            batch,
                            lambda images, _, reduce=reduce: loss(images, reduce(images), restore),
                            network,
                            optimizer,
                            scaler,
                            runtime,
                            learning_rate=learning_rate_at(epoch * epoch_steps + state.batch, *schedule),
                            clip_norm=training.gradient_clip_norm,
                            stop=stopper.requested,
                        )
                        if average is not None and done.taken:
                            average.update_parameters(network)
                        now = time.perf_counter()
                        state.count(done, now - started)
                        started = now
                        if done.unreadable:
                            if runtime.is_main:
                                write_csv(folder / "unreadable.csv", state.unreadable_rows(train_set.paths))
                            refuse_unreadable(state.unreadable, train_set, class_sizes)
                        bar.set_postfix_str(state.summary(), refresh=False)
                        bar.update()
                        at = epoch * epoch_steps + state.batch
                        if not estimated and now - begun > 5:  # seconds
                            estimated = True
                            seconds = (total_steps - at) * (now - begun) / (at - first)
                            bar.write(f"Training to go: {duration(seconds)}, and the validation of every epoch")
                        if time.monotonic() - saved > 60 * training.checkpoint_minutes:
                            remember()
                            saved = time.monotonic()
                        if done.stops:
                            stopper.stop_with_others()
                            break
                if agreed_to_stop(runtime, stopper):
                    break

                # Validation, and what an epoch leaves
                batches = [list(range(len(val_set)))[i : i + size] for i in range(0, len(val_set), size)]
                with progress_bar(len(batches), "validation", training.verbose, leave=False) as bar:
                    scores = validate(
                        lambda images, _: loss(images, reduction(images), evaluated_restore, with_logits=True),
                        loader(val_set, runtime.part(batches)),
                        targets,
                        runtime,
                        stopper,
                        bar,
                    )
                if scores is None:
                    break
                row, improved = state.end_epoch(learning_rate_at((epoch + 1) * epoch_steps - 1, *schedule), scores)
                if runtime.is_main:
                    if improved:
                        weights = to_cpu(evaluated.state_dict())
                        for path in [folder / BEST] + ([Path(d.weights)] if training.save else []):
                            save_file(weights, path)
                            write_note(path, note(parameters, reduction, folder))
                    write_csv(folder / "history.csv", state.history)
                    plots.training_curves(state.history, folder / "curves.png")
                    sample = Pipeline(OURS, teachers[0], reduction, evaluated_restore)
                    strip = folder / "samples" / f"epoch_{state.epoch:02d}.png"
                    draw_samples(sample, val_set, runtime, strip)
                    if training.tensorboard:
                        log_to_tensorboard(folder / "tensorboard", row, strip)
                    print_epoch(row, training.epochs, improved)
                remember()
                saved = time.monotonic()

            # The end
            if state.epoch < training.epochs:
                remember()
                print(f"Stopped in epoch {state.epoch + 1}. To go on: {resume_command(runtime, folder)}\n{folder}")
                return stopper.code
    if state.unreadable and runtime.is_main:
        print(f"{len(state.unreadable)} training images could not be read: {folder / 'unreadable.csv'}")
    if lost := state.history[-1]["val_unreadable"]:
        print(f"{lost} validation images could not be read and were not scored")
    if not math.isfinite(state.best):
        remedy = "lower training.learning_rate, or set training.precision to float32"
        raise InputError(f"the validation loss was never finite, so no weights were written: {remedy}")
    best = where_best(folder, d.weights if training.save else None)
    print(f"Weights of the best validation loss ({state.best:.4f}): {best}")
    print(folder)
    return 0


def open_teacher(arguments: dict, parameters: Parameters, runtime: Runtime) -> FrozenClassifier:
    """A classifier on the device, known to read the crops of training and validation."""
    classifier = prepare(open_classifier(**arguments), runtime.device)
    for key in ("train_crop_size", "val_crop_size"):
        classifier.check(getattr(parameters.transformations, key), f"transformations.{key}")
    if parameters.training.loss.maps and not classifier.maps:
        raise InputError(f"training.loss.maps: {arguments['architecture']} has none: set it to 0")
    return classifier


def resume_command(runtime: Runtime, folder: Path | None) -> str:
    if runtime.processes == 1:
        return f"python train_darionet.py --resume {folder}"
    return f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)} train_darionet.py --resume {folder}"


def announce(parameters: Parameters, runtime: Runtime, train_set: ImageTree, val_set: ImageTree, kind: object) -> None:
    """Prints what will be done, and on what; `kind` is the reduction."""
    t, training, d = parameters.transformations, parameters.training, parameters.darionet
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in training.loss.model_dump().items() if weight)
    size = f"{d.blocks} blocks of {d.features} features and {d.growth} growth"
    print(f"DarioNet: {size}, from {d.initial_weights or 'nothing: it starts as a plain enlargement'}")
    for classifier in parameters.classifier:
        print(f"Classifier: {classifier.describe()}, frozen")
    print(f"Images: {len(train_set)} in {train_set.root}")
    print(f"Validation: {len(val_set)} in {val_set.root}")
    print(f"Reduction: {kind}; crops: {t.train_crop_size}")
    print(f"Loss: {terms}; Adam, learning rate {training.learning_rate:g} ({training.schedule})")
    print(f"{training.epochs} epochs, batch size {training.batch_size}; {runtime.describe()}")


def note(parameters: Parameters, reduction: Reduction, folder: Path) -> dict:
    """What the weights were trained for; stands beside them, so that others can say when their input differs."""
    return {
        **reduction.note(),
        "random_reduction": parameters.model_dump()["transformations"]["random_reduction"],
        "classifier": parameters.model_dump()["classifier"],
        "loss": parameters.training.loss.model_dump(),
        "run": str(folder),
    }


def print_epoch(row: dict, epochs: int, improved: bool) -> None:
    accuracy = "" if row["val_accuracy"] is None else f"accuracy {row['val_accuracy']:.4f}, "
    print(
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}; "
        f"validation loss {row['val_loss']:.4f}, {row['val_psnr_db']:.2f} dB, {accuracy}"
        f"agreement {row['val_agreement']:.4f}; {row['images_per_second']:.1f} images/s, "
        f"{row['seconds']:.0f} s{' (best so far)' if improved else ''}"
    )


@torch.no_grad()
def draw_samples(pipeline: Pipeline, val_set: ImageTree, runtime: Runtime, path: Path) -> None:
    """A strip of validation images from all over the folder: original, small, bilinear, DarioNet."""
    spread = range(0, len(val_set), max(1, len(val_set) // SAMPLES))
    images = [image for _, image in map(val_set.__getitem__, spread) if isinstance(image, torch.Tensor)]
    if not images:
        return
    originals = to_float(torch.stack(images[:SAMPLES]), runtime.device)
    with runtime.autocast():
        small, rebuilt, _ = pipeline(originals)
    bilinear = Enlarge("bilinear")(small, originals.shape[-2:])
    plots.image_grid({"original": originals, "small": small, BASELINE: bilinear, OURS: rebuilt}, None, path)


if __name__ == "__main__":
    run_script(main)
