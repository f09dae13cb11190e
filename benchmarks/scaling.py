"""How long will a training take on N devices? Predicted from the step, and checked here with two processes.

    python -m benchmarks.scaling                         measures the step here: one process, then two
    python -m benchmarks.scaling --rate 450              the table alone, for a rate that benchmarks.throughput gave

A step on N devices takes batch / rate seconds of computing and then averages the gradients, 4 bytes a parameter, of
which a ring passes 2 (N-1)/N times their size through every link (Patarasuk and Yuan 2009); nothing overlaps, as in
experiment/distillation.py. Up to 8 devices share a machine. The check: two processes of one thread each, against one
process of one thread plus the all-reduce, measured alone. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.correctness import frozen, random_classifier, random_network
from benchmarks.throughput import Ours
from experiment.runtime import seed_without_tf32, start_runtime
from models.darionet import to_device
from models.rrdbnet import RRDBNet

IMAGES = 1_281_167  # of ImageNet's training set (Russakovsky et al. 2015, table 2)
SETS = {"15 % of ImageNet, 8 epochs": 0.15 * IMAGES * 8, "all of ImageNet, 8 epochs": IMAGES * 8}
DEVICES = (1, 8, 64)
A_MACHINE = 8  # devices
STEPS = 3  # measured, after one more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, help="images/s of one device, instead of measuring")
    parser.add_argument("--batch", type=int, default=16, help="images a device and step, in the table")
    parser.add_argument("--blocks", type=int, default=23, help="of the network that is measured")
    parser.add_argument("--within", type=float, default=400, help="GB/s of an all-reduce within a machine (assumed)")
    parser.add_argument("--between", type=float, default=40, help="GB/s a device between machines (assumed)")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        return process(arguments.blocks)

    with torch.device("meta"):
        gradients = 4 * sum(p.numel() for p in RRDBNet().parameters())  # bytes
    result = {} if arguments.rate else check(arguments.blocks)
    rate = arguments.rate or result["rate"]
    print(f"\nAt {rate:.3g} images/s, batch {arguments.batch} a device, {gradients / 1e6:.1f} MB of gradients a step;")
    print(
        f"assumed: {arguments.within:g} GB/s within a machine of {A_MACHINE}, {arguments.between:g} GB/s between them"
    )
    print("| devices | gradient traffic a step | averaging | images/s |" + "".join(f" {name} |" for name in SETS))
    print("|---|---|---|---|" + "---|" * len(SETS))
    for devices in DEVICES:
        traffic = 2 * (devices - 1) / devices * gradients
        averaging = traffic / 1e9 / (arguments.within if devices <= A_MACHINE else arguments.between)
        total = devices * arguments.batch / (arguments.batch / rate + averaging)
        times = "".join(f" {duration(images / total)} |" for images in SETS.values())
        print(f"| {devices} | {traffic / 1e6:.0f} MB | {1000 * averaging:.2f} ms | {total:.4g} |{times}")
        result[f"images_per_second_{devices}"] = total
    print(json.dumps(result))
    return 0


def duration(seconds: float) -> str:
    for length, name in ((86400, "days"), (3600, "h")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds / 60:.1f} min"


def check(blocks: int) -> dict[str, float]:
    """The step of one process and of two, and what the model above says of two from one."""
    one, two = start(1, blocks), start(2, blocks)
    predicted = one["step"] + two["averaging"]
    print(f"One process, one thread: {one['step']:.2f} s a step of {one['images']} images, {blocks} blocks")
    print(f"Two: {two['step']:.2f} s a step of {2 * two['images']}; averaging alone {two['averaging']:.3f} s")
    print(f"Predicted for two: {predicted:.2f} s; measured over predicted {two['step'] / predicted:.3f}")
    return {
        "rate": one["images"] / one["step"],
        "one_seconds": one["step"],
        "two_seconds": two["step"],
        "averaging_seconds": two["averaging"],
        "measured_over_predicted": two["step"] / predicted,
    }


def start(processes: int, blocks: int) -> dict[str, float]:
    """Runs `process` under torchrun; what its first process measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "benchmarks.scaling", "--process", "--blocks", str(blocks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def process(blocks: int) -> int:
    """Seconds of a training step, gradients averaged with the other processes, and of the averaging alone."""
    runtime = start_runtime("auto")
    seed_without_tf32(1337)
    images = 2 if runtime.device.type == "cpu" else 16
    generator = torch.Generator().manual_seed(runtime.rank)
    batches = list(torch.randint(0, 256, (1, images, 3, 256, 256), dtype=torch.uint8, generator=generator))
    classifier = frozen(random_classifier())
    classifier.to(runtime.device, memory_format=torch.channels_last)
    ours = Ours(
        to_device(random_network(64, blocks, 32), runtime.device, runtime.memory_format), classifier, batches, runtime
    )
    gradients = torch.zeros(sum(p.numel() for p in ours.network.parameters()), device=runtime.device)

    def seconds(call) -> float:
        runtime.sum_numbers(0.0)  # all start together
        runtime.synchronize()
        started = time.perf_counter()
        call()
        runtime.synchronize()
        return time.perf_counter() - started

    steps = [seconds(ours.train) for _ in range(1 + STEPS)][1:]
    averaging = [seconds(lambda: runtime.sum(gradients)) for _ in range(1 + STEPS)][1:]
    if runtime.is_main:
        print(json.dumps({"images": images, "step": statistics.median(steps), "averaging": min(averaging)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
