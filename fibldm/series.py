"""Series of axial CT slices below folders, whatever their format: found, and read upright in HU."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fibldm import ct, dicom, limits, volumes
from fibldm.anatomy import hu_problem
from fibldm.tables import SPLITS, read_csv

SUFFIXES = (
    *(".nii.gz", ".nii", ".dcm", ".dicom", ".ima", ".png", ".tif", ".tiff"),
    *(".npy", ".npz", ".mat"),
)
NEAR = 1.0  # mm between an image and its mask, at most


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
    """Slices of one patient that belong together, from head to feet.

    place: where it was found, or its SeriesInstanceUID. contents: what identifies each of its files
    whatever their names. fingerprint: all that its slices follow from. These, patient and paths
    identify people: they stay in memory and on the user's terminal.
    """

    kind: str  # dicom, table, images or volume
    name: str
    patient: str
    place: str
    sources: list[Source]
    contents: list[str]
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


def find_series(
    inputs: list[Path],
    exclude: Path,
    options: Options,
    read_headers: Callable[[list[Path]], Iterable[list[dicom.Header] | str]],
) -> tuple[list[Series], list[LeftOut]]:
    """All series below the inputs but not below `exclude`, and the files that are left out.

    `read_headers` maps DICOM files to their headers, or to what is wrong with them: so the caller
    may share that work between processes. Raises ValueError for an input that is missing.
    """
    files, left_out = find_files(inputs, exclude)
    series: list[Series] = []
    taken: set[Path] = set()  # by tables
    copies: dict[str, Path] = {}  # content -> the first file that has it
    for table, top in files:
        if table.name != "label.csv":
            continue
        taken.add(table.resolve())
        try:
            part, used = _table_series(table, top, options, copies, left_out)
            series += part
            taken |= used
        except ValueError as error:
            left_out.append(_left_out(error, table))
            taken |= {path.resolve() for path, _ in files if path.is_relative_to(table.parent)}

    # Files by their kind; masks apart.
    masks: dict[tuple[Path, str], Path] = {}
    kinds: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
    others: dict[str, list[Path]] = defaultdict(list)
    for path, top in files:
        if path.resolve() in taken:
            continue
        try:
            kind = volumes.kind_of(path)
            if kind == "jpeg":
                raise ValueError(f"{path}: a JPEG picture, whose HU are lost")
        except ValueError as error:
            left_out.append(_left_out(error, path))
            continue
        suffix = options.mask_suffix
        if kind and suffix and stem(path).endswith(suffix):
            masks[path.parent, stem(path)[: -len(suffix)]] = path
        elif kind:
            kinds[kind].append((path, top))
        elif path.name != "dataset.json":
            others[path.suffix].append(path)

    series += _dicom_series(kinds.pop("dicom", []), masks, options, read_headers, left_out)
    rest = sorted(item for group in kinds.values() for item in group)
    series += _array_series(rest, masks, options, copies, left_out)
    left_out += [LeftOut(str(path), "a mask without an image") for path in masks.values()]
    for suffix, paths in others.items():
        what = f"{len(paths)} files {suffix or 'without suffix'}, as {paths[0].name}"
        left_out.append(LeftOut(str(paths[0].parent), f"of a kind that is not read: {what}"))
    return series, left_out


def find_files(inputs: list[Path], exclude: Path) -> tuple[list[tuple[Path, Path]], list[LeftOut]]:
    """All files below the inputs, each once and with its input's folder; absolute paths.

    Hidden files, what lies below `exclude`, and earlier outputs of prepare_data.py are not among
    them; folders that may not be read are left out. ValueError for an input that is missing.
    """
    found: dict[Path, tuple[Path, Path]] = {}  # links resolved -> path, input
    left_out: list[LeftOut] = []
    for top in (Path(os.path.abspath(top)) for top in inputs):
        if top.is_file():
            found.setdefault(top.resolve(), (top, top.parent))
            continue
        if not top.is_dir():
            raise ValueError(f"{top}: no such file or folder")

        def refuse(error: OSError) -> None:
            left_out.append(LeftOut(str(error.filename), f"cannot be opened: {error.strerror}"))

        visited = {exclude.resolve()}  # also what links lead back to
        for name, folders, names in os.walk(top, onerror=refuse, followlinks=True):
            folder = Path(name)
            is_output = folder != top and _json(folder / "dataset.json").get("key_check")
            if is_output:
                left_out.append(LeftOut(name, "an output of prepare_data.py"))
            if is_output or folder.resolve() in visited:
                folders.clear()
                continue
            visited.add(folder.resolve())
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (folder / name for name in sorted(names) if not name.startswith(".")):
                if path.is_file():
                    found.setdefault(path.resolve(), (path, top))
    return list(found.values()), left_out


def stem(path: Path) -> str:
    """The file's name without the suffix of its format: no other part of a dotted name is one."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def identify(path: Path) -> str:
    """SHA-256 of what a file holds."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from error


def _hash(*facts) -> str:
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()


def _left_out(error: ValueError, path: Path) -> LeftOut:
    """The error's reason, without the file's name at its start."""
    return LeftOut(str(path), str(error).removeprefix(f"{path}: "))


def _natural(name: str) -> list:
    """Sorts slice_10 behind slice_9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _json(path: Path) -> dict:
    """A JSON file's object; empty where there is none."""
    try:
        content = limits.read_json(path) if path.is_file() else {}
    except (OSError, ValueError):
        content = {}
    return content if isinstance(content, dict) else {}


def _scale(path: Path, top: Path, options: Options) -> tuple[float, float] | None:
    """The scale that is given, or that of the nearest dataset.json between a file and its input.

    Other programs have a dataset.json, too: one without a scale is none.
    """
    if options.rescale is not None:
        return options.rescale
    for folder in path.parents:
        if _json(folder / "dataset.json").keys() & {"rescale_slope", "rescale_intercept"}:
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
            found = {patient_of(h.path, tops[h.path], options, h.patient): h.path for h in kept}
            if len(found) > 1:
                names = ", ".join(f"{name} ({path})" for name, path in found.items())
                raise ValueError(f"{len(found)} patients in one series by the pattern: {names}")
            left_out += [LeftOut(where, reason) for where, reason in out]
            if not kept:
                continue
            own = _dicom_masks(kept, masks)
            sources = [Source(header.path, header, own[header.path]) for header in kept]
            states = [header.path.stat() for header in kept]
            facts = [(h.uid, h.corner, h.spacing, h.orientation) for h in kept]
            facts += [(state.st_size, state.st_mtime_ns) for state in states]
            facts += [identify(s.mask) for s in sources if s.mask]
        except (OSError, ValueError) as error:
            left_out.append(LeftOut(f"{folder} (series {uid})", str(error)))
            continue
        contents = [header.uid for header in kept]
        patient = next(iter(found))
        yield Series("dicom", folder, patient, uid, sources, contents, _hash(facts), notes)


def _dicom_masks(
    headers: list[dicom.Header], masks: dict[tuple[Path, str], Path]
) -> dict[Path, Path | None]:
    """The mask of each file of a series: its own, or one NIfTI file of all in their folder."""
    own = {h.path: masks.pop((h.path.parent, stem(h.path)), None) for h in headers}
    folder = headers[0].path.parent
    whole = [
        key for key, path in masks.items() if key[0] == folder and volumes.kind_of(path) == "nifti"
    ]
    if not any(own.values()) and len(whole) == 1:
        own = dict.fromkeys(own, masks.pop(whole[0]))
    return own


def _array_series(
    files: list[tuple[Path, Path]],
    masks: dict[tuple[Path, str], Path],
    options: Options,
    copies: dict[str, Path],
    left_out: list[LeftOut],
) -> Iterator[Series]:
    """Volume files, each a series, and 2D files by folder and patient; adds to `left_out`."""
    flat: dict[tuple[Path, str], list[tuple]] = defaultdict(list)
    deep: list[tuple] = []
    for path, top in files:
        try:
            is_volume = volumes.dimensions(path, options.variable) == 3
            inside = path.parent.relative_to(top)
            folder = str(inside) if inside.parts else top.name
            rescale = None
            if volumes.kind_of(path) != "nifti":
                rescale = _scale(path, top, options)
            mask = masks.pop((path.parent, stem(path)), None)
            content, of_mask = identify(path), identify(mask) if mask else None
            patient = patient_of(path, top, options, "" if is_volume else folder)
        except ValueError as error:
            left_out.append(_left_out(error, path))
            continue
        if content in copies:
            left_out.append(LeftOut(str(path), f"a copy: of {copies[content]}"))
            continue
        copies[content] = path
        source = Source(path, None, mask, rescale)
        item = source, content, _hash(content, of_mask, rescale)
        if is_volume:
            deep.append((*item, patient, folder))
        else:
            flat[path.parent, patient].append(item)

    # A volume is named by its file, or by its folder where several have that name.
    names = Counter(stem(source.path) for source, *_ in deep)
    for source, content, facts, patient, folder in deep:
        name = stem(source.path)
        patient = patient or (name if names[name] == 1 else folder)
        place = str(source.path)
        yield Series("volume", place, patient, place, [source], [content], facts)
    for (folder, patient), group in flat.items():
        group.sort(key=lambda item: _natural(item[0].path.name))
        sources, contents, facts = (list(part) for part in zip(*group, strict=True))
        name = str(folder)
        yield Series("images", name, patient, name, sources, contents, _hash(facts))


def _table_series(
    table: Path, top: Path, options: Options, copies: dict[str, Path], left_out: list[LeftOut]
) -> tuple[list[Series], set[Path]]:
    """The rows of a label.csv by patient, and the files it names; adds to `left_out`."""
    frame = read_csv(table)
    header = [name.lower() for name in frame.columns]
    if "image" not in header:  # as the stages take it
        header[:2] = ["image", "contour"][: len(header)]
    rescale = options.rescale or ct.read_rescale(table.parent)
    groups: dict[str, list[tuple]] = defaultdict(list)
    used: set[Path] = set()
    for line in frame.itertuples(index=False):
        cells = dict(zip(header, line, strict=True))
        path = table.parent / cells.get("image", "")
        mask = table.parent / cells["contour"] if cells.get("contour") else None
        try:
            outside = [n for n in (cells.get("image", ""), cells.get("contour")) if n]
            outside = [name for name in outside if not limits.inside(name)]
            if outside:
                raise ValueError(f"a path out of the table's folder: {outside[0]}")
            missing = [str(p) for p in (path, mask) if p and not p.is_file()]
            if missing:
                raise ValueError(f"missing, listed in {table}: {missing[0]}")
            used |= {p.resolve() for p in (path, mask) if p}
            numbers = [_number(cells, name) for name in ("position", "pixel_spacing")]
            if cells.get("split", "").lower() not in ("", *SPLITS):
                raise ValueError(f"split {cells['split']!r}, expected one of {', '.join(SPLITS)}")
            content, of_mask = identify(path), identify(mask) if mask else None
            if content in copies:
                raise ValueError(f"a copy: of {copies[content]}")
        except (OSError, ValueError) as error:
            left_out.append(_left_out(ValueError(error), path))
            continue
        copies[content] = path
        told = *numbers, cells.get("label", ""), cells.get("split", "").lower()
        source = Source(path, None, mask, rescale, *told)
        patient = cells.get("patient_id") or cells["image"]
        groups[patient].append((source, content, (of_mask, rescale, told)))
    series = []
    for patient, group in groups.items():
        sources, contents, facts = (list(part) for part in zip(*group, strict=True))
        name, place = f"{table} ({patient})", str(table)
        series.append(
            Series("table", name, patient, place, sources, contents, _hash(contents, facts))
        )
    return series, used


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
            opened |= {"path": source.path, "file": dicom.read_file(source.path)}
        hu = dicom.read_frame(opened["file"], header.frame)
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(f"{source.path}: {error}") from error
    hu, mask = dicom.upright(hu, header.orientation), None
    if source.mask is not None and volumes.kind_of(source.mask) == "nifti":
        if opened.get("mask") != source.mask:
            opened |= {"mask": source.mask, "volume": volumes.decode(source.mask)}
        mask = _at_slice(source.mask, opened["volume"], header)
    elif source.mask is not None:
        mask = dicom.upright(ct.read_contour(source.mask)[0], header.orientation)
    mask = _same_shape(mask, hu, source.mask)
    turned = abs(header.orientation[0]) < abs(header.orientation[1])
    spacing = header.spacing[::-1] if header.spacing and turned else header.spacing
    return Slice(header.where, hu, spacing, header.height, mask, source)


def _at_slice(path: Path, mask: volumes.Volume, header: dicom.Header) -> np.ndarray:
    """The slice of a mask's volume where a DICOM slice lies, bool (H, W)."""
    if mask.heights is None:
        raise ValueError(f"{path}: its header has no orientation, expected one")
    nearest = int(np.abs(mask.heights - header.height).argmin())
    shift = *(mask.corner - header.corner_upright), mask.heights[nearest] - header.height
    _require_near(path, shift, header.where)
    return ct.as_mask(mask.values[nearest])


def _require_near(path: Path, shift: Iterable[float], where: str) -> None:
    shift = np.array([float(mm) for mm in shift])
    if np.abs(shift).max() > NEAR:
        raise ValueError(
            f"{path}: lies {', '.join(f'{mm:.1f}' for mm in shift)} mm (to the left, the back, the "
            f"head) from {where}, expected the same place"
        )


def _read_picture(source: Source, kind: str, options: Options) -> Slice:
    """A 2D file and its mask. Those of a table are read as the stages read them."""
    mask = height = None
    spacing = (source.spacing, source.spacing) if source.spacing else None
    if kind == "table":
        hu = ct.read_hu(source.path, source.rescale, options.window)
        if source.mask is not None:
            mask = ct.read_contour(source.mask)[0]
    else:
        volume = _read_hu(source.path, source.rescale, options)
        hu, spacing = volume.values[0], volume.spacing
        height = None if volume.heights is None else float(volume.heights[0])
        if source.mask is not None:
            mask = ct.as_mask(_read_mask(source.mask, options).values[0])
    problem = None if options.trust_hu else hu_problem(hu)
    if problem:
        raise ValueError(problem)
    mask = _same_shape(mask, hu, source.mask)
    return Slice(str(source.path), hu, spacing, height, mask, source)


def _read_volume(source: Source, options: Options) -> Iterator[Slice]:
    volume, masks = _read_hu(source.path, source.rescale, options), None
    heights = [None] * len(volume.values) if volume.heights is None else volume.heights
    if source.mask is not None:
        mask = _read_mask(source.mask, options)
        masks = _same_shape(ct.as_mask(mask.values), volume.values, source.mask)
        if volume.heights is not None and mask.heights is not None:
            furthest = np.abs(volume.heights - mask.heights).argmax()
            shift = *(mask.corner - volume.corner), (mask.heights - volume.heights)[furthest]
            _require_near(source.mask, shift, str(source.path))
    for i, (image, height) in enumerate(zip(volume.values, heights, strict=True)):
        part = None if masks is None else masks[i]
        yield Slice(f"{source.path} slice {i + 1}", image, volume.spacing, height, part, source)


def _read_mask(path: Path, options: Options) -> volumes.Volume:
    """A mask's values as stored, upright; in an NPZ or MAT file the only array."""
    return _read_hu(path, (1.0, 0.0), replace(options, variable=None))


def _read_hu(path: Path, rescale: tuple[float, float] | None, options: Options) -> volumes.Volume:
    """HU of a slice or volume file, upright and from head to feet."""
    volume = volumes.read_volume(path, options.variable, options.array_axes)
    rescale = (1.0, 0.0) if volume.is_hu else rescale
    hu = ct.scale_to_hu(volume.values, path, rescale, options.window)
    if volume.is_hu:
        hu = np.where(hu < dicom.OUTSIDE, np.float32(dicom.AIR), hu)
    return replace(volume, values=hu)


def _same_shape(mask: np.ndarray | None, hu: np.ndarray, path: Path | None) -> np.ndarray | None:
    if mask is not None and mask.shape != hu.shape:
        raise ValueError(f"{path}: a mask of {mask.shape} pixels, expected {hu.shape}: its image's")
    return mask
