"""A run's folder: its settings, progress, checkpoints and log."""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from fibldm import distributed
from fibldm.batches import Progress
from fibldm.checkpoint import Stateful, environment, load_training, save_model, save_training
from fibldm.config import begun_with
from fibldm.disk import TEMPORARY, keep, lock, replace_text
from fibldm.distributed import warn
from fibldm.tracking import track

# Options that may differ when a run is resumed: they change how, not what, is computed; inputs
# may move, since what they hold is compared with the run's lineage.
FREE_OPTIONS = {
    *("steps", "device", "compile", "grad_accum", "num_workers", "timeout", "time_limit"),
    *("log_interval", "save_interval", "patience", "csv_file", "csv_path", "img_dir", "data_path"),
    *("latent_data_dir", "vae_checkpoint", "unet_checkpoint", "init_checkpoint", "save_dir"),
    *("keep_last", "max_bad_steps", "max_bad_images", "no_preflight", "environment"),
    "wandb",
}
FREED = 20.0  # seconds in which the last processes of a killed run end
GIB = 2**30
PART = 2**24  # bytes of a part of the log: at this size metrics.jsonl becomes metrics.0001.jsonl
PICTURES = 20  # newest pictures that a resumed run shows in TensorBoard again
_HELD: dict[Path, TextIO] = {}  # folders that this process trains in


class RunFolder:
    """A folder with args.json, last.pth, *_best.pth and samples/; the log lies beside them.

    `settings` are the options of the script, by name. Raises ValueError where the folder holds a
    run with other settings.
    """

    def __init__(
        self, path: str | Path, settings: dict, device: torch.device, keep_last: int = 1
    ) -> None:
        self.path, self.device, self.keep_last = Path(path), device, keep_last
        self.last, self.strict = self.path / "last.pth", False
        settings = {name: value for name, value in settings.items() if name != "dry_run"}
        self.settings = json.loads(json.dumps(settings)) | {"environment": environment()}
        self.progress = Progress()
        self.kind, self.components, self.lineage = "", {}, {}
        self.saved_step = 0
        self._require_same_settings()

    def _require_same_settings(self) -> None:
        """ValueError where a run that has come to a checkpoint here has other settings."""
        file = self.path / "args.json"
        if not any(self.path.glob("*.pth")):
            return
        if not file.is_file():
            raise ValueError(f"{self.path} holds checkpoints but no args.json; use another folder")
        before, now = begun_with(self.path), self.settings
        free = FREE_OPTIONS - ({"steps"} if before.get("lr_schedule") == "cosine" else set())
        if before.get("precision") == "auto":  # an older version did not note what it was
            free |= {"precision"}
        changed = [
            f"--{name} was {before.get(name)}, is {now.get(name)}"
            for name in sorted((before.keys() | now.keys()) - free)
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings: {'; '.join(changed)}. "
                "Give the same to resume it, or another --save_dir"
            )

    # Going on.

    def restore(
        self,
        kind: str,
        components: dict[str, Stateful],
        lineage: dict[str, str],
        unchecked: Collection[str] = (),
    ) -> None:
        """Fill the components and the progress from last.pth, where it is there.

        What `unchecked` names of the lineage is taken as it was, not compared.
        """
        self.kind, self.components, self.lineage = kind, components, lineage
        if self.last.is_file():
            content = load_training(self.last, kind, components, lineage, unchecked)
            # A run of an older version knew fewer names.
            known = asdict(self.progress).keys() & content.keys() | {"step"}
            vars(self.progress).update({name: content[name] for name in known})
            self.lineage = lineage | {name: content["lineage"][name] for name in unchecked}
        elif any(self.path.glob("*_best.pth")):
            raise ValueError(
                f"{self.last}: no such file, but {self.path} holds a trained run; put it back, "
                "or use another --save_dir"
            )
        found = distributed.gather(self.progress.step)
        if len(set(found)) > 1:
            raise ValueError(
                f"{self.last}: the processes found it at steps {found}, expected the same; "
                "--save_dir must be on a file system that all nodes share"
            )
        self.saved_step = self.progress.step

    def open(self) -> None:
        """Hold the folder, remove what a kill left half written, and write args.json."""
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        self.claim()
        for left in self.path.glob(f"{TEMPORARY}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        replace_text(self.path / "args.json", json.dumps(self.settings, indent=2) + "\n")

    def claim(self) -> None:
        """Hold the folder while this process lives; ValueError where another process holds it."""
        folder = self.path.resolve()
        if folder in _HELD:
            return
        try:
            _HELD[folder] = lock(folder / ".lock", FREED)
        except BlockingIOError:
            text = f"{self.path}: another process is training in it"
            raise ValueError(f"{text}; wait for its end, or use another --save_dir") from None
        except OSError as error:
            text = f"{self.path}: its file system has no locks ({error.strerror})"
            warn(f"{text}: do not start the same run twice at a time")

    def release(self) -> None:
        """Let another process train in the folder."""
        if (held := _HELD.pop(self.path.resolve(), None)) is not None:
            held.close()

    # Saving.

    def save(self) -> bool:
        """Write last.pth and keep `keep_last` of them; whether this step is now on disk."""
        step = self.progress.step

        def write() -> None:
            if self.keep_last > 1 and 0 < self.saved_step < step:
                keep(self.last, self.path / f"step_{self.saved_step:07d}.pth")
            save_training(
                self.last, self.kind, self.components, self.lineage, **asdict(self.progress)
            )
            older = sorted(self.path.glob("step_*.pth"))
            for path in older[: len(older) - self.keep_last + 1]:
                path.unlink()

        saved = self._write(self.last, write)
        self.saved_step = step if saved else self.saved_step
        return saved

    def save_best(self, name: str, model: nn.Module, **facts: object) -> bool:
        """Write a snapshot for inference; whether it is on disk."""
        path = self.path / name
        return self._write(path, lambda: save_model(path, model, self.lineage, **facts))

    def _write(self, path: Path, write: Callable[[], None]) -> bool:
        """Let the main process write; whether it could, on all ranks when it has."""
        written = not distributed.is_main()
        with self.keep_going(path):
            if distributed.is_main():
                write()
                written = True
        return not distributed.any_rank(not written, self.device)

    @contextlib.contextmanager
    def keep_going(self, path: Path) -> Iterator[None]:
        """Warn where a file cannot be written, and go on: a full disk may be emptied."""
        try:
            yield
        except OSError as error:
            if self.strict:
                raise
            free = shutil.disk_usage(self.path).free / GIB
            warn(
                f"{path} of step {self.progress.step} could not be written: {error.strerror}; "
                f"{free:.2f} GiB are free. Training goes on. {self.where_saved()}"
            )

    def where_saved(self) -> str:
        if not self.last.is_file():
            return "Nothing was saved yet."
        return f"{self.last} is of step {self.saved_step}, from before."

    # Before a cooldown of the learning rate.

    def keep_checkpoints(self, step: int) -> None:
        """At this step keep the checkpoints, in place of those kept before: see `go_back`."""
        kept = self.path / f"kept_{step:07d}"
        due = 0 < step == self.progress.step and not kept.is_dir()
        if not due or not distributed.is_main():
            return
        with self.keep_going(kept):
            partial = kept.with_name(f"{TEMPORARY}{kept.name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for path in [self.last, *self.path.glob("*_best.pth")]:
                keep(path, partial / path.name)
            older = list(self.path.glob("kept_*"))
            os.replace(partial, kept)
            for folder in older:
                shutil.rmtree(folder)

    def kept_before(self, step: int) -> Path:
        """The checkpoints that were kept at this step at the latest; ValueError without any."""
        kept = sorted(self.path.glob("kept_*/last.pth"))
        if not kept or step_of(kept[-1].parent) > step:
            found = kept[-1].parent.name if kept else "nothing"
            raise ValueError(
                f"{self.path}: its learning rate has cooled down since step "
                f"{self.progress.cooling_from}. A training of other --steps goes on from what was "
                f"kept at step {step} at the latest, and found is {found}; put it back, give the "
                "same --steps or more of them, or another --save_dir"
            )
        return kept[-1].parent

    def go_back(self, kept: Path) -> None:
        """Put back the checkpoints in a folder, from which a longer training goes on.

        What was the best stays, with its step in its name.
        """
        distributed.barrier()  # all have looked
        if distributed.is_main():
            self.claim()
            for path in (*self.path.glob("step_*.pth"), *self.path.glob("samples/step_*.png")):
                if step_of(path) > step_of(kept):
                    path.unlink()
            for path in self.path.glob("*_best.pth"):
                if not (named := path.with_stem(f"{path.stem}_{self.progress.step:07d}")).exists():
                    keep(path, named)
                if not (kept / path.name).exists():
                    path.unlink()
            for path in sorted(kept.iterdir(), key=lambda path: path.name == "last.pth"):
                keep(path, self.path / path.name)  # last.pth at the end: else this begins anew
        distributed.barrier()

    def trial(self) -> "RunFolder":
        """A folder for a preflight: of the same contents, and every failure is an error."""
        trial = copy.copy(self)
        trial.path, trial.strict, trial.saved_step = self.path / ".preflight", True, 0
        trial.last, trial.progress = trial.path / "last.pth", copy.deepcopy(self.progress)
        return trial

    @contextlib.contextmanager
    def temporary(self) -> Iterator[None]:
        """The folder is there for a while, for the main process."""
        if distributed.is_main():
            (self.path / "samples").mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            if distributed.is_main():
                shutil.rmtree(self.path, ignore_errors=True)

    def require_space(self, size: int, files: int) -> None:
        """ValueError where the disk has no room for so many checkpoints, with those that are."""
        present = sum(path.stat().st_size for path in self.path.glob("*.pth"))
        needed = files * size - present
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise ValueError(
                f"{self.path}: {free / GIB:.2f} GiB are free, but checkpoints of "
                f"{size / GIB:.2f} GiB need {needed / GIB:.2f} GiB more; free space, lower "
                "--keep_last, or use --no_preflight to go on nevertheless"
            )


class Journal:
    """The log in a run's folder, which one process writes.

    Where the disk is full, rows wait in memory and training goes on. `wandb`: the project of
    Weights & Biases that gets the numbers too, with these facts of the run.
    """

    def __init__(self, folder: Path, wandb: str | None = None, facts: dict | None = None) -> None:
        self.folder, self.wandb, self.facts = folder, wandb, facts or {}
        self.file, self.tensorboard = folder / "metrics.jsonl", folder / "tensorboard"
        self.writer: SummaryWriter | None = None
        self.waiting = ""  # rows that could not be written yet
        self.tracked: Any = None  # the run there

    def open(self, step: int, validated: int) -> None:
        """Keep the rows up to a step and its validation, and make tensorboard/ of them anew.

        So there is always one file of events, however often the run was resumed.
        """
        for path in log_parts(self.folder):
            text = path.read_text(errors="replace")
            kept = [r for r in text.splitlines() if _step_of(r, validated) <= step]
            if text != (left := "".join(f"{row}\n" for row in kept)):
                replace_text(path, left)
            if not left and path != self.file:
                path.unlink()
        shutil.rmtree(self.tensorboard, ignore_errors=True)
        if self.wandb is not None:
            self.tracked = track(self.folder, self.wandb, self.facts)
        try:
            self.writer = SummaryWriter(self.tensorboard)
        except OSError as error:
            self._give_up(error)
        for row in read_log(self.folder):
            self._show(row)
        pictures = sorted((self.folder / "samples").glob("step_*.png"))
        shown = [(step_of(path), path) for path in pictures]
        for place in [place for place in shown if place[0] <= validated][-PICTURES:]:
            self.picture(*place)

    def write(self, row: dict[str, float]) -> None:
        """Append a row: {"step": step, name: value, ...}."""
        self.waiting += json.dumps(row) + "\n"
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with open(self.file, "a") as file:
                file.write(self.waiting)
            self.waiting = ""
            if size > PART:
                number = len(log_parts(self.folder))
                os.replace(self.file, self.folder / f"metrics.{number:04d}.jsonl")
        except OSError as error:
            with contextlib.suppress(OSError):  # a read-only disk
                os.truncate(self.file, size)
            warn(f"{self.file}: {error.strerror}; its rows wait for the next log line")
        self._show(row)

    def _show(self, row: dict[str, float]) -> None:
        """The values of a row in TensorBoard."""
        if self.writer is not None:
            try:
                for name, value in row.items():
                    if name != "step":
                        self.writer.add_scalar(name, value, row["step"])
            except OSError as error:
                self._give_up(error)

    def picture(self, step: int, path: Path) -> None:
        """Show a PNG in TensorBoard too, but none, as they show patients, where that is sent."""
        if self.writer is not None and self.tracked is None:
            try:
                image = np.asarray(Image.open(path))
                self.writer.add_image("samples", image, step, dataformats="HWC")
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        if self.writer is not None:
            try:
                self.writer.close()
            except OSError as error:
                self._give_up(error)
        if self.tracked is not None:
            self.tracked.finish()

    def _give_up(self, error: OSError) -> None:
        """Its writer does not recover; the next start makes the folder of metrics.jsonl anew."""
        self.writer = None
        warn(f"{self.tensorboard}: {error.strerror}; left out until the run is started again")


def step_of(path: Path) -> int:
    """The step in the name of a file or folder: step_0000080.pth, kept_0000080."""
    return int(path.stem.rpartition("_")[2])


def log_parts(folder: Path) -> list[Path]:
    """The files of a run's log, the oldest first; metrics.jsonl is the last."""
    last = folder / "metrics.jsonl"
    return sorted(folder.glob("metrics.*.jsonl")) + ([last] if last.exists() else [])


def read_log(folder: Path) -> Iterator[dict[str, float]]:
    """The rows of a run's whole log, in order; a row that a kill tore is left out."""
    for path in log_parts(folder):
        with open(path) as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def _step_of(row: str, validated: int) -> float:
    """The step of a log row; inf if a kill tore it, or came before its validation was noted."""
    try:
        values = json.loads(row)
        undone = values["step"] > validated and any(name.startswith("val/") for name in values)
        return float("inf") if undone else values["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
