"""What all scripts share: the command line, the standard streams and the exit codes.

No torch here: the samplers start without it.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from models.errors import InputError, OneProcessError

LONGEST_LINE = 2000  # characters of a message


class ArgumentParser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line; `--help` has the rest."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the options)")


def script_parser(description: str) -> ArgumentParser:
    """A parser with the two options that every script takes."""
    parser = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", metavar="FILE", help="default: parameters.json")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="change one parameter, as in training.epochs=1"
    )
    return parser


def printable(text: str, longest: int = 60) -> str:
    """`text` for a line of a message: escapes what can't be printed, and cuts the end of what is long."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."


def refuse_tasks_without_torchrun() -> None:
    """Raises InputError if srun or mpirun started several tasks: each would train alone, and the last would win."""
    e = os.environ
    tasks = e.get("SLURM_STEP_NUM_TASKS") or e.get("OMPI_COMM_WORLD_SIZE") or "1"
    if tasks != "1" and e.get("WORLD_SIZE", "1") == e.get("LOCAL_WORLD_SIZE", "1"):  # a torchrun for each is the same
        raise InputError(f"{tasks} tasks would each work alone: srun -n 1 torchrun --nproc_per_node={tasks} starts one")


class UnbrokenFile(io.FileIO):
    """A standard stream that drops what can't be written, without an error: `| head` has ended, the disk is full."""

    def write(self, data: bytes) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def unbroken(stream: TextIO | None, number: int) -> TextIO:
    """The standard stream of this number as an UnbrokenFile that escapes what is no text, such as some file names.

    A notebook's or a test's own stream stays.
    """
    if stream not in (None, sys.__stdout__, sys.__stderr__):
        return stream
    buffer = io.BufferedWriter(UnbrokenFile(number, "w", closefd=False))
    return io.TextIOWrapper(buffer, stream and stream.encoding, "backslashreplace", line_buffering=True)


def explain(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line of an error of the user's or the machine's; None if it is the program's."""
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped"
    if isinstance(error, OSError):
        return 1, f"{error.strerror or error}: {error.filename or 'the disk'}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return 2, "out of GPU memory: lower training.batch_size or test.batch_size, or close what else uses it"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return 2, "out of memory: lower the batch size, the crop size or data.workers"
    return None


def run_script(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits: 0 or its own code, 2 for what the user can mend, 1 if a disk fails, 130 after Ctrl-C."""
    # The number of a closed stream is taken, or the next file would get it, and messages would be written into it.
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup's stays
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes one prints
    output = unbroken(sys.stdout, 1) if first else open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
    errors = unbroken(sys.stderr, 2)
    first_here = first or os.environ.get("LOCAL_RANK", "0") == "0"  # one per machine prints its errors
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors if first_here else output):
        try:
            code = main() or 0
        except BaseException as error:
            if (found := explain(error)) is None:
                raise
            code, line = found
            any_process = isinstance(error, (OneProcessError, MemoryError, RuntimeError))
            line = f"{Path(sys.argv[0]).name}: {printable(line, LONGEST_LINE)}"
            print(line, file=errors if any_process else sys.stderr)
        finally:
            output.flush()
            errors.flush()
    sys.exit(code)
