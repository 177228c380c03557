"""Series of axial CT slices below folders, whatever their format: which files belong together."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from fibldm import ct, disk, limits, pictures, volumes
from fibldm.files import LeftOut, find_files, json_object, natural, stem
from fibldm.headers import Header, arrange, read_all_headers
from fibldm.tables import (
    OF_SLICES,
    SPLITS,
    Row,
    check_files,
    check_patients,
    label_columns,
    list_some,
    read_csv,
)


@dataclass(frozen=True)
class Options:
    """What the user says of files that do not say it themselves.

    Records of prepared series hold a hash of its `repr`: a field more, and all are made again.
    """

    patient_pattern: str | None = None  # its first group, of a path below the input, is the patient
    mask_suffix: str | None = None  # stem + suffix names a file's mask
    variable: str | None = None  # in MAT and NPZ files
    array_axes: str | None = None  # of arrays: z head to feet, y front to back, x right to left
    rescale: tuple[float, float] | None = None
    window: ct.Window = ct.DEFAULT_WINDOW
    trust_hu: bool = False  # values need not look like chest CT


@dataclass(frozen=True)
class Source:
    """Where one slice, or a volume of them, is stored, and what is known of it beforehand."""

    path: Path
    header: Header | None = None
    mask: Path | None = None
    rescale: tuple[float, float] | None = None
    position: float | None = None
    spacing: float | None = None
    label: str = ""
    split: str = ""


@dataclass
class Series:
    """Slices of one patient that belong together, from head to feet.

    place: where it was found, or its SeriesInstanceUID. contents: what identifies each of its files
    whatever their names. fingerprint: all that its slices follow from. top: the input that it lies
    below. study: its DICOM study. nameless: whether the study stands for an absent PatientID.
    person: birth date, sex and name, "" where unknown. All these identify people: they stay in
    memory and on the user's terminal.
    """

    kind: str  # dicom, table, images or volume
    name: str
    patient: str
    place: str
    sources: list[Source]
    contents: list[str]
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    top: str = ""
    study: str = ""
    nameless: bool = False
    person: tuple[str, ...] = ("", "", "")


def find_series(
    inputs: Sequence[Path], exclude: Path, options: Options, workers: int = 1
) -> tuple[list[Series], list[LeftOut]]:
    """All series below the inputs but not below `exclude`, and the files that are left out.

    `workers` processes read the headers of DICOM files. Raises ValueError for an input that is
    missing.
    """
    files, left_out = find_files(inputs, exclude)
    search = _Search(options, left_out)
    tables = {p.resolve().parent: p for p, _ in files if p.name.lower() == "label.csv"}
    _require_tables_above({path.resolve() for path, _ in files}, inputs)
    for table in tables.values():
        search.add_table(table)

    # Files by their kind; masks apart.
    kinds: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
    others: dict[str, list[Path]] = defaultdict(list)
    for path, top in files:
        if path.resolve() in search.taken:
            continue
        try:
            kind = volumes.kind_of(path)
            is_mask = options.mask_suffix and stem(path).endswith(options.mask_suffix)
            if kind == "jpeg" and not is_mask:
                raise ValueError("a JPEG picture, whose HU are lost")
        except ValueError as error:
            search.leave_out(path, error)
            continue
        owner = next((tables[p] for p in path.resolve().parents if p in tables), None)
        if kind and owner:
            search.leave_out(path, f"not listed: in {owner}, whose folder it lies in")
            continue
        if kind and is_mask:
            search.masks[path.parent, stem(path).removesuffix(options.mask_suffix)] = path
        elif kind:
            kinds[kind].append((path, top))
        elif path.name != "dataset.json":
            others[path.suffix].append(path)

    search.add_dicom(kinds.pop("dicom", []), workers)
    search.add_arrays(sorted(item for group in kinds.values() for item in group))
    for path in search.masks.values():
        search.leave_out(path, "a mask without an image")
    for suffix, paths in others.items():
        what = f"{len(paths)} files {suffix or 'without suffix'}, as {paths[0].name}"
        search.leave_out(paths[0].parent, f"of a kind that is not read: {what}")
    return search.series, search.left_out


def _require_tables_above(files: set[Path], inputs: Sequence[Path]) -> None:
    """ValueError where a label.csv above the inputs lists some of their files."""
    for folder in {parent for top in inputs for parent in top.resolve().parents}:
        table = folder / "label.csv"
        if table in files or not table.is_file():
            continue
        try:
            listed = label_columns(table, read_csv(table))[0]["image"]
        except (OSError, ValueError):  # of something else
            continue
        if any((folder / name).resolve() in files for name in listed if limits.inside(name)):
            raise ValueError(
                f"{table} lists files of the inputs, and lies outside of them: give {folder}, so "
                "that its patients, splits and contours are taken"
            )


def _hash(*values) -> str:
    return hashlib.sha256(repr(values).encode("utf-8", "surrogateescape")).hexdigest()


def _scale(path: Path, top: Path, options: Options) -> tuple[float, float] | None:
    """The scale that is given, or that of the nearest dataset.json between a file and its input.

    Other programs have a dataset.json, too: one without a scale is none.
    """
    if options.rescale is not None:
        return options.rescale
    for folder in path.parents:
        if json_object(folder / "dataset.json").keys() & {"rescale_slope", "rescale_intercept"}:
            return ct.read_rescale(folder)
        if folder == top:
            break
    return None


def patient_of(path: Path, top: Path, options: Options, default: str) -> str:
    """The patient by --patient_pattern, else `default`; ValueError where it does not match."""
    if options.patient_pattern is None:
        return default
    relative = path.relative_to(top).as_posix()
    match = re.search(options.patient_pattern, relative)
    if match is None or not match.group(1):
        raise ValueError(
            f"{path}: no patient found by --patient_pattern {options.patient_pattern!r}"
        )
    return match.group(1)


class _Search:
    """The series that are found, file by file, and what is left out."""

    def __init__(self, options: Options, left_out: list[LeftOut]) -> None:
        self.options, self.left_out = options, left_out
        self.series: list[Series] = []
        self.taken: set[Path] = set()  # files, links resolved, that tables name
        self.masks: dict[tuple[Path, str], Path] = {}  # by folder and stem of the image
        self.copies: dict[str, Path] = {}  # content -> the first file that has it

    def leave_out(self, where: Path | str, reason: str | Exception) -> None:
        if isinstance(reason, OSError):
            reason = f"cannot be opened: {reason.strerror}"
        self.left_out.append(LeftOut(str(where), str(reason).removeprefix(f"{where}: ")))

    def identify(self, path: Path) -> str:
        """SHA-256 of a file; ValueError where another file holds the same."""
        content = disk.file_hash(path)
        if content in self.copies:
            raise ValueError(f"a copy: of {self.copies[content]}")
        return content

    def add_table(self, table: Path) -> None:
        """The rows of a label.csv by patient. Raises ValueError where it cannot be resolved."""
        try:
            frame, notes = label_columns(table, read_csv(table))
            rescale = self.options.rescale or ct.read_rescale(table.parent)
            rows = _table_rows(table, frame)
        except ValueError as error:
            raise ValueError(
                f"{error}\nA label.csv is taken whole or not at all: its slices would lose their "
                "patients, splits and contours. Correct it; or rename it, if it is no table of "
                "slices"
            ) from error
        unused = [
            name for name in frame.columns if name not in ("", "image", "contour", *OF_SLICES)
        ]
        if unused:
            notes.append(f"{table}: columns {unused} are not copied")
        self.taken |= {table.resolve(), *(path.resolve() for row in rows for path in row.files)}
        groups: dict[str, list[tuple]] = defaultdict(list)
        for row in rows:
            image, mask = row.files[0], row.files[1] if row.files[1:] else None
            try:
                content, of_mask = self.identify(image), disk.file_hash(mask) if mask else None
            except (OSError, ValueError) as error:
                self.leave_out(image, error)
                continue
            self.copies[content] = image
            source = Source(image, None, mask, rescale, *row.told)
            groups[row.patient].append((source, content, (of_mask, rescale, row.told)))
        for patient, group in groups.items():
            sources, contents, facts = (list(part) for part in zip(*group, strict=True))
            name, fingerprint = f"{table} ({patient})", _hash(contents, facts)
            self.series.append(
                Series("table", name, patient, str(table), sources, contents, fingerprint, notes)
            )
            notes = []

    def add_dicom(self, files: list[tuple[Path, Path]], workers: int) -> None:
        """DICOM files, each with its input's folder, by SeriesInstanceUID, in order."""
        groups: dict[tuple[str, str], list[Header]] = defaultdict(list)
        tops = dict(files)
        for path, headers in zip(tops, read_all_headers(list(tops), workers), strict=True):
            if isinstance(headers, str):
                self.leave_out(path, headers)
                continue
            for header in headers:  # some software gives one SeriesInstanceUID to several studies
                groups[header.series, header.study].append(header)
        studies = Counter(uid for uid, _ in groups)
        for (uid, study), headers in groups.items():
            folder = os.path.commonpath([header.path.parent for header in headers])
            try:
                kept, out, notes = arrange(headers)
                found = {patient_of(h.path, tops[h.path], self.options, ""): h.path for h in kept}
                if len(found) > 1:
                    names = ", ".join(f"{name} ({path})" for name, path in found.items())
                    raise ValueError(f"{len(found)} patients in one series by the pattern: {names}")
                self.left_out += [LeftOut(where, reason) for where, reason in out]
                if not kept:
                    continue
                masks = self.take_masks(kept)
                states = [header.path.stat() for header in kept]
                facts = [(h.uid, h.corner, h.spacing, h.orientation) for h in kept]
                facts += [(state.st_size, state.st_mtime_ns) for state in states]
                hashes = {mask: disk.file_hash(mask) for mask in set(masks) if mask}
                facts += [hashes[mask] for mask in masks if mask]
            except (OSError, ValueError) as error:
                self.leave_out(f"{folder} (series {uid})", error)
                continue
            sources = [Source(h.path, h, mask) for h, mask in zip(kept, masks, strict=True)]
            contents = [f"{h.study} {h.series} {h.uid}" for h in kept]
            fingerprint = _hash(facts)
            first = max(kept, key=lambda header: (bool(header.patient), bool(header.name)))
            patient = next(iter(found)) or first.patient or first.name
            self.series.append(
                Series(
                    "dicom",
                    folder,
                    patient or f"study {study}",
                    uid if studies[uid] == 1 else f"{uid} of {study}",
                    sources,
                    contents,
                    fingerprint,
                    notes,
                    study=study,
                    nameless=not patient,
                    person=(*first.person, first.name),
                )
            )

    def take_masks(self, headers: list[Header]) -> list[Path | None]:
        """The mask of each file of a series: its own, or one NIfTI file of all in their folder."""
        paths = dict.fromkeys(header.path for header in headers)  # one may have several frames
        own = {path: self.masks.pop((path.parent, stem(path)), None) for path in paths}
        folder = headers[0].path.parent
        whole = [
            key
            for key, path in self.masks.items()
            if key[0] == folder and volumes.kind_of(path) == "nifti"
        ]
        if not any(own.values()) and len(whole) == 1:
            own = dict.fromkeys(own, self.masks.pop(whole[0]))
        return [own[header.path] for header in headers]

    def add_arrays(self, files: list[tuple[Path, Path]]) -> None:
        """Volume files, each a series, and 2D files by folder and patient."""
        flat: dict[tuple[Path, str, str], list[tuple]] = defaultdict(list)
        deep: list[tuple] = []
        for path, top in files:
            try:
                is_volume = volumes.dimensions(path, self.options.variable) == 3
                inside = path.parent.relative_to(top)
                folder = str(inside) if inside.parts else top.name
                is_nifti = volumes.kind_of(path) == "nifti"
                rescale = None if is_nifti else _scale(path, top, self.options)
                mask = self.masks.pop((path.parent, stem(path)), None)
                of_mask = disk.file_hash(mask) if mask else None
                patient = patient_of(path, top, self.options, "" if is_volume else folder)
                content = self.identify(path)
                if volumes.kind_of(path) == "tiff" and pictures.is_of_several_files(path):
                    patient = patient or folder
            except (OSError, ValueError) as error:
                self.leave_out(path, error)
                continue
            self.copies[content] = path
            item = Source(path, None, mask, rescale), content, _hash(content, of_mask, rescale)
            if is_volume:
                deep.append((*item, patient, folder, str(top)))
            else:
                flat[path.parent, patient, str(top)].append(item)

        # A volume is named by its file, or by its folder where others have a file of that name.
        folders, stems = defaultdict(set), defaultdict(set)
        for source, *_ in deep:
            folders[stem(source.path)].add(source.path.parent)
            stems[source.path.parent].add(stem(source.path))
        for source, content, fingerprint, patient, folder, top in deep:
            name, place = stem(source.path), str(source.path)
            if len(stems[source.path.parent]) > 1:
                folder = f"{folder}/{name}"
            patient = patient or (name if len(folders[name]) == 1 else folder)
            of = [source], [content], fingerprint
            self.series.append(Series("volume", place, patient, place, *of, top=top))
        for (folder, patient, top), group in flat.items():
            group.sort(key=lambda item: natural(item[0].path.name))
            sources, contents, facts = (list(part) for part in zip(*group, strict=True))
            name = str(folder)
            of = sources, contents, _hash(facts)
            self.series.append(Series("images", name, patient, name, *of, top=top))


@dataclass(frozen=True)
class _TableRow:
    """A line of label.csv; files: image, and contour where there is one. told: as `Source` has it:
    position, spacing, label, split.
    """

    patient: str
    files: tuple[Path, ...]
    told: tuple[float | None, float | None, str, str]


def _table_rows(table: Path, frame: pd.DataFrame) -> list[_TableRow]:
    """The rows of a table with the columns of label.csv; ValueError, with its lines, where files
    are missing, numbers or splits are none, a patient is in two splits, or there is no row.
    """
    if not len(frame):
        raise ValueError(f"{table}: 1 lines; expected a header and a line a slice")
    problems = check_files(table, table.parent, frame, contours=False)
    if problems:
        raise ValueError(problems[0].message)
    rows, bad = [], []
    for line, *cells in frame.itertuples(name=None):
        cell = dict(zip(frame.columns, cells, strict=True))
        patient, split = cell["patient_id"] or cell["image"], cell["split"].lower()
        try:
            told = *(_number(cell, name) for name in ("position", "pixel_spacing")), cell["label"]
            if split not in ("", *SPLITS):
                raise ValueError(f"split {cell['split']!r}, expected one of {', '.join(SPLITS)}")
        except ValueError as error:
            bad.append(f"line {line}: {error}")
            continue
        names = [cell[name] for name in ("image", "contour") if cell[name]]
        rows.append(_TableRow(patient, tuple(table.parent / n for n in names), (*told, split)))
    if bad:
        raise ValueError(
            f"{table}: {len(bad)} lines with what is no number or split:{list_some(bad)}"
        )
    owners: dict[Path, str] = {}
    for row in rows:
        if owners.setdefault(row.files[0], row.patient) != row.patient:
            two = f"{owners[row.files[0]]} and {row.patient}"
            raise ValueError(f"{table}: {row.files[0]} is listed as of two patients: {two}")
    torn = check_patients(table, [Row("", "", row.patient, "", row.told[-1]) for row in rows])
    if torn:
        raise ValueError(torn[0].message)
    return rows


def _number(cells: dict[str, str], name: str) -> float | None:
    """A cell of a table as a number, None where it is empty."""
    if not cells.get(name):
        return None
    try:
        value = float(cells[name])
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or (name == "pixel_spacing" and value <= 0):
        raise ValueError(f"{name} {cells[name]!r}, expected a number")
    return value
