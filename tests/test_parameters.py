import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, one_line

from experiment.parameters import (
    Parameters,
    Unbroken,
    read_parameters,
    refuse_tasks_without_torchrun,
    remedy,
    run_script,
    script_parser,
)
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
    assert (p.classifier[0].architecture, p.classifier[0].weights) == ("resnet50", "IMAGENET1K_V1")


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


def value_of(parameters, key: str):
    """The parameter "section.key"; of the first classifier."""
    section, name = key.split(".")
    values = getattr(parameters, section)
    return getattr(values[0] if section == "classifier" else values, name)


@pytest.mark.parametrize(
    "text", ["2012", "1e5", "true", "null", '{"a": 1}', "[1]", "-0", "9" * 500, "NaN", "two words"]
)
@pytest.mark.parametrize("key", ["data.test", "classifier.architecture", "darionet.weights"])
def test_text_that_looks_like_json_stays_text(tmp_path, key, text):
    """Also "null", where nothing is no choice."""
    (tmp_path / "p.json").write_text("{}")
    assert value_of(read_parameters(tmp_path / "p.json", [f"{key}={text}"]), key) == text


def test_text_or_nothing(tmp_path):
    (tmp_path / "p.json").write_text("{}")
    for text, value in (("null", None), ("7", "7"), ('"null"', "null"), ('"7"', "7")):
        assert (
            read_parameters(tmp_path / "p.json", [f"darionet.initial_weights={text}"]).darionet.initial_weights == value
        )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_that_editors_write(tmp_path, encoding):
    (tmp_path / "p.json").write_text('{"data": {"train": "café"}}', encoding=encoding)
    assert read_parameters(tmp_path / "p.json").data.train == "café"


PLACES = ("data.train_original", "data.train", "data.val_original", "data.val", "data.test")
PLACES += ("classifier.weights", "classifier.architecture", "darionet.initial_weights", "darionet.weights")


@pytest.mark.parametrize("key", PLACES)
def test_home_folders(tmp_path, monkeypatch, key):
    """In the file and in --set; what a run saves has the whole path."""
    monkeypatch.setenv("HOME", "/home/me")
    section, name = key.split(".")
    (tmp_path / "p.json").write_text(json.dumps({section: {name: "~/a b.pt"}}))
    assert read_parameters(tmp_path / "p.json").model_dump()[section][name] == "/home/me/a b.pt"
    for text, path in (("~/b", "/home/me/b"), ("~", "/home/me"), ("a~/b", "a~/b"), ("./~x", "./~x")):
        assert read_parameters(tmp_path / "p.json", [f"{key}={text}"]).model_dump()[section][name] == path
    with pytest.raises(InputError, match=rf"{key}: ~nobodyatall/x: no such home folder"):
        read_parameters(tmp_path / "p.json", [f"{key}=~nobodyatall/x"])


def test_home_folders_on_the_command_line(monkeypatch):
    """A shell leaves the one in --parameters=~/p.json to the program."""
    monkeypatch.setenv("HOME", "/home/me")
    parser = script_parser("")
    parser.add_argument("image")
    for line in (["--parameters=~/p.json", "~/i.png"], ["--parameters", "~/p.json", "~/i.png"]):
        arguments = parser.parse_args([*line, "--set=data.val=~/x"])
        assert (arguments.parameters, arguments.image) == ("/home/me/p.json", "/home/me/i.png")
        assert arguments.set == ["data.val=~/x"]  # Parameters expands it


def test_one_file_under_two_names(tmp_path, monkeypatch):
    """Weights are written through a link: not over what the run starts from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.json").write_text("{}")
    (tmp_path / "link.pt").symlink_to("ESRGAN.pt")
    for name in ("./ESRGAN.pt", "link.pt", "~/ESRGAN.pt", f"{tmp_path}/ESRGAN.pt"):
        with pytest.raises(InputError, match="names the same file as darionet.initial_weights"):
            read_parameters("p.json", [f"darionet.weights={name}", "darionet.initial_weights=ESRGAN.pt"])


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
        ('{"transformations": {"random_reduction": {"x": 1}}}', ["random_reduction.x: unknown key", "share, scale"]),
        ('{"classifier": [{}, {"name": "x"}]}', ["classifier.1.name: unknown key", "architecture"]),
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


def test_settings_of_a_section_that_is_null(tmp_path):
    (tmp_path / "p.json").write_text('{"transformations": {"random_reduction": null}}')
    parameters = read_parameters(tmp_path / "p.json", ["transformations.random_reduction.share=0.5"])
    assert parameters.transformations.random_reduction.share == 0.5


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


class Bare:
    """A stream with write and flush alone; `error` is what they meet."""

    def __init__(self, error=None):
        self.error, self.text = error, ""

    def write(self, text):
        if self.error:
            raise self.error
        self.text += text

    def flush(self):
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "gone"), OSError(5, "no terminal"), OSError(28, "disk full"), ValueError("closed file")],
    ids=lambda e: str(e),
)
def test_streams_that_fail(error):
    stream = Unbroken(Bare(error))
    for _ in range(2):
        assert stream.write("unheard\n") == 8
        stream.flush()


def test_streams_that_are_no_files(monkeypatch):
    """None, a notebook's, text in memory; afterwards they are in place again, as %run needs them."""
    for stream in (None, Bare(), io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="ascii")):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        for code in (0, 7):
            with pytest.raises(SystemExit) as stop:
                run_script(lambda code=code: print("caf\u00e9 a\udcff") or code)
            assert stop.value.code == code and sys.stdout is stream and sys.stderr is stream
        if isinstance(stream, Bare):
            assert stream.text == "caf\u00e9 a\udcff\n" * 2


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full >/dev/full"])
def test_standard_streams_that_are_closed(tmp_path, closed):
    """The run goes on, and no message lands in the file that is opened next."""
    script = """
import os, sys
from experiment.parameters import run_script
def main():
    with open("result", "wb") as file:
        print("to standard output"); print("to standard error", file=sys.stderr)
        os.write(2, b"from a signal handler") if sys.argv[1] != "2>/dev/full >/dev/full" else None
        file.write(b"result")
    return 3
run_script(main)
"""
    command = f'"{sys.executable}" -c "$SCRIPT" "$CLOSED" {closed}'
    environment = os.environ | {"SCRIPT": script, "CLOSED": closed, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, shell=True, cwd=tmp_path, env=environment).returncode == 3
    assert (tmp_path / "result").read_bytes() == b"result"


def test_a_notebook_runs_a_script(tmp_path, monkeypatch):
    """%run, where standard output is the kernel's own stream, and goes on."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "parameters.json").write_text("{}")
    cells = [f"%run {ROOT / 'img_sampler_train.py'}", f"%run {ROOT / 'img_sampler_val.py'} --help", "print('goes on')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, kernel_name="python3", allow_errors=True).execute(cwd=str(tmp_path))
    said = ["".join(o.get("text", o.get("evalue", "")) for o in cell.outputs) for cell in notebook.cells]
    assert "assets/ImageNet2012_train_original" in said[0] and "--overwrite" in said[1] and said[2] == "goes on\n", said


STEP = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}
JOB_VARIABLES = [*STEP, "SLURM_STEP_NUM_TASKS", "ENVIRONMENT", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        (STEP, 4),  # srun -n 4
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, 4),
        (STEP | {"ENVIRONMENT": "BATCH", "SLURM_STEP_NUM_TASKS": "2"}, 2),  # srun -n 2 in a batch script
        (STEP | {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, 4),  # a torchrun for each, and none knows the others
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"PMI_SIZE": "3"}, 3),
        ({"FLUX_JOB_SIZE": "16"}, 16),
        ({}, None),
        ({"SLURM_NTASKS": "4"}, None),  # a shell of salloc
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell of srun --pty, or of salloc's interactive step
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "ENVIRONMENT": "BATCH"}, None),  # the batch script itself
        (STEP | {"SLURM_NTASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": ""}, None),
        (STEP | {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}, None),  # torchrun over four machines
        (STEP | {"WORLD_SIZE": "4"}, None),  # the variables of torchrun, set by hand
    ],
)
def test_tasks_without_torchrun(monkeypatch, variables, tasks):
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["somewhere/train_darionet.py"])
    if tasks is None:
        refuse_tasks_without_torchrun()
    else:
        with pytest.raises(InputError, match=rf"^{tasks} tasks .* torchrun --nproc_per_node={tasks} train_darionet.py"):
            refuse_tasks_without_torchrun()


@pytest.mark.parametrize("script", ["train_darionet", "test", "try_darionet"])
def test_every_script_refuses_tasks(start, experiment, monkeypatch, script):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    image = ["test/discs/0.png"] if script == "try_darionet" else []
    one_line(start(script, *image), "torchrun --nproc_per_node=4")
    assert not os.path.exists("assets")


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
