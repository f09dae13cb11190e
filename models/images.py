"""Reads images as a viewer would show them: any file or PIL image to 8-bit sRGB, to tensors, and back."""

import contextlib
import errno
import functools
import io
import os
import stat
import warnings

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000", "QOI")  # whatever a file's name
ALPHA = ("LA", "PA", "RGBA", "RGBa")
MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", *ALPHA)  # Pillow converts these rightly
DEEP = ("I", "I;16", "I;16B", "I;16L")  # grey of 16 bits
PNG_8_BITS = ("L", "RGB", "P", "P;1", "P;2", "P;4")  # how pixels are stored if a transparent colour is read rightly
SRGB_GAMMA = 1 / 2.2  # what a PNG says that means sRGB
SRGB_CICP = bytes([1, 13, 0, 1])  # the same as a cICP chunk


class UnreadableImage(Exception):
    """The file is no image that can be decoded and shown rightly."""


def read_image(path: str | os.PathLike) -> Image.Image:
    """The file's first frame as 8-bit sRGB, turned as its EXIF orientation says, transparency on white.

    Raises:
        UnreadableImage: no image that is shown rightly; the message, one line, says why without the file's name.
        OSError: this process has too many open files.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableImage("not a plain file")  # opening a FIFO would wait for ever
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            return as_shown(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        reason = f"cannot identify image file; what is read: {', '.join(FORMATS)}"
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the image's
            raise
        reason = error.strerror or str(error)
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        reason = f"{type(error).__name__}: {error}"
    raise UnreadableImage(reason.replace("\n", " ")[:200])


def size_in_header(path: str | os.PathLike) -> tuple[int, int] | None:
    """(width, height) of an image as its file begins, before it is turned upright; None if that can't be read."""
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(Exception):
        if os.path.isfile(path):  # opening a FIFO would wait for ever
            with Image.open(path, formats=FORMATS) as image:
                return image.size if all(image.size) else None
    return None


def as_shown(image: Image.Image) -> Image.Image:
    """An image, best not loaded yet, as 8-bit sRGB, upright, on white."""
    refuse_odd_layout(image)
    frame = image.tile[0].extents if image.format == "GIF" and image.tile else None
    image.load()
    with contextlib.suppress(Exception):  # a viewer shows an image with damaged EXIF data as it is
        image = ImageOps.exif_transpose(image)
    rgb = to_rgb(image)
    if frame and frame != (0, 0, *rgb.size):  # what a GIF's first frame leaves of its canvas is transparent
        whole = Image.new("RGB", rgb.size, "white")
        whole.paste(rgb.crop(frame), frame[:2])
        return whole
    return rgb


def refuse_odd_layout(image: Image.Image) -> None:
    """Refuses what Pillow opens and shows wrongly."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits, photometric = set(tags.get(258, (1,))), tags.get(262)
    keyed = image.format == "PNG" and "transparency" in image.info and image.tile
    odd = {
        "signed or floating-point pixels have no fixed black and white": set(tags.get(339, (1,))) != {1},
        "each channel by itself": tags.get(284, 1) != 1,
        "bits in reversed order": tags.get(266, 1) != 1,
        f"{max(bits)} bits per channel": len(bits) > 1 or not bits <= {1, 2, 4, 8, 16},
        "16 bits, of which 0 is white": photometric == 0 and 16 in bits,
        "YCbCr that is not compressed as JPEG": photometric == 6 and image.info.get("compression") != "jpeg",
        "a palette of 8 bits, not 16": max(tags.get(320, (256,))) < 256,
        "a transparent colour that is not of 8 bits": bool(keyed) and keyed[0].args not in PNG_8_BITS,
        "colours by a cICP chunk (HDR): save it as sRGB": "icc_profile" not in image.info and cicp(image) != SRGB_CICP,
    }
    for reason, found in odd.items():
        if found:
            raise UnreadableImage(reason)


def cicp(image: Image.Image) -> bytes:
    """What a PNG's cICP chunk says, which Pillow does not read; sRGB if it has none."""
    if image.format != "PNG" or not image.tile:
        return SRGB_CICP
    image.fp.seek(0)
    head = image.fp.read(image.tile[0].offset)
    at = head.find(b"\0\0\0\4cICP") + 8
    return head[at : at + 4] if at > 7 else SRGB_CICP


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as Pillow decodes it -> 8-bit sRGB on white; refuses modes that are not known to be shown rightly."""
    info, alpha = image.info, None
    if image.mode in DEEP:
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535 or "transparency" in info:
            raise UnreadableImage("grey of more than 16 bits, or with a transparent one")
        # Scaled and rounded; Pillow's own conversion clips.
        image = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    mode = image.mode
    if mode not in MODES:
        raise UnreadableImage("floating-point pixels have no fixed white" if mode == "F" else f"pixels of mode {mode}")
    kind = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(mode, "RGB")
    if mode in ALPHA or "transparency" in info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    rgb = to_srgb(image if image.mode == kind else image.convert(kind), info)
    rgb.info = {}  # it has no other colours now
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha) if alpha else rgb


def to_srgb(image: Image.Image, info: dict) -> Image.Image:
    """L, RGB or CMYK -> RGB, by the ICC profile in `info`, else by a PNG's gamma."""
    if profile := info.get("icc_profile"):
        transform = profile_transform(profile, image.mode)
        return ImageCms.applyTransform(image, transform) if transform else image.convert("RGB")
    gamma, image = info.get("gamma", SRGB_GAMMA), image.convert("RGB")
    if "srgb" in info or not 0.1 < gamma < 10 or abs(gamma / SRGB_GAMMA - 1) < 0.05:
        return image
    light = (np.arange(256) / 255) ** (1 / gamma)
    srgb = np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, 12.92 * light)
    return image.point(np.round(srgb * 255).astype(int).tolist() * 3)


@functools.lru_cache(16)
def profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an ICC profile to sRGB; None if it is broken, of another mode, or makes no difference of note."""
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
        if mode == "CMYK":
            return transform
        cube = np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3), -1).astype(np.uint8).reshape(-1, 16, 3)
        probe = Image.fromarray(cube if mode == "RGB" else cube[..., 0])
        found, same = (np.asarray(x, int) for x in (ImageCms.applyTransform(probe, transform), probe.convert("RGB")))
        return transform if np.abs(found - same).max() > 2 else None
    except Exception:
        return None


def to_tensor(image: Image.Image) -> Tensor:
    """An image of any mode -> (1,3,height,width) float32 in [0,1], `as_shown`."""
    return torch.from_numpy(np.array(as_shown(image))).permute(2, 0, 1)[None].float() / 255


def to_image(images: Tensor) -> Image.Image:
    """(1,3,H,W) or (3,H,W) float in [0,1] -> an RGB image; what lies outside is clamped, the rest rounded to 8 bits."""
    pixels = images.detach().reshape(3, *images.shape[-2:]).float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
