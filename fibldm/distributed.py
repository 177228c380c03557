"""One process or many: the same calls with and without torchrun (NCCL on GPUs, gloo on CPUs)."""

import contextlib
import os
import sys
import threading
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fibldm.heartbeat import Heartbeat

CONNECT = 120  # seconds that processes have to find each other
_heartbeat: Heartbeat | None = None


def setup(device: str = "auto", timeout: float = 30.0) -> torch.device:
    """Join the process group that torchrun announces, if any; return this rank's device.

    `device` is "auto" (a GPU where there is one), "cpu", "cuda", or "cuda:N" without torchrun.
    Where a process of several makes no progress for `timeout` minutes, it is named and all end.
    Raises ValueError when a GPU is asked for and absent.
    """
    global _heartbeat
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic cuBLAS
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if available else "cpu"
    number = device.removeprefix("cuda:")
    if device == "cuda" or number.isdecimal():
        if number.isdecimal() and "RANK" in os.environ:
            raise ValueError(
                f"--device {device}: under torchrun each process takes its own GPU; use cuda"
            )
        index = int(number) if number.isdecimal() else local_rank
        if index >= available:
            raise ValueError(
                f"--device {device}: GPU {index} is asked for, {available} are visible to PyTorch; "
                "use --device cpu, start fewer processes, or check nvidia-smi and the driver"
            )
        torch.cuda.set_device(index)
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        device = f"cuda:{index}"
    elif device != "cpu":
        raise ValueError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if "RANK" in os.environ and not dist.is_initialized():
        gpu = device.startswith("cuda")
        alarm = threading.Timer(CONNECT, _end_unconnected)
        alarm.daemon = True
        alarm.start()
        store, here, processes = next(dist.rendezvous("env://"))
        start = _agree_on_start(store, here, processes)
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore(start, store),
            rank=here,
            world_size=processes,
            timeout=timedelta(minutes=4 * timeout + 1),  # the heartbeat knows more: it goes first
            device_id=torch.device(device) if gpu else None,
        )
        alarm.cancel()
        if world_size() > 1:
            _heartbeat = Heartbeat(rank(), world_size(), 60 * timeout, start)
    return torch.device(device)


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


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """The module to call in training: itself, or in DistributedDataParallel under torchrun.

    Keep the unwrapped module too: it holds the state, is saved, and is what inference calls.
    """
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
