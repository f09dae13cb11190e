"""parameters.json, read once and checked before any work; the command line and exit codes that all scripts share.

No torch here: the samplers start without it.
"""

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from models.errors import InputError, OneProcessError

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
Probability = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\x00]+$")]
LONGEST_LINE = 2000  # characters of a message
Precision = Literal["auto", "bf16", "fp16", "float32"]


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Transformations(Section):
    scale: Annotated[float, Field(gt=0, le=1)] = 0.32
    resize_size: Pixels = 256
    train_crop_size: Pixels = 256
    val_crop_size: Pixels = 256
    random_horizontal_flip_probability: Probability = 0.5
    random_vertical_flip_probability: Probability = 0.1
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    antialias: bool = False

    @model_validator(mode="after")
    def crops_fit(self) -> "Transformations":
        for key in ("train_crop_size", "val_crop_size"):
            if getattr(self, key) > self.resize_size:
                raise ValueError(f"{key} {getattr(self, key)} is larger than resize_size {self.resize_size}")
        return self


class Loss(Section):
    logits: Weight = 1.0
    pixels: Weight = 0.0
    features: Weight = 0.0

    @model_validator(mode="after")
    def not_all_zero(self) -> "Loss":
        if not self.logits + self.pixels + self.features:
            raise ValueError("at least one of logits, pixels and features has to be over 0")
        return self


class Training(Section):
    seed: Seed = 1337
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 8
    batches_per_epoch: Annotated[int, Field(ge=1)] | None = None
    shuffle: bool = True
    verbose: bool = True
    save: bool = True
    loss: Loss = Loss()
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    gradient_clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Precision = "auto"
    compile: bool = True
    recompute: bool = False
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 10.0


class Test(Section):
    seed: Seed = 1337
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 60
    epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    batches_per_epoch: Annotated[int, Field(ge=1)] | None = None
    verbose: bool = True
    precision: Precision = "float32"


class Data(Section):
    train_original: Text = "ImageNet2012/train_original"
    train: Text = "ImageNet2012/train"
    val_original: Text = "ImageNet2012/val_original"
    val: Text = "ImageNet2012/val"
    test: Text = "ImageNet2012/test"
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 0.15
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    seed: Seed = 2020
    workers: Annotated[int, Field(ge=0, le=256)] = 4


class Classifier(Section):
    architecture: Text = "resnet50"
    weights: Text = "IMAGENET1K_V1"


class DarioNet(Section):
    features: Annotated[int, Field(ge=1, le=1024)] = 64
    blocks: Annotated[int, Field(ge=1, le=200)] = 23
    growth: Annotated[int, Field(ge=1, le=1024)] = 32
    initial_weights: Text | None = "assets/models/RRDB_PSNR_x4.pth"
    weights: Text = "assets/models/DarioNet.pt"


class Parameters(Section):
    """Every value of parameters.json; a key that a file leaves out has the value given here."""

    transformations: Transformations = Transformations()
    training: Training = Training()
    test: Test = Test()
    data: Data = Data()
    classifier: Classifier = Classifier()
    darionet: DarioNet = DarioNet()

    @model_validator(mode="after")
    def nothing_is_overwritten(self) -> "Parameters":
        written = os.path.normpath(self.darionet.weights)
        others = {"darionet.initial_weights": self.darionet.initial_weights}
        others["classifier.weights"] = self.classifier.weights
        for key, path in others.items():
            if path is not None and os.path.normpath(path) == written:
                raise ValueError(f"darionet.weights names the same file as {key}, which training would overwrite")
        return self


def read_parameters(path: str | Path, settings: list[str] = ()) -> Parameters:
    """The parameters of a JSON file, with `settings` such as "training.epochs=1" on top (values as JSON, else text).

    Raises:
        InputError: one line with the file, the key, what was found and what is allowed.
    """
    try:
        values = json.loads(
            Path(path).read_text(encoding="utf-8"), object_pairs_hook=without_repetition, parse_constant=refuse_constant
        )
    except OSError as error:
        raise InputError(f"{path}: the parameters can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {shown(str(error), 200)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected an object with the sections {', '.join(Parameters.model_fields)}")
    for setting in settings:
        override(values, setting)
    try:
        return Parameters.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {first_line(error)}") from None


def without_repetition(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return values


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON knows")


def override(values: dict, setting: str) -> None:
    """Writes "section.key=value" into `values`."""
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise InputError(f"--set {shown(setting)}: expected KEY=VALUE, as in training.epochs=1")
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        value = text
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {shown(setting)}: {shown(section)} holds no keys of its own")
    values[last] = value


def first_line(error: ValidationError) -> str:
    """The first fault that pydantic found, on one line, and how many more there are."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    key = shown(".".join(map(str, fault["loc"]))) or "the file"
    if fault["type"] == "extra_forbidden":
        section = Parameters
        for name in fault["loc"][:-1]:
            section = section.model_fields[name].annotation
        text = f"{key}: unknown key; known here: {', '.join(section.model_fields)}"
    elif fault["type"] == "value_error":
        text = f"{key}: {fault['ctx']['error']}" if fault["loc"] else str(fault["ctx"]["error"])
    else:
        try:
            found = json.dumps(fault["input"], default=str)
        except RecursionError:
            found = "values in values"
        text = f"{key}: found {shown(found)}; {fault['msg'][0].lower()}{fault['msg'][1:]}"
    return text + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")


def shown(text: str, longest: int = 60) -> str:
    """`text` for one line of a message: what can't be printed is escaped, and the end of what is long is left out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."


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


def remedy(error: Exception) -> str | None:
    """What to do about an error that only the machine's limits raise; None for any other, a fault of the program."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return "out of GPU memory: close what else uses it, or lower the batch size"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory: lower the batch size, the crop size or data.workers, or take a smaller network"
    return None


class Unbroken:
    """A text stream that goes on in silence where nobody reads any more: `| head`, or a tee that Ctrl-C ended.

    A run's results do not depend on its audience.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with self.quietly():
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.quietly():
            self.stream.flush()

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal of a connection that was lost
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def run_script(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits: 0, its own code, 2 for what the user can mend, 1 for a disk that fails, 130 for Ctrl-C."""
    script = Path(sys.argv[0]).name
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as scripts set it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes one prints
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")
        if os.environ.get("LOCAL_RANK", "0") != "0":  # and one a machine complains
            sys.stderr = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a file name may hold any bytes
    sys.stdout, sys.stderr = Unbroken(sys.stdout), Unbroken(sys.stderr)
    try:
        code = main() or 0
    except InputError as error:
        stream = sys.__stderr__ if isinstance(error, OneProcessError) else sys.stderr
        print(f"{script}: {shown(str(error), LONGEST_LINE)}", file=stream)
        code = 2
    except KeyboardInterrupt:
        print(f"{script}: stopped", file=sys.stderr)
        code = 130
    except OSError as error:
        line = f"{error.strerror or error}: {error.filename or 'the disk'}"
        print(f"{script}: {shown(line, LONGEST_LINE)}", file=sys.stderr)
        code = 1
    except Exception as error:
        sys.stderr = sys.__stderr__  # a fault of this process is shown, whichever it is
        line = remedy(error)
        if line is None:
            raise
        print(f"{script}: {line}", file=sys.stderr)
        code = 2
    sys.exit(code)
