"""A ramp from black to white in every mode and bit depth that Pillow opens: shown right, or refused with a reason."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin
from test_images import chunk, encoded, png

from models.images import UnreadableImage, read_image, to_rgb, to_tensor

WIDTH, HEIGHT = 16, 4
RAMP = np.arange(WIDTH) / (WIDTH - 1)


def levels(bits: int, inverted: bool = False) -> np.ndarray:
    """The ramp's values of so many bits."""
    return np.round((RAMP[::-1] if inverted else RAMP) * (2**bits - 1)).astype(np.int64)


def shown(bits: int) -> np.ndarray:
    return levels(bits) / (2**bits - 1) * 255


def packed(values: np.ndarray, bits: int, order: str = ">") -> bytes:
    """Rows of samples: of 8, 16, 32 bits in this byte order, of others most significant bit first."""
    if bits in (8, 16, 32):
        return (values % 2**bits).astype(f"{order}u{bits // 8}").tobytes()
    rows = ["".join(format(value, f"0{bits}b") for value in row.ravel()) for row in values]
    return b"".join(int(row, 2).to_bytes(len(row) // 8) for row in rows)


def tiff(order: str, tags: dict[int, list[int]], planes: list[bytes]) -> bytes:
    """A TIFF of one strip a plane; tags of SHORT values."""
    if tags[259] == [8]:
        planes = [zlib.compress(plane) for plane in planes]
    if tags.get(266) == [2]:
        planes = [bytes(int(f"{byte:08b}"[::-1], 2) for byte in plane) for plane in planes]
    start, body = 8, b"".join(planes) + b"\0" * (sum(map(len, planes)) % 2)
    starts = [start + sum(map(len, planes[:i])) for i in range(len(planes))]
    entries = {256: [WIDTH], 257: [HEIGHT], 278: [HEIGHT], 273: starts, 279: [len(plane) for plane in planes]} | tags
    directory, more = struct.pack(order + "H", len(entries)), b""
    free = start + len(body) + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        data = struct.pack(f"{order}{len(values)}H", *values)
        directory += struct.pack(order + "HHI", tag, 3, len(values))
        if len(data) > 4:
            data, more = struct.pack(order + "I", free + len(more)), more + data
        directory += data.ljust(4, b"\0")
    magic = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, start + len(body))
    return magic + body + directory + bytes(4) + more


def ramp_tiff(key: tuple, compression: int, planar: int) -> bytes:
    """What Pillow's key (byte order, photometric, sample format, fill order, bits, extra samples) stands for."""
    prefix, photometric, sample_format, fill, bits, extra = key
    order, depth = {b"II": "<", b"MM": ">"}[prefix], bits[0]
    ramp = np.tile(levels(depth, photometric in (0, 5)), (HEIGHT, 1))
    colours = {
        2: [ramp] * 3,
        5: [0 * ramp] * 3 + [ramp],
        6: [ramp, 0 * ramp + 128, 0 * ramp + 128][: len(bits)],
        8: [ramp, 0 * ramp, 0 * ramp],
    }.get(photometric, [ramp])
    channels = [*colours, *[0 * ramp + 2**depth - 1] * (len(bits) - len(colours))]
    pixels = np.stack(channels, -1)
    planes = [packed(channel, depth, order) for channel in channels] if planar == 2 else [packed(pixels, depth, order)]
    tags = {258: list(bits), 259: [compression], 262: [photometric], 266: [fill], 277: [len(bits)], 284: [planar]}
    tags |= {339: list(sample_format) * len(bits)} | ({338: list(extra)} if extra else {})
    if photometric == 3:
        tags[320] = [int(value) * 257 for value in np.linspace(0, 255, 2**depth).round()] * 3
    if photometric == 6:
        tags[530] = [1, 1]
    return tiff(order, tags, planes)


def lightness(values: np.ndarray) -> np.ndarray:
    """sRGB of CIE L* / 100, in 0 to 255."""
    y = np.where(values > 0.08, ((values * 100 + 16) / 116) ** 3, values * 100 / 903.3)
    return 255 * np.where(y > 0.0031308, 1.055 * y ** (1 / 2.4) - 0.055, 12.92 * y)


def outcome(path, contents: bytes, expected: np.ndarray) -> str:
    """The word "shown", or the reason why it is not; a wrong picture fails."""
    path.write_bytes(contents)
    try:
        image = read_image(path)
    except UnreadableImage as error:
        return str(error)
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(float) - expected[None, :, None]).max()
    assert difference <= 3, np.asarray(image)[0]
    return "shown"


@pytest.mark.parametrize("compression", [1, 8])
def test_tiffs(tmp_path, compression):
    """Every layout that Pillow knows: the usual ones are shown, all others have a reason."""
    for key in TiffImagePlugin.OPEN_INFO:
        _, photometric, sample_format, fill, bits, _ = key
        expected = lightness(RAMP) if photometric == 8 else shown(bits[0])
        found = outcome(tmp_path / "a.tif", ramp_tiff(key, compression, 1), expected)
        usual = sample_format == (1,) and fill == 1 and photometric != 6 and set(bits) <= {1, 2, 4, 8, 16}
        usual = usual and (photometric, bits) != (0, (16,)) and TiffImagePlugin.OPEN_INFO[key][0] != "La"
        assert (found == "shown") == usual, (key, found)
        apart = outcome(tmp_path / "a.tif", ramp_tiff(key, compression, 2), expected)
        assert apart != "shown" and (not usual or "channel by itself" in apart or "identify" in apart), key


def test_layouts_of_tiff_that_pillow_shows_wrongly(tmp_path):
    blocks = packed(np.full((HEIGHT // 2, WIDTH // 2, 6), 128), 8)
    tags = {259: [1], 258: [8, 8, 8], 262: [6], 277: [3]}
    for subsampling in ({530: [2, 2]}, {}):  # 2 by 2 is what TIFF means if nothing is said
        assert "YCbCr" in outcome(tmp_path / "a.tif", tiff("<", tags | subsampling, [blocks]), shown(8))
    for depth in (1, 2, 4, 8):  # colours of 8 bits, while TIFF has 16
        colours = [int(value) for value in np.linspace(0, 255, 2**depth).round()] * 3
        indices = packed(np.tile(levels(depth), (HEIGHT, 1)), depth)
        contents = tiff("<", {259: [1], 258: [depth], 262: [3], 277: [1], 320: colours}, [indices])
        assert "palette of 8 bits" in outcome(tmp_path / "a.tif", contents, shown(depth))
        with pytest.raises(UnreadableImage, match="palette"), Image.open(tmp_path / "a.tif") as image:
            to_tensor(image)  # as DarioNet reads what Python gives it


def ramp_png(bits: int, kind: int, extra: bytes = b"") -> bytes:
    ramp = np.tile(levels(bits), (HEIGHT, 1))
    opaque = 0 * ramp + 2**bits - 1
    channels = {0: [ramp], 2: [ramp] * 3, 3: [ramp], 4: [ramp, opaque], 6: [ramp, ramp, ramp, opaque]}[kind]
    data = packed(np.stack(channels, -1), bits)
    stride = len(data) // HEIGHT
    rows = b"".join(b"\0" + data[i * stride : (i + 1) * stride] for i in range(HEIGHT))
    colours = np.linspace(0, 255, 2**bits).round().astype(np.uint8).repeat(3).tobytes() if kind == 3 else b""
    palette = chunk(b"PLTE", colours) if colours else b""
    return png(WIDTH, HEIGHT, bits, kind, zlib.compress(rows), palette + extra)


def test_pngs(tmp_path):
    """And with a transparent colour: its column is white, all others are as they were."""
    for bits, kind in PngImagePlugin._MODES:
        expected = shown(bits)
        assert outcome(tmp_path / "a.png", ramp_png(bits, kind), expected) == "shown", (bits, kind)
        value = int(levels(bits)[4])
        expected[levels(bits) == value] = 255
        data = {0: struct.pack(">H", value), 2: struct.pack(">3H", *[value] * 3), 3: b"\xff" * value + b"\0"}.get(kind)
        if data is not None:
            found = outcome(tmp_path / "a.png", ramp_png(bits, kind, chunk(b"tRNS", data)), expected)
            assert found == "shown" if bits == 8 or kind == 3 else "transparent colour" in found, (bits, kind)


@pytest.mark.parametrize("maxval", [1, 3, 15, 100, 255, 256, 1023, 4095, 65535])
def test_pnms(tmp_path, maxval):
    values = np.tile(np.round(RAMP * maxval).astype(int), (HEIGHT, 1))
    expected = values[0] / maxval * 255
    for magic, channels in ((b"2", 1), (b"3", 3), (b"5", 1), (b"6", 3)):
        pixels = values[..., None].repeat(channels, -1)
        plain = " ".join(map(str, pixels.ravel())).encode()
        data = plain if magic in b"23" else pixels.astype(">u2" if maxval > 255 else "u1").tobytes()
        header = b"P%s %d %d %d\n" % (magic, WIDTH, HEIGHT, maxval)
        assert outcome(tmp_path / "a.pgm", header + data, expected) == "shown", magic
    for magic, data in ((b"1", b"1" * 8 + b"0" * 8), (b"4", b"\xff\x00")):
        contents = b"P%s %d %d\n" % (magic, WIDTH, HEIGHT) + data * HEIGHT
        assert outcome(tmp_path / "a.pbm", contents, shown(1)) == "shown"
    floats = b"Pf\n%d %d\n-1.0\n" % (WIDTH, HEIGHT) + values.astype("<f4").tobytes()
    assert "floating" in outcome(tmp_path / "a.pfm", floats, shown(8))


OTHERS = [*(("JPEG", mode, {"quality": 100}) for mode in ("L", "RGB", "CMYK"))]  # CMYK is inverted, as Adobe has it
OTHERS += [("TIFF", "RGB", {"compression": "jpeg", "quality": 100}), ("TIFF", "L", {"compression": "tiff_lzw"})]
OTHERS += [*(("WEBP", mode, {"lossless": True}) for mode in ("RGB", "RGBA")), ("TIFF", "PA", {})]
OTHERS += [("GIF", "L", {}), ("GIF", "P", {}), ("BMP", "L", {}), ("BMP", "P", {}), ("BMP", "RGBA", {})]


@pytest.mark.parametrize(("kind", "mode", "options"), OTHERS)
def test_other_files(tmp_path, kind, mode, options):
    image = Image.fromarray(np.tile(levels(8), (HEIGHT, 1)).astype(np.uint8)).convert("P" if "P" in mode else "RGB")
    assert outcome(tmp_path / "a", encoded(image.convert(mode), kind, **options), shown(8)) == "shown"


MODES = ["1", "L", "P", "I", "LA", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_memory(mode):
    """Whatever a decoder gives."""
    deep = np.tile(levels(16), (HEIGHT, 1))
    image = Image.fromarray(np.tile(levels(8), (HEIGHT, 1)).astype(np.uint8))
    through = {"RGBa": "RGBA", "PA": "P", "1": "L", "L": "L", "LA": "L", "P": "L"}.get(mode, "RGB")
    if mode == "I":
        image = Image.fromarray(deep.astype(np.int32))
    elif mode.startswith("I;16"):
        image = Image.frombytes(mode, image.size, deep.astype("<u2" if mode == "I;16" else ">u2").tobytes())
    else:
        image = image.convert(through).convert(mode)
    pixels = np.asarray(to_rgb(image)).astype(float)
    if mode == "1":
        assert set(pixels.ravel()) == {0, 255}
    else:
        assert np.abs(pixels - shown(8)[None, :, None]).max() <= 3
