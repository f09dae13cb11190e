"""parameters.json, --set, and what every script does with its command line, its streams and its exit codes."""

import contextlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, one_line

from experiment.parameters import Parameters, Section, read_parameters, reference
from experiment.script import refuse_tasks_without_torchrun, run_script
from models.darionet import trained_for
from models.errors import InputError, OneProcessError


@pytest.fixture
def read(tmp_path):
    """Calls read("{...}", "section.key=value", ...) -> Parameters."""

    def call(text: str, *settings: str) -> Parameters:
        (tmp_path / "p.json").write_text(text)
        return read_parameters(tmp_path / "p.json", settings)

    return call


def value_of(parameters: Parameters, key: str) -> object:
    section, name = key.split(".")
    return parameters.model_dump()[section][name]


def test_parameters_json_holds_every_default_and_these_are_the_published_ones():
    assert json.loads((ROOT / "parameters.json").read_text()) == Parameters().model_dump()
    p = Parameters()
    t = p.transformations
    assert (t.scale, t.resize_size, t.train_crop_size, t.val_crop_size) == (0.32, 256, 256, 256)
    assert (t.random_horizontal_flip_probability, t.random_vertical_flip_probability) == (0.5, 0.1)
    assert (p.training.seed, p.training.batch_size, p.training.learning_rate) == (1337, 16, 1e-5)
    assert (p.training.epochs, p.training.batches_per_epoch) == (8, None)
    assert (p.test.seed, p.test.batch_size, p.test.epochs, p.test.batches_per_epoch) == (1337, 60, 1, None)
    assert (p.data.train_fraction, p.data.val_fraction, p.data.seed) == (0.15, 0.5, 2020)
    assert (p.classifier.architecture, p.classifier.weights) == ("resnet50", "IMAGENET1K_V1")


def test_the_page_is_what_the_command_writes():
    assert (ROOT / "docs/parameters.md").read_text() == reference(), "python -m experiment.parameters writes it"
    for section in Section.__subclasses__():
        assert all(field.description for field in section.model_fields.values()), section


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/*.json")), ids=lambda path: path.parent.name)
def test_every_example_is_valid(path):
    read_parameters(path)


def test_settings_are_json_else_text(read):
    settings = ["training.epochs=3", "data.train=my photographs", "training.loss.pixels=0.5", "training.shuffle=false"]
    p = read('{"transformations": {"random_reduction": null}}', *settings, "transformations.random_reduction.share=0.5")
    assert (p.training.epochs, p.data.train, p.training.loss.pixels) == (3, "my photographs", 0.5)
    assert p.training.shuffle is False and p.transformations.random_reduction.share == 0.5


def test_values_are_json_or_else_text(read):
    for text, value in (("null", None), ("7.pt", "7.pt"), ('"7"', "7"), ("nul", "nul"), ("[a", "[a"), ("1e", "1e")):
        for key in ("darionet.initial_weights", "classifier.head"):
            assert value_of(read("{}", f"{key}={text}"), key) == value
    with pytest.raises(InputError, match="data.test: found 2012; .*valid string"):
        read("{}", "data.test=2012")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_that_editors_write(tmp_path, encoding):
    (tmp_path / "p.json").write_text('{"data": {"train": "café"}}', encoding=encoding)
    assert read_parameters(tmp_path / "p.json").data.train == "café"


PLACES = ("data.train_original", "data.train", "data.val_original", "data.val", "data.test")
PLACES += ("classifier.weights", "classifier.architecture", "darionet.initial_weights", "darionet.weights")


@pytest.mark.parametrize("key", PLACES)
def test_home_folders(read, monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/me")
    section, name = key.split(".")
    assert value_of(read(json.dumps({section: {name: "~/a b.pt"}})), key) == "/home/me/a b.pt"
    for text, path in (("~/b", "/home/me/b"), ("~", "/home/me"), ("a~/b", "a~/b"), ("./~x", "./~x")):
        assert value_of(read("{}", f"{key}={text}"), key) == path
    with pytest.raises(InputError, match=rf"{key}: ~nobodyatall/x: no such home folder"):
        read("{}", f"{key}=~nobodyatall/x")


def test_one_file_under_two_names(read, tmp_path, monkeypatch):
    """Training writes its weights through a link: not over what it starts from or learns from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link.pt").symlink_to("ESRGAN.pt")
    for name in ("./ESRGAN.pt", "link.pt", "~/ESRGAN.pt", f"{tmp_path}/ESRGAN.pt"):
        with pytest.raises(InputError, match="names the same file as darionet.initial_weights"):
            read("{}", f"darionet.weights={name}", "darionet.initial_weights=ESRGAN.pt")
    with pytest.raises(InputError, match="names the same file as training.more_teachers.0.weights"):
        read('{"training": {"more_teachers": [{"weights": "a.pt"}]}}', "darionet.weights=a.pt")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["not valid JSON"]),
        ("[]", ["expected an object"]),
        ('{"training": {"epoch": 3}}', ["training.epoch: unknown key", "epochs"]),
        ('{"nothing": 3}', ["json: nothing: unknown key; known here: transformations"]),
        ('{"training": {"epochs": 0}}', ["training.epochs: found 0", "greater than or equal to 1"]),
        ('{"training": {"epochs": "3"}}', ['training.epochs: found "3"', "valid integer"]),
        ('{"training": {"epochs": 0, "seed": -1}}', ["training.seed: found -1", "(and 1 more)"]),
        ('{"training": {"learning_rate": NaN}}', ["training.learning_rate: found NaN", "finite"]),
        ('{"training": {"loss": {"logits": 0}}}', ["training.loss", "over 0"]),
        ('{"transformations": {"val_crop_size": 300}}', ["val_crop_size 300 is larger than resize_size 256"]),
        ('{"transformations": {"interpolation": "area"}}', ["transformations.interpolation", "bilinear"]),
        ('{"transformations": {"random_reduction": {"x": 1}}}', ["random_reduction.x: unknown key", "share, scale"]),
        ('{"transformations": {"random_reduction": {"scale": [0.5, 0.2]}}}', ["random_reduction.scale", "lowest"]),
        ('{"transformations": {"random_reduction": {"webp_probability": 0.8}}}', ["webp_probability", "over 1"]),
        ('{"training": {"more_teachers": [{}, {"name": "x"}]}}', ["more_teachers.1.name: unknown key", "architecture"]),
        ('{"classifier": [{}, {}]}', ["classifier is a list: the first stays", "training.more_teachers"]),
        ('{"data": {"train": "a\\u0000b"}}', ["data.train"]),
        ('{"test": {"seed": 1, "seed": 2}}', ["'seed' stands twice"]),
        ('{"training": {"epochs": ' + "9" * 5000 + "}}", ["p.json"]),
    ],
)
def test_one_line_for_every_fault(read, tmp_path, text, parts):
    with pytest.raises(InputError) as error:
        read(text)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "p.json")) and "\n" not in message and len(message) < 500
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("training", "KEY=VALUE"),
        ("training.epochs.more=3", "holds no keys"),
        ("nothing.epochs=3", "nothing: unknown key"),
        ("training.epochs=many", 'found "many"'),
    ],
)
def test_settings_that_do_not_fit(read, setting, part):
    with pytest.raises(InputError, match=part):
        read('{"training": {"epochs": 1}}', setting)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("photos", "photos/val", "none"),  # the validation images are training images
        ("photos/val", "photos", "none"),
        ("photos", "none", "./photos/val/.."),
        ("link", "photos/val", "none"),
        ("photos", "link/val", "none"),
        ("photos", "elsewhere/a", "none"),  # photos/b leads to elsewhere
    ],
)
def test_training_on_held_out_images_is_refused(start, experiment, train, val, test):
    for folder in ("photos/val", "elsewhere/a"):
        Path(folder).mkdir(parents=True)
    Path("link").symlink_to("photos")
    Path("photos/b").symlink_to(experiment / "elsewhere")
    Path("photos/loop").symlink_to(experiment / "photos")
    settings = [f"--set=data.{key}={folder}" for key, folder in (("train", train), ("val", val), ("test", test))]
    key = "data.val" if test == "none" else "data.test"
    one_line(start("train_darionet", *settings), f"{key}: ", "is also in data.train: keep their images apart")
    assert not os.path.exists("assets")


@pytest.mark.parametrize("script", ["img_sampler_train", "img_sampler_val", "train_darionet", "test", "try_darionet"])
def test_every_script_refuses_in_one_line(script, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = ["image.png"] if script == "try_darionet" else []
    one_line(start(script, *image), "parameters.json", "can't be read")
    (tmp_path / "parameters.json").write_text('{"data": {"trian": "x"}}')
    one_line(start(script, *image), "parameters.json: data.trian: unknown key; known here: train_original, train")
    one_line(start(script, *image, "--sett", "x"), "--sett")


def run_in_shell(body: str, redirection: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script whose main has this body as a shell would."""
    script = "import os, sys, models.errors\nfrom experiment.script import run_script\n"
    script += f"def main():\n    {body}\nrun_script(main)"
    environment = os.environ | {"SCRIPT": script, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | environment
    command = ["bash", "-c", f'"$PYTHON" -c "$SCRIPT" {redirection}']
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_output_that_nobody_reads_any_more(tmp_path):
    """`| head`, or a tee that Ctrl-C ended: the run goes on in silence, to its own exit code."""
    body = "[print(i, flush=i % 2) for i in range(100_000)]; print(1, file=sys.stderr); open('end', 'w'); return 3"
    result = run_in_shell(body, "| head -n 1; exit ${PIPESTATUS[0]}", tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (3, "0\n", "1\n") and (tmp_path / "end").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full >/dev/full"])
def test_standard_streams_that_are_closed(tmp_path, closed):
    """No message lands in the file that is opened next."""
    body = "file = open('result', 'wb'); print('to standard output'); print('to standard error', file=sys.stderr); "
    body += "'full' in os.environ['CLOSED'] or os.write(2, b'from a signal handler'); file.write(b'result'); return 3"
    assert run_in_shell(body, closed, tmp_path, CLOSED=closed).returncode == 3
    assert (tmp_path / "result").read_bytes() == b"result"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_no_text_are_printed_as_escapes(tmp_path, encoding):
    result = run_in_shell("print('a\\udcff\u00e9')", "", tmp_path, PYTHONIOENCODING=encoding)
    assert result.returncode == 0 and result.stdout == f"a\\udcff{'é' if encoding == 'utf-8' else chr(92) + 'xe9'}\n"


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("return 7", 7, ""),
        ("raise models.errors.InputError('mend it')", 2, "-c: mend it\n"),
        ("raise KeyboardInterrupt", 130, "-c: stopped\n"),
        ("os.kill(os.getpid(), 2); import time; time.sleep(9)", 130, "-c: stopped\n"),
        ("open('absent')", 1, "-c: No such file or directory: absent\n"),
        ("raise MemoryError", 2, "-c: out of memory: lower the batch size, "),
        ("raise RuntimeError('. DefaultCPUAllocator: can\\'t allocate memory: you')", 2, "-c: out of memory: lower "),
        ("import torch; raise torch.OutOfMemoryError", 2, "-c: out of GPU memory: lower training.batch_size or "),
        ("raise ValueError('a fault of the program')", 1, "Traceback "),
    ],
)
def test_exit_codes(tmp_path, body, code, line):
    result = run_in_shell(body, "", tmp_path)
    assert result.returncode == code and result.stderr.startswith(line) and bool(result.stderr) == bool(line)
    assert line.startswith("Trace") or result.stderr.count("\n") == bool(line)


def test_one_of_several_processes_prints(capfd, monkeypatch):
    """The first one; an error that one process alone may have, from any; another error, from one per machine."""

    def main(error: Exception) -> None:
        print("begun")
        raise error

    for error, rank, local_rank, *expected in (
        (InputError("mend it"), "0", "0", "begun\n", "mend it\n"),
        (InputError("mend it"), "3", "1", "", ""),
        (InputError("mend it"), "2", "0", "", "mend it\n"),
        (OneProcessError("no GPU"), "3", "1", "", "no GPU\n"),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit, match="2"):
            run_script(partial(main, error))
        out, err = capfd.readouterr()
        assert [out, err.partition(": ")[2]] == expected


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


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, 4),  # srun -n 4
        ({"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, 4),  # a torchrun for each
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({}, None),
        ({"SLURM_NTASKS": "4"}, None),  # a shell of salloc, or a batch script
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, None),  # a shell of srun --pty
        ({"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}, None),  # torchrun, four machines
    ],
)
def test_tasks_without_torchrun(monkeypatch, variables, tasks):
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    message = rf"^{tasks} tasks .* torchrun --nproc_per_node={tasks}"
    with pytest.raises(InputError, match=message) if tasks else contextlib.nullcontext():
        refuse_tasks_without_torchrun()


def test_every_script_refuses_tasks(start, experiment, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    for call in (["train_darionet"], ["test"], ["try_darionet", "test/discs/0.png"]):
        one_line(start(*call), "torchrun --nproc_per_node=4")
        assert not os.path.exists("assets")


@pytest.mark.usefixtures("no_figures")
def test_more_teachers_concern_training_alone(start, experiment):
    """The other scripts read `classifier`, which --classifier and --set change."""
    more = 'training.more_teachers=[{"architecture": "resnet18", "weights": "classifier.pt", "head": "fc"}]'
    trained = start("train_darionet", "--set", more, "--set", "training.epochs=1")
    assert trained.code == 0 and trained.out.count("Classifier: resnet18, classifier.pt, frozen\n") == 2
    note = trained_for("DarioNet.pt")
    assert (note["classifier"]["head"], note["more_teachers"][0]["head"]) == (None, "fc")
    (experiment / "classifier.pt").rename("other.pt")
    tested = start("test", "--classifier", "other.pt", "--set", "classifier.head=fc", "--set", more)
    assert tested.code == 0 and "Classifier: resnet18, other.pt\n" in tested.out
