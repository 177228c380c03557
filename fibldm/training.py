"""What all training scripts share: options, precision, seeding, batches in order, the run's log."""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fibldm import distributed
from fibldm.checkpoint import Stateful, load_training, save_training

# Options that may differ when a run is resumed: they change how, not what, is computed; inputs
# may move, since what they hold is compared with the run's lineage.
FREE_OPTIONS = {
    *("steps", "device", "compile", "grad_accum", "num_workers"),
    *("log_interval", "save_interval", "patience", "csv_file", "csv_path", "img_dir", "data_path"),
    *("latent_data_dir", "vae_checkpoint", "unet_checkpoint", "init_checkpoint", "save_dir"),
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
            "--num_workers", type=int, default=2, help="processes that decode images"
        )
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
    group.add_argument("--warmup_steps", type=int, help="steps until --lr is reached")
    group.add_argument(
        "--grad_clip", type=positive_float, default=1.0, help="largest gradient norm"
    )
    group.add_argument("--ema_decay", type=fraction, help="of the averaged weights")
    group.add_argument("--compile", action="store_true", help="torch.compile the networks")
    group.add_argument("--log_interval", type=positive, default=50, help="steps between log lines")
    group.add_argument("--save_interval", type=positive, help="steps between writes of last.pth")
    group.add_argument("--val_interval", type=positive, help="steps between validations")
    group.add_argument(
        "--patience", type=int, default=0,
        help="validations in a row without a new best after which training ends; 0: never",
    )  # fmt: skip
    parser.set_defaults(**defaults)


class Precision:
    """Automatic mixed precision: a context for the networks, and a GradScaler (fp16 alone)."""

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto" and device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        self.name = "fp32" if name == "auto" else name
        torch.backends.cudnn.allow_tf32 = self.name != "fp32"
        self.device = device
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def item_generator(seed: int, stream: str, step: int, item: int) -> np.random.Generator:
    """Random numbers that depend on these four alone: on no batch, rank or earlier draw.

    Counter-based (Philox; Salmon et al. 2011), so that any item's numbers can be drawn directly.
    """
    key = [seed % 2**64, int.from_bytes(stream.encode()[:8], "big")]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, step, item]))


def item_noise(
    seed: int, stream: str, step: int, items: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """Standard normal noise (len(items), *shape), fp32, each item's its own."""
    draws = [
        item_generator(seed, stream, step, i).standard_normal(tuple(shape), np.float32)
        for i in items
    ]
    return torch.from_numpy(np.stack(draws))


def item_uniform(seed: int, stream: str, step: int, items: Sequence[int], count: int) -> Tensor:
    """Uniform numbers in [0, 1), (len(items), count), fp32, each item's its own."""
    draws = [item_generator(seed, stream, step, i).random(count, np.float32) for i in items]
    return torch.from_numpy(np.stack(draws))


def seed_dropout(seed: int, step: int, items: Sequence[int]) -> None:
    """Let dropout's masks follow from these: a resumed run drops as one that was not interrupted.

    They belong to a whole part: another number of processes, or of parts, has other masks.
    """
    torch.manual_seed(int(item_generator(seed, "dropout", step, items[0]).integers(2**63)))


def part_size(args: argparse.Namespace) -> int:
    """Slices that a process takes at once; ValueError where --batch_size does not divide so."""
    parts = distributed.world_size() * args.grad_accum
    if args.batch_size % parts:
        raise ValueError(
            f"--batch_size {args.batch_size} is over all processes: expected a multiple of "
            f"{distributed.world_size()} processes x --grad_accum {args.grad_accum}"
        )
    return args.batch_size // parts


class Batches:
    """This rank's parts of the global batches of steps start + 1 to steps, in order.

    The data are shuffled in each epoch by (seed, epoch). Position p of step s's batch of B slices
    is item (s - 1) * B + p of the stream of epochs, whatever the number of processes.
    Iterating gives lists of rows, `grad_accum` of them a step: the order a DataLoader takes;
    `parts` gives their step and their positions too.
    """

    def __init__(self, rows: Sequence[int], args: argparse.Namespace, start: int) -> None:
        self.rows, self.args, self.start = np.asarray(rows), args, start
        self.size = part_size(args)
        self.first = distributed.rank() * self.size * args.grad_accum
        self._epoch, self._order = -1, self.rows

    def row(self, item: int) -> int:
        """The row at a place in the endless stream of shuffled epochs."""
        epoch, place = divmod(item, len(self.rows))
        if epoch != self._epoch:
            order = item_generator(self.args.seed, "order", epoch, 0).permutation(len(self.rows))
            self._epoch, self._order = epoch, self.rows[order]
        return int(self._order[place])

    def positions(self, part: int) -> range:
        """Positions in the global batch of one of this rank's parts (0 to grad_accum - 1)."""
        return range(self.first + part * self.size, self.first + (part + 1) * self.size)

    def parts(self) -> Iterator[tuple[int, range, list[int]]]:
        """Step, positions and rows of each part."""
        for step in range(self.start + 1, self.args.steps + 1):
            for part in range(self.args.grad_accum):
                offset, positions = (step - 1) * self.args.batch_size, self.positions(part)
                yield step, positions, [self.row(offset + p) for p in positions]

    def __iter__(self) -> Iterator[list[int]]:
        return (rows for _, _, rows in self.parts())

    def __len__(self) -> int:
        return (self.args.steps - self.start) * self.args.grad_accum


class Run:
    """A run's folder and its progress: args.json, metrics.jsonl, tensorboard/, last.pth.

    SIGINT and SIGTERM are noted, and after the step under way the run is saved and left. While
    all is on disk, as in a validation, they end the process at once; a second one always does.
    Raises ValueError where the folder holds a run with other settings.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device, self.folder = args, device, Path(args.save_dir)
        self.last, self.log_file = self.folder / "last.pth", self.folder / "metrics.jsonl"
        self.writer: SummaryWriter | None = None
        self.bar: tqdm | None = None
        self.signal, self.saved = 0, True  # nothing is lost before the first step
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.started = self.left = time.monotonic()

        part_size(args)

        # The settings must be those of the run that is here, if one has come to a checkpoint.
        file = self.folder / "args.json"
        self.settings = json.loads(json.dumps(vars(args)))
        trained = any(self.folder.glob("*.pth"))
        if file.is_file() and trained:
            try:
                before = json.loads(file.read_text())
            except ValueError as error:
                raise ValueError(f"{file}: damaged: {error}; use another --save_dir") from error
            names = sorted((before.keys() | self.settings.keys()) - FREE_OPTIONS)
            changed = [
                f"--{name} was {before.get(name)}, is {self.settings.get(name)}"
                for name in names
                if before.get(name) != self.settings.get(name)
            ]
            if changed:
                raise ValueError(
                    f"{self.folder} holds a run with other settings: {'; '.join(changed)}. "
                    "Give the same to resume it, or another --save_dir"
                )
        elif trained:
            raise ValueError(
                f"{self.folder} holds checkpoints but no args.json; use another folder"
            )
        distributed.barrier()  # no rank writes before all have looked

    def resume(self, kind: str, parts: dict[str, Stateful], lineage: dict[str, str]) -> dict:
        """Restore `parts` from last.pth, if it is there, and open the folder for writing.

        Returns the run's progress: the last step taken, the best validation loss, whether its
        snapshot copies, how many validations were worse since, the last step that was validated,
        and the first at which samples followed their contours (0: not yet).
        """
        self.kind, self.parts, self.lineage = kind, parts, lineage
        self.progress = {"step": 0, "best": float("inf"), "copies": True, "worse": 0}
        self.progress |= {"validated": 0, "followed": 0}
        if self.last.is_file():
            content = load_training(self.last, kind, parts, lineage)
            self.progress = {name: content[name] for name in self.progress}
        elif any(self.folder.glob("*_best.pth")):
            raise ValueError(
                f"{self.last}: no such file, but {self.folder} holds a trained run; put it back, "
                "or use another --save_dir"
            )
        found = distributed.gather(self.progress["step"])
        if len(set(found)) > 1:
            raise ValueError(
                f"{self.last}: the processes found it at steps {found}, expected the same; "
                "--save_dir must be on a file system that all nodes share"
            )
        step = self.progress["step"]
        if step > self.args.steps:
            raise ValueError(f"{self.last} is at step {step}, beyond --steps {self.args.steps}")

        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, self._on_signal)
        if distributed.is_main():
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            replace_text(self.folder / "args.json", json.dumps(self.settings, indent=2) + "\n")
            rows = self.log_file.read_text().splitlines() if self.log_file.is_file() else []
            kept = [row for row in rows if _step_of(row, self.progress["validated"]) <= step]
            replace_text(self.log_file, "".join(f"{row}\n" for row in kept))
            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)
        if step:
            self.say(f"{self.folder}: going on after step {step} of {self.args.steps}")
        return self.progress

    def _on_signal(self, number: int, frame: object) -> None:
        if self.saved or self.signal:
            raise SystemExit(128 + number)
        self.signal = number

    def validation_pending(self) -> bool:
        """Whether the run was left between a step and the validation that is due after it."""
        step = self.progress["step"]
        return self._validation_due(step) and self.progress["validated"] < step

    def _validation_due(self, step: int) -> bool:
        return step > 0 and (step % self.args.val_interval == 0 or step == self.args.steps)

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 1 to --steps, with a progress bar."""
        self.first, self.started = self.progress["step"], time.monotonic()
        steps = range(self.first + 1, self.args.steps + 1)
        quiet = None if distributed.is_main() else True
        with tqdm(
            steps, self.folder.name, self.args.steps, initial=self.first, disable=quiet
        ) as bar:
            for step in bar:
                if 0 < self.args.patience <= self.progress["worse"]:
                    self.say(
                        f"no better validation in {self.progress['worse']} (--patience "
                        f"{self.args.patience}): ended after step {self.progress['step']}"
                    )
                    return
                self.saved = False
                yield step

    def end_step(self, step: int) -> bool:
        """Log and save where that is due; leave after a signal; whether a validation is due.

        All is on disk when a validation begins.
        """
        self.progress["step"] = step
        stop = distributed.any_rank(self.signal != 0, self.device)
        last, validate = step == self.args.steps, self._validation_due(step)
        save = stop or validate or step % self.args.save_interval == 0
        if save or last or step % self.args.log_interval == 0:
            speed = (step - self.first) * self.args.batch_size / (time.monotonic() - self.started)
            self.log(step, {**self._pop_averages(), "images_per_s": speed}, "train")
        if save:
            self.save()
        self.left = time.monotonic()
        if stop or (self.signal and self.saved):
            self.say(f"stopped after step {step}, all saved; the same command goes on from here")
            self.close()
            raise SystemExit(128 + (self.signal or signal.SIGTERM))
        return validate

    def is_best(self, loss: float, copies: bool = False) -> bool:
        """Whether a validation loss is the lowest so far; remembers it.

        A snapshot whose samples are copies of patients is never better than one that has none.
        """
        best = np.isfinite(loss) and (copies, loss) < (
            self.progress["copies"],
            self.progress["best"],
        )
        if best:
            self.progress |= {"best": loss, "copies": copies, "worse": 0}
        else:
            self.progress["worse"] += 1
        return best

    def end_validation(self, step: int) -> None:
        """Note that the validation after this step is done."""
        self.progress["validated"] = step
        self.save()
        self.started += time.monotonic() - self.left  # images_per_s is of training alone

    def save(self) -> None:
        """Write last.pth."""
        if distributed.is_main():
            save_training(self.last, self.kind, self.parts, self.lineage, **self.progress)
        self.saved = True

    def average(self, **values: Tensor) -> None:
        """Take in scalars for the next log line's means, without waiting for the device."""
        for name, value in values.items():
            value = value.detach().float()
            self.totals[name] = self.totals.get(name, torch.zeros_like(value)) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def _pop_averages(self) -> dict[str, float]:
        means = {n: float(distributed.mean(v)) / self.counts[n] for n, v in self.totals.items()}
        self.totals, self.counts = {}, {}
        scaler = self.parts.get("scaler")  # fp16's keeps such gradients from the weights
        may_skip = scaler is not None and scaler.is_enabled()
        wrong = [
            name
            for name, value in means.items()
            if not np.isfinite(value) and not (may_skip and name == "grad_norm")
        ]
        if wrong:
            raise ValueError(
                f"training diverged: {', '.join(wrong)} not finite at a log line; nothing was "
                "saved since. Lower --lr, or use --precision fp32 or bf16, in another --save_dir"
            )
        return means

    def log(self, step: int, values: dict[str, float], prefix: str) -> None:
        """One row of metrics.jsonl, TensorBoard scalars, one line on the terminal."""
        if self.writer is None:
            return
        row = {"step": step, **{f"{prefix}/{name}": float(v) for name, v in values.items()}}
        with open(self.log_file, "a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(f"{prefix}/{name}", float(value), step)
        shown = {name: value for name, value in values.items() if not name.startswith("loss_t")}
        line = "  ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
        self.say(f"step {step}/{self.args.steps}  {prefix}: {line}")

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a PNG that was written to samples/ in TensorBoard too."""
        if self.writer is not None:
            self.writer.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")

    def say(self, text: str) -> None:
        """Print a line, once for all ranks, beside the progress bar."""
        if distributed.is_main():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, warnings: Sequence[str]) -> None:
        """Print what goes wrong, with its remedy, a line each."""
        for warning in warnings:
            self.say(f"WARNING: {warning}")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _step_of(row: str, validated: int) -> float:
    """The step of a log row; inf if a kill tore it, or came before its validation was noted."""
    try:
        values = json.loads(row)
        undone = values["step"] > validated and any(name.startswith("val/") for name in values)
        return float("inf") if undone else values["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up to --lr, then constant: a run can go on without changing its past."""
    return args.lr * min(1.0, step / max(1, args.warmup_steps))


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
    args: argparse.Namespace,
) -> Tensor:
    """Clip, step at this step's learning rate, clear; return the norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    scaler.unscale_(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, args.grad_clip)
    scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    return norm


def run_script(main, parse_args) -> None:
    """Run a script; a user's mistake (ValueError) ends it with one message and exit code 2.

    With FIBLDM_TRACEBACK=1 in the environment the traceback is shown too.
    """
    args, code = parse_args(), 0
    try:
        main(args)
    except SystemExit as stop:  # after a signal
        code = stop.code
    except ValueError as error:
        if os.environ.get("FIBLDM_TRACEBACK") == "1":
            raise
        who = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error{who}: {error}\n")
        code = 2
    distributed.leave(code)
