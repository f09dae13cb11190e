"""The terms of the loss, one training step, and the validation."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from experiment.data import NO_LABEL, Batch, ImageTree, to_float
from experiment.metrics import require_finite
from experiment.runtime import Runtime, Stopper
from models.classifier import FrozenClassifier, Look
from models.errors import InputError
from models.pipeline import Size

UNREADABLE_SHARE = 0.001  # of the images, where there are more than UNREADABLE_FREE
UNREADABLE_FREE = 1000

Restore = Callable[[Tensor, Size], Tensor]


class once:
    """functools.cached_property without its lock, which torch.compile can't follow."""

    def __init__(self, function: Callable):
        self.function = function

    def __get__(self, views: "Views", owner: type):
        name = self.function.__name__
        if name not in views.known:
            views.known[name] = self.function(views)
        return views.known[name]


class Views:
    """What the terms of the loss compare, each computed when it is first asked for.

    Args:
        images: (N,3,H,W) float in [0,1], the originals.
        small: (N,3,h,w) float in [0,1], what was made of them.
        restore: see Pipeline.
        teachers: the frozen classifiers.
        clamp_gradient: True stops the gradient where the rebuilt image leaves [0,1], as a clamp does; False lets it
            pass, so that such pixels are called back.
    """

    def __init__(
        self,
        images: Tensor,
        small: Tensor,
        restore: Restore,
        teachers: Sequence[FrozenClassifier],
        clamp_gradient: bool = True,
    ):
        self.images, self.small = images, small
        self.restore, self.teachers, self.clamp_gradient = restore, teachers, clamp_gradient
        self.known: dict[str, object] = {}

    @once
    def unclamped(self) -> Tensor:
        """The rebuilt images as the network gives them, (N,3,H,W)."""
        return self.restore(self.small, tuple(self.images.shape[-2:]))

    @once
    def rebuilt(self) -> Tensor:
        """What a classifier is shown: clamped to [0,1]."""
        clamped = self.unclamped.clamp(0, 1)
        return clamped if self.clamp_gradient else self.unclamped + (clamped - self.unclamped).detach()

    @once
    def on_original(self) -> list[Look]:
        """What every teacher sees in the originals."""
        with torch.no_grad():
            return [teacher.look(self.images) for teacher in self.teachers]

    @once
    def on_rebuilt(self) -> list[Look]:
        """What every teacher sees in the rebuilt images."""
        return [teacher.look(self.rebuilt) for teacher in self.teachers]

    def mean_over_teachers(self, distance: Callable[[Look, Look], Tensor]) -> Tensor:
        pairs = zip(self.on_rebuilt, self.on_original, strict=True)
        return torch.stack([distance(rebuilt, original) for rebuilt, original in pairs]).mean()


def logits(views: Views) -> Tensor:
    """MSE of the scores before the softmax: the distillation proper."""
    return views.mean_over_teachers(lambda rebuilt, original: F.mse_loss(rebuilt.logits, original.logits))


def pixels(views: Views) -> Tensor:
    """Mean absolute error of the pixels before clamping: how PSNR generators are trained (ESRGAN, section 3.4)."""
    return F.l1_loss(views.unclamped, views.images)


def features(views: Views) -> Tensor:
    """MSE of the inputs of the teacher's last layer."""
    return views.mean_over_teachers(lambda rebuilt, original: F.mse_loss(rebuilt.features, original.features))


def maps(views: Views) -> Tensor:
    """MSE of the maps of several layers, each over the variance of the original's map: 1 is no better than its mean.

    So a weight means the same for every classifier.
    """

    def distance(rebuilt: Look, original: Look) -> Tensor:
        pairs = zip(rebuilt.maps, original.maps, strict=True)
        return torch.stack([F.mse_loss(found, wanted) / (wanted.var() + 1e-8) for found, wanted in pairs]).mean()

    return views.mean_over_teachers(distance)


# A new term is a function here and a weight in training.loss.
TERMS: dict[str, Callable[[Views], Tensor]] = {"logits": logits, "pixels": pixels, "features": features, "maps": maps}


@dataclass
class Losses:
    """Of a batch: the mean weighted `total` carries the gradient."""

    total: Tensor  # ()
    terms: dict[str, Tensor]  # () each, not weighted
    psnr_db: Tensor  # (N)
    rebuilt: Tensor | None = None  # logits (N, classes) of the first teacher on the rebuilt images, where asked for
    original: Tensor | None = None  # the same on the originals


def distillation_loss(
    images: Tensor,
    small: Tensor,
    restore: Restore,
    teachers: Sequence[FrozenClassifier],
    weights: Mapping[str, float],
    *,
    clamp_gradient: bool = True,
    with_logits: bool = False,
) -> Losses:
    """The weighted sum of TERMS, as one graph for torch.compile; terms of weight 0 cost nothing.

    `with_logits` asks for the logits of the first teacher too, whatever the terms need.
    """
    views = Views(images, small, restore, teachers, clamp_gradient)
    terms = {name: TERMS[name](views) for name, weight in weights.items() if weight}
    total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    losses = Losses(total, terms, psnr_db(views.rebuilt.detach(), images))
    if with_logits:
        losses.rebuilt, losses.original = views.on_rebuilt[0].logits, views.on_original[0].logits
    return losses


def psnr_db(found: Tensor, expected: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (N,3,H,W) in [0,1] -> (N) in dB; identical images count as 100."""
    return -10 * (found - expected).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def learning_rate_at(step: int, total: int, base: float, schedule: str, warmup: int) -> float:
    """Learning rate of a step: constant, or half a cosine down to 0, times a linear rise over `warmup` steps."""
    rate = base * min(1.0, (step + 1) / (warmup + 1))
    return rate if schedule == "constant" else rate * 0.5 * (1 + math.cos(math.pi * step / total))


def ema_update(averages: list[Tensor], values: list[Tensor], count: Tensor, decay: float) -> None:
    """Moves averaged weights towards the trained ones, in place.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that the first weights are soon forgotten.
    """
    torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + int(count)) / (10 + int(count))))


@dataclass
class Step:
    """What a step did, summed over all processes."""

    images: int  # 0 where none of the batch could be read
    loss: float  # sum over images
    psnr_db: float  # likewise
    taken: bool
    bad: bool  # not taken, and not only because the scale of fp16's gradients is still settling
    unreadable: dict[int, str]  # index -> reason
    stops: bool  # a process was asked to stop


def step(
    batch: Batch,
    loss: Callable[[Tensor, Tensor], Losses],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    runtime: Runtime,
    *,
    learning_rate: float,
    clip_norm: float | None,
    stop: bool = False,
) -> Step:
    """One step on a batch; `loss` takes images, (N,3,H,W) in [0,1], and their indices in the data set.

    It is not taken where loss or gradient are not finite.

    Under torchrun the batch is this process's part; the step is that of one process with all of them, and `stop`, that
    this process was asked to, becomes `stops` of all.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(2, dtype=runtime.widest, device=runtime.device)  # loss and PSNR, over images
    if len(batch.images):
        images = to_float(batch.images, runtime.device)
        with runtime.autocast():
            losses = loss(images, batch.indices)
        scaler.scale(losses.total).backward()
        sums += torch.stack([losses.total.detach() * len(images), losses.psnr_db.sum()])
    count, stops, unreadable = runtime.sum_numbers(len(batch.images), stop, len(batch.unreadable))
    found = {}
    if unreadable:
        for part in runtime.gather(batch.unreadable):
            found.update(part)
    if not count:
        return Step(0, 0.0, 0.0, taken=False, bad=False, unreadable=found, stops=bool(stops))
    average_gradients(network, len(batch.images), count, runtime)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(network.parameters(), clip_norm or math.inf)
    # The one time in a step that the host waits for the device.
    total, psnr, norm = torch.cat([runtime.sum(sums), norm.to(sums).view(1)]).tolist()
    taken = math.isfinite(total) and math.isfinite(norm)
    # Gradients that overflow because they are scaled are no fault yet: the scaler halves its scale.
    settling = scaler.is_enabled() and math.isfinite(total) and scaler.get_scale() >= 1
    if taken:
        scaler.step(optimizer)
    if taken or scaler.is_enabled():
        scaler.update()
    return Step(int(count), total, psnr, taken, bad=not taken and not settling, unreadable=found, stops=bool(stops))


def average_gradients(network: nn.Module, own: int, count: float, runtime: Runtime) -> None:
    """Turns gradients of means over each process's `own` images into that of the mean over all `count` images."""
    if runtime.processes == 1:
        return
    parameters = list(network.parameters())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = runtime.sum(torch.cat([gradient.flatten() for gradient in gradients]) * (own / count))
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(gradient.view_as(parameter))  # in the parameter's layout


@torch.no_grad()
def validate(
    loss: Callable[[Tensor, Tensor], Losses],
    arriving: Iterable[Batch],
    targets: list[int],
    runtime: Runtime,
    stopper: Stopper,
    bar: tqdm,
) -> dict[str, float | int | None] | None:
    """Mean loss, PSNR in dB, accuracy and agreement (same class as on the original); None where a signal asked to stop.

    `loss` is as for `step`, and gives the logits too (`with_logits`). Accuracy is None without labels. Under torchrun
    this process's part arrives; the scores are those of all.

    Raises:
        InputError: none of the images could be read, or scores that are not finite.
    """
    count = right = labelled = agreeing = unreadable = 0
    total = psnr = 0.0
    for batch in arriving:
        unreadable += len(batch.unreadable)
        n = len(batch.images)
        if n:
            target = torch.tensor([targets[i] for i in batch.indices.tolist()])
            with runtime.autocast():
                losses = loss(to_float(batch.images, runtime.device), batch.indices)
            require_finite(losses.original, "the original images")
            predicted, expected = losses.rebuilt.argmax(1).cpu(), losses.original.argmax(1).cpu()
            count += n
            total += losses.total.item() * n
            psnr += losses.psnr_db.sum().item()
            finite = losses.rebuilt.isfinite().all(1).cpu()  # of a network that diverged nothing is right
            right += ((predicted == target) & finite).sum().item()
            labelled += (target != NO_LABEL).sum().item()
            agreeing += ((predicted == expected) & finite).sum().item()
        bar.update()
        if stopper.requested:
            break
    sums = (count, total, psnr, right, labelled, agreeing, unreadable, stopper.requested)
    count, total, psnr, right, labelled, agreeing, unreadable, stops = runtime.sum_numbers(*sums)
    if stops:
        stopper.stop_with_others()
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


def refuse_unreadable(unreadable: dict[int, str], images: ImageTree, class_sizes: Counter) -> None:
    """Raises InputError for too many unreadable training images: over 0.1 % of more than 1000, or all of a class.

    `class_sizes` counts the images of every class folder.
    """
    count = len(images)
    allowed = max(1, math.floor(UNREADABLE_SHARE * count)) if count > UNREADABLE_FREE else count
    remedy = "unreadable.csv in the run folder lists them; mend or remove them, and start a new run"
    if len(unreadable) > allowed:
        raise InputError(f"{len(unreadable)} of {count} training images can't be read, over 0.1 %: {remedy}")
    for folder, lost in Counter(map(images.folder_of, unreadable)).items():
        if lost == class_sizes[folder]:
            raise InputError(f"no image of {folder or 'the training folder'} can be read: {remedy}")
