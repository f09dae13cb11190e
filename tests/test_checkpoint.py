"""A checkpoint on a disk that fails: always a whole one, and what is damaged is seen."""

import errno
import os
import random
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import one_line

from experiment import checkpoint
from experiment.checkpoint import FILE, PREVIOUS, is_whole, load_checkpoint, run_of_job, save_checkpoint
from experiment.runtime import launcher
from models import weights
from models.errors import InputError

TRUNCATIONS, FLIPS = 50, 100


def state(number: int) -> dict:
    generator = torch.Generator().manual_seed(number)
    return {"number": number, "network": {"weight": torch.rand(50, 40, generator=generator)}}


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with the checkpoints 1 and 2."""
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_last_and_the_one_before(saved):
    assert sorted(contents(saved)) == [FILE, PREVIOUS]
    assert load_checkpoint(saved)["number"] == 2
    assert torch.load(saved / PREVIOUS, weights_only=True)["number"] == 1
    assert load_checkpoint(saved)["network"]["weight"].equal(state(2)["network"]["weight"])


def goes_back(folder: Path, capsys, fault: str = "is damaged") -> bool:
    """Whether the checkpoint is seen to be damaged, the one before is used, and one line says so."""
    found = load_checkpoint(folder)["number"]
    lines = capsys.readouterr().out.splitlines()
    said = len(lines) == 1 and fault in lines[0] and FILE in lines[0] and PREVIOUS in lines[0]
    return found == 1 and said


def test_every_truncation_is_recognised(saved, capsys):
    whole = (saved / FILE).read_bytes()
    offsets = {0, 1, len(whole) - 1, len(whole) - checkpoint.TRAILER} | set(
        random.Random(0).sample(range(len(whole)), 46)
    )
    recognised = 0
    for offset in offsets:
        (saved / FILE).write_bytes(whole[:offset])
        recognised += goes_back(saved, capsys)
    assert (recognised, len(offsets)) == (TRUNCATIONS, TRUNCATIONS)


def test_every_flipped_byte_is_recognised(saved, capsys):
    whole, rng, recognised = (saved / FILE).read_bytes(), random.Random(0), 0
    for i in range(FLIPS):
        damaged = bytearray(whole)
        place = rng.randrange(len(whole)) if i >= checkpoint.TRAILER else len(whole) - 1 - i  # the checksum's own too
        damaged[place] ^= rng.randrange(1, 256)
        (saved / FILE).write_bytes(damaged)
        recognised += goes_back(saved, capsys)
    assert recognised == FLIPS


def test_an_absent_one_is_said(saved, capsys):
    (saved / FILE).unlink()
    assert goes_back(saved, capsys, "is missing")
    (saved / PREVIOUS).unlink()
    with pytest.raises(InputError, match=r"no checkpoint\.pt"):
        load_checkpoint(saved)


def test_both_damaged_is_refused(saved):
    for name in (FILE, PREVIOUS):
        (saved / name).write_bytes((saved / name).read_bytes()[:-1])
    with pytest.raises(InputError, match="not a whole checkpoint"):
        load_checkpoint(saved)


def test_a_damaged_one_does_not_push_out_the_good_one(saved):
    (saved / FILE).write_bytes(b"damaged")
    save_checkpoint(saved, state(3))
    assert load_checkpoint(saved)["number"] == 3
    assert torch.load(saved / PREVIOUS, weights_only=True)["number"] == 1


def test_without_hard_links(saved, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save_checkpoint(saved, state(3))
    assert load_checkpoint(saved)["number"] == 3
    assert torch.load(saved / PREVIOUS, weights_only=True)["number"] == 2
    assert sorted(contents(saved)) == [FILE, PREVIOUS]


def failing(number: int):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["mkstemp", "write", "fsync", "chmod", "replace"])
def test_a_failed_save_leaves_every_byte(saved, monkeypatch, call, number):
    before = contents(saved)
    owner = {"mkstemp": weights.tempfile, "write": checkpoint.Checksum}.get(call, os)
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, failing(number))
        with pytest.raises(OSError) as error:
            save_checkpoint(saved, state(3))
    assert error.value.errno == number
    after = contents(saved)
    assert after[FILE] == before[FILE] and set(after) == set(before) and all(map(is_whole, saved.iterdir()))
    save_checkpoint(saved, state(3))
    assert load_checkpoint(saved)["number"] == 3


def test_a_disk_that_loses_bytes_in_silence(saved, monkeypatch):
    before, write = contents(saved), checkpoint.Checksum.write

    def short(self, data):
        write(self, data)
        self.file.seek(-1, os.SEEK_CUR)
        return len(data)

    monkeypatch.setattr(checkpoint.Checksum, "write", short)
    with pytest.raises(OSError, match="less than was written"):
        save_checkpoint(saved, state(3))
    assert contents(saved) == before


def in_child(work) -> int:
    """Exit status of `work` in a forked process: 0 where it returns, 1 where it raises an OSError."""
    pid = os.fork()
    if not pid:
        code = 3
        try:
            work()
            code = 0
        except OSError:
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("room", [0, 100, 4096, 8000])
def test_a_write_that_the_system_cuts_short(saved, room):
    """A real limit of the system: the last write is short, the next one fails."""
    before = contents(saved)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        save_checkpoint(saved, state(3))

    assert in_child(work) == 1
    assert contents(saved) == before

    def work_on_weights():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        weights.save_file(state(3), saved / FILE)

    assert in_child(work_on_weights) == 1
    assert contents(saved) == before


def test_a_folder_that_is_read_only(saved):
    """A real refusal: as another user than root, whom nothing refuses."""
    before = contents(saved)
    for folder in (saved, saved.parent, saved.parent.parent):
        folder.chmod(0o755)

    def work():
        if os.getuid() == 0:
            os.setuid(65534)
        else:
            saved.chmod(0o555)
        save_checkpoint(saved, state(3))

    assert in_child(work) == 1
    saved.chmod(0o755)
    assert contents(saved) == before


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_users_umask_holds(tmp_path, mask):
    before = os.umask(mask)
    try:
        for number in (1, 2):
            save_checkpoint(tmp_path, state(number))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_what_a_kill_left_goes_and_what_is_in_use_stays(saved):
    leftover = saved / f".{FILE}.abc{weights.PARTIAL}"
    leftover.write_bytes(b"half")
    descriptor, used = weights.open_partial(saved / FILE)
    other = saved / f".{FILE}.notes"
    other.write_text("mine")
    save_checkpoint(saved, state(3))
    assert set(contents(saved)) == {FILE, PREVIOUS, Path(used).name, other.name}
    os.close(descriptor)
    save_checkpoint(saved, state(4))
    assert set(contents(saved)) == {FILE, PREVIOUS, other.name}


def test_a_run_goes_on_from_the_one_before(start, experiment):
    """The script: said in one line, and the run ends as it would have."""
    whole = Path(start("train_darionet").out.splitlines()[-1])
    expected = load_checkpoint(whole)["network"]
    (whole / FILE).write_bytes((whole / FILE).read_bytes()[:-100])
    result = start("train_darionet", "--resume")
    assert result.code == 0, result.err
    said = [line for line in result.out.splitlines() if "damaged" in line]
    assert len(said) == 1 and PREVIOUS in said[0] and "Resumed at epoch 2, step 1" in result.out
    found = load_checkpoint(whole)["network"]
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())
    for name in (FILE, PREVIOUS):
        (whole / name).write_bytes(b"")
    one_line(start("train_darionet", "--resume", whole), FILE, "not a whole checkpoint")


def test_a_restart_picks_up_its_own_run_alone(saved, tmp_path):
    logs, mine = tmp_path / "logs", launcher()
    assert run_of_job(logs, [mine]) is None
    for stamp, owners in (("1", [mine]), ("2", [mine, "host 7 1"]), ("3", ["host 8 1"]), ("4", [mine])):
        run = logs / f"train_{stamp}"
        run.mkdir(parents=True)
        checkpoint.remember_job(run, owners)
        if stamp != "4":  # the last did not come as far as a checkpoint
            save_checkpoint(run, state(1))
    assert run_of_job(logs, [mine]).name == "train_2"
    assert run_of_job(logs, ["host 7 1", "host 9 1"]).name == "train_2"
    assert run_of_job(logs, ["host 9 1"]) is None
    (logs / "train_2" / checkpoint.JOB).write_text("[")
    assert run_of_job(logs, [mine]).name == "train_1"


def test_every_process_of_one_launcher_names_it_alike():
    command = [sys.executable, "-c", "from experiment.runtime import launcher; print(launcher())"]
    names = {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)}
    assert len(names) == 1 and names != {launcher()} and str(os.getpid()) in names.pop().split()
