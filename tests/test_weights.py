"""Weight files: every layout that is read, what is refused and how, the note in the file, downloads by name."""

import argparse
import hashlib
import io
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_line

from experiment.evaluation import open_restore
from models import weights as module
from models.darionet import DarioNet, build_darionet, load_rrdbnet, load_upscalers, row_name
from models.errors import InputError
from models.rrdbnet import RRDBNet
from models.scaler import Reduction
from models.weights import (
    PUBLISHED,
    SHIPPED_WEIGHTS,
    generator_size,
    load_file,
    load_generator,
    load_strictly,
    published_file,
    save_weights,
    sha256_of,
    trained_for,
    unwrap,
)

OURS = {"loss": {"logits": 1.0, "pixels": 0.0}, "scale": 0.32, "random_reduction": None}
NAME = "RealESRGAN_x4plus"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return RRDBNet(8, 3, 4).state_dict()


def with_prefix(weights: dict, prefix: str) -> dict:
    return {prefix + key: tensor for key, tensor in weights.items()}


BASICSR = {"RRDB_trunk": "body", "trunk_conv": "conv_body", "upconv": "conv_up", "HRconv": "conv_hr", "RDB": "rdb"}
FIRST_RELEASE = {"conv_first.": "model.0.", "RRDB_trunk.": "model.1.sub.", "trunk_conv.": "model.1.sub.3."}
FIRST_RELEASE |= {"upconv1.": "model.3.", "upconv2.": "model.6.", "HRconv.": "model.8.", "conv_last.": "model.10."}
FIRST_RELEASE |= {f".conv{i}.": f".conv{i}.0." for i in range(1, 6)}


def renamed(weights: dict, names: dict[str, str]) -> dict:
    """The weights with the ESRGAN repository's names turned into another program's."""
    result = {}
    for key, tensor in weights.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        result[key] = tensor
    return result


def layouts(w: dict) -> dict:
    """Checkpoints as other programs write them, each of the same weights, beside what has to be left out."""
    other = {key: tensor + 1 for key, tensor in w.items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    return {
        "as it is": w,
        "BasicSR": {"params": other, "params_ema": w},
        "BasicSR without EMA": {"params": w},
        "params-ema": {"params-ema": w, "params": other},
        "timm": {"state_dict": other, "state_dict_ema": w, "optimizer": optimizer, "epoch": 3},
        "torchvision": {"model": other, "model_ema": {"n_averaged": torch.tensor(5), **with_prefix(w, "module.")}},
        "model_state_dict": {"model_state_dict": w, "optimizer_state_dict": optimizer, "loss": torch.tensor(0.5)},
        "nested": {"model": {"net": w}},
        "Lightning": {"state_dict": with_prefix(w, "model."), "callbacks": {}, "optimizer_states": [optimizer]},
        "compiled and parallel": with_prefix(w, "module._orig_mod."),
        "netG.": with_prefix(w, "netG."),
        "layers.0.": with_prefix(w, "layers.0."),
        "0.": with_prefix(w, "0."),
        "half": {key: tensor.half() for key, tensor in w.items()},
        "parameters": {key: torch.nn.Parameter(tensor) for key, tensor in w.items()},
        "options and scores": {"state_dict": w, "args": argparse.Namespace(lr=1), "psnr": np.float64(3)},
    }


@pytest.mark.parametrize("names", [{}, BASICSR, FIRST_RELEASE], ids=["ESRGAN", "BasicSR", "first release"])
@pytest.mark.parametrize("layout", list(layouts({})))
def test_every_family_and_layout_is_read(weights, names, layout, tmp_path):
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(layouts(renamed(weights, names))[layout], tmp_path / "w.pth", **options)
        network = load_rrdbnet(str(tmp_path / "w.pth"))
        assert generator_size(network.state_dict()) == (8, 3, 4)
        for key, tensor in network.state_dict().items():
            expected = weights[key].half().float() if layout == "half" else weights[key]
            assert tensor.dtype == torch.float32 and tensor.equal(expected), key


def test_safetensors(weights, tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "w.safetensors"
    safetensors.save_file(with_prefix(weights, "model."), path)
    assert all(tensor.equal(weights[key]) for key, tensor in load_rrdbnet(str(path)).state_dict().items())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a readable weights file"):
        load_file(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        load_file(path)


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
    refused(RRDBNet(8, 3, 4), tmp_path, "would run code; if you trust it, ", "save its state_dict()")
    refused(weights, tmp_path, "(8, 3, 4)", "(8, 2, 4)", loader=lambda path: build_darionet(8, 2, 4, path))


@pytest.mark.parametrize("blocks", [4, 8])
def test_new_blocks_change_nothing_until_they_learn(weights, blocks, tmp_path, capsys):
    save_weights({key: tensor + 0.05 for key, tensor in weights.items()}, tmp_path / "w.pt", OURS)
    small, larger = (build_darionet(8, count, 4, str(tmp_path / "w.pt")) for count in (3, blocks))
    assert f"w.pt has 3 blocks; {blocks - 3} new ones are spread between them" in capsys.readouterr().out
    images = torch.rand(2, 3, 7, 9)
    torch.testing.assert_close(larger(images), small(images))

    optimizer = torch.optim.SGD(larger.parameters(), 1e-3)
    for _ in range(2):  # the first step moves the last convolutions of new blocks, the second all before them
        larger(images).square().mean().backward()
        assert all(block.RDB3.conv5.weight.grad.any() for block in larger.RRDB_trunk)
        optimizer.step()
    assert all(parameter.grad.any() for parameter in larger.parameters())


def test_odd_state_dicts_are_refused(weights, tmp_path):
    loop: dict = {}
    loop["model"] = loop
    for odd in (loop, [1, 2], {}, {3: torch.ones(1)}, {"epoch": 1}):
        refused(odd, tmp_path, "no state dict")
    first = "conv_first.weight"
    for tensor in (torch.ones(8, 3, 3, 3).to_sparse(), torch.ones(8, 3, 3, 3) * 1j, torch.ones(3, device="meta")):
        refused(weights | {first: tensor}, tmp_path, "no state dict")
    for tensor in (torch.tensor(1.0), torch.ones(2000, 3, 3, 3), torch.ones(1).expand(10**6)):
        refused(weights | {first: tensor}, tmp_path, "not an RRDBNet", first)
    refused(weights | {"RRDB_trunk.999999999.x": torch.ones(1)}, tmp_path, "RRDB_trunk.3.RDB1.conv1.weight is missing")


class OwnNetwork(torch.nn.Module):
    """All names under one that others use as a wrapper; BatchNorm."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "net."])
def test_a_network_with_names_of_its_own(prefix):
    network, other = OwnNetwork(), OwnNetwork()
    torch.nn.init.uniform_(network.model[1].running_mean)
    own = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    state = unwrap({"state_dict": with_prefix(own, prefix), "epoch": 1}, "w.pt")
    load_strictly(other, state, "w.pt")
    assert all(tensor.equal(other.state_dict()[key]) for key, tensor in network.state_dict().items())
    del state["1.running_var"]
    with pytest.raises(InputError, match=r"w\.pt: 1\.running_var is missing"):
        load_strictly(other, state, "w.pt")


def test_files_that_are_no_weights(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    for contents in (b"", b"not weights", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(50), whole[:9999]):
        (tmp_path / "w.pth").write_bytes(contents)
        with pytest.raises(InputError, match=r"w\.pth: not a readable"):
            load_generator(tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"absent\.pth: no such weights file"):
        load_file(tmp_path / "absent.pth")


def test_another_file_under_a_published_name(weights, tmp_path, monkeypatch):
    path = tmp_path / f"{NAME}.pth"
    torch.save(weights, path)
    with pytest.raises(InputError, match=r"RealESRGAN_x4plus\.pth: not the file published .* not 4fa0d389"):
        load_rrdbnet(str(path))
    monkeypatch.setitem(PUBLISHED, path.name, sha256_of(path))
    assert load_rrdbnet(str(path)) and row_name(str(path)) == "ESRGAN"


def test_what_is_written_has_the_published_names_and_the_note(weights, tmp_path):
    network = RRDBNet(8, 3, 4)
    network.load_state_dict(weights)
    for given in (weights, network):
        save_weights(given, tmp_path / "out.pt", OURS | {"sizes": (1, 2)})
        stored = torch.load(tmp_path / "out.pt", weights_only=True)
        assert list(stored) == ["params", "trained_for"] and list(stored["params"]) == list(weights)
        assert trained_for(tmp_path / "out.pt") == OURS | {"sizes": [1, 2]}
        assert all(v.equal(weights[k]) for k, v in load_generator(tmp_path / "out.pt").items())


def test_old_notes_beside_the_weights_are_read(weights, tmp_path):
    path, beside = tmp_path / "w.pt", tmp_path / "w.pt.json"
    torch.save(weights, path)
    assert trained_for(path) == {}
    for mark, expected in (({}, OURS), ({"sha256": sha256_of(path)}, OURS), ({"sha256": 64 * "0"}, {})):
        beside.write_text(json.dumps(OURS | mark))
        assert trained_for(path) == expected
    beside.write_text("[")
    assert trained_for(path) == {}
    save_weights(weights, path, {"scale": 0.5})
    assert trained_for(path) == {"scale": 0.5}, "the file's own note comes first"
    torch.save({"params": weights, "trained_for": "anime"}, tmp_path / "other.pt")
    assert trained_for(tmp_path / "other.pt") == {}


def test_names_of_rows(tmp_path, monkeypatch):
    """Columns of predictions.csv are in lower case. What tests/test_scripts.py does not name."""
    monkeypatch.chdir(tmp_path)
    state = RRDBNet(8, 1, 4).state_dict()
    torch.save(state, "mine.v2.pth")
    save_weights(state, "RRDB_mine.pth", {"loss": {"logits": 1, "pixels": 0}})
    assert (row_name("mine.v2.pth"), row_name("RRDB_mine.pth")) == ("mine.v2", "DarioNet")
    for name in ("Bilinear.pt", "a.pt", "A.pt", "b.pt"):
        save_weights(state, name, OURS)
    names = list(load_upscalers(["Bilinear.pt", "a.pt", "A.pt", "b.pt"], None))
    assert names == ["Bilinear (Bilinear.pt)", "a (a.pt)", "A (A.pt)", "b"]


@pytest.mark.skipif(not SHIPPED_WEIGHTS.is_file(), reason="the weights for photographs are not there")
def test_the_weights_that_come_with_the_project():
    note = trained_for(SHIPPED_WEIGHTS)
    assert (note["scale"], note["loss"]["logits"], row_name(str(SHIPPED_WEIGHTS))) == (0.32, 30.0, "DarioNet")
    network = DarioNet().restore.network
    assert generator_size(network.state_dict()) == (64, 6, 32)
    assert sum(tensor.numel() for tensor in network.parameters()) == 4467779


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tiny weights as NAME; `cuts` are the bytes after which a connection ends, one per request."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = io.BytesIO()
    torch.save(RRDBNet(8, 1, 4).state_dict(), file)
    state = SimpleNamespace(contents=file.getvalue(), cuts=[], asked=0, folder=tmp_path / "torch/hub/checkpoints")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(state.contents)))
            self.end_headers()
            self.wfile.write(state.contents[: state.cuts.pop(0) if state.cuts else None])

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setitem(module.URLS, NAME, f"http://127.0.0.1:{http.server_port}/{NAME}.pth")
        monkeypatch.setitem(PUBLISHED, f"{NAME}.pth", hashlib.sha256(state.contents).hexdigest())
        yield state
        http.shutdown()
        thread.join()


def test_downloaded_once(server, capsys):
    network = build_darionet(8, 1, 4, NAME)
    assert (server.folder / f"{NAME}.pth").read_bytes() == server.contents
    assert [path.name for path in server.folder.iterdir()] == [f"{NAME}.pth"]
    assert NAME in capsys.readouterr().out
    path = server.folder.parent / "mine.pt"
    save_weights(network, path, OURS)
    assert list(load_upscalers([str(path)], NAME)) == ["ESRGAN", "DarioNet"]
    enlarged = open_restore(NAME, Reduction(0.5), "cpu").network
    assert enlarged.conv_first.weight.equal(network.conv_first.weight)
    assert server.asked == 1


def test_what_is_not_the_whole_published_file_is_removed(server):
    server.cuts = [1000]
    with pytest.raises(InputError, match=rf"{NAME}\.pth can't be downloaded .* put {NAME}\.pth into") as error:
        published_file(NAME)
    assert not list(server.folder.iterdir()) and "\n" not in str(error.value)
    assert published_file(NAME) == str(server.folder / f"{NAME}.pth")


def test_without_a_network_it_says_which_file_to_put_where(start, experiment, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(experiment / "torch"))
    monkeypatch.setitem(module.URLS, NAME, f"http://127.0.0.1:9/{NAME}.pth")  # nobody listens there
    refused = start("train_darionet", "--set", f"darionet.initial_weights={NAME}")
    one_line(refused, f"http://127.0.0.1:9/{NAME}.pth", f"put {NAME}.pth into {experiment / 'torch/hub/checkpoints'}")
    save_weights(RRDBNet(8, 1, 4), "DarioNet.pt", OURS)
    evaluated = start("test", "--set", f"darionet.initial_weights={NAME}")  # needs no start
    assert evaluated.code == 0 and "Note: no row for darionet.initial_weights" in evaluated.out + evaluated.err


def test_every_name_has_its_hash():
    for name, url in module.URLS.items():
        assert url.endswith(f"/{name}.pth") and re.fullmatch("[0-9a-f]{64}", PUBLISHED[f"{name}.pth"])
