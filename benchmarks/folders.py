"""Measures how fast try_darionet.py --small reads a folder, beside the evaluation, and beside one image at a time.

    python -m benchmarks.folders                                2000 thumbnails of 20 pixels, a small network
    python -m benchmarks.folders --full --images 100 --turns 1  of 81 pixels, the published network and ResNet50
    python -m benchmarks.folders --save                         the rebuilt images are written too

Thumbnails are drawn JPEGs, all square ("equal") or of 25 sizes ("mixed": the longer side up to 1.8 times the shorter).
read_folder reads them as a user's folder: listing, workers' start, files, both variants, predictions.csv. "evaluation"
is what results.json of test.py gives: model time alone, of the same two variants on as many images that are reduced to
the size of the equal thumbnails. "one at a time" is batch size 1 without workers. Network and classifier have random
weights. The measurements take turns, each with a part of the images; a rate is all images over all seconds. The last
line is JSON.
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
from PIL import Image
from torchvision.models import get_model
from tqdm import tqdm

from benchmarks.correctness import random_network
from benchmarks.loading import draw
from experiment.data import ImageTree, Transform, batches, epoch_batches
from experiment.evaluation import Evaluation, evaluate
from experiment.metrics import BASELINE
from experiment.parameters import Parameters
from experiment.runtime import Runtime, Stopper, start_runtime
from models.classifier import open_classifier, save_classifier
from models.darionet import load_upscalers, to_device
from models.pipeline import Enlarge, Pipeline, unchanged
from models.scaler import Reduction, reduced_length
from try_darionet import read_folder

SMALL = ((32, 4, 16), "resnet18", 64)  # network, classifier, pixels of a crop
FULL = ((64, 23, 32), "resnet50", 256)
CLASSES = [f"class {i}" for i in range(1000)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="in a folder, over all turns")
    parser.add_argument("--alone", type=int, default=200, help="of them read one at a time")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--full", action="store_true", help="23 blocks, ResNet50, crops of 256 pixels")
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--save", action="store_true", help="write the rebuilt images too")
    arguments = parser.parse_args()
    size, architecture, crop = FULL if arguments.full else SMALL
    side = reduced_length(crop, 0.32)
    longer = [round(side * (1 + i / 15)) for i in range(13)]
    sizes = {"equal": [(side, side)], "mixed": sorted({s for n in longer for s in ((n, side), (side, n))})}

    def parameters(batch: int, workers: int) -> Parameters:
        return Parameters.model_validate(
            {
                "transformations": {"resize_size": crop, "train_crop_size": crop, "val_crop_size": crop},
                "test": {"batch_size": batch, "precision": "auto"},
                "data": {"workers": workers},
                "classifier": {"architecture": architecture, "weights": "classifier.pt"},
                "darionet": {"initial_weights": None, "weights": "network.pt"},
            }
        )

    seconds, images = Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        torch.save(random_network(*size).state_dict(), "network.pt")
        classifier = get_model(architecture, weights=None, num_classes=len(CLASSES))
        save_classifier(classifier.state_dict(), CLASSES, "classifier.pt")
        together, alone = parameters(arguments.batch, arguments.workers), parameters(1, 0)
        runtime = start_runtime("auto")
        reads = to_device(open_classifier(architecture, "classifier.pt"), runtime.device)
        restores = {BASELINE: Enlarge("bilinear"), **load_upscalers(["network.pt"], None, runtime.device)}
        rows = [Pipeline(name, reads, unchanged, restore) for name, restore in restores.items()]
        print(f"Machine: {runtime.describe()}; network {size}, {architecture}, {side} -> {crop} pixels")
        drawn = [Image.open(path).convert("RGB") for path in draw(Path("drawn"))]
        for turn in range(arguments.turns):
            count = arguments.images // arguments.turns
            draw_thumbnails(Path("full", str(turn)), drawn, count, [(crop, crop)])
            seconds["evaluation"] += evaluation(rows, runtime, f"full/{turn}", together)
            images["evaluation"] += count
            for kind in sizes:
                few = max(1, arguments.alone // arguments.turns)
                for name, p, n in ((kind, together, count), (f"{kind}, alone", alone, few)):
                    thumbnails = Path(name, str(turn))
                    draw_thumbnails(thumbnails, drawn, n, sizes[kind])
                    out = Path("rebuilt", thumbnails) if arguments.save else None
                    seconds[name] += reading(rows, runtime, thumbnails, p, out)
                    images[name] += n
            print(f"turn {turn + 1}:", ", ".join(f"{name} {images[name] / seconds[name]:.2f}" for name in images))
    found = {name: images[name] / seconds[name] for name in images}
    found |= {
        "equal / evaluation": found["equal"] / found["evaluation"],
        "equal / alone": found["equal"] / found["equal, alone"],
        "mixed / alone": found["mixed"] / found["mixed, alone"],
    }
    for name, value in found.items():
        print(f"{name:20} {value:8.2f}" + ("" if "/" in name else " images/s"))
    print(json.dumps(found))
    return 0


def draw_thumbnails(folder: Path, drawn: list[Image.Image], count: int, sizes: list[tuple[int, int]]) -> None:
    """`count` JPEG files of `sizes` (width, height), mixed at random (seeded)."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for i in range(count):
        drawn[i % len(drawn)].resize(rng.choice(sizes)).save(folder / f"{i:06d}.jpg", quality=90)


def evaluation(rows: list[Pipeline], runtime: Runtime, folder: str, parameters: Parameters) -> float:
    """Seconds of model time over both variants, as in results.json."""
    crop = parameters.transformations.val_crop_size
    dataset = ImageTree(folder, Transform(crop, crop))
    lists = epoch_batches(len(dataset), parameters.test.batch_size, seed=0, epoch=0, shuffle=True, limit=None)
    arriving = batches(dataset, lists, parameters.data.workers)
    pipelines = [Pipeline(row.name, row.classifier, Reduction(), row.restore) for row in rows]
    result, targets, bar = Evaluation(), [0] * len(dataset), tqdm(disable=True)
    evaluate(pipelines, arriving, dataset, targets, runtime, Stopper(), bar, result, keep_rows=False)
    return sum(result.seconds.values())


def reading(rows: list[Pipeline], runtime: Runtime, folder: Path, parameters: Parameters, out: Path | None) -> float:
    """Seconds of reading a folder, from its listing to the table."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        assert read_folder(folder, rows, ["network.pt"], parameters, runtime, Stopper(), out) == 0
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
