"""The schema of parameters.json, and reading it: all of it is checked before any work. No torch here.

python -m experiment.parameters > docs/parameters.md
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from experiment.script import printable
from models.errors import InputError

SHIPPED = Path(__file__).parents[1] / "examples/photographs/parameters.json"


def expand_home(text: str) -> str:
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"{printable(path)}: no such home folder")
    return path


def entry(default: object, description: str, **limits):
    return Field(default, description=description, **limits)


PAIR, TRIPLE = {"min_length": 2, "max_length": 2}, {"min_length": 3, "max_length": 3}
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
Quality = Annotated[int, Field(ge=1, le=95)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Characters = StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\x00]+$")
Text = Annotated[str, Characters, AfterValidator(expand_home)]
Interpolation = Literal["bilinear", "bicubic", "nearest"]
Precision = Literal["auto", "bf16", "fp16", "float32"]


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def every_key_is_known(cls, values: object) -> object:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(f"{printable(key)}: unknown key; known here: {', '.join(cls.model_fields)}")
        return values


class RandomReductionSection(Section):
    """The arguments of models.scaler.RandomReduction."""

    share: Probability = entry(1.0, "Share of the batches that are reduced at random.")
    scale: list[Fraction] = entry([0.16, 0.5], "Each batch draws a scale between these.", **PAIR)
    interpolation: list[Interpolation] = entry(["bilinear", "bicubic"], "Each image draws one of these.", min_length=1)
    antialias: list[bool] = entry([False, True], "Each image draws one of these.", min_length=1)
    jpeg_probability: Probability = entry(0.3, "Probability that a small image is stored as a JPEG file.")
    jpeg_quality: list[Quality] = entry([40, 95], "Lowest and highest quality of these files.", **PAIR)
    webp_probability: Probability = entry(0.0, "Probability that a small image is stored as a WebP file.")
    webp_quality: list[Quality] = entry([40, 90], "Lowest and highest quality of these files.", **PAIR)


class TransformationsSection(Section):
    scale: Fraction = entry(0.32, "Side of the small image over the original's, rounded down: 256 gives 81.")
    resize_size: Pixels = entry(256, "Images are resized to this shorter side first, in pixels.")
    train_crop_size: Pixels = entry(256, "Training crops a random square of this side, in pixels.")
    val_crop_size: Pixels = entry(256, "Validation and test crop the central square of this side, in pixels.")
    random_horizontal_flip_probability: Probability = entry(0.5, "Training mirrors this share of the images.")
    random_vertical_flip_probability: Probability = entry(0.1, "Training turns this share of the images upside down.")
    interpolation: Interpolation = entry("bilinear", "Way of resizing: bilinear, bicubic or nearest.")
    antialias: bool = entry(False, "True filters images before they are made small; the published figures did not.")
    random_reduction: RandomReductionSection | None = entry(None, "`{}`: training draws how images are made small.")


class LossSection(Section):
    """The weights of experiment.distillation.TERMS."""

    logits: Weight = entry(1.0, "Weight of the mean squared error of the classifier's scores.")
    pixels: Weight = entry(0.0, "Weight of the mean absolute error of the pixels.")
    features: Weight = entry(0.0, "Weight of the mean squared error of the last layer's inputs.")
    maps: Weight = entry(0.0, "Weight of the mean squared error of several layers' maps, each over its variance.")


class ClassifierSection(Section):
    """The arguments of models.classifier.open_classifier."""

    architecture: Text = entry("resnet50", "A torchvision name, `timm/NAME`, or `FILE.py:FUNCTION`.")
    weights: Text | None = entry("IMAGENET1K_V1", "A file, torchvision's name, or `pretrained` (timm); null: none.")
    mean: list[float] | None = entry(None, "The normalisation's mean per channel; null: the weights' own.", **TRIPLE)
    std: list[float] | None = entry(None, "Its deviation per channel; null as for the mean.", **TRIPLE)
    head: Text | None = entry(None, "Name of the last layer; null finds it.")
    maps: list[Text] | None = entry(None, "Names of the layers of `training.loss.maps`; null finds them.", min_length=1)

    def describe(self) -> str:
        return f"{self.architecture}, {self.weights or 'its own weights'}"


class TrainingSection(Section):
    seed: Seed = entry(1337, "Seed of the weights, the order and the augmentation.")
    batch_size: BatchSize = entry(16, "Images per step and process.")
    learning_rate: Fraction = entry(1e-5, "Learning rate of Adam.")
    epochs: int = entry(8, "Number of epochs.", ge=1, le=100_000)
    batches_per_epoch: int | None = entry(None, "A number: each epoch takes that many random batches.", ge=1)
    shuffle: bool = entry(True, "True trains in a random order.")
    verbose: bool = entry(True, "True shows a progress bar.")
    save: bool = entry(True, "True writes `darionet.weights`.")
    loss: LossSection = entry(LossSection(), "The loss is the sum of these terms.")
    more_teachers: list[ClassifierSection] = entry([], "More sections like `classifier`, for training.", max_length=9)
    schedule: Literal["constant", "cosine"] = entry("constant", "`cosine` lowers the learning rate to 0 over the run.")
    warmup_steps: int = entry(0, "The learning rate rises from 0 over this many steps.", ge=0)
    gradient_clip_norm: float | None = entry(1.0, "Longer gradients are cut to this norm; null cuts none.", gt=0)
    clamp_gradient: bool = entry(True, "False passes the gradient of pixels outside [0,1].")
    adam_beta2: float = entry(0.999, "Second beta of Adam.", ge=0, lt=1)
    ema_decay: float | None = entry(None, "A number: the weights' running average is validated and saved.", gt=0, lt=1)
    precision: Precision = entry("auto", "bf16, fp16 or float32; auto takes what the device computes in hardware.")
    compile: bool = entry(True, "True uses torch.compile on GPUs.")
    recompute: bool = entry(False, "True recomputes every block in the backward pass: far less memory, slower.")
    checkpoint_minutes: float = entry(10.0, "A checkpoint is written this often within an epoch, and after it.", ge=0)
    tensorboard: bool = entry(False, "True writes a log for TensorBoard (`pip install tensorboard`).")


class TestSection(Section):
    seed: Seed = entry(1337, "Seed of the random batches and of the intervals.")
    batch_size: BatchSize = entry(60, "Images per batch.")
    epochs: int = entry(1, "Repeats the timing; with `batches_per_epoch`, each takes other images.", ge=1, le=1000)
    batches_per_epoch: int | None = entry(None, "A number: each epoch takes that many random batches.", ge=1)
    verbose: bool = entry(True, "True shows a progress bar.")
    precision: Precision = entry("float32", "Precision of the evaluation, as `training.precision`.")


class DataSection(Section):
    train_original: Text = entry("assets/ImageNet2012_train_original", "img_sampler_train.py reads this folder.")
    train: Text = entry("assets/ImageNet2012_train", "Training images; img_sampler_train.py writes them.")
    val_original: Text = entry("assets/ImageNet2012_val_original", "img_sampler_val.py reads this folder.")
    val: Text = entry("assets/ImageNet2012_val", "Validation images; img_sampler_val.py writes them.")
    test: Text = entry("assets/ImageNet2012_test", "Test images; img_sampler_val.py writes them.")
    train_fraction: Fraction = entry(0.15, "img_sampler_train.py keeps this share of every class.")
    val_fraction: float = entry(0.5, "img_sampler_val.py takes this share of every class for validation.", gt=0, lt=1)
    seed: Seed = entry(2020, "Seed of both samplers.")
    workers: int = entry(4, "Number of processes that read images.", ge=0, le=256)

    def refuse_training_on_held_out_images(self) -> None:
        """Raises InputError if data.train shares a folder with data.val or data.test, links followed."""
        trained = real_folders(self.train)
        for key in ("val", "test"):
            for folder in sorted(trained & real_folders(getattr(self, key))):
                raise InputError(f"data.{key}: {printable(folder, 300)} is also in data.train: keep their images apart")


class DarioNetSection(Section):
    features: int = entry(64, "Channels between the blocks.", ge=1, le=1024)
    blocks: int = entry(23, "Number of blocks (RRDB), at least those of initial_weights.", ge=1, le=200)
    growth: int = entry(32, "Channels that each convolution in a block adds.", ge=1, le=1024)
    initial_weights: Text | None = entry("assets/models/RRDB_PSNR_x4.pth", "A file or a published name; null: none.")
    weights: Text = entry("assets/models/DarioNet.pt", "Training writes this file, and the other scripts read it.")


class Parameters(Section):
    """Every value of parameters.json; a key that a file leaves out has the value given here."""

    transformations: TransformationsSection = entry(TransformationsSection(), "What is done to images.")
    training: TrainingSection = entry(TrainingSection(), "How train_darionet.py trains.")
    test: TestSection = entry(TestSection(), "How test.py evaluates.")
    data: DataSection = entry(DataSection(), "Folders of images, and how they are sampled and read.")
    classifier: ClassifierSection = entry(ClassifierSection(), "The frozen classifier.")
    darionet: DarioNetSection = entry(DarioNetSection(), "The network that rebuilds images.")

    @model_validator(mode="after")
    def values_agree(self) -> "Parameters":
        t, drawn, d = self.transformations, self.transformations.random_reduction, self.darionet
        for key in ("train_crop_size", "val_crop_size"):
            if getattr(t, key) > t.resize_size:
                raise ValueError(f"transformations.{key} {getattr(t, key)} is larger than resize_size {t.resize_size}")
        for key in ("scale", "jpeg_quality", "webp_quality") if drawn else ():
            if getattr(drawn, key)[0] > getattr(drawn, key)[1]:
                raise ValueError(f"transformations.random_reduction.{key} has to hold the lowest value first")
        if drawn and drawn.jpeg_probability + drawn.webp_probability > 1:
            raise ValueError("transformations.random_reduction: jpeg_probability and webp_probability add up to over 1")
        if not any(self.training.loss.model_dump().values()):
            raise ValueError(f"training.loss: at least one of {', '.join(LossSection.model_fields)} has to be over 0")
        read = {"darionet.initial_weights": d.initial_weights, "classifier.weights": self.classifier.weights}
        read |= {f"training.more_teachers.{i}.weights": c.weights for i, c in enumerate(self.training.more_teachers)}
        for key, path in read.items():  # a link is written through
            if path is not None and os.path.realpath(path) == os.path.realpath(d.weights):
                raise ValueError(f"darionet.weights names the same file as {key}, which training would overwrite")
        return self


def real_folders(root: str) -> set[str]:
    """The real paths of a folder and of all folders below it, links followed."""
    waiting, found = [os.path.realpath(root)], set()
    while waiting:
        folder = waiting.pop()
        if folder not in found and os.path.isdir(folder):
            found.add(folder)
            waiting += [os.path.realpath(inner) for inner in os.scandir(folder) if os.path.isdir(inner.path)]
    return found


def read_parameters(path: str | Path, settings: Sequence[str] = ()) -> Parameters:
    """The parameters of a JSON file, with `settings` such as "training.epochs=1" on top.

    Raises InputError: one line with the file, the key, what was found and what is allowed.
    """
    try:
        contents = Path(path).read_bytes()  # json finds out which UTF it is, with or without a byte order mark
        values = json.loads(contents, object_pairs_hook=refuse_repetition)
    except OSError as error:
        raise InputError(f"{path}: the parameters can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {printable(str(error), 200)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected an object with the sections {', '.join(Parameters.model_fields)}")
    if isinstance(values.get("classifier"), list):
        raise InputError(f"{path}: classifier is a list: the first stays, the others go to training.more_teachers")
    for setting in settings:
        override(values, setting)
    try:
        return Parameters.model_validate(values)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        more = f" (and {len(others)} more)" if others else ""
        raise InputError(f"{path}: {describe(first)}{more}") from None


def parameters_or_shipped(path: str | None, settings: Sequence[str], weights: Sequence[str] | None) -> Parameters:
    """The parameters; those of the shipped network if neither a file nor weights are named, and there are none yet."""
    parameters = read_parameters(path or "parameters.json", settings)
    if path is None and not weights and not os.path.isfile(parameters.darionet.weights) and SHIPPED.is_file():
        shipped = read_parameters(SHIPPED, settings)
        if os.path.isfile(shipped.darionet.weights):
            print(f"{parameters.darionet.weights} does not exist: taking {shipped.darionet.weights} and its classifier")
            return shipped
    return parameters


def refuse_repetition(pairs: list[tuple[str, object]]) -> dict:
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} stands twice in one object")
        values[key] = value
    return values


def override(values: dict, setting: str) -> None:
    """Writes "section.key=value" into `values`: the value as JSON, or as text if it is none."""
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise InputError(f"--set {printable(setting)}: expected KEY=VALUE, as in training.epochs=1")
    *sections, last = key.split(".")
    section = values
    for name in sections:
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise InputError(f"--set {printable(setting)}: {printable(name)} holds no keys of its own")
    try:
        section[last] = json.loads(text)
    except (ValueError, RecursionError):
        section[last] = text


def describe(fault: dict) -> str:
    """One of pydantic's errors on one line: the key path, what was found and what is allowed."""
    key = printable(".".join(map(str, fault["loc"])))
    if fault["type"] == "value_error":  # of a section, and then it begins with one of its keys; or of one value
        return f"{key}{'.' if isinstance(fault['input'], dict) else ': '}{fault['ctx']['error']}".removeprefix(".")
    try:
        found = json.dumps(fault["input"], default=str)
    except RecursionError:
        found = "values in values"
    return f"{key}: found {printable(found)}; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def reference() -> str:
    """docs/parameters.md."""
    return f"""# Parameters

    python train_darionet.py --parameters FILE --set training.epochs=1 --set data.train=photographs

Every script takes `--parameters FILE` (default: parameters.json) and `--set KEY=VALUE`, as often as you like. VALUE is
read as JSON; what is no JSON is text. Write a folder named 2012 as `./2012`, or it is a number. A key that the file
leaves out has its default. `python -m experiment.parameters > docs/parameters.md` writes this page.

| key | default | what it does |
|---|---|---|
{chr(10).join(rows_of(Parameters))}
"""


def rows_of(section: type[Section], prefix: str = "") -> Iterator[str]:
    """A row of the table per key of a section, and of the sections in it."""
    for name, field in section.model_fields.items():
        default = "" if isinstance(field.default, Section) else f"`{json.dumps(field.default)}`"
        yield f"| {prefix}{name} | {default} | {field.description} |"
        for kind in (field.annotation, *get_args(field.annotation)):  # get_args: of a section or null
            if isinstance(kind, type) and issubclass(kind, Section) and field.default != []:
                yield from rows_of(kind, f"{prefix}{name}.")


if __name__ == "__main__":
    print(reference(), end="")
