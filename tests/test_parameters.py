import json
import os

import pytest
from conftest import ROOT, one_line

from experiment.parameters import Parameters, Unbroken, read_parameters, remedy
from models.errors import InputError


def test_parameters_json_holds_every_default():
    assert json.loads((ROOT / "parameters.json").read_text()) == Parameters().model_dump()


def test_published_values():
    p = read_parameters(ROOT / "parameters.json")
    t = p.transformations
    assert (t.scale, t.resize_size, t.train_crop_size, t.val_crop_size) == (0.32, 256, 256, 256)
    assert (t.random_horizontal_flip_probability, t.random_vertical_flip_probability) == (0.5, 0.1)
    assert (p.training.seed, p.training.batch_size, p.training.learning_rate) == (1337, 16, 1e-5)
    assert (p.training.epochs, p.training.batches_per_epoch) == (8, None)
    assert (p.test.seed, p.test.batch_size, p.test.epochs, p.test.batches_per_epoch) == (1337, 60, 1, None)
    assert (p.data.train_fraction, p.data.val_fraction, p.data.seed) == (0.15, 0.5, 2020)
    assert (p.classifier.architecture, p.classifier.weights) == ("resnet50", "IMAGENET1K_V1")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*/*.json")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_every_example_is_valid(path):
    if path.name != "results.json":
        read_parameters(path)


def test_settings_are_json_else_text(tmp_path):
    (tmp_path / "p.json").write_text("{}")
    settings = ["training.epochs=3", "data.train=my photographs", "training.loss.pixels=0.5", "training.shuffle=false"]
    p = read_parameters(tmp_path / "p.json", [*settings, "darionet.initial_weights=null"])
    assert (p.training.epochs, p.data.train, p.training.loss.pixels) == (3, "my photographs", 0.5)
    assert p.training.shuffle is False and p.darionet.initial_weights is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["not valid JSON"]),
        ("[]", ["expected an object"]),
        ('{"training": {"epoch": 3}}', ["training.epoch: unknown key", "epochs"]),
        ('{"training": {"epochs": 0}}', ["training.epochs: found 0", "greater than or equal to 1"]),
        ('{"training": {"epochs": "3"}}', ['training.epochs: found "3"', "valid integer"]),
        ('{"training": {"epochs": true}}', ["training.epochs: found true"]),
        ('{"training": {"learning_rate": NaN}}', ["not valid JSON", "NaN"]),
        ('{"training": {"learning_rate": 1e999}}', ["training.learning_rate"]),
        ('{"training": {"loss": {"logits": 0}}}', ["training.loss", "over 0"]),
        ('{"transformations": {"val_crop_size": 300}}', ["val_crop_size 300 is larger than resize_size 256"]),
        ('{"transformations": {"interpolation": "area"}}', ["transformations.interpolation", "bilinear"]),
        ('{"data": {"train": ""}}', ["data.train"]),
        ('{"data": {"train": "a\\u0000b"}}', ["data.train"]),
        ('{"test": {"seed": 1, "seed": 2}}', ["'seed' stands twice"]),
        ("[" * 100_000, ["not valid JSON"]),
        ('{"training": {"epochs": ' + "9" * 5000 + "}}", ["p.json"]),
    ],
)
def test_one_line_for_every_fault(tmp_path, text, parts):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(InputError) as error:
        read_parameters(tmp_path / "p.json")
    message = str(error.value)
    assert message.startswith(str(tmp_path / "p.json")) and "\n" not in message and len(message) < 500
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("training", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("training.epochs.more=3", "holds no keys"),
        ("nothing.epochs=3", "nothing: unknown key"),
        ("training.epochs=NaN", 'found "NaN"'),
    ],
)
def test_settings_that_do_not_fit(tmp_path, setting, part):
    (tmp_path / "p.json").write_text('{"training": {"epochs": 1}}')
    with pytest.raises(InputError, match=part):
        read_parameters(tmp_path / "p.json", [setting])


SCRIPTS = ["img_sampler_train", "img_sampler_val", "train_darionet", "test", "try_darionet"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_in_one_line(script, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = ["image.png"] if script == "try_darionet" else []
    one_line(start(script, *image), "parameters.json", "can't be read")
    (tmp_path / "parameters.json").write_text('{"data": {"trian": "x"}}')
    one_line(start(script, *image), "parameters.json: data.trian: unknown key; known here: train_original, train")
    one_line(start(script, *image, "--sett", "x"), "--sett")


def test_output_that_nobody_reads_any_more():
    """`| head`, or a tee that Ctrl-C ended: the run goes on in silence."""
    reader, writer = os.pipe()
    stream = Unbroken(os.fdopen(writer, "w"))
    stream.write("heard\n")
    stream.flush()
    assert os.read(reader, 100) == b"heard\n"
    os.close(reader)
    for _ in range(2):
        stream.write("unheard\n")
        stream.flush()


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (MemoryError(), "lower the batch size"),
        (
            RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"),
            "lower the batch size",
        ),
        (RuntimeError("a fault of the program"), None),
    ],
)
def test_what_the_machine_cannot_do(error, part):
    line = remedy(error)
    assert line is None if part is None else part in line and "\n" not in line
