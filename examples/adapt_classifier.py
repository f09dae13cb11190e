"""Trains DarioNet's rival: a copy of the classifier that learns to read small images, enlarged by interpolation.

    python examples/adapt_classifier.py --parameters my_parameters.json --output adapted.pth
    python examples/adapt_classifier.py --output adapted.pth --enlarge RealESRGAN_x4plus.pth   reads rebuilt images
    python examples/adapt_classifier.py --output adapted.pth --resume     goes on with the one that was stopped last
    python test.py --parameters my_parameters.json --rival Adapted adapted.pth

It answers what a classifier that may change would gain. All but the copy is DarioNet's: images (no labels), reduction,
and loss, that of the copy's scores on the enlarged image against the frozen original's on the image itself, with
training.loss and the rest of `training`; pixels in the loss are left out, no weight of the copy moves them. BatchNorm
keeps its statistics, those of the published weights: small batches would only blur them. --output has the weights of
the best validation loss, with a note of how its images were enlarged, as test.py has to do it.
"""

import copy
import os
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # started as a file, python finds the packages beside it

import torch

from experiment.data import ImageTree, Transform, epoch_batches, to_float
from experiment.distillation import distillation_loss, learning_rate_at
from experiment.evaluation import open_restore
from experiment.parameters import read_parameters
from experiment.run import Run, run_to_resume
from experiment.runtime import start_runtime
from experiment.script import run_script, script_parser
from models.classifier import open_classifier, save_classifier
from models.darionet import to_device
from models.errors import InputError
from models.scaler import RandomReduction, Reduction
from models.weights import refuse_unwritable_weights


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--output", metavar="FILE", required=True, help="the adapted classifier's weights")
    kinds = "bilinear (the default), bicubic, nearest, or an upscaler: a file, or a name as darionet.initial_weights"
    parser.add_argument("--enlarge", metavar="HOW", default="bilinear", help=kinds)
    parser.add_argument("--resume", nargs="?", const="latest", metavar="RUN", help="go on with a stopped run")
    arguments = parser.parse_args()

    # Set-up
    folder = run_to_resume(arguments.resume, "adapt")
    default = "parameters.json" if folder is None else folder / "parameters.json"
    parameters = read_parameters(arguments.parameters or default, arguments.set)
    t, training, data = parameters.transformations, parameters.training, parameters.data
    output, enlarge = arguments.output, arguments.enlarge
    refuse_output(output, {"classifier.weights": parameters.classifier.weights, "--enlarge": enlarge})
    weights = {name: weight for name, weight in training.loss.model_dump().items() if weight and name != "pixels"}
    if not weights:
        raise InputError("training.loss: pixels alone teach a classifier nothing: set logits, as in logits 1")
    runtime = start_runtime(training.precision, training.seed)
    if runtime.processes > 1:
        raise InputError("one process adapts a classifier: start it with python, not with torchrun")
    train_set, val_set = ImageTree(data.train), ImageTree(data.val, Transform(t.resize_size, t.val_crop_size))
    teacher = to_device(open_classifier(**parameters.classifier.model_dump()), runtime.device)
    for key in ("train_crop_size", "val_crop_size"):
        teacher.check(getattr(t, key), f"transformations.{key}")
    targets = val_set.targets(teacher.class_names)
    student = copy.deepcopy(teacher).requires_grad_(True)  # like every FrozenClassifier it stays in evaluation mode
    average = None if training.ema_decay is None else copy.deepcopy(student)
    evaluated = student if average is None else average  # what is validated and written
    reduction = Reduction(t.scale, t.interpolation, t.antialias)
    random = None if t.random_reduction is None else RandomReduction(reduction, **t.random_reduction.model_dump())
    restore = torch.no_grad()(open_restore(enlarge, reduction, runtime.device))
    loss = partial(distillation_loss, restore=restore, teachers=[teacher], weights=weights)

    def validation_loss(images: torch.Tensor):
        return loss(images, reduction(images), readers=[evaluated])

    betas = (0.9, training.adam_beta2)
    optimizer = torch.optim.Adam(student.parameters(), lr=training.learning_rate, betas=betas, fused=True)

    images_per_step = training.batch_size
    order = {"seed": training.seed, "shuffle": training.shuffle, "limit": training.batches_per_epoch}
    steps = len(epoch_batches(len(train_set), images_per_step, epoch=0, **order))  # per epoch
    schedule = (steps * training.epochs, training.learning_rate, training.schedule, training.warmup_steps)
    flips = (t.random_horizontal_flip_probability, t.random_vertical_flip_probability)
    shared = {
        "enlarge": enlarge,
        "training.batch_size x processes": images_per_step,
        "used_precision": runtime.precision,
        "images": {"data.train": train_set.fingerprint(), "data.val": val_set.fingerprint()},
        "classifier_weights": teacher.fingerprint(),
    }
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in weights.items())
    print(f"A copy of {parameters.classifier.architecture} learns to read small images, enlarged: {enlarge}")
    print(f"Images: {len(train_set)} in {train_set.root}; validation: {len(val_set)} in {val_set.root}")
    print(f"Reduction: {random or reduction}; loss: {terms}; Adam, learning rate {training.learning_rate:g}")
    print(f"{training.epochs} epochs, batch size {images_per_step}; {runtime.describe()}")
    with Run("adapt", folder, runtime, parameters.model_dump(), shared, student, optimizer, average, output) as run:
        for epoch in run.epochs():
            # Training
            train_set.transform = Transform(t.resize_size, t.train_crop_size, *flips, training.seed, epoch)
            of_epoch = epoch_batches(len(train_set), images_per_step, epoch=epoch, **order)
            for batch in run.batches(train_set, of_epoch, data.workers):
                reduce, step = reduction, run.state.batch
                if random is not None:
                    reduce = random.drawn(f"{training.seed}/{epoch}/{step}", batch.indices.tolist())
                losses = None
                if len(batch.images):
                    images = to_float(batch.images, runtime.device)
                    with runtime.autocast():
                        losses = loss(images, reduce(images), readers=[student])
                run.step(losses, batch, learning_rate_at(epoch * steps + step, *schedule))
            if run.stopped:
                break

            # Validation, and what an epoch leaves
            scores = run.validate(validation_loss, val_set, targets, images_per_step, data.workers)
            if scores is None:
                break
            row, improved = run.end_epoch(learning_rate_at((epoch + 1) * steps - 1, *schedule), scores)
            if improved:
                note = {
                    **reduction.note(),
                    "random_reduction": parameters.model_dump()["transformations"]["random_reduction"],
                    "enlarge": enlarge,
                    "classifier": parameters.classifier.model_dump(),
                    "loss": weights,
                    "run": str(run.folder),
                }
                save_classifier(
                    evaluated.network,
                    evaluated.class_names,
                    output,
                    architecture=parameters.classifier.architecture,
                    mean=evaluated.mean.flatten().tolist(),
                    std=evaluated.std.flatten().tolist(),
                    trained_for=note,
                )
            run.log(row, improved)
            run.save()
        return run.finish(f"python examples/adapt_classifier.py --output {output} --enlarge {enlarge}")


def refuse_output(output: str, others: dict[str, str | None]) -> None:
    """Raises InputError if --output can't be written, or would overwrite one of the `others`."""
    for key, path in others.items():
        if path is not None and os.path.realpath(path) == os.path.realpath(output):
            raise InputError(f"--output {output}: the same file as {key}, which it would overwrite")
    refuse_unwritable_weights(output, "--output")


if __name__ == "__main__":
    run_script(main)
