"""Trains a classifier for data that has none, from scratch, on the folders that a parameters.json names.

    python examples/train_classifier.py --parameters examples/shapes/parameters.json --epochs 6

It reads data.train, reports its accuracy on data.val, and writes classifier.weights, those of the best epoch: a state
dict with the class names and the normalisation. SGD with Nesterov momentum and a one-cycle learning rate; random flips
and shifts. A stopped training starts again from nothing.
"""

import copy
import math
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # started as a file, python finds the packages beside it

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model
from torchvision.transforms import v2

from experiment.data import ImageTree, Transform, batches, epoch_batches, to_float
from experiment.parameters import read_parameters
from experiment.run import claimed
from experiment.runtime import progress_bar, start_runtime
from experiment.script import run_script, script_parser
from models.classifier import FrozenClassifier, published_weights, save_classifier
from models.darionet import to_device
from models.errors import InputError
from models.weights import refuse_unwritable_weights

RANGES = {"epochs": (1, 100_000), "batch_size": (2, 65536), "learning_rate": (1e-9, 100)}
WEIGHT_DECAY = 5e-4


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.05, help="its peak")
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="0 to 1")
    parser.add_argument("--shift", type=int, default=0, help="largest random shift of the pictures, in pixels")
    arguments = parser.parse_args()
    parameters = read_parameters(arguments.parameters or "parameters.json", arguments.set)
    t, data, seed = parameters.transformations, parameters.data, parameters.training.seed
    limits = RANGES | {"label_smoothing": (0, 1), "shift": (0, t.train_crop_size - 1)}
    for option, (low, high) in limits.items():
        if not low <= (value := getattr(arguments, option)) <= high:
            raise InputError(f"--{option.replace('_', '-')} {value}: has to be from {low:g} to {high:g}")
    name, output = parameters.classifier.architecture, parameters.classifier.weights
    if output is None or output in published_weights(name):
        raise InputError("classifier.weights: has to name the file to write, not torchvision's own weights")
    refuse_unwritable_weights(output, "classifier.weights")
    runtime = start_runtime(parameters.training.precision, seed)

    train_set, val_set = ImageTree(data.train), ImageTree(data.val, Transform(t.resize_size, t.val_crop_size))
    class_names = sorted({train_set.folder_of(i) for i in range(len(train_set))} - {""})
    if len(class_names) < 2:
        raise InputError(f"{data.train}: a classifier needs at least two class folders, found {len(class_names)}")
    targets = torch.tensor(train_set.targets(class_names))
    val_targets = torch.tensor(val_set.targets(class_names, required=True))
    # Residual branches that start at zero (Goyal et al. 2017, section 5.1): ResNets learn in a few hundred steps.
    options = {"zero_init_residual": True} if name.startswith(("resnet", "resnext", "wide_resnet")) else {}
    network = get_model(name, weights=None, num_classes=len(class_names), **options)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1  # torch's default; some networks' 0.01 or less takes thousands of steps
    reader = FrozenClassifier(copy.deepcopy(network), class_names)
    for key in ("train_crop_size", "val_crop_size"):
        reader.check(getattr(t, key), f"transformations.{key}")
    to_device(network, runtime.device)
    to_device(reader, runtime.device)
    steps = math.ceil(len(train_set) / arguments.batch_size)
    rate = arguments.learning_rate
    optimizer = torch.optim.SGD(network.parameters(), rate, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, arguments.epochs * steps, cycle_momentum=False)
    flips = (t.random_horizontal_flip_probability, t.random_vertical_flip_probability)
    shift = v2.RandomCrop(t.train_crop_size, arguments.shift, padding_mode="reflect")
    print(f"{name} from scratch: {len(train_set)} images of {len(class_names)} classes in {data.train}")
    print(f"Machine: {runtime.describe()}, batch size {arguments.batch_size}")
    best, begun = math.inf, time.perf_counter()
    with claimed(output):
        for epoch in range(arguments.epochs):
            train_set.transform = Transform(t.resize_size, t.train_crop_size, *flips, seed, epoch)
            choice = {"seed": seed, "epoch": epoch, "limit": None}
            order = epoch_batches(len(train_set), arguments.batch_size, shuffle=True, **choice)
            network.train()
            loss_sum = count = 0
            title = f"epoch {epoch + 1}/{arguments.epochs}"
            with progress_bar(steps, title, leave=False) as bar:
                for batch in batches(train_set, order, data.workers, False):
                    bar.update()
                    if len(batch.images) < 2:  # BatchNorm needs two
                        continue
                    images = shift(to_float(batch.images, runtime.device))
                    with runtime.autocast():
                        scores = network((images - reader.mean) / reader.std)
                    known = targets[batch.indices].to(runtime.device)
                    loss = F.cross_entropy(scores.float(), known, label_smoothing=arguments.label_smoothing)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    loss_sum, count = loss_sum + loss.item() * len(images), count + len(images)

            reader.network.load_state_dict(network.state_dict())
            val_loss = right = val_count = 0
            order = epoch_batches(len(val_set), 100, shuffle=False, **choice)
            for batch in batches(val_set, order, data.workers, False):
                if len(batch.images):
                    with torch.no_grad(), runtime.autocast():
                        scores = reader(to_float(batch.images, runtime.device)).float().cpu()
                    val_loss += F.cross_entropy(scores, val_targets[batch.indices], reduction="sum").item()
                    right += (scores.argmax(1) == val_targets[batch.indices]).sum().item()
                    val_count += len(scores)
            if not val_count:
                raise InputError(f"{data.val}: none of its images could be read")
            val_loss /= val_count
            if not math.isfinite(val_loss):
                raise InputError(f"the validation loss is not finite in epoch {epoch + 1}: lower --learning-rate")
            if improved := val_loss < best:
                best = val_loss
                save_classifier(network, class_names, output, architecture=name)
            print(
                f"{title}: loss {loss_sum / max(1, count):.4f}; validation loss {val_loss:.4f}, accuracy "
                f"{right / val_count:.4f}; {time.perf_counter() - begun:.0f} s{' (best so far)' if improved else ''}"
            )
    lost = len(train_set) + len(val_set) - count - val_count
    if lost:
        print(f"{lost} of {len(train_set) + len(val_set)} images were not used: they can't be read")
    print(f"Weights of the best validation loss ({best:.4f}): {output}")


if __name__ == "__main__":
    run_script(main)
