"""The terms of the loss, schedules, and the validation."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from experiment.data import NO_LABEL, Batch, to_float
from experiment.metrics import require_finite
from experiment.runtime import Runtime, Stopper
from models.classifier import FrozenClassifier, Look
from models.errors import InputError
from models.pipeline import Size

Restore = Callable[[Tensor, Size], Tensor]


class Compared(NamedTuple):
    """What the terms of the loss compare."""

    images: Tensor  # (N,3,H,W) in [0,1], the originals
    unclamped: Tensor  # (N,3,H,W), the rebuilt images as the network gives them
    rebuilt: Tensor  # (N,3,H,W) in [0,1], what a classifier is shown
    on_original: Sequence[Look]  # what every teacher sees in the originals
    on_rebuilt: Sequence[Look]  # and in the rebuilt images


def compare(
    images: Tensor,
    small: Tensor,
    restore: Restore,
    teachers: Sequence[FrozenClassifier],
    readers: Sequence[FrozenClassifier] | None = None,
    *,
    clamp_gradient: bool = True,
) -> Compared:
    """Rebuilds `small`, (N,3,h,w) in [0,1], and has the teachers look at originals and rebuilt images.

    `readers` look at the rebuilt images in the teachers' place. Without `clamp_gradient` gradients of pixels outside
    [0,1] pass the clamp: such pixels are called back.
    """
    unclamped = restore(small, tuple(images.shape[-2:]))
    rebuilt = unclamped.clamp(0, 1)
    if not clamp_gradient:
        rebuilt = unclamped + (rebuilt - unclamped).detach()
    with torch.no_grad():
        on_original = [teacher.look(images) for teacher in teachers]
    on_rebuilt = [reader.look(rebuilt) for reader in (teachers if readers is None else readers)]
    return Compared(images, unclamped, rebuilt, on_original, on_rebuilt)


def mean_over_teachers(compared: Compared, distance: Callable[[Look, Look], Tensor]) -> Tensor:
    pairs = zip(compared.on_rebuilt, compared.on_original, strict=True)
    return torch.stack([distance(rebuilt, original) for rebuilt, original in pairs]).mean()


def logits(compared: Compared) -> Tensor:
    """MSE of the scores before the softmax: the distillation proper."""
    return mean_over_teachers(compared, lambda rebuilt, original: F.mse_loss(rebuilt.logits, original.logits))


def pixels(compared: Compared) -> Tensor:
    """Mean absolute error of the pixels before clamping: how PSNR generators are trained (ESRGAN, section 3.4)."""
    return F.l1_loss(compared.unclamped, compared.images)


def features(compared: Compared) -> Tensor:
    """MSE of the inputs of the teacher's last layer."""
    return mean_over_teachers(compared, lambda rebuilt, original: F.mse_loss(rebuilt.features, original.features))


def maps(compared: Compared) -> Tensor:
    """MSE of the maps of several layers, each over the variance of the original's map: 1 is no better than its mean.

    So a weight means the same for every classifier.
    """

    def distance(rebuilt: Look, original: Look) -> Tensor:
        pairs = zip(rebuilt.maps, original.maps, strict=True)
        return torch.stack([F.mse_loss(found, wanted) / (wanted.var() + 1e-8) for found, wanted in pairs]).mean()

    return mean_over_teachers(compared, distance)


# A new term is a function here and a weight in training.loss.
TERMS = {"logits": logits, "pixels": pixels, "features": features, "maps": maps}


@dataclass
class Losses:
    """Of a batch: the mean weighted `total` carries the gradient."""

    total: Tensor  # ()
    psnr_db: Tensor  # (N)
    on_rebuilt: Tensor | None = None  # logits (N, classes) of the first teacher, if there is one
    on_original: Tensor | None = None


def distillation_loss(
    images: Tensor,
    small: Tensor,
    restore: Restore,
    teachers: Sequence[FrozenClassifier],
    weights: Mapping[str, float],
    *,
    readers: Sequence[FrozenClassifier] | None = None,
    clamp_gradient: bool = True,
    with_logits: bool = False,
) -> Losses:
    """The weighted sum of TERMS, as one graph for torch.compile; terms of weight 0 cost nothing.

    Arguments as for `compare`; `with_logits` asks for the logits of the first teacher too, whatever the terms need.
    """
    if not with_logits and not any(weight for name, weight in weights.items() if name != "pixels"):
        teachers = []  # none of them needs to look
    compared = compare(images, small, restore, teachers, readers, clamp_gradient=clamp_gradient)
    total = torch.stack([weight * TERMS[name](compared) for name, weight in weights.items() if weight]).sum()
    psnr = psnr_db(compared.rebuilt.detach(), images)
    looks = (looks[0].logits if looks else None for looks in (compared.on_rebuilt, compared.on_original))
    return Losses(total, psnr, *looks)


def psnr_db(found: Tensor, expected: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (N,3,H,W) in [0,1] -> (N) in dB; identical images count as 100."""
    return -10 * (found - expected).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def learning_rate_at(step: int, total: int, base: float, schedule: str, warmup: int) -> float:
    """Learning rate of a step: constant, or half a cosine down to 0, times a linear rise over `warmup` steps."""
    rate = base * min(1.0, (step + 1) / (warmup + 1))
    return rate if schedule == "constant" else rate * 0.5 * (1 + math.cos(math.pi * step / total))


@torch.no_grad()
def ema_update(average: nn.Module, network: nn.Module, decay: float, updates: int) -> None:
    """Moves averaged weights towards the trained ones, in place; the first ones are soon forgotten.

    The decay is min(decay, (1 + n) / (10 + n)) after n updates.
    """
    weight = 1 - min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)


@torch.no_grad()
def validate(
    loss: Callable[[Tensor], Losses],
    loader: Iterable[Batch],
    targets: list[int],
    runtime: Runtime,
    stopper: Stopper,
    bar: tqdm,
) -> dict[str, float | int | None] | None:
    """Mean loss, PSNR in dB, accuracy and agreement (same class as on the original); None if a signal asked to stop.

    `loss` takes images, (N,3,H,W) in [0,1], and gives logits too. Accuracy is None without labels. The loader has this
    process's part; the scores are those of all. Raises InputError if no image could be read or scores are not finite.
    """
    count = right = labelled = agreeing = unreadable = 0
    total = psnr = 0.0
    for batch in loader:
        unreadable += len(batch.unreadable)
        n = len(batch.images)
        if n:
            target = torch.tensor([targets[i] for i in batch.indices.tolist()])
            with runtime.autocast():
                losses = loss(to_float(batch.images, runtime.device))
            require_finite(losses.on_original, "the original images")
            predicted, expected = losses.on_rebuilt.argmax(1).cpu(), losses.on_original.argmax(1).cpu()
            count += n
            total += losses.total.item() * n
            psnr += losses.psnr_db.sum().item()
            finite = losses.on_rebuilt.isfinite().all(1).cpu()  # of a network that diverged nothing is right
            right += ((predicted == target) & finite).sum().item()
            labelled += (target != NO_LABEL).sum().item()
            agreeing += ((predicted == expected) & finite).sum().item()
        bar.update()
        if stopper.requested:
            break
    sums = (count, total, psnr, right, labelled, agreeing, unreadable, stopper.requested)
    count, total, psnr, right, labelled, agreeing, unreadable, stops = runtime.sum_numbers(*sums)
    if stopper.agree(stops):
        return None
    if not count:
        raise InputError("none of the validation images could be read; check data.val")
    return {
        "val_loss": total / count,
        "val_psnr_db": psnr / count,
        "val_accuracy": right / labelled if labelled else None,
        "val_agreement": agreeing / count,
        "val_unreadable": int(unreadable),
    }
