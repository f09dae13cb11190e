"""Measures how fast try_darionet.py --small reads a folder: in batches and one at a time, in float32 and in bf16.

    python -m benchmarks.folders                      400 thumbnails of 20 pixels, a small network
    python -m benchmarks.folders --full --images 20   of 81 pixels, the published network and ResNet50

Thumbnails are drawn JPEG files, all square ("equal") or of 25 sizes ("mixed": the longer side up to 1.8 times the
shorter). read_folder reads them as a user's folder: listing, workers' start, files, both rows, predictions.csv. "alone"
is batch size 1 without workers. Network and classifier have random weights. The measurements take turns; a rate is all
images over all seconds. The last line is JSON.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks.correctness import drawn_images, frozen, random_classifier, random_network
from experiment.metrics import BASELINE
from experiment.parameters import Parameters
from experiment.runtime import Stopper, start_runtime
from models.darionet import load_upscalers, to_device
from models.images import to_image
from models.pipeline import Enlarge, Pipeline, unchanged
from models.scaler import reduced_length
from try_darionet import read_folder

SMALL = ((32, 4, 16), "resnet18", 64)  # network, classifier, pixels of a crop
FULL = ((64, 23, 32), "resnet50", 256)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="in a folder")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="23 blocks, ResNet50, crops of 256 pixels")
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    size, architecture, crop = FULL if arguments.full else SMALL
    side = reduced_length(crop, 0.32)
    longer = [round(side * (1 + i / 15)) for i in range(13)]
    sizes = {"equal": [(side, side)], "mixed": sorted({s for n in longer for s in ((n, side), (side, n))})}
    cases = [("equal, float32", arguments.batch, "float32"), ("mixed, float32", arguments.batch, "float32")]
    cases += [("equal, auto", arguments.batch, "auto"), ("equal, float32, alone", 1, "float32")]
    seconds = Counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        torch.save(random_network(*size).state_dict(), "network.pt")
        for kind, choice in sizes.items():
            draw_thumbnails(Path(kind), arguments.images, crop, choice)
        auto = start_runtime("auto")
        classifier = to_device(frozen(random_classifier(architecture)), auto.device)
        restores = {BASELINE: Enlarge("bilinear"), **load_upscalers(["network.pt"], None, auto.device)}
        rows = [Pipeline(name, classifier, unchanged, restore) for name, restore in restores.items()]
        print(f"Machine: {auto.describe()}; network {size}, {architecture}, {side} -> {crop} pixels")
        for _ in range(arguments.turns):
            for name, batch, precision in cases:
                parameters = Parameters.model_validate(
                    {
                        "transformations": {"resize_size": crop, "train_crop_size": crop, "val_crop_size": crop},
                        "test": {"batch_size": batch},
                        "data": {"workers": 0 if batch == 1 else arguments.workers},
                    }
                )
                started = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    path, runtime = Path(name.partition(",")[0]), start_runtime(precision)
                    assert read_folder(path, rows, ["network.pt"], parameters, runtime, Stopper()) == 0
                seconds[name] += time.perf_counter() - started
    found = {name: arguments.images * arguments.turns / seconds[name] for name, _, _ in cases}
    found |= {"auto / float32": found["equal, auto"] / found["equal, float32"]}
    found |= {"together / alone": found["equal, float32"] / found["equal, float32, alone"]}
    for name, value in found.items():
        print(f"{name:22} {value:8.2f}" + ("" if "/" in name else " images/s"))
    print(json.dumps(found))
    return 0


def draw_thumbnails(folder: Path, count: int, crop: int, sizes: list[tuple[int, int]]) -> None:
    """`count` JPEG files of `sizes` (width, height), mixed at random (seeded)."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    drawn = [to_image(image) for image in drawn_images(min(count, 32), crop)]
    for i in range(count):
        drawn[i % len(drawn)].resize(rng.choice(sizes)).save(folder / f"{i:06d}.jpg", quality=90)


if __name__ == "__main__":
    sys.exit(main())
