import os

import numpy as np
import pytest
import torch
from conftest import CLASSES, draw, draw_folder
from PIL import Image

from experiment.data import NO_LABEL, ImageTree, Transform, UnreadableImage, epoch_batches, make_loader, read_image
from models.errors import InputError

RED = (200, 30, 60)


def save(tmp_path, image: Image.Image, name: str, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def colour(path) -> tuple[int, ...]:
    image = read_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_modes_are_shown_as_a_viewer_would(tmp_path):
    red = Image.new("RGB", (4, 4), RED)
    assert colour(save(tmp_path, red, "rgb.png")) == RED
    assert colour(save(tmp_path, red.convert("P"), "palette.png")) == pytest.approx(RED, abs=30)
    assert colour(save(tmp_path, Image.new("L", (4, 4), 77), "grey.png")) == (77, 77, 77)
    assert colour(save(tmp_path, Image.new("1", (4, 4), 1), "bits.png")) == (255, 255, 255)
    assert colour(save(tmp_path, Image.new("RGBA", (4, 4), (*RED, 0)), "clear.png")) == (255, 255, 255)
    assert colour(save(tmp_path, Image.new("RGBA", (4, 4), (*RED, 255)), "opaque.png")) == RED
    assert colour(save(tmp_path, Image.new("LA", (4, 4), (0, 128)), "la.png")) == pytest.approx((127,) * 3, abs=1)
    assert colour(save(tmp_path, red.convert("CMYK"), "cmyk.jpg", quality=100)) == pytest.approx(RED, abs=4)
    frames = [Image.new("RGB", (4, 4), c) for c in (RED, (0, 0, 255))]
    assert colour(save(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:])) == RED


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (256 * 200, 199), (65535, 255)])
def test_sixteen_bits_are_scaled(tmp_path, value, expected):
    image = Image.fromarray(np.full((4, 4), value, np.uint16))
    assert colour(save(tmp_path, image, "deep.png")) == (expected,) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3))
    turn = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, stored, "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(upright))


def unreadable(path, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_what_is_no_image(tmp_path):
    whole = save(tmp_path, draw("discs", 1, 64), "whole.jpg").read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "cut.jpg").write_bytes(whole[: int(len(whole) * share)])
        unreadable(tmp_path / "cut.jpg", "[Tt]runcated|cannot identify|broken")
    (tmp_path / "empty.jpg").write_bytes(b"")
    unreadable(tmp_path / "empty.jpg", "cannot identify")
    (tmp_path / "text.jpg").write_text("not an image")
    unreadable(tmp_path / "text.jpg", "cannot identify")
    unreadable(tmp_path / "absent.jpg", "No such file")
    os.mkfifo(tmp_path / "pipe.jpg")
    unreadable(tmp_path / "pipe.jpg", "not a plain file")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    unreadable(tmp_path / "loop.jpg", "symbolic links")
    save(tmp_path, Image.new("F", (4, 4)), "float.tiff")
    unreadable(tmp_path / "float.tiff", "floating-point")
    save(tmp_path, Image.new("RGB", (4, 4)), "shape.pcx").rename(tmp_path / "disguised.png")
    unreadable(tmp_path / "disguised.png", "cannot identify")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path, Image.new("1", (1000, 1000)), "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    unreadable(path, "DecompressionBomb")


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 5000), (3, 200), (33, 32)])
def test_any_size_becomes_a_crop(size):
    for epoch in (None, 3):
        pixels = Transform(36, 32, epoch=epoch)(Image.new("RGB", size, RED), 0)
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
        assert pixels[:, 5, 5].tolist() == list(RED)


def test_centre_crop():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    pixels = Transform(40, 32)(image, 0)
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(image)[4:36, 9:41])


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    image = draw("checks", 0)

    def crop(seed=1, epoch=0, index=0):
        return Transform(40, 24, 0.5, 0.1, seed, epoch)(image, index)

    assert crop().equal(crop())
    assert len({crop(epoch=e).numpy().tobytes() for e in range(20)}) > 10
    assert len({crop(index=i).numpy().tobytes() for i in range(20)}) > 10
    assert len({crop(seed=s).numpy().tobytes() for s in range(20)}) > 10


def test_flip_probabilities():
    image = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    plain = Transform(16, 16)(image, 0)
    sideways, upside = plain.flip(2), plain.flip(1)
    counts = {"plain": 0, "sideways": 0, "upside": 0, "both": 0}
    known = {"plain": plain, "sideways": sideways, "upside": upside, "both": plain.flip(1, 2)}
    for index in range(1000):
        pixels = Transform(16, 16, 0.5, 0.1, 7, 0)(image, index)
        counts[next(name for name, expected in known.items() if pixels.equal(expected))] += 1
    assert abs(counts["sideways"] + counts["both"] - 500) < 70
    assert abs(counts["upside"] + counts["both"] - 100) < 40


def test_batches_are_complete_seeded_and_limited():
    batches = epoch_batches(10, 4, seed=1, epoch=0, shuffle=True, limit=None)
    assert [len(b) for b in batches] == [4, 4, 2] and sorted(sum(batches, [])) == list(range(10))
    assert batches == epoch_batches(10, 4, seed=1, epoch=0, shuffle=True, limit=None)
    assert batches != epoch_batches(10, 4, seed=1, epoch=1, shuffle=True, limit=None)
    assert sum(epoch_batches(10, 4, seed=1, epoch=0, shuffle=False, limit=None), []) == list(range(10))
    part = epoch_batches(1000, 4, seed=1, epoch=0, shuffle=False, limit=2)
    assert [len(b) for b in part] == [4, 4] and max(part[-1]) > 100  # not the first classes


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_same_batches_for_any_number_of_workers(tmp_path, workers):
    dataset = ImageTree(str(draw_folder(tmp_path / "images", 4)), Transform(36, 32, 0.5, 0.5, 1, 2))
    (tmp_path / "images" / CLASSES[0] / "0.png").write_bytes(b"broken")
    batches = epoch_batches(12, 5, seed=3, epoch=2, shuffle=True, limit=None)
    seen = []
    for batch in make_loader(dataset, batches, workers, False):
        assert len(batch.images) == len(batch.indices)
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            assert image.equal(dataset[index][1])
        seen.append(batch.indices.tolist())
        for index, reason in batch.unreadable:
            assert index == 0 and "identify" in reason
    assert seen == [[i for i in batch if i != 0] for batch in batches]


def test_classes_are_mapped_by_name(tmp_path):
    """Three of a thousand classes score as they would among all."""
    names = [f"n{i:08d}" for i in range(1000)]
    for name in (names[7], names[500], names[999]):
        (tmp_path / name).mkdir()
        draw("discs", 1).save(tmp_path / name / "a.png")
    assert ImageTree(str(tmp_path)).targets(names) == [7, 500, 999]
    assert ImageTree(str(tmp_path)).targets(names[::-1]) == [992, 499, 0]
    with pytest.raises(InputError, match=r"no class named n00000500, n00000999; it knows 100"):
        ImageTree(str(tmp_path)).targets(names[:100])


def test_trees_without_labels(tmp_path):
    draw("discs", 1).save(tmp_path / "a.png")
    assert ImageTree(str(tmp_path)).targets(["x"]) == [NO_LABEL]
    (tmp_path / "x").mkdir()
    draw("discs", 2).save(tmp_path / "x" / "b.png")
    with pytest.raises(InputError, match=r"a\.png lies beside the class folders"):
        ImageTree(str(tmp_path)).targets(["x"])


def test_absent_and_empty_folders(tmp_path):
    for folder, message in (("nowhere", "no such folder"), ("", "holds no images")):
        with pytest.raises(InputError, match=message):
            ImageTree(str(tmp_path / folder))
