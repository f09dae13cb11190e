"""All variants in one pass over the data: one row per image and variant. Rebuilt images as files."""

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from experiment.data import Batch, ImageTree, to_float
from experiment.distillation import psnr_db
from experiment.metrics import BASELINE, ORIGINAL, SMALL, require_finite
from experiment.runtime import Runtime, Stopper
from experiment.sampling import ENDINGS, ending
from models.classifier import FrozenClassifier
from models.darionet import load_rrdbnet
from models.errors import InputError
from models.files import refuse_unwritable, write_atomically
from models.images import to_image
from models.pipeline import Enlarge, Pipeline, Upscale, unchanged
from models.rrdbnet import RRDBNet
from models.scaler import INTERPOLATIONS, Reduction
from models.weights import published_file

SMALLEST_FOR_SSIM = 11  # pixels: the side of its Gaussian window
LONGEST_NAME = 255  # bytes of a file's name


@dataclass
class Evaluation:
    """What one pass over the data found."""

    rows: list[dict] = field(default_factory=list)  # one per image and variant, in the order of the data
    seconds: dict[str, float] = field(default_factory=dict)  # model time per variant, synchronised, after a warm-up
    timed: dict[str, int] = field(default_factory=dict)  # images in that time
    unreadable: dict[str, str] = field(default_factory=dict)  # path -> reason


def make_pipelines(
    classifier: FrozenClassifier,
    reduction: Reduction,
    networks: dict[str, RRDBNet],
    rivals: dict[str, tuple[FrozenClassifier, Enlarge | Upscale]] = MappingProxyType({}),
) -> list[Pipeline]:
    """The rows of the results table in their order, ours last. A new row is a Pipeline in this list.

    `rivals` are classifiers that were adapted to small images, by the names of their rows, and how theirs are enlarged.
    """
    return [
        Pipeline(ORIGINAL, classifier, unchanged, unchanged),
        Pipeline(SMALL, classifier, reduction, unchanged),
        Pipeline(BASELINE, classifier, reduction, Enlarge("bilinear")),
        Pipeline("Bicubic", classifier, reduction, Enlarge("bicubic")),
        *(Pipeline(name, adapted, reduction, restore) for name, (adapted, restore) in rivals.items()),
        *(
            Pipeline(name, classifier, reduction, Upscale(network, reduction.interpolation, reduction.antialias))
            for name, network in networks.items()
        ),
    ]


def enlarger(how: str, reduction: Reduction, device: torch.device) -> Enlarge | Upscale:
    """What enlarges the small images that an adapted classifier reads: an interpolation, or an upscaler's weights,
    a file or a name in models.weights.URLS.

    Raises:
        InputError: `how` is neither an interpolation nor the weights of an RRDBNet x4.
    """
    if how in INTERPOLATIONS:
        return Enlarge(how)
    return Upscale(load_rrdbnet(published_file(how), device).eval(), reduction.interpolation, reduction.antialias)


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
) -> None:
    """Adds the images that arrive to `result`. The first of `pipelines` has to be Original, for the agreement with it.

    Returns early where a signal asked to stop, between two batches.

    Raises:
        InputError: scores that are not finite.
    """
    for batch in arriving:
        result.unreadable.update({dataset.paths[index]: reason for index, reason in batch.unreadable})
        if len(batch.images):
            images = to_float(batch.images, runtime.device)
            target = torch.tensor([targets[i] for i in batch.indices.tolist()], device=runtime.device)
            original = None
            for pipeline in pipelines:
                name = pipeline.name
                with runtime.autocast():
                    if name not in result.seconds:  # the first call compiles and allocates: not timed
                        pipeline(images[:1])
                    runtime.synchronize()
                    started = time.perf_counter()
                    _, rebuilt, logits = pipeline(images)
                    runtime.synchronize()
                result.seconds[name] = result.seconds.get(name, 0.0) + time.perf_counter() - started
                result.timed[name] = result.timed.get(name, 0) + len(images)
                require_finite(logits, f"the images of {name}")
                original = logits if original is None else original
                if keep_rows:
                    compared = None if pipeline.restore is unchanged else rebuilt
                    scored = score(logits.float(), target, original, images, compared)
                    class_names = pipeline.classifier.class_names
                    for index, values in zip(batch.indices.tolist(), scored, strict=True):
                        result.rows.append(
                            {
                                "image": dataset.paths[index],
                                "variant": name,
                                "class": class_names[targets[index]],
                                "predicted": class_names[values.pop("prediction")],
                                **values,
                            }
                        )
        bar.update()
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


def score(logits: Tensor, target: Tensor, original: Tensor, images: Tensor, rebuilt: Tensor | None) -> list[dict]:
    """One dictionary per image; PSNR and SSIM are None where nothing was `rebuilt`."""
    probabilities = logits.softmax(1)
    prediction = logits.argmax(1)
    columns = {
        "prediction": prediction,
        "probability": probabilities.gather(1, prediction[:, None])[:, 0],
        "correct": (prediction == target).int(),
        "top5": (logits.topk(min(5, logits.shape[1])).indices == target[:, None]).any(1).int(),
        "agreement": (prediction == original.argmax(1)).int(),
        "cross_entropy": F.cross_entropy(logits, target, reduction="none"),
    }
    none = [None] * len(images)
    lists = {name: values.tolist() for name, values in columns.items()} | {"psnr_db": none, "ssim": none}
    if rebuilt is not None:
        lists["psnr_db"] = psnr_db(rebuilt, images).tolist()
        if min(images.shape[-2:]) >= SMALLEST_FOR_SSIM:
            _, windows = structural_similarity_index_measure(rebuilt, images, data_range=1.0, return_full_image=True)
            edge = SMALLEST_FOR_SSIM // 2  # only windows that lie within the image count (Wang et al. 2004)
            lists["ssim"] = windows[..., edge:-edge, edge:-edge].mean((1, 2, 3)).tolist()
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def saved_as(name: str) -> str:
    """The path below OUT of what is rebuilt from the image `name`: another one for every name, whatever else is there.

    A PNG keeps its name, others get ".png" at their end; so does x.jpg.png, which would be that of x.jpg.
    """
    stem = os.path.splitext(name)[0]
    target = name if ending(name) == ".png" and ending(stem) not in ENDINGS else f"{name}.png"
    folder, last = os.path.split(target)
    if len(os.fsencode(last)) > LONGEST_NAME:
        tail = f"~{hashlib.sha256(os.fsencode(last)).hexdigest()[:16]}.png"
        while len(os.fsencode(last + tail)) > LONGEST_NAME:
            last = last[:-1]
        last += tail
    return os.path.join(folder, last)


def to_rebuild(sources: list[Path], targets: list[Path], overwrite: bool) -> list[int]:
    """Places of the images whose target is not there yet; of all with `overwrite`. Folders are made.

    Raises:
        InputError: one of these targets can't be written, or is the image itself.
    """
    chosen = [i for i, target in enumerate(targets) if overwrite or not os.path.isfile(target)]
    longest = {targets[i].parent: targets[i] for i in sorted(chosen, key=lambda i: len(os.fsencode(targets[i])))}
    for target in longest.values():
        refuse_unwritable(target, "--save")
    for i in chosen:
        if os.path.lexists(targets[i]):
            refuse_unwritable(targets[i], "--save")
            if os.path.exists(sources[i]) and os.path.exists(targets[i]) and os.path.samefile(sources[i], targets[i]):
                raise InputError(f"{targets[i]}: the image itself; change --save")
    return chosen


def save_images(rebuilt: Tensor, targets: list[Path], overwrite: bool) -> None:
    """save_image of a batch (N,3,H,W); threads compress, or a GPU would wait most of the time."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(save_image, rebuilt, targets, [overwrite] * len(targets)))


def save_image(rebuilt: Tensor, target: Path, overwrite: bool) -> None:
    """Writes (3,H,W) in [0,1] as a PNG of 8 bits, rounded.

    Raises:
        InputError: the file came to be since `to_rebuild` looked.
    """
    if not overwrite and os.path.isfile(target):
        raise InputError(
            f"{target}: another run writes there, or its file system takes two of the names for one; change --save"
        )
    image = to_image(rebuilt)
    # A quarter of the time of Pillow's default, a tenth more bytes.
    write_atomically(target, lambda file: image.save(file, "PNG", compress_level=1))
