"""Pipeline: reduce -> restore -> classifier. Every row of the results table is one."""

from collections.abc import Callable

from torch import Tensor, nn

from models.classifier import FrozenClassifier
from models.scaler import Scaler

Size = tuple[int, int]  # height and width, pixels


def unchanged(images: Tensor, size: Size | None = None) -> Tensor:
    """The images as they come: a `reduce` for what is small already, a `restore` for what is read as it is."""
    return images


class Upscale(nn.Module):
    """A `restore` by a network or any function, (N,3,h,w) -> (N,3,H,W) of any factor, and a Scaler to size."""

    def __init__(self, network: Callable[[Tensor], Tensor], interpolation: str = "bilinear", antialias: bool = False):
        super().__init__()
        self.network = network
        self.interpolation = interpolation
        self.antialias = antialias

    def forward(self, small: Tensor, size: Size) -> Tensor:
        """(N,3,h,w) in [0,1] -> (N,3,*size), float32, not clamped."""
        return Scaler(size, self.interpolation, self.antialias)(self.network(small))


class Enlarge(Upscale):
    """A `restore` by interpolation alone."""

    def __init__(self, interpolation: str):
        super().__init__(unchanged, interpolation)


class Pipeline(nn.Module):
    """Images -> (small, rebuilt, logits); `name` is the row of the results table.

    `reduce` makes images small, `restore` makes (small images, size) images of that size, which `classifier` reads.
    """

    def __init__(
        self,
        name: str,
        classifier: FrozenClassifier,
        reduce: Callable[[Tensor], Tensor],
        restore: Callable[[Tensor, Size], Tensor],
    ):
        super().__init__()
        self.name = name
        self.classifier = classifier
        self.reduce = reduce
        self.restore = restore

    def forward(self, images: Tensor, size: Size | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(N,3,H,W) float in [0,1] -> small and rebuilt images (of `size`, or the input's), logits (N, classes)."""
        small = self.reduce(images)
        rebuilt = self.restore(small, size or tuple(images.shape[-2:])).clamp(0, 1)
        return small, rebuilt, self.classifier(rebuilt)
