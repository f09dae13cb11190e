"""Turns Tiny ImageNet's archive into the project's folders.

    python -m examples.tiny_imagenet.prepare tiny-imagenet-200.zip
    python -m examples.tiny_imagenet.prepare tiny-imagenet-200.zip --classes n01443537 n01882714
    python -m examples.tiny_imagenet.prepare tiny-imagenet-200.zip --all

The archive (zip, tar or tar.gz, in the official layout) is read, not unpacked: only photographs of the chosen classes
are written, under names that are checked, so that no archive can write outside the folder. A share of the training
photographs (--held-out) joins the official validation photographs in FOLDER/val_original, which img_sampler_val.py then
splits into validation and test; all others go to FOLDER/train_original.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]  # started as a file, python finds the packages beside it

import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

from tqdm import tqdm

from experiment.sampling import prepare_target, share, write_manifest
from experiment.script import ArgumentParser, run_script
from models.errors import InputError

TEN_CLASSES = (
    "n01443537",  # goldfish
    "n01882714",  # koala
    "n02106662",  # German shepherd
    "n02165456",  # ladybug
    "n02279972",  # monarch
    "n03085013",  # computer keyboard
    "n03837869",  # obelisk
    "n04465501",  # tractor
    "n07720875",  # bell pepper
    "n09256479",  # coral reef
)
TRAIN = re.compile(r"(?:^|/)train/(n\d{8})/images/(n\d{8}_\d+\.JPEG)$")
VAL = re.compile(r"(?:^|/)val/images/(val_\d+\.JPEG)$")
ANNOTATIONS = re.compile(r"(?:^|/)val/val_annotations\.txt$")
LARGEST = 2**22  # bytes of one member: photographs have 2 kB, the annotations 500 kB
SEED = 2020


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and contents of every plain file of the archive that has one of the three kinds of name.

    Raises:
        InputError: no archive, a damaged one, or a member of an impossible size.
    """

    def wanted(name: str, size: int) -> bool:
        known = any(pattern.search(name) for pattern in (TRAIN, VAL, ANNOTATIONS))
        if known and size > LARGEST:
            raise InputError(f"{path}: {name} has {size} bytes; this is not Tiny ImageNet's archive")
        return known

    if not path.exists():
        raise InputError(f"{path}: no such archive; examples/tiny_imagenet/README.md says where to get it")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if wanted(info.filename, info.file_size):
                        yield info.filename, archive.read(info)
        else:
            with tarfile.open(path) as archive:
                for info in archive:
                    if info.isreg() and wanted(info.name, info.size):
                        yield info.name, archive.extractfile(info).read()
    except InputError:
        raise
    except Exception as error:  # damaged or encrypted archives have many kinds
        raise InputError(f"{path}: not a readable zip or tar archive ({error})") from None


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--held-out", type=float, default=0.15, help="share kept from training")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--classes", nargs="+", metavar="WNID", default=TEN_CLASSES, help="default: ten of them")
    choice.add_argument("--all", action="store_true", help="all classes of the archive")
    arguments = parser.parse_args()
    if not 0 <= arguments.held_out < 1:
        raise InputError(f"--held-out: found {arguments.held_out}; it has to be at least 0 and less than 1")

    train: dict[str, dict[str, bytes]] = {}
    val: dict[str, bytes] = {}
    labels: dict[str, str] = {}
    for name, contents in tqdm(members(arguments.archive), desc="reading", unit="file", disable=None):
        if match := TRAIN.search(name):
            if arguments.all or match[1] in arguments.classes:
                train.setdefault(match[1], {})[match[2]] = contents
        elif match := VAL.search(name):
            val[match[1]] = contents
        else:
            lines = contents.decode("utf-8", "replace").splitlines()
            labels = dict(line.split("\t")[:2] for line in lines if line.count("\t") >= 1)

    absent = [] if arguments.all else sorted(set(arguments.classes) - set(train))
    if absent or not train:
        raise InputError(f"{arguments.archive}: has no training photographs of {', '.join(absent) or 'any class'}")
    parts: dict[str, dict[str, bytes]] = {"train_original": {}, "val_original": {}}  # CLASS/NAME -> contents
    for class_name, photographs in train.items():
        held_out = set(share(list(photographs), arguments.held_out, SEED, class_name))
        for name, contents in photographs.items():
            parts["val_original" if name in held_out else "train_original"][f"{class_name}/{name}"] = contents
    parts["val_original"] |= {f"{labels[name]}/{name}": val[name] for name in val if labels.get(name) in train}
    # What another choice of classes or share left goes: a photograph must not be in both parts.
    choice = {"source": arguments.archive.name, "held_out": arguments.held_out, "classes": sorted(train)}
    for part, photographs in parts.items():
        folder = arguments.folder / part
        files = {path: f"{len(contents)} {zlib.crc32(contents)}" for path, contents in photographs.items()}
        prepare_target(folder, choice, files, overwrite=True)
        for path, contents in photographs.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(contents)
        write_manifest(folder, choice | {"images": len(files), "complete": True, "files": files})
        print(f"{folder}: {len(files)} photographs of {len(train)} classes")


if __name__ == "__main__":
    run_script(main)
