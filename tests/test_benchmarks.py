"""The benchmarks run and say what they promise; what they measure is in benchmarks/README.md."""

import json

import pytest
import torch
from conftest import checkpoint, results_of

from benchmarks import folders, throughput, time_to_result


def last_line(module, monkeypatch, capfd, *arguments) -> dict:
    """The JSON that a benchmark ends with."""
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
    assert module.main() == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_throughput(monkeypatch, capfd):
    peaks = dict.fromkeys(("peak_convolution_float32", "peak_convolution_bfloat16"), 100.0)
    monkeypatch.setattr(throughput, "peaks", lambda runtime: peaks)  # a machine's peaks take longer than the rest
    options = ["--size", 8, 1, 4, "--side", 32, "--batch", 2, "--rounds", 2, "--seconds", 0.01, "--no-checks"]
    found = last_line(throughput, monkeypatch, capfd, *options)
    assert [batch["batch"] for batch in found["batches"]] == [2] and found["batch"] == 2
    for what in ("train", "evaluate"):
        assert found[f"{what}_ratio"] == pytest.approx(found[f"{what}_ours"] / found[f"{what}_plain"])
        low, high = found[f"{what}_ours_spread"]
        assert 0 < low <= found[f"{what}_ours"] <= high and found[f"{what}_gflop"] > 0


def test_folders(monkeypatch, capfd):
    monkeypatch.setattr(folders, "SMALL", ((8, 1, 4), "resnet18", 32))
    found = last_line(folders, monkeypatch, capfd, "--images", 6, "--turns", 1, "--workers", 1)
    assert found["auto / float32"] == pytest.approx(found["equal, auto"] / found["equal, float32"])
    assert found["together / alone"] > 0 and found["mixed, float32"] > 0


@pytest.mark.usefixtures("no_figures")
def test_time_to_result(trained, monkeypatch, capfd, start):
    """Two recipes that differ in their loss, each stopped and resumed; the scores are test.py's."""
    monkeypatch.setattr(time_to_result, "TURNS", 2)
    options = ["--minutes", 1e-4, "--set", "training.epochs=1000", "--set", "training.loss.pixels=1"]
    found = last_line(time_to_result, monkeypatch, capfd, *options)
    assert list(found["recipes"]) == list(found["minutes_to_wanted"]) == ["published", "ours"]
    folders = {}
    for folder in trained.glob("assets/logs/train_*"):
        loss = json.loads((folder / "parameters.json").read_text())["training"]["loss"]
        folders["ours" if loss["pixels"] else "published"] = folder
    assert len(folders) == 2
    for name, rows in found["recipes"].items():
        assert len(rows) == 2 and rows[0]["minutes"] <= rows[1]["minutes"]
        torch.save(checkpoint(folders[name])["network"], "DarioNet.pt")
        row = results_of(start("test"))["variants"][-1]
        assert (row["accuracy"], row["recovered"]) == (rows[1]["accuracy"], rows[1]["recovered"])
