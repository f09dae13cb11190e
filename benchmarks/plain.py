"""The plain reference: the same mathematics as models/ and experiment/distillation.py, written as one would at first.

Eager, NCHW, concatenating dense blocks, BatchNorm as a layer, the classifier called on both images, Adam as it comes;
float32 on a CPU, float16 autocast with loss scaling on a GPU, as the published project trained. It takes the same
weights, so results can be compared number by number; benchmarks/throughput.py measures the project against it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainDenseBlock(nn.Module):
    """(N,features,h,w) -> the same shape."""

    def __init__(self, features: int, growth: int):
        super().__init__()
        self.conv1 = nn.Conv2d(features, growth, 3, padding=1)
        self.conv2 = nn.Conv2d(features + growth, growth, 3, padding=1)
        self.conv3 = nn.Conv2d(features + 2 * growth, growth, 3, padding=1)
        self.conv4 = nn.Conv2d(features + 3 * growth, growth, 3, padding=1)
        self.conv5 = nn.Conv2d(features + 4 * growth, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = F.leaky_relu(self.conv1(x), 0.2)
        x2 = F.leaky_relu(self.conv2(torch.cat((x, x1), 1)), 0.2)
        x3 = F.leaky_relu(self.conv3(torch.cat((x, x1, x2), 1)), 0.2)
        x4 = F.leaky_relu(self.conv4(torch.cat((x, x1, x2, x3), 1)), 0.2)
        return x + 0.2 * self.conv5(torch.cat((x, x1, x2, x3, x4), 1))


class PlainBlock(nn.Module):
    """(N,features,h,w) -> the same shape."""

    def __init__(self, features: int, growth: int):
        super().__init__()
        self.RDB1 = PlainDenseBlock(features, growth)
        self.RDB2 = PlainDenseBlock(features, growth)
        self.RDB3 = PlainDenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.RDB3(self.RDB2(self.RDB1(x)))


class PlainRRDBNet(nn.Module):
    """(N,3,h,w) -> (N,3,4h,4w); the keys of its state dict are RRDBNet's."""

    def __init__(self, features: int, blocks: int, growth: int):
        super().__init__()
        self.conv_first = nn.Conv2d(3, features, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*[PlainBlock(features, growth) for _ in range(blocks)])
        self.trunk_conv = nn.Conv2d(features, features, 3, padding=1)
        self.upconv1 = nn.Conv2d(features, features, 3, padding=1)
        self.upconv2 = nn.Conv2d(features, features, 3, padding=1)
        self.HRconv = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv_first(x)
        x = first + self.trunk_conv(self.RRDB_trunk(first))
        x = F.leaky_relu(self.upconv1(F.interpolate(x, scale_factor=2)), 0.2)
        x = F.leaky_relu(self.upconv2(F.interpolate(x, scale_factor=2)), 0.2)
        return self.conv_last(F.leaky_relu(self.HRconv(x), 0.2))


def wide(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x if x.dtype == torch.float64 else x.float()


def plain_scores(classifier: nn.Module, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Logits (N, classes) of images in [0,1]; `classifier` is torchvision's network."""
    return classifier((images - mean) / std)


def plain_rebuild(network: nn.Module, images: Tensor, scale: float = 0.32) -> Tensor:
    """Reduces (N,3,H,W) images, enlarges them with `network`, brings them back to size, and clamps."""
    height, width = images.shape[-2:]
    small = F.interpolate(images, (math.floor(height * scale), math.floor(width * scale)), mode="bilinear").clamp(0, 1)
    return F.interpolate(wide(network(small)), (height, width), mode="bilinear").clamp(0, 1)


def plain_loss(network: nn.Module, classifier: nn.Module, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean squared error of the logits on the rebuilt and on the original images."""
    with torch.no_grad():
        expected = plain_scores(classifier, images, mean, std)
    found = plain_scores(classifier, plain_rebuild(network, images), mean, std)
    return F.mse_loss(wide(found), wide(expected))
