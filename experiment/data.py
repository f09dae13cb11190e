"""Reading images as a viewer would show them, transforms, folders of classes, and loaders."""

import hashlib
import os
import random
import signal
import stat
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from experiment.sampling import ENDINGS, open_images
from models.errors import InputError

FORMATS = tuple(dict.fromkeys(ENDINGS.values()))  # the decoders that are offered a file, whatever its name
LONGEST = 8  # sides; of a longer strip only the middle is used, or a 20000x1 image would be resized to gigabytes
NO_LABEL = -1


class UnreadableImage(Exception):
    """The file is no image that can be decoded; the message says why."""


def read_image(path: str | os.PathLike) -> Image.Image:
    """The file's first frame as 8-bit RGB, turned as its EXIF orientation says, transparency on white, 16 bits scaled.

    Raises:
        UnreadableImage: not a plain file, not an image of a known format, truncated, or too large to be honest.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableImage("not a plain file")  # opening a FIFO would wait for ever
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it mends: odd EXIF, odd palettes
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                return to_rgb(turn_upright(image))
    except UnreadableImage:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        reason = f"{type(error).__name__}: {error}"
    name = os.fspath(path)  # whoever lists the reasons names the file
    raise UnreadableImage(reason.replace(f" {name!r}", "").replace(name, "").replace("\n", " ")[:200])


def turn_upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a viewer shows an image with damaged EXIF data as it lies
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels have no fixed white")
    if image.mode.startswith("I"):  # 16 bits a pixel: scaled and rounded, where Pillow's own conversion clips
        pixels = np.asarray(image)
        pixels = pixels.clip(0, 65535) if pixels.dtype.itemsize > 2 else pixels
        return Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


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
            image = F.center_crop(image, [min(height, LONGEST * width), min(width, LONGEST * height)])
        image = F.resize(image, [self.resize])
        top, left = (image.height - self.crop) // 2, (image.width - self.crop) // 2
        flips = (False, False)
        if self.epoch is not None:
            rng = random.Random(f"{self.seed}/{self.epoch}/{index}")
            top, left = rng.randint(0, image.height - self.crop), rng.randint(0, image.width - self.crop)
            flips = rng.random() < self.horizontal_flip, rng.random() < self.vertical_flip
        pixels = np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))
        if flips[0]:
            pixels = pixels[:, ::-1]
        if flips[1]:
            pixels = pixels[::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class Batch(NamedTuple):
    images: Tensor  # (N,3,crop,crop) uint8: only those that could be read
    indices: Tensor  # (N) their places in the data set
    unreadable: list[tuple[int, str]]  # index and reason of the others


class ImageFolder(Dataset):
    """The images below `root`. Folders directly in it are classes, where there are any.

    Raises:
        InputError: no such folder, or no images.
    """

    def __init__(self, root: str, transform: Transform | None = None):
        self.root = root
        self.paths = open_images(root)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            image = read_image(os.path.join(self.root, self.paths[index]))
        except UnreadableImage as error:
            return index, str(error)
        return index, self.transform(image, index)

    def fingerprint(self) -> str:
        """The first 16 digits of a SHA-256 of the names of its images."""
        return hashlib.sha256(os.fsencode("\0".join(self.paths))).hexdigest()[:16]

    def folder_of(self, index: int) -> str:
        """Name of the class folder, empty for an image that lies in `root` itself."""
        return self.paths[index].partition(os.sep)[0] if os.sep in self.paths[index] else ""

    def targets(self, class_names: list[str], required: bool = False) -> list[int]:
        """The classifier's index of every image's class, by the name of its folder; NO_LABEL without class folders.

        Raises:
            InputError: class folders that the classifier does not know, images beside them, or no class folders where
                labels are `required`.
        """
        indices = {name: i for i, name in enumerate(class_names)}
        folders = [self.folder_of(i) for i in range(len(self))]
        if not any(folders):
            if required:
                raise InputError(
                    f"{self.root}: holds no class folders, and without labels there is no accuracy to measure"
                )
            return [NO_LABEL] * len(self)
        unknown = sorted(set(folders) - set(indices))
        if "" in unknown:
            raise InputError(f"{self.root}: {self.paths[folders.index('')]} lies beside the class folders, not in one")
        if unknown:
            shown = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            raise InputError(
                f"{self.root}: the classifier has no class named {shown}; it knows {len(class_names)}, "
                f"such as {', '.join(class_names[:3])}: rename the folders to its names"
            )
        return [indices[folder] for folder in folders]


def epoch_batches(
    count: int, batch_size: int, *, seed: int, epoch: int, shuffle: bool, limit: int | None
) -> list[list[int]]:
    """The batches of one epoch as indices, drawn from (seed, epoch); `limit` batches are a random subset."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    if limit is not None:
        order = order[: limit * batch_size]
    if not shuffle:
        order.sort()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def make_loader(dataset: Dataset, batches: list[list[int]], workers: int, pin_memory: bool) -> DataLoader:
    """A loader of these batches, in this order, whatever the number of workers."""
    # More workers than cores is the user's own choice: disks make them wait.
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_main,
    )


def collate(samples: list[tuple[int, Tensor | str]]) -> Batch:
    read = [(index, image) for index, image in samples if isinstance(image, Tensor)]
    unreadable = [(index, reason) for index, reason in samples if isinstance(reason, str)]
    images = torch.stack([image for _, image in read]) if read else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return Batch(images, torch.tensor([index for index, _ in read], dtype=torch.long), unreadable)


def leave_signals_to_main(worker: int) -> None:
    """Ctrl-C and SIGTERM may reach workers too; the main process still needs their images for its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (N,3,H,W) -> float32 in [0,1] on `device`, in channels_last."""
    images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return images.float().div_(255)
