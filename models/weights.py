"""Reads weight files of every known layout into plain state dicts, and writes those; code inside a file never runs.

ESRGAN's family stores the same network under three sets of key names; they are read into the ESRGAN repository's,
and what is written has those names.
"""

import hashlib
import os
import pickle
import re
import shlex
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from models.errors import InputError
from models.files import refuse_unwritable, write_atomically

SHIPPED = Path(__file__).parents[1] / "assets/models/DarioNet_photographs.pt"
# SHA-256, or its beginning, of files that their owners publish under these names: mirrors have served others.
PUBLISHED = {
    "RRDB_PSNR_x4.pth": "f372b59f22929e1bc83fa58d78215c96f976de3b2eaeee736da1b348913da6cc",
    "RRDB_ESRGAN_x4.pth": "65fece06e1ccb48853242aa972bdf00ad07a7dd8938d2dcbdf4221b59f6372ce",
    "ESRGAN_SRx4_DF2KOST_official-ff704c30.pth": "ff704c30",
    "RealESRGAN_x4plus.pth": "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
    "RealESRGAN_x4plus_anime_6B.pth": "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da",
}
# Names of the entry that holds the weights, and of modules around the network.
WRAPPERS = ("params", "state_dict", "model_state_dict", "model_state", "model", "network", "generator", "net", "net_g")
PREFIXES = (*WRAPPERS, "netG", "backbone", "layers", "0")
TRANSPARENT = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # torch's own wrappers
LARGEST = 1024  # features or growth of a generator
DEEPEST = 20  # dictionaries or modules within others
MOST = 100  # kinds of objects beside the weights
# Of these a file may hold whole objects beside the weights; they are read as nothing, and nothing of theirs is run.
HARMLESS = (
    r"(argparse|collections|datetime|easydict|numpy|omegaconf|pathlib|torch|types|typing|uuid)\."
    r"|(bool|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple)$"
)
# What whoever trusts a file can do with it: only the tensors remain.
CONVERSION = (
    "python -c \"import sys, torch; f = lambda x: x.state_dict() if hasattr(x, 'state_dict') else x; "
    "x = f(torch.load(sys.argv[1], 'cpu', weights_only=False)); x = {k: f(v) for k, v in x.items()}; "
    "torch.save({k: v for k, v in x.items() if torch.is_tensor(v) or isinstance(v, dict) "
    'and all(map(torch.is_tensor, v.values()))}, sys.argv[2])"'
)
# BasicSR's and Real-ESRGAN's names for the ESRGAN repository's, then those of the first ESRGAN release.
BASICSR_NAMES = {
    "body": "RRDB_trunk",
    "conv_body": "trunk_conv",
    "conv_up1": "upconv1",
    "conv_up2": "upconv2",
    "conv_hr": "HRconv",
}
FIRST_RELEASE_NAMES = {
    "model.0": "conv_first",
    "model.3": "upconv1",
    "model.6": "upconv2",
    "model.8": "HRconv",
    "model.10": "conv_last",
}


def load_file(path: str | Path) -> object:
    """What `torch.save` wrote to `path`, on the CPU, or the tensors of a .safetensors file. Code never runs.

    Raises:
        InputError: the file is absent, unreadable, or holds what can't be read without running its code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        return load_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
    except InputError:
        raise
    except Exception as error:  # torch reports a damaged file as any of a dozen exceptions
        objects = isinstance(error, pickle.UnpicklingError) and path.open("rb").read(1) in b"P\x80"  # zip or pickle
        if objects or "TorchScript" in str(error):
            command = f"{CONVERSION} {shlex.quote(str(path))} {shlex.quote(f'{path}.plain.pt')}"
            raise InputError(
                f"{path}: not a file of weights alone, to read it would run code; if you trust it, this command "
                f"makes a plain one of it: {command}"
            ) from None
        if isinstance(error, pickle.UnpicklingError):
            raise InputError(f"{path}: not a weights file that torch knows") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a readable weights file ({reason})") from None


def load_tensors(path: Path) -> object:
    """`torch.load` of tensors and plain values; objects that are no more than data are read as empty dictionaries."""
    stand_ins: dict[str, type] = {}
    while True:
        try:
            known = [(stand_in, name) for name, stand_in in stand_ins.items()]
            with warnings.catch_warnings(), torch.serialization.safe_globals(known):
                warnings.simplefilter("ignore")  # of old forms; what can't be read raises
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            found = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            name = found[1] if found else ""
            place_is_known = "." in name or re.match(HARMLESS, name)  # a built-in function's name stands alone
            if not place_is_known or name in stand_ins or len(stand_ins) == MOST:
                if stand_ins:  # which did not do
                    raise pickle.UnpicklingError(str(error)) from None
                raise
            name = name if "." in name else f"builtins.{name}"
            stand_ins[name] = Inert if name.startswith("numpy.") else Called if re.match(HARMLESS, found[1]) else Built


class Inert:
    """Stands for an object that a file builds from anything."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


class Called:
    """Stands for an object in a file: a dictionary of what the file puts into it, and its attributes."""

    def __new__(cls, *arguments):
        return OrderedDict()


class NeverCalled(type):
    def __call__(cls, *arguments):
        raise pickle.UnpicklingError("GLOBAL that is called: it may be code")


class Built(Called, metaclass=NeverCalled):
    """The same for a class that is not known: its objects are data, but it may not be called with arguments."""


def load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file as load
    except ImportError:
        raise InputError(f"{path}: reading it needs another package: pip install safetensors") from None
    return load(path)


def metadata_of(path: Path) -> dict[str, str]:
    """The texts beside the tensors of a .safetensors file; none of one that can't be read: `load_file` says why."""
    try:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception:
        return {}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_other_file(path: str | Path, expected: str | None) -> None:
    """Raises InputError for a file whose SHA-256 does not begin with that of the file published under its name."""
    if expected and not (found := sha256_of(Path(path))).startswith(expected):
        raise InputError(
            f"{path}: not the file published under this name (SHA-256 {found[:8]}..., not {expected[:8]}...): "
            "get it again, or give a file of your own another name"
        )


def unwrap(contents: object, path: str | Path, having: Iterable[str] = ()) -> dict[str, Tensor]:
    """The state dict inside `contents`, without the wrappers and prefixes that other projects add.

    `having` are names of tensors of which the wanted network has one: they tell it from others in the same file
    (discriminators, losses). Averaged weights (EMA) come first, and a line says which were read.

    Raises:
        InputError: there is none.
    """
    chosen, weights = [], tensors_in(contents)
    starts = starts_of(weights, having)
    if starts:
        weights = part_of(weights, starts, path)
    while not starts and len(chosen) < DEEPEST and (inner := entries_of(contents)):
        contents, chosen = contents[inner[0]], [*chosen, inner[0]]
        weights = tensors_in(contents)
    if not weights or not all(map(is_plain, weights.values())):
        raise InputError(f"{path}: holds no state dict (a dictionary of tensors)")
    if any(map(is_averaged, chosen)):
        say(f"{path}: reading {'.'.join(chosen)}")
    return weights if starts else bare(weights)


def entries_of(contents: object) -> list[str]:
    """The entries of a checkpoint that hold weights, averaged ones first: not counters beside them that are tensors."""
    entries = contents if isinstance(contents, dict) else {}
    names = [name for name in entries if isinstance(name, str) and (name in WRAPPERS or is_averaged(name))]
    counts = {name: len(tensors_in(entries[name])) for name in names if isinstance(entries[name], dict)}
    names = [name for name, count in counts.items() if count and 2 * count >= max(counts.values())]
    return sorted(names, key=lambda name: (not is_averaged(name), name not in WRAPPERS or WRAPPERS.index(name)))


def tensors_in(contents: object) -> dict[str, Tensor]:
    """The tensors in nested dictionaries, and in the stand-ins of modules, under their names joined by dots."""
    found, seen = {}, set()

    def walk(inner: object, start: str, depth: int) -> None:
        if isinstance(inner, Tensor):
            found[start[:-1]] = inner.detach()
        if not isinstance(inner, dict) or not depth or id(inner) in seen:
            return
        seen.add(id(inner))
        module = vars(inner) if isinstance(inner, OrderedDict) else {}
        if isinstance(module.get("_modules"), dict):
            passing = module.get("_non_persistent_buffers_set", ())
            buffers = {name: buffer for name, buffer in module["_buffers"].items() if name not in passing}
            inner = module["_parameters"] | buffers | module["_modules"]
        for name, value in inner.items():
            if isinstance(name, str) and name != "n_averaged":  # torch.optim.swa_utils counts beside the weights
                walk(value, f"{start}{name}.", depth - 1)

    walk(contents, "", DEEPEST)
    short = {".".join(p for p in name.split(".") if p not in TRANSPARENT): tensor for name, tensor in found.items()}
    return short if len(short) == len(found) else found


def starts_of(weights: dict[str, Tensor], having: Iterable[str]) -> list[str]:
    """What stands before one of the names `having`, averaged weights first, then the shortest."""
    found = {key.removesuffix(name) for name in having for key in weights if f".{key}".endswith(f".{name}")}
    return sorted(found, key=lambda start: (not is_averaged(start), len(start), start))


def is_averaged(start: str) -> bool:
    return re.search(r"(^|[._-])(ema|averaged|shadow)([._-]|$)", start, re.IGNORECASE) is not None


def part_of(weights: dict[str, Tensor], starts: list[str], path: str | Path) -> dict[str, Tensor]:
    """The weights whose names begin with the first of `starts`; said where that was a choice."""
    start, *others = starts
    names = [name.removesuffix(".") or "those without a prefix" for name in starts]
    if others or is_averaged(start):
        say(f"{path}: reading {names[0]}" + (f"; {', '.join(names[1:4])} are there too" if others else ""))
    inner = tuple(other for other in others if other.startswith(start))
    return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start) and not k.startswith(inner)}


def bare(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without the prefixes that all names share and that say nothing."""
    weights = tensors_in(weights)
    while weights:
        first = next(iter(weights)).partition(".")[0]
        if not (first in PREFIXES or is_averaged(first)) or not all(key.startswith(f"{first}.") for key in weights):
            break
        weights = {key.removeprefix(f"{first}."): tensor for key, tensor in weights.items()}
    return weights


def say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line)


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor of real numbers with a place in memory for every one of them."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def load_generator(path: str | Path) -> dict[str, Tensor]:
    """State dict of an RRDBNet x4 under the ESRGAN repository's key names, from a file of any of its three families.

    Raises:
        InputError: the file can't be read, is not what its name promises, or is not an RRDBNet x4.
    """
    contents = load_file(path)
    refuse_other_file(path, PUBLISHED.get(Path(path).name))
    weights = esrgan_names(unwrap(contents, path, having=("conv_first.weight", "model.0.weight")))
    first = weights.get("conv_first.weight")
    if first is None:
        raise InputError(
            f"{path}: not an RRDBNet: conv_first.weight is missing, its first key is {next(iter(weights))}"
        )
    features, blocks, growth = generator_size(weights)
    sizes_fit = min(features, blocks, growth) > 0 and max(features, growth) <= LARGEST and blocks <= len(weights)
    if first.ndim != 4 or not sizes_fit:
        raise InputError(f"{path}: not an RRDBNet: {features} features, {blocks} blocks, {growth} growth")
    if first.shape[1] == 12:
        raise InputError(f"{path}: an RRDBNet for a factor of 2; this project needs one for a factor of 4")
    return weights


def esrgan_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the ESRGAN repository's key names; keys of no known family are left alone."""
    if "model.0.weight" in weights:
        blocks = 1 + max((int(m[1]) for k in weights if (m := re.match(r"model\.1\.sub\.(\d+)\.RDB", k))), default=-1)

        def rename(key: str) -> str:
            key = re.sub(r"(RDB\d\.conv\d)\.0\.", r"\1.", key)
            key = key.replace(f"model.1.sub.{blocks}.", "trunk_conv.").replace("model.1.sub.", "RRDB_trunk.")
            module, _, kind = key.rpartition(".")
            return f"{FIRST_RELEASE_NAMES.get(module, module)}.{kind}"
    elif "conv_body.weight" in weights:

        def rename(key: str) -> str:
            module, _, rest = key.partition(".")
            return f"{BASICSR_NAMES.get(module, module)}.{rest}".replace(".rdb", ".RDB")
    else:
        return weights
    return {rename(key): tensor for key, tensor in weights.items()}


def generator_size(weights: dict[str, Tensor]) -> tuple[int, int, int]:
    """(features, blocks, growth) of the RRDBNet whose state dict this is."""
    blocks = 1 + max((int(m[1]) for k in weights if (m := re.match(r"RRDB_trunk\.(\d+)\.", k))), default=-1)
    sizes = [weights.get(key, torch.empty(0)) for key in ("conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight")]
    features, growth = (tensor.shape[0] if tensor.ndim else 0 for tensor in sizes)
    return features, blocks, growth


def load_strictly(module: torch.nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Copies `weights` into `module`, in the module's precision: every key and every shape has to agree.

    BatchNorm's count of batches may be missing: it plays no part in evaluation.

    Raises:
        InputError: names the file and the first key or shape that differs.
    """
    own, weights = bare(module.state_dict()), bare(weights)
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    starts = starts_of(weights, needed[:1])
    starts = [start for start in starts if all(start + key in weights for key in needed)] or starts[:1]
    if starts and starts[0]:
        weights = part_of(weights, starts, path)
    for key, tensor in own.items():
        if key not in weights and key not in needed:
            continue
        if key not in weights:
            raise InputError(f"{path}: {key} is missing (expected {list(tensor.shape)})")
        if weights[key].shape != tensor.shape:
            raise InputError(f"{path}: {key} is {list(weights[key].shape)}, expected {list(tensor.shape)}")
        if not torch.isfinite(weights[key].to(tensor.dtype)).all():
            raise InputError(f"{path}: {key} holds values that are not finite")
    for key in weights:
        if key not in own:
            raise InputError(f"{path}: {key} is not a part of this network")
    for key, tensor in weights.items():
        own[key].copy_(tensor)


def refuse_unwritable_weights(path: str | Path, key: str) -> None:
    """Raises InputError where `save_file` can't write to `path`, the value of the parameter `key`, now."""
    if os.path.realpath(path) == os.path.realpath(SHIPPED):
        raise InputError(f"{path} comes with the project and is not written over: change {key}")
    if Path(path).suffix == ".safetensors":
        raise InputError(f"{path}: weights are written as torch does: change {key} to .pt, and --export it later")
    refuse_unwritable(path, key)


def save_file(contents: object, path: str | Path) -> None:
    """`torch.save` that leaves either the old file or the whole new one, whenever it is killed.

    Raises:
        OSError: no space, no permission; the old file stands.
    """
    write_atomically(path, lambda file: save_to(file, contents))


def save_to(file: BinaryIO, contents: object) -> None:
    """`torch.save` that says why a write failed: torch reports a full disk as a fault of its own."""
    try:
        torch.save(contents, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
