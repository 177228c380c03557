"""Conducts a training: its steps, and when to log, save, validate and stop; first a preflight."""

import io
import math
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fibldm import distributed
from fibldm.balance import BalancedBatches
from fibldm.batches import Batches, MicroBatch, Plan, Progress
from fibldm.checkpoint import Stateful
from fibldm.cli import STOPPED
from fibldm.config import read_settings
from fibldm.distributed import say
from fibldm.guard import Guard
from fibldm.journal import FREE_OPTIONS, GIB, Journal, RunFolder
from fibldm.optim import Precision, has_bf16
from fibldm.tracking import require_wandb

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
Batch = TypeVar("Batch")
Validate = Callable[[int], None]  # measures after a step, and keeps the best snapshot


def kept_precision(folder: str | Path, asked: str, device: torch.device) -> str:
    """The name of a run's precision: "auto" is what it began with, on whichever device it goes on.

    At its beginning it is what the GPUs of all processes have. ValueError where this one lacks it.
    """
    file, kept = Path(folder) / "args.json", None
    if asked == "auto" and file.is_file() and any(file.parent.glob("*.pth")):
        kept = read_settings(file).get("precision")
    if kept == "bf16" and device.type == "cuda" and not has_bf16():
        raise ValueError(
            f"{folder}: the run began in bf16 (--precision auto), which this GPU does not have; go "
            "on on a GPU of compute capability 8.0 or above, or begin again in another --save_dir: "
            "there it would be fp16"
        )
    found = distributed.gather(Precision(kept or asked, device).name)
    return "fp16" if asked == "auto" and "fp16" in found else found[distributed.rank()]


class Run:
    """A training in a folder, from its first step or the one that it had come to.

    SIGINT, SIGTERM, SIGUSR1 and the time limit are noted. After the step under way, at which all
    ranks agree, the run is saved and left with exit code 75. While all is on disk, as in a
    validation, they end the process at once; a second signal always does. `settings`: the options
    of the script, kept in args.json. ValueError where the folder holds a run with others. Its
    `precision` is the one that the run began with.
    """

    def __init__(
        self, folder: str | Path, plan: Plan, device: torch.device, settings: dict | None = None
    ) -> None:
        self.plan, self.device, settings = plan, device, settings or asdict(plan)
        if settings.get("wandb"):
            require_wandb()
        name = kept_precision(folder, settings.get("precision", "auto"), device)
        self.precision = Precision(name, device)
        if "precision" in settings:
            settings = settings | {"precision": name}
        self.folder = RunFolder(folder, settings, device, plan.keep_last)
        self.guard = Guard(plan, self.folder)
        self.journal: Journal | None = None  # of the main process
        self.batches: Batches | None = None  # once `batches_of` has made them
        self.signal, self.handlers = 0, {}  # the one that came; those before this run
        self.warming_up = False  # in a step that is not taken
        self.saved = True  # nothing is lost before the first step
        self.stopping = False
        self.started, self.first = time.monotonic(), 0  # of the steps whose speed is shown
        self.deadline = self.started + (plan.time_limit or math.inf)
        distributed.barrier()  # no rank writes before all have looked

    @property
    def progress(self) -> Progress:
        return self.folder.progress

    @property
    def scaler(self) -> Stateful | None:
        """The GradScaler among the components."""
        return self.folder.components.get("scaler")

    @property
    def rehearsing(self) -> bool:
        """Whether this is the preflight, of which nothing is logged or remembered."""
        return self.folder.strict

    # Before the first step.

    def resume(
        self,
        kind: str,
        components: dict[str, Stateful],
        lineage: dict[str, str],
        unchecked: Collection[str] = (),
    ) -> None:
        """Restore the components and the progress from last.pth, and open the folder for writing.

        What `unchecked` names of the lineage is taken as it was, not compared.
        """
        folder, plan = self.folder, self.plan
        folder.restore(kind, components, lineage, unchecked)
        step, cooled_from = self.progress.step, self.progress.cooling_from
        if cooled_from not in (0, plan.cooling_from):
            kept = folder.kept_before(plan.cooling_from)
            if not plan.dry_run:
                folder.go_back(kept)
                folder.restore(kind, components, lineage, unchecked)
                step = self.progress.step
        elif not cooled_from and 0 < plan.cooling_from < step:
            raise ValueError(
                f"{folder.last} is at step {step}: for --steps {plan.steps} the learning rate "
                f"should have cooled down from step {plan.cooling_from} on; give more --steps"
            )
        if step > plan.steps:
            raise ValueError(f"{folder.last} is at step {step}, beyond --steps {plan.steps}")
        self.handlers = {n: signal.signal(n, self._on_signal) for n in SIGNALS}
        if distributed.is_main():
            folder.open()
            project = None if plan.dry_run else folder.settings.get("wandb")
            facts = {n: v for n, v in folder.settings.items() if n not in FREE_OPTIONS}
            self.journal = Journal(folder.path, project, facts)
            self.journal.open(step, self.progress.validated)
        if step:
            say(f"{folder.path}: going on after step {step} of {plan.steps}")

    def batches_of(
        self,
        rows: Sequence[int],
        unreadable: Collection[int] = (),
        labels: Sequence[str] = (),
    ) -> Batches:
        """The batches of the steps that are left; rows whose images cannot be read are left out.

        `labels`: of the rows, by which they are drawn where the plan says so.
        """
        given = rows, self.plan, self.progress.step, self.progress.bad_images
        if self.plan.balance_labels is None:
            self.batches = Batches(*given)
        else:
            self.batches = BalancedBatches(*given, labels)
            say(self.batches.summary())
        self.guard.leave_out(self.batches, unreadable)
        return self.batches

    # The steps.

    def steps(
        self, load: Callable[[], Iterable[Batch]], validate: Validate
    ) -> Iterator[tuple[int, Iterator[tuple[MicroBatch, Batch]]]]:
        """The steps that are left, each with this rank's micro-batches; all else comes in between.

        `load` begins to load the batches, in their order. First comes the preflight: a step, a
        validation and a save at full size, which are undone.
        """
        plan, progress = self.plan, self.progress
        if progress.step < plan.steps:
            if plan.dry_run or not plan.no_preflight:
                yield from self._rehearse(load, validate)
            elif distributed.world_size() > 1:
                yield from self._warm_up(load)
        if plan.dry_run:
            say(f"--dry_run: steps {progress.step + 1} to {plan.steps} can be taken; none is")
            self.close()
            raise SystemExit(0)
        if plan.validates_after(progress.step) and progress.validated < progress.step:
            self._validate(validate)  # what a kill has left out
        self.folder.keep_checkpoints(plan.kept_at)
        self.first, self.started, loaded = progress.step, time.monotonic(), iter(load())
        steps, name = range(self.first + 1, plan.steps + 1), self.folder.path.name
        quiet = None if distributed.is_main() else True
        with tqdm(steps, name, plan.steps, initial=self.first, disable=quiet) as bar:
            for step in bar:
                if 0 < plan.patience <= progress.worse:
                    why = f"no better validation in {progress.worse} (--patience {plan.patience})"
                    say(f"{why}: ended after step {progress.step}")
                    break
                self.saved = False
                yield step, ((micro, next(loaded)) for micro in self.batches.micro_batches(step))
                self.end_step(step, validate)
        for path in self.folder.path.glob("*_best.pth"):
            say(f"{path}: validation loss {progress.best:.4f}")
        self.close()

    def _warm_up(self, load: Callable[[], Iterable[Batch]]) -> Iterator[tuple]:
        """A step whose gradients are thrown away, in place of the preflight's.

        DistributedDataParallel sorts what it sums by its first backward pass: without this, the
        first step of each start would be rounded in another way than the steps after it.
        """
        step, loaded, scaler = self.progress.step + 1, iter(load()), self.scaler
        scale = None if scaler is None else scaler.state_dict()
        self.warming_up = True
        yield step, ((micro, next(loaded)) for micro in self.batches.micro_batches(step))
        self.warming_up = False
        if scaler is not None:
            scaler.load_state_dict(scale)

    def _rehearse(self, load: Callable[[], Iterable[Batch]], validate: Validate) -> Iterator[tuple]:
        """The preflight: what would fail after hours, for lack of memory or disk, fails now."""
        started, step, before = time.monotonic(), self.progress.step + 1, io.BytesIO()
        components = self.folder.components
        torch.save({name: one.state_dict() for name, one in components.items()}, before)
        folder, self.folder = self.folder, self.folder.trial()
        loaded = iter(load())
        yield step, ((micro, next(loaded)) for micro in self.batches.micro_batches(step))
        self.progress.step = step
        with self.folder.temporary():
            validate(step)
            self.folder.save()
            size = self.folder.last.stat().st_size if distributed.is_main() else 0
        self.folder = folder
        if distributed.is_main():
            folder.require_space(size, files=self.plan.keep_last + 2 + (self.plan.kept_at > 0))
        distributed.barrier()
        before.seek(0)
        states = torch.load(before, map_location="cpu", weights_only=True)
        for name, component in components.items():
            component.load_state_dict(states[name])
        took = f"{size / 2**20:.0f} MiB in {time.monotonic() - started:.0f} s"
        if self.device.type == "cuda":
            peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
            took += f", {peak / GIB:.1f} of {total / GIB:.1f} GiB of the GPU"
        say(f"preflight: a step, a validation and a checkpoint of {took}; undone")

    # Within a step.

    def average(self, **values: Tensor) -> None:
        """Take in scalars for the next log line's means, without waiting for the device.

        Call it before the backward pass, in which ranks wait for each other.
        """
        distributed.mark()
        for name, value in values.items():
            self.guard.scalars.setdefault(name, []).append(value.detach().float())

    def note_unreadable(self, rows: Tensor) -> None:
        """Note rows of this rank's batch whose images could not be read; below 0: none."""
        self.guard.unreadable |= {row for row in rows.flatten().tolist() if row >= 0}

    def may_step(self, grad_norm: Tensor) -> bool:
        """Whether this step may be taken: all ranks' losses and gradients are finite.

        All ranks get the same answer, and agree on whether to stop after it and on rows that
        cannot be read. ValueError where too many steps in a row, or too many images, were bad.
        """
        guard = self.guard
        stop = self.signal != 0 or time.monotonic() > self.deadline
        bad_loss, bad_gradient, stop, unreadable = guard.judge(grad_norm, stop)
        finite = not (bad_loss or bad_gradient)
        if self.rehearsing or self.warming_up:
            guard.scalars, guard.unreadable = {}, set()
            return finite and not self.warming_up
        self.stopping = stop
        if unreadable:
            rows = {row for rows in distributed.gather(guard.unreadable) for row in rows}
            guard.unreadable = set()
            guard.leave_out(self.batches, rows)
        if finite:
            guard.accept()
        else:
            scaler, step = self.scaler, self.progress.step + 1
            overflow = not bad_loss and scaler is not None and scaler.get_scale() > 1
            guard.refuse(step, self.batches, scaler.state_dict() if scaler else {}, overflow)
        return finite

    # After a step.

    def end_step(self, step: int, validate: Validate) -> None:
        """Log, save and validate where that is due; leave where one must stop.

        All is on disk when a validation begins, but for steps that are skipped: the last
        checkpoint is from before them.
        """
        plan, progress = self.plan, self.progress
        progress.step = step
        if 0 < plan.cooling_from < step:
            progress.cooling_from = plan.cooling_from
        if self.stopping or plan.logs_after(step):
            speed = (step - self.first) * plan.batch_size / (time.monotonic() - self.started)
            self.log(step, {**self.guard.pop_means(), "images_per_s": speed}, "train")
        saves = self.stopping or plan.saves_after(step)
        saved = saves and self.save(self.stopping or step == plan.steps)
        if self.stopping or (saved and distributed.any_rank(self.signal != 0, self.device)):
            self._stop(saved)
        if plan.validates_after(step):
            self._validate(validate)
        self.folder.keep_checkpoints(plan.kept_at)

    def _validate(self, validate: Validate) -> None:
        begun, step = time.monotonic(), self.progress.step
        validate(step)
        self.progress.validated = step
        self.save(step == self.plan.steps)
        self.started += time.monotonic() - begun  # images_per_s is of training alone

    def save(self, at_the_end: bool = False) -> bool:
        """Write last.pth; whether it could be written.

        While steps are skipped it is not, but at the end: what was good before them stays.
        """
        if self.progress.bad_steps and not at_the_end:
            return False
        saved = self._require(self.folder.save(), self.folder.last)
        self.saved = self.saved or saved
        return saved

    def save_best(self, name: str, model: nn.Module, **facts: object) -> None:
        """Write the snapshot that is the best; where the disk is full, the next may be it."""
        saved = self.folder.save_best(name, model, **facts)
        if not self._require(saved, self.folder.path / name):
            self.progress.best, self.progress.copies = math.inf, True

    def _require(self, saved: bool, path: Path) -> bool:
        """ValueError where the last step could not be saved."""
        if not saved and self.progress.step == self.plan.steps:
            raise ValueError(
                f"{path}: the last step is taken but cannot be saved; free space and run the same "
                f"command again. {self.folder.where_saved()}"
            )
        return saved

    def _on_signal(self, number: int, frame: object) -> None:
        if self.saved:
            raise SystemExit(STOPPED)
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number

    def _stop(self, saved: bool) -> None:
        """Leave, all ranks after the same step."""
        why = "" if math.isinf(self.deadline) or self.signal else " by --time_limit"
        done = "all saved" if saved else self.folder.where_saved()
        step = f"step {self.progress.step}"
        say(f"stopped after {step}{why}, {done}; the same command goes on from there")
        self.close()
        distributed.barrier()  # else torchrun would end those that are still at it
        raise SystemExit(STOPPED)

    def close(self) -> None:
        """Close the log, let go of the folder, and give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.journal is not None:
            self.journal.close()
        self.handlers, self.journal = {}, None
        self.folder.release()

    # What a validation shows.

    def picture(self, step: int, write: Callable[[Path], None]) -> None:
        """Let the main process write a PNG into samples/, and show it in TensorBoard too."""
        path = self.folder.path / "samples" / f"step_{step:07d}.png"
        if distributed.is_main():
            with self.folder.keep_going(path):
                write(path)
        if self.journal is not None and not self.rehearsing and path.exists():
            self.journal.picture(step, path)

    def log(self, step: int, values: dict[str, float], prefix: str) -> None:
        """One row of metrics.jsonl, TensorBoard scalars, one line on the terminal."""
        if self.journal is None or self.rehearsing:
            return
        row = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        self.journal.write({"step": step, **row})
        shown = [f"{n} {float(v):.4g}" for n, v in values.items() if not n.startswith("loss_t")]
        say(f"step {step}/{self.plan.steps}  {prefix}: {'  '.join(shown)}")
