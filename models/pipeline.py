"""Pipeline: Scaler -> upscaler -> Scaler -> classifier. Every row of the results table is one."""

from torch import Tensor, nn

from models.classifier import FrozenClassifier
from models.scaler import Scaler, reduced_length


class Pipeline(nn.Module):
    """Images -> (small, rebuilt, logits).

    Args:
        name: the row of the results table.
        classifier: the frozen classifier that reads the rebuilt images.
        upscaler: (N,3,h,w) -> (N,3,4h,4w); None leaves the enlarging to the second Scaler.
        scale: height and width of the small image over the original's, rounded down; None takes the images as they
            come: they are small already.
        rebuild: False feeds the classifier the small image itself.
        interpolation, antialias: of the Scalers.
        enlarge: interpolation of the second Scaler, where it is not the first's.
    """

    def __init__(
        self,
        name: str,
        classifier: FrozenClassifier,
        *,
        upscaler: nn.Module | None = None,
        scale: float | None = 0.32,
        rebuild: bool = True,
        interpolation: str = "bilinear",
        antialias: bool = False,
        enlarge: str | None = None,
    ):
        super().__init__()
        self.name = name
        self.classifier = classifier
        self.upscaler = upscaler
        self.scale = scale
        self.rebuild = rebuild
        self.interpolation = interpolation
        self.antialias = antialias
        self.enlarge = enlarge or interpolation

    def reduce(self, images: Tensor) -> Tensor:
        """(N,3,H,W) in [0,1] -> the small images, (N,3,floor(H scale),floor(W scale)) in [0,1]."""
        if self.scale is None:
            return images
        size = tuple(reduced_length(length, self.scale) for length in images.shape[-2:])
        return Scaler(size, self.interpolation, self.antialias)(images).clamp(0, 1)

    def restore(self, small: Tensor, size: tuple[int, int], clamp: bool = True) -> Tensor:
        """The small images brought to `size` (height, width), float32, in [0,1] unless `clamp` is False."""
        if not self.rebuild:
            return small
        upscaled = small if self.upscaler is None else self.upscaler(small)
        rebuilt = Scaler(size, self.enlarge, self.antialias)(upscaled)
        return rebuilt.clamp(0, 1) if clamp else rebuilt

    def forward(self, images: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(N,3,H,W) float in [0,1] -> small and rebuilt images (of `size`, or the input's), logits (N, classes)."""
        small = self.reduce(images)
        rebuilt = self.restore(small, size or tuple(images.shape[-2:]))
        return small, rebuilt, self.classifier(rebuilt)
