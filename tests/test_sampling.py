import json
import os
import subprocess
import sys

import pytest
from conftest import CLASSES, ROOT, draw_folder, one_line, write_parameters

from experiment.sampling import list_images, share


@pytest.fixture
def originals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "train_original", 11)
    draw_folder(tmp_path / "val_original", 5)
    write_parameters(tmp_path / "parameters.json", data={"train_fraction": 0.15, "val_fraction": 0.5})
    return tmp_path


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_share_is_rounded_up_and_depends_on_names_alone():
    names = [f"{i}.png" for i in range(100)]
    kept = share(names, 0.15, 2020, "cats")
    assert len(kept) == 15 and kept == share(names[::-1], 0.15, 2020, "cats")
    assert len(share(names[:7], 0.15, 2020, "cats")) == 2  # 1.05
    assert len(share(names, 0.07, 1, "cats")) == 7  # 0.07 * 100 is 7.000000000000001 in floating point
    assert share(names, 1.0, 1, "cats") == sorted(names) and share([], 0.5, 1, "cats") == []
    assert kept != share(names, 0.15, 2021, "cats") and kept != share(names, 0.15, 2020, "dogs")


def test_train_sampler(start, originals):
    result = start("img_sampler_train")
    assert result.code == 0 and "train: 6 images of 3 classes" in result.out
    found = contents(originals / "train")
    manifest = json.loads(found.pop("manifest.json"))
    assert (manifest["seed"], manifest["fraction"], manifest["complete"], manifest["images"]) == (2020, 0.15, True, 6)
    assert len(found) == 6  # 2 of 11 in each of 3 classes
    assert all(data == (originals / "train_original" / name).read_bytes() for name, data in found.items())


def test_val_sampler_halves_are_disjoint_and_complete(start, originals):
    assert start("img_sampler_val").code == 0
    val, test = (set(contents(originals / part)) - {"manifest.json"} for part in ("val", "test"))
    assert not val & test and val | test == set(contents(originals / "val_original"))
    assert len(val) == 9 and len(test) == 6  # 3 and 2 of 5 in each class


def test_an_interrupted_run_ends_in_the_same_state(start, originals, monkeypatch):
    assert start("img_sampler_train").code == 0
    whole = contents(originals / "train")
    for name in list(whole)[:3]:
        (originals / "train" / name).unlink()
    (originals / "train" / CLASSES[0] / "9.png.partial").write_bytes(b"half a copy")
    (originals / "train" / CLASSES[1] / "left-over.png").write_bytes(b"of another source")
    assert start("img_sampler_train").code == 0
    assert contents(originals / "train") == whole


def test_stopped_while_copying(start, originals, monkeypatch):
    import shutil

    copy, calls = shutil.copyfile, []

    def stop_at_third(source, target):
        calls.append(target)
        if len(calls) == 3:
            target.write_bytes(b"half")
            raise KeyboardInterrupt
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", stop_at_third)
    assert start("img_sampler_train").code == 130
    assert not json.loads((originals / "train/manifest.json").read_text())["complete"]
    monkeypatch.setattr(shutil, "copyfile", copy)
    assert start("img_sampler_train").code == 0
    again = contents(originals / "train")
    start("img_sampler_train", "--set", "data.train=fresh")
    assert again == contents(originals / "fresh")


def test_another_fraction_needs_overwrite(start, originals):
    assert start("img_sampler_train").code == 0
    before = contents(originals / "train")
    change = ["--set", "data.train_fraction=0.5"]
    one_line(start("img_sampler_train", *change), "fraction 0.15, not 0.5", "--overwrite")
    assert contents(originals / "train") == before
    assert start("img_sampler_train", *change, "--overwrite").code == 0
    assert len(contents(originals / "train")) == 3 * 6 + 1


def test_a_folder_of_the_users_own_is_never_emptied(start, originals):
    (originals / "train").mkdir()
    (originals / "train" / "thesis.txt").write_text("mine")
    one_line(start("img_sampler_train", "--overwrite"), "not empty, and not written by a sampler")
    assert (originals / "train" / "thesis.txt").read_text() == "mine"
    one_line(start("img_sampler_train", "--set", "data.train=train_original/part"), "has to lie outside train_original")


def test_validation_and_test_must_not_share_a_folder(start, originals):
    for test in ("val", "./val", "val/part"):
        one_line(start("img_sampler_val", "--set", f"data.test={test}"), "has to lie outside")
    (originals / "empty" / "cats").mkdir(parents=True)
    one_line(
        start("img_sampler_train", "--set", "data.train_original=empty"), "empty: its class folders hold no images"
    )


def test_links(start, originals):
    assert start("img_sampler_train", "--link").code == 0
    for name in set(contents(originals / "train")) - {"manifest.json"}:
        assert os.path.samefile(originals / "train" / name, originals / "train_original" / name)


def test_absent_and_empty_folders(start, originals):
    one_line(start("img_sampler_train", "--set", "data.train_original=nowhere"), "nowhere: no such folder", "make demo")
    (originals / "empty").mkdir()
    one_line(start("img_sampler_val", "--set", "data.val_original=empty"), "holds no class folders", "make demo")


def test_listing_is_sorted_and_ends_in_a_loop_of_links(tmp_path):
    draw_folder(tmp_path, 2, ["discs"])
    (tmp_path / "discs" / "loop").symlink_to(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "0.png").write_bytes(b"")
    (tmp_path / "discs" / "._0.png").write_bytes(b"")
    (tmp_path / "A.JPEG").write_bytes(b"")
    assert list_images(tmp_path) == ["A.JPEG", "discs/0.png", "discs/1.png"]


def test_samplers_start_without_torch():
    code = "import sys, img_sampler_train, img_sampler_val; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
