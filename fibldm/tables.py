"""Tables: how all of them are read and written, and label.csv with its split by patient."""

import hashlib
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fibldm import limits
from fibldm.disk import replace_text

SPLITS = ("train", "val", "test")
SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".dcm", ".nii", ".gz", ".jpg")  # in no column's name
PATIENT = ("patient", "patientid")  # other names of patient_id, without spaces and the like
OF_SLICES = ("patient_id", "label", "split", "position", "pixel_spacing")  # no files
SHOWN = 20  # of a list of bad rows in an error
SHOWN_OF_LINE = 200  # characters
OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
COLUMNS = 4096  # of a table at most
QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')
CELL = rf'(?:[^",]*|{QUOTED.pattern})'
RECORD = re.compile(f"{CELL}(?:,{CELL})*")
QUOTE_ALL = 1  # of the csv module, which pandas writes with


@dataclass(frozen=True)
class Split:
    """How patients without a `split` column are divided; kept in the VAE's checkpoint."""

    seed: int = 0
    val_fraction: float = 0.1
    test_fraction: float = 0.1

    def of(self, patient_id: str) -> str:
        """A stable hash of seed and patient decides, so new patients do not move others."""
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


@dataclass(frozen=True)
class TableProblem:
    """Something wrong in a table that training refuses, and the lines, files or patients."""

    kind: str
    names: list[str]
    message: str


def list_some(lines: Sequence[str]) -> str:
    """The first lines of a list, indented, and how many more there are."""
    shown = "\n  ".join(lines[:SHOWN])
    more = f"\n  ... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"\n  {shown}{more}"


# Any table.


def read_csv(path: str | Path, encoding: str = "utf-8-sig") -> pd.DataFrame:
    """A CSV file as it stands: every cell a stripped string, columns as the header names them.

    The index is the number of each line in the file. Empty lines are left out. Cells may be quoted
    and then hold commas, quotes (doubled) and line breaks. Raises ValueError naming the file and
    its lines: not there, not UTF-8, not separated by commas, lines with fewer or more cells than
    the header, unbalanced quotes, two columns of one name.
    """
    frame, problems = read_cells(path, encoding)
    if problems:
        raise ValueError(problems[0].message)
    return frame


def write_csv(
    path: str | Path, rows: pd.DataFrame | Sequence[Mapping[str, object]], columns: Sequence[str]
) -> None:
    """Write a table as UTF-8 whatever the locale, whole or not at all; see `format_csv`."""
    replace_text(Path(path), format_csv(rows, columns))


def format_csv(rows: pd.DataFrame | Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """The text of a table that `read_csv` reads; None and absent cells are empty.

    Raises ValueError where a row has a cell that is in none of the columns.
    """
    if not isinstance(rows, pd.DataFrame):
        unknown = {name for row in rows for name in row} - set(columns)
        if unknown:
            raise ValueError(f"cells {sorted(unknown)}, expected columns {list(columns)}")
        rows = pd.DataFrame(list(rows), columns=list(columns), dtype=object)
    text = rows.to_csv(columns=list(columns), index=False, lineterminator="\n")
    if text.count("\n") > len(rows) + 1 or "\r" in text:  # line breaks within cells
        text = rows.to_csv(
            columns=list(columns), index=False, lineterminator="\n", quoting=QUOTE_ALL
        )
    return text


def read_cells(
    path: str | Path, encoding: str = "utf-8-sig"
) -> tuple[pd.DataFrame, list[TableProblem]]:
    """`read_csv` that returns lines with fewer or more cells as problems, cut or filled up."""
    numbers, records = _records(path, _read_text(path, encoding))
    if not records:
        raise ValueError(f"{path}: 0 lines; expected a header, and a line for each row")
    counts = [QUOTED.sub("", record).count(",") + 1 for record in records]
    width = counts[0]
    if width > COLUMNS:
        raise ValueError(f"{path}: {width:,} columns, expected at most {COLUMNS:,}")

    problems = _uneven_lines(path, numbers, records, counts)
    first_cells = re.compile(f"{CELL}(?:,{CELL}){{{width - 1}}}")
    records = [
        first_cells.match(record).group() if count > width else record
        for record, count in zip(records, counts, strict=True)
    ]
    text = io.StringIO("\n".join(records))
    cells = pd.read_csv(text, header=None, names=range(width), dtype=str, na_filter=False)
    cells = cells.fillna("").apply(lambda column: column.str.strip())
    header, frame = cells.iloc[0].tolist(), cells.iloc[1:]
    frame.columns, frame.index = header, numbers[1:]
    _require_header(path, header)
    named = [bool(name) or bool((frame.iloc[:, i] != "").any()) for i, name in enumerate(header)]
    return frame.loc[:, named], problems


def _uneven_lines(
    path: str | Path, numbers: list[int], records: list[str], counts: list[int]
) -> list[TableProblem]:
    """Lines with fewer cells than the first has, and those with more."""
    problems = []
    for kind, what, found in (
        ("short lines", "fewer", [i for i, count in enumerate(counts) if count < counts[0]]),
        ("long lines", "more", [i for i, count in enumerate(counts) if count > counts[0]]),
    ):
        lines = [f"line {numbers[i]}: {records[i][:SHOWN_OF_LINE]}" for i in found]
        message = f"{path}: {len(lines)} lines have {what} cells than the header's {counts[0]}:"
        if lines:
            problems.append(TableProblem(kind, lines, message + list_some(lines)))
    return problems


def _read_text(path: str | Path, encoding: str) -> str:
    """The text of a table, its lines ended by a line feed alone."""
    try:
        limits.require_bytes(path, limits.TEXT)
        text = Path(path).read_bytes().decode(encoding)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; expected a table") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a CSV text file in UTF-8: {error}") from error
    if "\0" in text:
        raise ValueError(f"{path}: not a CSV text file: it holds zero bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _records(path: str | Path, text: str) -> tuple[list[int], list[str]]:
    """The lines of a table that are not empty, and their numbers; a record with line breaks in
    its cells has that of its first line. ValueError where quotes are unbalanced.
    """
    lines = text.split("\n")
    whole: Iterable[tuple[int, str]] = enumerate(lines, 1)
    if '"' in text:
        whole = _joined(path, lines)
    found = [(number, record) for number, record in whole if record.strip(', \t"')]
    return [number for number, _ in found], [record for _, record in found]


def _joined(path: str | Path, lines: list[str]) -> list[tuple[int, str]]:
    """Lines that a quoted cell goes over, as one; ValueError where quotes are unbalanced."""
    whole: list[tuple[int, str]] = []
    bad: list[str] = []
    width = next((QUOTED.sub("", line).count(",") for line in lines if line.strip()), 0)
    first = None  # of the lines that the open cell goes over
    for number, line in enumerate(lines, 1):
        opens = line.count('"') % 2 == 1
        if first is None and not opens:
            whole.append((number, line))
        elif first is None:
            first = number
        elif opens:
            whole.append((first, "\n".join(lines[first - 1 : number])))
            first = None
    if first is not None:
        bad.append(
            f"line {first}: a quote is opened and never closed: {lines[first - 1][:SHOWN_OF_LINE]}"
        )
    for number, record in whole:
        parts = record.split("\n")
        # One pair of quotes around what else are whole lines: two that are there by mistake.
        swallows = len(parts) > 1 and record.count('"') == 2
        swallows = swallows and all(part.count(",") == width for part in parts)
        if swallows or ('"' in record and not RECORD.fullmatch(record)):
            last = number + len(parts) - 1
            where = f"line {number}" if last == number else f"lines {number} to {last}"
            bad.append(f"{where}: {parts[0][:SHOWN_OF_LINE]}")
    if bad:
        raise ValueError(
            f"{path}: unbalanced quotes; expected none, or quotes around the whole cell and those "
            f"in it doubled:{list_some(bad)}"
        )
    return whole


def _require_header(path: str | Path, header: list[str]) -> None:
    """ValueError for another separator, and for two columns of one name."""
    for separator, name in OTHER_SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise ValueError(
                f"{path}: cells are separated by {name} ({header[0]!r}), expected commas; save the "
                "table as comma-separated CSV"
            )
    require_one_of_each(path, header)


def require_one_of_each(path: str | Path, columns: Sequence[str]) -> None:
    """ValueError where two columns have one name; those without a name do not count."""
    twice = [name for name, count in Counter(columns).items() if count > 1 and name]
    if twice:
        raise ValueError(f"{path}: several columns are named {twice[0]!r}, expected one")


# label.csv, and labels of patients.


def read_labels(path: str | Path) -> dict[str, str]:
    """The label of each patient: by column label, and patient_id or else the first column.

    Raises ValueError where there is no column label, or a patient has two labels.
    """
    frame = read_csv(path)
    columns = [name.lower() for name in frame.columns]
    require_one_of_each(path, columns)
    by = columns.index("patient_id") if "patient_id" in columns else 0
    if frame.empty or "label" not in columns or columns[by] == "label":
        raise ValueError(
            f"{path}: found the columns {', '.join(frame.columns)} and {len(frame)} lines; "
            "expected patient_id and label, and a line a patient"
        )
    labels: dict[str, str] = {}
    pairs = frame.iloc[:, [by, columns.index("label")]]
    for patient, label in pairs.itertuples(index=False):
        if labels.setdefault(patient, label) != label:
            raise ValueError(
                f"{path}: patient {patient} is {labels[patient]} and {label}, expected one label a "
                "patient"
            )
    return labels


def read_table(csv_file: str | Path, root: str | Path, split: Split) -> tuple[list[Row], list[str]]:
    """Read label.csv, whose paths are relative to `root`; return its rows and notes for the user.

    Raises ValueError for a missing or empty table, missing columns, files or patients.
    """
    rows, notes, problems = parse_table(csv_file, root, split)
    if problems:
        raise ValueError(problems[0].message)
    return rows, notes


def parse_table(
    csv_file: str | Path, root: str | Path, split: Split
) -> tuple[list[Row], list[str], list[TableProblem]]:
    """`read_table` that returns all that is wrong beside the rows, which may lack cells and files.

    Raises ValueError where there are no rows: no table, no text, unbalanced quotes, no second
    column.
    """
    csv_file, root = Path(csv_file), Path(root)
    if not csv_file.is_file():
        raise ValueError(f"{csv_file}: no such file; expected a table with columns image,contour")
    frame, problems = read_cells(csv_file)
    if not len(frame):
        raise ValueError(f"{csv_file}: 1 lines; expected a header and a line a slice")
    names = list(frame.columns)
    frame, notes = label_columns(csv_file, frame)
    if frame["contour"].eq("").all():
        raise ValueError(
            f"{csv_file}: no contours in {len(names)} column(s) {names}; expected at least two, "
            "image and contour"
        )
    patients = frame["patient_id"].where(frame["patient_id"] != "", frame["image"])
    given = frame["split"].str.lower()
    drawn = {patient: split.of(patient) for patient in patients[given == ""].unique()}
    splits = given.where(given != "", patients.map(drawn))
    columns = frame["image"], frame["contour"], patients, frame["label"], splits
    rows = [Row(*cells) for cells in zip(*columns, strict=True)]
    unknown = [name for name in splits if name not in SPLITS]
    if unknown:
        message = f"{csv_file}: split {unknown[0]!r}; expected one of {', '.join(SPLITS)}"
        problems.append(TableProblem("unknown split", unknown, message))
    problems += check_files(csv_file, root, frame)
    problems += check_split(csv_file, rows)
    return rows, notes, problems


def label_columns(csv_file: Path, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """A table with the columns of label.csv, by name in any case; and notes.

    Without the name image the first column is it; without contour the one that follows image,
    unless that has another meaning. Columns that it lacks are empty.
    """
    notes, names = [], list(frame.columns)
    columns = [name.lower() for name in names]
    require_one_of_each(csv_file, columns)
    if files := [name for name in columns if name.endswith(SUFFIXES)]:
        raise ValueError(f"{csv_file}: {files[0]!r} in the first line, expected names of columns")
    plain = [re.sub(r"[^a-z]", "", name) for name in columns]
    if "patient_id" not in columns and (found := [n for n in plain if n in PATIENT]):
        columns[plain.index(found[0])] = "patient_id"
    if "image" not in columns:
        columns[columns[0] == "contour"] = "image"
    second = columns.index("image") + 1
    if "contour" not in columns and columns[second:] and columns[second] not in OF_SLICES:
        columns[second] = "contour"
    frame = frame.set_axis(columns, axis=1)
    taken = [name for name, column in zip(names, columns, strict=True) if name.lower() != column]
    if taken:
        of = " and ".join(c for n, c in zip(names, columns, strict=True) if n.lower() != c)
        notes.append(f"{csv_file}: columns {taken} are taken as {of}")
    if "patient_id" not in columns:
        notes.append(
            f"WARNING: {csv_file} has no patient_id column: each row counts as its own patient. If "
            "a patient has several slices, some land in training and some in validation, and "
            "held-out numbers will look better than they are."
        )
    else:
        notes += _alike(csv_file, frame["patient_id"].unique())
        blank = frame.index[frame["patient_id"] == ""].astype(str)
        if 0 < len(blank) < len(frame):
            notes.append(
                f"WARNING: {csv_file}: {len(blank)} lines have no patient_id, and each counts as a "
                f"patient of its own: {', '.join(blank[:SHOWN])}"
            )
    lacking = {"contour", "patient_id", "label", "split"} - set(columns)
    return frame.assign(**dict.fromkeys(lacking, "")), notes


def same_name(patient: str) -> str:
    """What is equal for names that differ in case, spaces and the way they are encoded alone."""
    text = unicodedata.normalize("NFKC", patient)
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return " ".join(text.split()).casefold()


def _alike(csv_file: Path, patients: Iterable[str]) -> list[str]:
    """A note on patients whose names differ in case and spaces alone."""
    names: dict[str, list[str]] = {}
    for patient in patients:
        names.setdefault(same_name(patient), []).append(patient)
    found = [" and ".join(map(repr, alike)) for alike in names.values() if len(alike) > 1]
    if not found:
        return []
    return [
        f"WARNING: {csv_file}: {len(found)} patients have names that differ in case or spaces "
        f"alone, as {found[0]}: each counts as a patient. If these are one, held-out numbers will "
        "look better than they are; write one name"
    ]


def check_files(
    csv_file: Path, root: Path, frame: pd.DataFrame, contours: bool = True
) -> list[TableProblem]:
    """Paths that leave the folder, and files that are not there.

    frame: with the columns of label.csv; its index is the lines of the file. contours: whether all
    rows need one.
    """
    rows = frame[["image", "contour"]].itertuples(name=None)
    named = [(n, path) for n, *two in rows for path in (two if contours or two[1] else two[:1])]
    outside = [f"line {line}: {name!r}" for line, name in named if not limits.inside(name)]
    named = [(line, name) for line, name in named if limits.inside(name)]
    missing = set(missing_files(root, [name for _, name in named]))
    lines = [f"line {line}: {name}" for line, name in named if name in missing]
    problems = []
    if outside:
        message = (
            f"{csv_file}: {len(outside)} paths do not stay below {root}, expected paths relative "
            f"to it without ..:" + list_some(outside)
        )
        problems.append(TableProblem("paths that leave the folder", outside, message))
    if lines:
        hint = "; write / between folders, not \\" * any("\\" in name for name in missing)
        message = (
            f"{csv_file}: {len(lines)} files are missing below {root} (paths in the table are "
            f"relative to that folder{hint}):" + list_some(lines)
        )
        problems.append(TableProblem("missing files", lines, message))
    return problems


def missing_files(root: Path, names: Sequence[str]) -> list[str]:
    """Those of the names below `root` that are no files. A folder is listed once: to ask for each
    of its files takes long on a network file system.
    """
    there: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder not in there:
            try:
                with os.scandir(root / folder) as entries:
                    there[folder] = {entry.name for entry in entries if entry.is_file()}
            except OSError:
                there[folder] = set()
        if file not in there[folder] and not os.path.isfile(root / name):
            missing.append(name)
    return missing


def check_split(csv_file: Path, rows: Sequence[Row]) -> list[TableProblem]:
    """Patients that are in two splits, and a split that training needs and that is empty."""
    parts = {row.patient_id: row.split for row in rows}
    problems = check_patients(csv_file, rows)
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


def check_patients(csv_file: Path, rows: Sequence[Row]) -> list[TableProblem]:
    """Patients that are in two splits."""
    parts: dict[str, str] = {}
    torn: dict[str, str] = {}
    for row in rows:
        if parts.setdefault(row.patient_id, row.split) != row.split:
            torn.setdefault(row.patient_id, row.split)
    if not torn:
        return []
    patient, second = next(iter(torn.items()))
    message = (
        f"{csv_file}: patient {patient} is in {parts[patient] or 'no split'} and in "
        f"{second or 'no split'}; a patient's slices belong to one split"
    )
    return [TableProblem("patient in two splits", list(torn), message)]
