"""The examples' own scripts; train_classifier.py and adapt_classifier.py are tested with the other scripts."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT, draw
from PIL import Image

from models.classifier import imagenet_labels
from models.errors import InputError

WNIDS = ["n00000001", "n00000002", "n00000003"]


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


def pack(path, files: dict[str, bytes]):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, contents in files.items():
                archive.writestr(name, contents)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, contents in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(contents)
                archive.addfile(info, io.BytesIO(contents))
    return path


def prepare(monkeypatch, *arguments) -> None:
    from examples.tiny_imagenet.prepare import main

    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, arguments)])
    main()


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_tiny_imagenet_is_arranged(tmp_path, monkeypatch, name):
    archive = pack(tmp_path / name, official_layout())
    prepare(monkeypatch, archive, "--folder", tmp_path / "data", "--classes", *WNIDS[:2], "--held-out", "0.1")
    train, val = tmp_path / "data" / "train_original", tmp_path / "data" / "val_original"
    for folder, count in ((train, 18), (val, 2 + 4)):
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == WNIDS[:2]
        assert [len(list((folder / wnid).iterdir())) for wnid in WNIDS[:2]] == [count, count]
    assert not {p.name for p in train.rglob("*.JPEG")} & {p.name for p in val.rglob("*.JPEG")}


def test_another_choice_leaves_no_photograph_of_the_one_before(tmp_path, monkeypatch):
    """Else a photograph could be trained on and tested with."""
    archive = pack(tmp_path / "a.zip", official_layout())
    for options in (
        ["--all"],
        ["--classes", WNIDS[0], "--held-out", "0.1"],
        ["--classes", WNIDS[0], "--held-out", "0.4"],
    ):
        prepare(monkeypatch, archive, "--folder", tmp_path / "data", *options)
    train, val = (
        {p.name for p in (tmp_path / "data" / part).rglob("*.JPEG")} for part in ("train_original", "val_original")
    )
    assert (len(train), len(val), train & val) == (12, 8 + 4, set())


def test_an_archive_cannot_write_outside_the_folder(tmp_path, monkeypatch):
    evil = {
        "../../escape/train/n00000001/images/../../n00000001_0.JPEG": b"x",
        "/tmp-escape/val/images/val_0.JPEG": photograph(),
        f"tiny/train/{WNIDS[0]}/images/../../../../evil.JPEG": b"x",
    }
    archive = pack(tmp_path / "evil.tar.gz", official_layout() | evil)
    link = tarfile.TarInfo(f"tiny/train/{WNIDS[0]}/images/{WNIDS[0]}_99.JPEG")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "links.tar", "w") as made:
        made.addfile(link)
        for name, contents in official_layout().items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            made.addfile(info, io.BytesIO(contents))
    (tmp_path / "box").mkdir()
    before = {p for p in tmp_path.rglob("*") if "box" not in p.parts}
    for name in (archive, tmp_path / "links.tar"):
        prepare(monkeypatch, name, "--folder", tmp_path / "box" / "data", "--all")
    assert {p for p in tmp_path.rglob("*") if "box" not in p.parts} == before
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


def test_archives_that_do_not_fit(tmp_path, monkeypatch):
    (tmp_path / "text.zip").write_text("no archive")
    cut = pack(tmp_path / "cut.tar.gz", official_layout())
    cut.write_bytes(cut.read_bytes()[:3000])
    huge = pack(tmp_path / "huge.zip", official_layout() | {"tiny/val/images/val_1.JPEG": bytes(2**23)})
    for path, message in (
        (tmp_path / "absent.zip", "no such archive"),
        (tmp_path / "text.zip", "not a readable zip or tar"),
        (cut, "not a readable zip or tar"),
        (huge, "not Tiny ImageNet's archive"),
        (pack(tmp_path / "a.zip", official_layout()), "no training photographs of n01443537"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(monkeypatch, path, "--folder", tmp_path / "data")


def test_drawn_pictures(tmp_path, monkeypatch):
    """The same seed draws the same pictures, in ImageNet's layout."""
    from examples.shapes import draw as script

    for folder in ("a", "b"):
        arguments = ["draw.py", "--train", "16", "--val", "8", "--folder", str(tmp_path / folder)]
        monkeypatch.setattr("sys.argv", arguments)
        script.main()
    first, second = (sorted((tmp_path / name).rglob("*.png")) for name in "ab")
    assert len(first) == 24 and {p.parent.name for p in first} == set(script.MOTIFS)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert len({p.read_bytes() for p in first}) == 24
    with Image.open(first[0]) as image:
        assert image.size == (64, 64) and image.mode == "RGB"


def imagenette_archive(path, monkeypatch):
    """A stand-in for Imagenette's archive: the same layout, and its own hash in torchvision's table."""
    from torchvision.datasets import Imagenette

    files = {}
    for wnid in Imagenette._WNID_TO_CLASS:
        for split, count in (("train", 3), ("val", 2)):
            for i in range(count):
                files[f"imagenette2/{split}/{wnid}/{wnid}_{i}.JPEG"] = photograph()
    pack(path, files)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(Imagenette, "_ARCHIVES", {"full": (path.as_uri(), digest)})
    return path


def prepare_imagenette(monkeypatch, *arguments) -> None:
    from examples.imagenette.prepare import main

    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, arguments)])
    main()


def test_imagenette_is_arranged_for_the_samplers(tmp_path, monkeypatch, start):
    archive = imagenette_archive(tmp_path / "imagenette2.tgz", monkeypatch)
    monkeypatch.chdir(tmp_path)
    prepare_imagenette(monkeypatch, "--folder", tmp_path / "examples/imagenette/data", "--archive", archive)
    prepare_imagenette(monkeypatch, "--folder", tmp_path / "examples/imagenette/data")  # again: nothing to do
    parameters = ROOT / "examples/imagenette/parameters.json"
    assert start("img_sampler_train", "--parameters", parameters).code == 0
    assert start("img_sampler_val", "--parameters", parameters).code == 0
    counts = {"train": 30, "val": 10, "test": 10}
    for part, count in counts.items():
        folder = tmp_path / "examples/imagenette/data" / part
        found = list(folder.rglob("*.JPEG"))
        assert len(found) == count and {p.parent.name for p in found} <= set(imagenet_labels())


def test_imagenette_without_network_or_with_a_wrong_archive(tmp_path, monkeypatch):
    from torchvision.datasets import Imagenette

    monkeypatch.setattr(Imagenette, "_ARCHIVES", {"full": ((tmp_path / "absent.tgz").as_uri(), "0" * 32)})
    with pytest.raises(InputError, match="--archive"):
        prepare_imagenette(monkeypatch, "--folder", tmp_path / "data")
    with pytest.raises(InputError, match=r"other\.tgz: no such archive"):
        prepare_imagenette(monkeypatch, "--folder", tmp_path / "data", "--archive", tmp_path / "other.tgz")
    (tmp_path / "evil").mkdir()
    evil = pack(tmp_path / "evil" / "imagenette2.tgz", {"../../outside.txt": b"x"})
    digest = hashlib.md5(evil.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(Imagenette, "_ARCHIVES", {"full": (evil.as_uri(), digest)})
        with pytest.raises(InputError, match="can't be downloaded or unpacked"):
            prepare_imagenette(patch, "--folder", tmp_path / "deep" / "er" / "data", "--archive", evil)
    assert not list(tmp_path.rglob("outside.txt"))
    wrong = pack(tmp_path / "imagenette2.tgz", {"imagenette2/readme": b""})
    with pytest.raises(InputError, match="can't be downloaded or unpacked"):
        prepare_imagenette(monkeypatch, "--folder", tmp_path / "data", "--archive", wrong)


def test_degradations(trained, monkeypatch, capfd, start):
    """The plain row is what test.py finds; every other way makes other small images."""
    from examples import degradation
    from experiment.script import run_script

    monkeypatch.setattr("sys.argv", ["degradation.py", "--weights", "DarioNet.pt"])
    with pytest.raises(SystemExit) as stop:
        run_script(degradation.main)
    assert stop.value.code == 0
    results = json.loads((trained / capfd.readouterr().out.split()[-1] / "results.json").read_text())
    assert results["weights"] == ["DarioNet.pt"]
    assert results["n"] == 9 and [row["reduction"] for row in results["rows"]] == list(degradation.ways(0.32))
    evaluated = json.loads((trained / start("test").out.split()[-1] / "results.json").read_text())
    accuracy = {v["name"]: v["accuracy"] for v in evaluated["variants"]}
    found = results["rows"][0]["accuracy"]
    assert found == {name: accuracy[name] for name in ("Bilinear", "Bicubic", "DarioNet")}


def test_degradations_in_numbers():
    """Forty images, all read correctly in the original: what is recovered, in the mean and at worst, is known."""
    from examples.degradation import markdown, overall, summarise

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
    assert "| 0.5 | c | 1.000 | 0.975 |" in markdown(rows)
    between = [f"({found['low']:.0%} to {found['high']:.0%})" for found in (mean, share)]
    line = "\nX recovers 62.5% {} in the mean of 2 rows, at worst 25.0% {}: x0.5 a.\n"
    assert overall(rows, means) == line.format(*between)

    right[0.5, "b"] = {"Bilinear": read(39), "X": read(40)}  # in some draws nothing is lost: no interval
    rows, means = summarise(right, read(40), seed=0)
    assert rows[1]["recovered"]["X"] == {"fraction": 1.0, "low": None, "high": None}
    assert means["X"]["low"] is None and overall(rows, means).startswith("\nX recovers 62.5% in the mean of 2 rows,")

    right = {(0.5, "a"): {"Bilinear": read(20), "X": read(10)}, (0.5, "b"): {"Bilinear": read(39), "X": read(40)}}
    line = overall(*summarise(right, read(40), seed=0))  # worse than bilinear
    assert line.startswith("\nX recovers 25.0% in the mean of 2 rows, at worst -50.0% (")


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
    """From any folder, as the scripts at the top do; `python -m` does too."""
    scripts = [
        "adapt_classifier.py",
        "degradation.py",
        "train_classifier.py",
        "imagenette/prepare.py",
        "tiny_imagenet/prepare.py",
        "shapes/draw.py",
    ]
    command = [sys.executable, "-c", START_ALL, *(ROOT / "examples" / script for script in scripts)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.count("usage") == len(scripts)
