"""All variants in one pass over the data, one row per image and variant; rebuilt images as files."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from experiment import plots
from experiment.data import Batch, ImageTree, to_float
from experiment.distillation import psnr_db
from experiment.metrics import BASELINE, ORIGINAL, OURS, SMALL, WINDOW, require_finite, ssim
from experiment.runtime import Runtime, Stopper
from experiment.sampling import ENDINGS, ending
from models.classifier import FrozenClassifier
from models.darionet import load_rrdbnet
from models.errors import InputError
from models.files import refuse_unwritable, write_atomically
from models.images import UnreadableImage, to_image
from models.pipeline import Enlarge, Pipeline, Size, Upscale, unchanged
from models.scaler import INTERPOLATIONS, Reduction
from models.weights import published_file

LONGEST_NAME = 255  # bytes of a file's name
SAMPLES = 6  # images in the strip of an epoch


@dataclass
class Evaluation:
    """What one pass over the data found."""

    rows: list[dict] = field(default_factory=list)  # one per image and variant, in the order of the data
    seconds: dict[str, float] = field(default_factory=dict)  # model time per variant, synchronised, after a warm-up
    timed: dict[str, int] = field(default_factory=dict)  # images in that time
    unreadable: dict[str, str] = field(default_factory=dict)  # path -> reason


def make_pipelines(
    classifier: FrozenClassifier,
    reduction: Callable[[Tensor], Tensor],
    networks: dict[str, Upscale],
    rivals: dict[str, tuple[FrozenClassifier, Upscale]] | None = None,
) -> list[Pipeline]:
    """The rows of the results table in their order, ours last. A new row is a Pipeline in this list.

    `rivals`: by the name of its row, a classifier that was adapted to small images, and how they are enlarged for it.
    """
    return [
        Pipeline(ORIGINAL, classifier, unchanged, unchanged),
        Pipeline(SMALL, classifier, reduction, unchanged),
        Pipeline(BASELINE, classifier, reduction, Enlarge("bilinear")),
        Pipeline("Bicubic", classifier, reduction, Enlarge("bicubic")),
        *(Pipeline(name, adapted, reduction, restore) for name, (adapted, restore) in (rivals or {}).items()),
        *(Pipeline(name, classifier, reduction, restore) for name, restore in networks.items()),
    ]


def open_restore(how: str, reduction: Reduction, device: torch.device) -> Upscale:
    """What enlarges the small images that an adapted classifier reads.

    `how` is an interpolation or an upscaler's weights, a file or a name in models.weights.URLS; else raises InputError.
    """
    if how in INTERPOLATIONS:
        return Enlarge(how)
    return Upscale(load_rrdbnet(published_file(how), device).eval(), reduction.interpolation, reduction.antialias)


def full_size(shape: Sequence[int], side: int) -> Size:
    """What a small image (...,h,w) is rebuilt to: its shorter side as long as the classifier's crops."""
    height, width = shape[-2:]
    return round(height * side / min(height, width)), round(width * side / min(height, width))


@torch.no_grad()
def ask(
    pipeline: Pipeline, images: Tensor, runtime: Runtime, size: Size | None = None, top: int = 1
) -> tuple[Tensor, Tensor, list[list[dict]]]:
    """(N,3,H,W) in [0,1] -> the small and the rebuilt images, and the `top` predictions of each.

    Raises InputError if scores are not finite.
    """
    with runtime.autocast():
        small, rebuilt, logits = pipeline(images, size)
    require_finite(logits, f"the image of {pipeline.name}")
    return small, rebuilt, pipeline.classifier.predictions(logits, top)


@torch.no_grad()
def evaluate(
    pipelines: list[Pipeline],
    arriving: Iterable[Batch],
    dataset: ImageTree,
    targets: list[int],
    runtime: Runtime,
    stopper: Stopper,
    bar: tqdm,
    result: Evaluation,
    keep_rows: bool = True,
    side: int | None = None,
) -> None:
    """Adds the images that arrive to `result`; returns between two batches if a signal asked to stop.

    `side` is the shorter side, in pixels, that images which are small already are rebuilt to. They have no original, so
    no PSNR, no SSIM and no agreement with it. Raises InputError if scores are not finite.
    """
    for batch in arriving:
        result.unreadable.update({dataset.paths[index]: reason for index, reason in batch.unreadable})
        places = batch.indices.tolist()
        images, original = to_float(batch.images, runtime.device), None
        target = torch.tensor([targets[i] for i in places], device=runtime.device)
        for pipeline in pipelines if places else ():
            name, class_names = pipeline.name, pipeline.classifier.class_names
            size = None if side is None else full_size(images.shape, side)
            with runtime.autocast():
                if name not in result.seconds:  # the first call compiles and allocates: not timed
                    pipeline(images[:1], size)
                runtime.synchronize()
                started = time.perf_counter()
                _, rebuilt, logits = pipeline(images, size)
                runtime.synchronize()
            result.seconds[name] = result.seconds.get(name, 0.0) + time.perf_counter() - started
            result.timed[name] = result.timed.get(name, 0) + len(images)
            require_finite(logits, f"the images of {name}")
            original = logits if name == ORIGINAL else original
            if keep_rows:
                compared = None if side or pipeline.restore is unchanged else rebuilt
                for i, row in zip(places, score(logits.float(), target, original, images, compared), strict=True):
                    names = {"class": class_names[targets[i]], "predicted": class_names[row.pop("prediction")]}
                    result.rows.append({"image": dataset.paths[i], "variant": name} | names | row)
        bar.update(len(places) + len(batch.unreadable))
        if stopper.requested:
            return


def joined(parts: list[Evaluation], order: list[str]) -> Evaluation:
    """The evaluations of all processes as one: rows in the order of the paths in `order`, seconds of the slowest."""
    whole = Evaluation()
    for part in parts:
        whole.rows += part.rows
        whole.unreadable |= part.unreadable
        for name, count in part.timed.items():
            whole.timed[name] = whole.timed.get(name, 0) + count
            whole.seconds[name] = max(whole.seconds.get(name, 0.0), part.seconds[name])
    place = {path: i for i, path in enumerate(order)}
    whole.rows.sort(key=lambda row: place[row["image"]])
    return whole


def score(
    logits: Tensor, target: Tensor, original: Tensor | None, images: Tensor, rebuilt: Tensor | None
) -> list[dict]:
    """One dictionary per image; PSNR and SSIM are None if nothing was `rebuilt`, SSIM also if no window fits, and
    agreement if there are no scores of an `original`."""
    prediction = logits.argmax(1)
    columns = {
        "prediction": prediction,
        "probability": logits.softmax(1).amax(1),
        "correct": (prediction == target).int(),
        "top5": (logits.topk(min(5, logits.shape[1])).indices == target[:, None]).any(1).int(),
        "agreement": None if original is None else (prediction == original.argmax(1)).int(),
        "cross_entropy": F.cross_entropy(logits, target, reduction="none"),
        "psnr_db": None if rebuilt is None else psnr_db(rebuilt, images),
        "ssim": None if rebuilt is None or min(images.shape[-2:]) < WINDOW else ssim(rebuilt, images),
    }
    lists = [[None] * len(images) if values is None else values.tolist() for values in columns.values()]
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def images_at(dataset: ImageTree, paths: list[str], device: torch.device) -> list[Tensor]:
    """Some images of a folder, each (1,3,H,W) in [0,1]. Raises UnreadableImage if one can't be read any more."""
    images = [dataset[dataset.paths.index(path)][1] for path in paths]
    for path, image in zip(paths, images, strict=True):
        if isinstance(image, str):  # the reason
            raise UnreadableImage(f"{path}: {image}")
    return [to_float(image[None], device) for image in images]


def draw_sheet(
    pipelines: list[Pipeline],
    dataset: ImageTree,
    verdicts: dict[str, list[tuple[str, str]]],
    runtime: Runtime,
    path: Path,
    side: int | None,
) -> None:
    """Writes a figure: a row per image, a column per pipeline with what it rebuilds of it.

    `verdicts` has the paths of the images, and a (text, colour) per pipeline. `side` is as in `evaluate`: if the images
    are small already, a first column has them as they are. Raises UnreadableImage as `images_at`.
    """
    images = images_at(dataset, list(verdicts), runtime.device)
    columns = {} if side is None else {"As it came": [image[0] for image in images]}
    for pipeline in pipelines:
        asked = [ask(pipeline, image, runtime, side and full_size(image.shape, side)) for image in images]
        columns[pipeline.name] = [rebuilt[0] for _, rebuilt, _ in asked]
    blank = [] if side is None else [("", plots.PLAIN)]
    plots.image_grid(columns, [[*blank, *row] for row in verdicts.values()], path)


@torch.no_grad()
def draw_samples(dataset: ImageTree, reduction: Reduction, restore: Upscale, runtime: Runtime, path: Path) -> None:
    """Writes a figure of images from all over a folder: original, small, bilinear, DarioNet."""
    spread = range(0, len(dataset), max(1, len(dataset) // SAMPLES))
    images = [image for _, image in map(dataset.__getitem__, spread) if isinstance(image, Tensor)][:SAMPLES]
    if images:
        originals = to_float(torch.stack(images), runtime.device)
        size = originals.shape[-2:]
        with runtime.autocast():
            small = reduction(originals)
            bilinear, rebuilt = Enlarge("bilinear")(small, size), restore(small, size)
        plots.image_grid({"original": originals, "small": small, BASELINE: bilinear, OURS: rebuilt}, None, path)


def output_name(name: str) -> str:
    """The path below OUT of what is rebuilt from the image `name`: different for every name.

    A PNG keeps its name, others get ".png" at their end; so does x.jpg.png, which would be that of x.jpg.
    """
    stem = os.path.splitext(name)[0]
    folder, last = os.path.split(name if ending(name) == ".png" and ending(stem) not in ENDINGS else f"{name}.png")
    if len(os.fsencode(last)) > LONGEST_NAME:
        tail = f"~{hashlib.sha256(os.fsencode(last)).hexdigest()[:16]}.png"
        last = os.fsencode(last)[: LONGEST_NAME - len(tail)].decode(errors="ignore") + tail
    return os.path.join(folder, last)


def to_rebuild(sources: list[Path], targets: list[Path], overwrite: bool) -> list[int]:
    """Places of the images whose target does not exist yet; of all with `overwrite`. Folders are made.

    Raises InputError if one of these targets can't be written, or is the image itself.
    """
    chosen = [i for i, target in enumerate(targets) if overwrite or not os.path.isfile(target)]
    existing = [i for i in chosen if os.path.lexists(targets[i])]
    for i in {*{targets[i].parent: i for i in chosen}.values(), *existing}:
        refuse_unwritable(targets[i], "--save")
    for i in existing:
        if targets[i].exists() and targets[i].samefile(sources[i]):
            raise InputError(f"{targets[i]}: the image itself; change --save")
    return chosen


def save_images(rebuilt: Tensor, targets: list[Path], overwrite: bool) -> None:
    """save_image of a batch (N,3,H,W); threads compress, or a GPU would wait most of the time."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(save_image, rebuilt, targets, [overwrite] * len(targets)))


def save_image(rebuilt: Tensor, target: Path, overwrite: bool) -> None:
    """Writes (3,H,W) in [0,1] as a PNG of 8 bits, rounded; InputError if the file exists since `to_rebuild` looked."""
    if not overwrite and os.path.isfile(target):  # or the file system does not tell A from a
        raise InputError(f"{target}: exists since this run started; change --save")
    image = to_image(rebuilt)  # level 1: a quarter of the time of Pillow's default, a tenth more bytes
    write_atomically(target, lambda file: image.save(file, "PNG", compress_level=1))
