"""What is written for other programs gives what torch gives."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import one_line, write_parameters

from examples.export import check_parity
from models.darionet import load_rrdbnet, row_name
from models.errors import InputError
from models.rrdbnet import RRDBNet
from models.scaler import Scaler
from models.weights import save_weights, trained_for


def test_safetensors(start, trained):
    pytest.importorskip("safetensors")
    path = "out/DarioNet.safetensors"
    result = start("examples/export", path)
    assert result.code == 0 and result.out.splitlines()[-1] == path and "growth 32" in result.out
    states = [load_rrdbnet(p).state_dict() for p in ("DarioNet.pt", path)]
    assert all(tensor.equal(states[1][key]) for key, tensor in states[0].items())
    assert row_name(path) == "DarioNet" and trained_for(path) == {"loss": {"logits": 1.0}}
    one_line(start("examples/export", path), path, "--overwrite")
    assert start("examples/export", path, "--weights", path, "--overwrite").code == 0
    assert row_name(path) == "DarioNet"


def test_spandrel_gives_the_same_image(start, trained):
    spandrel = pytest.importorskip("spandrel")
    save_weights(RRDBNet(8, 1, 32), "DarioNet.pt", {"scale": 0.32})
    result = start("examples/export", "DarioNet.safetensors")
    assert result.code == 0 and "growth 32" not in result.out
    small = torch.rand(1, 3, 11, 7)
    for name in ("DarioNet.pt", "DarioNet.safetensors"):
        model = spandrel.ModelLoader("cpu").load_from_file(name)
        assert model.architecture.name == "ESRGAN" and model.scale == 4
        with torch.no_grad():
            expected = load_rrdbnet("DarioNet.pt")(small)
            assert torch.allclose(model.model(small), expected, atol=1e-5)
            assert torch.allclose(model(small), expected.clamp(0, 1), atol=1e-5)


def test_a_text_of_another_project_is_no_note(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    for text in ("anime", "[1]", "[" * 100_000):
        safetensors.save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", {"trained_for": text})
        assert trained_for(str(tmp_path / "w.safetensors")) == {}


def session_of(path: str):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_onnx(start, trained):
    """The fast paths leave as plain operators of ONNX, for any size."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    result = start("examples/export", "DarioNet.onnx")
    assert result.code == 0 and result.out.count("differs from torch by") == 5, result
    small = torch.rand(2, 3, 5, 12)
    with torch.no_grad():
        expected = load_rrdbnet("DarioNet.pt")(small)
    found = session_of("DarioNet.onnx").run(["rebuilt"], {"small": small.numpy()})[0]
    assert found.shape == (2, 3, 20, 48) and torch.allclose(torch.from_numpy(found), expected, atol=1e-5)
    model = onnx.load("DarioNet.onnx")
    onnx.checker.check_model(model)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert (about["features"], about["blocks"], about["growth"], about["source"]) == ("8", "1", "4", "DarioNet.pt")
    assert json.loads(about["trained_for"]) == {"loss": {"logits": 1.0}}
    contents = Path("DarioNet.onnx").read_bytes()
    assert b"rrdbnet.py" not in contents, "no code and no paths of whoever exported"
    network = load_rrdbnet("DarioNet.pt")
    with pytest.raises(InputError, match=r"a\.onnx: not written"):
        check_parity(lambda small: network(small) * 1.01, contents, Path("a.onnx"))


def test_weights_are_constants_for_other_programs(start, trained):
    """Every convolution's weight is stored as it is used: tools for int8 look for it there."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    save_weights(RRDBNet(64, 1, 32), "DarioNet.pt", {})
    assert start("examples/export", "a.onnx").code == 0
    graph = onnx.load("a.onnx").graph
    stored = {one.name for one in graph.initializer}
    weights = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    assert len(weights) == 21 and set(weights) <= stored


def test_onnx_of_the_whole_chain(start, trained):
    pytest.importorskip("onnxscript")
    layers = "nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 15 * 15, 3)"
    code = f"from torch import nn\nCLASS_NAMES = [*'abc']\n\ndef network():\n    return nn.Sequential({layers})\n"
    Path("network.py").write_text(code)
    torch.manual_seed(2)
    network = runpy.run_path("network.py")["network"]().eval()
    torch.save(network.state_dict(), "network.pt")
    classifier = {"architecture": "network.py:network", "weights": "network.pt"}
    write_parameters(Path("parameters.json"), classifier=classifier)
    result = start("examples/export", "chain.onnx", "--with-classifier")
    assert result.code == 0 and result.out.count("differs from torch by") == 5, result
    small = torch.rand(2, 3, 20, 14)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        rebuilt = Scaler((32, 32))(load_rrdbnet("DarioNet.pt")(small)).clamp(0, 1)
        expected = network((rebuilt - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert (expected[0] - expected[1]).abs().max() > 1e-2, "scores that depend on the image"
    found = torch.from_numpy(session_of("chain.onnx").run(["scores"], {"small": small.numpy()})[0])
    assert torch.allclose(found, expected, atol=1e-4)


def test_what_cannot_be_exported(start, trained):
    one_line(start("examples/export", "a.pt"), "a.pt: .onnx or .safetensors are written")
    one_line(start("examples/export", "a.safetensors", "--with-classifier"), "without a classifier")
    one_line(start("examples/export", "a.onnx", "--weights", "absent.pt"), "absent.pt: no such weights")
    assert not Path("a.onnx").exists()


def test_without_the_packages(start, trained, monkeypatch):
    for package, file in (("onnxscript", "a.onnx"), ("safetensors.torch", "a.safetensors")):
        monkeypatch.setitem(sys.modules, package, None)
        one_line(start("examples/export", file), file, f"pip install {package[:4]}")
