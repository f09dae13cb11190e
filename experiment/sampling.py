"""Which images are kept, and copying them. No torch here: the samplers start without it."""

import hashlib
import json
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

from models.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
MANIFEST = "manifest.json"
PARTIAL = ".partial"
HOW_TO_GET_IMAGENET = (
    "README.md, section ImageNet, says how to get and lay out ImageNet; `make demo` runs everything on drawn pictures"
)


def class_folders(folder: str | Path) -> list[str]:
    """Names of the folders in `folder`, sorted; one folder is one class.

    Raises:
        InputError: `folder` is absent, or holds no folders.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; {HOW_TO_GET_IMAGENET}")
    names = sorted(entry.name for entry in os.scandir(folder) if is_folder(entry) and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder}: holds no class folders; {HOW_TO_GET_IMAGENET}")
    return names


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder or a link to one; a link that leads to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_images(folder: str | Path) -> list[str]:
    """Paths, relative to `folder`, of every file below it with an image's extension, in an order of names alone.

    Links to folders are followed, each real folder once, so that a loop ends. Hidden files and folders are left out.
    """
    found, seen, waiting = [], set(), [""]
    while waiting:
        inside = waiting.pop()
        current = os.path.join(folder, inside)
        real = os.path.realpath(current)
        if real in seen:
            continue
        seen.add(real)
        for entry in os.scandir(current):
            if entry.name.startswith("."):
                continue
            path = os.path.join(inside, entry.name)
            if is_folder(entry):
                waiting.append(path)
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append(path)
    return sorted(found)


def share(names: list[str], fraction: float, seed: int, class_name: str) -> list[str]:
    """ceil(fraction x len(names)) of the names, sorted: those with the smallest SHA-256 of (seed, class, name)."""
    count = math.ceil(Fraction(str(fraction)) * len(names))  # exact: 0.07 x 100 is 7, not 7.000000000000001

    def rank(name: str) -> bytes:
        return hashlib.sha256(os.fsencode(f"{seed}/{class_name}/{name}")).digest()

    return sorted(sorted(names, key=rank)[:count])


def sample(
    source: str, parts: dict[str, dict[str, list[str]]], *, fraction: float, seed: int, link: bool, overwrite: bool
) -> None:
    """Copies class folders from `source`: `parts` maps a target folder to its images by class.

    A manifest in every target records source, seed and fraction. What an interrupted run left is completed; files of
    another selection make a target refuse, unless `overwrite` is set and the target has a manifest. What has an image's
    name and is no file is left out, and that is said.

    Raises:
        InputError: a target holds something else, or is (or is in, or holds) the source.
    """
    if not any(map(len, (names for images in parts.values() for names in images.values()))):
        raise InputError(f"{source}: its class folders hold no images ({', '.join(EXTENSIONS)})")
    for target, images in parts.items():
        refuse_overlap(target, source)
        manifest = {"source": os.path.abspath(source), "seed": seed, "fraction": fraction}
        prepare_target(Path(target), manifest, images, overwrite)
        total = sum(map(len, images.values()))
        odd = []
        with tqdm(total=total, desc=target, unit="image", disable=None) as bar:
            for class_name, names in images.items():
                (Path(target) / class_name).mkdir(exist_ok=True)
                for name in names:
                    path = Path(source, class_name, name)
                    if path.is_file():
                        place(path, Path(target, class_name, name), link)
                    else:
                        odd.append(path)
                    bar.update()
        total -= len(odd)
        write_manifest(Path(target), manifest | {"images": total, "complete": True})
        if odd:
            print(f"{target}: left out {len(odd)} that are no files (pipes, links to nowhere), such as {odd[0]}")
        print(f"{target}: {total} images of {len(images)} classes from {source} (seed {seed}, fraction {fraction})")


def refuse_overlap(target: str, other: str) -> None:
    """Raises InputError where one of two folders is the other, or holds it."""
    a, b = Path(os.path.realpath(other)), Path(os.path.realpath(target))
    if a == b or a in b.parents or b in a.parents:
        raise InputError(f"{target}: has to lie outside {other}")


def prepare_target(target: Path, manifest: dict, images: dict[str, list[str]], overwrite: bool) -> None:
    """Leaves in `target` nothing but the manifest and files of this selection."""
    target.mkdir(parents=True, exist_ok=True)
    kept = {MANIFEST} | {os.path.join(class_name, name) for class_name, names in images.items() for name in names}
    if any(target.iterdir()):
        try:
            found = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
            found = {key: found[key] for key in manifest}
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{target}: not empty, and not written by a sampler; empty it or name another folder"
            ) from None
        different = [f"{key} {found[key]}, not {manifest[key]}" for key in manifest if found[key] != manifest[key]]
        if different and not overwrite:
            raise InputError(f"{target}: was sampled with {'; '.join(different)}; --overwrite replaces it")
        if different:
            kept = {MANIFEST}
    write_manifest(target, manifest | {"complete": False})
    for folder, _, names in os.walk(target, topdown=False):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.relpath(path, target) not in kept:
                os.unlink(path)
        if not os.listdir(folder):
            os.rmdir(folder)


def write_manifest(target: Path, manifest: dict) -> None:
    partial = target / (MANIFEST + PARTIAL)
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, target / MANIFEST)


def place(source: Path, target: Path, link: bool) -> None:
    """Copies or hard-links one file, unless it is there already; a half-written copy never has the final name."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(os.path.realpath(source), target)  # what a symbolic link leads to, not the link
        except OSError as error:
            raise InputError(
                f"{target}: no hard link to {source} ({error.strerror}); leave out --link to copy"
            ) from None
    else:
        partial = target.with_name(target.name + PARTIAL)
        shutil.copyfile(source, partial)
        os.replace(partial, target)
