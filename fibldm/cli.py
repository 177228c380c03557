"""Options that stages share, and how a script ends."""

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fibldm import distributed
from fibldm.balance import UNLABELED, parse_shares, parse_weights
from fibldm.config import Parser
from fibldm.distributed import ON_PURPOSE, OTHER_BUILD
from fibldm.optim import SCHEDULES

MISTAKE = 2  # exit code of a user's mistake, or a limit of the machine
STOPPED = 75  # exit code of a run that stopped early with all saved: the same command goes on
GIB = 2**30
# What PyTorch, cuBLAS, cuDNN and NCCL say, in small letters. cuDNN's internal errors are mostly of
# memory too.
NO_GPU_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")
NO_GPU_MEMORY += ("cudnn_status_internal_error",)
BUSY = ("busy or unavailable",)
WRONG_BUILD = ("no kernel image is available", "driver version is insufficient")
WRONG_BUILD += ("driver on your system is too old", "forward compatibility was attempted")
PASSING = {  # errors of a file system that may be well the next time
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENOTCONN, errno.EHOSTDOWN),
}


# Types of options.


def number(kind: type, right: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """An argparse type: int or float, if it is right; `expected` says in words what is."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not right(value):
            raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}")
        return value

    return convert


positive = number(int, lambda n: n >= 1, "a whole number of at least 1")
count = number(int, lambda n: n >= 0, "a whole number of at least 0")
integer = number(int, lambda n: -(2**63) <= n < 2**63, "a whole number of at most 64 bits")
positive_float = number(float, lambda x: 0 < x < math.inf, "a number above 0")
not_negative = number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
finite = number(float, math.isfinite, "a number")
fraction = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def worker_count(text: str) -> int:
    """An argparse type: a number of processes; "auto": the cores that this process may use.

    Processes that torchrun started on the same machine share them.
    """
    if text != "auto":
        return number(int, lambda n: n >= 0, "auto, or a whole number of at least 0")(text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def duration(text: str) -> float:
    """An argparse type: seconds of Slurm's M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = text.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        days = int(days) if dash else 0
    except ValueError:
        parts = []
    scales = {1: (3600,), 2: (3600, 60), 3: (3600, 60, 1)} if dash else {
        1: (60,), 2: (60, 1), 3: (3600, 60, 1),
    }  # fmt: skip
    seconds = sum(n * s for n, s in zip(parts, scales.get(len(parts), ()), strict=False))
    if len(parts) not in scales or min(parts) < 0 or days < 0 or days * 86400 + seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected minutes, H:MM:SS or D-HH:MM:SS")
    return days * 86400.0 + seconds


class Window(argparse.Action):
    """Two HU, the lower first."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        low, high = values
        if low >= high:
            raise argparse.ArgumentError(self, f"{low:g} {high:g}: expected LOW below HIGH")
        setattr(namespace, self.dest, [low, high])


class Shares(argparse.Action):
    """NAME=WEIGHT of classes, in one order and spelling; or nothing, an empty list."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            parse_shares(values)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, sorted(f"{n}={w}" for n, w in parse_weights(values).items()))


# Options that several stages have.


def make_parser(description: str, example: str) -> Parser:
    """A parser whose --help shows defaults and ends with an example."""
    return Parser(description=description, epilog=f"example:\n{example}")


def add_window_option(group: Any, default: tuple[float, float] | None, help: str) -> None:
    """--window LOW HIGH, in HU."""
    group.add_argument(
        "--window", type=finite, nargs=2, action=Window, metavar=("LOW", "HIGH"), help=help,
        default=None if default is None else list(default),
    )  # fmt: skip


def add_run_option(group: Any, default: str) -> None:
    group.add_argument(
        "--save_dir", default=default,
        help="folder of this run; the same command again resumes the run in it",
    )  # fmt: skip


def add_latent_shape_options(group: Any) -> None:
    """Options of the two stages that train on latents, which have a shape already."""
    group.add_argument(
        "--latent_dim", type=positive, help="channels of the latents: checked against the data"
    )
    group.add_argument(
        "--latent_size", type=positive,
        help="height and width of the latents: checked against the data",
    )  # fmt: skip


def add_workers_option(group: Any) -> None:
    group.add_argument(
        "--num_workers", type=worker_count, default="auto",
        help="processes that read files; 0: none beside this one; auto: one a core",
    )  # fmt: skip


def add_machine_options(parser: Parser, workers: bool = True, seed: bool = True) -> None:
    """Options of every stage that say where and how it computes."""
    parser.add_argument(
        "--config", metavar="FILE",
        help="take options from a JSON or YAML file, such as the args.json of a run; options on "
        "the command line win, those of a launcher too",
    )  # fmt: skip
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="of the networks' arithmetic; auto: bf16 on GPUs that have it, fp16 on others, fp32 "
        "on a CPU",
    )  # fmt: skip
    if workers:
        add_workers_option(group)
    if seed:
        group.add_argument("--seed", type=integer, default=0, help="of all random numbers")
    parser.rare.add_argument(
        "--timeout", type=positive_float, default=30.0,
        help="minutes without progress after which a stage of several processes ends, and names "
        "the process that hangs",
    )  # fmt: skip


def add_view_options(parser: Parser) -> None:
    """Options of the stages that encode slices: see fibldm.datasets.Views."""
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--views", type=positive, default=8,
        help="encodings of each training slice: the first as it is, the others moved and scaled",
    )  # fmt: skip
    group.add_argument(
        "--max_shift", type=fraction, default=0.0625,
        help="how far a view is moved at most, in each direction: a share of the side",
    )  # fmt: skip
    group.add_argument(
        "--max_scale", type=fraction, default=0.05,
        help="how much larger or smaller a view is at most: a share of its size",
    )  # fmt: skip


def add_diffusion_options(parser: Parser, steps: int, batch_size: int, lr: float) -> None:
    """Options of the two stages that learn to denoise, and sample while they do."""
    parser.rare.add_argument(
        "--label_dropout", type=fraction, default=0.1,
        help="share of slices whose class label is withheld in training; guidance needs some",
    )  # fmt: skip
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--val_samples", type=positive, default=64, help="held-out contours to sample for"
    )
    parser.rare.add_argument(
        "--val_sampling_steps", type=positive, default=20, help="DPM-Solver++ steps of a sample"
    )
    parser.rare.add_argument(
        "--max_copies", type=fraction, default=0.02,
        help="share of validation samples that may be copies of training slices, that is, nearer "
        "to one than held-out slices are; a snapshot with more becomes the best only while none "
        "has fewer",
    )  # fmt: skip
    add_training_options(
        parser, steps=steps, batch_size=batch_size, lr=lr, warmup_steps=500, ema_decay=0.999,
        save_interval=500, val_interval=2500,
    )  # fmt: skip


def add_training_options(parser: Parser, **defaults: float) -> None:
    """Options of every training script; `defaults` are the script's own."""
    group, rare = parser.add_argument_group("training"), parser.rare
    group.add_argument("--steps", type=positive, help="optimizer steps in all")
    group.add_argument(
        "--batch_size", type=positive, help="slices of a step, over all processes together"
    )
    group.add_argument(
        "--grad_accum", type=positive, default=1,
        help="parts that each process cuts its slices of a step into: more need less memory",
    )  # fmt: skip
    group.add_argument("--lr", type=positive_float, help="learning rate")
    group.add_argument(
        "--lr_schedule", choices=SCHEDULES, default="constant",
        help="of the learning rate after the warm-up; cosine: falls to 0 at --steps, which is then "
        "fixed; cooldown: constant, then falls to 0 over the last fifth of --steps",
    )  # fmt: skip
    group.add_argument(
        "--warmup_steps", type=count, help="steps in which the learning rate rises to --lr"
    )
    group.add_argument(
        "--balance_labels", nargs="*", action=Shares, metavar="NAME=WEIGHT",
        help="draw all classes of column label equally often, or by these weights, one for each "
        "class, which sum to 1: fibrosis=0.5 normal=0.5; slices without a label are a class of "
        f"their own, {UNLABELED} (default: each slice equally often)",
    )  # fmt: skip
    group.add_argument("--val_interval", type=positive, help="steps between validations")
    group.add_argument(
        "--patience", type=count, default=0,
        help="validations in a row without a new best after which training ends; 0: never",
    )  # fmt: skip
    group.add_argument(
        "--time_limit", type=duration, metavar="TIME",
        help="save and stop after it, with exit code 75: minutes, H:MM:SS or D-HH:MM:SS",
    )  # fmt: skip
    group.add_argument(
        "--dry_run", action="store_true",
        help="try one step, one validation and one save at full size, undo them, and end",
    )  # fmt: skip
    group.add_argument(
        "--wandb", nargs="?", const="fibldm", metavar="PROJECT",
        help="send the numbers of the log to this project of Weights & Biases (without a name: "
        "fibldm), and no pictures; needs `pip install wandb`; with WANDB_MODE=offline in the "
        "environment all stays in --save_dir",
    )  # fmt: skip
    rare.add_argument("--ema_decay", type=fraction, help="of the averaged weights")
    rare.add_argument(
        "--grad_clip", type=positive_float, default=1.0,
        help="norm to which larger gradients are scaled down",
    )  # fmt: skip
    rare.add_argument("--compile", action="store_true", help="torch.compile the networks")
    rare.add_argument("--log_interval", type=positive, default=50, help="steps between log lines")
    rare.add_argument("--save_interval", type=positive, help="steps between writes of last.pth")
    rare.add_argument(
        "--keep_last", type=positive, default=1,
        help="checkpoints of the whole training to keep: last.pth, and those before it as "
        "step_*.pth",
    )  # fmt: skip
    rare.add_argument(
        "--max_bad_steps", type=positive, default=10,
        help="steps in a row whose loss or gradient is not finite after which training ends; "
        "fewer are skipped",
    )  # fmt: skip
    rare.add_argument(
        "--no_preflight", action="store_true",
        help="begin without a trial of one step, one validation and one save",
    )  # fmt: skip
    parser.set_defaults(**defaults)


# How a script ends.


def run_script(main, parse_args) -> None:
    """Run a script; a user's mistake or a machine's limit ends it with one message and code 2.

    With FIBLDM_TRACEBACK=1 in the environment the traceback is shown too, as it always is of an
    error of the program, which ends with code 1, as does what may go well another time. A run that
    stopped early ends with code 75, but for workers that torchrun alone, without
    scripts/launch.py, would then start again: they end with 0.
    """

    def end_at_once(*error: Any) -> None:
        sys.__excepthook__(*error)
        distributed.leave(1)

    sys.excepthook = end_at_once
    for stream in sys.stdout, sys.stderr:  # a terminal's encoding may lack letters of names
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args, code = argparse.Namespace(), 0
    try:
        args = parse_args()
        main(args)
    except SystemExit as stop:  # after a signal, or by argparse
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        again = stop.code == STOPPED and restarts and "FIBLDM_LAUNCHER" not in os.environ
        code = 0 if again else stop.code or 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sizes = (getattr(args, name, None) for name in ("batch_size", "grad_accum"))
        limit = out_of_memory(error, *sizes) or unusable_gpu(error)
        program = limit is None and isinstance(error, RuntimeError)
        if program or os.environ.get("FIBLDM_TRACEBACK") == "1":
            raise
        who = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free space, and run the same command again" if full else ""
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error{who}: {limit or error}{remedy}\n")
        code = 1 if number in PASSING or _line_with(error, BUSY) else MISTAKE
    distributed.leave(code)


def out_of_memory(
    error: Exception, batch_size: int | None = None, grad_accum: int | None = None
) -> str | None:
    """What to lower, with numbers, where an error is of memory; None where it is another."""
    first = str(error).split("\n")[0]
    if isinstance(error, MemoryError) or "can't allocate memory" in first:
        what = f"out of memory: {first}"
    elif isinstance(error, RuntimeError) and (line := _line_with(error, NO_GPU_MEMORY)):
        what = f"out of GPU memory{_gpu_memory()}. {line}"
    else:
        return None
    if batch_size is None:
        return what
    processes = distributed.world_size()
    if grad_accum is None:
        return (
            f"{what}\nLower --batch_size ({batch_size} slices at once, over {processes} processes)"
        )
    at_once = batch_size // processes // grad_accum
    if at_once > 1:
        return (
            f"{what}\nRaise --grad_accum from {grad_accum} to {2 * grad_accum}: {at_once // 2} "
            f"slices at once instead of {at_once}, the same result; or lower --batch_size "
            f"({batch_size}, over {processes} processes)"
        )
    return f"{what}\nOnly one slice is computed at once: lower the widths of the network"


def unusable_gpu(error: Exception) -> str | None:
    """What to do where an error is of a GPU in use, or one that PyTorch is not built for."""
    if not isinstance(error, RuntimeError):
        return None
    if line := _line_with(error, BUSY):
        return (
            f"the GPU is busy, or was not given to this job: {line}. See nvidia-smi for who uses "
            "it; wait, or choose another one by CUDA_VISIBLE_DEVICES, and run the same command "
            "again"
        )
    if line := _line_with(error, WRONG_BUILD):
        return f"PyTorch {torch.__version__} cannot use this GPU: {line}; {OTHER_BUILD}{ON_PURPOSE}"
    return None


def _line_with(error: Exception, words: tuple[str, ...]) -> str | None:
    """The line of an error of CUDA's libraries that has one of these words."""
    lines = str(error).splitlines() if isinstance(error, RuntimeError) else []
    return next((n.strip() for n in lines if any(w in n.lower() for w in words)), None)


def _gpu_memory() -> str:
    """How much a GPU has and how much is used, where it still answers."""
    try:
        free, total = (n / GIB for n in torch.cuda.mem_get_info())
        peak = torch.cuda.max_memory_allocated() / GIB
    except (RuntimeError, AssertionError):
        return ""
    return f": {total:.1f} GiB, of which this process used up to {peak:.1f} and {free:.1f} are free"
