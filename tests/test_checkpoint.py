"""A checkpoint on a disk that fails: always a whole one, and what is damaged is seen."""

import errno
import itertools
import os
import random
import resource
import signal
import stat
from pathlib import Path

import pytest
import torch
from conftest import as_nobody, in_a_child, last_line, one_line, same_state

from experiment import run as runs
from experiment.parameters import Parameters
from experiment.run import (
    FILE,
    PREVIOUS,
    claimed,
    is_whole,
    job_suffix,
    load_checkpoint,
    refuse_changes,
    run_to_resume,
    save_checkpoint,
)
from models import files, weights
from models.errors import InputError
from models.files import PARTIAL, refuse_unwritable, remove_partials, write_atomically, write_text
from models.rrdbnet import RRDBNet

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


def numbers(folder: Path) -> list[int]:
    """Of the last checkpoint and of the one before; there is no third."""
    assert {path.name for path in folder.iterdir() if path.name.startswith("checkpoint")} == {FILE, PREVIOUS}
    return [load_checkpoint(folder)["number"], torch.load(folder / PREVIOUS, weights_only=True)["number"]]


def test_the_last_and_the_one_before(saved):
    assert numbers(saved) == [2, 1]
    assert load_checkpoint(saved)["network"]["weight"].equal(state(2)["network"]["weight"])
    (saved / FILE).write_bytes(b"damaged")
    save_checkpoint(saved, state(3))
    assert numbers(saved) == [3, 1], "a damaged one does not push out the good one"


def goes_back(folder: Path, capsys) -> bool:
    """Whether the one before is used, and one line says so."""
    found = load_checkpoint(folder)["number"]
    lines = capsys.readouterr().out.splitlines()
    said = len(lines) == 1 and "damaged or missing" in lines[0] and FILE in lines[0] and PREVIOUS in lines[0]
    return found == 1 and said


def test_every_truncation_is_recognised(saved, capsys):
    whole = (saved / FILE).read_bytes()
    for length in {0, 1, len(whole) - 1} | set(random.Random(0).sample(range(len(whole)), TRUNCATIONS)):
        (saved / FILE).write_bytes(whole[:length])
        assert goes_back(saved, capsys), length


def test_a_flipped_byte_is_recognised_or_changes_nothing(saved, capsys):
    """Bytes between the entries of torch's zip archive are covered by no checksum, and by no reader."""
    whole, rng = (saved / FILE).read_bytes(), random.Random(0)
    recognised = 0
    for _ in range(FLIPS):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
        (saved / FILE).write_bytes(damaged)
        found = load_checkpoint(saved)
        assert found["network"]["weight"].equal(state(found["number"])["network"]["weight"])
        recognised += found["number"] == 1
    assert recognised > FLIPS / 2


def test_an_absent_one_is_said(saved, capsys):
    (saved / FILE).unlink()
    assert goes_back(saved, capsys)
    (saved / PREVIOUS).unlink()
    with pytest.raises(InputError, match="not a whole checkpoint"):
        load_checkpoint(saved)


def failing(number: int):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_failed_save_leaves_every_byte(saved, monkeypatch, call, number):
    before = contents(saved)
    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "open" else os, call, failing(number))
        with pytest.raises(OSError) as error:
            save_checkpoint(saved, state(3))
    assert error.value.errno == number
    after = contents(saved)
    assert after[FILE] == before[FILE] and set(after) == set(before) and all(map(is_whole, saved.iterdir()))
    save_checkpoint(saved, state(3))
    assert load_checkpoint(saved)["number"] == 3


@pytest.mark.parametrize("save", [save_checkpoint, lambda folder, what: weights.save_file(what, folder / FILE)])
@pytest.mark.parametrize("room", [0, 100, 4096, 8000])
def test_a_write_that_the_system_cuts_short(saved, room, save):
    """A real limit of the system: the last write is short, the next one fails."""
    before = contents(saved)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with pytest.raises(OSError):
            save(saved, state(3))

    in_a_child(work)
    assert contents(saved) == before


def test_a_folder_that_is_read_only(saved):
    """A real refusal."""
    before = contents(saved)

    def work():
        as_nobody(saved)
        with pytest.raises(OSError):
            save_checkpoint(saved, state(3))

    in_a_child(work)
    saved.chmod(0o755)
    assert contents(saved) == before


def test_the_users_umask_holds(tmp_path):
    before = os.umask(0o027)
    try:
        for number in (1, 2):
            save_checkpoint(tmp_path, state(number))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


REFUSALS = [errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP]
CALLS = [("fsync",), ("link",), ("replace",), ("chmod", "fsync", "link", "replace")]


@pytest.mark.parametrize(
    ("calls", "number"),
    [*itertools.product(CALLS, REFUSALS), (("replace",), errno.EBUSY), (("replace",), errno.EXDEV)],
)
def test_what_a_file_system_refuses_is_left_out(tmp_path, monkeypatch, calls, number):
    """CIFS, exFAT, gcsfuse, S3: no modes, flushes, hard links or renames. A file that is a mount: no renames."""
    with monkeypatch.context() as patch:
        for call in calls:
            patch.setattr(os, call, failing(number))
        for i in (1, 2, 3):
            save_checkpoint(tmp_path, state(i))
        write_text(tmp_path / "history.csv", "epoch\n")
    assert numbers(tmp_path) == [3, 2]
    assert contents(tmp_path).keys() == {FILE, PREVIOUS, "history.csv"}
    assert is_whole(tmp_path / PREVIOUS) and (tmp_path / "history.csv").read_text() == "epoch\n"


def test_a_link_is_written_through(tmp_path):
    scratch, home = tmp_path / "scratch", tmp_path / "home"
    scratch.mkdir()
    home.mkdir()
    (scratch / "old.pt").write_text("old")
    links = {"file": scratch / "old.pt", "new": scratch / "new.pt", "relative": "../scratch/r.pt"}
    for name, leads_to in (links | {"twice": home / "file", "logs": scratch}).items():
        (home / name).symlink_to(leads_to)
    found = {"file": "old.pt", "new": "new.pt", "relative": "r.pt", "logs/a/b.csv": "a/b.csv", "twice": "old.pt"}
    for name, leads_to in found.items():
        refuse_unwritable(home / name, "key")
        write_text(home / name, name)
        assert (scratch / leads_to).read_text() == name
    assert all(path.is_symlink() for path in home.iterdir())
    assert sorted(path.name for path in scratch.iterdir()) == ["a", "new.pt", "old.pt", "r.pt"]


def test_places_where_no_file_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "purged").symlink_to(tmp_path / "gone" / "w.pt")
    (tmp_path / "logs").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    places = ["folder", "file/w.pt", "file/a/w.pt", "logs/train/w.pt", "purged", "loop", "loop/w.pt", "pipe"]
    for place in (*places, "x" * 300, f"folder/{'x' * 300}"):
        with pytest.raises(OSError) as error:
            write_text(tmp_path / place, "text")
        assert error.value.strerror, place
        with pytest.raises(InputError, match=r"can't be written \(\w.*\); change key"):
            refuse_unwritable(tmp_path / place, "key")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"
    with pytest.raises(InputError):
        refuse_unwritable("/dev/null", "key")
    for name in ("x" * 251 + ".csv", "é" * 125 + ".csv"):
        refuse_unwritable(tmp_path / name, "key")
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def killed_while_saving(path: Path) -> None:
    """A process that is killed with half of its file written."""
    pid = os.fork()
    if not pid:
        write_atomically(path, lambda file: (file.write(b"half"), file.flush(), os.kill(os.getpid(), signal.SIGKILL)))
    os.waitpid(pid, 0)


def test_what_a_kill_leaves_is_hidden_and_goes_when_the_run_goes_on(saved):
    before = contents(saved)
    for _ in range(2):
        killed_while_saving(saved / FILE)
    left = contents(saved).keys() - before.keys()
    assert len(left) == 2, "processes that write one file do not share a hidden one"
    assert all(name.startswith(".") and name.endswith(f"-{files.PROCESS}{PARTIAL}") for name in left)
    (saved / ".notes").write_text("mine")
    save_checkpoint(saved, state(3))  # another process's may be in use: they stay
    assert contents(saved).keys() == before.keys() | left | {".notes"}
    remove_partials(saved)
    assert contents(saved).keys() == before.keys() | {".notes"} and load_checkpoint(saved)["number"] == 3


@pytest.mark.usefixtures("no_figures")
def test_a_run_goes_on_from_the_one_before(start, experiment):
    whole = last_line(start("train_darionet"))
    expected = load_checkpoint(whole)["network"]
    (whole / FILE).write_bytes((whole / FILE).read_bytes()[:-100])
    result = start("train_darionet", "--resume")
    assert result.code == 0, result.err
    said = [line for line in result.out.splitlines() if "damaged" in line]
    assert len(said) == 1 and PREVIOUS in said[0] and "Resumed at epoch 2, step 1" in result.out
    assert same_state(load_checkpoint(whole)["network"], expected)
    for name in (FILE, PREVIOUS):
        (whole / name).write_bytes(b"")
    one_line(start("train_darionet", "--resume", whole), FILE, "not a whole checkpoint")


def make_run(name: str, minute: int, finished: bool = False) -> Path:
    folder = Path("assets/logs") / f"train_{name}"
    folder.mkdir(parents=True)
    save_checkpoint(folder, state(1))
    save_checkpoint(folder, state(2) | {"finished": finished})
    for path, time in ((folder / PREVIOUS, 60 * minute - 1), (folder / FILE, 60 * minute)):
        os.utime(path, (time, time))
    return folder


def test_a_restart_picks_up_its_own_run_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def resumed(job: str = "my job", restarts: str = "1") -> str | None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        run = run_to_resume(None)
        return run and run.name

    assert resumed() is None
    for i, suffix in enumerate(["_my-job", "_my-job", "_another", ""]):
        make_run(f"{i}{suffix}", i)
    (Path("assets/logs") / "train_4_my-job").mkdir()  # did not come as far as a checkpoint
    assert resumed() == "train_1_my-job" and resumed("unknown") is None
    assert resumed(restarts="0") is None, "a new job under an old name"


def test_jobs_without_a_name_are_told_apart_by_where_their_processes_meet(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default
    names = set()
    for address, port in (("a", "29500"), ("a", "29501"), ("b", "29500")):
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("MASTER_PORT", port)
        names.add(job_suffix())
    assert len(names) == 3


def test_the_newest_run_is_the_unfinished_one_that_wrote_last(tmp_path, monkeypatch):
    """Not the one with the latest name: that depends on the time zone."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no training run with a checkpoint"):
        run_to_resume("latest")
    make_run("20260102-030000", 10, finished=True)
    make_run("20260101-230000", 20, finished=True)
    assert run_to_resume("latest").name == "train_20260101-230000"
    make_run("20260102-010000", 15)
    run = make_run("20260102-020000", 14)
    assert run_to_resume("latest").name == "train_20260102-010000"
    (run / FILE).write_bytes(b"damaged")  # just now
    assert run_to_resume("latest") == run
    assert run_to_resume(str(run / FILE)) == run_to_resume(str(run)) == run


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_says_where_its_weights_are_and_goes_on_with_more_epochs(start, experiment):
    """Without the weights that it started from."""
    torch.save(RRDBNet(8, 1, 4).state_dict(), "start.pt")
    options = ("--set", "darionet.initial_weights=start.pt", "--set")
    at_once, run = (last_line(start("train_darionet", *options, f"training.epochs={n}")) for n in (2, 1))
    Path("start.pt").unlink()
    before = load_checkpoint(run)["network"]
    for named in ([run / FILE], []):
        result = start("train_darionet", "--resume", *named)
        assert result.code == 0 and result.out.splitlines()[-2].endswith("): DarioNet.pt")
        assert same_state(load_checkpoint(run)["network"], before)
    longer = start("train_darionet", "--resume", "--set", "training.epochs=2")
    assert longer.code == 0 and "Resumed at epoch 2" in longer.out
    assert same_state(load_checkpoint(run)["network"], load_checkpoint(at_once)["network"])


@pytest.mark.usefixtures("no_figures")
def test_a_living_run_is_left_alone(start, experiment):
    run = last_line(start("train_darionet", "--set", "training.epochs=1"))
    partial = run / f".history.csv.1-1-living{PARTIAL}"
    partial.write_text("half")
    before = contents(run)
    for save in ("true", "false"):
        with claimed(run / FILE):
            result = start("train_darionet", "--resume", run, "--set", f"training.save={save}")
            one_line(result, "another run is writing it")
        assert contents(run) == before
    Path("link.pt").symlink_to("new/folder/w.pt")
    with claimed("new/folder/w.pt"):
        for name in ("new/folder/w.pt", "link.pt"):
            refused = start("train_darionet", "--set", f"darionet.weights={name}")
            one_line(refused, "new/folder/w.pt: another run is writing it")


def test_what_may_change():
    before = Parameters().model_dump()
    before |= {"classifier_weights": "0123", "images": {"data.train": "ab", "data.val": "cd"}}
    now = {key: value.copy() if isinstance(value, dict) else value for key, value in before.items()}
    free = ("epochs", "batch_size", "save", "verbose", "checkpoint_minutes", "tensorboard", "recompute", "compile")
    changed = [("classifier", "weights"), *(("training", key) for key in free)]
    changed += [(section, key) for section in ("data", "test") for key in now[section]]
    for section, key in changed:
        now[section][key] = "other"
    refuse_changes(before, now)


@pytest.mark.parametrize("version", [1, 2, None])
def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path, monkeypatch, version):
    monkeypatch.setattr(runs, "VERSION", version)
    save_checkpoint(tmp_path, state(1))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"checkpoint\.pt: not a checkpoint of this version.*start a new run"):
        load_checkpoint(tmp_path)
