import argparse
import collections
import datetime
import decimal
import fractions
import hashlib
import io
import os
import pathlib
import pickle
import shlex
import stat
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from models.darionet import build_darionet, load_rrdbnet, load_upscalers, note_of, row_name, trained_for, write_note
from models.errors import InputError
from models.rrdbnet import RRDBNet
from models.weights import PUBLISHED, generator_size, load_file, load_generator, load_strictly, save_file, unwrap


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return RRDBNet(8, 3, 4).state_dict()


def basicsr_names(weights: dict) -> dict:
    """The ESRGAN repository's names turned into BasicSR's, by the table of both projects."""
    top = {"RRDB_trunk": "body", "trunk_conv": "conv_body", "upconv1": "conv_up1", "upconv2": "conv_up2"}
    top |= {"HRconv": "conv_hr"}
    renamed = {}
    for key, tensor in weights.items():
        first, rest = key.split(".", 1)
        renamed[f"{top.get(first, first)}.{rest.replace('RDB', 'rdb')}"] = tensor
    return renamed


def first_release_names(weights: dict, blocks: int) -> dict:
    top = {"conv_first": "model.0", "trunk_conv": f"model.1.sub.{blocks}", "upconv1": "model.3", "upconv2": "model.6"}
    top |= {"HRconv": "model.8", "conv_last": "model.10"}
    renamed = {}
    for key, tensor in weights.items():
        first, rest = key.split(".", 1)
        if first == "RRDB_trunk":
            index, block, conv, kind = rest.split(".")
            renamed[f"model.1.sub.{index}.{block}.{conv}.0.{kind}"] = tensor
        else:
            renamed[f"{top[first]}.{rest}"] = tensor
    return renamed


@pytest.mark.parametrize("family", ["own", "basicsr", "first release"])
@pytest.mark.parametrize("wrapper", [None, "params_ema", "state_dict", "module.", "layers.0."])
def test_every_family_and_wrapper_is_read(weights, family, wrapper, tmp_path):
    stored = {"own": weights, "basicsr": basicsr_names(weights), "first release": first_release_names(weights, 3)}[
        family
    ]
    if wrapper and wrapper.endswith("."):
        stored = {wrapper + key: tensor for key, tensor in stored.items()}
    elif wrapper:
        stored = {"step": 3, "params": {"old": torch.ones(1)}, wrapper: stored}
        if wrapper != "params_ema":
            del stored["params"]
    torch.save(stored, tmp_path / "w.pth")
    network = load_rrdbnet(str(tmp_path / "w.pth"))
    assert generator_size(network.state_dict()) == (8, 3, 4)
    for key, tensor in weights.items():
        assert network.state_dict()[key].equal(tensor), key


def test_what_is_written_has_the_published_names(weights, tmp_path):
    save_file(weights, tmp_path / "out.pt")
    stored = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(stored) == list(weights)


def refused(contents, tmp_path, *parts: str, loader=load_rrdbnet) -> None:
    torch.save(contents, tmp_path / "w.pth")
    with pytest.raises(InputError) as error:
        loader(str(tmp_path / "w.pth"))
    message = str(error.value)
    assert "w.pth" in message and "\n" not in message
    for part in parts:
        assert part in message


def test_each_thing_that_can_be_wrong_is_named(weights, tmp_path):
    refused(weights | {"trunk_conv.weight": torch.ones(8, 9, 3, 3)}, tmp_path, "trunk_conv.weight is [8, 9, 3, 3]")
    refused({k: v for k, v in weights.items() if k != "HRconv.bias"}, tmp_path, "HRconv.bias is missing")
    refused(weights | {"extra.weight": torch.ones(1)}, tmp_path, "extra.weight is not a part")
    refused(weights | {"conv_last.bias": torch.tensor([0, float("nan"), 0])}, tmp_path, "conv_last.bias", "not finite")
    refused(weights | {"conv_first.weight": torch.ones(8, 12, 3, 3)}, tmp_path, "factor of 2")
    refused({"fc.weight": torch.ones(2)}, tmp_path, "not an RRDBNet", "fc.weight")
    refused([1, 2], tmp_path, "no state dict")
    refused({}, tmp_path, "no state dict")


def test_odd_state_dicts_are_refused(weights, tmp_path):
    loop: dict = {}
    loop["model"] = loop
    refused(loop, tmp_path, "no state dict")
    refused({3: torch.ones(1)}, tmp_path, "no state dict")
    first = "conv_first.weight"
    for tensor in (torch.ones(8, 3, 3, 3).to_sparse(), torch.ones(1).expand(10**6), torch.ones(3, device="meta")):
        refused(weights | {first: tensor}, tmp_path, "no state dict")
    refused(weights | {first: torch.tensor(1.0)}, tmp_path, "not an RRDBNet")
    refused(weights | {"RRDB_trunk.999999999.x": torch.ones(1)}, tmp_path, "not an RRDBNet", "1000000000 blocks")
    refused(weights | {first: torch.ones(2000, 3, 3, 3)}, tmp_path, "not an RRDBNet", "2000 features")


def test_another_file_under_a_published_name(weights, tmp_path, monkeypatch):
    torch.save(weights, tmp_path / "RealESRGAN_x4plus.pth")
    with pytest.raises(InputError, match=r"RealESRGAN_x4plus\.pth: not the file published .* not 4fa0d389"):
        load_rrdbnet(str(tmp_path / "RealESRGAN_x4plus.pth"))
    own = hashlib.sha256((tmp_path / "RealESRGAN_x4plus.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, "RealESRGAN_x4plus.pth", own)
    assert load_rrdbnet(str(tmp_path / "RealESRGAN_x4plus.pth"))


def test_initial_weights_of_another_size(weights, tmp_path):
    refused(weights, tmp_path, "(8, 3, 4)", "(8, 2, 4)", loader=lambda path: build_darionet(8, 2, 4, path))


@pytest.mark.parametrize(
    "contents", [b"", b"not weights", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(50)]
)
def test_files_that_are_no_weights(contents, tmp_path):
    (tmp_path / "w.pth").write_bytes(contents)
    with pytest.raises(InputError, match=r"w\.pth: not a"):
        load_file(tmp_path / "w.pth")


def test_a_truncated_file_is_refused(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a"):
        load_generator(tmp_path / "w.pth")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_inside_a_pickle_never_runs(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"state_dict": Canary(canary)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Canary(canary)))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(InputError, match="would run code"):
            load_file(tmp_path / name)
    assert not canary.exists()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(weights, tmp_path, monkeypatch):
    save_file(weights, tmp_path / "w.pt")
    before = (tmp_path / "w.pt").read_bytes()

    def no_space(contents, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(OSError, match="No space"):
        save_file({"other": torch.ones(3)}, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_saved_files_have_the_users_mode(weights, tmp_path):
    before = os.umask(0o027)
    try:
        save_file(weights, tmp_path / "w.pt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.pt").stat().st_mode) == 0o640


def test_names_of_the_initial_weights(weights, tmp_path):
    path = tmp_path / "RRDB_PSNR_x4.pt"
    save_file(weights, path)
    assert row_name(str(path)) == "ESRGAN"
    for loss, name in (({"logits": 0, "pixels": 1}, "Pixels"), ({"logits": 1, "pixels": 0}, "DarioNet")):
        write_note(path, {"loss": loss})
        assert row_name(str(path)) == name


def test_a_note_belongs_to_the_weights_it_was_written_for(weights, tmp_path, capsys):
    path = tmp_path / "w.pt"
    save_file(weights, path)
    write_note(path, {"scale": 0.5, "loss": {"pixels": 1}})
    assert trained_for(str(path))["scale"] == 0.5 and capsys.readouterr().out == ""
    note = note_of(path).read_text()
    hand_written = '{"scale": 0.5, "loss": {"pixels": 1}}'
    for number, text in ((1, note), (2, hand_written), (3, note.replace('"sha256": "', '"sha256": "0'))):
        save_file({"other": torch.ones(number)}, path)  # another network's, under the note of the first
        note_of(path).write_text(text)
        assert trained_for(str(path)) == {} and row_name(str(path)) == "ESRGAN"
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1 and "w.pt.json was written for other weights" in said[0]
    path.unlink()
    assert trained_for(str(path)) == {}


class Thing:
    """Of a module that only the program which wrote the file has."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def other_prefix(weights: dict, prefix: str) -> dict:
    return {prefix + key: tensor for key, tensor in weights.items()}


def as_bytes(contents, **options) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file, **options)
    return file.getvalue()


def layouts(w: dict) -> dict:
    """Checkpoints as other programs write them, each of the same weights, beside what has to be left out."""
    other = {key: tensor + 1 for key, tensor in w.items()}
    discriminator = {"conv0.weight": torch.ones(3), "conv1.weight": torch.ones(3)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    lightning = {"pytorch-lightning_version": "2.4.0", "epoch": 3, "callbacks": {}, "optimizer_states": [optimizer]}
    config = {"model": {"name": "RRDBNet"}, "ema": {"decay": 0.999}, "best": torch.tensor(0.5)}
    averaged = {"n_averaged": torch.tensor(5), **other_prefix(w, "module.")}
    return {
        "compiled": other_prefix(w, "_orig_mod."),
        "compiled and parallel": other_prefix(w, "module._orig_mod."),
        "compiled inside": other_prefix(w, "model._orig_mod.module."),
        "Lightning": lightning | {"state_dict": other_prefix(w, "model.")},
        "Lightning, two networks": lightning
        | {"state_dict": other_prefix(w, "generator.") | other_prefix(discriminator, "discriminator.")},
        "Lightning, a loss": lightning | {"state_dict": other_prefix(w, "net.") | {"criterion.weight": torch.ones(2)}},
        "Lightning, EMA": lightning | {"state_dict": other_prefix(other, "model.") | other_prefix(w, "ema_model.")},
        "network.": other_prefix(w, "network."),
        "BasicSR": {"params": other, "params_ema": w},
        "BasicSR without EMA": {"params": w},
        "timm": config | {"state_dict": other, "state_dict_ema": w, "optimizer": optimizer},
        "names of its own": {"g": w, "d": discriminator, "opt_g": optimizer, "step": 3},
        "averaged": averaged,
        "DeepSpeed": {"module": w, "global_steps": 4},
        "half": {key: tensor.half() for key, tensor in w.items()},
        "bfloat16": {"state_dict": {key: tensor.bfloat16() for key, tensor in w.items()}},
        "parameters": {key: torch.nn.Parameter(tensor) for key, tensor in w.items()},
        "Namespace": {"state_dict": w, "args": argparse.Namespace(lr=1, out=pathlib.Path("a"), b=[1])},
        "Namespace among them": w | {"args": argparse.Namespace(lr=1), "epoch": 3},
        "numpy": {"params_ema": w, "psnr": np.float64(3), "curve": np.ones(3), "rng": np.random.get_state()},
        "odd objects": {
            "state_dict": w,
            "hparams": collections.defaultdict(list, a=[1]),
            "when": datetime.datetime(2026, 1, 1),
            "space": types.SimpleNamespace(a=1),
            "own": Thing(a=1, inner=Thing(b=torch.ones(3))),
            "kinds": frozenset([1]),
        },
        "a whole network": built(w),
        "a whole network in a dictionary": {"model": built(w), "ema": None, "epoch": 1},
    }


def built(weights: dict) -> torch.nn.Module:
    network = RRDBNet(8, 3, 4)
    network.load_state_dict(weights)
    return network


LAYOUTS = list(layouts(RRDBNet(8, 3, 4).state_dict()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_in_the_wild(weights, tmp_path, capsys, layout):
    stored = layouts(weights)[layout]
    kept = weights if layout not in ("half", "bfloat16") else stored.get("state_dict", stored)
    before_2020 = {"_use_new_zipfile_serialization": False}
    for options in [{}] + ([] if "whole" in layout else [before_2020]):
        (tmp_path / "w.pth").write_bytes(as_bytes(stored, **options))
        network = load_rrdbnet(str(tmp_path / "w.pth"))
        assert generator_size(network.state_dict()) == (8, 3, 4)
        for key, tensor in network.state_dict().items():
            assert tensor.dtype == torch.float32 and tensor.equal(kept[key].float()), key
        said = capsys.readouterr().out.splitlines()
        averaged = {"Lightning, EMA": "ema_model", "BasicSR": "params_ema", "timm": "state_dict_ema"}
        averaged["numpy"] = "params_ema"
        assert len(said) == (layout in averaged) and averaged.get(layout, "") in "".join(said)


class OwnNetwork(torch.nn.Module):
    """Names of its own: two networks, one of them under a name that others use as a wrapper; BatchNorm."""

    def __init__(self, alone: bool):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
        if not alone:
            self.head = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "net."])
@pytest.mark.parametrize("loss", [False, True])
def test_a_network_with_names_of_its_own(tmp_path, alone, prefix, loss):
    network, other = OwnNetwork(alone), OwnNetwork(alone)
    torch.nn.init.uniform_(network.model[1].running_mean)
    stored = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    stored = {"state_dict": other_prefix(stored, prefix), "epoch": 1}
    if loss and prefix in ("model.", "net."):  # beside it, told apart by the prefix
        stored["state_dict"]["criterion.weight"] = torch.ones(2)
    load_strictly(other, unwrap(stored, "w.pt"), "w.pt")
    assert all(tensor.equal(other.state_dict()[key]) for key, tensor in network.state_dict().items())
    del stored["state_dict"][prefix + "model.1.running_var"]
    with pytest.raises(InputError, match=r"1\.running_var is missing"):
        load_strictly(other, unwrap(stored, "w.pt"), "w.pt")


def test_safetensors(weights, tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "w.safetensors"
    safetensors.save_file(other_prefix(weights, "model."), path)
    assert all(tensor.equal(weights[key]) for key, tensor in load_rrdbnet(str(path)).state_dict().items())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a readable weights file"):
        load_file(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        load_file(path)


def converted(message: str, monkeypatch) -> str:
    """Runs the command at the end of the message, as a shell would, without the seconds of its imports."""
    python, option, program, *arguments = shlex.split(message[message.index("python -c") :])
    assert (python, option, len(arguments)) == ("python", "-c", 2)
    monkeypatch.setattr(sys, "argv", [option, *arguments])
    exec(program, {})
    return arguments[1]


def test_what_is_called_is_refused_with_the_command_that_converts_it(weights, tmp_path, monkeypatch):
    """Each of these would call something of its own; whoever trusts it gets the tensors by the command in the line."""
    contents = {"state_dict": weights, "share": fractions.Fraction(1, 3), "options": {"a": decimal.Decimal(3)}}
    torch.save(contents, tmp_path / "my file.pt")
    torch.save(contents | {"net": built(weights)}, tmp_path / "four.pt", pickle_protocol=4)
    for path in (tmp_path / "my file.pt", tmp_path / "four.pt"):
        with pytest.raises(InputError, match=r": not a .* would run code; if you trust it") as error:
            load_rrdbnet(str(path))
        assert "\n" not in str(error.value)
        plain = converted(str(error.value), monkeypatch)
        assert plain == f"{path}.plain.pt"
        assert all(v.equal(weights[k]) for k, v in load_rrdbnet(plain).state_dict().items())


def test_torchscript_is_converted_by_the_same_command(tmp_path, monkeypatch):
    path, network = tmp_path / "scripted.pt", torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(path)
    with pytest.raises(InputError, match="would run code; if you trust it") as error:
        load_file(path)
    plain = load_file(converted(str(error.value), monkeypatch))
    assert all(tensor.equal(network.state_dict()[key]) for key, tensor in plain.items())


def test_averaged_weights_of_a_classifier_too(tmp_path, capsys):
    """Without names to tell networks apart: the entry that holds most, the averaged one first."""
    network = OwnNetwork(True)
    own, other = network.state_dict(), {key: tensor + 1 for key, tensor in network.state_dict().items()}
    counters = {"decay": torch.tensor(0.999), "updates": torch.tensor(3)}
    for stored, said in (
        ({"state_dict": own, "ema": counters}, ""),
        ({"state_dict": other, "net_g_ema": own, "epoch": 1}, "net_g_ema"),
        ({"ema": {"module": own, "decay": 0.999}, "model": other}, "ema"),
        ({"model": {"state_dict": own}, "optimizer": {"state": {0: counters}}}, ""),
        ({"state_dict": other_prefix(other, "model.") | other_prefix(own, "model_ema.")}, "model_ema"),
    ):
        target = OwnNetwork(True)
        load_strictly(target, unwrap(stored, "w.pt"), "w.pt")
        assert all(tensor.equal(target.state_dict()[key]) for key, tensor in own.items()), said
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == bool(said) and said in "".join(lines)


def test_a_file_of_endless_kinds_of_objects(tmp_path):
    names = "".join(f"cnumpy\nx{i}\n0" for i in range(2000))
    (tmp_path / "w.pt").write_bytes(b"\x80\x02" + names.encode() + b"N.")
    with pytest.raises(InputError, match="would run code"):
        load_file(tmp_path / "w.pt")


def test_no_network_takes_the_name_of_another_row(tmp_path, monkeypatch):
    """Columns of predictions.csv are in lower case."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in ("Bilinear.pt", "a.pt", "A.pt", "b.pt"):
        torch.save(RRDBNet(8, 1, 4).state_dict(), name)
        write_note(name, {"loss": {"logits": 1.0}})
    names = list(load_upscalers(["Bilinear.pt", "a.pt", "A.pt", "b.pt"], None))
    assert names == ["Bilinear (Bilinear.pt)", "a (a.pt)", "A (A.pt)", "b"]
