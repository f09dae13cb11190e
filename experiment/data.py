"""Folders of images, how each becomes pixels of one size, and batches of them, read by torch's DataLoader."""

import atexit
import contextlib
import hashlib
import multiprocessing
import os
import random
import re
import signal
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiment.runtime import STOP_SIGNALS, Stopper, keep_freed_memory
from experiment.sampling import list_images
from models.errors import InputError, OneProcessError
from models.images import UnreadableImage, read_image, size_in_header
from models.scaler import size_of_shorter_side

LARGEST_SMALL, SMALLEST_LARGE = 1.5, 0.5  # crops: over the first an image is not small, under the second no original
LONGEST = 8  # sides; only the middle of a longer strip is used, or a 20000x1 image would be resized to gigabytes
NO_LABEL = -1
SAMPLED = 1000  # files whose contents a fingerprint sees
POLL = 0.2  # seconds: how often a process that waits for a batch looks for stop signals and dead workers
WORKERS_FAULT = re.compile(r"DataLoader worker \(pid|Too many open files|can't start new thread")


class Transform(NamedTuple):
    """Image -> uint8 (3,crop,crop): shorter side to `resize`, then a crop; centred and unflipped without `epoch`.

    Augmentation is drawn from (seed, epoch, index) alone, so it is the same for any number of workers.
    """

    resize: int
    crop: int
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    seed: int = 0
    epoch: int | None = None

    def __call__(self, image: Image.Image, index: int) -> Tensor:
        width, height = image.size
        if max(width, height) > LONGEST * min(width, height):
            width, height = min(width, LONGEST * height), min(height, LONGEST * width)
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        image = image.resize(size_of_shorter_side(*image.size, self.resize), Image.Resampling.BILINEAR)
        top, left = (image.height - self.crop) // 2, (image.width - self.crop) // 2
        across = down = 1  # -1 for a flip
        if self.epoch is not None:
            rng = random.Random(f"{self.seed}/{self.epoch}/{index}")
            top, left = rng.randint(0, image.height - self.crop), rng.randint(0, image.width - self.crop)
            across = -1 if rng.random() < self.horizontal_flip else 1
            down = -1 if rng.random() < self.vertical_flip else 1
        pixels = np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))[::down, ::across]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class Whole(NamedTuple):
    """Image -> uint8 (3,H,W), nothing cut: what is small already. Larger images and strips are unreadable."""

    limit: int  # pixels of the shorter side

    def __call__(self, image: Image.Image, index: int) -> Tensor:
        size = f"{image.width}x{image.height} pixels"
        if min(image.size) > self.limit or max(image.size) > 4 * self.limit:
            raise UnreadableImage(f"{size} are not small (up to {self.limit}); leave out --small")
        if max(image.size) > LONGEST * min(image.size):
            raise UnreadableImage(f"{size} are a strip, too long to rebuild")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def whole_small(crop: int) -> Whole:
    """What reads images that are small beside the classifier's crops of `crop` pixels, and refuses others."""
    return Whole(int(LARGEST_SMALL * crop))


def photograph(path: str | Path, resize: int, crop: int) -> Tensor:
    """An image of full size as uint8 (3,crop,crop), cropped as for the test; what looks small is unreadable."""
    image = read_image(path)
    if min(image.size) < SMALLEST_LARGE * crop:
        raise UnreadableImage(f"{image.width}x{image.height} pixels: it looks small already; add --small")
    return Transform(resize, crop)(image, 0)


class Batch(NamedTuple):
    images: Tensor  # (N,3,H,W) uint8, of one size: only those that could be read
    indices: Tensor  # (N) their places in the data set
    unreadable: list[tuple[int, str]]  # index and reason of the others


class ImageTree(Dataset):
    """The images below `root`. Folders directly in it are classes, if there are any."""

    def __init__(self, root: str, transform: Transform | Whole | None = None):
        self.root = root
        self.paths = list_images(root)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        """The index, and the image or the reason why it can't be read."""
        try:
            return index, self.transform(read_image(os.path.join(self.root, self.paths[index])), index)
        except UnreadableImage as error:
            return index, str(error)

    def fingerprint(self) -> str:
        """16 digits of a SHA-256 of every image's name and size, and of how 1000 of them (seeded) begin and end.

        A copy in another folder has the same. An image of the same size that takes another's place may pass; all don't.
        """
        digest = hashlib.sha256()
        sampled = set(random.Random(0).sample(range(len(self)), min(SAMPLED, len(self))))
        for i, path in enumerate(self.paths):
            full, size, ends = Path(self.root, path), -1, b""
            with contextlib.suppress(OSError):  # a link that leads nowhere, a file that may not be read
                size = full.stat().st_size
                if i in sampled and full.is_file():
                    with full.open("rb") as file:
                        ends = file.read(4096)
                        file.seek(max(0, size - 4096))
                        ends += file.read(4096)
            digest.update(os.fsencode(f"{path}\0{size}\0") + ends)
        return digest.hexdigest()[:16]

    def folder_of(self, index: int) -> str:
        """Name of the class folder, empty for an image directly in `root`."""
        return self.paths[index].partition(os.sep)[0] if os.sep in self.paths[index] else ""

    def targets(self, class_names: list[str], required: bool = False) -> list[int]:
        """The classifier's index of every image's class, by the name of its folder; NO_LABEL without class folders.

        Names are compared in NFC: some systems take letters and their accents apart. Raises InputError if a class is
        unknown, if images lie beside the folders, or if there are no folders although labels are `required`.
        """
        indices = {unicodedata.normalize("NFC", name): i for i, name in enumerate(class_names)}
        folders = [unicodedata.normalize("NFC", self.folder_of(i)) for i in range(len(self))]
        if not any(folders):
            if required:
                remedy = "try_darionet.py --small reads images without labels"
                raise InputError(f"{self.root}: no class folders to measure with; {remedy}")
            return [NO_LABEL] * len(self)
        unknown = sorted(set(folders) - set(indices))
        if "" in unknown:
            raise InputError(f"{self.root}: {self.paths[folders.index('')]} lies beside the class folders, not in one")
        if unknown:
            shown = ", ".join(unknown[:10]) + ", ..." * (len(unknown) > 10)
            known = f"it knows {len(class_names)}, such as {', '.join(class_names[:3])}: rename the folders"
            raise InputError(f"{self.root}: the classifier has no class named {shown}; {known}")
        return [indices[folder] for folder in folders]


def epoch_batches(
    count: int, batch_size: int, *, seed: int, epoch: int, shuffle: bool, limit: int | None
) -> list[list[int]]:
    """The batches of one epoch as indices; `limit` batches are a random subset.

    They are drawn from a hash of (seed, epoch), so that neighbouring seeds have nothing in common.
    """
    drawn = random.Random(f"{seed}/{epoch}").getrandbits(63)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(drawn)).tolist()
    if limit is not None:
        order = order[: limit * batch_size]
    if not shuffle:
        order.sort()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def batches(
    dataset: Dataset,
    batch_lists: list[list[int]],
    workers: int,
    pin_memory: bool = False,
    stopper: Stopper | None = None,
) -> Iterator[Batch]:
    """The batches with these indices, in their order, read by `workers` processes; by this one if there are none.

    A batch whose images differ in size comes as several, one per size. A stop signal ends the batches, also while
    workers are waited for; one of several processes goes on, since they agree on a stop at their next step.
    """
    workers, iterator = min(workers, len(batch_lists)), None
    end = partial(kill_processes, {*multiprocessing.active_children()})
    atexit.register(end)  # of a program that ends in an error and still holds this generator
    options = {"num_workers": workers, "collate_fn": pack, "generator": torch.Generator()}  # torch's own stays as it is
    options |= {"timeout": POLL, "worker_init_fn": start_worker} if workers else {}
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # more workers than processors
                iterator = iter(DataLoader(dataset, batch_sampler=batch_lists, **options))
        finally:
            if workers:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise in the middle of a step
        while not (stopper and stopper.requested and stopper.alone):
            try:
                parts = next(iterator, None)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                continue
            if parts is None:
                return
            for pixels, indices, unreadable in parts:
                images = torch.from_numpy(pixels)
                yield Batch(images.pin_memory() if pin_memory else images, torch.tensor(indices).long(), unreadable)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().rpartition("\n")[2].partition(". ")[0]
        if not workers or not (isinstance(error, OSError) or WORKERS_FAULT.search(str(error))):
            raise
        end()
        with contextlib.redirect_stderr(None):  # torch complains of an iterator that it could not start
            error.__traceback__ = None
        remedy = "lower data.workers, or raise the limit of memory, processes (ulimit -u) or open files (ulimit -n)"
        raise OneProcessError(f"{workers} processes that read images: {reason}: {remedy}") from None
    finally:
        end()
        atexit.unregister(end)
        del iterator  # or the exit would wait for it


def kill_processes(others: set) -> None:
    """Kills every process of multiprocessing but `others`: a worker ignores SIGTERM, and may hang in a read."""
    started = {*multiprocessing.active_children()} - others
    for process in started:
        process.kill()
    for process in started:
        process.join(1)


def pack(samples: list[tuple[int, Tensor | str]]) -> list[tuple[np.ndarray, list[int], list[tuple[int, str]]]]:
    """What a Batch per size of image holds; what can't be read comes with the first.

    Arrays go through a pipe, tensors would go through shared memory, of which a container has 64 MB.
    """
    sizes: dict[tuple, list] = {}
    unreadable = [(index, reason) for index, reason in samples if isinstance(reason, str)]
    for index, image in samples:
        if isinstance(image, Tensor):
            sizes.setdefault(tuple(image.shape), []).append((index, image.numpy()))
    if not sizes:
        return [(np.empty((0, 3, 0, 0), np.uint8), [], unreadable)]
    parts = [(np.stack([image for _, image in own]), [index for index, _ in own], []) for own in sizes.values()]
    parts[0][2].extend(unreadable)
    return parts


def start_worker(number: int) -> None:
    """Leaves stop signals to the main process, which still needs images for its last step."""
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()  # not inherited if workers are not forked


def small_batches(
    dataset: ImageTree, chosen: list[int], workers: int, batch_size: int, side: int, stopper: Stopper | None = None
) -> Iterator[Batch]:
    """The chosen images of a folder of small ones, those of one size together, whatever their order.

    A batch has at most as many small and as many rebuilt pixels as `batch_size` square images of `side` pixels.
    """
    by_size = defaultdict(list)
    for index in chosen:
        if stopper and stopper.requested:
            return
        by_size[size_in_header(os.path.join(dataset.root, dataset.paths[index])) or (side, side)].append(index)
    lists = []
    for (width, height), indices in by_size.items():
        shape = min(width, height) / max(width, height)
        many = max(1, int(batch_size * min(side**2 / (width * height), shape)))
        lists += [indices[i : i + many] for i in range(0, len(indices), many)]
    yield from batches(dataset, lists, workers, stopper=stopper)


def to_float(images: Tensor, device: torch.device | str) -> Tensor:
    """uint8 (N,3,H,W) -> float32 in [0,1] on `device`, in channels_last but on Macs' GPUs."""
    order = torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last
    images = images.to(device, non_blocking=True).contiguous(memory_format=order)
    return images.float().div_(255)
