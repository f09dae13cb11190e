"""Measures how fast images get from files to the device, and how long workers and large folders take to start.

    python -m benchmarks.loading                      1, 2, 4 and 8 workers, a folder of 100 000 files
    python -m benchmarks.loading --files 1000000      lists a million (hard links: they take inodes' names, no space)
    python -m benchmarks.loading --images 512 --workers 1 2

The images are JPEGs of ImageNet's usual size, 500x375, drawn here: blotches, edges and noise, about 95 kB each, a
little less than ImageNet's. They go through the program's own code: ImageTree, the training's Transform, its workers,
to_float. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from experiment.data import ImageTree, Transform, batches, epoch_batches, to_float
from experiment.runtime import Runtime, start_runtime

WIDTH, HEIGHT = 500, 375
DISTINCT = 64  # drawn images; the others are hard links to them
CLASSES = 1000
BATCH = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="to decode in every measurement")
    parser.add_argument("--files", type=int, default=100_000, help="in the folder that is listed")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    runtime = start_runtime("auto")
    print(f"Machine: {runtime.describe()}, {os.cpu_count()} cores; torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw(Path(folder) / "drawn")
        result = {"jpeg_kb": sum(path.stat().st_size for path in drawn) / len(drawn) / 1000}
        result |= listing(Path(folder) / "large", drawn, arguments.files)
        result |= decoding(Path(folder) / "images", drawn, arguments, runtime)
    print(json.dumps(result))
    return 0


def draw(folder: Path) -> list[Path]:
    """DISTINCT JPEG files."""
    folder.mkdir()
    paths = []
    for i in range(DISTINCT):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), 3)
        edges = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), 0)
        pixels = 0.6 * np.asarray(coarse, float) + 0.4 * np.asarray(edges, float)
        pixels += rng.normal(0, 14, pixels.shape)
        paths.append(folder / f"{i}.JPEG")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def link(folder: Path, drawn: list[Path], count: int) -> None:
    """`count` files in CLASSES folders, as ImageNet's training images lie."""
    for c in range(CLASSES):
        (folder / f"n{c:08d}").mkdir(parents=True)
    originals = [str(path) for path in drawn]
    links = [0] * len(originals)
    for i in range(count):
        which = i % len(originals)
        if links[which] == 60_000:  # ext4 allows 65 000 names for one file
            copy = f"{originals[which]}.{i}"
            Path(copy).write_bytes(Path(originals[which]).read_bytes())
            originals[which], links[which] = copy, 0
        os.link(originals[which], f"{folder}/n{i % CLASSES:08d}/n{i % CLASSES:08d}_{i}.JPEG")
        links[which] += 1


def listing(folder: Path, drawn: list[Path], files: int) -> dict[str, float]:
    """Seconds to find all images of a large folder, and to give each its class."""
    link(folder, drawn, files)
    seconds, orders = [], []
    for _ in range(3):
        started = time.perf_counter()
        dataset = ImageTree(str(folder))
        dataset.targets([f"n{c:08d}" for c in range(CLASSES)])
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        epoch_batches(len(dataset), BATCH, seed=0, epoch=0, shuffle=True, limit=None)
        orders.append(time.perf_counter() - started)
    assert len(dataset) == files
    found = {"listed_files": files, "listing_seconds": min(seconds), "shuffling_seconds": min(orders)}
    print(
        f"\nListing {files} files in {CLASSES} folders: {min(seconds):.2f} s (first time {seconds[0]:.2f} s); "
        f"an epoch's order: {min(orders):.2f} s; a million at this rate: {min(seconds) * 1e6 / files:.1f} s"
    )
    return found


def decoding(folder: Path, drawn: list[Path], arguments, runtime: Runtime) -> dict[str, float]:
    """Images/s from files to float tensors on the device, workers' start included; seconds until the first batch."""
    link(folder, drawn, arguments.images)
    dataset = ImageTree(str(folder), Transform(256, 256, 0.5, 0.1, 1337, 0))
    lists = epoch_batches(len(dataset), BATCH, seed=0, epoch=0, shuffle=True, limit=None)
    found = {}
    print(f"\nDecoding {arguments.images} JPEGs of {WIDTH}x{HEIGHT}, cropped to 256x256, batches of {BATCH}:")
    for workers in arguments.workers:
        rates, first = [], []
        for _ in range(arguments.rounds):
            started = time.perf_counter()
            arrived = []
            for batch in batches(dataset, lists, workers, runtime.device.type == "cuda"):
                to_float(batch.images, runtime.device)
                assert not batch.unreadable
                arrived.append(time.perf_counter())
            runtime.synchronize()
            ended = time.perf_counter()
            first.append(arrived[0] - started)
            rates.append(arguments.images / (ended - started))
        rate = statistics.median(rates)
        found |= {f"decode_{workers}_workers": rate, f"first_batch_{workers}_workers": statistics.median(first)}
        print(
            f"  {workers} workers: {rate:7.1f} images/s ({min(rates):.1f} to {max(rates):.1f}), "
            f"first batch after {statistics.median(first):.2f} s"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
