"""The examples' own scripts; train_classifier.py and adapt_classifier.py are tested with the other scripts."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, draw, one_line, results_of
from PIL import Image
from torchvision.datasets import Imagenette

from experiment.parameters import read_parameters
from models.classifier import imagenet_labels

WNIDS = ["n00000001", "n00000002", "n00000003"]
TINY, NETTE = "examples/tiny_imagenet/prepare", "examples/imagenette/prepare"


def photograph() -> bytes:
    file = io.BytesIO()
    draw("discs", 1, 64).save(file, "JPEG")
    return file.getvalue()


def official_layout() -> dict[str, bytes]:
    """Tiny ImageNet in small: 3 classes of 20 training and 4 validation photographs."""
    files = {"tiny/wnids.txt": "\n".join(WNIDS).encode(), "tiny/words.txt": b""}
    annotations = []
    for c, wnid in enumerate(WNIDS):
        files |= {f"tiny/train/{wnid}/images/{wnid}_{i}.JPEG": photograph() for i in range(20)}
        for i in range(4):
            files[f"tiny/val/images/val_{4 * c + i}.JPEG"] = photograph()
            annotations.append(f"val_{4 * c + i}.JPEG\t{wnid}\t0\t0\t63\t63")
    return files | {"tiny/val/val_annotations.txt": "\n".join(annotations).encode()}


def pack(path, files: dict[str, bytes], links: dict[str, str] | None = None):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, contents in files.items():
                archive.writestr(name, contents)
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
        for name, contents in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return path


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_tiny_imagenet_is_arranged(tmp_path, start, name):
    """Another choice leaves no photograph of the one before: else one could be trained on and tested with."""
    archive = pack(tmp_path / name, official_layout())
    for choice, held_out, classes in (("--all", 0.1, 3), (WNIDS[:2], 0.1, 2), (WNIDS[:2], 0.4, 2)):
        options = [choice] if choice == "--all" else ["--classes", *choice]
        result = start(TINY, archive, "--folder", tmp_path / "data", *options, "--held-out", held_out)
        assert result.code == 0, result.err
        held, found = round(20 * held_out), {}
        for part, count in (("train_original", 20 - held), ("val_original", held + 4)):
            found[part] = {path.name for path in (tmp_path / "data" / part).rglob("*.JPEG")}
            counts = {p.name: len(list(p.iterdir())) for p in (tmp_path / "data" / part).iterdir() if p.is_dir()}
            assert {wnid: n for wnid, n in counts.items() if n} == dict.fromkeys(WNIDS[:classes], count)
        assert not found["train_original"] & found["val_original"]


def test_an_archive_cannot_write_outside_the_folder(tmp_path, start):
    evil = {
        "../../escape/train/n00000001/images/../../n00000001_0.JPEG": b"x",
        "/tmp-escape/val/images/val_0.JPEG": photograph(),
        f"tiny/train/{WNIDS[0]}/images/../../../../evil.JPEG": b"x",
    }
    archives = [pack(tmp_path / "evil.tar.gz", official_layout() | evil)]
    links = {f"tiny/train/{WNIDS[0]}/images/{WNIDS[0]}_99.JPEG": "/etc/passwd"}
    archives.append(pack(tmp_path / "links.tar", official_layout(), links))
    (tmp_path / "box").mkdir()
    before = {p for p in tmp_path.rglob("*") if "box" not in p.parts}
    for archive in archives:
        assert start(TINY, archive, "--folder", tmp_path / "box" / "data", "--all").code == 0
    assert {p for p in tmp_path.rglob("*") if "box" not in p.parts} == before
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


def test_archives_that_do_not_fit(tmp_path, start):
    (tmp_path / "text.zip").write_text("no archive")
    cut = pack(tmp_path / "cut.tar.gz", official_layout())
    cut.write_bytes(cut.read_bytes()[:3000])
    pack(tmp_path / "huge.zip", official_layout() | {"tiny/val/images/val_1.JPEG": bytes(2**23)})
    pack(tmp_path / "other.zip", official_layout())
    for name, message in (
        ("absent.zip", "no such archive"),
        ("text.zip", "not a readable zip or tar"),
        ("cut.tar.gz", "not a readable zip or tar"),
        ("huge.zip", "not Tiny ImageNet's archive"),
        ("other.zip", "no training photographs of n01443537"),
    ):
        one_line(start(TINY, tmp_path / name, "--folder", tmp_path / "data"), message)


def test_drawn_pictures(tmp_path, start):
    """The same seed draws the same pictures, in ImageNet's layout."""
    from examples.shapes.draw import MOTIFS

    for folder in ("a", "b"):
        options = ["--train", "16", "--val", "8", "--folder", tmp_path / folder]
        assert start("examples/shapes/draw", *options).code == 0
    first, second = (sorted((tmp_path / name).rglob("*.png")) for name in "ab")
    assert len(first) == 24 and {p.parent.name for p in first} == set(MOTIFS)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert len({p.read_bytes() for p in first}) == 24
    with Image.open(first[0]) as image:
        assert image.size == (64, 64) and image.mode == "RGB"


def publish(monkeypatch, archive) -> None:
    """Puts the archive and its hash into torchvision's table, in place of Imagenette's."""
    digest = hashlib.md5(archive.read_bytes()).hexdigest() if archive.exists() else "0" * 32
    monkeypatch.setattr(Imagenette, "_ARCHIVES", {"full": (archive.as_uri(), digest)})


def test_imagenette_is_arranged_for_the_samplers(tmp_path, monkeypatch, start):
    places = [("train", i) for i in range(3)] + [("val", i) for i in range(2)]
    files = {f"imagenette2/{s}/{w}/{w}_{i}.JPEG": photograph() for w in Imagenette._WNID_TO_CLASS for s, i in places}
    archive = pack(tmp_path / "imagenette2.tgz", files)
    publish(monkeypatch, archive)
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "examples/imagenette/data"
    for options in (["--archive", archive], []):  # the second time there is nothing to do
        assert start(NETTE, "--folder", data, *options).code == 0
    for script in ("img_sampler_train", "img_sampler_val"):
        assert start(script, "--parameters", ROOT / "examples/imagenette/parameters.json").code == 0
    for part, count in {"train": 30, "val": 10, "test": 10}.items():
        found = list((data / part).rglob("*.JPEG"))
        assert len(found) == count and {p.parent.name for p in found} <= set(imagenet_labels())


def test_imagenette_without_network_or_with_a_wrong_archive(tmp_path, monkeypatch, start):
    options = ["--folder", tmp_path / "deep" / "er" / "data"]
    publish(monkeypatch, tmp_path / "absent.tgz")
    one_line(start(NETTE, *options), "--archive")
    one_line(start(NETTE, *options, "--archive", tmp_path / "other.tgz"), "other.tgz: no such archive")
    archive = pack(tmp_path / "imagenette2.tgz", {"imagenette2/readme": b""})
    one_line(start(NETTE, *options, "--archive", archive), "can't be downloaded or unpacked")
    publish(monkeypatch, pack(archive, {"../../outside.txt": b"x"}))
    one_line(start(NETTE, *options, "--archive", archive), "can't be downloaded or unpacked")
    assert not list(tmp_path.rglob("outside.txt"))


def test_degradations(trained, start):
    """The plain row is what test.py finds; every other way makes other small images."""
    from examples.degradation import ways

    results = results_of(start("examples/degradation", "--weights", "DarioNet.pt"))
    assert results["weights"] == ["DarioNet.pt"]
    assert results["n"] == 9 and [row["reduction"] for row in results["rows"]] == list(ways(0.32))
    accuracy = {row["name"]: row["accuracy"] for row in results_of(start("test"))["variants"]}
    assert results["rows"][0]["accuracy"] == {name: accuracy[name] for name in ("Bilinear", "Bicubic", "DarioNet")}


@pytest.mark.parametrize("options", [["--small"], []])
def test_reading_sizes(trained, start, options):
    """Accuracies are those of test.py."""
    sides = ["--sides", "32", "48", "--weights", "DarioNet.pt"]
    results = results_of(start("examples/reading_size", *options, *sides))
    assert results["n"] == 9 and [row["name"] for row in results["rows"]] == ["Bilinear", "Bicubic", "DarioNet"]
    expected = {row["name"]: row["accuracy"] for row in results_of(start("test", *options))["variants"]}
    for row in results["rows"]:
        assert row["accuracy"]["32"] == pytest.approx(expected[row["name"]])


def test_the_best_size_is_chosen_on_the_other_half():
    from examples.reading_size import Once, summarise

    table = {"Bilinear": {96: [1, 1, 0, 0, 0, 0], 128: [0, 0, 0, 1, 1, 1]}, "DarioNet": {96: [0] * 6, 128: [1] * 6}}
    rows, tests = summarise(table, 0)
    assert [(row["best"], row["accuracy_at_best"]) for row in rows] == [(96, 0), (128, 1)]
    assert rows[0]["accuracy"] == {"96": pytest.approx(1 / 3), "128": 0.5}
    assert (tests[0]["only_first"], tests[0]["only_second"]) == (3, 0)
    calls = []
    once, images = Once(lambda images: calls.append(1) or images + 1), torch.zeros(1)
    assert once(images).equal(once(images)) and once(torch.ones(1)).item() == 2 and calls == [1, 1]


def test_degradations_in_numbers():
    """Forty images, all read correctly in the original: what is recovered, in the mean and at worst, is known."""
    from examples.degradation import overall, summarise

    def read(count: int) -> list[bool]:
        return [i < count for i in range(40)]

    right = {
        (0.5, "a"): {"Bilinear": read(8), "X": read(16)},
        (0.5, "b"): {"Bilinear": read(20), "X": read(40)},  # all of it, whichever images are drawn
        (0.5, "c"): {"Bilinear": read(40), "X": read(39)},  # nothing is lost, so nothing can be recovered
    }
    rows, means = summarise(right, read(40), seed=0)
    assert [row["recovered"]["X"]["fraction"] for row in rows] == [0.25, 1.0, None]
    assert all(row["recovered"]["Bilinear"]["fraction"] is None for row in rows) and set(means) == {"X"}
    share, mean = rows[0]["recovered"]["X"], means["X"]
    assert 0 < share["low"] < 0.25 < share["high"] < 1 and mean["fraction"] == 0.625 and mean["rows"] == 2
    assert (mean["low"], mean["high"]) == pytest.approx(((share["low"] + 1) / 2, (share["high"] + 1) / 2))

    right = {(0.5, "a"): {"Bilinear": read(20), "X": read(10)}, (0.5, "b"): {"Bilinear": read(39), "X": read(40)}}
    rows, means = summarise(right, read(40), seed=0)  # worse than bilinear; and in some draws nothing is lost
    assert rows[1]["recovered"]["X"] == {"fraction": 1.0, "low": None, "high": None} and means["X"]["low"] is None
    assert overall(rows, means).startswith("\nX recovers 25.0% in the mean of 2 rows, at worst -50.0% (")


def test_the_experiment_for_a_gpu_names_parameters_that_exist(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >> "$COMMANDS"; echo >> "$COMMANDS"\n')
    fake.chmod(0o755)
    commands = tmp_path / "commands.txt"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COMMANDS": str(commands)}
    environment |= {"START": "assets/models/DarioNet_photographs.pt", "SETTINGS": "training.epochs=2"}
    environment |= {"TEACHERS": '[{"architecture": "resnet50", "weights": "pretrained"}]'}
    script = ["bash", str(ROOT / "examples/photographs/experiment.sh"), *[str(tmp_path)] * 3]
    subprocess.run(script, env=environment, capture_output=True, check=True)
    found = [command.split("\n") for command in commands.read_text().strip().split("\n\n")]
    assert len(found) == 8
    for command in found:
        settings = [value for option, value in pairwise(command) if option == "--set"]
        parameters = read_parameters(ROOT / command[command.index("--parameters") + 1], settings)
        assert parameters.training.more_teachers[0].architecture == "resnet50"


START_ALL = """
import os, runpy, sys
import matplotlib.figure, torch, torchvision  # once for all of them
for script in sys.argv[1:]:
    if not os.fork():
        sys.argv, sys.path[0] = [script, "--help"], os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
    assert os.wait()[1] == 0, script
"""


def test_examples_start_as_files(tmp_path):
    """From any folder, as the scripts at the top do."""
    scripts = ["adapt_classifier", "degradation", "reading_size", "export", "train_classifier", "imagenette/prepare"]
    scripts += ["tiny_imagenet/prepare", "shapes/draw"]
    command = [sys.executable, "-c", START_ALL, *(ROOT / "examples" / f"{script}.py" for script in scripts)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.count("usage") == len(scripts)
