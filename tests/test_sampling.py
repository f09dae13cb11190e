import errno
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest
from conftest import CLASSES, ROOT, draw, draw_folder, one_line, write_parameters
from PIL import Image

from experiment.sampling import ENDINGS, composed, images_by_class, list_images, open_images, share
from models.errors import InputError
from models.images import read_image


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


def test_an_interrupted_run_ends_in_the_same_state(start, originals):
    assert start("img_sampler_train").code == 0
    whole = contents(originals / "train")
    for name in list(whole)[:3]:
        (originals / "train" / name).unlink()
    (originals / "train" / f"{list(whole)[0]}.partial").write_bytes(b"half a copy")
    assert start("img_sampler_train").code == 0
    assert contents(originals / "train") == whole


def test_stopped_while_copying(start, originals, monkeypatch):
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


def draw_class(folder, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        draw("discs", i).save(folder / f"{i}.png")


FOREIGN = {
    "a photograph in a class": "checks/mine.jpg",
    "a photograph beside them": "mine.JPG",
    "a class": "fox/1.png",
    "notes": "notes.txt",
    "notes in a class": "discs/notes.md",
    "no ending": "README",
    "a half copy of what is not listed": "checks/mine.png.partial",
    "a photograph in a format that is not read": "checks/IMG_1.heic",
}


@pytest.mark.parametrize("path", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--overwrite", "--set", "data.train_fraction=0.5"]])
def test_what_no_sampler_wrote_is_never_deleted(start, originals, path, options):
    """It refuses by name; with --overwrite only where the file would be read as an image."""
    assert start("img_sampler_train").code == 0
    file = originals / "train" / path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"mine")
    before = contents(originals / "train")
    result = start("img_sampler_train", *options)
    if not options or path.lower().endswith(("jpg", "1.png")):
        one_line(result, f"train: not written by a sampler, so never removed: {path}; move it elsewhere")
        assert contents(originals / "train") == before
    else:
        assert result.code == 0 and f"train: not written by a sampler, and left there: {path}" in result.out
        assert len(contents(originals / "train")) == 3 * (6 if options[1:] else 2) + 2
    assert file.read_bytes() == b"mine"


def test_links_that_no_sampler_made_are_neither_followed_nor_deleted(start, originals):
    draw_class(originals / "elsewhere" / "fox", 1)
    assert start("img_sampler_train").code == 0
    (originals / "train" / "fox").symlink_to(originals / "elsewhere" / "fox")
    for options in ([], ["--overwrite"]):
        one_line(start("img_sampler_train", *options), "never removed: fox;")
    assert (originals / "train" / "fox" / "0.png").exists()
    (originals / "train" / "fox").unlink()
    # a class folder that was moved to another disk, and is linked, is still the sampler's
    shutil.move(originals / "train" / "checks", originals / "scratch")
    (originals / "train" / "checks").symlink_to(originals / "scratch")
    assert start("img_sampler_train", "--overwrite", "--set", "data.train_fraction=1").code == 0
    assert len(list((originals / "scratch").iterdir())) == 11


def test_a_manifest_can_not_reach_outside_its_folder(start, originals):
    assert start("img_sampler_train").code == 0
    (originals / "thesis.txt").write_text("mine")
    manifest = json.loads((originals / "train/manifest.json").read_text())
    manifest["files"] |= {"../thesis.txt": "4 0", str(originals / "thesis.txt"): "4 0", "": "0 0"}
    (originals / "train/manifest.json").write_text(json.dumps(manifest))
    assert start("img_sampler_train", "--overwrite", "--set", "data.train_fraction=1").code == 0
    assert (originals / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": 3}', '{"source": "x", "seed": 1, "fraction": 1}'])
def test_a_manifest_without_a_list_gives_no_right_to_delete(start, originals, manifest):
    assert start("img_sampler_train").code == 0
    (originals / "train/manifest.json").write_text(manifest)
    before = contents(originals / "train")
    one_line(start("img_sampler_train", "--overwrite"), "not empty, and not written by a sampler", "empty it")
    assert contents(originals / "train") == before


def test_the_list_is_written_before_the_first_copy(start, originals, monkeypatch):
    def stop(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", stop)
    assert start("img_sampler_train").code == 130
    manifest = json.loads((originals / "train/manifest.json").read_text())
    assert len(manifest["files"]) == 6 and not manifest["complete"]


def test_nothing_is_begun_where_a_later_target_refuses(start, originals):
    (originals / "test").mkdir()
    (originals / "test" / "mine.png").write_bytes(b"mine")
    one_line(start("img_sampler_val"), "test: not empty")
    assert set(contents(originals / "val")) <= {"manifest.json"}


@pytest.mark.parametrize("how", [[], ["--link"]])
@pytest.mark.parametrize("again", [[], ["--overwrite"], ["--set", "data.train_fraction=1", "--overwrite"]])
def test_what_was_replaced_under_its_name_is_renewed(start, originals, how, again):
    """By a picture of another size, by one of the same size, by an older file, and by one that was renamed."""
    for name in CLASSES:  # bitmaps of one size, so that the size tells nothing
        for path in (originals / "train_original" / name).iterdir():
            draw(name, 1).convert("RGB").save(path, "BMP")
    assert start("img_sampler_train", *how).code == 0
    sampled = sorted(set(contents(originals / "train")) - {"manifest.json"})
    names = [originals / "train_original" / name for name in sampled]
    for i, path in enumerate(names[:4]):
        fresh = path.with_name("fresh")
        draw("discs", 50 + i, 44 if i == 0 else 40).save(fresh, "BMP")
        if i == 1:
            os.utime(fresh, (1e9, 1e9))  # older than what it replaces
        os.replace(fresh, path)
    result = start("img_sampler_train", *how, *again)
    assert result.code == 0 and "; 4 renewed" in result.out
    for name in sampled:
        assert (originals / "train" / name).read_bytes() == (originals / "train_original" / name).read_bytes()
        assert not how or os.path.samefile(originals / "train" / name, originals / "train_original" / name)
    assert "renewed" not in start("img_sampler_train", *how, *again).out


def test_stopped_while_renewing(start, originals, monkeypatch):
    """The manifest of the second run lists new versions; the old pictures must not pass for them in the third."""
    assert start("img_sampler_train").code == 0
    for path in (originals / "train_original").rglob("*.png"):
        draw("discs", 99).save(path)

    def stop(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", stop)
        assert start("img_sampler_train").code == 130
    assert start("img_sampler_train").code == 0
    sampled = set(contents(originals / "train")) - {"manifest.json"}
    assert len(sampled) == 6
    for name in sampled:
        assert (originals / "train" / name).read_bytes() == (originals / "train_original" / name).read_bytes()


def test_another_source_with_the_same_names_sizes_and_times(start, originals):
    draw_folder(originals / "other", 11)
    for folder, colour in (("train_original", "red"), ("other", "blue")):
        for path in (originals / folder).rglob("*.png"):
            Image.new("RGB", (8, 8), colour).save(path, "BMP")
            os.utime(path, (0, 0))
    assert start("img_sampler_train").code == 0
    one_line(start("img_sampler_train", "--set", "data.train_original=other"), "was sampled with source", "--overwrite")
    assert start("img_sampler_train", "--set", "data.train_original=other", "--overwrite").code == 0
    for path in (originals / "train").rglob("*.png"):
        assert Image.open(path).getpixel((0, 0)) == (0, 0, 255)


def test_a_copy_of_another_length_is_renewed(start, originals):
    assert start("img_sampler_train").code == 0
    whole = contents(originals / "train")
    (originals / "train" / list(whole)[0]).write_bytes(b"cut")
    assert "; 1 renewed" in start("img_sampler_train").out
    assert contents(originals / "train") == whole


SYSTEM = ["@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found", "#recycle", "@Recycle"]
SYSTEM_FILES = ["Thumbs.db", "desktop.ini", "Icon\r"]
HIDDEN = [".DS_Store", "._0.png", ".thumbnails", ".Trashes", ".directory"]


def test_what_systems_make_is_no_class_and_no_image(start, originals):
    plain = list_images(originals / "val_original")
    for place in (originals / "val_original", originals / "val_original" / "discs"):
        for name in [*SYSTEM, ".thumbnails", ".Trashes"]:
            draw_class(place / name / "thumbnails", 3)
        for name in [*SYSTEM_FILES, ".DS_Store", "._0.png", ".directory"]:
            (place / name).write_bytes(b"x")
    assert list_images(originals / "val_original") == plain
    left_out = Counter()
    list_images(originals / "val_original", left_out)
    assert left_out == dict.fromkeys([*SYSTEM, *SYSTEM_FILES], 2) | {"hidden": 2 * len(HIDDEN)}
    result = start("img_sampler_val")
    lines = [line for line in result.out.splitlines() if "left out" in line]
    assert len(lines) == 1 and "val_original: left out 10 hidden, 2 " in lines[0] and "and 3 more kinds" in lines[0]
    assert "convert" not in lines[0] and "of 3 classes" in result.out
    assert {path.name for path in (originals / "val").iterdir() if path.is_dir()} == set(CLASSES)


def test_a_class_may_be_called_almost_like_them(tmp_path):
    names = ["MACOSX", "eaDir", "thumbs", "lost+found things", "recycle", "snapshot"]
    for name in names:
        draw_class(tmp_path / name, 1)
    assert list(images_by_class(str(tmp_path))) == sorted(names)


def test_a_target_with_only_a_systems_files_is_empty(start, originals):
    for folder in ("train", "train/.fseventsd", "train/@eaDir", "train/empty"):
        (originals / folder).mkdir()
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".fseventsd/no_log", "@eaDir/SYNOINDEX", "empty/.DS_Store"):
        (originals / "train" / name).write_bytes(b"x")
    for _ in range(2):  # and they are no strangers in the second run
        assert start("img_sampler_train").code == 0
        assert (originals / "train/.DS_Store").exists() and (originals / "train/@eaDir/SYNOINDEX").exists()


def test_other_files_are_counted_by_ending(start, originals, capfd):
    folder = originals / "train_original"
    for name in ("discs/1.heic", "discs/2.HEIC", "checks/3.jxl", "stripes/4.cr2", "discs/labels.txt", "checks/README"):
        (folder / name).write_bytes(b"x")
    draw("discs", 1).save(folder / "loose.png")
    shutil.copytree(folder / "discs", folder / "fox", ignore=shutil.ignore_patterns("*.png"))
    result = start("img_sampler_train")
    assert result.code == 0
    lines = result.out.splitlines()
    expected = "4 .heic, 2 .txt, 1 .cr2, 1 .jxl, 1 images in no class folder, 1 without an ending"
    said = lines[0].split("left out ")[1].split(": not read as images")[0]
    assert sorted(said.split(", ")) == sorted(expected.split(", ")) and said.startswith("4 .heic, 2 .txt")
    assert "convert photographs to JPEG or PNG" in lines[0]
    assert lines[1] == "train_original: no images in 1 of 4 class folders: fox"
    capfd.readouterr()
    assert len(open_images("train_original")) == 34
    assert capfd.readouterr().out.startswith("train_original: left out 4 .heic, 2 .txt, ")
    open_images("train")  # the manifest is no stranger
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("names", "only", "remedy"),
    [
        (["1.heic", "2.HEIC"], "2 .heic", "convert photographs"),
        (["1.jxl"], "1 .jxl", "convert photographs"),
        (["a.NEF", "b.nef", ".DS_Store"], "2 .nef, 1 hidden", "convert photographs"),
        (["cats.tar"], "1 .tar", "unpack archives"),
        (["Thumbs.db"], "1 Thumbs.db", "make demo"),
    ],
)
def test_only_files_that_are_not_read(start, originals, names, only, remedy):
    for folder in ("phone", "phone/cats"):
        (originals / folder).mkdir()
    for name in names:
        (originals / "phone" / "cats" / name).write_bytes(b"x")
    results = [start(f"img_sampler_{part}", "--set", f"data.{part}_original=phone") for part in ("train", "val")]
    for result in results:
        one_line(result, f"phone: its class folders hold no images, only {only}; ", remedy)
        assert ("ImageNet" in result.err) == (remedy == "make demo")
    with pytest.raises(InputError, match=f"holds no images, only {only}; .*{remedy}"):
        open_images("phone")
    one_line(start("img_sampler_train", "--set", "data.train_original=phone/cats"), "no class folders, only")


def test_training_and_test_say_what_they_leave_out(start, trained):
    for name in ("train", "phone"):
        (trained / name).mkdir(exist_ok=True)
        (trained / name / "IMG_1.HEIC").write_bytes(b"x")
    draw_class(trained / "train" / CLASSES[0] / "@eaDir" / "thumbnails", 2)
    for script, key in (("train_darionet", "data.train"), ("train_darionet", "data.val"), ("test", "data.test")):
        result = start(script, "--set", f"{key}=phone")
        one_line(result, "phone: holds no images, only 1 .heic; convert photographs")
        assert result.out.count("train: left out 1 .heic, 1 @eaDir: not read as images") == (key == "data.val")


@pytest.mark.parametrize("suffix", sorted(set(ENDINGS) - {".mpo"}))
def test_every_ending_that_is_listed_is_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix.upper()}"
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    Image.new(mode, (32, 32), "white").save(path, ENDINGS[suffix])
    assert list_images(tmp_path) == [path.name]
    assert read_image(path).getpixel((9, 9)) == (255, 255, 255)


def test_names_are_compared_composed(start, originals):
    """Names as Linux and as a Mac give them: the same files are chosen, listed in the same order, and found again."""
    names = ["café", "フランス", "한국", "plain"]
    for form in ("NFC", "NFD"):
        for c, name in enumerate(names):
            folder = originals / form / unicodedata.normalize(form, name)
            folder.mkdir(parents=True)
            for i in range(9):
                draw("discs", 10 * c + i).save(folder / unicodedata.normalize(form, f"f{'éöがf'[i % 4]} {i}.png"))
    nfc, nfd = list_images("NFC"), list_images("NFD")
    assert nfc != nfd and nfc == [composed(path) for path in nfd]
    chosen = []
    for form in ("NFC", "NFD"):
        assert start("img_sampler_val", "--set", f"data.val_original={form}").code == 0
        chosen.append([{composed(path) for path in list_images(target)} for target in ("val", "test")])
        shutil.rmtree("val"), shutil.rmtree("test")
    assert chosen[0] == chosen[1] and len(chosen[0][0]) == 4 * 5
    assert start("img_sampler_train", "--set", "data.train_original=NFD").code == 0
    assert {path.name for path in (originals / "train").iterdir()} - {"manifest.json"} == set(os.listdir("NFD"))


def test_a_target_that_decomposes_names(start, originals):
    """HFS+ gives what was written composed back decomposed: here one file under both names."""
    (originals / "train_original/discs").rename(originals / "train_original/caf\u00e9")
    assert start("img_sampler_train").code == 0
    (originals / "train/caf\u00e9").rename(originals / "kept")
    (originals / "train/cafe\u0301").mkdir()
    for path in (originals / "kept").iterdir():
        (originals / "train/cafe\u0301" / path.name).hardlink_to(path)
    one_line(start("img_sampler_train"), "never removed: cafe\u0301/")  # another file, on this file system
    (originals / "train/caf\u00e9").symlink_to(originals / "train/cafe\u0301")
    result = start("img_sampler_train")
    assert result.code == 0 and "renewed" not in result.out


def test_a_class_that_is_a_link_to_another(start, originals):
    source = originals / "train_original"
    (source / "kitty").symlink_to("checks")
    (source / "nested").mkdir()
    (source / "nested" / "all").symlink_to(source / "discs")
    (source / "away").symlink_to(originals / "val_original" / "discs")
    classes = images_by_class("train_original")
    assert {name: len(images) for name, images in classes.items()} == {
        "away": 5,
        "checks": 11,
        "discs": 11,
        "kitty": 11,
        "nested": 11,
        "stripes": 11,
    }
    assert classes["kitty"] == classes["checks"]
    assert start("img_sampler_train", "--set", "data.train_fraction=1").code == 0
    assert len(list_images("train")) == 60


def test_loops_of_links_end(tmp_path):
    draw_class(tmp_path / "a", 1), draw_class(tmp_path / "b", 1)
    (tmp_path / "a" / "x").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "x").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "c").symlink_to(tmp_path)
    assert list_images(tmp_path) == ["a/0.png", "a/x/0.png", "b/0.png", "b/x/0.png"]


@pytest.mark.parametrize("shape", ["a ladder", "all to all"])
def test_links_that_make_paths_without_end(tmp_path, shape):
    folders = [tmp_path / f"{i:02}" for i in range(24)]
    for folder in folders:
        folder.mkdir()
    for i, folder in enumerate(folders):
        others = folders[i + 1 : i + 2] * 2 if shape == "a ladder" else folders
        for j, other in enumerate(others):
            (folder / f"to{j}").symlink_to(other)
    with pytest.raises(InputError, match="links lead to .* again and again; remove"):
        list_images(tmp_path)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS])
def test_a_file_system_that_refuses_niceties(start, originals, monkeypatch, number):
    """CIFS, exFAT, FUSE: no modes, times, attributes, flushes or links. Copies do without; --link is told."""

    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    for name in ("chmod", "fchmod", "lchmod", "utime", "chown", "fsync", "fdatasync", "link", "setxattr", "sync"):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, refuse)
    for name in ("copymode", "copystat"):
        monkeypatch.setattr(shutil, name, refuse)
    result = start("img_sampler_train")
    assert result.code == 0 and "6 images" in result.out
    assert "renewed" not in start("img_sampler_train").out
    one_line(start("img_sampler_train", "--link", "--set", "data.train=other"), "no hard link", "leave out --link")


def test_samplers_start_without_torch():
    code = "import sys, img_sampler_train, img_sampler_val; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
