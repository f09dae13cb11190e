"""Downloads Imagenette, ten classes of ImageNet at full size (1.5 GB), into the project's folders.

    python -m examples.imagenette.prepare
    python -m examples.imagenette.prepare --archive imagenette2.tgz        an archive that is there already

torchvision downloads the archive, checks its hash and unpacks it: FOLDER/imagenette2/train and val, a folder a class,
named by WordNet id, which is what img_sampler_train.py and img_sampler_val.py read.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]  # started as a file, python finds the packages beside it

import shutil
import tarfile

from torchvision.datasets import Imagenette

from experiment.script import ArgumentParser, run_script
from models.errors import InputError


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--archive", type=Path, help="use this file instead of a download; its hash is checked too")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.archive is not None:
        if not arguments.archive.is_file():
            raise InputError(f"{arguments.archive}: no such archive")
        if arguments.archive.resolve().parent != folder.resolve():
            shutil.copyfile(arguments.archive, folder / "imagenette2.tgz")
    # torchvision unpacks it: nothing may leave the folder (PEP 706)
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    unpacked = (folder / "imagenette2").is_dir()
    try:
        dataset = Imagenette(folder, split="train", size="full", download=not unpacked)
        held_out = Imagenette(folder, split="val", size="full")
    except (OSError, RuntimeError, tarfile.TarError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{folder}: Imagenette can't be downloaded or unpacked ({reason}); "
            "get imagenette2.tgz elsewhere and name it with --archive, and remove a half-unpacked imagenette2"
        ) from None
    print(f"{folder / 'imagenette2'}: {len(dataset)} training and {len(held_out)} validation photographs")


if __name__ == "__main__":
    run_script(main)
