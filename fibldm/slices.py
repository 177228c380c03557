"""The slices of a series: read upright in HU, fitted into squares, written with their lungs."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fibldm import ct, dicom, disk, volumes
from fibldm.anatomy import hu_problem
from fibldm.lungs import lung_mask
from fibldm.series import LeftOut, Options, Series, Source

INTERCEPT = -1024  # HU of a stored 0
MAX_HU = 32767
NEAR = 1.0  # mm between an image and its mask, at most


# Reading.


@dataclass(frozen=True)
class Slice:
    """One upright slice: HU (H, W), mm between rows and between columns, mm towards the head."""

    where: str
    hu: np.ndarray
    spacing: tuple[float, float] | None
    height: float | None
    mask: np.ndarray | None
    source: Source


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
                yield _read_dicom(source, opened)
            else:
                yield _read_picture(source, series.kind, options)
        except ValueError as error:
            yield LeftOut(where, str(error).removeprefix(f"{source.path}: "))


def _read_dicom(source: Source, opened: dict) -> Slice:
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
    elif source.mask is not None and header.frames > 1:
        raise ValueError(f"{source.mask}: one slice, expected a NIfTI volume for several frames")
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
        mask = None if masks is None else masks[i]
        yield Slice(f"{source.path} slice {i + 1}", image, volume.spacing, height, mask, source)


def _read_mask(path: Path, options: Options) -> volumes.Volume:
    """A mask's values as stored, upright; in an NPZ or MAT file the only array."""
    return volumes.read_volume(path, axes=options.array_axes)


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


# Writing.


@dataclass(frozen=True)
class Settings:
    """What all slices of a data set share; kept in its dataset.json.

    `min_lung_area` is the least fraction of a slice's pixels that is lung; `pixel_spacing` mm of a
    pixel, None where each slice is fitted into the square. Records hold a hash of its `repr`.
    """

    image_size: int = 256
    contour_style: str = "filled"
    min_lung_area: float = 0.03
    pixel_spacing: float | None = None


@dataclass
class Prepared:
    """What became of one series. `rows` are lines of label.csv; `error` says why there are none."""

    rows: list[dict[str, str]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    found: int = 0
    masks: int = 0  # contours that came from masks
    error: str | None = None  # "": all its slices were left out


@dataclass(frozen=True)
class Fitted:
    """A slice in the square of the data set, and what is still needed of the one it was made of.

    hu: int16 (S, S). pixel: mm of one, None where unknown. fit: what `ct.fit_square` took, mm
    between rows and between columns and mm of a pixel. mask: bool (H, W), not yet fitted. sample:
    HU of some pixels of the slice.
    """

    where: str
    source: Source
    height: float | None
    hu: np.ndarray
    pixel: float | None
    fit: tuple[tuple[float, float], float | None]
    mask: np.ndarray | None
    sample: np.ndarray


def prepare_series(
    series: Series, options: Options, settings: Settings, output: Path, name: str
) -> Prepared:
    """Write the slices of a series that have enough lung, and their contours, all or none.

    Raises OSError where they can't be written; all that is wrong with the series is in the result.
    """
    result, fitted = Prepared(), []
    try:
        for item in read_series(series, options):
            result.found += 1
            if isinstance(item, LeftOut):
                result.left_out.append(item)
            else:
                fitted.append(_fit(item, settings))
        if not fitted:
            result.error = "" if result.left_out else "no slices in it"
            return result
        samples = [one.sample for one in fitted]
        alike = len({sample.shape for sample in samples}) == 1
        sample = np.stack(samples) if alike else np.concatenate([s.ravel() for s in samples])
        problem = None if options.trust_hu else hu_problem(sample)
        if problem:
            raise ValueError(problem)
        result.masks = sum(one.mask is not None for one in fitted)
        masks = _lungs(fitted, series.kind)
        rows, left_out = _choose(fitted, masks, series.kind, settings)
        result.left_out += left_out
    except (ValueError, OSError, MemoryError) as error:
        result.error = str(error) or type(error).__name__
        return result
    result.rows = _write(rows, fitted, masks, settings.contour_style, output, name)
    return result


def _fit(item: Slice, settings: Settings) -> Fitted:
    pixel = settings.pixel_spacing
    if pixel is not None and item.spacing is None:
        raise ValueError("its pixel spacing is unknown, and --spacing needs it")
    fit = (item.spacing or (1.0, 1.0), pixel)
    hu = ct.fit_square(item.hu, settings.image_size, ct.AIR, *fit)
    hu = np.clip(np.round(hu), INTERCEPT, MAX_HU).astype(np.int16)
    if pixel is None and item.spacing is not None:
        lengths = [n * mm for n, mm in zip(item.hu.shape, item.spacing, strict=True)]
        pixel = max(lengths) / settings.image_size
    step = max(1, len(item.hu) // 128)
    sample = item.hu[::step, ::step].copy()  # no view, which would keep the whole slice
    return Fitted(item.where, item.source, item.height, hu, pixel, fit, item.mask, sample)


def _lungs(fitted: list[Fitted], kind: str) -> list[np.ndarray]:
    """Filled lung masks (S, S), bool: those given, fitted, or else found."""
    given = [one.mask for one in fitted]
    found = given
    if any(mask is None for mask in given):
        volume = np.stack([one.hu for one in fitted])
        # Slices of a table need not be neighbours.
        found = [lung_mask(image) for image in volume] if kind == "table" else lung_mask(volume)
    styles = Counter(ct.contour_style(mask[None]) for mask in given if mask is not None)
    masks = []
    for one, mask, own in zip(fitted, given, found, strict=True):
        if mask is not None:
            if styles["outline"] > styles["filled"]:  # a small one alone does not tell
                mask = ct.fill_outline(mask[None])[0]
            own = ct.fit_square(mask, len(one.hu), 0, *one.fit) >= 0.5
        masks.append(own)
    return masks


def _choose(
    fitted: list[Fitted], masks: list[np.ndarray], kind: str, settings: Settings
) -> tuple[dict[int, dict[str, str]], list[LeftOut]]:
    """Cells of label.csv of the slices with enough lung, by their index; and the others."""
    areas = [mask.mean() for mask in masks]
    heights = [one.height for one in fitted]
    if None in heights:  # no positions in mm: from their order, one apart
        heights = [-float(i) for i in range(len(fitted))]
    lungs = [height for height, area in zip(heights, areas, strict=True) if area > 0]
    extent = max(lungs) - min(lungs) if lungs else 0
    rows, left_out = {}, []
    for i, (one, mask) in enumerate(zip(fitted, masks, strict=True)):
        reason = None
        if areas[i] < settings.min_lung_area:
            reason = f"less lung than {settings.min_lung_area:g} of its pixels (--min_lung_area)"
        elif settings.pixel_spacing and (mask[[0, -1]].any() or mask[:, [0, -1]].any()):
            reason = "lungs reach beyond the image (--spacing times --image_size)"
        if reason:
            left_out.append(LeftOut(one.where, reason))
            continue
        position = one.source.position
        if kind != "table" and extent > 0:
            position = min(max((max(lungs) - heights[i]) / extent, 0.0), 1.0)
        rows[i] = {
            "label": one.source.label,
            "split": one.source.split,
            "position": "" if position is None else f"{position:.4f}",
            "pixel_spacing": "" if one.pixel is None else f"{one.pixel:.6g}",
        }
    return rows, left_out


def _write(
    rows: dict[int, dict[str, str]],
    fitted: list[Fitted],
    masks: list[np.ndarray],
    style: str,
    output: Path,
    name: str,
) -> list[dict[str, str]]:
    """Write images and contours of a series, all or none; return its lines of label.csv."""
    written: list[Path] = []
    lines = []
    try:
        for i, cells in rows.items():
            stored = np.clip(fitted[i].hu.astype(np.int32) - INTERCEPT, 0, 65535)
            contour = ct.outline_mask(masks[i][None])[0] if style == "outline" else masks[i]
            image, mask = (f"{folder}/{name}_{i:04d}.png" for folder in ("images", "contours"))
            for file, pixels in (image, stored.astype(np.uint16)), (mask, contour * np.uint8(255)):
                written.append(output / file)
                disk.write_atomically(output / file, Image.fromarray(pixels).save)
            lines.append({"image": image, "contour": mask, **cells})
    except OSError:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return lines


def prepare_all(
    series: Mapping[str, Series], options: Options, settings: Settings, output: Path, workers: int
) -> Iterator[tuple[str, Prepared]]:
    """Prepare series, each by the name that its files get, with `workers` processes.

    One that ends its process is reported as broken, and takes no other with it.
    """
    calls = {name: (one, options, settings, output, name) for name, one in series.items()}
    if workers <= 1 or len(calls) <= 1:
        yield from ((name, prepare_series(*call)) for name, call in calls.items())
        return
    left = dict(calls)
    with ProcessPoolExecutor(min(workers, len(calls))) as pool:
        futures = {}
        with contextlib.suppress(BrokenProcessPool):
            for name, call in calls.items():
                futures[pool.submit(prepare_series, *call)] = name
        try:
            for future in as_completed(futures):
                with contextlib.suppress(BrokenProcessPool):
                    result = future.result()
                    del left[futures[future]]
                    yield futures[future], result
        except BaseException:  # Ctrl-C, a full disk: what waits is not begun
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for name, call in left.items():  # what a death took with it: each in a process of its own
        try:
            with ProcessPoolExecutor(1) as pool:
                result = pool.submit(prepare_series, *call).result()
        except BrokenProcessPool:
            result = Prepared(error="reading it ended its process: out of memory, or damaged")
        yield name, result
