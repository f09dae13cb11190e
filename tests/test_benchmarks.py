"""The benchmarks run and say what they promise; what they measure is in benchmarks/README.md."""

import json

import pytest

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


def test_time_to_result(trained, monkeypatch, capfd):
    """Two recipes that differ in their loss, stopped and evaluated; a run that is asked again goes on."""
    monkeypatch.setattr(time_to_result, "TURNS", 1)
    options = ["--minutes", 1e-4, "--set", "training.epochs=1000", "--set", "training.loss.pixels=1"]
    found = last_line(time_to_result, monkeypatch, capfd, *options)
    assert list(found["recipes"]) == list(found["minutes_to_wanted"]) == ["published", "ours"]
    assert all(row["name"] == "DarioNet" and row["n"] == 9 for (row,) in found["recipes"].values())
    folders = {}
    for folder in trained.glob("assets/logs/train_*"):
        loss = json.loads((folder / "parameters.json").read_text())["training"]["loss"]
        folders["ours" if loss["pixels"] else "published"] = folder
    run = time_to_result.Run("parameters.json", [])
    run.folder = folders["ours"]
    run.train_until(1)
    assert len(list(trained.glob("assets/logs/train_*"))) == len(folders) == 2
    assert not run.finished and run.seconds >= 60 * found["recipes"]["ours"][0]["minutes"]
