"""At which size should a classifier read small images? Accuracy at several sizes, for every way of enlarging.

    python examples/reading_size.py --small --set data.test=thumbnails      small images in class folders
    python examples/reading_size.py                                         photographs, reduced as for the test
    python examples/reading_size.py --small --sides 96 128 160 192 224 256

Nobody forces a classifier to read a 64-pixel image at 256: bilinear images are often read better at 160. Every network
rebuilds an image once, and the Scaler brings it to each size. The best size of a row is chosen on one half of the
images and measured on the other, so that the choice flatters no row. test.py and try_darionet.py read at another size
with `--set transformations.val_crop_size=192`. Table and numbers go to assets/logs/reading_<stamp>/.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # started as a file, python finds the packages beside it

import numpy as np
import torch
from torch import Tensor, nn

from experiment.data import ImageTree, Transform, batches, epoch_batches, small_batches, to_float, whole_small
from experiment.evaluation import full_size
from experiment.metrics import BASELINE, bootstrap, interval, mcnemar, mcnemar_line, require_finite, write_json
from experiment.parameters import read_parameters
from experiment.runtime import Stopper, new_run_folder, progress_bar, start_runtime
from experiment.script import run_script, script_parser
from models.classifier import open_classifier
from models.darionet import load_upscalers, to_device
from models.errors import InputError
from models.files import write_text
from models.pipeline import Enlarge, Pipeline, Upscale, unchanged
from models.scaler import Reduction, reduced_length

SIDES = (96, 128, 160, 192, 224, 256, 288, 320)


class Once(nn.Module):
    """A network that remembers what it made of the last images."""

    def __init__(self, network: Callable[[Tensor], Tensor]):
        super().__init__()
        self.network, self.images, self.rebuilt = network, None, None

    def forward(self, images: Tensor) -> Tensor:
        if images is not self.images:
            self.images, self.rebuilt = images, self.network(images)
        return self.rebuilt


@torch.no_grad()
def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--small", action="store_true", help="the images are small already: do not reduce them")
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="networks (default: darionet.weights)")
    parser.add_argument("--sides", nargs="+", type=int, metavar="PIXELS", default=SIDES, help="of what is read")
    arguments = parser.parse_args()
    parameters = read_parameters(arguments.parameters or "parameters.json", arguments.set)
    t, options, sides = parameters.transformations, parameters.test, arguments.sides
    weights = arguments.weights or [parameters.darionet.weights]
    runtime = start_runtime(options.precision, options.seed)
    crop = t.val_crop_size
    dataset = ImageTree(parameters.data.test, whole_small(crop) if arguments.small else Transform(t.resize_size, crop))
    classifier = to_device(open_classifier(**parameters.classifier.model_dump()), runtime.device)
    for side in sides:
        classifier.check(side, "--sides")
    targets = torch.tensor(dataset.targets(classifier.class_names, required=True))
    reduce = unchanged if arguments.small else Reduction(t.scale, t.interpolation, t.antialias)
    restores = {BASELINE: Enlarge("bilinear"), "Bicubic": Enlarge("bicubic")}
    found = load_upscalers(weights, parameters.darionet.initial_weights, runtime.device, t.interpolation, t.antialias)
    restores |= {name: Upscale(Once(one.network), t.interpolation, t.antialias) for name, one in found.items()}
    pipelines = [Pipeline(name, classifier, unchanged, restore) for name, restore in restores.items()]

    limit = options.batches_per_epoch
    lists = epoch_batches(len(dataset), options.batch_size, seed=options.seed, epoch=0, shuffle=True, limit=limit)
    order = [i for batch in lists for i in batch]
    right = {(name, side): {} for name in restores for side in sides}  # image -> 1 or 0
    with Stopper() as stopper, progress_bar(len(order), "reading sizes", options.verbose, unit="image") as bar:
        if arguments.small:
            small_side = reduced_length(crop, t.scale)
            arriving = small_batches(dataset, order, parameters.data.workers, options.batch_size, small_side, stopper)
        else:
            arriving = batches(dataset, lists, parameters.data.workers, stopper=stopper)
        for batch in arriving:
            if places := batch.indices.tolist():
                target = targets[batch.indices].to(runtime.device)
                with runtime.autocast():
                    small = reduce(to_float(batch.images, runtime.device))
                    for pipeline in pipelines:
                        for side in sides:
                            logits = pipeline(small, full_size(small.shape, side))[2]
                            require_finite(logits, f"the images of {pipeline.name}")
                            hits = (logits.argmax(1) == target).int().tolist()
                            right[pipeline.name, side] |= zip(places, hits, strict=True)
            bar.update(len(places) + len(batch.unreadable))
    images = [i for i in order if i in right[BASELINE, sides[0]]]
    if len(images) < 2:
        raise InputError(f"{dataset.root}: two images at least have to be read")
    table = {name: {side: [right[name, side][i] for i in images] for side in sides} for name in restores}
    rows, tests = summarise(table, options.seed)
    folder = new_run_folder("reading")
    write_json(folder / "parameters.json", parameters.model_dump())
    about = {"n": len(images), "small": arguments.small, "weights": weights, "precision": runtime.precision}
    write_json(folder / "results.json", about | {"rows": rows, "mcnemar": tests})
    half = len(images) // 2
    text = f"{markdown(rows)}\nThe best size was chosen on {half} images and measured on {len(images) - half} others.\n"
    text += "".join(f"{mcnemar_line(test)}\n" for test in tests)
    write_text(folder / "results.md", text)
    print(f"{text}{folder}")
    return stopper.code if stopper.requested else int(len(images) < len(order))


def summarise(table: dict[str, dict[int, list[int]]], seed: int) -> tuple[list[dict], list[dict]]:
    """A row per name: accuracy per side, the best side of the first half, and accuracy there on the other half; and
    McNemar's tests of the last name against the others, each at its best side, on that half.

    `table` has 1 or 0 for every image, by name and side.
    """
    half = len(next(iter(next(iter(table.values())).values()))) // 2
    best = {name: max(sides, key=lambda side, own=sides: sum(own[side][:half])) for name, sides in table.items()}
    other = {name: np.array(sides[best[name]][half:], dtype=float) for name, sides in table.items()}
    accuracy, draws = bootstrap(other, seed)
    rows = []
    for name, sides in table.items():
        low, high = interval(draws[name])
        whole = {str(side): sum(hits) / len(hits) for side, hits in sides.items()}
        row = {"name": name, "accuracy": whole, "best": best[name], "accuracy_at_best": accuracy[name]}
        rows.append(row | {"low": low, "high": high})
    decisions = [
        {"image": i, "variant": name, "correct": hit}
        for name, sides in table.items()
        for i, hit in enumerate(sides[best[name]][half:])
    ]
    ours = rows[-1]["name"]
    return rows, [mcnemar(decisions, ours, name) for name in other if name != ours]


def markdown(rows: list[dict]) -> str:
    sides = list(rows[0]["accuracy"])
    lines = [f"| | {' | '.join(sides)} | best size | accuracy there |", "|---" * (len(sides) + 3) + "|"]
    for row in rows:
        cells = [f"{row['accuracy'][side]:.3f}" for side in sides]
        measured = f"{row['accuracy_at_best']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['best']} | {measured} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
