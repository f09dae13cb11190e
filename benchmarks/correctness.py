"""Every fast path against the plain one: outputs and all gradients, in float32 or higher, with the bounds they keep.

    python -m benchmarks.correctness

benchmarks/throughput.py runs these checks before it measures, and tests/test_fast_paths.py runs them with the tests.
An error is the norm of the difference over the norm of what is expected. The bounds are about ten times what rounding
gives; a wrong index or a forgotten term gives 0.01 and more, whatever the seed.

Rounding differs between processors and numbers of threads. If it moves a value over the kink of a ReLU or a maximum, a
gradient changes by 0.001 to 0.1 and nothing is wrong. So gradients are compared in float64, where that takes a value
within 1e-16 of a kink, and in lower precision as the best of several seeds.
"""

import copy
import sys
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from benchmarks.plain import PlainRRDBNet, plain_loss
from experiment.distillation import Losses, distillation_loss
from experiment.runtime import compiled, cpu_has_bf16
from models.classifier import FrozenClassifier, head_of
from models.pipeline import Pipeline, Upscale
from models.rrdbnet import RRDBNet
from models.scaler import Reduction

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5}
STEP_BOUND = {torch.float64: 1e-11, torch.float32: 2e-4}  # of a whole step, where more roundings add up
SEEDS = (20, 21, 22)
LOWER_PRECISION = 1.5  # the fast path's error in bf16 over the plain path's, both against float32


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64; what is expected must not be zero or nothing would be checked."""
    found, expected = found.detach().double(), expected.detach().double()
    norm = expected.norm()
    assert norm > 0, "compared with zeros"
    return ((found - expected).norm() / norm).item()


def random_network(features: int, blocks: int, growth: int, seed: int = 0) -> RRDBNet:
    """An RRDBNet whose dense blocks and biases matter: the initialisation makes them a hundredth of the result."""
    torch.manual_seed(seed)
    network = RRDBNet(features, blocks, growth)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif ".RDB" in name:
                parameter.mul_(5)
            else:  # the untrained network shows nothing of its trunk
                nn.init.kaiming_normal_(parameter)
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


def random_classifier(architecture: str = "resnet50", classes: int = 1000, seed: int = 0) -> nn.Module:
    """A frozen torchvision classifier with random weights and BatchNorm statistics, none of them 0 or 1."""
    torch.manual_seed(seed)
    network = get_model(architecture, weights=None, num_classes=classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval().requires_grad_(False)


def frozen(network: nn.Module) -> FrozenClassifier:
    """The project's classifier around a torchvision network."""
    head = network.get_submodule(head_of(network))
    return FrozenClassifier(network, [f"class {i}" for i in range(len(head.weight))])


def pipeline_of(classifier: FrozenClassifier, network: RRDBNet) -> Pipeline:
    """The published reduction, and the network to restore."""
    return Pipeline("DarioNet", classifier, Reduction(), Upscale(network))


def loss_of(pipeline: Pipeline, images: Tensor, **weights: float) -> Losses:
    """The loss of training on a batch, with these weights of its terms."""
    return distillation_loss(images, pipeline.reduce(images), pipeline.restore, [pipeline.classifier], weights)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of one random weighting of all outputs."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return torch.autograd.grad((output * weights.to(output.device)).sum(), inputs)


def generator_errors(
    size: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", recompute: bool = False, seed: int = SEEDS[0]
) -> tuple[float, float]:
    """(output, worst gradient) of RRDBNet against the plain one: of the input and of every weight and bias."""
    network = random_network(*size, seed).to(device, dtype).to(memory_format=torch.channels_last)
    plain = plain_twin(network)
    network.recompute = recompute
    small = torch.rand(2, 3, 11, 9, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device)
    results = []
    for module in (network, plain):
        x = small.clone().requires_grad_()
        out = module(x)
        results.append([out, *gradients(out, [x, *module.parameters()])])
    of_output, *of_gradients = map(error, *results)
    return of_output, max(of_gradients)


def step_errors(
    pipeline: Pipeline, images: Tensor, dtype: torch.dtype = torch.float32, compiling: bool = False
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(loss, all gradients as one vector) of a training step against the plain one in float32; ours, the plain one's.

    `dtype` is autocast's for both steps; the plain one's own error is 0 in float32.
    """
    network, classifier = pipeline.restore.network, pipeline.classifier
    plain = plain_twin(network)
    plain_classifier = copy.deepcopy(classifier.network).to(memory_format=torch.contiguous_format)
    ours = partial(loss_of, logits=1.0)
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


def all_checks(device: str) -> list[tuple[str, float, float]]:
    """(what, error, bound) of every fast path on a device; in bf16 if it computes in it, else the plain path runs."""
    checks = []
    for dtype, size, of_seeds in ((torch.float64, (16, 2, 8), max), (torch.float32, (64, 1, 32), min)):
        for recompute in (False, True):
            name = f"generator {size} in {str(dtype).removeprefix('torch.')}{', recomputed' if recompute else ''}"
            found = [generator_errors(size, dtype, device, recompute, seed) for seed in SEEDS]
            checks.append((f"{name}: output", max(out for out, _ in found), BOUNDS[dtype]))
            what = f"{name}: gradients, {of_seeds.__name__} of {len(SEEDS)}"
            checks.append((what, of_seeds(g for _, g in found), BOUNDS[dtype]))
    pipeline = pipeline_of(frozen(random_classifier("resnet18", 20)), random_network(8, 1, 4)).to(device)
    drawn = [drawn_images(2, 48, seed).to(device, memory_format=torch.channels_last) for seed in SEEDS]
    double = copy.deepcopy(pipeline).to(dtype=torch.float64, memory_format=torch.channels_last)
    found = [step_errors(double, images.double())[0] for images in drawn]
    checks.append(("step in float64: loss and gradients", max(map(max, found)), STEP_BOUND[torch.float64]))
    steps = [("step in NCHW", torch.contiguous_format, False), ("step", torch.channels_last, False)]
    steps += [("compiled step", torch.channels_last, True)] if device == "cuda" else []
    for name, order, compiling in steps:
        pipeline.to(memory_format=order)
        found = [step_errors(pipeline, images, compiling=compiling)[0] for images in drawn]
        bound = STEP_BOUND[torch.float32]
        checks.append((f"{name} in float32: loss", max(loss for loss, _ in found), bound))
        checks.append((f"{name} in float32: gradients, min of {len(SEEDS)}", min(g for _, g in found), bound))
        if device == "cuda" or cpu_has_bf16():
            found = [step_errors(pipeline, images, torch.bfloat16, compiling=compiling) for images in drawn]
            ours, plain = min(((ours[1], plain[1]) for ours, plain in found), key=lambda pair: pair[0] / pair[1])
            checks.append((f"{name} in bf16: gradients, min of {len(SEEDS)}", ours, LOWER_PRECISION * plain))
    return checks


def main() -> int:
    return print_checks(all_checks("cuda" if torch.cuda.is_available() else "cpu"))


def print_checks(checks: list[tuple[str, float, float]]) -> int:
    """One line a check; 1 where one is over its bound, else 0."""
    for what, found, bound in checks:
        print(f"{what:70s} {found:9.2e}  (at most {bound:.1e}){'' if found <= bound else '  TOO LARGE'}")
    return int(any(not found <= bound for _, found, bound in checks))


if __name__ == "__main__":
    sys.exit(main())
