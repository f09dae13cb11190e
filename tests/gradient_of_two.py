"""Started by test_torchrun.py under torchrun: one step in float64, whose averaged gradient is written to a file.

torchrun --nproc_per_node=2 tests/gradient_of_two.py out.pt
"""

import sys

import torch

from benchmarks.correctness import loss_of, pipeline_of
from experiment.run import average_gradients
from experiment.runtime import Runtime, start_runtime
from models.classifier import open_classifier
from models.rrdbnet import RRDBNet


def gradient(images: torch.Tensor, count: int, runtime: Runtime) -> torch.Tensor:
    """The gradient of the mean loss over the `count` images of all processes; `images` is this process's part."""
    torch.manual_seed(0)
    network = RRDBNet(8, 1, 4).double()
    classifier = open_classifier("resnet18", "classifier.pt").double()
    pipeline = pipeline_of(classifier, network)
    if len(images):
        loss_of(pipeline, images, logits=1, pixels=0.5, features=1).total.backward()
    average_gradients(network, len(images), count, runtime)
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def drawn() -> torch.Tensor:
    return torch.rand(5, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    runtime = start_runtime("float32")
    images = drawn()
    # Process 0 has three images, process 1 two: as where one could not be read. Then all are with process 0.
    parts = (runtime.part(list(images)), list(images) if runtime.is_main else [])
    results = [gradient(torch.stack(part) if part else images[:0], 5, runtime) for part in parts]
    if runtime.is_main:
        torch.save(results, sys.argv[1])
