"""PIL images of any mode to RGB, to tensors, and back."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

BITS, PHOTOMETRIC, COLOR_MAP = 258, 262, 320  # tags of a TIFF


class UnreadableImage(Exception):
    """The file is no image that can be decoded; the message says why."""


def turn_upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a viewer shows an image with damaged EXIF data as it lies
        return image


def to_rgb(image: Image.Image, tags: Mapping[int, Any] = MappingProxyType({})) -> Image.Image:
    """What Pillow decoded, of any mode, as 8-bit RGB on white; `tags` are those of a TIFF."""
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels have no fixed white")
    if image.mode.startswith("I"):
        return to_8_bits(image, tags).convert("RGB")
    if image.mode == "P" and max(tags.get(COLOR_MAP, [256])) < 256:  # of 8 bits, where TIFF has 16
        image.putpalette(np.uint8(tags[COLOR_MAP]).reshape(3, -1).T.tobytes())
    if image.mode == "La":  # Pillow knows no other way from here
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """12, 16 or 32 bits of grey scaled and rounded, white is white; Pillow's own conversion clips them."""
    values = np.asarray(image)
    bits = tags[BITS][0] if tags else 16
    grey = values.astype(np.uint32)
    if bits > 16:
        grey >>= bits - 16
    white = 2 ** min(bits, 16) - 1
    grey *= 255
    grey += white // 2
    grey //= white
    if tags.get(PHOTOMETRIC) == 0:  # white is zero
        np.subtract(255, grey, out=grey)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """An image of any mode -> (1,3,height,width) float32 in [0,1], as `turn_upright` and `to_rgb` show it."""
    rgb = to_rgb(turn_upright(image), getattr(image, "tag_v2", {}))
    return vision.to_dtype(vision.pil_to_tensor(rgb), torch.float32, scale=True)[None]


def to_image(images: Tensor) -> Image.Image:
    """(1,3,H,W) or (3,H,W) float in [0,1] -> an RGB image; what lies outside is clamped, the rest rounded to 8 bits."""
    pixels = images.detach().reshape(3, *images.shape[-2:]).float().clamp(0, 1).mul(255).round().byte()
    return vision.to_pil_image(pixels.cpu())
