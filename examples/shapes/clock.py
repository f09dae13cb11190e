"""How long `make demo` takes on this machine, said before each of its steps.

python examples/shapes/clock.py 1        measures the machine for some seconds; the clock starts
python examples/shapes/clock.py 4        before the fourth step
"""

import json
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]  # started as a file, python finds the packages there

import torch

from experiment.runtime import Runtime, duration, start_runtime
from models.darionet import prepare
from models.rrdbnet import RRDBNet

CLOCK = Path(__file__).parent / "output/clock.json"
STEPS = {  # what each takes: training steps of the network as measured here, and further seconds
    "draws the pictures": (40, 8),
    "trains the classifier": (100, 25),
    "trains the generator on pixels": (172, 5),
    "trains DarioNet": (515, 8),
    "tests all of them": (90, 10),
    "rebuilds one picture, and a photograph": (60, 18),
}


def main() -> None:
    number = int(sys.argv[1])
    if number == 1:
        CLOCK.parent.mkdir(exist_ok=True)
        clock = {"unit": seconds_of_a_step(start_runtime("auto")), "begun": []}
    else:
        clock = json.loads(CLOCK.read_text())
    now = time.time()
    clock["begun"].append(now)
    CLOCK.write_text(json.dumps(clock))
    costs = [clock["unit"] * steps + seconds for steps, seconds in STEPS.values()]
    done = now - clock["begun"][0]
    if number > 2:  # the first step is too short to learn from
        costs = [cost * done / sum(costs[: number - 1]) for cost in costs]
    left = sum(costs[number - 1 :])
    print(
        f"\nStep {number} of {len(STEPS)} {list(STEPS)[number - 1]}: {duration(costs[number - 1])}. "
        f"The whole demo: {duration(done + left)}, of which {duration(left)} left",
        flush=True,
    )


def seconds_of_a_step(runtime: Runtime) -> float:
    """Of training the demo's network on a batch, the shortest of some within four seconds."""
    network = prepare(RRDBNet(32, 3, 16), runtime.device, runtime.memory_format)
    small = torch.rand(16, 3, 20, 20, device=runtime.device)
    shortest, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 4:
        started = time.perf_counter()
        with runtime.autocast():
            rebuilt = network(small)
        rebuilt.float().square().mean().backward()
        runtime.synchronize()
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


if __name__ == "__main__":
    main()
