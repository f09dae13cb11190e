"""RRDBNet, the generator of ESRGAN (Wang et al. 2018, https://arxiv.org/abs/1809.00219), for a factor of 4.

The module names are those of the ESRGAN repository, so its weight files load strictly.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.fast import DenseBlock

RESIDUAL_SCALE = 0.2  # section 3.1 of the paper: residuals are scaled down so that a deep generator stays stable
NEGATIVE_SLOPE = 0.2  # of every LeakyReLU, as in the published weights
INITIAL_SCALE = 0.1  # supplementary material of the paper: dense blocks start from a tenth of Kaiming's initialisation
UNSEEN = 1e-7  # initial scale of what is added to the enlargement: too small to show, but gradients pass


class ResidualDenseBlock(nn.Module):
    """Five convolutions, each reading the block's input and the outputs of all before it."""

    def __init__(self, features: int, growth: int):
        super().__init__()
        for i in range(5):
            out_channels = growth if i < 4 else features
            conv = nn.Conv2d(features + i * growth, out_channels, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight)
            conv.weight.data.mul_(INITIAL_SCALE)
            nn.init.zeros_(conv.bias)
            self.add_module(f"conv{i + 1}", conv)

    def forward(self, x: Tensor) -> Tensor:
        """(N,features,h,w) -> the same shape: what `plain` gives, with less memory and fewer copies."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
            return self.plain(x)  # the residual is float32 and the convolutions are not
        convs = (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5)
        parameters = [conv.weight for conv in convs] + [conv.bias for conv in convs]
        return DenseBlock.apply(x, NEGATIVE_SLOPE, RESIDUAL_SCALE, *parameters)

    def plain(self, x: Tensor) -> Tensor:
        """The definition."""
        seen = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen.append(F.leaky_relu(conv(torch.cat(seen, 1)), NEGATIVE_SLOPE))
        return x + RESIDUAL_SCALE * self.conv5(torch.cat(seen, 1))


class ResidualInResidualDenseBlock(nn.Module):
    """Three dense blocks inside one more residual connection: (N,features,h,w) -> the same shape."""

    def __init__(self, features: int, growth: int):
        super().__init__()
        self.RDB1 = ResidualDenseBlock(features, growth)
        self.RDB2 = ResidualDenseBlock(features, growth)
        self.RDB3 = ResidualDenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.RDB3(self.RDB2(self.RDB1(x))), alpha=RESIDUAL_SCALE)


class RRDBNet(nn.Module):
    """The x4 generator: (N,3,h,w) -> (N,3,4h,4w), images in [0,1]; the output is not clamped.

    Args:
        features: channels of the trunk.
        blocks: number of residual-in-residual dense blocks.
        growth: channels that each convolution of a dense block adds.

    The published networks are 64, 23, 32: 16 697 987 parameters. Random weights start as an enlargement, bilinear twice
    x2, if there are at least three features to carry the colours.
    """

    def __init__(self, features: int = 64, blocks: int = 23, growth: int = 32):
        super().__init__()
        self.recompute = False  # True keeps half as much for the backward pass, for a third more work
        self.conv_first = nn.Conv2d(3, features, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*(ResidualInResidualDenseBlock(features, growth) for _ in range(blocks)))
        self.trunk_conv = nn.Conv2d(features, features, 3, padding=1)
        self.upconv1 = nn.Conv2d(features, features, 3, padding=1)
        self.upconv2 = nn.Conv2d(features, features, 3, padding=1)
        self.HRconv = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)
        if features >= 3:
            self.start_as_enlargement()

    @torch.no_grad()
    def start_as_enlargement(self) -> None:
        """Has the first three features carry red, green and blue past the trunk to the output."""
        for conv in (self.trunk_conv, self.conv_last):
            conv.weight[:3] *= UNSEEN
            conv.bias[:3] = 0
        tap = F.pad(torch.ones(1, 1), (1, 1, 1, 1))
        tent = torch.tensor([[1.0, 2.0, 1.0]]) / 4
        twice = tent.T * tent  # after nearest x2 it makes bilinear x2
        kernels = {self.conv_first: tap, self.upconv1: twice, self.upconv2: twice, self.HRconv: tap}
        for conv, kernel in kernels.items():
            conv.weight[:3] = conv.bias[:3] = 0
            conv.weight[range(3), range(3)] = kernel
        self.conv_last.weight[range(3), range(3)] = tap

    @torch.no_grad()
    def add_blocks(self, blocks: int) -> None:
        """Spreads new blocks between its own, up to `blocks` in all; until they learn they pass on what they are given.

        The last convolution of a new block takes away the input of its dense block, so that no residual is left.
        """
        own = list(self.RRDB_trunk)
        features, growth = len(self.conv_first.weight), len(own[0].RDB1.conv1.weight)
        trunk = [ResidualInResidualDenseBlock(features, growth) for _ in range(blocks)]
        for block in trunk:
            block.RDB3.conv5.weight.zero_()
            block.RDB3.conv5.weight[range(features), range(features), 1, 1] = -1 / RESIDUAL_SCALE
        for i, block in enumerate(own):
            trunk[i * blocks // len(own)] = block
        self.RRDB_trunk = nn.Sequential(*trunk)

    def forward(self, small: Tensor) -> Tensor:
        """(N,3,h,w) float in [0,1] -> (N,3,4h,4w); computed in the memory order of the weights."""
        nhwc = self.conv_first.weight.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if nhwc else torch.contiguous_format
        first = x = self.conv_first(small.contiguous(memory_format=order))
        for block in self.RRDB_trunk:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if self.recompute else block(x)
        x = first + self.trunk_conv(x)
        for conv in (self.upconv1, self.upconv2):
            x = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
            x = F.leaky_relu(x, NEGATIVE_SLOPE, inplace=True)
        return self.conv_last(F.leaky_relu(self.HRconv(x), NEGATIVE_SLOPE, inplace=True))
