"""What is a DarioNet worth on small images that were made in another way than it was trained for?

    python -m examples.degradation --parameters examples/tiny_imagenet/parameters.json \\
        --weights examples/tiny_imagenet/output/DarioNet.pt examples/tiny_imagenet/output/antialiased.pt

The test images are reduced by transformations.scale in five ways: plain bilinear (as published), antialiased bilinear,
antialiased bicubic, and plain bilinear stored as JPEG of quality 75 and 40. Every network rebuilds all of them, and
brings them to size as it was trained to; so does bilinear enlarging. The table has accuracies and, in brackets, the
fraction recovered of what bilinear loses on the same small images; table and numbers go to
assets/logs/degradation_<stamp>/.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # started as a file, python finds the packages beside it

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from experiment.data import ImageFolder, Transform, epoch_batches, make_loader, to_float
from experiment.metrics import write_json
from experiment.parameters import read_parameters, run_script, script_parser
from experiment.runtime import choose_runtime, make_deterministic, new_run_folder
from models.classifier import FrozenClassifier
from models.darionet import load_rrdbnet, trained_for
from models.errors import InputError
from models.pipeline import Pipeline

# name: interpolation, antialias, JPEG quality
DEGRADATIONS = {
    "bilinear": ("bilinear", False, None),
    "bilinear, antialiased": ("bilinear", True, None),
    "bicubic, antialiased": ("bicubic", True, None),
    "bilinear, JPEG 75": ("bilinear", False, 75),
    "bilinear, JPEG 40": ("bilinear", False, 40),
}


def through_jpeg(images: Tensor, quality: int) -> Tensor:
    """(N,3,H,W) in [0,1] -> the same after being stored as JPEG files of this quality (4:2:0 chroma, as cameras do)."""
    stored = []
    for image in images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        stored.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(stored).permute(0, 3, 1, 2).to(images.device).float().div(255)


@torch.no_grad()
def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--weights", nargs="+", required=True, metavar="FILE", help="the networks to compare")
    arguments = parser.parse_args()
    parameters = read_parameters(arguments.parameters or "parameters.json", arguments.set)
    t, options = parameters.transformations, parameters.test
    runtime = choose_runtime(options.precision)
    make_deterministic(options.seed)
    dataset = ImageFolder(parameters.data.test, Transform(t.resize_size, t.val_crop_size))
    classifier = FrozenClassifier(parameters.classifier.architecture, parameters.classifier.weights)
    classifier.to(runtime.device, memory_format=torch.channels_last)
    targets = torch.tensor(dataset.targets(classifier.class_names, required=True))
    networks = {"Bilinear": Pipeline("Bilinear", classifier, scale=None)}
    for path in arguments.weights:
        note = {"interpolation": t.interpolation, "antialias": t.antialias} | trained_for(path)
        networks[path] = Pipeline(
            path,
            classifier,
            upscaler=load_rrdbnet(path, runtime.device),
            scale=None,
            interpolation=note["interpolation"],
            antialias=note["antialias"],
        )
    batches = epoch_batches(
        len(dataset), options.batch_size, seed=options.seed, epoch=0, shuffle=False, limit=options.batches_per_epoch
    )

    right = {name: dict.fromkeys(networks, 0) for name in DEGRADATIONS}
    original = count = unreadable = 0
    for batch in tqdm(make_loader(dataset, batches, parameters.data.workers, False), unit="batch", disable=None):
        unreadable += len(batch.unreadable)
        if not len(batch.images):
            continue
        images, target = to_float(batch.images, runtime.device), targets[batch.indices].to(runtime.device)
        size = tuple(images.shape[-2:])
        original += (classifier(images).argmax(1) == target).sum().item()
        count += len(images)
        for name, (interpolation, antialias, quality) in DEGRADATIONS.items():
            making = {"scale": t.scale, "interpolation": interpolation, "antialias": antialias}
            small = Pipeline("small", classifier, **making).reduce(images)
            small = small if quality is None else through_jpeg(small, quality)
            for path, pipeline in networks.items():
                right[name][path] += (pipeline(small, size)[2].argmax(1) == target).sum().item()
    if not count:
        raise InputError(f"{dataset.root}: none of its images could be read")

    accuracy = {name: {path: hits / count for path, hits in row.items()} for name, row in right.items()}
    lines = [f"| small images | {' | '.join(networks)} |", "|---" * (len(networks) + 1) + "|"]
    for name, row in accuracy.items():
        lost = original / count - row["Bilinear"]
        cells = [f"{row['Bilinear']:.3f}"]
        for path in arguments.weights:
            gained = f" ({(row[path] - row['Bilinear']) / lost:.0%})" if lost > 0 else ""
            cells.append(f"{row[path]:.3f}{gained}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines) + f"\n\n{count} test images, x{t.scale}; original accuracy {original / count:.3f}.\n"
    folder = new_run_folder("degradation")
    write_json(folder / "results.json", {"n": count, "original": original / count, "accuracy": accuracy})
    (folder / "results.md").write_text(table, encoding="utf-8")
    print(table)
    if unreadable:
        print(f"{unreadable} images could not be read and were not scored")
    print(folder)


if __name__ == "__main__":
    run_script(main)
