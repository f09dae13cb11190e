"""Scaler: the one resize of the project. Reduction: how images are made small, as one value."""

import io
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

INTERPOLATIONS = {"bilinear": "bilinear", "bicubic": "bicubic", "nearest": "nearest-exact"}  # by torch's names


class Scaler(nn.Module):
    """Resizes a batch of images.

    Args:
        size: an int is the length of the shorter side in pixels (the other side keeps the aspect ratio), a pair is
            (height, width) exactly.
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
        """(N,3,H,W) float in [0,1] -> (N,3,h,w) float32. Bicubic can overshoot the range a little; Pipeline clamps.

        Float32 whatever autocast says: half precision moves the sampling points, and has no antialiased CPU kernel.
        Float64 stays what it is.
        """
        images = at_least_float32(images)
        size = tuple(self.sides) if len(self.sides) == 2 else size_of_shorter_side(*images.shape[-2:], *self.sides)
        if size == images.shape[-2:]:
            return images
        options = {"mode": INTERPOLATIONS[self.interpolation]}
        if self.interpolation != "nearest":
            options |= {"align_corners": False, "antialias": self.antialias}
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
    """Length in pixels of a side after reducing by `scale`: floor(256 x 0.32) = 81, at least 1.

    The small addend keeps products such as 100 x 0.29 = 28.999... on the integer that they mean.
    """
    return max(1, math.floor(length * scale + 1e-6))


@dataclass(frozen=True)
class Reduction:
    """Makes images small: (N,3,H,W) in [0,1] -> (N,3,floor(H scale),floor(W scale)) in [0,1], by one Scaler.

    `interpolation` and `antialias` are the Scaler's.
    """

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
class Jpeg:
    """A reduction whose small images were stored as JPEG files of `quality` (1 to 95), 4:2:0 chroma as in cameras."""

    reduction: Callable[[Tensor], Tensor]
    quality: int

    def __call__(self, images: Tensor) -> Tensor:
        stored = []
        for image in self.reduction(images).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=self.quality)
            stored.append(torch.from_numpy(np.array(Image.open(file, formats=["JPEG"]))))
        return torch.stack(stored).permute(0, 3, 1, 2).to(images.device).float().div(255)

    def __str__(self) -> str:
        return f"{self.reduction}, JPEG {self.quality}"


@dataclass(frozen=True)
class RandomReduction:
    """A reduction drawn anew for every image, for a network that has to read small images of any origin.

    Args:
        plain: how the batches are reduced that are not drawn.
        share: of the batches that are drawn.
        scale: lowest and highest; drawn once a batch, so that its small images have one size.
        interpolation, antialias: the choices.
        jpeg_probability, jpeg_quality: how many images are stored as JPEG files, and between which qualities.
    """

    plain: Reduction
    share: float
    scale: Sequence[float]
    interpolation: Sequence[str]
    antialias: Sequence[bool]
    jpeg_probability: float
    jpeg_quality: Sequence[int]

    def __str__(self) -> str:
        kinds = f"{'/'.join(self.interpolation)}{', some antialiased' if any(self.antialias) else ''}"
        lowest, highest = self.scale
        stored = f", {self.jpeg_probability:.0%} JPEG" if self.jpeg_probability else ""
        drawn = f"x{lowest:.3g} to {highest:.3g} {kinds}{stored}"
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
            stored = rng.random() < self.jpeg_probability
            reductions.append(Jpeg(one, rng.randint(*self.jpeg_quality)) if stored else one)

        def reduce(images: Tensor) -> Tensor:
            return torch.cat([one(images[i : i + 1]) for i, one in enumerate(reductions)])

        return reduce
