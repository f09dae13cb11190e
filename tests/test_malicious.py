"""A pickle that would run code, given to everything that loads weights or checkpoints: it never runs."""

import contextlib
import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw, one_line

from experiment.run import FILE, PREVIOUS
from models.errors import InputError
from models.weights import load_file


class RunsMkdir:
    def __reduce__(self):
        return Path.mkdir, (Path("canary").absolute(),)


class RunsExec:
    def __reduce__(self):
        return exec, ("import os; os.mkdir('canary')",)


class RunsInState:  # harmless to build, not to fill
    def __reduce__(self):
        return dict, (), None, None, iter([("a", RunsMkdir())])


class RunsWhenFilled:  # its own method would run when its attributes are set
    def __init__(self):
        self.canary = "canary"

    def __setstate__(self, state):
        Path(state["canary"]).mkdir()


class RunsNumpy:  # a function of a package whose numbers are read
    def __reduce__(self):
        return np.save, ("canary", 0)


def saved(contents: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file, **options)
    return file.getvalue()


def files() -> list[bytes]:
    """Each payload in each of the forms that torch.load knows, where a state dict would hold a tensor."""
    found = []
    for payload in (RunsMkdir(), RunsExec(), RunsInState()):
        state = {"conv_first.weight": payload, "network": payload, "version": 1}
        found += [saved(state), saved(payload), saved(state, _use_new_zipfile_serialization=False)]
        found += [pickle.dumps(state, protocol) for protocol in (2, 4)]
    return found


def test_the_payloads_are_armed(tmp_path, monkeypatch):
    """They do run where code is allowed to: otherwise the canary would prove nothing."""
    monkeypatch.chdir(tmp_path)
    for contents in files():
        with contextlib.suppress(Exception):  # a bare pickle is no torch file, which shows after it ran
            torch.load(io.BytesIO(contents), weights_only=False)
        Path("canary").rmdir()


def refuse_all(start, path: Path, *calls: list[str]) -> None:
    """Every call refuses every payload at this path in one line, and runs no code."""
    draw("discs", 1).save("a.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    for contents in files():
        path.write_bytes(contents)
        for call in calls:
            one_line(start(*call), path.name, "not a")
            assert not Path("canary").exists()


PLACES = {
    "train_darionet": ["darionet.initial_weights", "classifier.weights"],
    "test": ["darionet.weights", "--weights", "darionet.initial_weights", "classifier.weights", "--classifier"],
    "try_darionet a.png": ["darionet.weights", "--weights", "classifier.weights"],
}


@pytest.mark.parametrize(("script", "place"), [(script, place) for script in PLACES for place in PLACES[script]])
@pytest.mark.usefixtures("no_figures")
def test_weights(start, trained, script, place):
    options = [place, "bad.pt"] if place.startswith("--") else ["--set", f"{place}=bad.pt"]
    refuse_all(start, Path("bad.pt"), [*script.split(), *options])


@pytest.mark.parametrize("form", ["named", "newest", "previous"])
def test_checkpoints(start, experiment, form):
    """With the right checksum: whoever writes the payload can write that too."""
    folder = Path("assets/logs/train_20260101-000000")
    folder.mkdir(parents=True)
    shutil.copy("parameters.json", folder)
    call = ["train_darionet", "--resume", *([str(folder)] if form == "named" else [])]
    refuse_all(start, folder / (PREVIOUS if form == "previous" else FILE), call)


def test_a_download_folder(start, trained, monkeypatch):
    """Of torchvision's weights: whoever puts a file there can give it any name."""
    monkeypatch.setenv("TORCH_HOME", str(trained))
    options = ["--set", "classifier.architecture=squeezenet1_1", "--set", "classifier.weights=IMAGENET1K_V1"]
    calls = [[*call, *options] for call in (["train_darionet"], ["test"], ["try_darionet", "a.png"])]
    refuse_all(start, trained / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth", *calls)


@pytest.mark.parametrize("payload", [RunsWhenFilled(), RunsNumpy(), RunsMkdir(), RunsExec(), RunsInState()])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_beside_whole_weights(tmp_path, monkeypatch, payload, options):
    """Refused, and the canary never fires."""
    monkeypatch.chdir(tmp_path)
    contents = saved({"state_dict": {"weight": torch.ones(3)}, "args": payload}, **options)
    torch.load(io.BytesIO(contents), weights_only=False)
    armed = [path.name for path in tmp_path.iterdir()]
    assert len(armed) == 1 and armed[0].startswith("canary")
    Path(armed[0]).rename("fired")
    Path("bad.pt").write_bytes(contents)
    with pytest.raises(InputError, match="would run code"):
        load_file("bad.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"fired", "bad.pt"}
