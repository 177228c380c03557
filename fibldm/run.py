"""A training's folder: its settings, progress and checkpoints; when to skip, stop and end."""

import argparse
import contextlib
import fcntl
import io
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fibldm import distributed, limits
from fibldm.batches import Batches, part_size
from fibldm.checkpoint import Stateful, environment, load_training, save_model, save_training
from fibldm.cli import STOPPED
from fibldm.config import modernized
from fibldm.disk import TEMPORARY, keep, replace_text
from fibldm.journal import Journal

# Options that may differ when a run is resumed: they change how, not what, is computed; inputs
# may move, since what they hold is compared with the run's lineage.
FREE_OPTIONS = {
    *("steps", "device", "compile", "grad_accum", "num_workers", "timeout", "time_limit"),
    *("log_interval", "save_interval", "patience", "csv_file", "csv_path", "img_dir", "data_path"),
    *("latent_data_dir", "vae_checkpoint", "unet_checkpoint", "init_checkpoint", "save_dir"),
    *("keep_last", "max_bad_steps", "max_bad_images", "no_preflight", "environment"),
}
FREED = 20.0  # seconds in which the last processes of a killed run end
_HELD: dict[Path, TextIO] = {}  # folders that this process trains in
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Run:
    """A run's folder and its progress: args.json, metrics.jsonl, tensorboard/, last.pth.

    SIGINT, SIGTERM, SIGUSR1 and --time_limit are noted, and after the step under way, at which all
    ranks agree, the run is saved and left with exit code 75. While all is on disk, as in a
    validation, they end the process at once; a second signal always does.
    Raises ValueError where the folder holds a run with other settings.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device, self.folder = args, device, Path(args.save_dir)
        self.last = self.folder / "last.pth"
        self.journal: Journal | None = None  # of the main process
        self.signal, self.saved = 0, True  # nothing is lost before the first step
        self.rehearsing, self.stopping = False, False
        self.pending: dict[str, list[Tensor]] = {}  # of the step under way
        self.totals: dict[str, Tensor] = {}  # of the steps taken since the last log line
        self.counts: dict[str, int] = {}
        self.suspects: set[int] = set()
        self.handlers: dict[int, Any] = {}  # of signals, before this run
        self.started = self.left = time.monotonic()
        self.deadline = self.started + args.time_limit if args.time_limit else float("inf")

        part_size(args)

        # The settings must be those of the run that is here, if one has come to a checkpoint.
        file = self.folder / "args.json"
        self.settings = json.loads(json.dumps(vars(args))) | {"environment": environment()}
        trained = any(self.folder.glob("*.pth"))
        if file.is_file() and trained:
            before = modernized(read_settings(file))
            fixed = {"steps"} if before.get("lr_schedule") != "constant" else set()
            names = sorted((before.keys() | self.settings.keys()) - (FREE_OPTIONS - fixed))
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

    def resume(
        self,
        kind: str,
        parts: dict[str, Stateful],
        lineage: dict[str, str],
        unchecked: Collection[str] = (),
    ) -> dict:
        """Restore `parts` from last.pth, if it is there, and open the folder for writing.

        What `unchecked` names of the lineage is taken as it was, not compared. Returns the run's
        progress: the last step taken; the best validation loss, whether its snapshot copies, how
        many validations were worse since, the last step that was validated, the first at which
        samples followed their contours (0: not yet); steps skipped, in all and in a row; rows
        whose images cannot be read.
        """
        self.kind, self.parts, self.lineage = kind, parts, lineage
        self.progress = {"step": 0, "best": float("inf"), "copies": True, "worse": 0}
        self.progress |= {"validated": 0, "followed": 0, "skipped": 0, "bad_steps": 0}
        self.progress["bad_images"] = []
        if self.last.is_file():
            content = load_training(self.last, kind, parts, lineage, unchecked)
            known = self.progress.keys() & content.keys()  # a run of an older version knew fewer
            self.progress |= {name: content[name] for name in known} | {"step": content["step"]}
            as_it_was = {name: content["lineage"][name] for name in unchecked}
            self.lineage = {**lineage, **as_it_was}
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

        self.handlers = {n: signal.signal(n, self._on_signal) for n in SIGNALS}
        self.saved_step = step
        if distributed.is_main():
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            self._claim()
            for left in self.folder.glob(f"{TEMPORARY}*"):  # by a kill in the middle of a write
                left.unlink()
            replace_text(self.folder / "args.json", json.dumps(self.settings, indent=2) + "\n")
            self.journal = Journal(self.folder, lambda text: self.warn([text]))
            self.journal.open(step, self.progress["validated"])
        if step:
            self.say(f"{self.folder}: going on after step {step} of {self.args.steps}")
        return self.progress

    def _claim(self) -> None:
        """Hold the folder while this process lives; ValueError where another process holds it."""
        folder, until = self.folder.resolve(), time.monotonic() + FREED
        if folder in _HELD:
            return
        file = open(folder / ".lock", "w")  # noqa: SIM115 (the lock goes with it)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _HELD[folder] = file
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ValueError(
                        f"{self.folder}: another process is training in it; wait until it has "
                        "ended, or use another --save_dir"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                text = f"{self.folder}: its file system has no locks ({error.strerror})"
                self.warn([f"{text}: do not start the same run twice at a time"])
                return

    def _on_signal(self, number: int, frame: object) -> None:
        if self.saved:
            raise SystemExit(STOPPED)
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number

    def preflight(self, rehearse: Callable[[int, Path], None]) -> None:
        """Take a step, validate, sample and save at full size, then undo it all: --no_preflight.

        rehearse(step, folder) takes the step and draws into the folder. So what could fail after
        hours fails now: out of memory or disk, shared memory, metrics, a rank that has no data.
        """
        step = self.progress["step"]
        if self.args.no_preflight or step == self.args.steps:
            return
        started, folder = time.monotonic(), self.folder / ".preflight"
        before, progress = io.BytesIO(), json.dumps(self.progress)
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, before)
        self.rehearsing, size = True, 0
        try:
            if distributed.is_main():
                folder.mkdir(exist_ok=True)
            distributed.barrier()
            rehearse(step + 1, folder)
            if distributed.is_main():
                trial = folder / "last.pth"
                save_training(trial, self.kind, self.parts, self.lineage, **self.progress)
                size = trial.stat().st_size
        finally:
            self.rehearsing = False
            if distributed.is_main():
                shutil.rmtree(folder, ignore_errors=True)
        if distributed.is_main():
            self._require_space(size)
        distributed.barrier()
        before.seek(0)
        states = torch.load(before, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(states[name])
        self.progress |= json.loads(progress)
        self.pending, self.totals, self.counts, self.suspects = {}, {}, {}, set()
        memory = ""
        if self.device.type == "cuda":
            peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
            memory = f", {peak / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU"
        self.say(
            f"preflight: a step, a validation and a checkpoint of {size / 2**20:.0f} MiB in "
            f"{time.monotonic() - started:.0f} s{memory}; undone"
        )

    def _require_space(self, size: int) -> None:
        """ValueError where the disk has no room for what the run will keep and one file more."""
        kept = sum(path.stat().st_size for path in self.folder.glob("*.pth"))
        needed = (self.args.keep_last + 2) * size - kept
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ValueError(
                f"{self.folder}: {free / 2**30:.2f} GiB are free, but checkpoints of "
                f"{size / 2**30:.2f} GiB need {needed / 2**30:.2f} GiB more; free space, lower "
                "--keep_last, or use --no_preflight to go on nevertheless"
            )

    def validation_pending(self) -> bool:
        """Whether the run was left between a step and the validation that is due after it."""
        step = self.progress["step"]
        return self._validation_due(step) and self.progress["validated"] < step

    def _validation_due(self, step: int) -> bool:
        return step > 0 and (step % self.args.val_interval == 0 or step == self.args.steps)

    def steps(self, batches: Batches) -> Iterator[int]:
        """The steps that are left, from 1 to --steps, with a progress bar."""
        self.batches = batches
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

    def average(self, **values: Tensor) -> None:
        """Take in scalars for the next log line's means, without waiting for the device.

        Call it before the backward pass, in which ranks wait for each other.
        """
        distributed.mark()
        for name, value in values.items():
            self.pending.setdefault(name, []).append(value.detach().float())

    def suspect(self, rows: Tensor) -> None:
        """Note rows of this rank's batch whose images could not be read; below 0: none."""
        self.suspects |= {row for row in rows.flatten().tolist() if row >= 0}

    def is_sound(self, step: int, grad_norm: Tensor) -> bool:
        """Whether this step may be taken: all ranks' losses and gradients are finite.

        All ranks get the same answer, and agree on whether to stop after it and on rows that can't
        be read. An overflow of fp16 is no error: the scale is lowered. ValueError where
        --max_bad_steps in a row, or more images than --max_bad_images, were bad.
        """
        losses = torch.stack([value for values in self.pending.values() for value in values])
        self.pending["grad_norm"] = [grad_norm.detach().float()]
        stop = self.signal != 0 or time.monotonic() > self.deadline
        finite = torch.isfinite(losses).all(), torch.isfinite(grad_norm)
        noted = torch.tensor([stop, bool(self.suspects)], device=self.device)
        flags = distributed.sum_over_ranks(torch.cat([~torch.stack(finite), noted]).float())
        loss_is_bad, gradient_is_bad, stop, unreadable = (n > 0 for n in flags.tolist())
        self.stopping = stop and not self.rehearsing
        if unreadable:
            rows = {row for rows in distributed.gather(self.suspects) for row in rows}
            self.suspects = set()
            if not self.rehearsing:
                self.leave_out_images(self.batches, rows)
        scaler = self.parts.get("scaler")
        pending, self.pending = self.pending, {}
        if loss_is_bad or gradient_is_bad:
            overflow = not loss_is_bad and scaler is not None and scaler.get_scale() > 1
            self.progress["skipped"] += 1
            self.progress["bad_steps"] += not overflow
            if not overflow and not self.rehearsing:
                self._check_bad_steps(step, pending)
            return False
        self.progress["bad_steps"] = 0
        for name, values in pending.items():
            self.totals[name] = self.totals.get(name, torch.zeros_like(values[0])) + sum(values)
            self.counts[name] = self.counts.get(name, 0) + len(values)
        return True

    def _check_bad_steps(self, step: int, pending: dict[str, list[Tensor]]) -> None:
        """Warn of a skipped step; end the run where there were too many in a row."""
        mine = {name: [float(v) for v in values] for name, values in pending.items()}
        by_rank = distributed.gather(mine)
        bad = [
            name for name in mine if not all(np.isfinite(values[name]).all() for values in by_rank)
        ]
        count, most = self.progress["bad_steps"], self.args.max_bad_steps
        what = f"step {step}: {', '.join(bad)} not finite"
        if count < most:
            self.warn([f"{what}; it is skipped, as {count} in a row (--max_bad_steps {most})"])
            return
        file, scaler = self.folder / "bad_batch.json", self.parts.get("scaler")
        if distributed.is_main():
            content = {
                "step": step,
                "rows": self.batches.rows_of(step),
                "seed": self.args.seed,
                "scaler": {} if scaler is None else scaler.state_dict(),
                "values_by_rank": [
                    {name: list(map(str, values[name])) for name in mine} for values in by_rank
                ],
                "checkpoint_step": self.saved_step,
            }
            replace_text(file, json.dumps(content, indent=2) + "\n")
        distributed.barrier()
        raise ValueError(
            f"training diverged: {what}, and {most} steps in a row were so (--max_bad_steps). "
            f"{self._where_saved()} {file} has the rows of the last batch, seed, values and scaler "
            "state. Lower --lr, or use --precision fp32 or bf16, in another --save_dir"
        )

    def _where_saved(self) -> str:
        if not self.last.is_file():
            return "Nothing was saved yet."
        return f"{self.last} is of step {self.saved_step}, from before."

    def leave_out_images(self, batches: Batches, found: Collection[int]) -> None:
        """Let these rows, whose images cannot be read, be taken no more; the same on all ranks."""
        found = sorted(set(found) - set(self.progress["bad_images"]))
        if not found:
            return
        self.progress["bad_images"] += found
        batches.leave_out(found)
        count, most = len(self.progress["bad_images"]), self.args.max_bad_images
        text = (
            f"rows {found} of the table (from 0) cannot be read any more: {count} in all "
            f"(--max_bad_images {most})"
        )
        if count > most:
            raise ValueError(f"{text}. {self._where_saved()} Repair them; the same command goes on")
        self.warn([f"{text}; other slices take their places"])

    def end_step(self, step: int) -> bool:
        """Log and save where that is due; leave where one must stop; whether to validate.

        All is on disk when a validation begins, but for steps that are skipped: the last
        checkpoint is from before them.
        """
        self.progress["step"] = step
        last, validate = step == self.args.steps, self._validation_due(step)
        save = self.stopping or validate or step % self.args.save_interval == 0
        if save or last or step % self.args.log_interval == 0:
            speed = (step - self.first) * self.args.batch_size / (time.monotonic() - self.started)
            self.log(step, {**self._pop_averages(), "images_per_s": speed}, "train")
        saved = save and self.save(self.stopping or last)
        self.left = time.monotonic()
        if self.stopping or (saved and distributed.any_rank(self.signal != 0, self.device)):
            self._stop(saved)
        return validate

    def _stop(self, saved: bool) -> None:
        """Leave, all ranks after the same step."""
        step = self.progress["step"]
        why = "" if np.isinf(self.deadline) or self.signal else " by --time_limit"
        done = "all saved" if saved else self._where_saved()
        self.say(f"stopped after step {step}{why}, {done}; the same command goes on from there")
        self.close()
        distributed.barrier()  # else torchrun would end those that are still at it
        raise SystemExit(STOPPED)

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

    def save_best(self, name: str, model: nn.Module, **facts: object) -> None:
        """Write the snapshot that `is_best` found; where the disk is full, the next may be it."""
        path = self.folder / name
        if not self._write(path, lambda: save_model(path, model, self.lineage, **facts)):
            self.progress |= {"best": float("inf"), "copies": True}

    def end_validation(self, step: int) -> None:
        """Note that the validation after this step is done."""
        self.progress["validated"] = step
        self.save(step == self.args.steps)
        self.started += time.monotonic() - self.left  # images_per_s is of training alone

    def save(self, at_the_end: bool = False) -> bool:
        """Write last.pth and keep --keep_last of them; whether this step is now on disk.

        While steps are skipped only at the end, so that it stays what was good before them. A full
        disk is no reason to end: the last checkpoint stays, and the next save is tried in its time.
        """
        if self.progress["bad_steps"] and not at_the_end:
            return False

        def write() -> None:
            if self.args.keep_last > 1 and 0 < self.saved_step < self.progress["step"]:
                keep(self.last, self.folder / f"step_{self.saved_step:07d}.pth")
            save_training(self.last, self.kind, self.parts, self.lineage, **self.progress)
            older = sorted(self.folder.glob("step_*.pth"))
            for path in older[: len(older) - self.args.keep_last + 1]:
                path.unlink()

        if not self._write(self.last, write):
            return False
        self.saved, self.saved_step = True, self.progress["step"]
        return True

    @contextlib.contextmanager
    def keep_going(self, path: Path) -> Iterator[None]:
        """Warn where a file can't be written, and go on: a full disk may be emptied.

        In a preflight it is an error.
        """
        try:
            yield
        except OSError as error:
            if self.rehearsing:
                raise
            self.failed = True
            free = shutil.disk_usage(self.folder).free / 2**30
            where = self._where_saved()
            self.warn(
                [
                    f"{path} of step {self.progress['step']} could not be written: "
                    f"{error.strerror}; {free:.2f} GiB are free. Training goes on. {where}"
                ]
            )

    def _write(self, path: Path, write: Callable[[], None]) -> bool:
        """Let the main process write; whether it could, on all ranks when it has."""
        self.failed = False
        if distributed.is_main():
            with self.keep_going(path):
                write()
        failed = distributed.any_rank(self.failed, self.device)
        if failed and self.progress["step"] == self.args.steps:
            raise ValueError(
                f"{path}: the last step is taken but cannot be saved; free space and run the same "
                f"command again. {self._where_saved()}"
            )
        return not failed

    def _pop_averages(self) -> dict[str, float]:
        means = {n: float(distributed.mean(v)) / self.counts[n] for n, v in self.totals.items()}
        self.totals, self.counts = {}, {}
        if self.progress["skipped"]:
            means["skipped_steps"] = self.progress["skipped"]
        return means

    def log(self, step: int, values: dict[str, float], prefix: str) -> None:
        """One row of metrics.jsonl, TensorBoard scalars, one line on the terminal."""
        if self.journal is None or self.rehearsing:
            return
        self.journal.write(
            {"step": step, **{f"{prefix}/{name}": float(v) for name, v in values.items()}}
        )
        shown = {name: value for name, value in values.items() if not name.startswith("loss_t")}
        line = "  ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
        self.say(f"step {step}/{self.args.steps}  {prefix}: {line}")

    def picture(self, step: int, path: Path) -> None:
        """Show a PNG that was written to samples/ in TensorBoard too."""
        if self.journal is not None and path.exists():
            self.journal.picture(step, path)

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
        """Close the log, let go of the folder, and give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.journal is not None:
            self.journal.close()
        if (held := _HELD.pop(self.folder.resolve(), None)) is not None:
            held.close()


def read_settings(file: Path) -> dict:
    """What args.json holds; ValueError where it is damaged."""
    try:
        settings = limits.read_json(file)
    except ValueError as error:
        raise ValueError(f"{file}: damaged: {error}; use another --save_dir") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: damaged: expected an object; use another --save_dir")
    return settings
