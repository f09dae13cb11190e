"""What the library's convolutions reach at the sizes of a dense block: the bound on everything built of them.

    python -m benchmarks.kernels                    81 px, batch 2 on a CPU, 16 on a GPU
    python -m benchmarks.kernels --batch 64

For the five convolutions of a dense block of 64 features and 32 growth, in the precision that training takes: the
forward pass, the gradient of the input and the gradient of the weights, each alone, with its inputs in the right layout
and nothing copied. The sum over a block is what a forward pass, or a training step, could at best be: RRDBNet's trunk
is 69 such blocks. The last line is JSON.
"""

import argparse
import json
import sys

import torch

from benchmarks.throughput import machine, timed
from experiment.runtime import DTYPES, Runtime, start_runtime
from models.fast import PLAIN, convolve

FEATURES, GROWTH, SIDE = 64, 32, 81
TURNS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int)
    arguments = parser.parse_args()
    runtime = start_runtime("auto")
    batch = arguments.batch or (2 if runtime.device.type == "cpu" else 16)
    print(f"Machine: {machine(runtime)}; torch {torch.__version__}")
    print(f"GFLOP/s, the best of {TURNS} turns; batch {batch}, {SIDE}x{SIDE}")
    total, seconds = 0.0, {"forward": 0.0, "input gradient": 0.0, "weight gradient": 0.0}
    for i in range(5):
        channels = FEATURES + i * GROWTH, FEATURES if i == 4 else GROWTH
        gflop = 2e-9 * batch * SIDE**2 * 9 * channels[0] * channels[1]
        total += gflop
        found = kernels(*channels, batch, runtime)
        for name, value in found.items():
            seconds[name] += value
        rates = ", ".join(f"{name} {gflop / value:.0f}" for name, value in found.items())
        print(f"  {channels[0]:3d} -> {channels[1]:2d}: {rates}")
    rates = {name: total / value for name, value in seconds.items()}
    rates["training"] = 3 * total / sum(seconds.values())
    print("  a block: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    print(json.dumps({"device": runtime.describe(), "batch": batch} | rates))
    return 0


@torch.no_grad()
def kernels(inputs: int, outputs: int, batch: int, runtime: Runtime) -> dict[str, float]:
    """Seconds of the three parts of one convolution."""
    device, dtype = runtime.device, DTYPES[runtime.precision]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    x, gradient = random(batch, inputs, SIDE, SIDE), random(batch, outputs, SIDE, SIDE)
    weight, bias = random(outputs, inputs, 3, 3), torch.randn(outputs, device=device).to(dtype)

    def backward(*mask: bool):
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, None, *PLAIN[:3], False, [0, 0], 1, [*mask, False]
        )

    calls = {
        "forward": lambda: convolve(x, weight, bias, slope=0.2),
        "input gradient": lambda: backward(True, False),
        "weight gradient": lambda: backward(False, True),
    }
    return {name: min(timed(call, device, 3) for _ in range(TURNS)) for name, call in calls.items()}


if __name__ == "__main__":
    sys.exit(main())
