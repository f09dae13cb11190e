"""The same mathematics as the readable definitions, in an order that reads and writes less memory.

rrdbnet.py and classifier.py define the networks; tests/test_fast_paths.py holds what is here against them.
Three things are saved: a dense block's concatenations are not kept for the backward pass, nor split and summed in it, a
frozen network has its BatchNorm folded and its weights cast once, and on a CPU oneDNN adds bias, residual and
activation while it still holds a convolution's output.
"""

import copy
import functools
import operator
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

PLAIN = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation and groups of a 3x3 convolution that keeps the size
ADDITIONS = (operator.add, operator.iadd, torch.add)
RELUS = (F.relu, torch.relu)


@functools.cache
def has_fused(device: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN's convolution with bias, sum and activation in one is there for this device and precision."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    names = ("_convolution_pointwise", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple = PLAIN,
    slope: float | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """activation(conv2d(x) + added): LeakyReLU of `slope` (0 is ReLU) where that is given. Not differentiable."""
    stride, padding, dilation, groups = geometry
    if not torch.compiler.is_compiling() and has_fused(x.device.type, x.dtype):
        activation, values = ("none", []) if slope is None else ("leaky_relu", [slope]) if slope else ("relu", [])
        op = torch.ops.mkldnn._convolution_pointwise
        if added is None:
            return op(x, weight, bias, padding, stride, dilation, groups, activation, values, "")
        if not slope:
            name = None if slope is None else activation
            return op.binary(x, added, weight, bias, padding, stride, dilation, groups, "add", 1.0, name, [], None)
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if added is not None:
        out = out.add_(added)
    return out if slope is None else F.leaky_relu(out, slope, inplace=True)


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


class FrozenConvolution(torch.autograd.Function):
    """ReLU(conv2d(x) + added) with weights that never change: only the gradients of x and `added` are computed."""

    @staticmethod
    def forward(ctx, x, added, weight, bias, geometry, relu):
        out = convolve(x, weight, bias, geometry, 0.0 if relu else None, added)
        ctx.geometry, ctx.relu = geometry, relu
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, out = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        if ctx.relu:
            gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
            )[0]
        return of_x, gradient if ctx.needs_input_grad[1] else None, None, None, None, None


class FusedConvolution(nn.Module):
    """A frozen convolution with the addition and the ReLU that follow it."""

    def __init__(self, conv: nn.Conv2d, relu: bool):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.relu = relu

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        dtype = self.weight.dtype
        added = None if added is None else added.to(dtype)
        return FrozenConvolution.apply(x.to(dtype), added, self.weight, self.bias, self.geometry, self.relu)


class Recorder:
    """A hook that notes, under `name`, what a layer gives, or what it is given where it is registered before it."""

    def __init__(self, seen: dict[str, Tensor], name: str):
        self.seen, self.name = seen, name

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor | None = None) -> None:
        self.seen[self.name] = inputs[0] if output is None else output


class Tracer(fx.Tracer):
    """Takes convolutions and linear layers of the user's own for what they are, without a look inside."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (nn.Conv2d, nn.Linear)) or super().is_leaf_module(module, name)


def fold(
    network: nn.Module,
    dtype: torch.dtype,
    device: str,
    head: str,
    maps: Sequence[str] = (),
    seen: dict[str, Tensor] | None = None,
) -> nn.Module | None:
    """A copy of a frozen network that gives the same scores sooner; None where torch.fx can't follow its code.

    BatchNorm is folded into the convolution before it, exactly; convolutions and linear layers have their weights in
    `dtype`; on a CPU that can, convolution, addition and ReLU are one. The layer named `head` is left as it is; its
    input and the outputs of the layers `maps` are noted in `seen`.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Recorder)]:
                del hooks[key]
    for name in maps:  # a layer of layers vanishes in the graph: what follows it is hooked in its place
        network.set_submodule(name, nn.Sequential(network.get_submodule(name), nn.Identity()))
    try:
        graph = fx.GraphModule(network, Tracer().trace(network))
    except Exception:  # code that branches on values fails in as many ways as there are programmers
        return None
    fold_batchnorm(graph)
    if has_fused(device, dtype):
        fuse_activations(graph, head)
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    for module in graph.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, FusedConvolution)):
            module.to(dtype)
    if seen is not None:
        graph.get_submodule(head).register_forward_pre_hook(Recorder(seen, "head"))
        for name in maps:
            graph.get_submodule(f"{name}.1").register_forward_hook(Recorder(seen, name))
    return graph.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether it computes what its class says: no class of the user's own, and no hooks that change input or output."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def modules_called_once(graph: fx.GraphModule) -> dict[fx.Node, nn.Module]:
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    return {node: graph.get_submodule(node.target) for node in calls if times[node.target] == 1}


def fold_batchnorm(graph: fx.GraphModule) -> None:
    modules = modules_called_once(graph)
    for node, module in modules.items():
        conv = modules.get(node.args[0])
        if not is_plain(module, nn.BatchNorm2d) or module.running_mean is None or not is_plain(conv, nn.Conv2d):
            continue
        before = node.args[0]
        if len(before.users) == 1:
            modules[before] = fuse_conv_bn_eval(conv, module)
            graph.set_submodule(before.target, modules[before])
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)


def fuse_activations(graph: fx.GraphModule, head: str) -> None:
    """Makes conv, conv -> ReLU, and conv -> addition -> ReLU one node each; not the layer `head`."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    relus = {n for n in order if n.op == "call_module" and isinstance(graph.get_submodule(n.target), nn.ReLU)}
    relus |= {n for n in order if n.op == "call_function" and n.target in RELUS}
    for node, conv in modules_called_once(graph).items():
        if not is_plain(conv, nn.Conv2d) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        if node.target == head:
            continue
        chain, inputs = [node], node.args
        following = only_user(node)
        if following is not None and following.op == "call_function" and following.target in ADDITIONS:
            others = [n for n in following.all_input_nodes if n is not node]
            # A residual is added by whichever of its two sides is computed last.
            if len(others) == 1 and order[others[0]] < order[node] and only_user(following) in relus:
                chain.append(following)
                inputs = (*node.args, others[0])
        if only_user(chain[-1]) in relus:
            chain.append(only_user(chain[-1]))
        graph.set_submodule(node.target, FusedConvolution(conv, relu=chain[-1] in relus))
        if len(chain) == 1:
            continue
        with graph.graph.inserting_before(chain[-1]):
            fused = graph.graph.call_module(node.target, inputs)
        order[fused] = order[chain[-1]]
        chain[-1].replace_all_uses_with(fused)
        for old in reversed(chain):
            graph.graph.erase_node(old)


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
