"""Which images a folder has, which of them are kept, and copying these. No torch: the samplers start without it."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from unicodedata import normalize

from tqdm import tqdm

from experiment.script import printable
from models.errors import InputError
from models.files import partial_of, replace, write_text

# The same on every machine, whatever its Pillow can read, so that samplers choose the same files. No format without a
# signature at its start (TGA, PCX): files are read by content.
ENDINGS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".qoi"),
}
# Names that start with a dot, and what NAS, archivers, Windows and macOS put beside photographs.
SYSTEM = re.compile(
    r"\..*|@(eadir|tmp|recycle|recently-snapshot|__thumb)|[#~](recycle|snapshot)|__macosx|\$recycle\.bin|recycler"
    r"|lost\+found|system volume information|network trash folder|temporary items|icon\r|__pycache__"
    r"|(eh)?thumbs(_vista)?\.db|desktop\.ini|picasa\.ini",
    re.IGNORECASE | re.DOTALL,
)
MANIFEST = "manifest.json"
UNFINISHED = re.compile(r"\..*\.\d+-\d+-[0-9a-f]{8}\.partial", re.DOTALL)  # the names that partial_of gives
CONVERT = "convert photographs to JPEG or PNG, unpack archives"
LAYOUT = "docs/classifiers.md and docs/imagenet.md say how to lay out images; `make demo` needs none"


def ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(printable(name, 200) for name in names[:3]) + more


def files_below(folder: str | Path, follow: bool) -> Iterator[str]:
    """Paths of all files below `folder`, without hidden ones and those of systems.

    Without `follow` links to folders count as files. With it, no folder is entered twice from the same entry of
    `folder`, so that loops end and an entry may be a link to another one.
    """
    root = os.path.realpath(folder)
    waiting = [("", {root})]
    while waiting:
        inside, entered = waiting.pop()
        for entry in sorted(os.scandir(os.path.join(root, inside)), key=lambda entry: entry.name):
            path = os.path.join(inside, entry.name)
            if SYSTEM.fullmatch(entry.name):
                continue
            if not (follow and os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()):
                yield path
            elif (real := os.path.realpath(entry.path)) not in entered:
                waiting.append((path, entered if inside else {root}))
                waiting[-1][1].add(real)


def list_images(folder: str) -> list[str]:
    """Paths of the images below `folder`, in an order of names alone; one line says which files are no images.

    Raises InputError if there are none.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; {LAYOUT}")
    paths = sorted(files_below(folder, follow=True), key=lambda path: (normalize("NFC", path), path))
    images = [path for path in paths if ending(path) in ENDINGS]
    endings = (ending(path) or "without an ending" for path in paths if path != MANIFEST)
    others = Counter(suffix for suffix in endings if suffix not in ENDINGS)
    kinds = ", ".join(f"{count} {printable(kind, 30)}" for kind, count in others.most_common(8))
    if not images:
        raise InputError(f"{folder}: holds no images" + (f", only {kinds}; {CONVERT}" if kinds else f"; {LAYOUT}"))
    if kinds:
        print(f"{folder}: left out {kinds}: not read as images ({CONVERT})")
    return images


def images_by_class(folder: str) -> dict[str, list[str]]:
    """Name of every folder in `folder` -> paths of the images below it; it says what is left out, and what is empty.

    Raises InputError if there are none.
    """
    images = list_images(folder)
    names = [name for name in sorted(os.listdir(folder)) if os.path.isdir(os.path.join(folder, name))]
    classes = {name: [] for name in names if not SYSTEM.fullmatch(name)}
    for class_name, _, name in (path.partition(os.sep) for path in images):
        if name:
            classes[class_name].append(name)
    if not any(classes.values()):
        raise InputError(f"{folder}: holds no images in class folders; {LAYOUT}")
    if loose := [path for path in images if os.sep not in path]:
        print(f"{folder}: left out {len(loose)} images in no class folder: {some(loose)}")
    if empty := [name for name, found in classes.items() if not found]:
        print(f"{folder}: no images in {len(empty)} of {len(classes)} class folders: {some(empty)}")
    return classes


def share(names: list[str], fraction: float, seed: int, class_name: str) -> list[str]:
    """ceil(fraction x len(names)) of the names, sorted: those with the smallest SHA-256 of (seed, class, name)."""
    count = math.ceil(Fraction(str(fraction)) * len(names))  # exact: 0.07 x 100 is 7, not 7.000000000000001

    def rank(name: str) -> tuple[bytes, str]:
        return hashlib.sha256(os.fsencode(normalize("NFC", f"{seed}/{class_name}/{name}"))).digest(), name

    return sorted(sorted(names, key=rank)[:count])


def refuse_overlap(target: str, other: str) -> None:
    """Raises InputError if one of two folders is the other, or holds it."""
    a, b = Path(os.path.realpath(other)), Path(os.path.realpath(target))
    if a == b or a in b.parents or b in a.parents:
        raise InputError(f"{target}: has to lie outside {other}")


def size_of(path: str | Path) -> int | None:
    """Bytes of a file; None if it is absent or no plain file."""
    return os.path.getsize(path) if os.path.isfile(path) else None


def sample(
    source: str, parts: dict[str, dict[str, list[str]]], *, fraction: float, seed: int, link: bool, overwrite: bool
) -> None:
    """Copies class folders from `source`: `parts` maps a target folder to its images by class.

    A second run completes what a stopped one left. Raises InputError as `refuse_overlap` and `prepare_target` do.
    """
    choice, chosen = {"source": os.path.abspath(source), "seed": seed, "fraction": fraction}, {}
    for target, images in parts.items():
        refuse_overlap(target, source)
        paths = [os.path.join(class_name, name) for class_name, names in images.items() for name in names]
        files = {path: size for path in paths if (size := size_of(os.path.join(source, path))) is not None}
        if odd := [path for path in paths if path not in files]:
            print(f"{target}: left out {len(odd)} that are no files (pipes, links to nowhere): {some(odd)}")
        prepare_target(Path(target), choice, files, overwrite)
        chosen[target] = files
    for target, files in chosen.items():
        for path, size in tqdm(files.items(), desc=target, unit="image", disable=None):
            place(Path(source, path), Path(target, path), size, link)
        for folder in {Path(target, path).parent for path in files}:
            for path in folder.iterdir():
                if UNFINISHED.fullmatch(path.name):  # of a killed process; a living one finds the file in place
                    path.unlink(missing_ok=True)
        write_manifest(Path(target), choice | {"images": len(files), "complete": True, "files": files})
        print(f"{target}: {len(files)} images of {len(parts[target])} classes (seed {seed}, fraction {fraction})")


def prepare_target(target: Path, choice: dict, files: dict[str, object], overwrite: bool) -> None:
    """Removes what an earlier manifest lists and `files` lacks, nothing else, and lists `files` in a new manifest.

    Raises InputError if the target holds something else, or another choice and `overwrite` is not set.
    """
    target.mkdir(parents=True, exist_ok=True)
    found = sorted(files_below(target, follow=False))  # first: another sampler writes its manifest before its files
    try:
        before = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        listed = {MANIFEST, *dict(before["files"])}
        different = [f"{key} {before[key]}, not {value}" for key, value in choice.items() if before[key] != value]
    except (OSError, ValueError, KeyError, TypeError):
        before, listed, different = {}, set(), []
    if foreign := [path for path in found if path not in listed]:
        raise InputError(f"{target}: not written by a sampler, so never removed: {some(foreign)}; move it elsewhere")
    if different and not overwrite:
        raise InputError(f"{target}: was sampled with {'; '.join(different)}; --overwrite replaces it")
    kept = {MANIFEST, *(files if before.get("source") == choice["source"] else [])}
    if stale := [path for path in found if path not in kept]:
        write_manifest(target, before | {"complete": False})
    for path in stale:
        (target / path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # up to a folder that is not empty: the target has a manifest
            os.removedirs((target / path).parent)
    write_manifest(target, choice | {"images": len(files), "complete": False, "files": files})


def write_manifest(target: Path, manifest: dict) -> None:
    write_text(target / MANIFEST, json.dumps(manifest, separators=(",\n", ": ")) + "\n")


def place(source: Path, target: Path, size: int, link: bool) -> None:
    """Copies or hard-links one file if it is not in place; a half-written copy never has the final name."""
    if size_of(target) == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(target)
    try:
        if link:
            os.link(os.path.realpath(source), partial)  # what a symbolic link leads to, not the link
        else:
            shutil.copyfile(source, partial)
        replace(partial, target)
    except OSError as error:
        if size_of(target) != size:  # else another process has just finished it
            advice = f"{target}: no hard link ({error.strerror}); leave out --link to copy"
            raise (InputError(advice) if link else error) from None
    finally:
        partial.unlink(missing_ok=True)  # also if all went well: a rename from one hard link to another does nothing
