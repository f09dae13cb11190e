"""Trains a classifier for data that has none, from scratch, on the folders that a parameters.json names.

    python examples/train_classifier.py --parameters examples/shapes/parameters.json --epochs 6
    python examples/train_classifier.py --resume                 goes on with the one that was stopped last

It reads data.train, reports its accuracy on data.val, and writes classifier.weights, those of the best epoch: a state
dict with the class names and the normalisation. SGD with Nesterov momentum, the learning rate half a cosine that warms
up for a third of the way; random flips and shifts. Steps, guards and checkpoints are those of train_darionet.py.
"""

import copy
import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # started as a file, python finds the packages beside it

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model
from torchvision.transforms.v2 import functional as vision

from experiment.checkpoint import (
    RandomNumbers,
    State,
    load_checkpoint,
    refuse_changes,
    run_to_resume,
    save_checkpoint,
    to_cpu,
)
from experiment.data import ImageTree, Loader, Transform, batches_until_stopped, epoch_batches
from experiment.distillation import Losses, learning_rate_at, refuse_unreadable, step, validate
from experiment.metrics import write_csv, write_json
from experiment.parameters import read_parameters, run_script, script_parser
from experiment.runtime import (
    LOGS,
    Stopper,
    duration,
    new_run_folder,
    out_of_memory_is_one_line,
    progress_bar,
    seed_without_tf32,
    start_runtime,
)
from models.classifier import IMAGENET_MEAN, IMAGENET_STD, FrozenClassifier, published_weights, save_classifier
from models.darionet import prepare
from models.errors import InputError
from models.weights import refuse_unwritable_weights


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.05, help="its peak is 3/4 of this")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="0 to 1")
    parser.add_argument("--shift", type=int, default=0, help="largest random shift of the pictures, in pixels")
    parser.add_argument("--resume", nargs="?", const="latest", metavar="RUN", help="go on with a stopped run")
    arguments = parser.parse_args()
    with Stopper() as stopper:
        folder = run_to_resume(LOGS, arguments.resume, "classifier")
        checkpoint = None if folder is None else load_checkpoint(folder)
        if checkpoint is not None:  # what the run began with, but for what is given anew
            parser.set_defaults(**json.loads(checkpoint["resolved"])["options"])
            arguments = parser.parse_args()
        default = "parameters.json" if folder is None else folder / "parameters.json"
        parameters = read_parameters(arguments.parameters or default, arguments.set)
        t, training, data = parameters.transformations, parameters.training, parameters.data
        refuse_options(arguments, t.train_crop_size)
        name, place, seed = parameters.classifier[0].architecture, parameters.classifier[0].weights, training.seed
        if name in ("googlenet", "inception_v3"):
            raise InputError(f"classifier.architecture: {name} gives more than scores in training; choose another")
        if place is None or place in published_weights(name):
            raise InputError("classifier.weights: has to name the file to write, not torchvision's own weights")
        refuse_unwritable_weights(place, "classifier.weights")
        runtime = start_runtime(training.precision)
        if runtime.processes > 1:
            raise InputError("one process trains a classifier: start it with python, not with torchrun")
        seed_without_tf32(seed)
        train_set, val_set = ImageTree(data.train), ImageTree(data.val, Transform(t.resize_size, t.val_crop_size))
        class_sizes = Counter(map(train_set.folder_of, range(len(train_set))))
        class_names = sorted(class_sizes.keys() - {""})
        if len(class_names) < 2:
            raise InputError(f"{data.train}: a classifier needs at least two class folders, found {len(class_names)}")
        targets = torch.tensor(train_set.targets(class_names), device=runtime.device)
        val_targets = val_set.targets(class_names, required=True)
        held_out = torch.tensor(val_targets, device=runtime.device)

        # Residual branches that start at zero (Goyal et al. 2017, section 5.1): ResNets learn in a few hundred steps.
        options = {"zero_init_residual": True} if name.startswith(("resnet", "resnext", "wide_resnet")) else {}
        network = get_model(name, weights=None, num_classes=len(class_names), **options)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.1  # torch's default; some networks' 0.01 or less takes thousands of steps
        frozen = FrozenClassifier(copy.deepcopy(network), class_names)
        for key in ("train_crop_size", "val_crop_size"):
            frozen.check(getattr(t, key), f"transformations.{key}")
        prepare(network, runtime.device)
        mean = torch.tensor(IMAGENET_MEAN, device=runtime.device).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD, device=runtime.device).view(1, 3, 1, 1)
        optimizer = torch.optim.SGD(
            network.parameters(),
            arguments.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=arguments.weight_decay,
        )
        scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        state = State()
        remembered = {"state": state, "network": network, "optimizer": optimizer, "scaler": scaler}
        remembered |= {"random": RandomNumbers()}
        resolved = parameters.model_dump() | {
            "options": {
                key: value for key, value in vars(arguments).items() if key not in ("parameters", "resume", "set")
            },
            "used_precision": runtime.precision,
            "images": {"data.train": train_set.fingerprint(), "data.val": val_set.fingerprint()},
        }
        if checkpoint is not None:
            refuse_changes(json.loads(checkpoint["resolved"]), resolved)
            for key, thing in remembered.items():
                thing.load_state_dict(checkpoint[key])
        folder = new_run_folder("classifier") if folder is None else folder
        write_json(folder / "parameters.json", parameters.model_dump())
        print(f"{name} from scratch: {len(train_set)} images of {len(class_names)} classes in {data.train}")
        print(f"Machine: {runtime.describe()}, batch size {arguments.batch_size}")

        def remember() -> None:
            states = {key: to_cpu(thing.state_dict()) for key, thing in remembered.items()}
            save_checkpoint(folder, states | {"resolved": json.dumps(resolved)}, state.epoch == arguments.epochs)

        def loss(images: Tensor, indices: Tensor) -> Losses:
            """Cross-entropy of the classes, of shifted pictures in training."""
            known = (targets if network.training else held_out)[indices.to(runtime.device)]
            if network.training and arguments.shift:
                images = shifted(images, arguments.shift, f"{seed}/{state.epoch}/{state.batch}")
            scores = network((images - mean) / std).float()
            smoothing = arguments.label_smoothing if network.training else 0.0
            total = F.cross_entropy(scores, known, label_smoothing=smoothing)
            # What diverged is no fault of an original's scores: the loss says it.
            original = scores.detach().nan_to_num()
            return Losses(total, {}, scores.new_zeros(len(scores)), scores.detach(), original)

        remember()
        steps_per_epoch = math.ceil(len(train_set) / arguments.batch_size)
        total_steps = steps_per_epoch * arguments.epochs
        schedule = (total_steps, arguments.learning_rate, "cosine", total_steps // 3)
        first, saved = state.epoch * steps_per_epoch + state.batch, time.monotonic()
        begun, estimated = time.perf_counter(), False
        flips = (t.random_horizontal_flip_probability, t.random_vertical_flip_probability)
        for epoch in range(state.epoch, arguments.epochs):
            train_set.transform = Transform(t.resize_size, t.train_crop_size, *flips, seed, epoch)
            order = {"seed": seed, "epoch": epoch, "shuffle": True, "limit": None}
            left = epoch_batches(len(train_set), arguments.batch_size, **order)[state.batch :]
            network.train()
            bar = progress_bar(
                steps_per_epoch, f"epoch {epoch + 1}/{arguments.epochs}", initial=state.batch, leave=False
            )
            started = time.perf_counter()
            with bar, out_of_memory_is_one_line(runtime, arguments.batch_size, "--batch-size"):
                for batch in batches_until_stopped(Loader(train_set, left, data.workers, False), stopper):
                    if len(batch.images) == 1:  # BatchNorm needs two
                        batch = batch._replace(images=batch.images[:0])
                    done = step(
                        batch,
                        loss,
                        network,
                        optimizer,
                        scaler,
                        runtime,
                        learning_rate=learning_rate_at(epoch * steps_per_epoch + state.batch, *schedule),
                        clip_norm=None,
                        stop=stopper.requested,
                    )
                    now = time.perf_counter()
                    state.count(done, now - started)
                    started = now
                    if done.unreadable:
                        write_csv(folder / "unreadable.csv", state.unreadable_rows(train_set.paths))
                        refuse_unreadable(state.unreadable, train_set, class_sizes)
                    bar.update()
                    at = epoch * steps_per_epoch + state.batch
                    if not estimated and now - begun > 5:
                        estimated = True
                        bar.write(f"Training to go: {duration((total_steps - at) * (now - begun) / (at - first))}")
                    if time.monotonic() - saved > 60 * training.checkpoint_minutes:
                        remember()
                        saved = time.monotonic()
                    if done.stops:
                        break
            if stopper.requested:
                break
            if not all(value.isfinite().all() for value in network.state_dict().values()):  # BatchNorm's means as well
                raise InputError("the network's values are not finite any more: start a new run, lower --learning-rate")
            network.eval()
            batches = epoch_batches(len(val_set), 100, seed=seed, epoch=0, shuffle=False, limit=None)
            with progress_bar(len(batches), "validation", leave=False) as bar:
                loader = Loader(val_set, batches, data.workers, False)
                scores = validate(loss, loader, val_targets, runtime, stopper, bar)
            if scores is None:
                break
            row, improved = state.end_epoch(learning_rate_at((epoch + 1) * steps_per_epoch - 1, *schedule), scores)
            if improved:
                save_classifier(network, class_names, place, architecture=name)
            remember()
            saved = time.monotonic()
            print(
                f"epoch {epoch + 1}/{arguments.epochs}: loss {row['train_loss']:.4f}; validation loss "
                f"{row['val_loss']:.4f}, accuracy {row['val_accuracy']:.4f}; {row['seconds']:.0f} s"
                f"{' (best so far)' if improved else ''}"
            )
        if state.epoch < arguments.epochs:
            remember()
            print(f"Stopped in epoch {state.epoch + 1}. To go on: add --resume {folder}")
            print(folder)
            return stopper.code
    if state.unreadable:
        print(f"{len(state.unreadable)} training images could not be read: {folder / 'unreadable.csv'}")
    if lost := state.history[-1]["val_unreadable"]:
        print(f"{lost} of {len(val_set)} validation images could not be read and were not scored")
    if not math.isfinite(state.best):
        raise InputError("the validation loss was not finite in any epoch; nothing was written: lower --learning-rate")
    print(f"Weights of the best validation loss ({state.best:.4f}): {place}")
    print(folder)
    return 0


def shifted(images: Tensor, most: int, key: str) -> Tensor:
    """The batch moved by up to `most` pixels in both directions, its borders mirrored; drawn from `key`."""
    rng = random.Random(key)
    height, width = images.shape[-2:]
    images = vision.pad(images, [most] * 4, padding_mode="reflect")
    return vision.crop(images, rng.randint(0, 2 * most), rng.randint(0, 2 * most), height, width)


def refuse_options(arguments, crop_size: int) -> None:
    """Raises InputError for an option out of range; pictures of `crop_size` pixels are mirrored at their borders."""
    for option, low, high in (
        ("epochs", 1, 100_000),
        ("batch_size", 2, 65536),
        ("learning_rate", 1e-9, 100),
        ("weight_decay", 0, 1),
        ("label_smoothing", 0, 1),
        ("shift", 0, crop_size - 1),
    ):
        value = getattr(arguments, option)
        if not low <= value <= high:
            raise InputError(f"--{option.replace('_', '-')} {value}: has to be from {low:g} to {high:g}")


if __name__ == "__main__":
    run_script(main)
