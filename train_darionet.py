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

import copy
import os
from functools import partial
from pathlib import Path

import torch

from experiment import plots
from experiment.data import ImageTree, Transform, batches, epoch_batches, to_float
from experiment.distillation import distillation_loss, learning_rate_at, validate
from experiment.metrics import BASELINE, OURS, log_to_tensorboard, require_tensorboard
from experiment.parameters import Parameters, read_parameters
from experiment.run import BEST, Run, run_to_resume
from experiment.runtime import Runtime, compiled, progress_bar, seed_without_tf32, start_runtime
from experiment.script import run_script, script_parser
from models.classifier import FrozenClassifier, open_classifier
from models.darionet import build_darionet, to_device
from models.errors import InputError
from models.pipeline import Enlarge, Pipeline, Upscale
from models.scaler import RandomReduction, Reduction
from models.weights import refuse_unwritable_weights, save_weights

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

    # Set-up
    folder = run_to_resume(arguments.resume)
    default = "parameters.json" if folder is None else folder / "parameters.json"
    parameters = read_parameters(arguments.parameters or default, arguments.set)
    t, training, data, d = parameters.transformations, parameters.training, parameters.data, parameters.darionet
    data.refuse_training_on_held_out_images()
    require_tensorboard(training.tensorboard)
    runtime = start_runtime(training.precision)
    seed_without_tf32(training.seed)
    if training.save and runtime.is_main:
        refuse_unwritable_weights(d.weights, "darionet.weights")
    train_set, val_set = ImageTree(data.train), ImageTree(data.val, Transform(t.resize_size, t.val_crop_size))
    sections = [parameters.classifier, *training.more_teachers]
    teachers = [open_teacher(section.model_dump(), parameters, runtime) for section in sections]
    targets = val_set.targets(teachers[0].class_names)
    reduction = Reduction(t.scale, t.interpolation, t.antialias)
    random = None if t.random_reduction is None else RandomReduction(reduction, **t.random_reduction.model_dump())

    start = d.initial_weights if folder is None else None
    network = build_darionet(d.features, d.blocks, d.growth, start)
    network = to_device(network, runtime.device, runtime.memory_format)
    network.recompute = training.recompute
    average = None if training.ema_decay is None else copy.deepcopy(network)
    evaluated = network if average is None else average  # what is validated and written
    restore, evaluated_restore = (Upscale(n, t.interpolation, t.antialias) for n in (network, evaluated))
    weights = training.loss.model_dump()
    loss = partial(distillation_loss, teachers=teachers, weights=weights, clamp_gradient=training.clamp_gradient)
    loss = compiled(loss) if training.compile and runtime.device.type == "cuda" else loss
    betas = (0.9, training.adam_beta2)
    optimizer = torch.optim.Adam(network.parameters(), lr=training.learning_rate, betas=betas, fused=True)

    size = training.batch_size * runtime.processes
    order = {"seed": training.seed, "shuffle": training.shuffle, "limit": training.batches_per_epoch}
    steps = len(epoch_batches(len(train_set), size, epoch=0, **order))  # per epoch
    learning_rate = partial(
        learning_rate_at,
        total=steps * training.epochs,
        base=training.learning_rate,
        schedule=training.schedule,
        warmup=training.warmup_steps,
    )
    flips = (t.random_horizontal_flip_probability, t.random_vertical_flip_probability)
    whole_val = [list(range(len(val_set)))[i : i + size] for i in range(0, len(val_set), size)]
    shared = {  # what a resumed run has to share with this one
        "training.batch_size x processes": size,
        "used_precision": runtime.precision,  # what "auto" is here
        "images": {"data.train": train_set.fingerprint(), "data.val": val_set.fingerprint()},
        "classifier_weights": [teacher.fingerprint() for teacher in teachers],
    }
    announce(parameters, runtime, train_set, val_set, random or reduction)
    output = d.weights if training.save else None
    run = Run("train", folder, runtime, parameters.model_dump(), shared, network, optimizer, average, output)
    with run:
        for epoch in run.epochs():
            # Training
            train_set.transform = Transform(t.resize_size, t.train_crop_size, *flips, training.seed, epoch)
            of_epoch = epoch_batches(len(train_set), size, epoch=epoch, **order)
            for batch in run.batches(train_set, of_epoch, data.workers):
                reduce, step = reduction, run.state.batch
                if random is not None:
                    reduce = random.drawn(f"{training.seed}/{epoch}/{step}", batch.indices.tolist())
                losses = None
                if len(batch.images):
                    images = to_float(batch.images, runtime.device)
                    with runtime.autocast():
                        losses = loss(images, reduce(images), restore)
                run.step(losses, batch, learning_rate(epoch * steps + step))
            if run.stopped:
                break

            # Validation, and what an epoch leaves
            with progress_bar(len(whole_val), "validation", training.verbose, leave=False) as bar:
                scores = validate(
                    lambda images: loss(images, reduction(images), evaluated_restore, with_logits=True),
                    batches(val_set, runtime.part(whole_val), data.workers, False, run.stopper),
                    targets,
                    runtime,
                    run.stopper,
                    bar,
                )
            if scores is None:
                break
            row, improved = run.end_epoch(learning_rate((epoch + 1) * steps - 1), scores)
            if runtime.is_main:
                if improved:
                    note = note_of(parameters, reduction, run.folder)
                    for path in [run.folder / BEST] + ([Path(d.weights)] if training.save else []):
                        save_weights(evaluated, path, note)
                plots.training_curves(run.state.history, run.folder / "curves.png")
                strip = run.folder / "samples" / f"epoch_{epoch + 1:02d}.png"
                draw_samples(Pipeline(OURS, teachers[0], reduction, evaluated_restore), val_set, runtime, strip)
                if training.tensorboard:
                    log_to_tensorboard(run.folder / "tensorboard", row, strip)
                print_epoch(row, training.epochs, improved)
            run.save()
        return run.finish(resume_command(runtime))


def open_teacher(arguments: dict, parameters: Parameters, runtime: Runtime) -> FrozenClassifier:
    """A classifier on the device, known to read the crops of training and validation."""
    classifier = to_device(open_classifier(**arguments), runtime.device)
    for key in ("train_crop_size", "val_crop_size"):
        classifier.check(getattr(parameters.transformations, key), f"transformations.{key}")
    if parameters.training.loss.maps and not classifier.maps:
        raise InputError(f"training.loss.maps: name layers of {arguments['architecture']} in classifier.maps")
    return classifier


def resume_command(runtime: Runtime) -> str:
    if runtime.processes == 1:
        return "python train_darionet.py"
    return f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)} train_darionet.py"


def announce(parameters: Parameters, runtime: Runtime, train_set: ImageTree, val_set: ImageTree, kind: object) -> None:
    """Prints what will be done, and on what; `kind` is the reduction."""
    t, training, d = parameters.transformations, parameters.training, parameters.darionet
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in training.loss.model_dump().items() if weight)
    size = f"{d.blocks} blocks of {d.features} features and {d.growth} growth"
    print(f"DarioNet: {size}, from {d.initial_weights or 'nothing: it starts as a plain enlargement'}")
    for classifier in [parameters.classifier, *training.more_teachers]:
        print(f"Classifier: {classifier.describe()}, frozen")
    print(f"Images: {len(train_set)} in {train_set.root}")
    print(f"Validation: {len(val_set)} in {val_set.root}")
    print(f"Reduction: {kind}; crops: {t.train_crop_size}")
    print(f"Loss: {terms}; Adam, learning rate {training.learning_rate:g} ({training.schedule})")
    print(f"{training.epochs} epochs, batch size {training.batch_size}; {runtime.describe()}")


def note_of(parameters: Parameters, reduction: Reduction, folder: Path) -> dict:
    """What the weights were trained for, so that others can say when their input differs."""
    values = parameters.model_dump()
    return {
        **reduction.note(),
        "random_reduction": values["transformations"]["random_reduction"],
        "classifier": values["classifier"],
        "more_teachers": values["training"]["more_teachers"],
        "loss": values["training"]["loss"],
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
