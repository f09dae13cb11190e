"""The one place that writes files: whenever it is killed, the old file or the whole new one stands. Needs no torch."""

import contextlib
import errno
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from models.errors import InputError

PARTIAL = ".partial"
PROCESS = uuid.uuid4().hex[:8]  # beside the pid, which another machine or container may have given too
# What network, FAT and bucket file systems say to calls that they don't know, or don't allow.
REFUSED = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(binary file)` on a hidden file of this process beside `path`, flushes it and renames it to `path`.

    Makes the folder; writes through a link. Removes the hidden file if it fails; a killed process leaves it.

    Raises:
        OSError: no space, no permission, no place for a file; the old file stands.
    """
    target = target_of(path)
    partial = partial_of(target)
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
        replace(partial, target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8, names that are no text as escapes."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def refuse_unwritable(path: str | Path, key: str) -> None:
    """Raises InputError if `path`, the value of the parameter `key`, can't be written now."""
    try:
        partial = partial_of(target_of(path))
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); change {key}") from None


def target_of(path: str | Path) -> Path:
    """Where `path` leads through links; makes its folder, and refuses to replace what is not a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    target = Path(os.path.realpath(path))
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(target.lstat().st_mode):
            raise OSError(errno.EINVAL, "a folder, a device or a link in a loop, not a file", str(path))
    return target


def partial_of(target: Path) -> Path:
    """The hidden name under which this thread of this process alone writes."""
    return target.with_name(f".{target.name[:40]}.{os.getpid()}-{threading.get_native_id()}-{PROCESS}{PARTIAL}")


def remove_partials(folder: Path) -> None:
    """Removes what killed processes left in a folder that nobody else writes to now."""
    for path in folder.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):
            path.unlink()


def replace(source: Path, target: Path) -> None:
    """`os.replace`; a copy if the file system can't rename over a file (buckets, mounted files)."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in REFUSED | {errno.EBUSY, errno.EXDEV}:
            raise
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)  # or the copy would go into its other hard links as well
        shutil.copyfile(source, target)
        source.unlink()
