"""The machine: device, precision, processes, seeds, signals."""

import atexit
import contextlib
import ctypes
import errno
import functools
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from experiment.script import refuse_tasks_without_torchrun
from models.errors import InputError, OneProcessError

LOGS = Path("assets/logs")  # a folder in it for every run
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


@contextlib.contextmanager
def lost_process():
    """Turns torch's errors of connections into one line: another process of the job is gone, or what torch says."""
    try:
        yield
    except RuntimeError as error:
        is_lost = re.search("closed by peer|reset by peer|Broken pipe|[Tt]imed out|Timeout", str(error))
        reason = "another process of the job is gone" if is_lost else str(error).strip().splitlines()[0]
        raise ConnectionError(errno.ECONNRESET, reason, "torchrun") from None


@dataclass(frozen=True)
class Runtime:
    """Where and how precisely the networks compute, and which of torchrun's processes this is."""

    device: torch.device
    precision: str  # bf16, fp16 or float32
    rank: int = 0
    processes: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def memory_format(self) -> torch.memory_format:
        """In which convolutions train soonest (benchmarks/README.md); on Macs what every kernel takes."""
        on_avx2 = self.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
        plain = self.device.type == "mps" or (on_avx2 and self.precision == "float32")
        return torch.contiguous_format if plain else torch.channels_last

    @property
    def widest(self) -> torch.dtype:
        """For sums: float64, which Macs' GPUs lack."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @lost_process()
    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.processes > 1:
            dist.all_reduce(values)
        return values

    def sum_numbers(self, *numbers: float) -> list[float]:
        """The sums of some numbers over all processes, in float64."""
        if self.processes == 1:
            return list(numbers)
        return self.sum(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()

    @lost_process()
    def gather(self, value: object) -> list:
        """The values of all processes, in the order of their ranks, on every one of them."""
        values = [value] * self.processes
        if self.processes > 1:
            dist.all_gather_object(values, value)
        return values

    def part(self, items: list) -> list:
        """This process's part of a list that every process holds: disjoint, complete, nothing padded."""
        return items[self.rank :: self.processes]

    def autocast(self) -> torch.autocast:
        """Convolutions in `precision`; weights, losses and resizes stay float32."""
        return torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "float32")

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def name(self) -> str:
        """The GPU's name, "mps" or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def describe(self) -> str:
        machine = f"CPU with {torch.get_num_threads()} threads" if self.device.type == "cpu" else self.name()
        several = f"{self.processes} processes, each on " if self.processes > 1 else ""
        return f"{several}{machine}, {self.precision}"


def start_runtime(precision: str, seed: int = 0) -> Runtime:
    """The GPU if there is one (a Mac's is "mps"), else the CPU; "auto" takes the fastest precision in hardware.

    Under torchrun it joins the other processes, each on the GPU of its local rank. Seeds torch, and keeps float32 what
    it says on GPUs that would round it to tf32.
    """
    refuse_tasks_without_torchrun()
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rank, local, processes = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if torch.cuda.is_available():
        count, device = torch.cuda.device_count(), torch.device("cuda", local)
        if local >= count:
            raise OneProcessError(f"process {local} has no GPU: there are {count}, lower torchrun's --nproc_per_node")
        torch.cuda.set_device(device)
        fastest = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif torch.backends.mps.is_available():
        device, fastest = torch.device("mps"), "float32"
    else:
        device, fastest = torch.device("cpu"), "bf16" if cpu_has_bf16() else "float32"
        keep_freed_memory()
        if torch.get_num_threads() > 1 and processors_in_use() > 0.3:
            wait_without_spinning()
        if precision == "fp16":
            raise InputError("precision fp16 needs a GPU; on a CPU use auto, bf16 or float32")
    if processes > 1:
        join_processes("nccl" if device.type == "cuda" else "gloo")
    return Runtime(device, fastest if precision == "auto" else precision, rank, max(processes, 1))


@lost_process()
def join_processes(backend: str) -> None:
    """Joins torchrun's processes, with own keys per life of the job: torch's store keeps the addresses of the dead."""
    try:
        store, rank, processes = next(dist.rendezvous("env://"))
    except ValueError as error:  # a batch system's own WORLD_SIZE, without the rest
        raise InputError(f"{error}: start with torchrun, or unset WORLD_SIZE") from None
    if os.environ.get("LOCAL_WORLD_SIZE") == str(processes):  # over several machines the counts may differ
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
    atexit.register(dist.destroy_process_group)  # its threads, still running at the exit, would abort the process


def keep_freed_memory() -> None:
    """Has the C library keep what is freed for the next tensor: zeros for fresh pages take 7 % of a training step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back
        mallopt(-2, 2**26)  # M_TOP_PAD: grow in steps of 64 MiB


def processors_in_use(seconds: float = 0.2) -> float:
    """How many processors other programs keep busy, watched for `seconds`; 0 if the system does not say."""

    def idle() -> float:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split()  # of all processors: "cpu", then ticks
        return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")

    try:
        before, begun = idle(), time.monotonic()
        time.sleep(seconds)
        return max(0.0, os.cpu_count() - (idle() - before) / (time.monotonic() - begun))
    except (OSError, ValueError, IndexError):
        return 0.0


@functools.cache
def wait_without_spinning() -> None:
    """Has torch's threads sleep while they wait for each other: spinning, they keep the processor from those at work.

    Beside other programs spinning made training on two cores three times slower; alone it is faster. GNU's OpenMP
    hardly spins once it has more threads than there are processors: a second team, which stays idle, makes them more.
    Its own settings (GOMP_SPINCOUNT, OMP_WAIT_POLICY) are read before a script begins.
    """
    threads, formed = torch.get_num_threads(), threading.Event()

    def second_team() -> None:
        torch.ones(threads * 2**16).exp_()  # large enough to be shared by all threads
        formed.set()
        threading.Event().wait()

    if threads > 1 and sys.platform == "linux":
        threading.Thread(target=second_team, daemon=True).start()
        formed.wait()  # a script that ends while its thread is within torch is aborted


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself: emulated, it is slower than float32."""
    with contextlib.suppress(OSError):
        return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    return False


def compiled(function: Callable) -> Callable:
    """torch.compile without mix-order reductions: beside concatenations they gave wrong gradients (pytorch 193061)."""
    from torch._inductor import config  # a second's import, for those who compile

    switch = "mix_order_reduction"
    return torch.compile(function, options={f"triton.{switch}": False} if hasattr(config.triton, switch) else None)


def new_run_folder(kind: str, suffix: str = "") -> Path:
    """assets/logs/KIND_<date>-<time> in UTC, made now; if another run has that second, the next that is free."""
    LOGS.mkdir(parents=True, exist_ok=True)
    now = time.time()
    while True:
        folder = LOGS / f"{kind}_{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}{suffix}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        now += 1


class Lines(io.TextIOBase):
    """Standard output with a line per state of a progress bar, since no terminal overwrites the one before."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            print(text, flush=True)


def progress_bar(total: int, description: str, verbose: bool = True, *, unit: str = "step", **options) -> tqdm:
    """A progress bar on a terminal, elsewhere a line a minute: how far the work is, and the time that is left."""
    disable = not verbose or os.environ.get("RANK", "0") != "0"
    if not sys.stderr.isatty():
        form = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} so far, {remaining} to go, {rate_noinv_fmt}{postfix}"
        options |= {"mininterval": 60, "miniters": 1, "maxinterval": 60, "delay": 60, "bar_format": form}
        options |= {"leave": False, "file": Lines()}
    return tqdm(total=total, desc=description, unit=unit, disable=disable, **options)


class Stopper:
    """Notes Ctrl-C, SIGTERM and SIGHUP, so that the step in progress can end; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.owner = os.getpid()
        self.alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # several processes agree on a stop at their next step

    def __enter__(self) -> "Stopper":
        heard = [s for s in STOP_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # nohup
        self.previous = {s: signal.signal(s, self.note) for s in heard}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        if os.getpid() != self.owner:  # a worker that was just forked
            return
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # Ctrl-C may have ended what reads our output, such as tee
                os.write(2, f"\n{signal.Signals(number).name}: stopping after this step\n".encode())

    def agree(self, asked: float) -> bool:
        """Whether any process was asked to stop, which all have summed at one moment: then this one stops, too."""
        if asked:
            self.signal = self.signal or signal.SIGTERM
        return asked > 0

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def code(self) -> int:
        """The exit code: 130, 143 or 129."""
        return 128 + (self.signal or 0)
