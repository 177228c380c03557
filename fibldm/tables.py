"""label.csv: which slices and contours there are, of whom, and the split by patient."""

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fibldm import limits

SPLITS = ("train", "val", "test")
SHOWN = 20  # of a list of bad rows in an error


@dataclass(frozen=True)
class Split:
    """How patients without a `split` column are divided; kept in the VAE's checkpoint."""

    seed: int = 0
    val_fraction: float = 0.1
    test_fraction: float = 0.1

    def of(self, patient_id: str) -> str:
        """A stable hash of seed and patient decides, so that more patients reshuffle nobody."""
        digest = hashlib.sha256(f"{self.seed}:{patient_id}".encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        if position < self.val_fraction:
            return "val"
        return "test" if position < self.val_fraction + self.test_fraction else "train"


@dataclass(frozen=True)
class Row:
    """One line of label.csv; label is "" where there is none. View 0 is the slice itself."""

    image: str
    contour: str
    patient_id: str
    label: str
    split: str
    view: int = 0


def list_some(lines: Sequence[str]) -> str:
    shown = "\n  ".join(lines[:SHOWN])
    more = f"\n  ... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"\n  {shown}{more}"


@dataclass(frozen=True)
class TableProblem:
    """Something wrong in label.csv that training refuses, and the lines, files or patients."""

    kind: str
    names: list[str]
    message: str


def read_table(csv_file: str | Path, root: str | Path, split: Split) -> tuple[list[Row], list[str]]:
    """Read label.csv, whose paths are relative to `root`; return its rows and notes for the user.

    Raises ValueError for a missing or empty table, missing columns, files or patients.
    """
    rows, notes, problems = parse_table(csv_file, root, split)
    if problems:
        raise ValueError(problems[0].message)
    return rows, notes


def read_lines(path: str | Path) -> list[tuple[int, list[str]]]:
    """The lines of a CSV file that are not empty: their number in the file, their stripped cells.

    Raises ValueError naming the file where it can't be read.
    """
    limits.require_bytes(path, limits.TEXT)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV text file in UTF-8: {error}") from error
    return [(number, line) for number, line in lines if any(line)]


def parse_table(
    csv_file: str | Path, root: str | Path, split: Split
) -> tuple[list[Row], list[str], list[TableProblem]]:
    """`read_table` that returns all that is wrong beside the rows, which may lack cells and files.

    Raises ValueError where there are no rows: no table, no text, no second column.
    """
    csv_file, root, notes = Path(csv_file), Path(root), []
    problems: list[TableProblem] = []
    if not csv_file.is_file():
        raise ValueError(f"{csv_file}: no such file; expected a table with columns image,contour")
    numbered = read_lines(csv_file)
    lines = [line for _, line in numbered]
    if len(lines) < 2:
        raise ValueError(f"{csv_file}: {len(lines)} lines; expected a header and a line a slice")

    # Columns by name, or the first two.
    header = [name.lower() for name in lines[0]]
    if len(header) < 2:
        raise ValueError(
            f"{csv_file}: 1 column ({lines[0][0]!r}); expected at least two, image and contour"
        )
    column = {name: i for i, name in enumerate(header)}
    if "image" not in column or "contour" not in column:
        column |= {"image": 0, "contour": 1}
        notes.append(f"{csv_file}: columns {lines[0][:2]} are taken as image and contour")
    short = [f"line {i}: {line}" for i, line in numbered[1:] if len(line) < len(header)]
    if short:
        message = (
            f"{csv_file}: {len(short)} lines have fewer cells than the header's {len(header)}:"
            + list_some(short)
        )
        problems.append(TableProblem("short lines", short, message))

    # Rows, with their files and their split.
    rows, missing, unknown, outside = [], [], [], []
    for line in lines[1:]:
        line = line + [""] * (len(header) - len(line))
        cells = {name: line[i] for name, i in column.items()}
        patient = cells.get("patient_id") or cells["image"]
        part = cells.get("split", "").lower() or split.of(patient)
        if part not in SPLITS:
            unknown.append(part)
        rows.append(Row(cells["image"], cells["contour"], patient, cells.get("label", ""), part))
        pair = rows[-1].image, rows[-1].contour
        outside += [name for name in pair if not limits.inside(name)]
        missing += [n for n in pair if limits.inside(n) and not os.path.isfile(root / n)]
    if outside:
        message = (
            f"{csv_file}: {len(outside)} paths do not stay below {root}, expected paths relative "
            f"to it without ..:" + list_some([repr(name) for name in outside])
        )
        problems.append(TableProblem("paths that leave the folder", outside, message))
    if unknown:
        message = f"{csv_file}: split {unknown[0]!r}; expected one of {', '.join(SPLITS)}"
        problems.append(TableProblem("unknown split", unknown, message))
    if missing:
        message = (
            f"{csv_file}: {len(missing)} files are missing below {root} (paths in the table are "
            f"relative to that folder):" + list_some(missing)
        )
        problems.append(TableProblem("missing files", missing, message))
    problems += check_split(csv_file, rows)
    if "patient_id" not in column:
        notes.append(
            f"WARNING: {csv_file} has no patient_id column: each row counts as its own patient. If "
            "a patient has several slices, some land in training and some in validation, and "
            "held-out numbers will look better than they are."
        )
    return rows, notes, problems


def check_split(csv_file: Path, rows: list[Row]) -> list[TableProblem]:
    """Patients that are in two splits, and a split that training needs and nobody is in."""
    parts: dict[str, str] = {}
    torn: dict[str, str] = {}
    for row in rows:
        if parts.setdefault(row.patient_id, row.split) != row.split:
            torn.setdefault(row.patient_id, row.split)
    problems = []
    if torn:
        patient, second = next(iter(torn.items()))
        message = (
            f"{csv_file}: patient {patient} is in {parts[patient]} and in {second}; a patient's "
            "slices belong to one split"
        )
        problems.append(TableProblem("patient in two splits", list(torn), message))
    count = Counter(parts.values())
    for part, remedy in ("train", "lower"), ("val", "raise"):
        if not count[part]:
            message = (
                f"{csv_file}: of {len(parts)} patients none falls into the {part} split, expected "
                f"at least 1; {remedy} --val_fraction of train_vae.py, change its --split_seed, "
                "or add a split column"
            )
            problems.append(TableProblem("empty split", [part], message))
    return problems
