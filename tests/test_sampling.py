import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unicodedata import normalize
from unittest.mock import DEFAULT, Mock

import pytest
from conftest import ROOT, draw, draw_folder, one_line, python, write_parameters
from PIL import Image

from experiment.sampling import ENDINGS, images_by_class, list_images, share
from models.images import read_image

MANIFEST = "manifest.json"


@pytest.fixture
def originals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "train_original", 11)
    draw_folder(tmp_path / "val_original", 5)
    write_parameters(tmp_path / "parameters.json", data={"train_fraction": 0.15, "val_fraction": 0.5})
    return tmp_path


def contents(folder) -> dict[str, bytes]:
    """Every file below it, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def draw_class(folder, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        draw("discs", i).save(folder / f"{i}.png")


def check_as_fresh(start, originals, *options: str) -> None:
    """What lies in the target is what a sampler writes into an empty one."""
    assert start("img_sampler_train", *options, "--set=data.train=fresh").code == 0
    assert contents(originals / "train") == contents(originals / "fresh")


def test_share_is_rounded_up_and_depends_on_names_alone():
    names = [f"{i}.png" for i in range(100)]
    kept = share(names, 0.15, 2020, "cats")
    assert len(kept) == 15 and kept == share(names[::-1], 0.15, 2020, "cats")
    assert kept[:3] == ["11.png", "12.png", "15.png"]  # as on any machine, in any version
    assert len(share(names[:7], 0.15, 2020, "cats")) == 2  # 1.05
    assert len(share(names, 0.07, 1, "cats")) == 7  # 0.07 * 100 is 7.000000000000001 in floating point
    assert share(names, 1.0, 1, "cats") == sorted(names) and share([], 0.5, 1, "cats") == []
    assert kept != share(names, 0.15, 2021, "cats") and kept != share(names, 0.15, 2020, "dogs")


@pytest.mark.parametrize("how", [[], ["--link"]])
def test_train_sampler(start, originals, how):
    for path in (originals / "train_original/discs").iterdir():
        path.symlink_to(path.rename(originals / f"linked {path.name}"))
    result = start("img_sampler_train", *how)
    assert result.code == 0 and "train: 6 images of 3 classes" in result.out  # 2 of 11 in each
    found = contents(originals / "train")
    manifest = json.loads(found.pop(MANIFEST))
    assert (manifest["seed"], manifest["fraction"], manifest["complete"], manifest["images"]) == (2020, 0.15, True, 6)
    assert manifest["files"] == {name: len(data) for name, data in found.items()}
    for name, data in found.items():  # a hard link leads to the file itself, not to the symbolic link
        copy, original = originals / "train" / name, originals / "train_original" / name
        assert data == original.read_bytes() and not copy.is_symlink() and os.path.samefile(copy, original) == bool(how)


def test_val_sampler_halves_are_disjoint_and_complete(start, originals):
    assert start("img_sampler_val").code == 0
    val, test = (set(contents(originals / part)) - {MANIFEST} for part in ("val", "test"))
    assert not val & test and val | test == set(contents(originals / "val_original"))
    assert len(val) == 9 and len(test) == 6  # 3 and 2 of 5 in each class


@pytest.mark.parametrize(("module", "name", "how"), [(shutil, "copyfile", []), (os, "link", ["--link"])])
def test_an_interrupted_run_ends_in_the_same_state(start, originals, monkeypatch, module, name, how):
    work = Mock(wraps=getattr(module, name), side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt])
    with monkeypatch.context() as patch:
        patch.setattr(module, name, work)
        assert start("img_sampler_train", *how).code == 130
    manifest = json.loads((originals / "train" / MANIFEST).read_text())
    assert len(manifest["files"]) == 6 and not manifest["complete"]  # the list is written before the first file
    assert len(contents(originals / "train")) == 3
    file = originals / "train" / list(manifest["files"])[0]
    file.unlink(), file.write_bytes(b"cut")
    file.with_name(f".{file.name}.1-1-0123abcd.partial").write_bytes(b"killed")
    assert start("img_sampler_train", *how).code == 0
    check_as_fresh(start, originals, *how)


CHANGES = ["data.train_fraction=0.5", "data.seed=1", "data.train_original=other"]


@pytest.mark.parametrize(("change", "older"), [*((change, False) for change in CHANGES), ("data.seed=1", True)])
def test_another_choice_needs_overwrite(start, originals, change, older):
    shutil.copytree(originals / "train_original", originals / "other")
    for path in (originals / "other").rglob("*.png"):
        path.write_bytes(path.read_bytes()[::-1])  # another picture of the same name and size
    assert start("img_sampler_train").code == 0
    (originals / "thesis.txt").write_text("mine")
    if older:  # manifests had a time, too; and none gives a right outside its folder
        manifest = json.loads((originals / "train" / MANIFEST).read_text())
        manifest["files"] = {name: f"{size} 1722222222222222222" for name, size in manifest["files"].items()}
        manifest["files"] |= {"../thesis.txt": "4 0", str(originals / "thesis.txt"): "4 0", "": "0 0"}
        (originals / "train" / MANIFEST).write_text(json.dumps(manifest))
    before = contents(originals / "train")
    one_line(start("img_sampler_train", f"--set={change}"), "train: was sampled with ", ", not ", "--overwrite")
    assert contents(originals / "train") == before
    assert start("img_sampler_train", f"--set={change}", "--overwrite").code == 0
    check_as_fresh(start, originals, f"--set={change}")
    assert contents(originals / "train") != before and (originals / "thesis.txt").read_text() == "mine"


AT_ONCE = [(Path, "read_text", 1), (shutil, "copyfile", 2), (os, "link", 2)]


@pytest.mark.parametrize(("module", "name", "count"), AT_ONCE)
def test_two_samplers_at_once(start, originals, monkeypatch, module, name, count):
    """Another process runs from start to end after this one has read the manifest, or before it renames a file."""
    work, calls, how = getattr(module, name), [], ["--link"] if name == "link" else []
    start("img_sampler_train", "--help")  # imports read files, too

    def interrupted(*arguments, **options):
        try:
            return work(*arguments, **options)
        finally:
            calls.append(arguments)
            command = [sys.executable, ROOT / "img_sampler_train.py", *how]
            assert len(calls) != count or subprocess.run(command).returncode == 0

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        assert start("img_sampler_train", *how).code == 0
    assert len(calls) == count  # what the other has finished is not made again
    check_as_fresh(start, originals, *how)


@pytest.mark.parametrize("how", [[], ["--link"]])
def test_what_is_no_file_is_left_out(start, originals, how):
    """Whether a file is an image, the scripts that read it say."""
    folder = originals / "train_original" / "discs"
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"broken")
    os.mkfifo(folder / "pipe.png")
    for name in ("loop.png", "dangling.png"):
        (folder / name).symlink_to("loop.png" if name == "loop.png" else "nowhere")
    result = start("img_sampler_train", *how, "--set=data.train_fraction=1")
    assert "left out 3 that are no files" in result.out
    assert contents(originals / "train").items() > contents(originals / "train_original").items()


def test_folders_that_are_refused(start, originals):
    (originals / "phone" / "cats").mkdir(parents=True)
    for test in ("val", "./val", "val/part"):
        one_line(start("img_sampler_val", "--set", f"data.test={test}"), "has to lie outside")
    one_line(start("img_sampler_train", "--set", "data.train=train_original/part"), "has to lie outside train_original")
    for script, key in (("img_sampler_train", "data.train_original"), ("img_sampler_val", "data.val_original")):
        one_line(start(script, f"--set={key}=nowhere"), "nowhere: no such folder", "make demo")
        one_line(start(script, f"--set={key}=phone"), "phone: holds no images; ", "make demo")
        one_line(start(script, f"--set={key}=train_original/discs"), "holds no images in class folders")
    (originals / "phone" / "cats" / "1.HEIC").write_bytes(b"x")
    result = start("img_sampler_train", "--set=data.train_original=phone")
    one_line(result, "phone: holds no images, only 1 .heic; convert photographs")


FOREIGN = ["checks/mine.jpg", "mine.JPG", "fox/1.png", "notes.txt", "README", "checks/mine.png.partial", "link"]


@pytest.mark.parametrize("path", FOREIGN)
def test_what_no_sampler_wrote_is_never_deleted(start, originals, path):
    assert start("img_sampler_train").code == 0
    file = originals / "train" / path
    file.parent.mkdir(exist_ok=True)
    file.symlink_to(originals / "val_original") if path == "link" else file.write_bytes(b"mine")
    before = contents(originals)
    for options in ([], ["--overwrite"], ["--overwrite", "--set", "data.train_fraction=0.5"]):
        result = start("img_sampler_train", *options)
        one_line(result, f"train: not written by a sampler, so never removed: {path}; move it elsewhere")
        assert contents(originals) == before and file.exists()


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": 3}', '{"source": "x", "seed": 1, "fraction": 1}'])
def test_a_manifest_without_a_list_gives_no_right_to_delete(start, originals, manifest):
    draw_class(originals / "test" / "discs", 2)
    (originals / "test" / MANIFEST).write_text(manifest)
    before = contents(originals / "test")
    one_line(start("img_sampler_val", "--overwrite"), "test: not written by a sampler, so never removed")
    assert contents(originals / "test") == before
    assert set(contents(originals / "val")) == {MANIFEST}  # no file is copied if a later target refuses


def test_what_systems_make_is_no_class_and_no_image(start, originals):
    plain = list_images("val_original")
    systems = ["@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found", "#recycle", ".Trashes"]
    for place in (originals / "val_original", originals / "val_original/discs", originals / "val"):
        for name in systems:
            draw_class(place / name / "thumbnails", 3)
        for name in ("Thumbs.db", "desktop.ini", "Icon\r", ".DS_Store", "._0.png"):
            (place / name).write_bytes(b"x")
    draw_class(originals / "val" / "discs", 0)
    (originals / "val/discs/.mine.partial").write_bytes(b"x")
    draw_class(originals / "val_original" / "thumbs", 1)  # a class may be called almost like them
    assert list_images("val_original") == [*plain, "thumbs/0.png"]
    for _ in range(2):  # a target that has nothing else is empty
        result = start("img_sampler_val")
        assert result.code == 0 and "of 4 classes" in result.out and "left out" not in result.out
    for name in (".DS_Store", "@eaDir/thumbnails/0.png", "discs/.mine.partial"):
        assert (originals / "val" / name).exists()


def test_other_files_are_counted_by_ending(start, originals, capfd):
    for name in ("discs/1.heic", "discs/2.HEIC", "checks/3.jxl", "checks/README", "loose.png"):
        (originals / "train_original" / name).write_bytes(b"x")
    (originals / "train_original" / "fox").mkdir()
    lines = start("img_sampler_train").out.splitlines()
    assert lines[0].startswith("train_original: left out 2 .heic, 1 .jxl, 1 without an ending: not read as images (")
    assert lines[1] == "train_original: left out 1 images in no class folder: loose.png"
    assert lines[2] == "train_original: no images in 1 of 4 class folders: fox"
    list_images("train")  # the manifest is no stranger
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("suffix", sorted(ENDINGS))
def test_every_ending_that_is_listed_is_read(tmp_path, suffix):
    image = Image.new({".pgm": "L", ".pbm": "1"}.get(suffix, "RGB"), (32, 32), "white")
    kind = {".mpo": "MPO", ".dib": "BMP"}.get(suffix) or Image.registered_extensions()[suffix]
    two = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    image.save(tmp_path / f"a{suffix.upper()}", kind, **two)
    assert read_image(tmp_path / list_images(str(tmp_path))[0]).getpixel((9, 9)) == (255, 255, 255)


def test_names_are_compared_composed(start, originals):
    """Names as Linux and as a Mac give them: the same files are chosen, and listed in the same order."""
    lists = []
    for form in ("NFC", "NFD"):
        for name in ("café", "フランス", "한국", "plain"):
            folder = originals / form / normalize(form, name)
            folder.mkdir(parents=True)
            for i in range(9):
                draw("discs", i).save(folder / normalize(form, f"f{'éöがf'[i % 4]} {i}.png"))
        folders = {"val_original": form, "val": f"val{form}", "test": f"test{form}"}
        assert start("img_sampler_val", *(f"--set=data.{key}={folder}" for key, folder in folders.items())).code == 0
        lists.append([list_images(folder) for folder in folders.values()])
    assert lists[0] != lists[1] == [[normalize("NFD", path) for path in paths] for paths in lists[0]]


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    draw_class(tmp_path / "a", 1)
    draw_class(tmp_path / "b", 2)
    links = {"a/x": tmp_path / "b", "b/x": tmp_path / "a", "a/up": "..", "self": "self", "c": tmp_path, "kitty": "b"}
    for i in range(24):  # all to all: paths without end
        (tmp_path / f"l{i}").mkdir()
        links |= {f"l{i}/to{j}": tmp_path / f"l{j}" for j in range(24)}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    found = {name: images for name, images in images_by_class(str(tmp_path)).items() if images}
    b = ["0.png", "1.png", "x/0.png"]
    assert found == {"a": ["0.png", "x/0.png", "x/1.png"], "b": b, "kitty": b}


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS])
def test_a_file_system_that_refuses_niceties(start, originals, monkeypatch, number):
    """CIFS, exFAT, FUSE: no modes, times, attributes, flushes or links. Copies do without; --link is told."""
    refuse = Mock(side_effect=OSError(number, os.strerror(number)))
    for name in ("chmod", "fchmod", "utime", "chown", "fsync", "fdatasync", "link", "setxattr"):
        monkeypatch.setattr(os, name, refuse)
    for name in ("copymode", "copystat"):
        monkeypatch.setattr(shutil, name, refuse)
    assert "6 images" in start("img_sampler_train").out
    one_line(start("img_sampler_train", "--link", "--set", "data.train=other"), "no hard link", "leave out --link")


def test_samplers_start_without_torch(tmp_path):
    code = "import sys, img_sampler_train, img_sampler_val; sys.exit('torch' in sys.modules)"
    assert python(code, tmp_path).returncode == 0
