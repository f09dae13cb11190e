"""All variants in one pass over the data: one row per image and variant."""

import time
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from experiment.data import ImageTree, batches_until_stopped, to_float
from experiment.distillation import psnr_db
from experiment.metrics import BASELINE, ORIGINAL, SMALL, require_finite
from experiment.runtime import Runtime, Stopper
from models.classifier import FrozenClassifier
from models.darionet import load_rrdbnet
from models.pipeline import Enlarge, Pipeline, Upscale, unchanged
from models.rrdbnet import RRDBNet
from models.scaler import INTERPOLATIONS, Reduction

SMALLEST_FOR_SSIM = 11  # pixels: the side of its Gaussian window


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
    """What enlarges the small images that an adapted classifier reads: an interpolation, or an upscaler's weights.

    Raises:
        InputError: `how` is neither an interpolation nor the weights file of an RRDBNet x4.
    """
    if how in INTERPOLATIONS:
        return Enlarge(how)
    return Upscale(load_rrdbnet(how, device).eval(), reduction.interpolation, reduction.antialias)


@torch.no_grad()
def evaluate(
    pipelines: list[Pipeline],
    loader: DataLoader,
    dataset: ImageTree,
    targets: list[int],
    runtime: Runtime,
    stopper: Stopper,
    bar: tqdm,
    result: Evaluation,
    keep_rows: bool = True,
) -> None:
    """Adds the loader's images to `result`. The first of `pipelines` has to be Original: agreement is counted with it.

    Returns early where a signal asked to stop, between two batches.

    Raises:
        InputError: scores that are not finite.
    """
    for batch in batches_until_stopped(loader, stopper):
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
