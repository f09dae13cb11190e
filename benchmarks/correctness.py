"""Every fast path against the plain one: outputs and all gradients, in float32 or higher, with the bounds they keep.

    python -m benchmarks.correctness

benchmarks/throughput.py runs these checks before it measures, and tests/test_fast_paths.py runs them with the tests.
An error is the norm of the difference over the norm of what is expected. The bounds are about ten times what rounding
gives; a wrong index or a forgotten term gives 0.01 and more.
"""

import copy
import sys
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import get_model

from benchmarks.plain import PlainRRDBNet, plain_loss
from experiment.distillation import distillation_loss
from experiment.runtime import compiled
from models.classifier import FrozenClassifier, head_of
from models.fast import fold
from models.pipeline import Pipeline
from models.rrdbnet import RRDBNet

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5}
STEP_BOUND = 2e-4  # of a whole step in float32: ReLUs and the clamp switch where a rounding error moves a value over 0
LOWER_PRECISION = 1.5  # the fast path's error in bf16 over the plain path's, both against float32
RESIDUAL_GAIN = 0.3  # of random residuals: large enough that every layer matters


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64; what is expected must not be zero or nothing would be checked."""
    found, expected = found.detach().double(), expected.detach().double()
    norm = expected.norm()
    assert norm > 0, "compared with zeros"
    return ((found - expected).norm() / norm).item()


def random_network(features: int, blocks: int, growth: int) -> RRDBNet:
    """An RRDBNet whose dense blocks and biases matter: the initialisation makes them a hundredth of the result."""
    torch.manual_seed(0)
    network = RRDBNet(features, blocks, growth)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif ".RDB" in name:
                parameter.mul_(5)
    return network


def plain_twin(network: RRDBNet) -> PlainRRDBNet:
    """The plain network with the same weights, in NCHW."""
    first = network.RRDB_trunk[0].RDB1.conv1
    twin = PlainRRDBNet(first.in_channels, len(network.RRDB_trunk), first.out_channels)
    twin.to(device=first.weight.device, dtype=first.weight.dtype)
    twin.load_state_dict(network.state_dict())
    return twin


def drawn_images(count: int, side: int, seed: int = 0) -> Tensor:
    """(count,3,side,side) float32 in [0,1]: blotches and noise.

    Nothing is clamped: in a flat patch all outputs of a convolution tie, and max pooling passes its gradient anywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    blotches = nn.functional.interpolate(torch.rand(count, 3, 5, 5, generator=generator), (side, side), mode="bilinear")
    return 0.2 + 0.5 * blotches + 0.1 * torch.rand(count, 3, side, side, generator=generator)


def random_classifier(architecture: str = "resnet50", classes: int = 1000) -> nn.Module:
    """A frozen torchvision classifier with random weights and BatchNorm statistics, none of them 0 or 1."""
    torch.manual_seed(0)
    network = get_model(architecture, weights=None, num_classes=classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval().requires_grad_(False)


def frozen(network: nn.Module, architecture: str, folder) -> FrozenClassifier:
    """The project's classifier with the weights of a torchvision network; `folder` takes its file."""
    from models.classifier import save_classifier

    path = folder / "classifier.pt"
    names = [f"class {i}" for i in range(head_of(network)[1].weight.shape[0])]
    save_classifier(network.state_dict(), names, path)
    return FrozenClassifier(architecture, str(path))


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of one random weighting of all outputs."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return torch.autograd.grad((output * weights.to(output.device)).sum(), inputs)


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(error(a, b) for a, b in zip(found, expected, strict=True))


def generator_errors(
    size: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", recompute: bool = False
) -> tuple[float, float]:
    """(output, worst gradient) of RRDBNet against the plain one: of the input and of every weight and bias."""
    network = random_network(*size).to(device, dtype).to(memory_format=torch.channels_last)
    plain = plain_twin(network)
    network.recompute = recompute
    small = torch.rand(2, 3, 11, 9, generator=torch.Generator().manual_seed(2), dtype=dtype).to(device)
    results = []
    for module in (network, plain):
        x = small.clone().requires_grad_()
        out = module(x)
        results.append((out, gradients(out, [x, *module.parameters()])))
    return error(results[0][0], results[1][0]), worst(results[0][1], results[1][1])


def classifier_errors(architecture: str, dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """(logits, gradient of the image) of the folded classifier against torchvision's."""
    network = random_classifier(architecture, 20).to(device, dtype)
    folded = fold(network, dtype, device, head_of(network)[0])
    assert folded is not None, f"torch.fx can't follow {architecture}"
    images = drawn_images(2, 64, 2).to(device, dtype)
    results = []
    for module in (folded, network):
        x = images.clone().requires_grad_()
        out = module(x)
        results.append((out, gradients(out, [x])))
    return error(results[0][0], results[1][0]), worst(results[0][1], results[1][1])


def step_errors(
    pipeline: Pipeline, images: Tensor, dtype: torch.dtype = torch.float32, compiling: bool = False
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(loss, all gradients as one vector) of a training step against the plain one in float32; ours, the plain one's.

    `dtype` is autocast's for both steps; the plain one's own error is 0 in float32.
    """
    network, classifier = pipeline.upscaler, pipeline.classifier
    plain = plain_twin(network)
    plain_classifier = copy.deepcopy(classifier.network).to(memory_format=torch.contiguous_format)
    ours = partial(distillation_loss, logits=1.0, pixels=0.0, features=0.0)
    ours = compiled(ours) if compiling else ours
    device = images.device.type

    def of(loss, module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            value = loss()
        return value, torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))])

    def plain_one() -> Tensor:
        return plain_loss(plain, plain_classifier, images.contiguous(), classifier.mean, classifier.std)

    expected = of(plain_one, plain, torch.float32)
    found = of(lambda: ours(pipeline, images).total, network, dtype)
    same = of(plain_one, plain, dtype)
    return tuple(map(error, found, expected)), tuple(map(error, same, expected))


def all_checks(device: str, folder) -> list[tuple[str, float, float]]:
    """(what, error, bound) of every fast path on a device."""
    checks = []
    for dtype, size in ((torch.float64, (16, 2, 8)), (torch.float32, (64, 1, 32))):
        for recompute in (False, True):
            name = f"generator {size} in {str(dtype).removeprefix('torch.')}{', recomputed' if recompute else ''}"
            out, gradient = generator_errors(size, dtype, device, recompute)
            checks += [(f"{name}: output", out, BOUNDS[dtype]), (f"{name}: gradients", gradient, BOUNDS[dtype])]
    for dtype in (torch.float64, torch.float32):
        out, gradient = classifier_errors("resnet50", dtype, device)
        name = f"folded resnet50 in {str(dtype).removeprefix('torch.')}"
        checks += [(f"{name}: logits", out, BOUNDS[dtype]), (f"{name}: gradient", gradient, BOUNDS[dtype])]
    classifier = frozen(random_classifier("resnet18", 20), "resnet18", folder).to(device)
    network = random_network(16, 2, 8).to(device)
    pipeline = Pipeline("DarioNet", classifier, upscaler=network)
    images = drawn_images(3, 64, 3).to(device).contiguous(memory_format=torch.channels_last)
    for compiling in (False, True) if device == "cuda" else (False,):
        name = "compiled step" if compiling else "step"
        (loss, gradient), _ = step_errors(pipeline, images, compiling=compiling)
        checks += [(f"{name} in float32: loss", loss, STEP_BOUND), (f"{name}: gradients", gradient, STEP_BOUND)]
        ours, plain = step_errors(pipeline, images, torch.bfloat16, compiling=compiling)
        checks.append((f"{name} in bf16: gradients", ours[1], LOWER_PRECISION * plain[1]))
    return checks


class Operators(TorchDispatchMode):
    """Notes the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def main() -> int:
    import tempfile
    from pathlib import Path

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        checks = all_checks(device, Path(folder))
    return print_checks(checks)


def print_checks(checks: list[tuple[str, float, float]]) -> int:
    """One line a check; 1 where one is over its bound, else 0."""
    for what, found, bound in checks:
        print(f"{what:55s} {found:9.2e}  (at most {bound:.1e}){'' if found <= bound else '  TOO LARGE'}")
    return int(any(not found <= bound for _, found, bound in checks))


if __name__ == "__main__":
    sys.exit(main())
