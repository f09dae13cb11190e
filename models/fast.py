"""The dense block in an order that reads and writes less memory; rrdbnet.py defines it, the tests compare the two.

Its concatenations are not kept for the backward pass, nor split and summed in it. On a CPU oneDNN adds bias, residual
and activation while it still holds a convolution's output.
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PLAIN = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation and groups of a 3x3 convolution that keeps the size


@functools.cache
def has_fused(device: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN's convolution with bias, sum and activation in one supports this device and precision."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn  # private: a later torch may not have them
    if not hasattr(ops, "_convolution_pointwise") or not hasattr(ops, "_is_mkldnn_bf16_supported"):
        return False
    return dtype == torch.float32 or ops._is_mkldnn_bf16_supported()


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, *, slope: float | None = None, added: Tensor | None = None
) -> Tensor:
    """3x3 convolution, (N,in,h,w) -> (N,out,h,w); then LeakyReLU of `slope`, or plus `added`. Not differentiable."""
    if not torch.compiler.is_compiling() and has_fused(x.device.type, x.dtype):
        stride, padding, dilation, groups = PLAIN
        op = torch.ops.mkldnn._convolution_pointwise
        if added is not None:
            return op.binary(x, added, weight, bias, padding, stride, dilation, groups, "add", 1.0, None, [], None)
        return op(x, weight, bias, padding, stride, dilation, groups, "leaky_relu", [slope], "")
    out = F.conv2d(x, weight, bias, *PLAIN)
    return F.leaky_relu(out, slope, inplace=True) if added is None else out.add_(added)


class DenseBlock(torch.autograd.Function):
    """x + scale * conv5(cat(x, s1..s4)), where s_i = LeakyReLU(conv_i(cat(x, s1..s_(i-1)))): five 3x3 convolutions.

    Kept for the backward pass are x and s1..s4, not their concatenations: a quarter of what autograd keeps. The
    gradient is a dense block too, read from the other end: that of s_j is one convolution of all gradients behind it,
    with the weights regrouped by what they read, so nothing is split and summed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, slope: float, scale: float, *parameters: Tensor) -> Tensor:
        """x: (N,features,h,w); parameters: the weights of the five convolutions, then their biases."""
        dtype = parameters[0].dtype
        parameters = [scale * p if i % 5 == 4 else p for i, p in enumerate(parameters)]
        parameters = [p.to(x.dtype) for p in parameters]
        weights, biases = parameters[:5], parameters[5:]
        sources, seen = [x], x
        for weight, bias in zip(weights[:4], biases[:4], strict=True):
            sources.append(convolve(seen, weight, bias, slope=slope))
            seen = torch.cat((seen, sources[-1]), 1)
        ctx.slope, ctx.scale, ctx.dtype = slope, scale, dtype
        ctx.save_for_backward(*sources, *weights)
        return convolve(seen, weights[4], biases[4], added=x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        saved = ctx.saved_tensors  # once: a checkpoint computes them at this moment
        sources, weights = saved[:5], saved[5:]
        behind = gradient  # of the outputs of all convolutions after s_j, before their activations, the nearest first
        of_weights = [[] for _ in weights]  # parts of each convolution's gradient, the last source first
        for j in reversed(range(5)):
            start = sum(source.shape[1] for source in sources[:j])
            columns = slice(start, start + sources[j].shape[1])
            regrouped = torch.cat([weight[:, columns] for weight in weights[j:]])
            of_source, of_regrouped, of_biases = torch.ops.aten.convolution_backward(
                behind, sources[j], regrouped, [len(regrouped)], *PLAIN[:3], False, [0, 0], 1, [True, True, j == 0]
            )
            for parts, part in zip(of_weights[j:], of_regrouped.split([len(w) for w in weights[j:]]), strict=True):
                parts.append(part)
            if j:
                of_output = torch.ops.aten.leaky_relu_backward(of_source, sources[j], ctx.slope, True)
                behind = torch.cat((of_output, behind), 1)
        of_weights = [torch.cat(parts[::-1], 1) for parts in of_weights]
        of_parameters = [g.to(ctx.dtype) for g in (*of_weights, *of_biases.split([len(w) for w in weights]))]
        of_parameters = [ctx.scale * g if i % 5 == 4 else g for i, g in enumerate(of_parameters)]
        return gradient + of_source, None, None, *of_parameters
