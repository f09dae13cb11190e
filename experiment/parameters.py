"""parameters.json, read once and checked before any work; the command line and exit codes that all scripts share.

No torch here: the samplers start without it.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, TextIO, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    model_validator,
)

from models.errors import InputError, OneProcessError


def expanded(text: str) -> str:
    """`text` with a home folder for the ~ or ~user that it begins with.

    Raises:
        ValueError: there is no such home.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"{shown(path)}: no such home folder; write ./{shown(path)} if that is the name")
    return path


Seed = Annotated[int, Field(ge=0, lt=2**32)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
Probability = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\x00]+$"), AfterValidator(expanded)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
LONGEST_LINE = 2000  # characters of a message
Interpolation = Literal["bilinear", "bicubic", "nearest"]
Precision = Literal["auto", "bf16", "fp16", "float32"]


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class RandomReductionSection(Section):
    """The arguments of models.scaler.RandomReduction."""

    share: Probability = 1.0
    scale: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)] = [0.16, 0.5]
    interpolation: Annotated[list[Interpolation], Field(min_length=1)] = ["bilinear", "bicubic"]
    antialias: Annotated[list[bool], Field(min_length=1)] = [False, True]
    jpeg_probability: Probability = 0.3
    jpeg_quality: Annotated[list[Annotated[int, Field(ge=1, le=95)]], Field(min_length=2, max_length=2)] = [40, 95]

    @model_validator(mode="after")
    def lowest_first(self) -> "RandomReductionSection":
        for key in ("scale", "jpeg_quality"):
            if getattr(self, key)[0] > getattr(self, key)[1]:
                raise ValueError(f"{key} has to hold the lowest and the highest value, in this order")
        return self


class TransformationsSection(Section):
    scale: Annotated[float, Field(gt=0, le=1)] = 0.32
    resize_size: Pixels = 256
    train_crop_size: Pixels = 256
    val_crop_size: Pixels = 256
    random_horizontal_flip_probability: Probability = 0.5
    random_vertical_flip_probability: Probability = 0.1
    interpolation: Interpolation = "bilinear"
    antialias: bool = False
    random_reduction: RandomReductionSection | None = None

    @model_validator(mode="after")
    def crops_fit(self) -> "TransformationsSection":
        for key in ("train_crop_size", "val_crop_size"):
            if getattr(self, key) > self.resize_size:
                raise ValueError(f"{key} {getattr(self, key)} is larger than resize_size {self.resize_size}")
        return self


class LossSection(Section):
    """The weights of experiment.distillation.TERMS."""

    logits: Weight = 1.0
    pixels: Weight = 0.0
    features: Weight = 0.0
    maps: Weight = 0.0

    @model_validator(mode="after")
    def not_all_zero(self) -> "LossSection":
        if not any(self.model_dump().values()):
            raise ValueError(f"at least one of {', '.join(type(self).model_fields)} has to be over 0")
        return self


class TrainingSection(Section):
    seed: Seed = 1337
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 8
    batches_per_epoch: Annotated[int, Field(ge=1)] | None = None
    shuffle: bool = True
    verbose: bool = True
    save: bool = True
    loss: LossSection = LossSection()
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    gradient_clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    clamp_gradient: bool = True
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Precision = "auto"
    compile: bool = True
    recompute: bool = False
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 10.0
    tensorboard: bool = False


class TestSection(Section):
    seed: Seed = 1337
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 60
    epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    batches_per_epoch: Annotated[int, Field(ge=1)] | None = None
    verbose: bool = True
    precision: Precision = "float32"


class DataSection(Section):
    train_original: Text = "assets/ImageNet2012_train_original"
    train: Text = "assets/ImageNet2012_train"
    val_original: Text = "assets/ImageNet2012_val_original"
    val: Text = "assets/ImageNet2012_val"
    test: Text = "assets/ImageNet2012_test"
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 0.15
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    seed: Seed = 2020
    workers: Annotated[int, Field(ge=0, le=256)] = 4


class ClassifierSection(Section):
    """The arguments of models.classifier.open_classifier."""

    architecture: Text = "resnet50"
    weights: Text | None = "IMAGENET1K_V1"
    mean: Channels | None = None
    std: Channels | None = None
    head: Text | None = None
    maps: Annotated[list[Text], Field(min_length=1)] | None = None

    def describe(self) -> str:
        return f"{self.architecture}, {self.weights or 'its own weights'}"


class DarioNetSection(Section):
    features: Annotated[int, Field(ge=1, le=1024)] = 64
    blocks: Annotated[int, Field(ge=1, le=200)] = 23
    growth: Annotated[int, Field(ge=1, le=1024)] = 32
    initial_weights: Text | None = "assets/models/RRDB_PSNR_x4.pth"
    weights: Text = "assets/models/DarioNet.pt"


def as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


def one_or_list(sections: list[ClassifierSection]) -> dict | list[dict]:
    dumped = [section.model_dump() for section in sections]
    return dumped[0] if len(dumped) == 1 else dumped


# One classifier, or a list: all are teachers in training, the first one is read by the other scripts.
Classifiers = Annotated[
    list[ClassifierSection], Field(min_length=1, max_length=10), BeforeValidator(as_list), PlainSerializer(one_or_list)
]


class Parameters(Section):
    """Every value of parameters.json; a key that a file leaves out has the value given here."""

    transformations: TransformationsSection = TransformationsSection()
    training: TrainingSection = TrainingSection()
    test: TestSection = TestSection()
    data: DataSection = DataSection()
    classifier: Classifiers = [ClassifierSection()]
    darionet: DarioNetSection = DarioNetSection()

    @model_validator(mode="after")
    def nothing_is_overwritten(self) -> "Parameters":
        written = os.path.realpath(self.darionet.weights)  # a link is written through
        others = {"darionet.initial_weights": self.darionet.initial_weights}
        others |= {f"classifier.weights ({c.architecture})": c.weights for c in self.classifier}
        for key, path in others.items():
            if path is not None and os.path.realpath(path) == written:
                raise ValueError(f"darionet.weights names the same file as {key}, which training would overwrite")
        return self


def read_parameters(path: str | Path, settings: list[str] = ()) -> Parameters:
    """The parameters of a JSON file, with `settings` such as "training.epochs=1" on top.

    Values of `settings` are JSON, else text; where the key takes text they are the text as it stands.

    Raises:
        InputError: one line with the file, the key, what was found and what is allowed.
    """
    try:
        contents = Path(path).read_bytes()  # json finds out which UTF it is, with or without a byte order mark
        values = json.loads(contents, object_pairs_hook=without_repetition, parse_constant=refuse_constant)
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
    wanted = kind_of(key)
    if takes(wanted, str) and not isinstance(value, str) and not (value is None and takes(wanted, NoneType)):
        value = text  # a folder may be called 2012
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise InputError(f"--set {shown(setting)}: {shown(section)} holds no keys of its own")
    values[last] = value


def kind_of(key: str) -> object:
    """The type of the parameter "section.key"; None where there is none."""
    kind = Parameters
    for name in key.split("."):
        kind = get_args(kind)[0] if get_origin(kind) is list else kind  # of the classifiers, one is set
        field = getattr(kind, "model_fields", {}).get(name)
        kind = field and field.annotation
    return kind


def takes(kind: object, other: type) -> bool:
    """Whether `kind` is the type `other`, or a choice of types that has it."""
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType, Annotated) else ()
    return kind is other or any(takes(one, other) for one in choices)


def first_line(error: ValidationError) -> str:
    """The first fault that pydantic found, on one line, and how many more there are."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    places = [name for i, name in enumerate(fault["loc"]) if not (i == 1 and fault["loc"][:2] == ("classifier", 0))]
    key = shown(".".join(map(str, places))) or "the file"
    if fault["type"] == "extra_forbidden":
        section = Parameters
        for name in (name for name in places[:-1] if isinstance(name, str)):
            kind = ClassifierSection if name == "classifier" else section.model_fields[name].annotation
            section = next((one for one in get_args(kind) if one is not NoneType), kind)
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
    """Says what is wrong with a command line in one line; `--help` has the rest. A home folder's ~ is expanded."""

    def parse_known_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        options = [re.fullmatch(r"(--[\w-]+=)?(.*)", one, re.DOTALL).groups("") for one in given]
        return super().parse_known_args([name + os.path.expanduser(value) for name, value in options], namespace)

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


TASKS = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE", "FLUX_JOB_SIZE")  # of mpirun


def refuse_tasks_without_torchrun() -> None:
    """Raises InputError where srun or mpirun started several tasks that know nothing of each other.

    Each would train alone, and the last one's weights would win. Shells and batch scripts are no tasks, even where the
    job that they stand in has room for several.
    """
    e = os.environ
    in_step = "SLURM_PROCID" in e and ("SLURM_STEP_ID" in e or e.get("ENVIRONMENT") != "BATCH")
    counts = [e.get("SLURM_STEP_NUM_TASKS", e.get("SLURM_NTASKS")) if in_step else None, *map(e.get, TASKS)]
    tasks = max(int(count) if (count or "").isdecimal() else 1 for count in counts)
    if tasks > 1 and e.get("WORLD_SIZE", "1") == e.get("LOCAL_WORLD_SIZE", "1"):  # torchrun on each by itself: the same
        raise InputError(
            f"{tasks} tasks were started, and each would work alone: start one (srun -n 1), with torchrun "
            f"--nproc_per_node={tasks} {Path(sys.argv[0]).name}; README.md has the command for several machines"
        )


class Unbroken:
    """A text stream that goes on in silence where nobody reads any more: `| head`, or a tee that Ctrl-C ended.

    A run's results do not depend on its audience. `stream` is any that a shell or a notebook gives, or None.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
        with contextlib.suppress(AttributeError, ValueError):  # a notebook's has no lines
            self.stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a file name may hold any bytes

    def write(self, text: str) -> int:
        self.attempt("write", text)
        return len(text)

    def flush(self) -> None:
        self.attempt("flush")

    def attempt(self, action: str, *text: str) -> None:
        try:
            getattr(self.stream, action)(*text)
        except UnicodeEncodeError:
            getattr(self.stream, action)(*(one.encode("ascii", "backslashreplace").decode() for one in text))
        except (OSError, ValueError):  # its reader or terminal is gone, its disk is full, it was closed
            silent = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
            with contextlib.suppress(AttributeError, OSError, ValueError):  # what is left in its buffer goes there too
                os.dup2(silent.fileno(), self.stream.fileno())
            self.stream = silent

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def hold_closed_descriptors() -> None:
    """Opens the null device in place of standard streams that are closed: else the next file gets their number.

    A message to standard error would then be written into a checkpoint.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def run_script(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits: 0, its own code, 2 for what the user can mend, 1 for a disk that fails, 130 for Ctrl-C."""
    script = Path(sys.argv[0]).name
    streams = sys.stdout, sys.stderr  # a notebook goes on after this script
    hold_closed_descriptors()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as scripts set it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    every_error = Unbroken(sys.stderr)
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes one prints
    sys.stdout = Unbroken(sys.stdout if first else None)
    sys.stderr = every_error if first or os.environ.get("LOCAL_RANK", "0") == "0" else sys.stdout  # one a machine
    try:
        code = main() or 0
    except InputError as error:
        stream = every_error if isinstance(error, OneProcessError) else sys.stderr
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
        line = remedy(error)
        if line is None:
            raise
        print(f"{script}: {line}", file=every_error)  # a fault of this process is shown, whichever it is
        code = 2
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams
    sys.exit(code)
