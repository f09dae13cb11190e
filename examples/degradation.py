"""What is a DarioNet worth on small images that were made in another way than it was trained for?

    python examples/degradation.py --parameters examples/tiny_imagenet/parameters.json \\
        --weights examples/tiny_imagenet/output/DarioNet.pt examples/tiny_imagenet/output/antialiased.pt
    python examples/degradation.py --scales 0.5 0.32 0.1667      at several scales

The test images are reduced in six ways: plain bilinear (as published), antialiased bilinear, antialiased bicubic, and
plain bilinear stored as JPEG of quality 75 and 40 and as WebP of quality 70. Every network rebuilds all of them, and so
do bilinear and bicubic enlarging. The table has accuracies and the fraction recovered of what bilinear loses on the
same small images, with its 95 % interval; table, numbers and figure go to assets/logs/degradation_<stamp>/.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # started as a file, python finds the packages beside it

import numpy as np
import torch
from torch import Tensor

from experiment import plots
from experiment.data import ImageTree, Transform, batches, epoch_batches, to_float
from experiment.evaluation import make_pipelines
from experiment.metrics import ORIGINAL, SMALL, bootstrap, interval, recovered_draws, require_finite, write_json
from experiment.parameters import read_parameters
from experiment.runtime import Stopper, new_run_folder, progress_bar, start_runtime
from experiment.script import run_script, script_parser
from models.classifier import open_classifier
from models.darionet import load_upscalers, to_device
from models.errors import InputError
from models.files import write_text
from models.pipeline import unchanged
from models.scaler import Reduction, Stored


def ways(scale: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> a way to make images smaller by `scale`. A new one is an entry."""
    plain = Reduction(scale)
    return {
        "bilinear": plain,
        "bilinear, antialiased": Reduction(scale, antialias=True),
        "bicubic, antialiased": Reduction(scale, "bicubic", antialias=True),
        "bilinear, JPEG 75": Stored(plain, "JPEG", 75),
        "bilinear, JPEG 40": Stored(plain, "JPEG", 40),
        "bilinear, WebP 70": Stored(plain, "WEBP", 70),
    }


@torch.no_grad()
def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="networks (default: darionet.weights)")
    parser.add_argument("--scales", nargs="+", type=float, metavar="S", help="default: transformations.scale")
    arguments = parser.parse_args()
    parameters = read_parameters(arguments.parameters or "parameters.json", arguments.set)
    for scale in arguments.scales or ():
        if not 0 < scale <= 1:
            raise InputError(f"--scales {scale:g}: has to be over 0 and at most 1")
    t, options, d = parameters.transformations, parameters.test, parameters.darionet
    runtime = start_runtime(options.precision, options.seed)
    dataset = ImageTree(parameters.data.test, Transform(t.resize_size, t.val_crop_size))
    classifier = to_device(open_classifier(**parameters.classifier.model_dump()), runtime.device)
    classifier.check(t.val_crop_size, "transformations.val_crop_size")
    targets = torch.tensor(dataset.targets(classifier.class_names, required=True))
    weights = arguments.weights or [d.weights]
    networks = load_upscalers(weights, d.initial_weights, runtime.device, t.interpolation, t.antialias)
    pipelines = make_pipelines(classifier, unchanged, networks)
    pipelines = [pipeline for pipeline in pipelines if pipeline.name not in (ORIGINAL, SMALL)]
    scales = arguments.scales or [t.scale]
    reductions = {(scale, name): reduce for scale in scales for name, reduce in ways(scale).items()}
    limit = options.batches_per_epoch
    lists = epoch_batches(len(dataset), options.batch_size, seed=options.seed, epoch=0, shuffle=True, limit=limit)

    right = {key: {one.name: [] for one in pipelines} for key in reductions}  # 1 for every image read correctly, else 0
    original, unreadable = [], 0
    is_cuda = runtime.device.type == "cuda"
    with Stopper() as stopper, progress_bar(len(lists), "degradation", options.verbose) as bar:
        for batch in batches(dataset, lists, parameters.data.workers, is_cuda, stopper):
            unreadable += len(batch.unreadable)
            if len(batch.images):
                images, target = to_float(batch.images, runtime.device), targets[batch.indices].to(runtime.device)
                with runtime.autocast():
                    logits = classifier(images)
                    require_finite(logits, "the original images")
                    original += (logits.argmax(1) == target).tolist()
                    for key, reduce in reductions.items():
                        small = reduce(images)
                        for pipeline in pipelines:
                            logits = pipeline(small, tuple(images.shape[-2:]))[2]
                            require_finite(logits, f"the images of {pipeline.name}")
                            right[key][pipeline.name] += (logits.argmax(1) == target).tolist()
            bar.update()
        if stopper.requested:
            print(f"Stopped after {len(original)} of {len(dataset)} images")
    if not original and stopper.requested:
        return stopper.code
    if not original:
        raise InputError(f"{dataset.root}: none of its images could be read")

    rows, means = summarise(right, original, options.seed)
    accuracy = sum(original) / len(original)
    folder = new_run_folder("degradation")
    write_json(folder / "parameters.json", parameters.model_dump())
    found = {"n": len(original), "original": accuracy, "rows": rows, "means": means}
    write_json(folder / "results.json", found | {"weights": weights, "precision": runtime.precision})
    table = f"{markdown(rows)}\n{len(original)} test images; accuracy on the originals {accuracy:.3f}.\n"
    table += overall(rows, means)
    write_text(folder / "results.md", table)
    plots.degradation(rows, accuracy, folder / "degradation.png")
    print(table)
    if unreadable:
        print(f"{unreadable} images could not be read and were not scored")
    print(folder)
    return stopper.code if stopper.requested else 1 if unreadable else 0


def summarise(
    right: dict[tuple[float, str], dict[str, list[bool]]], original: list[bool], seed: int
) -> tuple[list[dict], dict[str, dict]]:
    """The rows of the table, and what every network recovers in the mean of them; with 95 % intervals.

    One seed draws the same images for every row (experiment.metrics.bootstrap), so the mean's interval is that of
    one sample of images seen in all ways. Rows where bilinear loses nothing have no part in the mean.
    """
    rows, shares = [], {}
    for (scale, reduction), found in right.items():
        correct = {name: np.array(values, dtype=float) for name, values in ({ORIGINAL: original} | found).items()}
        accuracy, draws = bootstrap(correct, seed)
        recovered = {name: recovered_draws(name, accuracy, draws) for name in found}
        row = {"scale": scale, "reduction": reduction, "accuracy": {name: accuracy[name] for name in found}}
        rows.append(row | {"recovered": {name: with_interval(*share) for name, share in recovered.items()}})
        for name, (value, drawn) in recovered.items():
            if value is not None:
                shares.setdefault(name, []).append((value, drawn))
    means = {}
    for name, found in shares.items():
        values, drawn = zip(*found, strict=True)
        everywhere = None if any(draws is None for draws in drawn) else np.mean(drawn, 0)
        means[name] = with_interval(sum(values) / len(values), everywhere) | {"rows": len(values)}
    return rows, means


def with_interval(fraction: float | None, drawn: np.ndarray | None) -> dict:
    low, high = (None, None) if drawn is None else interval(drawn)
    return {"fraction": fraction, "low": low, "high": high}


def percent(share: dict, digits: int = 0) -> str:
    """A recovered fraction with its interval, as "68% (61% to 75%)"; without one where it has none."""
    between = "" if share["low"] is None else f" ({share['low']:.0%} to {share['high']:.0%})"
    return f"{share['fraction']:.{digits}%}{between}"


def markdown(rows: list[dict]) -> str:
    names = list(rows[0]["accuracy"])
    lines = [f"| scale | small images | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = []
        for name in names:
            share = row["recovered"][name]
            gained = "" if share["fraction"] is None else f", {percent(share)}"
            cells.append(f"{row['accuracy'][name]:.3f}{gained}")
        lines.append(f"| {row['scale']:.3g} | {row['reduction']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def overall(rows: list[dict], means: dict[str, dict]) -> str:
    """A line for every network: what it recovers in the mean of all rows, and where it does worst."""
    lines = []
    for name, mean in means.items():
        found = [row for row in rows if row["recovered"][name]["fraction"] is not None]
        worst = min(found, key=lambda row: row["recovered"][name]["fraction"])
        lines.append(
            f"{name} recovers {percent(mean, 1)} in the mean of {mean['rows']} rows, at worst "
            f"{percent(worst['recovered'][name], 1)}: x{worst['scale']:.3g} {worst['reduction']}.\n"
        )
    return "\n".join(["", *lines])


if __name__ == "__main__":
    run_script(main)
