"""Scaler: the one resize of the project. Reduction: how images are made small, as one value."""

import io
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from models.images import to_image, to_tensor

INTERPOLATIONS = {"bilinear": "bilinear", "bicubic": "bicubic", "nearest": "nearest-exact"}  # by torch's names


class Scaler(nn.Module):
    """Resizes a batch of images.

    Args:
        size: an int is the length of the shorter side in pixels, and the aspect ratio stays; a pair is (height, width).
        interpolation: "bilinear", "bicubic" or "nearest".
        antialias: low-pass filter before reducing. False is what the published figures used.

    Raises:
        ValueError: a size under 1 pixel, or an unknown interpolation.
    """

    def __init__(self, size: int | tuple[int, int], interpolation: str = "bilinear", antialias: bool = False):
        super().__init__()
        sides = [size] if isinstance(size, int) else list(size)
        if len(sides) > 2 or min(sides) < 1:
            raise ValueError(f"size must be one or two lengths of at least 1 pixel, found {size}")
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, found {interpolation!r}")
        self.sides = sides
        self.interpolation = interpolation
        self.antialias = antialias

    def forward(self, images: Tensor) -> Tensor:
        """(N,3,H,W) float in [0,1] -> (N,3,h,w), which bicubic lets overshoot a little; Pipeline clamps.

        It is float32 (float64 stays), whatever autocast says: half precision moves the sampling points.
        """
        images = at_least_float32(images)
        size = tuple(self.sides) if len(self.sides) == 2 else size_of_shorter_side(*images.shape[-2:], *self.sides)
        if size == images.shape[-2:]:
            return images
        antialias = self.antialias and self.interpolation != "nearest"
        options = {"mode": INTERPOLATIONS[self.interpolation], "antialias": antialias}
        with torch.autocast(images.device.type, enabled=False):
            try:
                return F.interpolate(images, size, **options)
            except NotImplementedError:  # what MPS lacks
                return F.interpolate(images.cpu(), size, **options).to(images.device)


def size_of_shorter_side(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) after a resize of the shorter side to `side`; the other is rounded down, as torchvision does."""
    shorter, longer = min(height, width), int(side * max(height, width) / min(height, width))
    return (side, longer) if height == shorter else (longer, side)


def at_least_float32(values: Tensor) -> Tensor:
    """What autocast gave in half precision as float32; float64 stays what it is."""
    return values if values.dtype == torch.float64 else values.float()


def reduced_length(length: int, scale: float) -> int:
    """Length in pixels of a side after reducing by `scale`: floor(256 x 0.32) = 81, at least 1."""
    return max(1, math.floor(length * scale + 1e-6))  # 100 x 0.29 = 28.999... means 29


@dataclass(frozen=True)
class Reduction:
    """Makes images small, by a Scaler: (N,3,H,W) in [0,1] -> (N,3,floor(H scale),floor(W scale)) in [0,1]."""

    scale: float = 0.32
    interpolation: str = "bilinear"
    antialias: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        size = tuple(reduced_length(length, self.scale) for length in images.shape[-2:])
        return Scaler(size, self.interpolation, self.antialias)(images).clamp(0, 1)

    def __str__(self) -> str:
        return f"x{self.scale:.3g} {self.interpolation}{', antialiased' if self.antialias else ''}"

    def note(self) -> dict:
        """Its three values, as results.json and the notes beside weights hold them."""
        return asdict(self)


@dataclass(frozen=True)
class Stored:
    """A reduction whose small images were stored in a lossy `format`, "JPEG" or "WEBP", of `quality` (1 to 95).

    Both files hold colours at half the resolution (4:2:0), as those of cameras and of the web do.
    """

    reduction: Callable[[Tensor], Tensor]
    format: str
    quality: int

    def __call__(self, images: Tensor) -> Tensor:
        stored = []
        for image in self.reduction(images).cpu():
            file = io.BytesIO()
            to_image(image).save(file, self.format, quality=self.quality)
            stored.append(to_tensor(Image.open(file, formats=[self.format])))
        return torch.cat(stored).to(images.device)

    def __str__(self) -> str:
        return f"{self.reduction}, {self.format} {self.quality}"


@dataclass(frozen=True)
class RandomReduction:
    """A reduction drawn anew for every image, for a network that has to read small images of any origin."""

    plain: Reduction  # of the batches that are not drawn
    share: float  # of the batches that are
    scale: Sequence[float]  # lowest and highest; drawn once a batch, so that its small images have one size
    interpolation: Sequence[str]  # the choices
    antialias: Sequence[bool]
    jpeg_probability: float  # how many images are stored as JPEG files
    jpeg_quality: Sequence[int]  # lowest and highest
    webp_probability: float = 0.0
    webp_quality: Sequence[int] = (40, 90)

    def __str__(self) -> str:
        kinds = f"{'/'.join(self.interpolation)}{', some antialiased' if any(self.antialias) else ''}"
        shares = {"JPEG": self.jpeg_probability, "WebP": self.webp_probability}
        stored = "".join(f", {share:.0%} {name}" for name, share in shares.items() if share)
        drawn = f"x{self.scale[0]:.3g} to {self.scale[1]:.3g} {kinds}{stored}"
        return drawn if self.share == 1 else f"{self.share:.0%} of the batches {drawn}; the others {self.plain}"

    def drawn(self, key: str, indices: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """The reduction of a batch of images with these `indices`, the same for the same `key`."""
        of_batch = random.Random(key)
        scale = of_batch.uniform(*self.scale)
        if of_batch.random() >= self.share:
            return self.plain
        reductions = []
        for index in indices:
            rng = random.Random(f"{key}/{index}")
            one = Reduction(scale, rng.choice(self.interpolation), rng.choice(self.antialias))
            if (chance := rng.random()) < self.jpeg_probability:
                one = Stored(one, "JPEG", rng.randint(*self.jpeg_quality))
            elif chance < self.jpeg_probability + self.webp_probability:
                one = Stored(one, "WEBP", rng.randint(*self.webp_quality))
            reductions.append(one)
        return lambda images: torch.cat([one(images[i : i + 1]) for i, one in enumerate(reductions)])
