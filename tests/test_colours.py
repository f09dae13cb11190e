"""Colours that are not sRGB: a profile or a PNG's gamma makes them the same picture; what is broken is passed over."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_images import chunk, encoded, png

from models.images import UnreadableImage, read_image, to_rgb

# Red, green and blue in CIE XYZ (D50), one row each, and the exponent of the curve
SPACES = {
    "sRGB": ([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]], 2.2),
    "Display P3": ([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]], 2.2),
    "Adobe RGB": ([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]], 2.2),
    "ProPhoto": ([[0.79767, 0.28804, 0.0], [0.13519, 0.71188, 0.0], [0.03134, 0.00009, 0.82491]], 1.8),
}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PICTURE = np.random.default_rng(0).integers(50, 256, (40, 50, 3))
GREY = np.tile(np.arange(60, 256), (8, 1))


def light_of(srgb: np.ndarray) -> np.ndarray:
    values = srgb / 255
    return np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)


def in_space(name: str) -> np.ndarray:
    """PICTURE's colours as that space stores them."""
    matrix, exponent = SPACES[name]
    light = light_of(PICTURE) @ np.array(SPACES["sRGB"][0]) @ np.linalg.inv(matrix)
    return np.round(light.clip(0, 1) ** (1 / exponent) * 255).astype(np.uint8)


def numbers(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def point(*xyz: float) -> bytes:
    return b"XYZ " + bytes(4) + numbers(*xyz)


WHITE = {b"wtpt": point(0.9642, 1.0, 0.8249)}


def curve(exponent: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(exponent * 256))


def icc(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """A profile of version 2."""
    start, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table, body = table + name + struct.pack(">II", start + len(body), len(data)), body + data
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4xI", start + len(body), 0x02400000) + kind + space + connection
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + numbers(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + table + body


def rgb_profile(name: str) -> bytes:
    matrix, exponent = SPACES[name]
    tags = WHITE
    for letter, row in zip("rgb", matrix, strict=True):
        tags = tags | {f"{letter}XYZ".encode(): point(*row), f"{letter}TRC".encode(): curve(exponent)}
    return icc(b"RGB ", tags)


def read(tmp_path, contents: bytes) -> np.ndarray:
    (tmp_path / "a").write_bytes(contents)
    return np.asarray(read_image(tmp_path / "a")).astype(int)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_profiles_of_every_format(tmp_path, name, kind):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    options["AVIF"] = {"quality": 100, "subsampling": "4:4:4"}
    image = Image.fromarray(in_space(name))
    contents = encoded(image, kind, icc_profile=rgb_profile(name), **options.get(kind, {}))
    difference = np.abs(read(tmp_path, contents) - PICTURE)
    lossy = kind in ("JPEG", "AVIF")
    assert difference.mean() <= (3 if lossy else 1.2) and (lossy or difference.max() <= 6)


def test_a_profile_with_transparency_and_a_palette(tmp_path):
    """Colours are converted before they are laid on white."""
    profile = rgb_profile("Adobe RGB")
    image = Image.fromarray(in_space("Adobe RGB"))
    image.putalpha(0)
    assert (read(tmp_path, encoded(image, "PNG", icc_profile=profile)) == 255).all()
    image.putalpha(255)
    assert np.abs(read(tmp_path, encoded(image, "PNG", icc_profile=profile)) - PICTURE).mean() < 1.2
    flat = Image.new("RGB", (4, 4), tuple(in_space("Adobe RGB")[0, 0].tolist())).quantize(2)
    assert np.abs(read(tmp_path, encoded(flat, "PNG", icc_profile=profile)) - PICTURE[0, 0]).max() <= 4


def test_a_grey_profile(tmp_path):
    stored = Image.fromarray(np.round(light_of(GREY) ** (1 / 1.4) * 255).astype(np.uint8))
    profile = icc(b"GRAY", WHITE | {b"kTRC": curve(1.4)})
    for image, kind in ((stored, "PNG"), (stored, "TIFF"), (stored.convert("LA"), "PNG")):
        assert np.abs(read(tmp_path, encoded(image, kind, icc_profile=profile)) - GREY[..., None]).max() <= 3


def cmyk_profile() -> bytes:
    """Ink of K makes L* 30 of 100, all others leave the paper white."""
    ramp = bytes(range(256))
    grid = b"".join(bytes([round(255 * (0.3 if i % 2 else 1.0)), 128, 128]) for i in range(16))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + numbers(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return icc(b"CMYK", {b"A2B0": table + ramp * 4 + grid + ramp * 3}, b"Lab ")


def test_a_cmyk_profile(tmp_path):
    """In Adobe's inverted JPEGs as in TIFFs: black ink is black, and cyan is what the profile says it is."""
    for kind in ("JPEG", "TIFF"):
        for ink, expected in (((0, 0, 0, 255), 0), ((0, 0, 0, 0), 255), ((255, 0, 0, 0), 255)):
            contents = encoded(Image.new("CMYK", (8, 8), ink), kind, icc_profile=cmyk_profile())
            assert np.abs(read(tmp_path, contents) - expected).max() <= 2, (kind, ink)


def png_of(pixels: np.ndarray, before: bytes) -> bytes:
    rows = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], 8, 2, zlib.compress(rows), before)


def gamma_of(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


SRGB_CICP, PQ_CICP = (chunk(b"cICP", bytes([*kind, 0, 1])) for kind in ((1, 13), (9, 16)))
PROFILES = [SRGB, b"no profile", rgb_profile("ProPhoto")[:200], icc(b"GRAY", {}), cmyk_profile()]
AS_STORED = [encoded(Image.fromarray(PICTURE.astype(np.uint8)), "PNG", icc_profile=profile) for profile in PROFILES]
AS_STORED += [png_of(PICTURE, gamma_of(value)) for value in (0.45455, 0.45, 0, 1e-5, 21474.83647)]


@pytest.mark.parametrize("contents", [*AS_STORED, png_of(PICTURE, SRGB_CICP)], ids=range(len(AS_STORED) + 1))
def test_what_is_srgb_or_says_nothing_sensible_stays_as_it_is(tmp_path, contents):
    """To the bit: with sRGB's profile, gamma or cICP, with a profile that does not fit, with a gamma that is none."""
    assert (read(tmp_path, contents) == PICTURE).all()


@pytest.mark.parametrize("gamma", [1.0, 0.55556, 0.35])
def test_gamma_of_a_png(tmp_path, gamma):
    stored = np.round(light_of(PICTURE) ** gamma * 255)
    assert np.abs(read(tmp_path, png_of(stored, gamma_of(gamma))) - PICTURE).max() <= 5
    for sure in (chunk(b"sRGB", b"\0"), chunk(b"iCCP", b"a\0\0" + zlib.compress(SRGB))):  # gAMA is for others
        assert (read(tmp_path, png_of(stored, gamma_of(gamma) + sure)) == stored).all()


def test_cicp_of_a_png(tmp_path):
    """Colours are read only by the profile that stands beside them; PQ, as HDR screenshots have, never."""
    with pytest.raises(UnreadableImage, match="cICP"):
        read(tmp_path, png_of(PICTURE, PQ_CICP))
    beside = PQ_CICP + chunk(b"iCCP", b"a\0\0" + zlib.compress(rgb_profile("Display P3")))
    assert np.abs(read(tmp_path, png_of(in_space("Display P3"), beside)) - PICTURE).mean() < 1.2


def test_colours_are_converted_once():
    image = Image.fromarray(in_space("ProPhoto"))
    image.info["icc_profile"] = rgb_profile("ProPhoto")
    once = to_rgb(image)
    assert (np.asarray(to_rgb(once)) == np.asarray(once)).all()


@pytest.mark.parametrize("transparent", [None, 0])
def test_a_first_frame_that_is_smaller_than_its_canvas(tmp_path, transparent):
    """Of a GIF: what it leaves is white, as in browsers."""
    palette = bytes([200, 30, 60, 0, 0, 255])
    contents = b"GIF89a" + struct.pack("<HHBBB", 6, 5, 0x80, 0, 0) + palette
    if transparent is not None:
        contents += b"\x21\xf9\x04\x01\x00\x00" + bytes([transparent, 0])
    contents += b"," + struct.pack("<HHHHB", 2, 1, 2, 2, 0) + b"\x02\x03\x4c\x12\x05\x00;"  # four pixels of colour 1
    expected = np.full((5, 6, 3), 255)
    expected[1:3, 2:4] = (0, 0, 255)
    assert (read(tmp_path, contents) == expected).all()
