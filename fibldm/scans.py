"""The slices of a series, read upright and in HU, each with its mask where there is one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fibldm import ct, dicom, volumes
from fibldm.anatomy import hu_problem
from fibldm.fields import find_field
from fibldm.files import LeftOut
from fibldm.headers import Header
from fibldm.series import Options, Series, Source

NEAR = 1.0  # mm between an image and its mask, at most


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
    # The file read last: a multi-frame one holds the next slices too. Masks that are cut alike.
    opened: dict = {"masks": _read_masks(series, options)}
    for source in series.sources:
        where = source.header.where if source.header else str(source.path)
        try:
            if source.header is not None:
                yield _read_dicom(source, opened)
            else:
                yield _read_picture(source, series.kind, options, opened["masks"])
        except ValueError as error:
            yield LeftOut(where, str(error).removeprefix(f"{source.path}: "))


def _read_dicom(source: Source, opened: dict) -> Slice:
    header = source.header
    try:
        if opened.get("path") != source.path:
            dataset = dicom.read_file(source.path)
            dicom.require_frames(dataset)
            opened |= {"path": source.path, "file": dataset}
        hu = dicom.read_frame(opened["file"], header.frame)
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(f"{source.path}: {error}") from error
    hu, mask = dicom.upright(hu, header.orientation), None
    if source.mask is not None and volumes.kind_of(source.mask) == "nifti":
        if opened.get("mask") != source.mask:
            volume = volumes.decode(source.mask)
            volume = replace(volume, values=ct.as_mask(volume.values))
            opened |= {"mask": source.mask, "volume": volume}
        mask = _at_slice(source.mask, opened["volume"], header)
    elif source.mask is not None and header.frames > 1:
        raise ValueError(f"{source.mask}: one slice, expected a NIfTI volume for several frames")
    elif source.mask is not None:
        mask = opened["masks"].get(source.mask)
        mask = ct.read_contour(source.mask)[0] if mask is None else mask
        mask = dicom.upright(mask, header.orientation)
    mask = _same_shape(mask, hu, source.mask)
    turned = abs(header.orientation[0]) < abs(header.orientation[1])
    spacing = header.spacing[::-1] if header.spacing and turned else header.spacing
    return Slice(header.where, hu, spacing, header.height, mask, source)


def _at_slice(path: Path, mask: volumes.Volume, header: Header) -> np.ndarray:
    """The slice of a mask's volume where a DICOM slice lies, bool (H, W)."""
    if mask.heights is None:
        raise ValueError(f"{path}: its header has no orientation, expected one")
    nearest = int(np.abs(mask.heights - header.height).argmin())
    shift = *(mask.corner - header.corner_upright), mask.heights[nearest] - header.height
    _require_near(path, shift, header.where)
    return mask.values[nearest]


def _require_near(path: Path, shift: Iterable[float], where: str) -> None:
    shift = np.array([float(mm) for mm in shift])
    if np.abs(shift).max() > NEAR:
        raise ValueError(
            f"{path}: lies {', '.join(f'{mm:.1f}' for mm in shift)} mm (to the left, the back, the "
            f"head) from {where}, expected the same place"
        )


def _read_masks(series: Series, options: Options) -> dict[Path, np.ndarray]:
    """Masks of a slice each, bool (H, W), by their files: all of a series are cut alike.

    None where they are of several sizes or can't be read, which is said of each. Those of a table
    are read as the stages read them, one by one.
    """
    paths = dict.fromkeys(source.mask for source in series.sources if source.mask is not None)
    if series.kind == "table" or len(paths) < 2:
        return {}
    levels = {}
    try:
        for path in paths:
            is_dicom = series.kind == "dicom"
            levels[path] = ct.read_levels(path) if is_dicom else _read_mask(path, options).values[0]
        same = len({array.shape for array in levels.values()}) == 1
        masks = ct.as_mask(np.stack(list(levels.values()))) if same else []
    except ValueError:
        masks = []
    return dict(zip(levels, masks, strict=False))


def _read_picture(
    source: Source, kind: str, options: Options, masks: dict[Path, np.ndarray]
) -> Slice:
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
            mask = masks.get(source.mask)
            if mask is None:
                mask = ct.as_mask(_read_mask(source.mask, options).values[0])
    field = find_field(hu)
    problem = None if options.trust_hu else hu_problem(field.inside(hu) if field else hu)
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
    return volumes.read_volume(path, axes=options.array_axes, marks=True)


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
    if mask is not None and mask.all():
        raise ValueError(f"{path}: every pixel is marked, expected a mask: 0 outside, more inside")
    return mask
