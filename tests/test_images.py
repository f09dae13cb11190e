"""Awkward files, drawn here: what each one is read as, or why not, and what every script makes of them."""

import io
import os
import random
import resource
import signal
import struct
import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CLASSES, as_nobody, draw, draw_folder, in_a_child, last_line, one_line, read_csv, results_of
from PIL import Image

from experiment.data import ImageTree
from experiment.run import Run
from models.errors import InputError
from models.images import UnreadableImage, read_image

RED, BLUE, WHITE, BLACK = (200, 30, 60), (0, 0, 255), (255, 255, 255), (0, 0, 0)
SOAK = os.environ.get("SOAK") == "1"
MUTATIONS = 10_000 if SOAK else 300
NO_IMAGE = "cannot identify"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode: str = "RGB", colour=RED, size=(4, 3)) -> Image.Image:
    return Image.new(mode, size, colour)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = plain(size=(4, 3))
    image.putpixel((0, 0), BLUE)
    return encoded(image, "PNG", exif=exif)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, kind: int, data: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", data) + after + chunk(b"IEND", b"")


def png_with(before: bytes, after: bytes = b"") -> bytes:
    """A red PNG of 4 x 3 pixels with these chunks before and after its pixels."""
    return png(4, 3, 8, 2, zlib.compress((b"\0" + bytes(RED) * 4) * 3), before, after)


LONG = zlib.compress(b"prompt " * 300_000)  # 2.1 MB, and Pillow's own limit is 1 MB
# PNGs with chunks of little interest: name -> chunks before and after the pixels
CHUNKS = {
    "65 MB of text": (chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6))) * 66, b""),
    "2 MB of plain text": (chunk(b"tEXt", b"a\0" + b"b" * 2_000_000), b""),
    "a profile that is none": (chunk(b"iCCP", b"a\0\0" + zlib.compress(b"no profile")), b""),
    "a profile that is not packed": (chunk(b"iCCP", b"a\0\0abc"), b""),
    "large EXIF data": (chunk(b"eXIf", b"II*\0" + bytes(2_000_000)), b""),
    "a large chunk of its own": (chunk(b"prVt", bytes(2_000_000)), b""),
}
# Damaged or larger than Pillow takes: name -> chunks before and after the pixels, a part of the reason
BAD_CHUNKS = {
    "long compressed text": (chunk(b"zTXt", b"parameters\0\0" + LONG), b"", "too large"),
    "long text after the pixels": (b"", chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG), "too large"),
    "a large profile": (chunk(b"iCCP", b"a\0\0" + LONG), b"", "too large"),
    "text with a wrong checksum": (chunk(b"tEXt", b"a\0b")[:-1] + b"?", b"", NO_IMAGE),
    "text packed in another way": (chunk(b"zTXt", b"a\0\7abc"), b"", NO_IMAGE),
    "an animation that is cut short": (chunk(b"acTL", b"\0\0"), b"", ""),
}


FRAMES = {"save_all": True, "append_images": [plain(colour=BLUE)], "duration": 100, "loop": 0, "lossless": True}
JPEG = encoded(draw("discs", 1, 64), "JPEG")
PNG = encoded(draw("discs", 1, 64), "PNG")
NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG")
WEBP = encoded(plain(), "WEBP", lossless=True)
DAMAGED_EXIF = encoded(plain(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
# Orientations from 0, and where the corner at the top left is shown; 0 and 9 are none
CORNERS = [(0, 0), (0, 0), (3, 0), (3, 2), (0, 2), (0, 0), (2, 0), (2, 3), (0, 3), (0, 0)]
# name -> bytes, and (size, colour of the first pixel, or of the one at a place), or a part of the reason
READ = {
    "plain.png": (encoded(plain(), "PNG"), ((4, 3), RED)),
    "wrong extension.jpg": (encoded(plain(), "PNG"), ((4, 3), RED)),
    "UPPER.PNG": (encoded(plain(), "PNG"), ((4, 3), RED)),
    "plain.jpg": (encoded(plain("L", 77), "JPEG", quality=100), ((4, 3), (77, 77, 77))),
    "cmyk.jpg": (encoded(plain("CMYK", (0, 0, 0, 255)), "JPEG", quality=100), ((4, 3), BLACK)),
    "la half.png": (encoded(plain("LA", (0, 128)), "PNG"), ((4, 3), (127, 127, 127))),
    "rgba clear.png": (encoded(plain("RGBA", (*RED, 0)), "PNG"), ((4, 3), WHITE)),
    "rgba opaque.png": (encoded(plain("RGBA", (*RED, 255)), "PNG"), ((4, 3), RED)),
    "palette.png": (encoded(plain().quantize(2), "PNG"), ((4, 3), RED)),
    "palette clear.png": (encoded(plain().quantize(2), "PNG", transparency=0), ((4, 3), WHITE)),
    "16 bit.png": (encoded(plain("I;16", 256 * 200), "PNG"), ((4, 3), (199, 199, 199))),
    **{f"frames.{k}": (encoded(plain(), k, **FRAMES), ((4, 3), RED)) for k in ("GIF", "PNG", "WEBP", "TIFF")},
    "plain.webp": (WEBP, ((4, 3), RED)),
    "jpeg 2000.jpg": (encoded(plain(size=(16, 16)), "JPEG2000"), ((16, 16), RED)),
    "one pixel.png": (encoded(plain(size=(1, 1)), "PNG"), ((1, 1), RED)),
    "strip.png": (encoded(plain(size=(20_000, 1)), "PNG"), ((20_000, 1), RED)),
    "tower.png": (encoded(plain(size=(1, 20_000)), "PNG"), ((1, 20_000), RED)),
    "damaged exif.png": (DAMAGED_EXIF, ((4, 3), RED)),
    "without its end.png": (encoded(plain(), "PNG")[:-12], ((4, 3), RED)),  # every pixel is there
    "text after it.png": (encoded(plain(), "PNG") + b"and more", ((4, 3), RED)),
    **{f"{name}.png": (png_with(*chunks), ((4, 3), RED)) for name, chunks in CHUNKS.items()},
    **{f"orientation {i}.png": (turned(i), ((4, 3)[:: -1 if 5 <= i <= 8 else 1], BLUE, CORNERS[i])) for i in range(10)},
}
TEXTS = {
    "empty": b"",
    "zeros": bytes(10_000),
    "page": b"<!doctype html>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}
REFUSED = {
    **{f"{name}.jpg": (data, NO_IMAGE) for name, data in TEXTS.items()},
    "cut at 10 %.jpg": (JPEG[: len(JPEG) // 10], ""),
    **{f"cut at {part} %.jpg": (JPEG[: len(JPEG) * part // 100], "truncated") for part in (50, 99)},
    **{f"cut at {part} %.png": (NOISE[: len(NOISE) * part // 100], "runcated") for part in (10, 50, 99)},
    "cut.webp": (WEBP[:-6], ""),
    "cut.gif": (encoded(draw("discs", 1, 64), "GIF")[:200], "runcated"),
    "cut.bmp": (encoded(plain(size=(40, 40)), "BMP")[:-100], "runcated"),
    "ycbcr.tiff": (encoded(plain("YCbCr", (77, 128, 128)), "TIFF"), "not compressed as JPEG"),
    **{f"{name}.png": (png_with(*chunks), reason) for name, (*chunks, reason) in BAD_CHUNKS.items()},
    "float.tiff": (encoded(Image.new("F", (4, 3)), "TIFF"), "floating-point"),
    "bomb.png": (png(30_000, 30_000, 8, 2, zlib.compress(b"\0" * 100)), "DecompressionBomb"),
    "no width.png": (png(0, 5, 8, 2, zlib.compress(b"\0" * 100)), ""),
    **{f"{k}.png": (encoded(plain(size=(16, 16)), k), NO_IMAGE) for k in ("ICO", "PCX", "TGA", "EPS", "PDF")},
    "xbm.gif": (encoded(plain("1", 1), "XBM"), NO_IMAGE),
}
LATIN = os.fsdecode(b"caf\xe9.png")  # a name that is not UTF-8


def write_corpus(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Writes every kind into `folder`; the names of those that can be read, and of the others with the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (contents, _) in (READ | REFUSED).items():
        (folder / name).write_bytes(contents)
    (folder / LATIN).write_bytes(READ["plain.png"][0])
    (folder / os.fsdecode(b"br\xf6ken.png")).write_bytes(b"no")
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "linked.png").symlink_to("plain.png")
    read = [*READ, LATIN, "linked.png"]
    others = {name: reason for name, (_, reason) in REFUSED.items()} | {os.fsdecode(b"br\xf6ken.png"): NO_IMAGE}
    others |= {"pipe.png": "not a plain file", "loop.png": "symbolic links", "dangling.png": "No such file"}
    return read, others


@pytest.mark.parametrize("name", READ)
def test_what_it_is_read_as(tmp_path, name):
    contents, (size, colour, *place) = READ[name]
    (tmp_path / name).write_bytes(contents)
    image = read_image(tmp_path / name)
    assert (image.mode, image.size, image.getpixel(*place or [(0, 0)])) == ("RGB", size, colour)


@pytest.mark.parametrize("name", REFUSED)
def test_why_it_is_not_read(tmp_path, name):
    contents, reason = REFUSED[name]
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UnreadableImage, match=reason or None) as error:
        read_image(tmp_path / name)
    assert "\n" not in str(error.value) and 3 < len(str(error.value)) <= 200


def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "secret.png"
    path.touch(0)

    def work() -> None:
        as_nobody(tmp_path)
        with pytest.raises(UnreadableImage, match="Permission denied"):
            read_image(path)

    in_a_child(work)
    tmp_path.chmod(0o755)


def take_at_most(more: int) -> None:
    """Refuses this process more than `more` bytes of memory beside what it has."""
    more += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (more, more))


def test_what_a_large_image_may_take(tmp_path):
    """48 megapixels of 16 bits, in 1.5 GiB."""
    Image.new("I;16", (8000, 6000), 256 * 200).save(tmp_path / "deep.png", compress_level=1)

    def work() -> None:
        take_at_most(3 * 2**29)
        assert read_image(tmp_path / "deep.png").getpixel((0, 0)) == (199, 199, 199)

    in_a_child(work)


def listed(folder: Path) -> dict[str, str]:
    """unreadable.csv of a run: image -> reason."""
    return {row["image"]: row["reason"] for row in read_csv(folder / "unreadable.csv")}


def printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def check_list(result, others: dict[str, str], prefix: str = "") -> Path:
    """Whether a run lists these as unreadable; its folder."""
    folder = last_line(result)
    found = listed(folder)
    assert set(found) == {prefix + printable(name) for name in others} and "Traceback" not in result.err
    assert all(reason in found[prefix + printable(name)] for name, reason in others.items())
    return folder


@pytest.mark.usefixtures("no_figures")
def test_training_and_evaluation_list_them(start, trained):
    for part in ("train", "test"):
        read, others = write_corpus(trained / part / CLASSES[0])
    options = ("--set", "training.epochs=1", "--set", "training.batch_size=32", "--set", "data.workers=2")
    result = start("train_darionet", *options, "--set", "darionet.weights=new.pt")
    assert result.code == 0 and f"{len(others)} training images could not be read" in result.out, result
    history = read_csv(check_list(result, others, f"{CLASSES[0]}/") / "history.csv")
    assert history[0]["unreadable"] == str(len(others))

    result = start("test", "--set", "test.batch_size=32")
    assert result.code == 1
    check_list(result, others, f"{CLASSES[0]}/")
    results = results_of(result)
    assert {variant["n"] for variant in results["variants"]} == {9 + len(read)}
    assert len(results["unreadable"]) == len(others)


def test_a_folder_of_small_images(start, trained):
    read, others = write_corpus(trained / "icons")
    draw("discs", 1, 90).save(trained / "icons" / "large.png")
    large = ("strip.png", "tower.png", "large.png")
    result = start("try_darionet", "--small", "icons")
    assert result.code == 1
    folder = check_list(result, others | dict.fromkeys(large, "not small"))
    rows = read_csv(folder / "predictions.csv")
    assert {row["image"] for row in rows} == {printable(name) for name in read} - {*large}


def test_one_image_is_read_or_refused_in_one_line(start, trained):
    write_corpus(trained / "icons")
    assert start("try_darionet", "--small", f"icons/{LATIN}").code == 0
    for name in ["empty.jpg", "bomb.png", "pipe.png", os.fsdecode(b"br\xf6ken.png"), "loop.png"]:
        one_line(start("try_darionet", f"icons/{name}"), "icons/")


MANY = [(1000, 999, False), (1001, 1, False), (1001, 2, True), (9, 9, True)]
MANY += [(10**6, 900, False), (10**6, 1000, False), (10**6, 1001, True), (10**6, 1100, True)]


@pytest.mark.parametrize(("count", "bad", "stops"), MANY)
def test_how_many_may_be_unreadable(tmp_path, count, bad, stops):
    images = ImageTree.__new__(ImageTree)
    images.paths = [f"{i}.png" for i in range(count)]
    state = SimpleNamespace(unreadable=dict.fromkeys(range(bad), "broken"))
    run = SimpleNamespace(state=state, folder=tmp_path, runtime=SimpleNamespace(is_main=True))
    message = f"{bad} of {count} training images can't be read"
    with pytest.raises(InputError, match=message) if stops else nullcontext():
        Run.refuse_unreadable(run, images)
    assert len(listed(tmp_path)) == bad


def test_a_script_stops_and_lists_all_that_are_unreadable(start, experiment, monkeypatch):
    monkeypatch.setattr("experiment.run.UNREADABLE_FREE", 10)
    names = [f"{CLASSES[i % 3]}/{i}.png" for i in range(40)]
    draw_folder(experiment / "photographs", 0, CLASSES)
    for i, name in enumerate(names):
        (experiment / "photographs" / name).write_bytes(b"broken" if i < 8 else PNG)
    result = start("train_darionet", "--set", "data.train=photographs", "--set", "training.batch_size=40")
    one_line(result, "8 of 40 training images can't be read", "unreadable.csv")
    assert set(listed(next(Path("assets/logs").iterdir()))) == set(names[:8])


def mutated(rng: random.Random) -> bytes:
    """A JPEG or PNG with some bytes changed, cut out or put in twice."""
    data = bytearray(rng.choice([JPEG, PNG]))
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        place = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.choice([0, 1, 127, 128, 255])
            case 2:
                del data[place : place + rng.randrange(1, 40)]
            case _:
                data[place:place] = data[place : place + rng.randrange(1, 40)]
        if len(data) < 2:
            break
    return bytes(data)


def with_right_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what is in them, so that the decoder sees the damage itself."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, place = data[:8], 8
    while (end := place + 8 + int.from_bytes(data[place : place + 4])) + 4 <= len(data):
        out += data[place:end] + struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return out + data[place:]


def read_mutations(count: int, path: Path) -> int:
    """How many of `count` mutated images were read; all others were refused."""
    rng, read = random.Random(count), 0
    for i in range(count):
        data = mutated(rng)
        path.write_bytes(with_right_checksums(data) if i % 2 else data)
        signal.alarm(20)  # a hang ends the process, and with it the test
        try:
            assert read_image(path).mode == "RGB"
            read += 1
        except UnreadableImage as error:
            assert "\n" not in str(error)
        signal.alarm(0)
    return read


def test_mutated_images(tmp_path, capsys):
    """In a child with little memory: no crash, no hang, nothing but an image or a reason."""
    began, found = time.monotonic(), tmp_path / "found"

    def work() -> None:
        take_at_most(2**31)
        found.write_text(str(read_mutations(MUTATIONS, tmp_path / "mutated")))

    usage = in_a_child(work)
    read = int(found.read_text())
    assert 0 < read < MUTATIONS
    if SOAK:
        with capsys.disabled():
            print(
                f"\nMutated JPEGs and PNGs, no crash, no hang, at most 2 GiB more: {MUTATIONS} of {MUTATIONS} "
                f"({read} read, in {usage.ru_maxrss / 2**20:.1f} GiB at most, {time.monotonic() - began:.0f} s)"
            )
