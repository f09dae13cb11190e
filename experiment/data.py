"""Reading images as a viewer would show them, transforms, folders of classes, and loaders."""

import contextlib
import errno
import hashlib
import multiprocessing
import os
import pickle
import queue
import random
import signal
import stat
import threading
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as vision

from experiment.runtime import STOP_SIGNALS, Stopper, keep_freed_memory
from experiment.sampling import ENDINGS, open_images
from models.errors import InputError, OneProcessError
from models.images import BITS, PHOTOMETRIC, UnreadableImage, to_rgb, turn_upright

FORMATS = tuple(dict.fromkeys(ENDINGS.values()))  # the decoders that are offered a file, whatever its name
LONGEST = 8  # sides; of a longer strip only the middle is used, or a 20000x1 image would be resized to gigabytes
FILL_ORDER, PLANAR, SAMPLE_FORMAT, SUBSAMPLING = 266, 284, 339, 530  # TIFF
PNG_EXTRAS = 2**20  # bytes of text and of EXIF data
NO_LABEL = -1
SAMPLED = 1000  # files whose contents a fingerprint sees
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


def read_image(path: str | os.PathLike) -> Image.Image:
    """The file's first frame as 8-bit RGB, turned as its EXIF orientation says, transparency on white, 16 bits scaled.

    Raises:
        UnreadableImage: not a plain file, not an image of a known format, truncated, or too large to be honest.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableImage("not a plain file")  # opening a FIFO would wait for ever
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it mends: odd EXIF, odd palettes
            with Image.open(path, formats=FORMATS) as image:
                tags = getattr(image, "tag_v2", {})
                if tags:
                    check_tiff(tags, image.mode, image.info["compression"])
                image.load()
                return to_rgb(turn_upright(image), tags)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        reason = f"cannot identify image file; what is read: {', '.join(FORMATS)}"
    except OSError as error:
        if error.errno in TOO_MANY_FILES:  # the machine's fault, not the image's
            raise over_the_limit("an image can't be opened", error) from None
        reason = error.strerror or str(error)
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        reason = f"{type(error).__name__}: {error}"
    name = os.fspath(path)  # whoever lists the reasons names the file
    raise UnreadableImage(reason.replace(f" {name!r}", "").replace(name, "").replace("\n", " ")[:200])


def check_tiff(tags: Mapping[int, Any], mode: str, compression: str) -> None:
    """Refuses the layouts that Pillow opens and shows wrongly."""
    raw = compression == "raw"
    if set(tags.get(SAMPLE_FORMAT, (1,))) == {2}:
        raise UnreadableImage("signed pixels have no fixed black")
    if raw and tags.get(PHOTOMETRIC) == 6 and tags.get(SUBSAMPLING, (2, 2)) != (1, 1):
        raise UnreadableImage("subsampled YCbCr, uncompressed: Pillow shows it wrongly")
    right = ("1", "L", "P", "I;16", "I;16B", "RGB", "RGBA", "CMYK")
    as_is = tags.get(PHOTOMETRIC) != 0 and tags.get(FILL_ORDER, 1) == 1 and set(tags.get(BITS, (1,))) == {8}
    if tags.get(PLANAR, 1) == 2 and (mode not in right or (raw and not as_is)):
        raise UnreadableImage("each channel by itself, in a layout that Pillow shows wrongly")


class PngStream(PngImagePlugin.PngStream):
    """Reads of a PNG what its first picture needs: other chunks, of any size and damage, are skipped as viewers do."""

    def call(self, cid: bytes, pos: int, length: int) -> bytes:
        if cid[0] & 32:  # not critical
            # Some programs write the orientation as text.
            text = cid in (b"tEXt", b"zTXt", b"iTXt") and self.text_memory < PNG_EXTRAS
            if length <= PNG_EXTRAS and (text or cid in (b"tRNS", b"eXIf")):
                with contextlib.suppress(ValueError, SyntaxError):
                    return super().call(cid, pos, length)
            self.fp.seek(pos + length)
            return b""
        return super().call(cid, pos, length)

    def crc(self, cid: bytes, data: bytes) -> None:
        if cid[0] & 32:
            self.fp.read(4)
        else:
            super().crc(cid, data)

    def chunk_tRNS(self, pos: int, length: int) -> bytes:
        found = super().chunk_tRNS(pos, length)
        if self.im_rawmode == "RGB;16B":
            raise UnreadableImage("a transparent colour of 16 bits, of which Pillow reads 8")
        if self.im_rawmode in ("L;2", "L;4"):  # Pillow scales the pixels and not this
            self.im_info["transparency"] *= {"L;2": 85, "L;4": 17}[self.im_rawmode]
        return found


PngImagePlugin.PngStream = PngStream  # Pillow has no other way to name one


class Transform(NamedTuple):
    """Image -> uint8 (3,crop,crop): shorter side to `resize`, then a crop; centred and unflipped without `epoch`.

    Augmentation is drawn from (seed, epoch, index) alone, so it is the same for any number of workers.
    """

    resize: int
    crop: int
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    seed: int = 0
    epoch: int | None = None

    def __call__(self, image: Image.Image, index: int) -> Tensor:
        width, height = image.size
        if max(width, height) > LONGEST * min(width, height):
            image = vision.center_crop(image, [min(height, LONGEST * width), min(width, LONGEST * height)])
        image = vision.resize(image, [self.resize])
        top, left = (image.height - self.crop) // 2, (image.width - self.crop) // 2
        flips = (False, False)
        if self.epoch is not None:
            rng = random.Random(f"{self.seed}/{self.epoch}/{index}")
            top, left = rng.randint(0, image.height - self.crop), rng.randint(0, image.width - self.crop)
            flips = rng.random() < self.horizontal_flip, rng.random() < self.vertical_flip
        pixels = np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))
        if flips[0]:
            pixels = pixels[:, ::-1]
        if flips[1]:
            pixels = pixels[::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class Whole(NamedTuple):
    """Image -> uint8 (3,H,W), nothing cut: what is small already, with a shorter side of at most `limit` pixels.

    Raises:
        UnreadableImage: larger than that, or a strip.
    """

    limit: int

    def __call__(self, image: Image.Image, index: int) -> Tensor:
        size = f"{image.width}x{image.height} pixels"
        if min(image.size) > self.limit or max(image.size) > 4 * self.limit:
            raise UnreadableImage(f"{size} are not small (up to {self.limit}); leave out --small")
        if max(image.size) > LONGEST * min(image.size):
            raise UnreadableImage(f"{size} are a strip, too long to rebuild")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Batch(NamedTuple):
    images: Tensor  # (N,3,H,W) uint8, of one size: only those that could be read
    indices: Tensor  # (N) their places in the data set
    unreadable: list[tuple[int, str]]  # index and reason of the others


class ImageTree(Dataset):
    """The images below `root`. Folders directly in it are classes, where there are any.

    Raises:
        InputError: no such folder, or no images.
    """

    def __init__(self, root: str, transform: Transform | Whole | None = None):
        self.root = root
        self.paths = open_images(root)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.transform(read_image(os.path.join(self.root, self.paths[index])), index)
        except UnreadableImage as error:
            return index, str(error)

    def fingerprint(self) -> str:
        """16 digits of a SHA-256 of every image's name and size, and of how 1000 of them (seeded) begin and end.

        A copy in another folder has the same. An image of the same size that takes another's place may pass; all don't.
        """
        seen = hashlib.sha256()
        sampled = set(random.Random(0).sample(range(len(self)), min(SAMPLED, len(self))))
        for i, path in enumerate(self.paths):
            size, ends = -1, b""
            with contextlib.suppress(OSError):  # a link that leads nowhere, a file that may not be read
                found = os.stat(os.path.join(self.root, path))
                size = found.st_size
                if i in sampled and stat.S_ISREG(found.st_mode):
                    with Path(self.root, path).open("rb") as file:
                        ends = file.read(4096)
                        file.seek(max(0, size - 4096))
                        ends += file.read(4096)
            seen.update(os.fsencode(f"{path}\0{size}\0") + ends)
        return seen.hexdigest()[:16]

    def folder_of(self, index: int) -> str:
        """Name of the class folder, empty for an image that lies in `root` itself."""
        return self.paths[index].partition(os.sep)[0] if os.sep in self.paths[index] else ""

    def targets(self, class_names: list[str], required: bool = False) -> list[int]:
        """The classifier's index of every image's class, by the name of its folder; NO_LABEL without class folders.

        Names are compared in NFC: some systems take letters and their accents apart.

        Raises:
            InputError: class folders that the classifier does not know, images beside them, or no class folders where
                labels are `required`.
        """
        indices = {unicodedata.normalize("NFC", name): i for i, name in enumerate(class_names)}
        folders = [unicodedata.normalize("NFC", self.folder_of(i)) for i in range(len(self))]
        if not any(folders):
            if required:
                raise InputError(
                    f"{self.root}: holds no class folders, and without labels there is no accuracy to measure"
                )
            return [NO_LABEL] * len(self)
        unknown = sorted(set(folders) - set(indices))
        if "" in unknown:
            raise InputError(f"{self.root}: {self.paths[folders.index('')]} lies beside the class folders, not in one")
        if unknown:
            shown = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            raise InputError(
                f"{self.root}: the classifier has no class named {shown}; it knows {len(class_names)}, "
                f"such as {', '.join(class_names[:3])}: rename the folders to its names"
            )
        return [indices[folder] for folder in folders]


def epoch_batches(
    count: int, batch_size: int, *, seed: int, epoch: int, shuffle: bool, limit: int | None
) -> list[list[int]]:
    """The batches of one epoch as indices, drawn from (seed, epoch); `limit` batches are a random subset."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    if limit is not None:
        order = order[: limit * batch_size]
    if not shuffle:
        order.sort()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


class Loader:
    """`batches` of a data set, in their order, read by `workers` processes; by this one where there are none.

    Of a batch whose images differ in size come several, one a size.

    A worker hands its batches over as bytes in a pipe of its own, and a thread takes them in: no shared memory, of
    which a container has 64 MB, and no open file for each. At most two a worker are under way.
    """

    def __init__(self, dataset: Dataset, batches: list[list[int]], workers: int, pin_memory: bool):
        self.dataset, self.batches, self.pin_memory = dataset, batches, pin_memory
        self.workers = min(workers, len(batches))

    def __iter__(self) -> Iterator[Batch]:
        return self.read(lambda get: get())

    def read(self, wait: Callable[[Callable], Batch | Exception | None]) -> Iterator[Batch]:
        """The batches; wait(get) -> get(), or None to end them.

        Raises:
            OneProcessError: the workers could not be started, or one was killed.
        """
        if not self.workers:
            for indices in self.batches:
                packed = wait(lambda indices=indices: pack(self.dataset, indices))
                if packed is None:
                    return
                yield from unpack(packed, self.pin_memory)
            return
        pool: list[Worker] = []
        try:
            self.start(pool)
            for number in range(len(self.batches)):
                worker = pool[number % self.workers]
                found = wait(worker.arrived.get)
                if found is None:
                    return
                if isinstance(found, EOFError):
                    raise killed(worker.process)
                if isinstance(found, Exception):
                    raise found
                if number + 2 * self.workers < len(self.batches):
                    worker.ask(number + 2 * self.workers)
                yield from found
        finally:
            for worker in pool:
                worker.process.kill()  # it may hang in a read
            for worker in pool:
                worker.process.join(1)

    def start(self, pool: list["Worker"]) -> None:
        """Fills `pool` with workers that have their first two batches to read."""
        try:
            for _ in range(self.workers):
                here, there = multiprocessing.Pipe()
                process = multiprocessing.Process(
                    target=work, args=(self.dataset, self.batches, there, here), daemon=True
                )
                process.start()
                pool.append(Worker(process, here, queue.SimpleQueue()))
                there.close()  # so that its end is the pipe's
            for spare in [os.open(os.devnull, os.O_RDONLY) for _ in range(16)]:  # for files that are read and written
                os.close(spare)
            device = torch.cuda.current_device() if self.pin_memory else None
            for worker in pool:  # after the last process: threads and forks don't go together
                threading.Thread(target=receive, args=(worker.pipe, worker.arrived, device), daemon=True).start()
        except (OSError, RuntimeError) as error:  # RuntimeError: a thread can't be started
            raise over_the_limit(f"{self.workers} processes that read images can't be started", error) from None
        for number in range(min(2 * self.workers, len(self.batches))):
            pool[number % self.workers].ask(number)


class Worker(NamedTuple):
    """A process that reads batches, as the main process sees it."""

    process: multiprocessing.Process
    pipe: Connection
    arrived: queue.SimpleQueue  # lists of Batch, or the exception that came instead

    def ask(self, number: int) -> None:
        with contextlib.suppress(OSError):  # it is gone: that will arrive
            self.pipe.send(number)


def batches_until_stopped(loader: Iterable[Batch], stopper: Stopper) -> Iterator[Batch]:
    """The loader's batches, until a stop signal comes, also where it comes while one is waited for.

    That one is not delivered. Of several processes none ends by itself: they agree on a stop at the next step.
    """
    yield from loader.read(stopper.wait_for) if isinstance(loader, Loader) else loader


def batches_of_one_size(batches: Iterable[Batch], full: Callable[[int, int], int], waiting: int) -> Iterator[Batch]:
    """Joins batches whose images have the same size to full ones, without padding; the last of a size may hold fewer.

    Args:
        full: (height, width) -> images of a full batch, at least 1.
        waiting: pixels that may wait for more of their size; over that the largest group goes as it is.
    """
    groups: dict[tuple[int, int], Batch] = {}
    held = 0  # pixels in them

    def pixels(batch: Batch) -> int:
        return batch.images[:, 0].numel()

    for batch in batches:
        if not len(batch.images):  # none of them could be read
            yield batch
            continue
        size = tuple(batch.images.shape[-2:])
        if size in groups:
            before = groups.pop(size)
            held -= pixels(before)
            images, indices = (torch.cat(pair) for pair in zip(before[:2], batch[:2], strict=True))
            batch = Batch(images, indices, before.unreadable + batch.unreadable)
        many = full(*size)
        while len(batch.images) >= many:
            yield Batch(batch.images[:many], batch.indices[:many], batch.unreadable)
            batch = Batch(batch.images[many:].clone(), batch.indices[many:], [])  # a view would hold all of it
        if len(batch.images):
            groups[size] = batch
            held += pixels(batch)
        while held > waiting:
            largest = groups.pop(max(groups, key=lambda size: pixels(groups[size])))
            held -= pixels(largest)
            yield largest
    yield from groups.values()


def pack(dataset: Dataset, indices: list[int]) -> list[tuple[np.ndarray, list[int], list[tuple[int, str]]]]:
    """What a Batch for every size of image holds, without tensors: their pickles would be names of shared memory.

    What can't be read goes with the first.
    """
    samples = [dataset[i] for i in indices]
    sizes: dict[tuple, tuple] = {}
    for index, image in samples:
        if isinstance(image, Tensor):
            images, places = sizes.setdefault(tuple(image.shape), ([], []))
            images.append(image.numpy())
            places.append(index)
    packed = [(np.stack(images), places, []) for images, places in sizes.values()]
    packed = packed or [(np.empty((0, 3, 0, 0), np.uint8), [], [])]
    packed[0][2].extend((i, reason) for i, reason in samples if isinstance(reason, str))
    return packed


def unpack(packed: list[tuple], pin_memory: bool) -> list[Batch]:
    images = [torch.from_numpy(one[0]) for one in packed]
    return [
        Batch(pixels.pin_memory() if pin_memory else pixels, torch.tensor(places, dtype=torch.long), unreadable)
        for pixels, (_, places, unreadable) in zip(images, packed, strict=True)
    ]


def work(dataset: Dataset, batches: list[list[int]], pipe: Connection, other_end: Connection) -> None:
    """A worker: sends the batches that it is asked for, until the pipe ends."""
    for number in STOP_SIGNALS:  # they may reach workers too; the main process still needs images for its last step
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()  # it is not inherited where workers are not forked
    other_end.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            number = pipe.recv()
            try:
                answer = pack(dataset, batches[number])
            except (InputError, MemoryError) as error:
                answer = error
            except Exception:
                answer = RuntimeError(f"in a process that reads images:\n{traceback.format_exc()}")
            pipe.send_bytes(pickle.dumps(answer, protocol=5))


def receive(pipe: Connection, arrived: queue.SimpleQueue, device: int | None) -> None:
    """A thread of the main process: takes in what a worker sends; an EOFError is the last, when it has ended."""
    try:
        if device is not None:
            torch.cuda.set_device(device)
        while True:
            answer = pickle.loads(pipe.recv_bytes())
            arrived.put(answer if isinstance(answer, Exception) else unpack(answer, device is not None))
    except (EOFError, OSError):
        arrived.put(EOFError())
    except Exception as error:
        arrived.put(error)


def killed(process: multiprocessing.Process) -> OneProcessError:
    process.join(5)
    how = f" ({signal.Signals(-process.exitcode).name})" if (process.exitcode or 0) < 0 else ""
    return OneProcessError(f"a process that reads images was killed{how}, mostly out of memory: lower data.workers")


def over_the_limit(what: str, error: Exception) -> OneProcessError:
    number = getattr(error, "errno", None) or errno.EAGAIN  # a thread that can't be started has none
    limit = "open files (`ulimit -n`)" if number in TOO_MANY_FILES else "processes (`ulimit -u`, --pids-limit)"
    return OneProcessError(f"{what} ({os.strerror(number)}): lower data.workers, or raise the limit of {limit}")


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (N,3,H,W) -> float32 in [0,1] on `device`, in channels_last but on Macs' GPUs."""
    order = torch.contiguous_format if device.type == "mps" else torch.channels_last
    images = images.to(device, non_blocking=True).contiguous(memory_format=order)
    return images.float().div_(255)
