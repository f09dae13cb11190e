"""Writes the network for other programs, or the chain from small images to the classifier's scores.

    python examples/export.py DarioNet.onnx                      (N,3,h,w) -> (N,3,4h,4w), any N, h and w
    python examples/export.py chain.onnx --with-classifier       from the small image to the classifier's scores
    python examples/export.py DarioNet.safetensors               parameters, and what they were trained for
    python examples/export.py DarioNet.onnx --weights assets/logs/train_20260101-120000/best.pt

ONNX needs onnx, onnxscript and onnxruntime (pip install); safetensors needs safetensors.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # started as a file, python finds the packages beside it

import torch
from torch import Tensor, nn
from torch.export import Dim

from experiment.parameters import parameters_or_shipped
from experiment.script import run_script, script_parser
from models.classifier import FrozenClassifier, open_classifier
from models.darionet import load_rrdbnet
from models.errors import InputError
from models.files import refuse_unwritable, write_atomically
from models.pipeline import Pipeline, Upscale, unchanged
from models.rrdbnet import RRDBNet
from models.weights import generator_size, sha256_of, trained_for

SUFFIXES = (".onnx", ".safetensors")
SHAPES = ((1, 3, 16, 16), (2, 3, 24, 20), (3, 3, 7, 33), (1, 3, 81, 54), (1, 3, 1, 1))  # at which parity is checked
LARGEST_WEIGHT = 2**22  # numbers
TOLERANCE = 1e-3  # of the largest value; a quarter of a step of 8-bit images


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("file", type=Path, help="to write: .onnx, or .safetensors for the network's parameters alone")
    parser.add_argument("--weights", metavar="FILE", help="the network (default: darionet.weights)")
    parser.add_argument("--with-classifier", action="store_true", help="all from the small image to the scores")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    arguments = parser.parse_args()
    path = arguments.file
    parameters = parameters_or_shipped(arguments.parameters, arguments.set, arguments.weights)
    t, weights = parameters.transformations, arguments.weights or parameters.darionet.weights
    if path.suffix not in SUFFIXES or (arguments.with_classifier and path.suffix != ".onnx"):
        raise InputError(f"{path}: .onnx or .safetensors are written, and .safetensors without a classifier")
    if path.exists() and not arguments.overwrite:
        raise InputError(f"{path}: already exists; --overwrite replaces it")
    refuse_unwritable(path, "the file to write")
    network = load_rrdbnet(weights).eval().requires_grad_(False)
    about = metadata(network, weights)
    if path.suffix == ".safetensors":
        contents = to_safetensors(network, path, about)
    elif not arguments.with_classifier:
        contents = to_onnx(network, path, about, "rebuilt")
    else:
        section = parameters.classifier.model_dump()
        classifier = open_classifier(**section)
        classifier.check(t.val_crop_size, "transformations.val_crop_size")
        about |= {"classifier": json.dumps(section), "class_names": json.dumps(classifier.class_names)}
        restore = Upscale(network, t.interpolation, t.antialias)
        contents = to_onnx(Chain(restore, classifier, t.val_crop_size).eval(), path, about, "scores")
    write_atomically(path, lambda file: file.write(contents))
    print(path)
    return 0


class Chain(nn.Module):
    """Small images to scores as in a Pipeline, of one size: (N,3,h,w) float in [0,1] -> (N, classes)."""

    def __init__(self, restore: Upscale, classifier: FrozenClassifier, side: int):
        super().__init__()
        self.pipeline = Pipeline("DarioNet", classifier, unchanged, restore)
        self.side = side

    def forward(self, small: Tensor) -> Tensor:
        return self.pipeline(small, (self.side, self.side))[2]


def metadata(network: RRDBNet, weights: str) -> dict[str, str]:
    """What is said beside the parameters: size of the network, where they come from, what they were trained for."""
    features, blocks, growth = map(str, generator_size(network.state_dict()))
    about = {"architecture": "RRDBNet", "features": features, "blocks": blocks, "growth": growth}
    about |= {"upscale_factor": "4", "images": "(N,3,h,w) RGB in [0,1]", "source": Path(weights).name}
    note = trained_for(weights)
    return about | {"source_sha256": sha256_of(weights)} | ({"trained_for": json.dumps(note)} if note else {})


def to_safetensors(network: RRDBNet, path: Path, about: dict[str, str]) -> bytes:
    """A file of parameters under the ESRGAN repository's key names, which this project's scripts read as well."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise InputError(f"{path}: writing it needs another package: pip install safetensors") from None
    if about["growth"] != "32":
        print("Note: spandrel, and programs that are built on it, read networks of growth 32 alone")
    return save({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, about)


def to_onnx(network: nn.Module, path: Path, about: dict[str, str], output: str) -> bytes:
    """An ONNX file of a network, (N,3,h,w) -> the tensor `output`, for any N, h and w.

    torch.export follows the fast paths (models/fast.py) as plain convolutions; the exporter on TorchScript can't.

    Raises:
        InputError: no onnxscript; a network that can't be exported; results that differ.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript.optimizer
    except ImportError:
        raise InputError(f"{path}: writing it needs other packages: pip install onnx onnxscript onnxruntime") from None
    axes = {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}
    options = {"input_names": ["small"], "output_names": [output], "dynamic_shapes": (axes,), "verbose": False}
    try:
        with torch.no_grad():
            program = torch.onnx.export(network, (torch.rand(2, 3, 24, 20),), dynamo=True, **options)
    except Exception as error:  # every classifier has its own way of not being traced
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{path}: this network can't be exported ({reason})") from None
    # What is computed of weights alone becomes a weight, or other programs can't make int8 of it.
    onnxscript.optimizer.optimize(program.model, input_size_limit=LARGEST_WEIGHT, output_size_limit=LARGEST_WEIGHT)
    model = program.model_proto
    graph = model.graph
    for part in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output, graph):
        del part.metadata_props[:]  # paths and code of whoever exported
    for key, value in about.items():
        model.metadata_props.add(key=key, value=value)
    contents = model.SerializeToString()
    check_parity(network, contents, path)
    return contents


@torch.no_grad()
def check_parity(network: Callable[[Tensor], Tensor], contents: bytes, path: Path) -> None:
    """Prints the largest difference between onnxruntime's results and torch's on random images of every size in SHAPES.

    Raises:
        InputError: it is over TOLERANCE.
    """
    try:
        import onnxruntime
    except ImportError:
        print("Not compared with torch: pip install onnxruntime")
        return
    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        small = torch.rand(shape, generator=generator)
        expected = network(small)
        found = torch.from_numpy(session.run(None, {"small": small.numpy()})[0])
        size = f"{list(shape)} -> {list(found.shape)}"
        difference = float((found - expected).abs().max() / expected.abs().max())
        print(f"{size}: onnxruntime differs from torch by {difference:.1e} of the largest value")
        if not difference <= TOLERANCE:
            raise InputError(f"{path}: not written, onnxruntime would give other results than torch on {size}")


if __name__ == "__main__":
    run_script(main)
