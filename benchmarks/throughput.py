"""Measures a training step and an evaluation pass against the plain reference, in one run, taking turns.

    python -m benchmarks.throughput                 the published network (23 blocks, 81 px): CPU batch 2, GPU 16 and 64
    python -m benchmarks.throughput --quick         4 blocks
    python -m benchmarks.throughput --size 32 3 16 --side 64 --batch 16      the network of examples/shapes

What runs is the program's own code, `Run.step` and `validate`, on random images and random weights; the plain
reference is benchmarks/plain.py with the same weights. Correctness comes first (benchmarks/correctness.py): nothing is
timed that gives wrong numbers.
The last line is JSON: train_ratio and evaluate_ratio are images/s over the plain reference's, at the last batch size;
`batches` has all of them.

FLOPs are those of the convolutions and matrix products of the plain step, counted by torch.utils.flop_counter; the peak
is the fastest 3x3 convolution found in the same run.
"""

import argparse
import copy
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from weakref import WeakSet

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import correctness
from benchmarks.plain import plain_loss
from experiment.data import Batch, to_float
from experiment.distillation import distillation_loss, validate
from experiment.run import Run
from experiment.runtime import DTYPES, Runtime, Stopper, compiled, start_runtime
from models.classifier import FrozenClassifier
from models.darionet import to_device
from models.rrdbnet import RRDBNet

LEARNING_RATE = 1e-5
PEAK_TURNS = 15
IMPORTS = "import torch, torchvision, experiment.distillation, models.darionet"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 blocks instead of 23")
    parser.add_argument("--size", type=int, nargs=3, metavar=("FEATURES", "BLOCKS", "GROWTH"), default=(64, 23, 32))
    parser.add_argument("--side", type=int, default=256, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 2 on a CPU, 16 and 64 on a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    parser.add_argument("--seconds", type=float, default=1.0, help="least length of a turn")
    parser.add_argument("--recompute", action="store_true", help="training.recompute")
    parser.add_argument("--no-checks", action="store_true", help="skip the correctness checks")
    arguments = parser.parse_args()
    features, blocks, growth = arguments.size
    arguments.size = (features, 4 if arguments.quick else blocks, growth)

    runtime = start_runtime("auto", 1337)
    print(f"Machine: {machine(runtime)}; torch {torch.__version__}, torchvision {torchvision.__version__}")
    if not arguments.no_checks:
        print("\nCorrectness: |difference| / |expected|")
        if correctness.print_checks(correctness.all_checks(runtime.device.type)):
            return 1
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    result = {"device": runtime.describe(), "torch": torch.__version__, "size": arguments.size, "side": arguments.side}
    result["import_seconds"] = time.perf_counter() - started
    print(f"\nStart-up: {result['import_seconds']:.1f} s for the imports of train_darionet.py")
    result |= peaks(runtime)
    sizes = arguments.batch or ([2] if runtime.device.type == "cpu" else [16, 64])
    batches = [{"batch": batch} | measure(batch, arguments, runtime, result) for batch in sizes]
    print(json.dumps(result | batches[-1] | {"batches": batches}))
    return 0


def machine(runtime: Runtime) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{runtime.describe()}; {model[1] if model else platform.machine()}; Python {platform.python_version()}"


def timed(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds a call, over `repeats` of them."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - started) / repeats


def peaks(runtime: Runtime) -> dict[str, float]:
    """The GFLOP/s of the machine's fastest 3x3 convolution (channels_last), in float32 and in our precision."""
    device = runtime.device
    images = 16 if device.type == "cuda" else 2
    calls = []  # name, GFLOP, what to time
    for dtype in dict.fromkeys((torch.float32, DTYPES[runtime.precision])):
        for channels, side in ((64, 324), (128, 162), (256, 81), (512, 40)):
            shapes = (images, channels, side, side), (channels, channels, 3, 3)
            tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
            tensors = [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
            gflop = 2e-9 * images * side**2 * channels**2 * 9
            calls.append((peak_of(dtype), gflop, partial(F.conv2d, *tensors, padding=1)))
    found = {name: 0.0 for name, _, _ in calls}
    for turn in range(1 + PEAK_TURNS):  # spread out: neighbours on the machine slow it for seconds
        for name, gflop, call in calls:
            rate = gflop / timed(call, 3)
            found[name] = max(found[name], rate) if turn else 0.0
    print(f"\nPeaks, GFLOP/s: the best of {PEAK_TURNS} turns")
    for name, rate in found.items():
        print(f"  {name.removeprefix('peak_convolution_'):9s} 3x3 convolution {rate:9.1f}")
    return found


def peak_of(dtype: torch.dtype) -> str:
    return f"peak_convolution_{str(dtype).removeprefix('torch.')}"


class Ours:
    """The program's own training step and validation, on a batch held in memory."""

    def __init__(self, network: RRDBNet, classifier: FrozenClassifier, images: Tensor, runtime: Runtime):
        self.runtime = runtime
        self.pipeline = correctness.pipeline_of(classifier, network)
        loss = partial(distillation_loss, teachers=[classifier], weights={"logits": 1.0})
        self.loss = compiled(loss) if runtime.device.type == "cuda" else loss
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
        parameters = {"training": {"gradient_clip_norm": 1.0}}
        self.run = Run("benchmark", None, runtime, parameters, {}, network, optimizer, None, None)  # for its step alone
        self.batch = Batch(images, torch.arange(len(images)), [])

    def loss_on(self, images: Tensor, **options):
        return self.loss(images, self.pipeline.reduce(images), self.pipeline.restore, **options)

    def train(self) -> None:
        with self.runtime.autocast():
            losses = self.loss_on(to_float(self.batch.images, self.runtime.device))
        self.run.step(losses, self.batch, LEARNING_RATE)
        assert not self.run.state.skipped, "the loss was not finite"

    def evaluate(self) -> float:
        """The loss of a validation batch, with the scores on the original and on the rebuilt images."""
        loss, targets = partial(self.loss_on, with_logits=True), list(range(len(self.batch.images)))
        return validate(loss, [self.batch], targets, self.runtime, Stopper(), tqdm(disable=True))["val_loss"]


class Plain:
    """The same in eager NCHW, with Adam as it comes; float32 on a CPU, float16 autocast on a GPU."""

    def __init__(self, network: RRDBNet, classifier: FrozenClassifier, images: Tensor, runtime: Runtime):
        self.device = runtime.device
        self.network = correctness.plain_twin(network)
        self.classifier = copy.deepcopy(classifier.network).to(memory_format=torch.contiguous_format)
        self.mean, self.std = classifier.mean, classifier.std
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        self.half = self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)
        self.images = images

    def loss(self) -> Tensor:
        images = self.images.to(self.device).float() / 255
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            return plain_loss(self.network, self.classifier, images, self.mean, self.std)

    def train(self) -> None:
        self.optimizer.zero_grad()
        loss = self.loss()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        loss.item()

    @torch.no_grad()
    def evaluate(self) -> float:
        return self.loss().item()


def measure(batch: int, arguments: argparse.Namespace, runtime: Runtime, peak: dict[str, float]) -> dict[str, float]:
    """Both variants at one batch size: prints the table, returns its figures."""
    device, (features, blocks, growth) = runtime.device, arguments.size
    shape = (batch, 3, arguments.side, arguments.side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    classifier = to_device(correctness.frozen(correctness.random_classifier()), device)
    network = to_device(correctness.random_network(*arguments.size), device, runtime.memory_format)  # as in training
    network.recompute = arguments.recompute
    plain, ours = (kind(network, classifier, images, runtime) for kind in (Plain, Ours))
    tested = Ours(to_device(copy.deepcopy(network), device), classifier, images, runtime)  # as test.py has it
    print(f"\n{blocks} blocks of {features} features and {growth} growth, batch {batch}, {arguments.side} px")
    found: dict[str, float] = {}
    for what, variants in (
        ("train", {"ours": ours.train, "plain": plain.train}),
        ("evaluate", {"ours": tested.evaluate, "plain": plain.evaluate}),
    ):
        repeats, rates = {}, {name: [] for name in variants}
        for name, call in variants.items():
            found[f"{what}_first_{name}_seconds"] = timed(call)
            found[f"{what}_memory_{name}_mb"] = memory(call, device)
            repeats[name] = max(1, round(arguments.seconds / timed(call)))
        with FlopCounterMode(display=False) as counter:
            variants["plain"]()
        found[f"{what}_gflop"] = gflop = counter.get_total_flops() / 1e9 / batch
        for _ in range(arguments.rounds):
            for name, call in variants.items():
                rates[name].append(batch / timed(call, repeats[name]))
        for name, values in rates.items():
            rate = statistics.median(values)
            dtype = torch.float32 if name == "plain" and device.type == "cpu" else DTYPES[runtime.precision]
            share = rate * gflop / peak[peak_of(dtype)]
            found |= {f"{what}_{name}": rate, f"{what}_{name}_spread": [min(values), max(values)]}
            found[f"{what}_{name}_share"] = share
            print(
                f"  {what:9s} {name:6s} {rate:9.3f} images/s ({min(values):.3f} to {max(values):.3f}), "
                f"{rate * gflop:8.1f} GFLOP/s, {100 * share:5.1f} % of the convolution peak, "
                f"{found[f'{what}_memory_{name}_mb']:7.0f} MB, first call {found[f'{what}_first_{name}_seconds']:.1f} s"
            )
        found[f"{what}_ratio"] = found[f"{what}_ours"] / found[f"{what}_plain"]
        print(f"  {what:9s} ratio  {found[f'{what}_ratio']:9.3f}; {gflop:.0f} GFLOP an image")
    losses = ours.evaluate(), plain.evaluate()
    print("  loss after training: ours {:.4g}, plain {:.4g}".format(*losses))
    assert min(losses) > 0, "timed on zeros"
    return found


def memory(call: Callable[[], object], device: torch.device) -> float:
    """MB: a GPU's peak; on a CPU what autograd keeps for the backward pass, parameters apart."""
    if device.type != "cuda":
        return saved_bytes(call) / 1e6
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) / 1e6


def saved_bytes(call: Callable[[], object]) -> int:
    """Largest number of bytes that autograd keeps at once between forward and backward, parameters apart."""
    alive, largest = WeakSet(), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        if isinstance(tensor, nn.Parameter) or not tensor.numel():
            return tensor
        kept = tensor.detach()  # an object of its own, which lives as long as autograd keeps it
        alive.add(kept)
        storages = [one.untyped_storage() for one in alive]
        largest = max(largest, sum({one.data_ptr(): one.nbytes() for one in storages}.values()))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        call()
    return largest


if __name__ == "__main__":
    sys.exit(main())
