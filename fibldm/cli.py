"""Options that stages share, and how a script ends."""

import argparse
import errno
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fibldm import distributed
from fibldm.optim import SCHEDULES

MISTAKE = 2  # exit code of a user's mistake, or a limit of the machine
STOPPED = 75  # exit code of a run that stopped early with all saved: the same command goes on
GIB = 2**30
PASSING = {  # errors of a file system that may be well the next time
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENOTCONN, errno.EHOSTDOWN),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and keeps the example at the end as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose --help shows defaults and ends with an example."""
    return argparse.ArgumentParser(
        description=description, epilog=f"example:\n{example}", formatter_class=HelpFormatter
    )


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; expected at least 1")
    return value


def count(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value}; expected at least 0")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value}; expected a number above 0")
    return value


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value}; expected 0 to 1")
    return value


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


def add_machine_options(parser: argparse.ArgumentParser, workers: bool = True) -> None:
    """Options of every stage that say where and how it computes."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="of the networks; auto: bf16 where the GPU has it, else fp16; fp32 on a CPU",
    )
    if workers:
        group.add_argument(
            "--num_workers", type=count, default=2, help="processes that decode images"
        )
    group.add_argument(
        "--timeout", type=positive_float, default=30.0,
        help="minutes without progress after which several processes end, and name who hangs",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of weights, data order and noise")


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """Options of the stages that encode slices: see fibldm.datasets.Views."""
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--views", type=positive, default=8,
        help="encodings of a training slice: the first as it is, the others moved and scaled",
    )  # fmt: skip
    group.add_argument(
        "--max_shift", type=fraction, default=0.0625,
        help="how far a view moves, each way, by whole pixels: a share of the side",
    )  # fmt: skip
    group.add_argument(
        "--max_scale", type=fraction, default=0.05, help="how much larger or smaller a view is"
    )


def add_training_options(parser: argparse.ArgumentParser, **defaults: float) -> None:
    """Options of every training script; `defaults` are the script's own."""
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive, help="optimizer steps in all")
    group.add_argument(
        "--batch_size", type=positive, help="slices a step, over all processes together"
    )
    group.add_argument(
        "--grad_accum", type=positive, default=1, help="parts a process cuts its share into"
    )
    group.add_argument("--lr", type=positive_float, help="learning rate")
    group.add_argument("--warmup_steps", type=count, help="steps until --lr is reached")
    group.add_argument(
        "--lr_schedule", choices=SCHEDULES, default="constant",
        help="of the learning rate after the warm-up; cosine: falls to 0 at --steps, which is then "
        "fixed; cooldown: constant, then falls to 0 over the last fifth of --steps",
    )  # fmt: skip
    group.add_argument(
        "--grad_clip", type=positive_float, default=1.0, help="largest gradient norm"
    )
    group.add_argument("--ema_decay", type=fraction, help="of the averaged weights")
    group.add_argument("--compile", action="store_true", help="torch.compile the networks")
    group.add_argument("--log_interval", type=positive, default=50, help="steps between log lines")
    group.add_argument("--save_interval", type=positive, help="steps between writes of last.pth")
    group.add_argument("--val_interval", type=positive, help="steps between validations")
    group.add_argument(
        "--patience", type=count, default=0,
        help="validations in a row without a new best after which training ends; 0: never",
    )  # fmt: skip
    group.add_argument(
        "--keep_last", type=positive, default=1,
        help="checkpoints of the whole state: last.pth, and the ones before it as step_*.pth",
    )  # fmt: skip
    group.add_argument(
        "--max_bad_steps", type=positive, default=10,
        help="steps in a row whose loss or gradient is not finite, after which the run ends; fewer "
        "are skipped",
    )  # fmt: skip
    group.add_argument(
        "--time_limit", type=duration, metavar="TIME",
        help="save and stop after it, with exit code 75: minutes, H:MM:SS or D-HH:MM:SS",
    )  # fmt: skip
    group.add_argument(
        "--no_preflight", action="store_true",
        help="begin without a trial of one step, one validation and one save at full size",
    )  # fmt: skip
    parser.set_defaults(**defaults)


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
    args, code = argparse.Namespace(), 0
    try:
        args = parse_args()
        main(args)
    except SystemExit as stop:  # after a signal, or by argparse
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        again = stop.code == STOPPED and restarts and "FIBLDM_LAUNCHER" not in os.environ
        code = 0 if again else stop.code or 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        memory = out_of_memory(error, args)
        program = memory is None and isinstance(error, RuntimeError)
        if program or os.environ.get("FIBLDM_TRACEBACK") == "1":
            raise
        who = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free space, and run the same command again" if full else ""
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error{who}: {memory or error}{remedy}\n")
        code = 1 if number in PASSING else MISTAKE
    distributed.leave(code)


def out_of_memory(error: Exception, args: argparse.Namespace) -> str | None:
    """What to lower, with numbers, where an error is of memory; None where it is another."""
    first = str(error).split("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        free, total = (n / GIB for n in torch.cuda.mem_get_info())
        peak = torch.cuda.max_memory_allocated() / GIB
        what = f"out of GPU memory: {total:.1f} GiB, of which this process used up to {peak:.1f} "
        what += f"and {free:.1f} are free. {first}"
    elif isinstance(error, MemoryError) or "can't allocate memory" in first:
        what = f"out of memory: {first}"
    else:
        return None
    size, parts = getattr(args, "batch_size", None), getattr(args, "grad_accum", None)
    if size is None:
        return what
    if parts is None:
        return f"{what}\nLower --batch_size ({size} slices at once)"
    at_once = size // distributed.world_size() // parts
    if at_once > 1:
        return (
            f"{what}\nRaise --grad_accum from {parts} to {2 * parts}: {at_once // 2} slices at "
            f"once instead of {at_once}, the same result; or lower --batch_size ({size}, over "
            f"{distributed.world_size()} processes)"
        )
    return f"{what}\nOnly one slice is computed at once: lower the widths of the network"
