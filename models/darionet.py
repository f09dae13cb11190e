"""DarioNet: trained weights ready for use, and the RRDBNet that a parameters.json names."""

import os
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from models.errors import InputError
from models.images import to_image, to_tensor
from models.pipeline import Upscale
from models.rrdbnet import RRDBNet
from models.scaler import Reduction, reduced_length
from models.weights import (
    SHIPPED_WEIGHTS,
    URLS,
    generator_size,
    load_generator,
    load_strictly,
    published_file,
    trained_for,
)

Images = TypeVar("Images", Image.Image, Tensor)
Network = TypeVar("Network", bound=nn.Module)

OTHER_ROWS = ("original", "small", "bilinear", "bicubic")  # of the results, in lower case


class DarioNet:
    """A trained network, ready to rebuild images.

    `weights` is a file that train_darionet.py wrote, or any RRDBNet x4 (else InputError); by default the network for
    photographs that comes with the project.
    """

    def __init__(self, weights: str | Path = SHIPPED_WEIGHTS, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.restore = Upscale(load_rrdbnet(str(weights), device).eval())

    @torch.no_grad()
    def __call__(self, images: Images, size: tuple[int, int] | None = None) -> Images:
        """Rebuilds a small image: a PIL image, or (N,3,h,w) float in [0,1]; gives the same kind, values in [0,1].

        `size` is (height, width) in pixels; None is four times that of the small image.
        """
        small = to_tensor(images) if isinstance(images, Image.Image) else images
        height, width = size or (4 * small.shape[-2], 4 * small.shape[-1])
        rebuilt = self.restore(small.to(self.device), (height, width)).clamp(0, 1)
        return to_image(rebuilt) if isinstance(images, Image.Image) else rebuilt


def load_rrdbnet(path: str, device: torch.device | str = "cpu") -> RRDBNet:
    """The RRDBNet of a weights file, of any size; InputError if it holds no RRDBNet x4."""
    weights = load_generator(path)
    network = RRDBNet(*generator_size(weights))
    load_strictly(network, weights, path)
    return to_device(network, device)


def build_darionet(features: int, blocks: int, growth: int, initial_weights: str | None) -> RRDBNet:
    """A DarioNet to be trained, from a file or a name in models.weights.URLS; if None, it starts as an enlargement.

    A file of fewer blocks starts a larger network: the blocks that it lacks change nothing until they learn.

    Raises:
        InputError: no file, no internet, no RRDBNet x4, or one of another size.
    """
    size = (features, blocks, growth)
    if initial_weights is None:
        return RRDBNet(*size)
    path = published_file(initial_weights)
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such weights file (darionet.initial_weights); docs/weights.md says where to get ESRGAN's; "
            f"{' and '.join(URLS)} are downloaded by name; null starts as a plain enlargement"
        )
    network = load_rrdbnet(path)
    found = generator_size(network.state_dict())
    if found[::2] != size[::2] or found[1] > blocks:
        raise InputError(
            f"{path}: features, blocks, growth are {found} in the file and {size} in the parameters: "
            "set those of the file under darionet; more blocks are possible"
        )
    if found[1] < blocks:
        print(f"Note: {path} has {found[1]} blocks; {blocks - found[1]} new ones are spread between them")
        network.add_blocks(blocks)
    return network


def load_upscalers(
    weights: list[str],
    initial_weights: str | None,
    device: torch.device | str = "cpu",
    interpolation: str = "bilinear",
    antialias: bool = False,
) -> dict[str, Upscale]:
    """The networks to compare, by the name of their row: where DarioNet started, if that file exists, and `weights`.

    `initial_weights` is as in `build_darionet`; if it can't be downloaded, a line says so.

    Raises:
        InputError: no such weights, or a file that is no RRDBNet x4.
    """
    for path in weights:
        if not Path(path).is_file():
            raise InputError(
                f"{path}: no such weights file; `python train_darionet.py` makes it; `make demo` makes others, for "
                "--parameters examples/shapes/parameters.json"
            )
    start = None
    if initial_weights is not None:
        try:
            start = published_file(initial_weights)
        except InputError as error:
            print(f"Note: no row for darionet.initial_weights: {error}")
    paths = [start, *weights] if start and Path(start).is_file() else weights
    # A file that is named twice has its last place: the last row is the one that is looked at.
    paths = list({os.path.realpath(path): path for path in reversed(paths)}.values())[::-1]
    networks = [load_rrdbnet(path, device).eval() for path in paths]
    names = [row_name(path) for path in paths]
    names = [name if names.count(name) == 1 else Path(path).stem for name, path in zip(names, paths, strict=True)]
    taken = [*map(str.lower, names), *OTHER_ROWS]  # predictions.csv has them in lower case
    unique = [n if taken.count(n.lower()) == 1 else f"{n} ({path})" for n, path in zip(names, paths, strict=True)]
    return {name: Upscale(one, interpolation, antialias) for name, one in zip(unique, networks, strict=True)}


def row_name(path: str) -> str:
    """What tables call weights: "DarioNet" or "Pixels" (trained on pixels alone) if their note says that this project
    trained them, "ESRGAN" if their file has a name of ESRGAN's, else the file's own name."""
    loss = trained_for(path).get("loss")
    if isinstance(loss, dict):
        return "DarioNet" if any(weight for term, weight in loss.items() if term != "pixels") else "Pixels"
    return "ESRGAN" if Path(path).name.startswith(("RRDB_", "ESRGAN_", "RealESRGAN_")) else Path(path).stem


def other_input(path: str, reduction: Reduction) -> str | None:
    """A line that says how this input differs from what the weights were trained for; None if it does not."""
    note = trained_for(path)
    drawn = note.get("random_reduction") or {}
    different = [
        f"{key} {note[key]}, not {value}"
        for key, value in reduction.note().items()
        if value not in [note.get(key, value), *drawn.get(key, ())] and not (key == "scale" and was_drawn(value, note))
    ]
    return f"Note: {path} was trained for {', '.join(different)}; expect less" if different else None


def other_size(path: str, side: int, full_side: int) -> str | None:
    """The same for small images of `side` pixels, rebuilt to `full_side`; None if within a quarter, or unknown."""
    note, scale = trained_for(path), side / full_side
    trained = reduced_length(full_side, note.get("scale", scale))
    if 0.8 <= side / trained <= 1.25 or was_drawn(scale, note):
        return None
    return f"Note: {path} was trained for small images of {trained} pixels, not {side}; expect less"


def was_drawn(scale: float, note: dict) -> bool:
    """Whether a training with random reductions had this scale among them."""
    lowest, highest = (note.get("random_reduction") or {}).get("scale", (1, 0))
    return lowest <= scale <= highest


def to_device(
    network: Network, device: torch.device | str, memory_format: torch.memory_format | None = None
) -> Network:
    """Moves `network` to `device`, by default in channels_last: the fastest for evaluation, but on Macs' GPUs."""
    default = torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last
    return network.to(device=device, memory_format=memory_format or default)
