"""The one place that writes files: whenever it is killed, the old file or the whole new one stands. Needs no torch.

What a file system refuses and a file can do without (flushes, renames over an old file) is left out.
"""

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

    Folders are made; a link is written through, to where it leads. The hidden file goes when that fails; a killed
    process leaves one a thread at most.

    Raises:
        OSError: no space, no permission, a broken link; the old file stands.
    """
    target = target_of(path)
    partial = partial_of(target)
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            flush_to_disk(file.fileno())
        replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    with contextlib.suppress(OSError):  # the new name should survive a power cut too
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8, names that are no text as escapes."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def check_writable(path: str | Path) -> None:
    """Raises OSError where `write_atomically` could not write `path` now."""
    partial = partial_of(target_of(path))
    partial.touch()
    partial.unlink()


def refuse_unwritable(path: str | Path, key: str) -> None:
    """Raises InputError where `path`, the value of the parameter `key`, can't be written now."""
    try:
        check_writable(path)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); change {key}") from None


def target_of(path: str | Path) -> Path:
    """Where `path` leads, in a folder that is there.

    Raises:
        OSError: that is no place for a file.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        reason = "a file or a broken link stands where a folder should"
        raise NotADirectoryError(errno.ENOTDIR, reason, str(path.parent)) from None
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"a link to a folder that is not there, {target.parent}", str(path))
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(target).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "a link in a loop, a device or a pipe, not a file", str(path))
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
    """`os.replace`; where the file system can't rename over a file (buckets, mounted files), a copy in its place."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in REFUSED | {errno.EBUSY, errno.EXDEV}:
            raise
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)  # or the copy would go into its other hard links as well
        shutil.copyfile(source, target)
        source.unlink()


def flush_to_disk(descriptor: int) -> None:
    """`os.fsync`, where the file system knows it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
