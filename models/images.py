"""PIL images to tensors and back."""

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as vision


def to_tensor(image: Image.Image) -> Tensor:
    """An image of any mode -> (1,3,height,width) float32 in [0,1], turned as its EXIF says."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    return vision.to_dtype(vision.pil_to_tensor(upright), torch.float32, scale=True)[None]


def to_image(images: Tensor) -> Image.Image:
    """(1,3,H,W) or (3,H,W) float in [0,1] -> an RGB image; what lies outside is clamped, the rest rounded to 8 bits."""
    pixels = images.detach().reshape(3, *images.shape[-2:]).float().clamp(0, 1).mul(255).round().byte()
    return vision.to_pil_image(pixels.cpu())
