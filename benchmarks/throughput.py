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
is the fastest 3x3 convolution and the fastest matrix product found in the same run.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.correctness import (
    all_checks,
    frozen,
    pipeline_of,
    plain_twin,
    print_checks,
    random_classifier,
    random_network,
)
from benchmarks.plain import plain_loss
from experiment.data import Batch, to_float
from experiment.distillation import distillation_loss, validate
from experiment.run import Run
from experiment.runtime import DTYPES, Runtime, Stopper, compiled, seed_without_tf32, start_runtime
from models.classifier import FrozenClassifier
from models.darionet import to_device
from models.rrdbnet import ResidualDenseBlock, RRDBNet

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
    parser.add_argument(
        "--definition", action="store_true", help="dense blocks as rrdbnet.py defines them, not fast.py's"
    )
    parser.add_argument("--no-checks", action="store_true", help="skip the correctness checks")
    arguments = parser.parse_args()
    features, blocks, growth = arguments.size
    size = (features, 4 if arguments.quick else blocks, growth)
    if arguments.definition:
        ResidualDenseBlock.forward = ResidualDenseBlock.plain

    runtime = start_runtime("auto")
    seed_without_tf32(1337)
    device = runtime.device
    print(f"Machine: {machine(runtime)}; torch {torch.__version__}, torchvision {torchvision.__version__}")
    result = {"device": runtime.describe(), "torch": torch.__version__, "size": size, "side": arguments.side}
    if not arguments.no_checks:
        print("\nCorrectness: |difference| / |expected|")
        if print_checks(all_checks(device.type)):
            return 1
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    result["import_seconds"] = time.perf_counter() - started
    print(f"\nStart-up: {result['import_seconds']:.1f} s for the imports of train_darionet.py")
    result |= peaks(runtime)
    batches = []
    for batch in arguments.batch or ([2] if device.type == "cpu" else [16, 64]):
        batches.append({"batch": batch} | measure(size, batch, arguments, runtime, result))
    result |= batches[-1] | {"batches": batches}
    print(json.dumps(result))
    return 0


def machine(runtime: Runtime) -> str:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return f"{runtime.describe()}; {processor}; Python {platform.python_version()}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Seconds a call, over `repeats` of them; from events on a GPU."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            call()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1000 / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def peaks(runtime: Runtime) -> dict[str, float]:
    """The machine's fastest matrix product and 3x3 convolution (channels_last), GFLOP/s, in float32 and ours."""
    device = runtime.device
    n, images = (8192, 16) if device.type == "cuda" else (2048, 2)
    dtypes = tuple(dict.fromkeys((torch.float32, DTYPES[runtime.precision])))
    calls: list[tuple[str, float, Callable[[], Tensor]]] = []  # name, GFLOP, what to time
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        calls.append((f"peak_matmul_{name}", 2e-9 * n**3, partial(torch.mm, a, b)))
        for channels, side in ((64, 324), (128, 162), (256, 81), (512, 40)):
            x = torch.randn(images, channels, side, side, device=device, dtype=dtype)
            weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
            x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
            gflop = 2e-9 * images * side**2 * channels**2 * 9
            calls.append((f"peak_convolution_{name}", gflop, partial(F.conv2d, x, weight, padding=1)))
    found = dict.fromkeys((name for name, _, _ in calls), 0.0)
    print(f"\nPeaks, GFLOP/s: the best of {PEAK_TURNS} turns")
    for turn in range(1 + PEAK_TURNS):  # spread out: neighbours on the machine slow it for seconds
        for name, gflop, call in calls:
            rate = gflop / timed(call, device, 3)
            found[name] = max(found[name], rate) if turn else found[name]
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        product, convolution = found[f"peak_matmul_{name}"], found[f"peak_convolution_{name}"]
        print(f"  {name:9s} matrix product {product:9.1f}, 3x3 convolution {convolution:9.1f}")
    return found


class Ours:
    """The program's own training step and validation, on batches held in memory."""

    def __init__(self, network: RRDBNet, classifier: FrozenClassifier, batches: list[Tensor], runtime: Runtime):
        self.runtime, self.network = runtime, network
        self.pipeline = pipeline_of(classifier, network)
        loss = partial(distillation_loss, teachers=[classifier], weights={"logits": 1.0})
        self.loss = compiled(loss) if runtime.device.type == "cuda" else loss
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
        parameters = {"training": {"gradient_clip_norm": 1.0}}
        self.run = Run("benchmark", None, runtime, parameters, {}, network, optimizer, None, None)  # for its step alone
        self.batches = [Batch(images, torch.arange(len(images)), []) for images in batches]

    def loss_on(self, images: Tensor, indices: Tensor | None = None, **options):
        return self.loss(images, self.pipeline.reduce(images), self.pipeline.restore, **options)

    def train(self) -> None:
        """One step a batch."""
        for batch in self.batches:
            with self.runtime.autocast():
                losses = self.loss_on(to_float(batch.images, self.runtime.device))
            self.run.step(losses, batch, LEARNING_RATE)
            assert not self.run.state.skipped, "the loss was not finite"

    def evaluate(self) -> None:
        """One validation batch a batch: the loss, and the scores on the original and on the rebuilt images."""
        targets = list(range(len(self.batches[0].images)))
        loss = partial(self.loss_on, with_logits=True)
        validate(loss, self.batches, targets, self.runtime, Stopper(), tqdm(disable=True))


class Plain:
    """The same written plainly: float32 on a CPU, float16 autocast with loss scaling on a GPU."""

    def __init__(self, network: RRDBNet, classifier: FrozenClassifier, batches: list[Tensor], runtime: Runtime):
        self.device = runtime.device
        self.network = plain_twin(network)
        self.classifier = copy.deepcopy(classifier.network).to(memory_format=torch.contiguous_format)
        self.mean, self.std = classifier.mean, classifier.std
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        self.half = self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)
        self.batches = batches

    def loss(self, images: Tensor) -> Tensor:
        images = images.to(self.device).float() / 255
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            return plain_loss(self.network, self.classifier, images, self.mean, self.std)

    def train(self) -> None:
        for images in self.batches:
            self.optimizer.zero_grad()
            loss = self.loss(images)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            loss.item()

    @torch.no_grad()
    def evaluate(self) -> None:
        for images in self.batches:
            self.loss(images).item()


def measure(size: tuple[int, int, int], batch: int, arguments, runtime: Runtime, peak: dict) -> dict[str, float]:
    """Both variants at one batch size: prints the table, returns its figures."""
    device = runtime.device
    generator = torch.Generator().manual_seed(0)
    shape = (1, batch, 3, arguments.side, arguments.side)
    batches = list(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
    started = time.perf_counter()
    classifier = frozen(random_classifier())
    classifier.to(device, memory_format=torch.channels_last)
    network = to_device(random_network(*size), device, runtime.memory_format)  # as train_darionet.py has it
    network.recompute = arguments.recompute
    plain = Plain(network, classifier, batches, runtime)
    ours = Ours(network, classifier, batches, runtime)
    tested = Ours(to_device(copy.deepcopy(network), device), classifier, batches, runtime)  # as test.py has it
    built = time.perf_counter() - started

    found: dict[str, float] = {"build_seconds": built}
    counter = FlopCounterMode(display=False)
    with counter:
        plain.train()
    found["train_gflop"] = counter.get_total_flops() / 1e9 / batch
    with counter:
        plain.evaluate()
    found["evaluate_gflop"] = counter.get_total_flops() / 1e9 / batch
    print(
        f"\n{size[1]} blocks of {size[0]} features and {size[2]} growth, batch {batch}, {arguments.side} px; "
        f"{found['train_gflop']:.0f} GFLOP an image to train, {found['evaluate_gflop']:.0f} to evaluate"
    )
    for what, variants in (
        ("train", {"ours": ours.train, "plain": plain.train}),
        ("evaluate", {"ours": tested.evaluate, "plain": plain.evaluate}),
    ):
        repeats, rates = {}, {name: [] for name in variants}
        for name, call in variants.items():
            started = time.perf_counter()
            call()
            synchronize(device)
            found[f"{what}_first_{name}_seconds"] = time.perf_counter() - started
            found[f"{what}_memory_{name}_mb"] = memory(call, device)
            repeats[name] = max(1, round(arguments.seconds / timed(call, device, 1)))
        for _ in range(arguments.rounds):
            for name, call in variants.items():
                rates[name].append(batch / timed(call, device, repeats[name]))
        for name, values in rates.items():
            rate = statistics.median(values)
            gflops = rate * found[f"{what}_gflop"]
            dtype = "float32" if name == "plain" and device.type == "cpu" else str(DTYPES[runtime.precision])[6:]
            share = gflops / peak[f"peak_convolution_{dtype}"]
            found |= {f"{what}_{name}": rate, f"{what}_{name}_spread": [min(values), max(values)]}
            found[f"{what}_{name}_share"] = share
            print(
                f"  {what:9s} {name:6s} {rate:9.3f} images/s ({min(values):.3f} to {max(values):.3f}), "
                f"{gflops:8.1f} GFLOP/s, {100 * share:5.1f} % of the convolution peak, "
                f"{found[f'{what}_memory_{name}_mb']:7.0f} MB, first call {found[f'{what}_first_{name}_seconds']:.1f} s"
            )
        found[f"{what}_ratio"] = found[f"{what}_ours"] / found[f"{what}_plain"]
        print(f"  {what:9s} ratio  {found[f'{what}_ratio']:9.3f}")
    losses = validate_once(ours), plain.loss(batches[0]).item()
    print(f"  loss after training: ours {losses[0]:.4g}, plain {losses[1]:.4g}")
    assert min(losses) > 0, "timed on zeros"
    return found


def validate_once(ours: Ours) -> float:
    with torch.no_grad(), ours.runtime.autocast():
        return ours.loss_on(to_float(ours.batches[0].images, ours.runtime.device)).total.item()


def memory(call: Callable[[], None], device: torch.device) -> float:
    """MB: a GPU's peak; on a CPU what autograd keeps for the backward pass, parameters apart."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) / 1e6
    return saved_bytes(call) / 1e6


def saved_bytes(call: Callable[[], None]) -> int:
    """Largest number of bytes that autograd keeps at once between forward and backward, parameters apart."""
    alive: dict[int, list[int]] = {}  # address of a storage -> bytes, holders
    current = largest = 0

    class Kept:
        def __init__(self, tensor: Tensor):
            nonlocal current, largest
            storage = tensor.untyped_storage()
            self.tensor, self.address = tensor, storage.data_ptr()
            entry = alive.setdefault(self.address, [storage.nbytes(), 0])
            entry[1] += 1
            if entry[1] == 1:
                current += entry[0]
                largest = max(largest, current)

        def __del__(self):
            nonlocal current
            entry = alive[self.address]
            entry[1] -= 1
            if not entry[1]:
                current -= entry[0]
                del alive[self.address]

    def pack(tensor: Tensor):
        return tensor if isinstance(tensor, nn.Parameter) or not tensor.numel() else Kept(tensor)

    def unpack(kept):
        return kept.tensor if isinstance(kept, Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        call()
    return largest


if __name__ == "__main__":
    sys.exit(main())
