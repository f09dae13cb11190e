"""Trains a classifier for data that has none, from scratch, on the folders that a parameters.json names.

    python -m examples.train_classifier --parameters examples/shapes/parameters.json --epochs 6

It reads data.train, reports its accuracy on data.val, and writes classifier.weights: a state dict with the class names
and the normalisation. SGD with Nesterov momentum and a one-cycle learning rate (Smith and Topin 2017,
https://arxiv.org/abs/1708.07120); random flips and shifts.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # started as a file, python finds the packages beside it

import math
import random
import time

import torch
from torch.nn import functional as F
from torchvision.models import get_model
from torchvision.transforms.v2 import functional as vision
from tqdm import tqdm

from experiment.data import ImageFolder, Transform, epoch_batches, make_loader, to_float
from experiment.parameters import read_parameters, run_script, script_parser
from experiment.runtime import choose_runtime, make_deterministic
from models.classifier import IMAGENET_MEAN, IMAGENET_STD, published_weights, save_classifier
from models.errors import InputError


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.05, help="its peak")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--shift", type=int, default=0, help="largest random shift of the pictures, in pixels")
    arguments = parser.parse_args()
    if arguments.epochs < 1 or arguments.batch_size < 2:
        raise InputError("--epochs has to be at least 1 and --batch-size at least 2")
    parameters = read_parameters(arguments.parameters or "parameters.json", arguments.set)
    t, data, seed = parameters.transformations, parameters.data, parameters.training.seed

    runtime = choose_runtime(parameters.training.precision)
    make_deterministic(seed)
    rng = random.Random(seed)
    train_set, val_set = ImageFolder(data.train), ImageFolder(data.val, Transform(t.resize_size, t.val_crop_size))
    class_names = sorted({train_set.folder_of(i) for i in range(len(train_set))})
    if len(class_names) < 2:
        raise InputError(f"{data.train}: a classifier needs at least two class folders, found {len(class_names)}")
    train_targets = torch.tensor(train_set.targets(class_names), device=runtime.device)
    val_targets = torch.tensor(val_set.targets(class_names))

    # Residual branches that start at zero (Goyal et al. 2017, section 5.1) let ResNets learn in a few hundred steps.
    name = parameters.classifier.architecture
    if parameters.classifier.weights in published_weights(name):
        raise InputError("classifier.weights: has to name the file to write, not torchvision's own weights")
    extra = {"zero_init_residual": True} if name.startswith(("resnet", "resnext", "wide_resnet")) else {}
    network = get_model(name, weights=None, num_classes=len(class_names), **extra)
    network = network.to(runtime.device, memory_format=torch.channels_last)
    steps = math.ceil(len(train_set) / arguments.batch_size)
    optimizer = torch.optim.SGD(
        network.parameters(), arguments.learning_rate, momentum=0.9, nesterov=True, weight_decay=arguments.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.learning_rate, total_steps=steps * arguments.epochs
    )
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    mean = torch.tensor(IMAGENET_MEAN, device=runtime.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=runtime.device).view(1, 3, 1, 1)
    print(f"{name} from scratch: {len(train_set)} images of {len(class_names)} classes in {data.train}")
    print(f"Machine: {runtime.describe()}, batch size {arguments.batch_size}")

    def scores(images: torch.Tensor) -> torch.Tensor:
        with runtime.autocast():
            return network((images - mean) / std).float()

    for epoch in range(arguments.epochs):
        started = time.perf_counter()
        train_set.transform = Transform(
            t.resize_size,
            t.train_crop_size,
            t.random_horizontal_flip_probability,
            t.random_vertical_flip_probability,
            seed,
            epoch,
        )
        batches = epoch_batches(len(train_set), arguments.batch_size, seed=seed, epoch=epoch, shuffle=True, limit=None)
        network.train()
        total = 0.0
        loader = make_loader(train_set, batches, data.workers, runtime.device.type == "cuda")
        for batch in tqdm(loader, desc=f"epoch {epoch + 1}/{arguments.epochs}", unit="step", disable=None, leave=False):
            if len(batch.images) < 2:  # BatchNorm needs two
                continue
            images = to_float(batch.images, runtime.device)
            if arguments.shift:
                shift = arguments.shift
                images = vision.pad(images, [shift] * 4, padding_mode="reflect")
                top, left = rng.randint(0, 2 * shift), rng.randint(0, 2 * shift)
                images = vision.crop(images, top, left, t.train_crop_size, t.train_crop_size)
            target = train_targets[batch.indices.to(runtime.device)]
            loss = F.cross_entropy(scores(images), target, label_smoothing=arguments.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            total += loss.item() * len(images)

        network.eval()
        right = count = 0
        batches = [list(range(i, min(i + 100, len(val_set)))) for i in range(0, len(val_set), 100)]
        with torch.no_grad():
            for batch in make_loader(val_set, batches, data.workers, False):
                if len(batch.images):
                    predicted = scores(to_float(batch.images, runtime.device)).argmax(1).cpu()
                    right += (predicted == val_targets[batch.indices]).sum().item()
                    count += len(batch.images)
        seconds = time.perf_counter() - started
        print(
            f"epoch {epoch + 1}/{arguments.epochs}: loss {total / len(train_set):.4f}, "
            f"validation accuracy {right / max(1, count):.4f}, {seconds:.0f} s"
        )
    save_classifier(network.state_dict(), class_names, parameters.classifier.weights, architecture=name)
    print(parameters.classifier.weights)


if __name__ == "__main__":
    run_script(main)
