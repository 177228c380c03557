"""One process or many: the same calls with and without torchrun (NCCL on GPUs, gloo on CPUs)."""

import contextlib
import os
import re
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm


class State(NamedTuple):
    """How far a rank is: `idle` seconds since it has done anything, `place` a line of code."""

    beats: int
    marks: int
    idle: float
    place: str


class Heartbeat(threading.Thread):
    """A thread that ends its process, naming the rank at fault, when nothing moves any more.

    `marks` counts the places where all ranks wait for each other that this rank has come to: those
    that wait are ahead of the rank they wait for. `work` counts what it does in between, so that
    one that is slow is not taken for one that hangs. One that is stopped, or whose machine is
    gone, does not beat at all. Works with any backend, and where a collective call would wait
    for ever: it talks through the store at MASTER_ADDR and MASTER_PORT, by keys below `start`.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, start: str) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.ranks, self.timeout = rank, range(world_size), timeout
        self.marks, self.work, self.idle = 0, 0, 0.0
        self.pause = min(10.0, timeout / 10)  # seconds between beats
        self.keys = [f"{start}/beat/{r}" for r in self.ranks]
        self.verdict = f"{start}/verdict"  # of the first to find out, which is heard
        self.main = threading.main_thread().ident
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(
            address, port, is_master=False, timeout=timedelta(seconds=max(60, timeout))
        )
        self.beats = 0
        self.beat()
        self.start()

    def beat(self) -> None:
        self.beats += 1
        state = f"{self.beats} {self.marks} {self.idle:.3f} {self.place()}"
        self.store.set(self.keys[self.rank], state)

    def place(self) -> str:
        """The line of this project that the main thread is in."""
        frame = sys._current_frames().get(self.main)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            ours = path.parent in (ROOT, ROOT / "fibldm", ROOT / "scripts")  # no .venv in ROOT
            if ours and path.name != "distributed.py":
                return f"{path.relative_to(ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return "?"

    def look(self) -> dict[int, State]:
        """What each rank said last."""
        found = {}
        for rank, key in zip(self.ranks, self.keys, strict=True):
            beats, marks, idle, place = self.store.get(key).decode().split(" ", 3)
            found[rank] = State(int(beats), int(marks), float(idle), place)
        return found

    def run(self) -> None:
        done, moved, before = None, time.monotonic(), None
        try:
            while True:
                if done != (self.marks, self.work):
                    done, moved, before = (self.marks, self.work), time.monotonic(), None
                self.idle = time.monotonic() - moved
                self.beat()
                if self.idle > self.timeout:
                    if before is not None:
                        self.judge(before, self.look())
                    before = self.look()
                for _ in range(2 if before else 0):  # between two looks each rank beats often
                    time.sleep(self.pause)
                    self.beat()
                time.sleep(self.pause)
        except RuntimeError:  # the store's process is gone, and the group with it
            return

    def judge(self, before: dict[int, State], after: dict[int, State]) -> None:
        """Where a rank is at fault say so, and end at once: the main thread may never answer."""
        silent = [r for r in self.ranks if before[r].beats == after[r].beats and r != self.rank]
        still = [r for r in self.ranks if after[r].idle > 0.9 * self.timeout]
        behind = [r for r in still if after[r].marks < max(s.marks for s in after.values())]
        if not silent and not behind and len(still) < len(self.ranks):
            return  # someone is at work
        if self.store.compare_set(self.verdict, "", str(self.rank)).decode() != str(self.rank):
            os._exit(1)
        if silent:
            who = [f"rank {r} does not answer (last seen at {after[r].place})" for r in silent]
        elif behind:
            who = [f"rank {r} hangs at {after[r].place}" for r in behind]
        else:
            who = ["all ranks wait at the same place: is the network between them down?"]
        sys.stderr.write(
            f"error (rank {self.rank}): no progress in {self.timeout / 60:g} minutes (--timeout): "
            f"{'; '.join(who)}. The last checkpoint is as it was: run the same command again\n"
        )
        sys.stderr.flush()
        os._exit(1)


CONNECT = 120  # seconds that processes have to find each other
_heartbeat: Heartbeat | None = None


def setup(device: str = "auto", timeout: float = 30.0) -> torch.device:
    """Join the process group that torchrun announces, if any; return this rank's device.

    `device` is as `choose_device` has it. Where a process of several makes no progress for
    `timeout` minutes, it is named and all end. Raises ValueError where a GPU cannot be used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic cuBLAS
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel for each tensor
    if "RANK" in os.environ and not dist.is_initialized():
        _join(chosen, timeout)
    return chosen


def choose_device(device: str = "auto") -> torch.device:
    """The device of this rank: "auto" (a GPU where there is one), "cpu", "cuda", or "cuda:N".

    "cuda:N" is for one process without torchrun. Raises ValueError where a GPU is asked for and
    absent, and where one is there that this build of PyTorch cannot use: "auto" would compute on
    the CPU without a word.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        if not available and (sign := _sign_of_a_gpu()):
            raise ValueError(f"--device auto: {sign}, but {_why_no_gpu()}{ON_PURPOSE}")
        device = "cuda" if available else "cpu"
    number = device.removeprefix("cuda:")
    if device != "cuda" and not number.isdecimal():
        if device != "cpu":
            raise ValueError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
        return torch.device("cpu")
    if number.isdecimal() and "RANK" in os.environ:
        raise ValueError(
            f"--device {device}: under torchrun each process takes its own GPU; use cuda"
        )
    index = int(number) if number.isdecimal() else int(os.environ.get("LOCAL_RANK", 0))
    if index >= available:
        why = "start fewer processes, or check nvidia-smi" if available else _why_no_gpu()
        raise ValueError(
            f"--device {device}: GPU {index} is asked for, {available} are visible to PyTorch: "
            f"{why}{ON_PURPOSE}"
        )
    _require_kernels(index)
    return torch.device("cuda", index)


ON_PURPOSE = "; or give --device cpu to compute on the CPU"
OTHER_BUILD = "install PyTorch from its index for CUDA 12, as its install page shows"
GPU_FILES = (Path("/dev/nvidia0"), Path("/proc/driver/nvidia"))
HIDDEN = ("", "-1", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES: no GPU is wanted; the last is Slurm's


def _sign_of_a_gpu() -> str | None:
    """What says that this process has an NVIDIA GPU; None without, or where it is to use none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        hidden = visible.split(",")[0].strip() in HIDDEN
        return None if hidden else f"CUDA_VISIBLE_DEVICES is {visible}"
    return next((f"{path} is there" for path in GPU_FILES if path.exists()), None)


def _why_no_gpu() -> str:
    """Why PyTorch sees no GPU, and what to do."""
    name = f"PyTorch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{name} is a build for CPUs alone; {OTHER_BUILD}"
    try:
        torch.cuda.init()
        reason = "no GPU is found"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
    return (
        f"{name}, built for CUDA {torch.version.cuda}, can use none ({reason}); check nvidia-smi, "
        f"and that the job or container was given a GPU; for an older driver {OTHER_BUILD}"
    )


def _require_kernels(index: int) -> None:
    """ValueError where PyTorch was built for other GPUs than this one.

    Code for sm_XY runs on X.Z with Z >= Y; that for compute_XY on all that are newer too.
    """
    if torch.version.cuda is None:  # AMD's
        return
    card, kernels = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(kernels)):
        built = int(major), int(minor)
        if built <= card and (kind == "compute" or built[0] == card[0]):
            return
    if kernels:
        raise ValueError(
            f"GPU {index} ({torch.cuda.get_device_name(index)}) has compute capability "
            f"{card[0]}.{card[1]}, but PyTorch {torch.__version__} was built for "
            f"{' '.join(kernels)}; {OTHER_BUILD}{ON_PURPOSE}"
        )


def _join(device: torch.device, timeout: float) -> None:
    """Meet the other processes, and watch over them from now on."""
    global _heartbeat
    alarm = threading.Timer(CONNECT, _end_unconnected)
    alarm.daemon = True
    alarm.start()
    store, here, processes = next(dist.rendezvous("env://"))
    start = _agree_on_start(store, here, processes)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(start, store),
        rank=here,
        world_size=processes,
        timeout=timedelta(minutes=4 * timeout + 1),  # the heartbeat knows more: it goes first
        device_id=device if device.type == "cuda" else None,
    )
    alarm.cancel()
    if processes > 1:
        _heartbeat = Heartbeat(here, processes, 60 * timeout, start)


def _agree_on_start(store: dist.Store, rank: int, processes: int) -> str:
    """A name of this start that no earlier one had, the same on all ranks.

    torchrun keeps one store for all its restarts, and in it the addresses of processes that are
    dead; its count of restarts differs between nodes. So rank 0 invents a name, and answers each
    rank that asks by it; one that has read the name of an earlier start gets no answer.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("fibldm_start", me)
        for other in range(1, processes):
            asking = store.get(f"{me}/{other}").decode()
            store.set(f"{me}/{asking}", "here")
        return me
    while True:
        start = store.get("fibldm_start").decode()
        store.set(f"{start}/{rank}", me)
        if store.check([f"{start}/{me}"]):
            return start
        time.sleep(0.05)


def _end_unconnected() -> None:
    """End a process that would wait for hours for others that may never come."""
    here, address = os.environ["RANK"], f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    sys.stderr.write(
        f"error (rank {here}): no connection to the other processes in {CONNECT} s (they meet at "
        f"{address}); start again, or check that all were started, the firewall, and "
        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME\n"
    )
    sys.stderr.flush()
    os._exit(1)


def leave(code: int) -> None:
    """End this process with an exit code; where it is 0, when all ranks have come to here.

    At once: while the interpreter closes down, gloo's threads can abort it, and it would wait for
    ever for decoding processes, which ignore the signal that is to end them.
    """
    if code == 0 and dist.is_initialized():
        barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def say(*lines: str) -> None:
    """Print lines, once for all ranks, beside a progress bar."""
    for line in lines if is_main() else ():
        tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def warn(*warnings: str) -> None:
    """Print what goes wrong, with its remedy, a line each."""
    say(*(f"WARNING: {warning}" for warning in warnings))


def introduce(data: str, model: nn.Module, device: torch.device, precision: str) -> None:
    """Say what is trained, on what, and where."""
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    say(f"{data}; {size:.1f} M parameters; {device}, {precision}, {world_size()} process(es)")


def mark() -> None:
    """Note that this rank has come as far as the next place where all wait for each other."""
    if _heartbeat is not None:
        _heartbeat.marks += 1


def alive() -> None:
    """Note that this rank is at work, where it does much without waiting for the others."""
    if _heartbeat is not None:
        _heartbeat.work += 1


def barrier() -> None:
    if dist.is_initialized():
        mark()
        dist.barrier()


def mean(value: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, which must have the same shape on each."""
    return sum_over_ranks(value) / world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    if world_size() == 1:
        return value
    value = value.detach().clone()
    mark()
    dist.all_reduce(value)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on at least one rank; all ranks get the same answer."""
    if world_size() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def gather(value: object) -> list:
    """One picklable value of each rank, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    mark()
    dist.all_gather_object(values, value)
    return values


def share(count: int) -> range:
    """This rank's consecutive part of `count` items: the parts differ by at most one."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def wrap(module: nn.Module, device: torch.device, compiled: bool = False) -> nn.Module:
    """The module to call in training: itself, or in DistributedDataParallel under torchrun.

    Keep the unwrapped module too: it holds the state, is saved, and is what inference calls.
    """
    if compiled:
        module.compile()
    if world_size() == 1:
        return module
    mark()
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=ids)


def sync_gradients(module: nn.Module, sync: bool) -> contextlib.AbstractContextManager:
    """Context of a backward pass; gradients are averaged over ranks only where `sync` is true.

    With gradient accumulation, `sync` is true for the last micro-batch of a step.
    """
    mark()  # the forward pass broadcasts buffers
    if sync or not isinstance(module, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()


ROOT = Path(__file__).parents[1]
