"""A data set before training: what training would refuse, and what it would learn wrongly.

inspection = inspect("./data")
for finding in inspection.findings:
    print(finding.severity, finding.check, finding.lines)
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fibldm import anatomy, ct, findings, likeness, limits, panels, spine
from fibldm.fields import Field, find_field
from fibldm.findings import Finding, Findings, SliceReading
from fibldm.tables import SPLITS, Row, Split, parse_table

CELLS = 64  # slices on the contact sheet
GUESS = (1.0, -1024.0)  # the scale that 16-bit images without one are looked at by
MASK = 32  # pixels a side at which contours are compared with other slices' lungs


@dataclass(frozen=True)
class SliceReader:
    """Reads a table's slices as training does; those without a scale by a guess.

    Paths are relative to `root`; `rescale` is the (slope, intercept) of dataset.json.
    """

    root: Path
    rescale: tuple[float, float] | None = None
    window: ct.Window = ct.DEFAULT_WINDOW
    contour_channels: int = 1

    def image(self, row: Row) -> tuple[np.ndarray, bool]:
        """HU (H, W), and whether its scale was guessed."""
        try:
            return ct.read_hu(self.root / row.image, self.rescale, self.window), False
        except ValueError as error:
            if ct.SCALE_REMEDY not in str(error):
                raise
            return ct.read_hu(self.root / row.image, GUESS, self.window), True

    def contour(self, row: Row) -> np.ndarray:
        """Bool (K, H, W)."""
        return ct.read_contour(self.root / row.contour, self.contour_channels)

    def read(self, row: Row) -> SliceReading:
        """Read and judge one row. A file that is not there is a problem of the table."""
        names = row.image, row.contour
        if not all(limits.inside(name) and (self.root / name).is_file() for name in names):
            return SliceReading()
        errors: dict[str, str] = {}
        try:
            hu, guessed = self.image(row)
        except ValueError as error:
            return SliceReading({"image unreadable": self._reason(error)})
        if guessed:
            errors["no scale"] = ""
        contour = np.zeros((self.contour_channels, *hu.shape), bool)
        try:
            marked = self.contour(row)
        except ValueError as error:
            errors["contour unreadable"] = self._reason(error)
        else:
            if marked.shape[1:] == hu.shape:
                contour = marked
            else:
                sizes = f"{hu.shape}, but its contour has {marked.shape[1:]} pixels"
                errors["sizes differ"] = sizes

        # A surround that passes for tissue is a problem of its own: the rest is judged without.
        field = find_field(hu)
        inside, within, marked = _without_surround(hu, contour, field)
        problem = anatomy.hu_problem(inside)
        small, filled, lungs = anatomy.to_grid(within, marked)
        shows_lungs = bool(lungs.any()) and not problem
        return SliceReading(
            errors=errors,
            shape=hu.shape,
            digest=hashlib.sha256(np.ascontiguousarray(hu).tobytes()).digest(),
            is_8bit=self.rescale is None and not guessed and _is_8bit(self.root / row.image),
            hu_problem=problem,
            frame=_frame(hu, field),
            contour_problem=anatomy.contour_problem(marked, small, filled, lungs, not problem),
            style=ct.contour_style(contour),
            thumbnail=likeness.thumbnails(ct.hu_to_unit(hu, self.window)).astype(np.float16),
            view=anatomy.lung_view(small, lungs) if shows_lungs else None,
            uprightness=spine.uprightness(small, lungs) if shows_lungs else None,
            contour=ct.fit_square(filled, MASK, 0) >= 0.5,
            lungs=ct.fit_square(lungs, MASK, 0) >= 0.5,
            fit=anatomy.dice(filled, lungs),
            top=float(inside.max()),
            top_count=int((inside == inside.max()).sum()),
        )

    def _reason(self, error: ValueError) -> str:
        """An error of the readers without the file's path, with which it begins."""
        return str(error).split(": ", 1)[-1].replace(f"{self.root}/", "")

    def picture(self, row: Row) -> np.ndarray:
        """A slice with its contour drawn on, RGB uint8 (S, S, 3); what can't be read is black."""
        try:
            hu = self.image(row)[0]
        except ValueError:
            return np.zeros((64, 64, 3), np.uint8)
        side = min(max(hu.shape), panels.SHEET_CELL)
        unit = ct.hu_to_unit(ct.fit_square(hu, side, ct.AIR), self.window)[None]
        try:
            contour = self.contour(row)
        except ValueError:
            return panels.grey(unit)[0]
        if contour.shape[1:] != hu.shape:
            return panels.grey(unit)[0]
        return panels.overlay(unit, ct.fit_contour(contour, side)[None])[0]


def _without_surround(
    hu: np.ndarray, contour: np.ndarray, field: Field | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The HU within the field of view, of any shape; slice and contour with air around it."""
    if field is None:
        return hu, hu, contour
    marked = np.stack([field.cut(channel, False) for channel in contour])
    return field.inside(hu), field.cut(hu), marked


def _frame(hu: np.ndarray, field: Field | None) -> str | None:
    """What a slice with a surround is said to be."""
    if field is None:
        return None
    whole, part = hu.shape, [side.stop - side.start for side in field.box]
    sizes = f"a field of view of {part[0]}x{part[1]} in {whole[0]}x{whole[1]} pixels"
    return f"{sizes}, {field.value:g} HU around it"


def _is_8bit(path: Path) -> bool:
    array, is_hu = ct.decode(path)
    return not is_hu and array.dtype == np.uint8


def read_slices(rows: Sequence[Row], reader: SliceReader, workers: int = 0) -> list[SliceReading]:
    """Read and judge all rows, with a progress bar; `workers` processes, 0 for this one."""

    def watch(readings: Iterable[SliceReading]) -> list[SliceReading]:
        return list(tqdm(readings, "reading slices", len(rows), disable=None))

    if workers == 0 or len(rows) < 2 * workers:
        return watch(map(reader.read, rows))
    with ProcessPoolExecutor(workers) as pool:
        return watch(pool.map(reader.read, rows, chunksize=8))


def check_slices(
    found: Findings,
    rows: Sequence[Row],
    readings: Sequence[SliceReading],
    rescale: tuple[float, float] | None,
) -> list[str]:
    """All that slices tell, into `found`; returns what could not be checked."""
    findings.check_files(found, rows, readings)
    findings.check_values(found, rows, readings, rescale)
    findings.check_contours(found, rows, readings)
    unchecked = findings.check_orientations(found, rows, readings)
    findings.check_copies(found, rows, readings)
    return [unchecked] if unchecked else []


class Group(NamedTuple):
    """How many patients and slices of a label a split has."""

    split: str
    label: str
    patients: int
    slices: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found: errors first, then warnings; notes say what was assumed or left out."""

    rows: list[Row]
    findings: list[Finding]
    notes: list[str]
    reader: SliceReader

    @property
    def errors(self) -> list[Finding]:
        """What training would refuse, or learn wrongly for certain."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def counts(self) -> list[Group]:
        """The sizes of each split and label; `pandas.DataFrame(inspection.counts)` is a table."""
        patients: dict[tuple[str, str], list[str]] = defaultdict(list)
        for row in self.rows:
            patients[row.split, row.label].append(row.patient_id)
        order = {split: i for i, split in enumerate(SPLITS)}
        return [
            Group(split, label, len(set(patients[split, label])), len(patients[split, label]))
            for split, label in sorted(patients, key=lambda key: (order.get(key[0], 9), key))
        ]

    def write_contact_sheet(self, path: Path) -> None:
        """Write a PNG: flagged slices first, some of each kind, then a sample over patients."""
        reasons: dict[int, str] = {}
        flagged = [finding for finding in self.findings if finding.rows]
        share = max(2, (CELLS - 16) // max(1, len(flagged)))
        for finding in flagged:
            for i, reason in list(finding.rows.items())[:share]:
                text = f"{finding.check}: {reason}" if reason != finding.check else reason
                reasons[i] = f"{reasons[i]}; {text}" if i in reasons else text
        chosen = list(reasons)[:CELLS]
        first_of: dict[str, int] = {}
        for i, row in enumerate(self.rows):
            if i not in reasons:
                first_of.setdefault(row.patient_id, i)
        others, room = list(first_of.values()), CELLS - len(chosen)
        chosen += others[:: max(1, -(-len(others) // room))] if room else []
        cells = []
        for i in chosen:
            row = self.rows[i]
            name = Path(row.image).name
            caption = f"! {name}: {reasons[i]}" if i in reasons else f"{name} ({row.split})"
            cells.append((self.reader.picture(row), caption))
        panels.write_sheet(path, cells)


def inspect(
    folder: str | Path,
    csv_file: str | Path | None = None,
    root: str | Path | None = None,
    *,
    window: ct.Window = ct.DEFAULT_WINDOW,
    contour_channels: int = 1,
    split: Split | None = None,
    workers: int = 0,
) -> Inspection:
    """Check the data set in a folder: label.csv, dataset.json and the files that they name.

    csv_file and root: the table, and the folder its paths are relative to, where these are others.
    window: HU that training makes -1 and 1. split: of patients, where no column says it. Reads all
    slices, in `workers` processes. Raises ValueError where there is no table with rows.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with label.csv")
    csv_file, root = Path(csv_file or folder / "label.csv"), Path(root or folder)
    rows, notes, problems = parse_table(csv_file, root, split or Split())
    rescale = ct.read_rescale(csv_file.parent) or ct.read_rescale(root)
    reader = SliceReader(root, rescale, window, contour_channels)
    readings = read_slices(rows, reader, workers)

    found = Findings()
    findings.check_table(found, rows, problems)
    unchecked = check_slices(found, rows, readings, rescale)
    notes = [note for note in notes if not note.startswith("WARNING")]  # a finding says it
    if eight := sum(reading.is_8bit for reading in readings):
        notes.insert(
            0,
            f"{eight} images have 8 bits and no dataset.json: 0 is taken as {window[0]:g} HU, 255 "
            f"as {window[1]:g} HU (--window)",
        )
    return Inspection(rows, found.in_order(), [*notes, *unchecked], reader)
