"""Which images a folder has, which are kept, and copying them. No torch here: the samplers start without it."""

import functools
import hashlib
import json
import math
import os
import re
import shutil
import stat
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

from experiment.script import printable
from models.errors import InputError

# Endings of images, and how Pillow calls their format. The same on every machine, whatever its Pillow can read, so that
# samplers choose the same files; no format without a signature at its start (TGA, PCX): files are read by content.
ENDINGS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".webp": "WEBP",
    ".gif": "GIF",
    **dict.fromkeys((".avif", ".avifs"), "AVIF"),
    **dict.fromkeys((".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "JPEG2000"),
    ".qoi": "QOI",
}
# What NAS, archivers, Windows and macOS put beside photographs; names that start with a dot are left out as well.
SYSTEM = re.compile(
    r"@(eadir|tmp|recycle|recently-snapshot|__thumb)|[#~](recycle|snapshot)|__macosx|\$recycle\.bin|recycler|lost\+found"
    r"|system volume information|network trash folder|temporary items|icon\r|__pycache__"
    r"|(eh)?thumbs(_vista)?\.db|desktop\.ini|picasa\.ini",
    re.IGNORECASE,
)
REPEATS = 1000  # folders that links may lead to again, and ten times as many as there are: there are links in loops
MANIFEST = "manifest.json"
PARTIAL = ".partial"
HOW_TO_GET_IMAGES = (
    "README.md says how to lay out images (Your own images; ImageNet); `make demo` runs everything on drawn pictures"
)
CONVERT = "convert photographs to JPEG or PNG, unpack archives"


def composed(name: str) -> str:
    """The name in NFC: a Mac may give it decomposed, and it is still the same name."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def set_apart(name: str) -> str | None:
    """How a file or folder is counted that a system made or that is hidden; None for all others."""
    return name if SYSTEM.fullmatch(name) else "hidden" if name.startswith(".") else None


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder or a link to one; a link that leads to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_images(folder: str | Path, left_out: Counter | None = None) -> list[str]:
    """Paths, relative to `folder`, of every file below it with an image's ending, in an order of names alone.

    Links to folders are followed, but not back to a folder that they lie in, so that loops end. What is no image, what
    systems make and what is hidden is left out, and counted in `left_out` by ending or name.

    Raises:
        InputError: links lead to the same folders again and again.
    """
    left_out = Counter() if left_out is None else left_out
    found, seen, repeats, resolve = [], set(), 0, functools.cache(os.path.realpath)
    waiting = [("", (os.path.realpath(folder),))]  # a path, and the real folders from `folder` down to it
    while waiting:
        inside, chain = waiting.pop()
        repeats += chain[-1] in seen
        if repeats > REPEATS + 10 * len(seen):
            raise InputError(f"{folder}: its links lead to {chain[-1]} and others again and again; remove such links")
        seen.add(chain[-1])
        with os.scandir(chain[-1]) as entries:
            for entry in entries:
                path = os.path.join(inside, entry.name)
                if kind := set_apart(entry.name):
                    left_out[kind] += 1
                elif is_folder(entry):
                    real = os.path.join(chain[-1], entry.name)
                    real = resolve(real) if entry.is_symlink() else real
                    if real not in chain:
                        waiting.append((path, (*chain, real)))
                elif ending(entry.name) in ENDINGS:
                    found.append(path)
                elif path != MANIFEST:
                    left_out[ending(entry.name) or "without an ending"] += 1
    return sorted(found, key=lambda path: (composed(path), path))


def counted(left_out: Counter) -> str:
    """As in "12 .heic, 2 @eaDir", the most frequent first."""
    kinds = ", ".join(f"{count} {printable(kind, 30)}" for kind, count in left_out.most_common(8))
    return kinds + (f" and {len(left_out) - 8} more kinds" if len(left_out) > 8 else "")


def absence(left_out: Counter) -> str:
    """The end of a message that there are no images: what there is instead, and what to do."""
    only = f", only {counted(left_out)}" if left_out else ""
    return f"{only}; {CONVERT if any(kind.startswith('.') for kind in left_out) else HOW_TO_GET_IMAGES}"


def say_left_out(folder: str, left_out: Counter) -> None:
    if left_out:
        remedy = f" ({CONVERT})" if any(kind.startswith(".") for kind in left_out) else ""
        print(f"{folder}: left out {counted(left_out)}: not read as images{remedy}")


def open_images(folder: str) -> list[str]:
    """list_images, and one line that says what was left out.

    Raises:
        InputError: no such folder, or no images in it.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; {HOW_TO_GET_IMAGES}")
    left_out = Counter()
    paths = list_images(folder, left_out)
    if not paths:
        raise InputError(f"{folder}: holds no images{absence(left_out)}")
    say_left_out(folder, left_out)
    return paths


def images_by_class(folder: str) -> dict[str, list[str]]:
    """Name of every folder in `folder` -> paths of the images below it; says what was left out.

    Raises:
        InputError: no such folder, no folders in it, or no images in those.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; {HOW_TO_GET_IMAGES}")
    left_out = Counter()
    names = sorted(entry.name for entry in os.scandir(folder) if is_folder(entry) and not set_apart(entry.name))
    classes = {name: [] for name in names}
    for path in list_images(folder, left_out):
        class_name, _, name = path.partition(os.sep)
        if name:
            classes[class_name].append(name)
        else:
            left_out["images in no class folder"] += 1
    empty = [name for name, images in classes.items() if not images]
    if len(empty) == len(classes):
        what = "its class folders hold no images" if classes else "holds no class folders"
        raise InputError(f"{folder}: {what}{absence(left_out)}")
    say_left_out(folder, left_out)
    if empty:
        print(f"{folder}: no images in {len(empty)} of {len(classes)} class folders: {some(empty)}")
    return classes


def some(names: list[str]) -> str:
    return ", ".join(printable(name, 200) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def share(names: list[str], fraction: float, seed: int, class_name: str) -> list[str]:
    """ceil(fraction x len(names)) of the names, sorted: those with the smallest SHA-256 of (seed, class, name)."""
    count = math.ceil(Fraction(str(fraction)) * len(names))  # exact: 0.07 x 100 is 7, not 7.000000000000001

    def rank(name: str) -> tuple[bytes, str]:
        return hashlib.sha256(os.fsencode(composed(f"{seed}/{class_name}/{name}"))).digest(), name

    return sorted(sorted(names, key=rank)[:count])


def sample(
    source: str, parts: dict[str, dict[str, list[str]]], *, fraction: float, seed: int, link: bool, overwrite: bool
) -> None:
    """Copies class folders from `source`: `parts` maps a target folder to its images by class.

    A manifest in every target records source, seed, fraction, and each file with size and time of its original. What an
    interrupted run left is completed, and what was replaced in the source since is renewed. Another selection makes a
    target refuse, unless `overwrite` is set. What has an image's name and is no file is left out, and that is said.

    Raises:
        InputError: a target holds something else, or is (or is in, or holds) the source.
    """
    prepared = []
    for target, images in parts.items():
        refuse_overlap(target, source)
        paths = [os.path.join(class_name, name) for class_name, names in images.items() for name in names]
        files = {path: version for path in paths if (version := version_of(os.path.join(source, path)))}
        if odd := [path for path in paths if path not in files]:
            print(f"{target}: left out {len(odd)} that are no files (pipes, links to nowhere): {some(odd)}")
        manifest = {"source": os.path.abspath(source), "seed": seed, "fraction": fraction}
        prepared.append((target, manifest, files, *prepare_target(Path(target), manifest, files, overwrite)))
    for target, manifest, files, missing, renewed in prepared:
        for path in tqdm(missing, desc=target, unit="image", disable=None):
            place(Path(source, path), Path(target, path), link)
        write_manifest(Path(target), manifest | {"images": len(files), "complete": True, "files": files})
        done = f"{len(files)} images of {len(parts[target])} classes from {source} (seed {seed}, fraction {fraction})"
        print(f"{target}: {done}" + (f"; {renewed} renewed: changed since the last time" if renewed else ""))


def version_of(path: str) -> str | None:
    """Size and time of a file, by which one that was replaced under its name is known; None where it is no file."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return f"{state.st_size} {state.st_mtime_ns}" if stat.S_ISREG(state.st_mode) else None


def refuse_overlap(target: str, other: str) -> None:
    """Raises InputError where one of two folders is the other, or holds it."""
    a, b = Path(os.path.realpath(other)), Path(os.path.realpath(target))
    if a == b or a in b.parents or b in a.parents:
        raise InputError(f"{target}: has to lie outside {other}")


def prepare_target(target: Path, manifest: dict, files: dict[str, str], overwrite: bool) -> tuple[list[str], int]:
    """Lists `files` in the manifest, and removes what an earlier manifest lists and is not, or no longer, one of them.

    Nothing else is ever removed: it makes the target refuse, by name. With `overwrite` it may stay, if it isn't read as
    an image.

    Args:
        files: path below `target` -> its version: the size in bytes, a space, and anything that changes with it.

    Returns:
        Those of `files` that have to be written, and how many of them replace another version.

    Raises:
        InputError: the target holds something else, or another selection and `overwrite` is not set.
    """
    target.mkdir(parents=True, exist_ok=True)
    try:
        before = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        listed = dict(before["files"])
        different = [f"{key} {before[key]}, not {value}" for key, value in manifest.items() if before[key] != value]
    except (OSError, ValueError, KeyError, TypeError):
        before, listed, different = None, {}, []
    found = files_in(target, listed)
    ours = {path for path in found if path.removesuffix(PARTIAL) in listed}
    foreign = sorted(found.keys() - ours - ({MANIFEST, MANIFEST + PARTIAL} if before else set()))
    if foreign and not before:
        raise InputError(
            f"{target}: not empty, and not written by a sampler that lists its files ({some(foreign)}); "
            "empty it or name another folder"
        )
    read = [path for path in foreign if ending(path) in ENDINGS or (target / path).is_dir()]
    if read or (foreign and not overwrite):
        remedy = "move it elsewhere" + ("" if read else "; --overwrite leaves it there")
        raise InputError(f"{target}: not written by a sampler, so never removed: {some(read or foreign)}; {remedy}")
    if foreign:
        print(f"{target}: not written by a sampler, and left there: {some(foreign)}")
    if different and not overwrite:
        raise InputError(f"{target}: was sampled with {'; '.join(different)}; --overwrite replaces it")

    same_source = before and before.get("source") == manifest["source"]
    fresh = {
        path
        for path in ours & files.keys()
        if same_source and listed[path] == files[path] and found[path] == int(files[path].split()[0])
    }
    stale = ours - fresh
    if stale:
        write_manifest(target, before | {"complete": False})
    for path in stale:
        remove(target, path)
    write_manifest(target, manifest | {"complete": False, "files": files})
    return [path for path in files if path not in fresh], len(stale & files.keys())


def files_in(target: Path, listed: dict[str, str]) -> dict[str, int]:
    """Path below `target` -> bytes of all that is no folder, without what systems make and what is hidden.

    Links to folders count as files, except for those that `listed` files lie in. A path is spelt as it is listed.
    """
    folders = set()
    for path in listed:
        while (path := os.path.dirname(path)) and path not in folders:
            folders.add(path)
    spelt = {composed(path): path for path in listed if not path.isascii()}
    found, waiting = {}, [""]
    while waiting:
        inside = waiting.pop()
        for entry in os.scandir(target / inside):
            path = os.path.join(inside, entry.name)
            if set_apart(entry.name):
                continue
            if is_folder(entry) if path in folders else entry.is_dir(follow_symlinks=False):
                waiting.append(path)
                continue
            other = spelt.get(composed(path), path)
            if other != path and (target / other).exists() and os.path.samefile(target / other, entry.path):
                path = other  # a file system that decomposes names
            found[path] = entry.stat(follow_symlinks=False).st_size
    return found


def remove(target: Path, path: str) -> None:
    """Removes a file below `target`, and the folders that this leaves empty."""
    os.unlink(target / path)
    while path := os.path.dirname(path):
        try:
            os.rmdir(target / path)
        except OSError:  # not empty
            return


def write_manifest(target: Path, manifest: dict) -> None:
    partial = target / (MANIFEST + PARTIAL)
    partial.write_text(json.dumps(manifest, separators=(",\n", ": ")) + "\n", encoding="utf-8")
    os.replace(partial, target / MANIFEST)


def place(source: Path, target: Path, link: bool) -> None:
    """Copies or hard-links one file; a half-written copy never has the final name."""
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
