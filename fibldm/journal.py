"""A run's log: metrics.jsonl, cut into parts as it grows, and tensorboard/, made from it."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from fibldm.disk import replace_text

PART = 2**24  # bytes of a part of the log: at this size metrics.jsonl becomes metrics.0001.jsonl
PICTURES = 20  # newest pictures that a resumed run shows in TensorBoard again


class Journal:
    """The log in a run's folder, which one process writes. `warn` tells the user of lost rows.

    Where the disk is full, rows wait in memory and training goes on.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder, self.warn = folder, warn
        self.file, self.tensorboard = folder / "metrics.jsonl", folder / "tensorboard"
        self.writer: SummaryWriter | None = None
        self.waiting = ""  # rows that could not be written yet

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
        try:
            self.writer = SummaryWriter(self.tensorboard)
        except OSError as error:
            self._give_up(error)
        for row in read_log(self.folder):
            self._show(row)
        shown = sorted((self.folder / "samples").glob("step_*.png"))
        for path in [p for p in shown if int(p.stem.removeprefix("step_")) <= validated][
            -PICTURES:
        ]:
            self.picture(int(path.stem.removeprefix("step_")), path)

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
            self.warn(f"{self.file}: {error.strerror}; its rows wait for the next log line")
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
        """Show a PNG in TensorBoard too."""
        if self.writer is not None:
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

    def _give_up(self, error: OSError) -> None:
        """Its writer does not recover; the next start makes the folder of metrics.jsonl anew."""
        self.writer = None
        self.warn(f"{self.tensorboard}: {error.strerror}; left out until the run is started again")


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
