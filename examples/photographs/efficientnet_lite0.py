"""EfficientNet-Lite0 (ImageNet, 1000 classes), under the key names of its published weights.

    python test.py --set classifier.architecture=examples/photographs/efficientnet_lite0.py:network \
        --set classifier.weights=assets/models/tf_efficientnet_lite0.pth

The weights are those that Google trained (tensorflow/tpu, EfficientNet-Lite, Apache-2.0), as timm converted them under
the name tf_efficientnet_lite0. The network is EfficientNet-B0 (Tan and Le 2019, https://arxiv.org/abs/1905.11946,
table 1) without squeeze-and-excitation, with ReLU6 in place of Swish, and padded as TensorFlow pads.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

MEAN = STD = (0.5, 0.5, 0.5)
# Expansion, kernel size, stride, channels and number of the blocks of each stage.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
EPSILON = 1e-3  # of BatchNorm, as in TensorFlow


class SameConv2d(nn.Conv2d):
    """Pads so that the output has ceil(side / stride) pixels, the odd one on the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for side, kernel, stride in zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


class Block(nn.Sequential):
    """Expansion (if any), depthwise convolution, projection; added to its input if the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int):
        middle = inputs * expansion
        layers = {"conv_dw": conv(middle, middle, kernel, stride, groups=middle), "conv_pw": conv(middle, outputs)}
        if expansion > 1:
            layers = {"conv_pw": conv(inputs, middle), "conv_dw": layers["conv_dw"], "conv_pwl": layers["conv_pw"]}
        named = {}
        for i, (name, layer) in enumerate(layers.items(), 1):
            named |= {name: layer, f"bn{i}": nn.BatchNorm2d(layer.out_channels, eps=EPSILON), f"relu{i}": nn.ReLU6()}
        named.popitem()  # none after the projection
        super().__init__(OrderedDict(named))
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x) if self.residual else super().forward(x)


class EfficientNetLite(nn.Module):
    """(N,3,H,W), normalised with mean 0.5 and std 0.5 -> logits (N,1000). Any size; made for 224."""

    def __init__(self):
        super().__init__()
        self.conv_stem = conv(3, 32, 3, 2)
        self.bn1 = nn.BatchNorm2d(32, eps=EPSILON)
        stages, inputs = [], 32
        for expansion, kernel, stride, outputs, count in STAGES:
            blocks = [Block(inputs, outputs, expansion, kernel, stride)]
            blocks += [Block(outputs, outputs, expansion, kernel, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.conv_head = conv(inputs, 1280)
        self.bn2 = nn.BatchNorm2d(1280, eps=EPSILON)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn1(self.conv_stem(x))))
        return self.classifier(F.relu6(self.bn2(self.conv_head(x))).mean((2, 3)))


def network() -> nn.Module:
    """The network without its weights: classifier.weights names their file."""
    return EfficientNetLite()
