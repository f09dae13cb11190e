"""The loss, one training epoch, and the validation that follows it."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from experiment.data import NO_LABEL, Batch, batches_until_stopped, to_float
from experiment.runtime import Runtime, Stopper
from models.errors import InputError
from models.pipeline import Pipeline
from models.scaler import at_least_float32

BAD_STEPS_IN_A_ROW = 10  # non-finite losses that are skipped before the run gives up
UNREADABLE_SHARE = 0.001  # of the images, where there are more than UNREADABLE_FREE
UNREADABLE_FREE = 1000


@dataclass
class Losses:
    """Means over a batch, as 0-d tensors: the weighted `total` carries the gradient."""

    total: Tensor
    squared_error: Tensor  # of the pixels, for the PSNR
    student: Tensor | None  # logits (N, classes) on the rebuilt images, where the loss needed them
    teacher: Tensor | None  # the same on the originals


def distillation_loss(
    pipeline: Pipeline,
    images: Tensor,
    *,
    logits: float,
    pixels: float,
    features: float,
) -> Losses:
    """Loss of rebuilding `images`, (N,3,H,W) float in [0,1], for the pipeline's frozen classifier.

    logits x MSE of the scores (before the softmax) on the rebuilt and on the original images, the distillation proper;
    features x MSE of the inputs of the classifier's last layer; pixels x mean absolute error of the rebuilt image
    before clamping, which is how PSNR generators are trained (Wang et al. 2018, section 3.4).
    """
    rebuilt = pipeline.restore(pipeline.reduce(images), tuple(images.shape[-2:]), clamp=False)
    total = pixels * F.l1_loss(rebuilt, images) if pixels else rebuilt.new_zeros(())
    shown = rebuilt.clamp(0, 1)
    student_logits = teacher_logits = None
    if features:
        with torch.no_grad():
            teacher_logits, teacher_features = pipeline.classifier.logits_and_features(images)
        student_logits, student_features = pipeline.classifier.logits_and_features(shown)
        total = total + features * F.mse_loss(at_least_float32(student_features), at_least_float32(teacher_features))
    elif logits:
        with torch.no_grad():
            teacher_logits = pipeline.classifier(images)
        student_logits = pipeline.classifier(shown)
    if logits:
        total = total + logits * F.mse_loss(at_least_float32(student_logits), at_least_float32(teacher_logits))
    return Losses(total, F.mse_loss(shown.detach(), images), student_logits, teacher_logits)


def learning_rate_at(step: int, total: int, base: float, schedule: str, warmup: int) -> float:
    """Learning rate of a step: linear over `warmup` steps, then constant, or half a cosine down to 0."""
    rate = base * min(1.0, (step + 1) / (warmup + 1))
    return rate if schedule == "constant" else rate * 0.5 * (1 + math.cos(math.pi * step / total))


@dataclass
class Progress:
    """How far an epoch is: what a checkpoint needs to go on within it."""

    batch: int = 0  # the next one
    images: int = 0
    loss: float = 0.0  # sum over images
    squared_error: float = 0.0  # likewise
    seconds: float = 0.0
    skipped: int = 0  # steps not taken, their loss was not finite
    bad_in_a_row: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)  # index -> reason, of the whole run

    def new_epoch(self) -> "Progress":
        return Progress(bad_in_a_row=self.bad_in_a_row, unreadable=self.unreadable)

    def summary(self) -> tuple[float, float]:
        """(mean loss, PSNR in dB) over the images so far; infinite loss where there were none."""
        n = max(1, self.images)
        return self.loss / n if self.images else math.inf, psnr_db(self.squared_error / n)


def psnr_db(squared_error: float) -> float:
    """Peak signal-to-noise ratio of pixels in [0,1], in dB; identical images count as 100."""
    return -10 * math.log10(max(squared_error, 1e-10))


def train_epoch(
    pipeline: Pipeline,
    loss: Callable[[Pipeline, Tensor], Losses],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loader: Iterable[Batch],
    runtime: Runtime,
    progress: Progress,
    *,
    learning_rate: Callable[[int], float],  # of a batch of this epoch, by its number
    gradient_clip_norm: float | None,
    check_unreadable: Callable[[dict[int, str]], None],  # raises where there are too many
    after_step: Callable[[], None],
    stopper: Stopper,
    bar: tqdm,
) -> None:
    """Trains on what is left of an epoch, counting in `progress`; returns early where a signal asked to stop.

    A step whose loss or gradient is not finite is not taken. Under torchrun the loader has this process's part of every
    batch; the step is that of one process with all of them.

    Raises:
        InputError: ten such steps in a row, or too many unreadable images.
    """
    network = pipeline.upscaler
    network.train()
    started = time.perf_counter()
    for batch in batches_until_stopped(loader, stopper):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress.batch)
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)  # loss and squared error, over images
        if len(batch.images):
            images = to_float(batch.images, runtime.device)
            with runtime.autocast():
                losses = loss(pipeline, images)
            scaler.scale(losses.total).backward()
            sums += torch.stack([losses.total.detach(), losses.squared_error]) * len(batch.images)
        mine = (len(batch.images), stopper.requested, len(batch.unreadable))
        count, stops, unreadable = runtime.sum_numbers(*mine)
        if stops:
            stopper.stop_with_others()
        if unreadable:
            for found in runtime.gather(batch.unreadable):
                progress.unreadable.update(found)
            check_unreadable(progress.unreadable)
        if count:
            average_gradients(network, len(batch.images), count, runtime)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(network.parameters(), gradient_clip_norm or math.inf)
            # The one time in a step that the host waits for the device.
            value, squared_error, norm = torch.cat([runtime.sum(sums), norm.double().view(1)]).tolist()
            if math.isfinite(value) and math.isfinite(norm):
                scaler.step(optimizer)
                scaler.update()
                progress.images += int(count)
                progress.loss += value
                progress.squared_error += squared_error
                progress.bad_in_a_row = 0
            else:
                # Gradients that overflow because they are scaled are no fault yet: the scaler halves its scale.
                settling = scaler.is_enabled() and math.isfinite(value) and scaler.get_scale() >= 1
                if scaler.is_enabled():
                    scaler.update()
                progress.skipped += 1
                progress.bad_in_a_row += not settling
                if progress.bad_in_a_row >= BAD_STEPS_IN_A_ROW:
                    raise InputError(
                        f"the loss was not finite {BAD_STEPS_IN_A_ROW} times in a row: lower training.learning_rate, "
                        "or set training.precision to float32; the last checkpoint stands"
                    )
        progress.batch += 1
        now = time.perf_counter()
        progress.seconds += now - started
        started = now
        mean, psnr = progress.summary()
        bar.set_postfix_str(f"loss {mean:.4f}, {psnr:.2f} dB, {progress.images / progress.seconds:.1f} images/s", False)
        bar.update()
        after_step()
        if stops or (runtime.processes == 1 and stopper.requested):  # several agree on it at the next step
            return


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
    pipeline: Pipeline,
    loss: Callable[[Pipeline, Tensor], Losses],
    loader: Iterable[Batch],
    targets: list[int],
    runtime: Runtime,
    stopper: Stopper,
    bar: tqdm,
) -> dict[str, float | int | None] | None:
    """Mean loss, PSNR in dB, accuracy and agreement (same class as on the original); None where a signal asked to stop.

    Accuracy is None without labels. Under torchrun the loader has this process's part; the scores are those of all.
    """
    pipeline.upscaler.eval()
    count = right = labelled = agreeing = unreadable = 0
    total = squared_error = 0.0
    for batch in batches_until_stopped(loader, stopper):
        unreadable += len(batch.unreadable)
        n = len(batch.images)
        if n:
            images = to_float(batch.images, runtime.device)
            target = torch.tensor([targets[i] for i in batch.indices.tolist()])
            with runtime.autocast():
                losses = loss(pipeline, images)
                student = pipeline(images)[2] if losses.student is None else losses.student
                teacher = pipeline.classifier(images) if losses.teacher is None else losses.teacher
            predicted, expected = student.argmax(1).cpu(), teacher.argmax(1).cpu()
            count += n
            total += losses.total.item() * n
            squared_error += losses.squared_error.item() * n
            right += (predicted == target).sum().item()
            labelled += (target != NO_LABEL).sum().item()
            agreeing += (predicted == expected).sum().item()
        bar.update()
        if stopper.requested:
            break
    sums = (count, total, squared_error, right, labelled, agreeing, unreadable, stopper.requested)
    count, total, squared_error, right, labelled, agreeing, unreadable, stops = runtime.sum_numbers(*sums)
    if stops:
        stopper.stop_with_others()
        return None
    if not count:
        raise InputError("none of the validation images could be read; check data.val")
    return {
        "val_loss": total / count,
        "val_psnr_db": psnr_db(squared_error / count),
        "val_accuracy": right / labelled if labelled else None,
        "val_agreement": agreeing / count,
        "val_unreadable": int(unreadable),
    }


def unreadable_check(folders: list[str]) -> Callable[[dict[int, str]], None]:
    """A check of the unreadable images found so far; `folders` holds the class folder of every training image.

    It raises InputError over 0.1 % of more than 1000 images, or where a class folder has no readable image left.
    """
    sizes: dict[str, int] = {}
    for folder in folders:
        sizes[folder] = sizes.get(folder, 0) + 1
    allowed = max(1, math.floor(UNREADABLE_SHARE * len(folders))) if len(folders) > UNREADABLE_FREE else len(folders)

    def check(unreadable: dict[int, str]) -> None:
        if len(unreadable) > allowed:
            raise InputError(
                f"{len(unreadable)} of {len(folders)} training images can't be read, over 0.1 %: "
                "unreadable.csv in the run folder lists them; mend or remove them"
            )
        left = dict(sizes)
        for index in unreadable:
            left[folders[index]] -= 1
            if not left[folders[index]]:
                raise InputError(
                    f"no image of {folders[index] or 'the training folder'} can be read: "
                    "unreadable.csv in the run folder lists them; mend or remove them"
                )

    return check
