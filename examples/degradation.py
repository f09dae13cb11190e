"""What is a DarioNet worth on small images that were made in another way than it was trained for?

    python examples/degradation.py --parameters examples/tiny_imagenet/parameters.json \\
        --weights examples/tiny_imagenet/output/DarioNet.pt examples/tiny_imagenet/output/antialiased.pt
    python examples/degradation.py --scales 0.5 0.32 0.1667      at several scales

The test images are reduced in five ways: plain bilinear (as published), antialiased bilinear, antialiased bicubic, and
plain bilinear stored as JPEG of quality 75 and 40. Every network rebuilds all of them, and so do bilinear and bicubic
enlarging. The table has accuracies and, in brackets, the fraction recovered of what bilinear loses on the same small
images; table, numbers and figure go to assets/logs/degradation_<stamp>/.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # started as a file, python finds the packages beside it

import torch
from torch import Tensor

from experiment import plots
from experiment.data import ImageTree, Loader, Transform, batches_until_stopped, epoch_batches, to_float
from experiment.metrics import BASELINE, require_finite, write_json
from experiment.parameters import read_parameters, run_script, script_parser
from experiment.runtime import Stopper, new_run_folder, progress_bar, seed_without_tf32, start_runtime
from models.classifier import open_classifier
from models.darionet import load_upscalers, prepare
from models.errors import InputError
from models.pipeline import Enlarge, Pipeline, Upscale, unchanged
from models.scaler import Jpeg, Reduction


def ways(scale: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> a way to make images smaller by `scale`. A new one is an entry."""
    plain = Reduction(scale)
    return {
        "bilinear": plain,
        "bilinear, antialiased": Reduction(scale, antialias=True),
        "bicubic, antialiased": Reduction(scale, "bicubic", antialias=True),
        "bilinear, JPEG 75": Jpeg(plain, 75),
        "bilinear, JPEG 40": Jpeg(plain, 40),
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
    runtime = start_runtime(options.precision)
    seed_without_tf32(options.seed)
    dataset = ImageTree(parameters.data.test, Transform(t.resize_size, t.val_crop_size))
    classifier = prepare(open_classifier(**parameters.classifier[0].model_dump()), runtime.device)
    classifier.require(t.val_crop_size, "transformations.val_crop_size")
    targets = torch.tensor(dataset.targets(classifier.class_names, required=True))
    restores = {BASELINE: Enlarge("bilinear"), "Bicubic": Enlarge("bicubic")}
    networks = load_upscalers(arguments.weights or [d.weights], d.initial_weights, runtime.device)
    restores |= {name: Upscale(network, t.interpolation, t.antialias) for name, network in networks.items()}
    pipelines = [Pipeline(name, classifier, unchanged, restore) for name, restore in restores.items()]
    scales = arguments.scales or [t.scale]
    reductions = {(scale, name): reduce for scale in scales for name, reduce in ways(scale).items()}
    limit = options.batches_per_epoch
    batches = epoch_batches(len(dataset), options.batch_size, seed=options.seed, epoch=0, shuffle=True, limit=limit)

    right = {key: dict.fromkeys(restores, 0) for key in reductions}
    original = count = unreadable = 0
    loader = Loader(dataset, batches, parameters.data.workers, runtime.device.type == "cuda")
    with Stopper() as stopper, progress_bar(len(batches), "degradation", options.verbose) as bar:
        for batch in batches_until_stopped(loader, stopper):
            unreadable += len(batch.unreadable)
            if len(batch.images):
                images, target = to_float(batch.images, runtime.device), targets[batch.indices].to(runtime.device)
                with runtime.autocast():
                    logits = classifier(images)
                    require_finite(logits, "the original images")
                    original += (logits.argmax(1) == target).sum().item()
                    count += len(images)
                    for key, reduce in reductions.items():
                        small = reduce(images)
                        for pipeline in pipelines:
                            logits = pipeline(small, tuple(images.shape[-2:]))[2]
                            require_finite(logits, f"the images of {pipeline.name}")
                            right[key][pipeline.name] += (logits.argmax(1) == target).sum().item()
            bar.update()
        if stopper.requested:
            print(f"Stopped after {count} of {len(dataset)} images")
    if not count and stopper.requested:
        return stopper.code
    if not count:
        raise InputError(f"{dataset.root}: none of its images could be read")

    rows = []
    for (scale, name), hits in right.items():
        accuracy = {row: found / count for row, found in hits.items()}
        lost = original / count - accuracy[BASELINE]
        recovered = {row: (a - accuracy[BASELINE]) / lost if lost > 0 else None for row, a in accuracy.items()}
        rows.append({"scale": scale, "reduction": name, "accuracy": accuracy, "recovered": recovered})
    folder = new_run_folder("degradation")
    write_json(folder / "results.json", {"n": count, "original": original / count, "rows": rows})
    table = f"{markdown(rows)}\n{count} test images; accuracy on the originals {original / count:.3f}.\n{overall(rows)}"
    (folder / "results.md").write_text(table, encoding="utf-8")
    plots.degradation(rows, folder / "degradation.png")
    print(table)
    if unreadable:
        print(f"{unreadable} images could not be read and were not scored")
    print(folder)
    return stopper.code if stopper.requested else 1 if unreadable else 0


def markdown(rows: list[dict]) -> str:
    names = list(rows[0]["accuracy"])
    lines = [f"| scale | small images | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = []
        for name in names:
            recovered = row["recovered"][name]
            gained = "" if name == BASELINE or recovered is None else f" ({recovered:.0%})"
            cells.append(f"{row['accuracy'][name]:.3f}{gained}")
        lines.append(f"| {row['scale']:.3g} | {row['reduction']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def overall(rows: list[dict]) -> str:
    """A line for every network: what it recovers in the mean of all rows, and where it does worst."""
    lines = []
    for name in list(rows[0]["accuracy"])[1:]:
        found = [(row["recovered"][name], row) for row in rows if row["recovered"][name] is not None]
        if found:
            worst, row = min(found, key=lambda pair: pair[0])
            mean = sum(value for value, _ in found) / len(found)
            where = f"x{row['scale']:.3g} {row['reduction']}"
            lines.append(
                f"{name} recovers {mean:.1%} in the mean of {len(found)} rows, at worst {worst:.1%} ({where}).\n"
            )
    return "\n".join(["", *lines])


if __name__ == "__main__":
    run_script(main)
