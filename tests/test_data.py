import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CLASSES, draw, draw_folder, python
from PIL import Image

from experiment.data import NO_LABEL, ImageTree, Transform, batches, epoch_batches
from experiment.runtime import Stopper, new_run_folder, progress_bar
from models.errors import InputError, OneProcessError


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 5000), (3, 200), (33, 32)])
def test_any_size_becomes_a_crop(size):
    for epoch in (None, 3):
        pixels = Transform(36, 32, epoch=epoch)(Image.new("RGB", size, (200, 30, 60)), 0)
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
        assert pixels[:, 5, 5].tolist() == [200, 30, 60]


def test_centre_crop():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    pixels = Transform(40, 32)(image, 0)
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(image)[4:36, 9:41])


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    image = draw("checks", 0)

    def crop(seed=1, epoch=0, index=0):
        return Transform(40, 24, 0.5, 0.1, seed, epoch)(image, index)

    assert crop().equal(crop())
    assert len({crop(epoch=e).numpy().tobytes() for e in range(20)}) > 10
    assert len({crop(index=i).numpy().tobytes() for i in range(20)}) > 10
    assert len({crop(seed=s).numpy().tobytes() for s in range(20)}) > 10


def test_flip_probabilities():
    image = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    plain = Transform(16, 16)(image, 0)
    known = [plain, plain.flip(2), plain.flip(1), plain.flip(1, 2)]
    counts = [0, 0, 0, 0]
    for index in range(1000):
        pixels = Transform(16, 16, 0.5, 0.1, 7, 0)(image, index)
        counts[next(i for i, expected in enumerate(known) if pixels.equal(expected))] += 1
    assert abs(counts[1] + counts[3] - 500) < 70 and abs(counts[2] + counts[3] - 100) < 40


def test_the_order_of_images_depends_on_seed_and_epoch():
    def order(count=10, size=4, seed=1, epoch=0, shuffle=True, limit=None):
        return epoch_batches(count, size, seed=seed, epoch=epoch, shuffle=shuffle, limit=limit)

    assert [len(b) for b in order()] == [4, 4, 2] and sorted(sum(order(), [])) == list(range(10))
    assert order() == order() and sum(order(shuffle=False), []) == list(range(10))
    part = order(1000, shuffle=False, limit=2)
    assert [len(b) for b in part] == [4, 4] and max(part[-1]) > 100  # not the first classes
    orders = {str(order(100, 100, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100, "seed 1 in its second epoch has nothing of seed 2 in its first"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_for_any_number_of_workers(tmp_path, workers):
    dataset = ImageTree(str(draw_folder(tmp_path / "images", 4)), Transform(36, 32, 0.5, 0.5, 1, 2))
    (tmp_path / "images" / CLASSES[0] / "0.png").write_bytes(b"broken")
    lists = epoch_batches(12, 5, seed=3, epoch=2, shuffle=True, limit=None)
    state = torch.get_rng_state()
    seen = []
    for batch in batches(dataset, lists, workers):
        assert len(batch.images) == len(batch.indices)
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            assert image.equal(dataset[index][1])
        seen.append(batch.indices.tolist())
        for index, reason in batch.unreadable:
            assert index == 0 and "identify" in reason
    assert seen == [[i for i in indices if i != 0] for indices in lists]
    assert torch.get_rng_state().equal(state)


def test_classes_are_mapped_by_name(tmp_path):
    """Three of a thousand classes score as they would among all."""
    names = [f"n{i:08d}" for i in range(1000)]
    for name in (names[7], names[500], names[999]):
        (tmp_path / name).mkdir()
        draw("discs", 1).save(tmp_path / name / "a.png")
    assert ImageTree(str(tmp_path)).targets(names) == [7, 500, 999]
    assert ImageTree(str(tmp_path)).targets(names[::-1]) == [992, 499, 0]
    with pytest.raises(InputError, match=r"no class named n00000500, n00000999; it knows 100"):
        ImageTree(str(tmp_path)).targets(names[:100])


def test_trees_without_labels(tmp_path):
    draw("discs", 1).save(tmp_path / "a.png")
    assert ImageTree(str(tmp_path)).targets(["x"]) == [NO_LABEL]
    (tmp_path / "x").mkdir()
    draw("discs", 2).save(tmp_path / "x" / "b.png")
    with pytest.raises(InputError, match=r"a\.png lies beside the class folders"):
        ImageTree(str(tmp_path)).targets(["x"])


def test_a_fingerprint_sees_contents_and_not_places_or_times(tmp_path):
    folder = draw_folder(tmp_path / "images", 3)
    found = ImageTree(str(folder)).fingerprint()
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert ImageTree(str(tmp_path / "copy")).fingerprint() == found
    path = tmp_path / "copy" / CLASSES[0] / "0.png"
    contents = path.read_bytes()
    others = [
        lambda: path.write_bytes(contents[:-20] + bytes(20)),  # of the same size
        lambda: path.write_bytes(bytes(30) + contents[30:]),
        lambda: path.write_bytes(contents + b"\0"),
        lambda: path.rename(path.with_name("a.png")),
        lambda: shutil.copy(path, path.with_name("a.png")),
    ]
    for change in others:
        path.write_bytes(contents)
        change()
        assert ImageTree(str(tmp_path / "copy")).fingerprint() != found
        path.with_name("a.png").unlink(missing_ok=True)
    os.mkfifo(path.with_name("pipe.png"))  # and it hangs at nothing
    path.with_name("nowhere.png").symlink_to("nowhere")
    assert len(ImageTree(str(tmp_path / "copy")).fingerprint()) == 16


class Stubborn(ImageTree):
    """A tree of which image 7 does what `act` does."""

    act = staticmethod(lambda: time.sleep(1000))

    def __getitem__(self, index: int):
        if index == 7:
            self.act()
        return super().__getitem__(index)


@pytest.fixture
def stubborn(tmp_path) -> Stubborn:
    return Stubborn(str(draw_folder(tmp_path / "images", 4)), Transform(36, 32))


BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_stop_signal_is_heard_while_a_batch_is_waited_for(stubborn, workers, number, code, capfd):
    """What was delivered before is whole, and no process is left."""
    began = time.monotonic()
    with Stopper() as stopper:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), getattr(signal, number)))
        seen = []
        for batch in batches(stubborn, BATCHES, workers, stopper=stopper):
            seen.append(batch.indices.tolist())
            if len(seen) == 3:
                timer.start()
        timer.join()
        assert stopper.code == code
    assert seen == BATCHES[:3] and time.monotonic() - began < 10
    assert not multiprocessing.active_children()
    assert f"{number}: stopping" in capfd.readouterr().err


def test_one_of_several_processes_waits_on(stubborn, monkeypatch):
    """They agree on a stop at their next step; a second Ctrl-C ends the wait."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(Stubborn, "act", staticmethod(lambda: time.sleep(1)))
    with Stopper() as stopper:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert len(list(batches(stubborn, BATCHES, 1, stopper=stopper))) == 6
        assert stopper.code == 143
        monkeypatch.setattr(Stubborn, "act", staticmethod(lambda: time.sleep(1000)))
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            list(batches(stubborn, BATCHES, 1, stopper=stopper))
    assert not multiprocessing.active_children()


def test_a_hangup_that_is_ignored_stays_ignored(monkeypatch):
    """By nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopper() as stopper:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopper.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_noted_though_nobody_reads_that(monkeypatch):
    """The terminal is gone, or Ctrl-C ended tee, too."""
    monkeypatch.setattr(os, "write", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with Stopper() as stopper:
        os.kill(os.getpid(), signal.SIGHUP)
    assert stopper.code == 129


HELD = """
import time
import torch
from experiment.data import batches

class Hanging(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index, time.sleep(1000 if index else 0) or torch.zeros(3, 1, 1, dtype=torch.uint8)

def main():
    held = batches(Hanging(), [[0], [1]], 2)
    next(held)
    1 / 0

main()
"""


def read_all(dataset: ImageTree, workers: int) -> None:
    list(batches(dataset, BATCHES, workers))


def run_out_of_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), OneProcessError, r"2 processes.*exited.*lower data\.workers"),
        (lambda: 1 / 0, ZeroDivisionError, "(?s)worker.*Traceback"),  # a fault of the program is shown
        (run_out_of_memory, MemoryError, None),
    ],
)
def test_a_worker_fails(stubborn, monkeypatch, act, error, message):
    monkeypatch.setattr(Stubborn, "act", staticmethod(act))
    with pytest.raises(error, match=message):
        read_all(stubborn, 2)
    assert not multiprocessing.active_children()


def test_workers_leave_stop_signals_to_the_main_process(stubborn, monkeypatch):
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    monkeypatch.setattr(Stubborn, "act", staticmethod(lambda: [os.kill(os.getpid(), number) for number in stops]))
    read_all(stubborn, 2)


def test_batches_need_no_shared_memory(stubborn, monkeypatch):
    """Of which a container has 64 MB."""
    monkeypatch.setattr(Stubborn, "act", staticmethod(lambda: None))
    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, None)
    read_all(stubborn, 2)


def test_more_workers_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's holds files
    dataset = ImageTree(str(draw_folder(tmp_path / "images", 30)), Transform(36, 32))
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, limits[1]))
        with pytest.raises(OneProcessError, match=r"64 processes.*Too many open files.*data\.workers.*ulimit -n"):
            list(batches(dataset, [[i] for i in range(90)], 64))
        assert not multiprocessing.active_children()
        assert len(list(batches(dataset, [[i] for i in range(90)], 4))) == 90
        with pytest.raises(OSError, match="Too many open files"):
            while len(held) < 100:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files"):  # no fault of the image's
            dataset[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in held:
            os.close(number)


@pytest.mark.parametrize(
    ("owner", "error"),
    [
        (multiprocessing.Process, OSError(errno.EAGAIN, "Resource temporarily unavailable")),
        (threading.Thread, RuntimeError("can't start new thread")),
    ],
)
def test_the_machine_refuses_processes(stubborn, monkeypatch, owner, error, capfd):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    calls, start = [], owner.start

    def refuse(process):
        calls.append(1)
        if len(calls) == 2:
            raise error
        start(process)

    monkeypatch.setattr(owner, "start", refuse)
    with pytest.raises(OneProcessError, match=r"3 processes.*data\.workers.*ulimit -u"):
        read_all(stubborn, 3)
    assert not multiprocessing.active_children() and not capfd.readouterr().err


def test_a_program_that_ends_in_an_error_ends(tmp_path):
    """Though it holds its batches, and a worker hangs and ignores SIGTERM."""
    ended = python(HELD, tmp_path)
    assert ended.returncode == 1 and ended.stderr.strip().endswith("ZeroDivisionError: division by zero")


def test_run_folders_of_the_same_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        folders = [new_run_folder("train").name for _ in range(5)]
    time.tzset()
    assert len(set(folders)) == 5 and folders == sorted(folders)
    assert abs(time.mktime(time.strptime(folders[0], "train_%Y%m%d-%H%M%S")) - time.mktime(time.gmtime())) < 60


def test_redirected_progress_is_a_line_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress_bar(600, "epoch 1/2") as bar:
        for _ in range(600):
            now[0] += 1
            bar.update()
    lines = capsys.readouterr().out.splitlines()
    assert 9 <= len(lines) <= 10 and all(line.startswith("epoch 1/2: ") and "to go" in line for line in lines)
