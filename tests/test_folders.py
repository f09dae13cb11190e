"""try_darionet.py --small folder and --save: batches of one size, and rebuilt images as files."""

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw, last_line, one_line, read_csv
from PIL import Image

from experiment import evaluation
from experiment.data import ImageTree, Whole, small_batches
from experiment.evaluation import LONGEST_NAME, output_name
from models.darionet import load_rrdbnet
from models.pipeline import Upscale
from models.scaler import Scaler

SIZES = [(10, 10), (10, 7), (10, 10), (6, 6), (10, 10), (10, 7), (10, 10), (10, 10), (13, 9)]  # width, height
SAVE = ("try_darionet", "--small", "icons", "--save", "out")


@pytest.fixture
def icons(trained) -> Path:
    """One image of every SIZES, in two folders."""
    folder = trained / "icons"
    (folder / "b").mkdir(parents=True)
    for i, size in enumerate(SIZES):
        draw(("checks", "discs", "stripes")[i % 3], i).resize(size).save(folder / ("b" if i % 2 else "") / f"{i}.png")
    return folder


def rows_of(result) -> list[dict]:
    return read_csv(last_line(result) / "predictions.csv")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.array(image, dtype=int)


def rebuilt(small: torch.Tensor | Path, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """What DarioNet.pt makes of small images or of a file, computed here: (height, width) of `size`, 8 bits."""
    if isinstance(small, Path):
        small = torch.from_numpy(pixels(small)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        image = Upscale(load_rrdbnet("DarioNet.pt"))(small, size).clamp(0, 1)
    return (image[0].permute(1, 2, 0) * 255).round().int().numpy()


def test_batches_hold_one_size(tmp_path):
    """Of as many images as have the pixels of four of 8 x 8; a file that is no image joins them."""
    sizes = [(8, 8), (4, 8), (8, 8), (16, 16), (8, 8), (4, 8), (8, 8), (8, 8), (4, 4)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_text("no image")
    found = list(small_batches(ImageTree(str(tmp_path), Whole(16)), list(range(10)), 0, 4, 8))
    assert [batch.indices.tolist() for batch in found] == [[0, 2, 4, 6], [7], [1, 5], [3], [8]]
    assert [batch.images.shape[-1] for batch in found] == [8, 8, 4, 16, 4]
    assert [index for index, _ in found[1].unreadable] == [9]


def test_a_batch_gives_what_one_at_a_time_gives(start, icons):
    alone, together = (
        start("try_darionet", "--small", "icons", "--save", out, "--set", f"test.batch_size={n}", "--set", workers)
        for out, n, workers in (("alone", 1, "data.workers=0"), ("together", 4, "data.workers=2"))
    )
    assert alone.code == together.code == 0, together.err
    rows, others = rows_of(alone), rows_of(together)
    assert [row["image"] for row in rows] == ImageTree("icons").paths  # the folder's order, whatever was read when
    for row, other in zip(rows, others, strict=True):
        width, height = SIZES[int(Path(row["image"]).stem)]
        assert (row["width"], row["height"]) == (str(width), str(height))
        for key, value in row.items():
            if key.endswith("probability"):
                assert float(value) == pytest.approx(float(other[key]), abs=1e-4)
            elif key != "file":
                assert value == other[key]
        image = pixels(Path("alone", row["image"]))
        factor = 32 / min(width, height)
        assert image.shape == (round(height * factor), round(width * factor), 3)
        expected = rebuilt(Path("icons", row["image"]), image.shape[:2])
        assert abs(image - expected).max() <= 1 and (image == expected).mean() > 0.99
        assert abs(image - pixels(Path("together", row["image"]))).max() <= 1


NAMES = [
    *("a.jpg", "a.png", "a.jpg.png", "A.PNG", "-rf.png", "two\nlines.jpg", "c/d e/y.gif", "\u65e5\u672c.webp"),
    *(os.fsdecode(b"caf\xe9.bmp"), "x" * 251 + ".png", "x" * 251 + ".jpg", "x" * 250 + "y.jpg", "\u754c" * 83 + ".jpg"),
]


def test_every_name_has_its_own_file(start, trained):
    """Names that are no text, lines, dashes, 255 bytes, and names that differ in their endings alone."""
    assert [output_name(name) for name in NAMES[:4]] == ["a.jpg.png", "a.png", "a.jpg.png.png", "A.PNG"]
    expected = {}
    for i, name in enumerate(NAMES):
        path = Path("icons", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw("discs", i, 10).save(path, "PNG")  # read by content
        expected[Path("out", output_name(name))] = rebuilt(path)
    result = start(*SAVE)
    assert result.code == 0, result.err
    assert {path for path in Path("out").rglob("*") if path.is_file()} == set(expected) and len(expected) == len(NAMES)
    for path, image in expected.items():
        assert os.path.dirname(path) in ("out", "out/c/d e") and len(os.fsencode(path.name)) <= LONGEST_NAME
        assert abs(pixels(path) - image).max() <= 1
    shown = {str(path).encode("utf-8", "backslashreplace").decode() for path in expected}
    assert {row["file"] for row in rows_of(result)} == shown


def test_a_stopped_run_goes_on_and_overwrites_nothing(start, icons, monkeypatch):
    save = (*SAVE, "--set", "test.batch_size=1")
    calls, one = [], evaluation.save_image

    def stopping(*arguments):
        one(*arguments)
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "save_image", stopping)
        result = start(*save)
    assert result.code == 143 and "Stopped: 4 of 9 images were looked at; the same command goes on" in result.out
    before = {path: path.stat() for path in Path("out").rglob("*.png")}
    assert {row["file"] for row in rows_of(result)} == set(map(str, before)) and len(before) == 4
    result = start(*save)
    assert result.code == 0 and "4 of 9 images were rebuilt before" in result.out and "5 images read" in result.out
    rows = rows_of(result)
    assert len(rows) == 9 and all(Path(row["file"]).is_file() for row in rows)
    for row in rows:
        assert (row["darionet_class"] == row["bilinear_label"] == row["width"] == "") == (Path(row["file"]) in before)
    for path, state in before.items():
        assert path.stat() == state
    result = start(*save)
    assert result.code == 0 and "0 images read" in result.out
    Image.new("RGB", (5, 5)).save("out/0.png")
    assert start(*save, "--overwrite").code == 0 and pixels(Path("out/0.png")).shape == (32, 32, 3)


def test_what_ends_a_run_leaves_its_rows(start, icons, monkeypatch):
    writes, real = [], evaluation.write_atomically

    def full(path, write):
        writes.append(path)
        if len(writes) > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, write)

    monkeypatch.setattr(evaluation, "write_atomically", full)
    result = start(*SAVE, "--set", "test.batch_size=1")
    assert result.code == 1 and "No space left on device: out/" in result.err and "2 images read" in result.out
    (table,) = Path("assets/logs").glob("*/predictions.csv")
    assert len(table.read_text().splitlines()) == 3


def test_only_what_was_named_rebuilds(start, trained):
    """darionet.initial_weights is where a training starts, and no row here."""
    draw("discs", 1, 12).save("icon.png")
    Path("start.pt").write_bytes(Path("DarioNet.pt").read_bytes())
    for start_of_training in ("RealESRGAN_x4plus", "start.pt"):
        result = start("try_darionet", "--small", "icon.png", "--set", f"darionet.initial_weights={start_of_training}")
        assert result.code == 0 and "ESRGAN" not in result.out
        predictions = json.loads((last_line(result) / "predictions.json").read_text())["predictions"]
        assert [one["of"] for one in predictions] == ["Bilinear", "DarioNet"]


def test_one_image_is_saved(start, trained):
    draw("discs", 1, 10).save("icon.png")
    draw("checks", 5, 90).save("photograph.jpg")
    save = ("try_darionet", "--small", "icon.png", "--save", "out")
    assert start(*save).code == 0
    assert abs(pixels(Path("out/icon.png")) - rebuilt(Path("icon.png"))).max() <= 1
    one_line(start(*save), "out/icon.png: already exists")
    assert start(*save, "--overwrite").code == 0

    result = start("try_darionet", "photograph.jpg", "--save", "out")
    assert result.code == 0, result.err
    with Image.open("photograph.jpg") as image:
        cropped = torch.from_numpy(np.array(image.resize((36, 36), 2))[2:34, 2:34] / 255).float()
    expected = rebuilt(Scaler(10)(cropped.permute(2, 0, 1)[None]))
    assert abs(pixels(Path("out/photograph.jpg.png")) - expected).max() <= 1


NOWHERE = [
    ("icons", "icons", "icons: has to lie outside icons"),
    ("icons", "icons/out", "icons/out: has to lie outside icons"),
    ("icons", "a file", ": can't be written"),
    ("icons", "taken", "taken/b/1.png: can't be written"),
    ("icons/0.png", "icons", "icons/0.png: the image itself"),
    ("icons", "linked", "linked/0.png: the image itself"),
]


@pytest.mark.parametrize(("image", "out", "message"), NOWHERE)
def test_where_nothing_can_be_saved(start, icons, image, out, message):
    """Said before the first image is read."""
    Path("a file").touch()
    Path("taken/b/1.png").mkdir(parents=True)
    Path("linked").mkdir()
    Path("linked/0.png").symlink_to("../icons/0.png")
    before = Path("icons/0.png").read_bytes()
    one_line(start("try_darionet", "--small", image, "--save", out, "--overwrite"), message)
    assert Path("icons/0.png").read_bytes() == before and not Path("assets/logs").exists()


def test_a_file_that_came_to_be_meanwhile_is_kept(start, icons, monkeypatch):
    """Another run's, or a file system's that does not tell A from a."""
    chosen = evaluation.to_rebuild

    def and_then(*arguments):
        found = chosen(*arguments)
        Path("out/8.png").write_text("mine")
        return found

    monkeypatch.setattr(evaluation, "to_rebuild", and_then)
    one_line(start(*SAVE), "out/8.png: exists since this run started")
    assert Path("out/8.png").read_text() == "mine"
