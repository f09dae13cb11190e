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
from functools import partial

import torch

from experiment import plots
from experiment.data import ImageTree, Transform, epoch_batches, to_float
from experiment.distillation import distillation_loss, learning_rate_at
from experiment.evaluation import draw_samples
from experiment.parameters import read_parameters
from experiment.run import Run, run_to_resume
from experiment.runtime import compiled, start_runtime
from experiment.script import run_script, script_parser
from models.classifier import open_classifier
from models.darionet import build_darionet, to_device
from models.errors import InputError
from models.pipeline import Upscale
from models.scaler import RandomReduction, Reduction
from models.weights import refuse_unwritable_weights


def main() -> int:
    parser = script_parser(__doc__)
    goes_on = "go on with a run: its folder in assets/logs (default: the one that was stopped last)"
    parser.add_argument("--resume", nargs="?", const="latest", metavar="RUN", help=goes_on)
    arguments = parser.parse_args()

    # Set-up
    folder = run_to_resume(arguments.resume)
    default = "parameters.json" if folder is None else folder / "parameters.json"
    parameters = read_parameters(arguments.parameters or default, arguments.set)
    t, training, data, d = parameters.transformations, parameters.training, parameters.data, parameters.darionet
    data.refuse_training_on_held_out_images()
    runtime = start_runtime(training.precision, training.seed)
    if training.save and runtime.is_main:
        refuse_unwritable_weights(d.weights, "darionet.weights")
    train_set, val_set = ImageTree(data.train), ImageTree(data.val, Transform(t.resize_size, t.val_crop_size))
    sections, teachers = [parameters.classifier, *training.more_teachers], []
    for section in sections:
        teacher = to_device(open_classifier(**section.model_dump()), runtime.device)
        for key in ("train_crop_size", "val_crop_size"):
            teacher.check(getattr(t, key), f"transformations.{key}")
        if training.loss.maps and not teacher.maps:
            raise InputError(f"training.loss.maps: name layers of {section.architecture} in classifier.maps")
        teachers.append(teacher)
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
    terms = training.loss.model_dump()
    loss = partial(distillation_loss, teachers=teachers, weights=terms, clamp_gradient=training.clamp_gradient)
    loss = compiled(loss) if training.compile and runtime.device.type == "cuda" else loss

    def validation_loss(images: torch.Tensor):
        return loss(images, reduction(images), evaluated_restore, with_logits=True)

    betas = (0.9, training.adam_beta2)
    optimizer = torch.optim.Adam(network.parameters(), lr=training.learning_rate, betas=betas, fused=True)

    images_per_step = training.batch_size * runtime.processes
    order = {"seed": training.seed, "shuffle": training.shuffle, "limit": training.batches_per_epoch}
    steps = len(epoch_batches(len(train_set), images_per_step, epoch=0, **order))  # per epoch
    schedule = (steps * training.epochs, training.learning_rate, training.schedule, training.warmup_steps)
    flips = (t.random_horizontal_flip_probability, t.random_vertical_flip_probability)
    shared = {  # what a resumed run has to share with this one
        "training.batch_size x processes": images_per_step,
        "used_precision": runtime.precision,  # what "auto" is here
        "images": {"data.train": train_set.fingerprint(), "data.val": val_set.fingerprint()},
        "classifier_weights": [teacher.fingerprint() for teacher in teachers],
    }
    values = parameters.model_dump()
    note = reduction.note() | {  # what the weights are trained for, so that others can say if their input differs
        "random_reduction": values["transformations"]["random_reduction"],
        "classifier": values["classifier"],
        "more_teachers": values["training"]["more_teachers"],
        "loss": terms,
    }

    dimensions = f"{d.blocks} blocks of {d.features} features and {d.growth} growth"
    print(f"DarioNet: {dimensions}, from {d.initial_weights or 'nothing: it starts as a plain enlargement'}")
    for section in sections:
        print(f"Classifier: {section.describe()}, frozen")
    print(f"Images: {len(train_set)} in {train_set.root}; validation: {len(val_set)} in {val_set.root}")
    print(f"Reduction: {random or reduction}; crops: {t.train_crop_size}")
    weighted = " + ".join(f"{weight:g} x {name}" for name, weight in terms.items() if weight)
    print(f"Loss: {weighted}; Adam, learning rate {training.learning_rate:g} ({training.schedule})")
    print(f"{training.epochs} epochs, batch size {training.batch_size}; {runtime.describe()}")
    output = d.weights if training.save else None
    with Run("train", folder, runtime, values, shared, network, optimizer, average, output) as run:
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
                        losses = loss(images, reduce(images), restore)
                run.step(losses, batch, learning_rate_at(epoch * steps + step, *schedule))
            if run.stopped:
                break

            # Validation, and what an epoch leaves
            scores = run.validate(validation_loss, val_set, targets, images_per_step, data.workers)
            if scores is None:
                break
            row, improved = run.end_epoch(learning_rate_at((epoch + 1) * steps - 1, *schedule), scores)
            picture = run.folder / "samples" / f"epoch_{epoch + 1:02d}.png"
            if runtime.is_main:
                if improved:
                    run.save_weights(evaluated, note)
                plots.training_curves(run.state.history, run.folder / "curves.png")
                draw_samples(val_set, reduction, evaluated_restore, runtime, picture)
            run.log(row, improved, picture)
            run.save()
        return run.finish("python train_darionet.py")


if __name__ == "__main__":
    run_script(main)
