"""Series of axial CT slices below folders, whatever their format: found, and read upright in HU."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom

from fibldm import arrays, ct, dicom, nifti
from fibldm.datasets import read_lines
from fibldm.inspection import hu_problem

SAMPLED = 1 << 16  # bytes at the start, the middle and the end that identify a file
NEAR = 1.0  # mm between a slice and its mask's slice, at most


@dataclass(frozen=True)
class Options:
    """What the user says of files that do not say it themselves."""

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
    header: dicom.Header | None = None
    mask: Path | None = None
    rescale: tuple[float, float] | None = None
    position: float | None = None
    spacing: float | None = None
    label: str = ""
    split: str = ""


@dataclass
class Series:
    """Slices of one patient that belong together, from head to feet. `key` is unique to it.

    Patient, key and paths identify people: they stay in memory and on the user's terminal.
    """

    kind: str
    name: str
    patient: str
    key: str
    sources: list[Source]
    fingerprint: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Slice:
    """One upright slice: HU (H, W), mm between rows and between columns, mm towards the head."""

    where: str
    hu: np.ndarray
    spacing: tuple[float, float] | None
    height: float | None
    mask: np.ndarray | None
    source: Source


@dataclass(frozen=True)
class LeftOut:
    """A file, slice or series that is not used, and why: "what: details"."""

    where: str
    reason: str


def find_files(inputs: list[Path], exclude: Path) -> tuple[list[tuple[Path, Path]], list[LeftOut]]:
    """All files below the inputs but those below `exclude`, each with its input's folder.

    Raises ValueError for an input that is missing; folders that may not be read are left out.
    """
    found: dict[Path, Path] = {}
    left_out = []
    for top in inputs:
        if top.is_file():
            found.setdefault(top, top.parent)
            continue
        if not top.is_dir():
            raise ValueError(f"{top}: no such file or folder")

        def refuse(error: OSError) -> None:
            left_out.append(LeftOut(str(error.filename), f"cannot be opened: {error.strerror}"))

        visited = {exclude.resolve()}  # also what links lead back to
        for folder, folders, names in os.walk(top, onerror=refuse, followlinks=True):
            if Path(folder).resolve() in visited:
                folders.clear()
                continue
            visited.add(Path(folder).resolve())
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith("."):
                    found.setdefault(Path(folder) / name, top)
    return list(found.items()), left_out


def stem(path: Path) -> str:
    """The file's name without its suffix; .nii.gz is one."""
    return path.name[:-7] if path.name.lower().endswith(".nii.gz") else path.stem


def find_series(
    inputs: list[Path],
    exclude: Path,
    options: Options,
    read_headers: Callable[[list[Path]], Iterable[list[dicom.Header] | str]],
) -> tuple[list[Series], list[LeftOut]]:
    """All series below the inputs, and the files that are left out.

    `read_headers` maps DICOM files to their headers, or to what is wrong with them: so the caller
    may share that work between processes.
    """
    files, left_out = find_files(inputs, exclude)
    tables = [(path, top) for path, top in files if path.name == "label.csv"]
    series: list[Series] = []
    taken: set[Path] = set()
    for table, top in tables:
        part, used = _table_series(table, top, options, left_out)
        series += part
        taken |= used | {table.resolve()}

    # Files by their kind; masks apart.
    masks: dict[tuple[Path, str], Path] = {}
    kinds: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
    for path, top in files:
        if path.resolve() in taken:
            continue
        try:
            kind = arrays.kind_of(path)
        except ValueError as error:
            left_out.append(_left_out(error, path))
            continue
        suffix = options.mask_suffix
        if kind and suffix and stem(path).endswith(suffix):
            masks[path.parent, stem(path)[: -len(suffix)]] = path
        elif kind:
            kinds[kind].append((path, top))

    series += _dicom_series(kinds.pop("dicom", []), masks, options, read_headers, left_out)
    others = sorted(item for group in kinds.values() for item in group)
    series += _array_series(others, masks, options, left_out)
    left_out += [LeftOut(str(path), "a mask without an image") for path in masks.values()]
    return series, left_out


def patient_of(path: Path, top: Path, options: Options, default: str) -> str:
    """The patient by --patient_pattern, else `default`; ValueError where it does not match."""
    if options.patient_pattern is None:
        return default
    relative = path.relative_to(top).as_posix()
    match = re.search(options.patient_pattern, relative)
    if match is None or not match.group(1):
        raise ValueError(
            f"{path}: --patient_pattern {options.patient_pattern!r} finds no patient in {relative}"
        )
    return match.group(1)


def identify(path: Path) -> str:
    """A hash of a file's size, start, middle and end: what it holds, whatever its name."""
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            for offset in (0, size // 2, max(0, size - SAMPLED)):
                file.seek(offset)
                digest.update(file.read(SAMPLED))
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from error
    return digest.hexdigest()


def _series(kind: str, name: str, patient: str, key: str, sources: list[Source]) -> Series:
    """A series of 2D files, fingerprinted by what they hold and what is known of them."""
    facts = [
        (identify(s.path), s.mask and identify(s.mask), s.rescale, s.position, s.spacing)
        for s in sources
    ]
    return Series(
        kind, name, patient, key, sources, hashlib.sha256(repr(facts).encode()).hexdigest()
    )


def _left_out(error: ValueError, path: Path) -> LeftOut:
    """The error's reason, without the file's name at its start."""
    return LeftOut(str(path), str(error).removeprefix(f"{path}: "))


def _natural(name: str) -> list:
    """Sorts slice_10 behind slice_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _scale(path: Path, top: Path) -> tuple[float, float] | None:
    """The scale of the nearest dataset.json between a file and its input."""
    for folder in path.parents:
        scale = ct.read_rescale(folder)
        if scale is not None or folder == top:
            return scale
    return None


def _array_series(
    files: list[tuple[Path, Path]],
    masks: dict[tuple[Path, str], Path],
    options: Options,
    left_out: list[LeftOut],
) -> Iterator[Series]:
    """Volume files, each a series, and 2D files by folder and patient; adds to `left_out`."""
    flat: dict[tuple[Path, str], list[tuple[Source, Path]]] = defaultdict(list)
    copies: dict[str, Path] = {}
    for path, top in files:
        try:
            volume = arrays.dimensions(path, options.variable) == 3
            inside = path.parent.relative_to(top)
            folder = str(inside) if inside.parts else top.resolve().name
            patient = patient_of(path, top, options, stem(path) if volume else folder)
            rescale = options.rescale or _scale(path, top)
            digest = identify(path)
        except ValueError as error:
            left_out.append(_left_out(error, path))
            continue
        source = Source(path, None, masks.pop((path.parent, stem(path)), None), rescale)
        if not volume:
            flat[path.parent, patient].append((source, top))
        elif digest in copies:
            left_out.append(LeftOut(str(path), f"a copy: of {copies[digest]}"))
        else:
            copies[digest] = path
            yield _series("volume", str(path), patient, digest, [source])
    for (folder, patient), group in flat.items():
        group.sort(key=lambda item: _natural(item[0].path.name))
        first, top = group[0]
        key = f"{folder.relative_to(top)} {patient} {identify(first.path)}"
        yield _series("images", str(folder), patient, key, [source for source, _ in group])


def _dicom_series(
    files: list[tuple[Path, Path]],
    masks: dict[tuple[Path, str], Path],
    options: Options,
    read_headers: Callable[[list[Path]], Iterable[list[dicom.Header] | str]],
    left_out: list[LeftOut],
) -> Iterator[Series]:
    """DICOM files by SeriesInstanceUID, in order; adds to `left_out`."""
    groups: dict[str, list[dicom.Header]] = defaultdict(list)
    tops = dict(files)
    for path, headers in zip(tops, read_headers(list(tops)), strict=True):
        if isinstance(headers, str):
            left_out.append(_left_out(ValueError(headers), path))
            continue
        for header in headers:
            groups[header.series].append(header)
    for uid, headers in groups.items():
        folder = os.path.commonpath([header.path.parent for header in headers])
        try:
            kept, out, notes = dicom.arrange(headers)
            patients = {patient_of(h.path, tops[h.path], options, h.patient): h.path for h in kept}
            if len(patients) > 1:
                raise ValueError(
                    f"--patient_pattern finds {len(patients)} patients in one series: "
                    + ", ".join(f"{name} ({p})" for name, p in patients.items())
                )
        except ValueError as error:
            left_out.append(LeftOut(f"{folder} (series {uid})", str(error)))
            continue
        left_out += [LeftOut(where, reason) for where, reason in out]
        if not kept:
            continue
        own = {h.path: masks.pop((h.path.parent, stem(h.path)), None) for h in kept}
        whole = [
            key
            for key, path in masks.items()
            if key[0] == kept[0].path.parent and arrays.kind_of(path) == "nifti"
        ]
        if not any(own.values()) and len(whole) == 1:  # one mask for all slices, in their folder
            own = dict.fromkeys(own, masks.pop(whole[0]))
        sources = [Source(h.path, h, own[h.path]) for h in kept]
        facts = [(h.uid, h.corner, h.path.stat().st_size) for h in kept]
        facts += [identify(s.mask) for s in sources if s.mask]
        fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()
        yield Series("dicom", folder, next(iter(patients)), uid, sources, fingerprint, notes)


def _table_series(
    table: Path, top: Path, options: Options, left_out: list[LeftOut]
) -> tuple[list[Series], set[Path]]:
    """The rows of a label.csv by patient, and the files it names; adds to `left_out`."""
    lines = [line for _, line in read_lines(table)]
    header = [name.lower() for name in lines[0]] if lines else []
    if "image" not in header:  # as the stages take it
        header[:2] = ["image", "contour"][: len(header)]
    rescale = options.rescale or ct.read_rescale(table.parent)
    groups: dict[str, list[Source]] = defaultdict(list)
    used: set[Path] = set()
    for line in lines[1:]:
        cells = dict(zip(header, line, strict=False))
        path = table.parent / cells["image"]
        mask = table.parent / cells["contour"] if cells.get("contour") else None
        missing = [str(p) for p in (path, mask) if p and not p.is_file()]
        if missing:
            left_out.append(LeftOut(str(path), f"missing, listed in {table}: {missing[0]}"))
            continue
        used |= {p.resolve() for p in (path, mask) if p}
        numbers = (cells.get("position") or None, cells.get("pixel_spacing") or None)
        try:
            position, spacing = (None if text is None else float(text) for text in numbers)
        except ValueError:
            raise ValueError(
                f"{table}: {cells['image']}: position and pixel_spacing {numbers}, expected numbers"
            ) from None
        told = position, spacing, cells.get("label", ""), cells.get("split", "")
        patient = cells.get("patient_id") or cells["image"]
        groups[patient].append(Source(path, None, mask, rescale, *told))
    place = table.relative_to(top)
    return [
        _series(
            "table",
            f"{table} ({patient})",
            patient,
            f"{place} {patient} {identify(part[0].path)}",
            part,
        )
        for patient, part in groups.items()
    ], used


# Reading.


def read_series(series: Series, options: Options) -> Iterator[Slice | LeftOut]:
    """The slices of a series, upright and from head to feet; or why one of them can't be used.

    Raises ValueError where nothing of the series can be.
    """
    if series.kind == "volume":
        yield from _read_volume(series.sources[0], options)
        return
    opened: dict = {}  # the file read last: a multi-frame one holds the next slices too
    for source in series.sources:
        where = source.header.where if source.header else str(source.path)
        try:
            if source.header is not None:
                yield _read_dicom(source, options, opened)
            else:
                yield _read_picture(source, series.kind, options)
        except ValueError as error:
            yield LeftOut(where, str(error).removeprefix(f"{source.path}: "))


def _read_dicom(source: Source, options: Options, opened: dict) -> Slice:
    header = source.header
    try:
        if opened.get("path") != source.path:
            opened |= {"path": source.path, "file": pydicom.dcmread(source.path, force=True)}
        hu = dicom.read_frame(opened["file"], header.frame)
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(f"{source.path}: {error}") from error
    hu, mask = dicom.upright(hu, header.orientation), None
    if source.mask is not None and arrays.kind_of(source.mask) == "nifti":
        if opened.get("mask") != source.mask:
            opened |= {"mask": source.mask, "volume": nifti.read_volume(source.mask)}
        mask = _at_height(source.mask, *opened["volume"], header.height)
    elif source.mask is not None:
        mask = dicom.upright(ct.read_contour(source.mask)[0], header.orientation)
    mask = _same_shape(mask, hu, source.mask)
    turned = abs(header.orientation[0]) < abs(header.orientation[1])
    spacing = header.spacing[::-1] if header.spacing and turned else header.spacing
    return Slice(header.where, hu, spacing, header.height, mask, source)


def _at_height(
    path: Path, values: np.ndarray, _: object, heights: np.ndarray | None, height: float
) -> np.ndarray:
    """The slice of a mask's volume at a height in mm, bool (H, W)."""
    if heights is None:
        raise ValueError(f"{path}: its header has no orientation, expected one")
    nearest = int(np.abs(heights - height).argmin())
    if abs(heights[nearest] - height) > NEAR:
        raise ValueError(
            f"{path}: no slice at {height:.1f} mm, where the image lies; the nearest is at "
            f"{heights[nearest]:.1f} mm"
        )
    return ct.as_mask(values[nearest])


def _read_picture(source: Source, kind: str, options: Options) -> Slice:
    """A 2D file and its mask. Those of a table are read as the stages read them."""
    mask = None
    if kind == "table":
        hu = ct.read_hu(source.path, source.rescale, options.window)
        if source.mask is not None:
            mask = ct.read_contour(source.mask)[0]
    else:
        values = arrays.read(source.path, options.variable, options.array_axes)[0]
        hu = ct.scale_to_hu(values, source.path, source.rescale, options.window)
        if source.mask is not None:
            mask = ct.as_mask(arrays.read(source.mask, None, options.array_axes)[0])
    problem = None if options.trust_hu else hu_problem(hu)
    if problem:
        raise ValueError(problem)
    mask = _same_shape(mask, hu, source.mask)
    spacing = (source.spacing, source.spacing) if source.spacing else None
    return Slice(str(source.path), hu, spacing, None, mask, source)


def _read_volume(source: Source, options: Options) -> Iterator[Slice]:
    hu, spacing, heights = _load(source.path, source.rescale, options)
    mask = None
    if source.mask is not None:
        values, _, mask_heights = _load(source.mask, (1.0, 0.0), options)
        mask = _same_shape(ct.as_mask(values), hu, source.mask)
        if heights is not None and mask_heights is not None:
            shift = np.abs(heights - mask_heights).max()
            if shift > NEAR:
                raise ValueError(
                    f"{source.mask}: its slices lie up to {shift:.1f} mm from those of "
                    f"{source.path}, expected the same places"
                )
    for i, image in enumerate(hu):
        height = None if heights is None else float(heights[i])
        part = None if mask is None else mask[i]
        yield Slice(f"{source.path} slice {i + 1}", image, spacing, height, part, source)


def _load(
    path: Path, rescale: tuple[float, float] | None, options: Options
) -> tuple[np.ndarray, tuple[float, float] | None, np.ndarray | None]:
    """HU (D, H, W), mm between rows and columns, mm towards the head (D,): `nifti.read_volume`."""
    if arrays.kind_of(path) != "nifti":
        values = arrays.read(path, options.variable, options.array_axes)
        return ct.scale_to_hu(values, path, rescale, options.window), None, None
    hu, spacing, heights = nifti.read_volume(path)
    if heights is None:
        if options.array_axes is None:
            raise ValueError(
                f"{path}: its header has no orientation (sform_code and qform_code are 0); give "
                "--array_axes"
            )
        hu = arrays.orient(hu, path, options.array_axes)
    if not np.isfinite(hu).all():
        raise ValueError(f"{path}: {int((~np.isfinite(hu)).sum())} values are not finite")
    return np.where(hu < dicom.OUTSIDE, np.float32(dicom.AIR), hu), spacing, heights


def _same_shape(mask: np.ndarray | None, hu: np.ndarray, path: Path | None) -> np.ndarray | None:
    if mask is not None and mask.shape != hu.shape:
        raise ValueError(f"{path}: a mask of {mask.shape} pixels, expected {hu.shape}: its image's")
    return mask
