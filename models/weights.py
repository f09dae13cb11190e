"""Reads weight files of every known layout, never code; writes weights with what they were trained for; downloads.

A file that is written here is `{"params": state dict, "trained_for": note}`. ESRGAN's family stores the same network
under three sets of key names: all are read into the ESRGAN repository's, and what is written has those names.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import InputError
from models.files import refuse_unwritable, write_atomically

SHIPPED_WEIGHTS = Path(__file__).parents[1] / "assets/models/DarioNet_photographs.pt"
# SHA-256, or its beginning, of files that their owners publish under these names: mirrors have served others.
PUBLISHED = {
    "RRDB_PSNR_x4.pth": "f372b59f22929e1bc83fa58d78215c96f976de3b2eaeee736da1b348913da6cc",
    "RRDB_ESRGAN_x4.pth": "65fece06e1ccb48853242aa972bdf00ad07a7dd8938d2dcbdf4221b59f6372ce",
    "ESRGAN_SRx4_DF2KOST_official-ff704c30.pth": "ff704c30",
    "RealESRGAN_x4plus.pth": "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
    "RealESRGAN_x4plus_anime_6B.pth": "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da",
}
RELEASES = "https://github.com/xinntao/Real-ESRGAN/releases/download"
URLS = {  # each file has its SHA-256 in PUBLISHED
    "RealESRGAN_x4plus": f"{RELEASES}/v0.1.0/RealESRGAN_x4plus.pth",
    "RealESRGAN_x4plus_anime_6B": f"{RELEASES}/v0.2.2.4/RealESRGAN_x4plus_anime_6B.pth",
}
# Names of the entry that holds the weights, averaged ones (EMA) first, and of modules around the network.
WRAPPERS = (
    *("params_ema", "params-ema", "state_dict_ema", "model_ema"),
    *("params", "state_dict", "model_state_dict", "model", "network", "net", "generator"),
)
PREFIXES = ("module.", "_orig_mod.", "netG.", "model.", "net.", "network.", "generator.", "layers.0.", "0.")
# Plain data that checkpoints hold beside the weights: options of a command line, scores as numpy's numbers.
SCALAR = np.float64(0).__reduce__()[0]
NUMPY = [(SCALAR, "numpy._core.multiarray.scalar"), (SCALAR, "numpy.core.multiarray.scalar"), np.dtype]
ALLOWED = [argparse.Namespace, *NUMPY, type(np.dtype("f4")), type(np.dtype("f8"))]
# Key names of BasicSR and Real-ESRGAN, and of the first ESRGAN release, as the ESRGAN repository's.
RENAMES = {
    r"^body\.": "RRDB_trunk.",
    r"^conv_body\.": "trunk_conv.",
    r"^conv_up(\d)\.": r"upconv\1.",
    r"^conv_hr\.": "HRconv.",
    r"\.rdb(\d)\.": r".RDB\1.",
    r"^0\.": "conv_first.",
    r"^1\.sub\.\d+\.(\w+)$": r"trunk_conv.\1",
    r"^1\.sub\.": "RRDB_trunk.",
    r"(RDB\d\.conv\d)\.0\.": r"\1.",
    r"^3\.": "upconv1.",
    r"^6\.": "upconv2.",
    r"^8\.": "HRconv.",
    r"^10\.": "conv_last.",
}
SIZE_KEYS = ("conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight")


def load_file(path: str | Path) -> object:
    """What `torch.save` wrote, on the CPU; of a .safetensors file in the form of `save_weights`. Code never runs.

    Raises:
        InputError: the file is absent, unreadable, or holds what can't be read without running its code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return {"params": tensors, "trained_for": (file.metadata() or {}).get("trained_for")}
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise InputError(f"{path}: reading it needs another package: pip install safetensors") from None
    except Exception as error:  # torch reports a damaged file as any of a dozen exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError) and path.open("rb").read(1) in b"P\x80":  # zip or pickle
            reason = (
                "it holds more than weights, which would run code; if you trust it, load it with "
                "torch.load(FILE, weights_only=False), and save its state_dict() alone with torch.save"
            )
        raise InputError(f"{path}: not a readable weights file ({reason})") from None


def sha256_of(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_other_file(path: str | Path, expected: str | None) -> None:
    """Raises InputError for a file whose SHA-256 does not begin with that of the file published under its name."""
    if expected and not (found := sha256_of(path)).startswith(expected):
        raise InputError(
            f"{path}: not the file published under this name (SHA-256 {found[:8]}..., not {expected[:8]}...): "
            "get it again, or give a file of your own another name"
        )


def unwrap(contents: object, path: str | Path) -> dict[str, Tensor]:
    """The state dict inside `contents`, without other projects' wrappers and prefixes; of averaged weights, if any."""
    contents = contents if isinstance(contents, dict) else {}
    for _ in range(3):  # wrappers may be nested
        inner = [contents[name] for name in WRAPPERS if isinstance(contents.get(name), dict) and contents[name]]
        contents = inner[0] if inner else contents
    state = {key: value.detach() for key, value in contents.items() if isinstance(value, Tensor)}
    odd = [t for t in state.values() if t.layout != torch.strided or t.is_meta or t.is_quantized or t.is_complex()]
    if not state or odd or not all(isinstance(key, str) for key in state):
        raise InputError(f"{path}: holds no state dict (a dictionary of tensors)")
    return bare(state)


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without known prefixes that all names share, and without the count of torch's AveragedModel."""
    state = {key: tensor for key, tensor in state.items() if key != "n_averaged"}
    while prefix := next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def load_generator(path: str | Path) -> dict[str, Tensor]:
    """State dict of an RRDBNet x4 under the ESRGAN repository's key names, from a file of any of its three families.

    Raises:
        InputError: the file can't be read, is not what its name promises, or is not an RRDBNet x4.
    """
    contents = load_file(path)
    refuse_other_file(path, PUBLISHED.get(Path(path).name))
    weights = unwrap(contents, path)
    first = next(iter(weights))
    for pattern, name in RENAMES.items():
        weights = {re.sub(pattern, name, key): tensor for key, tensor in weights.items()}
    for key in SIZE_KEYS:
        found = list(weights[key].shape) if key in weights else None
        if found is None or len(found) != 4 or not 0 < found[0] <= 1024:
            raise InputError(f"{path}: not an RRDBNet: {key} is {found or 'missing'}, its first key is {first}")
    if weights[SIZE_KEYS[0]].shape[1] == 12:
        raise InputError(f"{path}: an RRDBNet for a factor of 2; this project needs one for a factor of 4")
    return weights


def generator_size(weights: dict[str, Tensor]) -> tuple[int, int, int]:
    """(features, blocks, growth) of the RRDBNet whose state dict this is."""
    features, growth = (len(weights[key]) for key in SIZE_KEYS)
    return features, len({key.split(".")[1] for key in weights if key.startswith("RRDB_trunk.")}), growth


def load_strictly(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Copies `weights` into `module`, in the module's precision: every key and every shape has to agree.

    Raises:
        InputError: names the file and the first key or shape that differs, or whose values are not finite.
    """
    own, weights = bare(module.state_dict()), bare(weights)
    for key, tensor in own.items():
        found = weights.get(key)
        if found is None and key.endswith("num_batches_tracked"):  # BatchNorm's; plays no part in evaluation
            continue
        if found is None or found.shape != tensor.shape:
            fault = "missing" if found is None else list(found.shape)
            raise InputError(f"{path}: {key} is {fault}, expected {list(tensor.shape)}")
        if not torch.isfinite(found.to(tensor.dtype)).all():
            raise InputError(f"{path}: {key} holds values that are not finite")
    if foreign := [key for key in weights if key not in own]:
        raise InputError(f"{path}: {foreign[0]} is not a part of this network")
    for key, tensor in weights.items():
        own[key].copy_(tensor)


def trained_for(path: str | Path) -> dict:
    """What the weights in a file were trained for, as `save_weights` noted it; {} for weights from elsewhere.

    Earlier versions wrote the note to FILE.json, with the SHA-256 of FILE; it is read if FILE has none itself.
    """
    contents, beside = load_file(path), Path(f"{path}.json")
    note = contents.get("trained_for") if isinstance(contents, dict) else None
    try:
        note = note or beside.read_text(encoding="utf-8")
        note = dict(json.loads(note) if isinstance(note, str) else note)
    except (OSError, ValueError, TypeError, RecursionError):  # no note, or another project's
        return {}
    sha256 = note.pop("sha256", None)
    return note if sha256 is None or sha256 == sha256_of(path) else {}


def save_weights(network: nn.Module | dict[str, Tensor], path: str | Path, note: dict) -> None:
    """Writes weights and, as plain JSON values, what they were trained for; `network` may be a state dict."""
    state = network.state_dict() if isinstance(network, nn.Module) else network
    params = {key: tensor.detach().cpu().clone() for key, tensor in state.items()}
    save_file({"params": params, "trained_for": json.loads(json.dumps(note, allow_nan=False))}, path)


def refuse_unwritable_weights(path: str | Path, key: str) -> None:
    """Raises InputError if weights can't be written to `path`, the value of the parameter `key`, now."""
    if os.path.realpath(path) == os.path.realpath(SHIPPED_WEIGHTS):
        raise InputError(f"{path} comes with the project and is not written over: change {key}")
    if Path(path).suffix == ".safetensors":
        raise InputError(f"{path}: weights are written as torch does: set {key} to .pt (examples/export.py converts)")
    refuse_unwritable(path, key)


def save_file(contents: object, path: str | Path) -> None:
    """`torch.save` by `write_atomically`."""
    write_atomically(path, lambda file: save_to(file, contents))


def save_to(file: BinaryIO, contents: object) -> None:
    """`torch.save` that says why a write failed: torch reports a full disk as a fault of its own."""
    try:
        torch.save(contents, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def published_file(name: str) -> str:
    """The file of the weights `name`, downloaded once; any other text is a file name already."""
    return str(download(URLS[name], PUBLISHED[f"{name}.pth"])) if name in URLS else name


def download(url: str, sha256: str) -> Path:
    """The file of a URL in torch's hub folder, downloaded if it is not there; `sha256` may be the beginning of it.

    Raises:
        InputError: no network, or another file; says which file to put where.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    print(f"Downloading {url} to {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch writes to a name of its own beside `path`, checks the hash and renames: processes may do so at once.
        torch.hub.download_url_to_file(url, str(path), sha256, progress=os.environ.get("RANK", "0") == "0")
        return path
    except Exception as error:  # of as many kinds as there are ways to be without a network
        raise InputError(
            f"{path.name} can't be downloaded ({error}): get {url} where there is a network, and put "
            f"{path.name} into {path.parent}"
        ) from None
