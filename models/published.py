"""Weights by name: those that their owners publish for download, once, into torch's hub folder."""

import os
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

from models.errors import InputError
from models.files import replace, target_of
from models.weights import PUBLISHED, say, sha256_of

RELEASES = "https://github.com/xinntao/Real-ESRGAN/releases/download"
URLS = {  # every file has its SHA-256 in PUBLISHED
    "RealESRGAN_x4plus": f"{RELEASES}/v0.1.0/RealESRGAN_x4plus.pth",
    "RealESRGAN_x4plus_anime_6B": f"{RELEASES}/v0.2.2.4/RealESRGAN_x4plus_anime_6B.pth",
}
BY_HAND = ("RRDB_PSNR_x4", "RRDB_ESRGAN_x4")  # their owner keeps them where no program may fetch them
TIMEOUT = 30  # seconds without a byte
BLOCK = 2**16  # bytes


def published_file(name: str) -> str:
    """The file of the weights `name`, downloaded where it is not there yet; any other text is a file name already.

    Raises:
        InputError: no network, or not the file that its owner published; says which file to put where.
    """
    if name not in URLS and name not in BY_HAND:
        return name
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pth"
    if path.is_file():
        return str(path)
    if name in BY_HAND:
        raise InputError(
            f"{name} can't be downloaded by a program: the README of https://github.com/xinntao/ESRGAN has the link "
            f"(Google Drive) to click; put {path.name} into {path.parent}"
        )
    download(URLS[name], path)
    return str(path)


def download(url: str, path: Path) -> None:
    """Writes what `url` serves to `path`. What was cut is gone on with, now and in the next run (torch.hub's own
    download starts anew)."""
    # One part for every process of torchrun: they download side by side, as torchvision's weights.
    part = target_of(path).with_name(f".{path.name}.{os.environ.get('RANK', '0')}.part")
    say(f"Downloading {url} to {path}")
    whole = False
    while not whole:
        before, reason = size_of(part), "the connection was cut"
        try:
            whole = fetch(url, part)
        except (OSError, HTTPException) as error:  # URLError is one of the former
            reason = getattr(error, "reason", None) or error
        if not whole and size_of(part) <= before:
            raise InputError(
                f"{path.stem} can't be downloaded ({reason}): get {url} where there is a network, and put {path.name} "
                f"into {path.parent}"
            )
    if (found := sha256_of(part)) != PUBLISHED[path.name]:
        part.unlink()
        raise InputError(
            f"{url}: what came is not the published file (SHA-256 {found[:8]}..., not {PUBLISHED[path.name][:8]}...) "
            f"and was removed; try again, or put {path.name} into {path.parent} yourself"
        )
    replace(part, path)


def fetch(url: str, part: Path) -> bool:
    """Appends to `part` what it lacks; whether it is whole then."""
    start = size_of(part)
    try:
        answer = urlopen(Request(url, headers={"Range": f"bytes={start}-"} if start else {}), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and start:  # there is nothing after `start`
            return True
        raise
    with answer:
        start = start if answer.status == 206 else 0  # 200: from the first byte, whatever was asked for
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        silent = True if os.environ.get("RANK", "0") != "0" else None  # None: on terminals alone
        bar = {"total": total, "initial": start, "unit": "B", "unit_scale": True, "disable": silent}
        with part.open("ab" if start else "wb") as file, tqdm(desc=part.name.split(".")[1], **bar) as progress:
            while block := answer.read(BLOCK):
                file.write(block)
                progress.update(len(block))
    return total is None or size_of(part) == total


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
