"""Reads and writes weight files: plain state dicts, never code.

ESRGAN's family stores the same network under three sets of key names; they are read into the ESRGAN repository's,
and what is written has those names.
"""

import contextlib
import errno
import hashlib
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from models.errors import InputError

LOCKS = os.name == "posix"
if LOCKS:
    import fcntl

PARTIAL = ".partial"
# SHA-256, or its beginning, of files that their owners publish under these names: mirrors have served others.
PUBLISHED = {
    "RRDB_PSNR_x4.pth": "f372b59f22929e1bc83fa58d78215c96f976de3b2eaeee736da1b348913da6cc",
    "RRDB_ESRGAN_x4.pth": "65fece06e1ccb48853242aa972bdf00ad07a7dd8938d2dcbdf4221b59f6372ce",
    "ESRGAN_SRx4_DF2KOST_official-ff704c30.pth": "ff704c30",
    "RealESRGAN_x4plus.pth": "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
}
WRAPPERS = ("params_ema", "params", "params-ema", "state_dict", "model_state_dict", "model", "net")
LARGEST = 1024  # features or growth of a generator
DEEPEST = 5  # wrappers within wrappers
PREFIXES = ("module.", "netG.", "layers.0.", "0.")
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
    """What `torch.save` wrote to `path`, on the CPU. Only tensors and plain values are read; code never runs.

    Raises:
        InputError: the file is absent, unreadable, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old forms; what can't be read raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path}: not a file of weights alone (it is no torch file, or it would run code)") from None
    except Exception as error:  # torch reports a damaged file as any of a dozen exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a readable weights file ({reason})") from None


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


def unwrap(contents: object, path: str | Path) -> dict[str, Tensor]:
    """The state dict inside `contents`, without the wrappers and prefixes that other projects add.

    Raises:
        InputError: there is none.
    """
    for _ in range(DEEPEST):
        inner = [contents[w] for w in WRAPPERS if isinstance(contents, dict) and isinstance(contents.get(w), dict)]
        if not inner:
            break
        contents = inner[0]
    if not isinstance(contents, dict) or not contents or not all(is_plain(k, v) for k, v in contents.items()):
        raise InputError(f"{path}: holds no state dict (a dictionary of tensors)")
    for _ in range(DEEPEST):
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in contents):
                contents = {key.removeprefix(prefix): tensor for key, tensor in contents.items()}
    return contents


def is_plain(key: object, value: object) -> bool:
    """Whether this is an entry of a state dict: a name, and a tensor with a place in memory for every value."""
    if not isinstance(key, str) or not isinstance(value, Tensor):
        return False
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def load_generator(path: str | Path) -> dict[str, Tensor]:
    """State dict of an RRDBNet x4 under the ESRGAN repository's key names, from a file of any of its three families.

    Raises:
        InputError: the file can't be read, is not what its name promises, or is not an RRDBNet x4.
    """
    contents = load_file(path)
    refuse_other_file(path, PUBLISHED.get(Path(path).name))
    weights = esrgan_names(unwrap(contents, path))
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
    """Copies `weights` into `module`: every key and every shape has to agree.

    Raises:
        InputError: names the file and the first key or shape that differs.
    """
    own = module.state_dict()
    for key, tensor in own.items():
        if key not in weights:
            raise InputError(f"{path}: {key} is missing (expected {list(tensor.shape)})")
        if weights[key].shape != tensor.shape:
            raise InputError(f"{path}: {key} is {list(weights[key].shape)}, expected {list(tensor.shape)}")
        if not torch.isfinite(weights[key]).all():
            raise InputError(f"{path}: {key} holds values that are not finite")
    for key in weights:
        if key not in own:
            raise InputError(f"{path}: {key} is not a part of this network")
    module.load_state_dict(weights)


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


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(binary file)` on a temporary file beside `path`, flushes it to the disk and renames it to `path`.

    The temporary file goes when that fails; one that a kill left behind goes at the next call for the same path.

    Raises:
        OSError: no space, no permission; the old file stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    descriptor, name = open_partial(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)  # mkstemp's 0600 would hide the file from the user's group
            if LOCKS:  # and while it is held: another process might take the closed file for a leftover
                os.replace(name, path)
        if not LOCKS:
            os.replace(name, path)
        flush_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """Makes a new name in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(path: str | Path) -> None:
    """Raises OSError where `write_atomically` could not write `path` now."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = open_partial(path)
    os.close(descriptor)
    os.unlink(name)


def open_partial(path: Path) -> tuple[int, str]:
    """Descriptor and name of a new file beside `path`, locked for as long as it is open: a leftover is not."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        if LOCKS:
            with contextlib.suppress(OSError):  # a file system without locks: leftovers stay there
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if Path(name).exists():  # else another process was quicker than the lock, and removed it
            return descriptor, name
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files of `path` that no process holds: a kill left them."""
    if not LOCKS:
        return
    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}.") and name.endswith(PARTIAL):
            with contextlib.suppress(OSError), (path.parent / name).open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path.parent / name)
