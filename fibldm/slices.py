"""The slices of a series: corrected, fitted into squares, written with their lungs."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fibldm import ct, disk, spine
from fibldm.anatomy import hu_problem
from fibldm.fields import Field, Surround
from fibldm.files import LeftOut
from fibldm.lungs import lung_mask
from fibldm.scans import Slice, read_series
from fibldm.series import Options, Series, Source

INTERCEPT = -1024  # HU of a stored 0
MAX_HU = 32767
UPSIDE_DOWN = (
    "the spine is above, whatever its header or its axes say: its slices are turned by 180 "
    "degrees, and left stays left if they were turned before, not mirrored; look at them"
)


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
    """What became of one series. `rows` are lines of label.csv; `error` says why there are none.

    `notes` name the series, and say what was corrected against its headers.
    """

    rows: list[dict[str, str]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
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
    result = Prepared()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted = _read_fitted(series, options, settings, result)
        if caught:
            first = str(caught[0].message).split("\n")[0]
            what = f"{len(caught)} warnings while its files were read, as: {first}"
            result.notes.append(f"{series.name}: {what}")
        if not fitted:
            result.error = "" if result.left_out else "no slices in it"
            return result
        samples = [one.sample for one in fitted]
        alike = len({sample.shape for sample in samples}) == 1 and samples[0].ndim == 2
        sample = np.stack(samples) if alike else np.concatenate([s.ravel() for s in samples])
        problem = None if options.trust_hu else hu_problem(sample)
        if problem:
            raise ValueError(problem)
        given = [one.mask for one in fitted if one.mask is not None]
        result.masks = len(given)
        if given and not any(mask.any() for mask in given):
            raise ValueError(f"its {len(given)} masks mark nothing, expected lungs")
        masks = _lungs(fitted, series.kind)
        if not options.trust_hu and _are_upside_down(fitted, masks):
            result.notes.append(f"{series.name}: {UPSIDE_DOWN}")
            fitted = [replace(one, hu=one.hu[::-1, ::-1]) for one in fitted]
            masks = [mask[::-1, ::-1] for mask in masks]
        rows, left_out = _choose(fitted, masks, series.kind, settings)
        result.left_out += left_out
    except (ValueError, OSError, MemoryError) as error:
        result.error = str(error) or type(error).__name__
        return result
    result.rows = _write(rows, fitted, masks, settings.contour_style, output, name)
    return result


def _read_fitted(
    series: Series, options: Options, settings: Settings, result: Prepared
) -> list[Fitted]:
    """All slices of a series that can be used, without a surround; the others into `result`.

    The surround is that of all slices, so that they keep one scale: it is known when all are read,
    and they are read again in the rare case that there is one.
    """
    fitted, surround = [], Surround()
    for item in read_series(series, options):
        result.found += 1
        if isinstance(item, LeftOut):
            result.left_out.append(item)
        else:
            surround.add(item.hu)
            fitted.append(_fit(item, settings))
    seen = surround.field()
    if seen is None:
        return fitted
    rows, columns = (side.stop - side.start for side in seen.box)
    frame = "x".join(map(str, surround.first.shape))
    result.notes.append(
        f"{series.name}: pictures of {frame} pixels hold a field of view of {rows}x{columns}; the "
        f"surround, stored as {seen.value:g} HU, is cut off or made air"
    )
    items = read_series(series, options)
    return [_cut_and_fit(item, seen, settings) for item in items if isinstance(item, Slice)]


def _cut_and_fit(item: Slice, seen: Field, settings: Settings) -> Fitted:
    """What is outside of the field of view becomes air, but does not count as HU of the scan."""
    mask = None if item.mask is None else seen.cut(item.mask, False)
    fitted = _fit(replace(item, hu=seen.cut(item.hu), mask=mask), settings)
    values = seen.inside(item.hu).ravel()
    return replace(fitted, sample=values[:: max(1, len(values) // 16384) | 1].copy())


def _are_upside_down(fitted: list[Fitted], masks: list[np.ndarray]) -> bool:
    """Whether the spine lies above in a series; masks that are given may be of anything."""
    scores = []
    for i in spine.telling(np.array([mask.mean() for mask in masks])):
        hu = fitted[i].hu
        scores.append(spine.uprightness(hu, masks[i] if fitted[i].mask is None else lung_mask(hu)))
    return spine.are_upside_down([score for score in scores if score is not None])


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
