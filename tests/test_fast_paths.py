"""What is fast against what is plain (benchmarks/correctness.py has the checks), and PyTorch's known bugs."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.correctness import (
    BOUNDS,
    STEP_BOUND,
    all_checks,
    drawn_images,
    error,
    frozen,
    loss_of,
    pipeline_of,
    random_classifier,
    random_network,
)
from benchmarks.throughput import saved_bytes
from experiment.runtime import compiled
from models.fast import convolve, has_fused
from models.pipeline import Pipeline

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a bug of kernels for GPUs")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    classifier = frozen(random_classifier("resnet18", 20))
    return pipeline_of(classifier, random_network(8, 1, 4)).to(memory_format=torch.channels_last)


@pytest.fixture
def images() -> torch.Tensor:
    return drawn_images(2, 48, 3).contiguous(memory_format=torch.channels_last)


def test_generator_and_step_against_the_plain_ones():
    for what, found, bound in all_checks("cpu"):
        assert found < bound, what


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_convolution_with_what_follows_it(dtype):
    x, weight, bias, added = (torch.randn(shape).to(dtype) for shape in ((2, 5, 7, 6), (4, 5, 3, 3), 4, (2, 4, 7, 6)))
    expected = F.conv2d(*(tensor.double() for tensor in (x, weight, bias)), padding=1)
    bound = BOUNDS.get(dtype, 0.01)
    assert error(convolve(x, weight, bias, slope=0.2), F.leaky_relu(expected, 0.2)) < bound
    assert error(convolve(x, weight, bias, added=added), expected + added.double()) < bound
    if has_fused("cpu", dtype):
        with torch.autograd.profiler.profile(use_kineto=False) as seen:
            convolve(x, weight, bias, slope=0.2)
            convolve(x, weight, bias, added=added)
        assert [event.name for event in seen.function_events].count("mkldnn::_convolution_pointwise") == 2


def test_a_float32_residual_under_autocast_takes_the_definition():
    block = random_network(8, 1, 4).RRDB_trunk[0].RDB1
    x = torch.rand(1, 8, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).equal(block.plain(x)) and block(x).dtype == torch.float32


def test_second_derivatives_are_refused_not_wrong():
    block = random_network(8, 1, 4).RRDB_trunk[0].RDB1
    x = torch.rand(1, 8, 5, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_recompute_gives_the_same_gradients_from_less_memory():
    network = random_network(16, 3, 8)
    small = torch.rand(1, 3, 16, 16)
    gradients, kept = [], []
    for network.recompute in (False, True):
        network.zero_grad()
        kept.append(saved_bytes(lambda: network(small).square().mean().backward()))
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < 0.75 * kept[0]


def test_a_dense_block_keeps_what_it_produces_and_no_concatenation():
    features, growth, pixels = 16, 8, 24 * 24
    block = random_network(features, 1, growth).RRDB_trunk[0].RDB1
    x = torch.rand(1, features, 24, 24, requires_grad=True)
    kept = saved_bytes(lambda: block(x).sum().backward())
    plain = saved_bytes(lambda: block.plain(x).sum().backward())
    last = 4 * block.conv5.weight.numel()  # kept as it was used: scaled
    assert kept == 4 * pixels * (features + 4 * growth) + last
    assert plain > 2.5 * kept


def test_compiled_step_is_the_eager_one(pipeline, images):
    """The graph that torch.compile gets, run without its code generator: what it captures has to be complete."""
    pipeline.classifier.check(48, "side")  # finds the layers of the maps
    loss = partial(loss_of, logits=1, pixels=1, features=1, maps=1)
    parameters = list(pipeline.restore.network.parameters())
    expected = torch.autograd.grad(loss(pipeline, images).total, parameters)
    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(whole(pipeline, images).total, parameters)
    found, expected = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, expected))
    assert error(found, expected) < STEP_BOUND[torch.float32]


# Known bugs of PyTorch, of kernels for GPUs: `compiled` turns off what they come from.


def against_compiled(function, inputs, parameters, dtype) -> float:
    """The largest error of a loss's gradients under torch.compile, of those without it."""
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        expected = torch.autograd.grad(function(*inputs).float().square().mean(), parameters)
        found = torch.autograd.grad(compiled(function)(*inputs).float().square().mean(), parameters)
    return max(error(a, b) for a, b in zip(found, expected, strict=True))


@needs_gpu
def test_bias_gradients_of_convolutions_in_bf16():
    """pytorch 190796: wrong beside a sum over the same gradient, in torch.compile's code for bf16."""
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(64, 64, 3, padding=1).cuda(), nn.Linear(32, 64).cuda()
    inputs = torch.randn(16, 64, 32, 32, device="cuda"), torch.randn(16, 32, device="cuda")

    def both(x, time):
        return conv(x) + linear(F.silu(time))[:, :, None, None]

    assert against_compiled(both, inputs, [*conv.parameters(), *linear.parameters()], torch.bfloat16) < 0.02


@needs_gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_gradients_beside_concatenations(dtype, bound):
    """pytorch 193061: mix-order reductions fused with a concatenation; both definitions of the dense block."""
    block = random_network(64, 1, 32).RRDB_trunk[0].RDB1.cuda().to(memory_format=torch.channels_last)
    x = torch.rand(4, 64, 81, 81, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    for function in (block.forward, block.plain):
        assert against_compiled(function, [x], list(block.parameters()), dtype) < bound


@needs_gpu
def test_compiled_channels_last_is_eager_channels_last(pipeline, images):
    network, x = copy.deepcopy(pipeline.restore.network).cuda(), images.cuda()
    assert error(compiled(network)(x), network(x)) < 1e-3
