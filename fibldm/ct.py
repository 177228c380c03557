"""CT slices: HU and windows, one slice or contour of any file, dataset.json, fitting squares."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy import ndimage, sparse

from fibldm import dicom, disk, limits, pictures, volumes

Window = tuple[float, float]
AIR = dicom.AIR
DEFAULT_WINDOW: Window = (-1000.0, 400.0)  # HU; air to just below dense bone
SCALE_REMEDY = (
    'write a dataset.json beside label.csv, as {"rescale_slope": 1.0, "rescale_intercept": -1024.0}'
    " for HU = stored - 1024"
)
STYLES = ("filled", "outline")  # of contours
PNG_LEVELS = 65535  # of the PNG files that are written, above 0
PICTURE = 0.2  # of an array's values between black and white: more make a picture, not a contour
FLAT = 0.5  # of neighbours that a label marks: so many at least are alike
SCALES = (100, 255, 1000, 4095, 65535)  # what is certain, in whole numbers
ROUNDING = 1e-3  # below 0, of the maximum


def hu_to_unit(hu: np.ndarray, window: Window = DEFAULT_WINDOW) -> np.ndarray:
    """HU, any shape -> [-1, 1] float32, linear over the window and clipped to it."""
    low, high = window
    return np.clip((np.asarray(hu, np.float32) - low) * (2 / (high - low)) - 1, -1, 1)


def unit_to_hu(image: np.ndarray, window: Window = DEFAULT_WINDOW) -> np.ndarray:
    """[-1, 1], any shape -> HU float32: the inverse of `hu_to_unit` inside the window."""
    low, high = window
    return (np.asarray(image, np.float32) + 1) * ((high - low) / 2) + low


@dataclass(frozen=True)
class DatasetInfo:
    """What dataset.json says of the slices beside it; None where it does not say.

    `rescale` is (slope, intercept) of HU = slope * stored + intercept, None only without the
    file; `pixel_spacing` mm, where all slices have the same; `contour_style` one of STYLES.
    """

    rescale: tuple[float, float] | None = None
    pixel_spacing: float | None = None
    contour_style: str | None = None


def read_dataset_info(folder: Path) -> DatasetInfo:
    """The folder's dataset.json; all unknown where there is none, ValueError where it is bad."""
    path = folder / "dataset.json"
    if not path.is_file():
        return DatasetInfo()
    try:
        content = limits.read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected JSON with numbers rescale_slope and rescale_intercept: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with rescale_slope and rescale_intercept")

    def number(name: str) -> float:
        value = content.get(name)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{path}: {name}: found {value!r}, expected a number")
        return float(value)

    slope, intercept = number("rescale_slope"), number("rescale_intercept")
    if slope == 0:
        raise ValueError(f"{path}: rescale_slope 0, expected another number: all HU would be one")
    spacing = number("pixel_spacing") if content.get("pixel_spacing") is not None else None
    if spacing is not None and spacing <= 0:
        raise ValueError(f"{path}: pixel_spacing {spacing:g}, expected mm above 0")
    style = content.get("contour_style")
    if style not in (None, *STYLES):
        raise ValueError(f"{path}: contour_style {style!r}, expected one of {', '.join(STYLES)}")
    return DatasetInfo((slope, intercept), spacing, style)


def read_rescale(folder: Path) -> tuple[float, float] | None:
    """(slope, intercept) of the folder's dataset.json, None where there is no such file."""
    return read_dataset_info(folder).rescale


def write_dataset_info(folder: Path, info: DatasetInfo) -> None:
    """Write dataset.json, whole or not at all, so that `read_dataset_info` gives `info` again."""
    slope, intercept = info.rescale
    content = {"rescale_slope": slope, "rescale_intercept": intercept}
    if info.pixel_spacing is not None:
        content["pixel_spacing"] = info.pixel_spacing
    if info.contour_style is not None:
        content["contour_style"] = info.contour_style
    disk.replace_text(folder / "dataset.json", json.dumps(content, indent=2) + "\n")


def decode(path: str | Path, marks: bool = False) -> tuple[np.ndarray, bool]:
    """Stored values (H, W) or (H, W, channels) of a file that label.csv names, and whether they
    already are HU (DICOM, NIfTI). marks: whether it is a contour.

    DICOM, and NIfTI without orientation, are as stored; a NIfTI slice with one is turned upright.
    Raises ValueError naming the file where it is missing or can't be decoded.
    """
    volume = volumes.decode(Path(path), most=limits.SLICE, marks=marks)
    values = volume.values
    if volume.kind != "nifti":
        return values, volume.is_hu
    if volume.heights is None:  # its first axis as columns
        return np.squeeze(values).T, True
    if len(values) > 1 and 1 in values.shape:
        shape = values.shape
        raise ValueError(f"{path}: one slice, but not an axial one: {shape} from head to feet")
    return values[0] if len(values) == 1 else values, True


def read_hu(
    path: str | Path, rescale: tuple[float, float] | None = None, window: Window = DEFAULT_WINDOW
) -> np.ndarray:
    """One slice in HU, float32 (H, W).

    DICOM and NIfTI carry their HU. Other formats take `rescale` (slope, intercept); without it,
    8-bit images are taken as `window` stretched over 0 to 255, and signed or floating-point
    values as HU. Unsigned 16-bit values without it raise ValueError: their HU is anyone's guess.
    """
    array, is_hu = decode(path)
    if array.ndim == 3 and array.shape[2] in (3, 4):
        array = pictures.grey_levels(array, path)
    if array.ndim != 2:
        raise ValueError(f"{path}: expected one 2D slice, found an array of shape {array.shape}")
    return scale_to_hu(array, path, (1.0, 0.0) if is_hu else rescale, window)


def scale_to_hu(
    array: np.ndarray,
    path: str | Path,
    rescale: tuple[float, float] | None = None,
    window: Window = DEFAULT_WINDOW,
) -> np.ndarray:
    """Stored values of any shape, of a file without a scale of its own, as HU: see `read_hu`."""
    if rescale is not None:
        slope, intercept = rescale
    elif array.dtype == np.uint8:
        slope, intercept = (window[1] - window[0]) / 255, window[0]
    elif array.dtype.kind in "if":
        slope, intercept = 1.0, 0.0
    else:
        raise ValueError(f"{path}: {array.dtype} values without a scale; {SCALE_REMEDY}")
    hu = array.astype(np.float32) * slope + intercept
    hu[dicom.from_border(np.isnan(hu) | np.isneginf(hu))] = (
        AIR  # what is outside of the field of view
    )
    if not np.isfinite(hu).all():
        raise ValueError(f"{path}: {int((~np.isfinite(hu)).sum())} values are not finite")
    return hu


def as_mask(array: np.ndarray) -> np.ndarray:
    """What a mask, outline or label map marks, bool of the same shape: of a slice, or of all masks
    of a series, which are cut alike.

    Whole numbers that are few (0 and 1, 0 and 255, labels), or alike side by side (more labels):
    all that is not 0. Probabilities, up to 1: what exceeds 0.5. Others (an anti-aliased mask, per
    cent): what exceeds half of the next of SCALES, or of the maximum where they are no whole
    numbers. ValueError for negative values, values not finite, and pictures, such as a CT slice.
    """
    if array.dtype == bool:
        return array
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} values are not finite")
    high = array.max(initial=0)
    if array.size and array.min() < -ROUNDING * max(high, 1):
        raise ValueError(f"values from {array.min()}, expected a contour: 0 outside, more inside")
    whole = bool((array == np.round(array)).all())
    if whole and (len(np.unique(array)) <= pictures.LABELS or _is_flat(array, high)):
        return array > 0
    between = (array > 0.1 * high) & (array < 0.9 * high)
    if between.mean() > PICTURE:
        raise ValueError(
            f"a picture rather than a contour: {between.mean():.0%} of its values lie between 10% "
            f"and 90% of its maximum {high:g}; expected a mask, an outline or a label map"
        )
    # The largest value of a series tells per cent from bytes; that of a slice may be of few.
    certain = SCALES if array.ndim > 2 else (255, 65535)
    scales = (*(certain if whole else [1]), high)
    return array > next(scale for scale in scales if scale >= high) / 2


def _is_flat(array: np.ndarray, high: float) -> bool:
    """Whether of most values that mark neighbours, but the highest, most are alike: labels are.

    In rows and in columns. The rim of an anti-aliased mask, whose inside has the highest value, is
    not.
    """
    for one, other in (
        (array[..., 1:], array[..., :-1]),
        (array[..., 1:, :], array[..., :-1, :]),
    ):
        inner = (one > 0) & (other > 0) & (one < high) & (other < high)
        value = np.unique(one[inner], return_inverse=True)[1]
        alike = np.bincount(value, one[inner] == other[inner])
        if not len(alike) or (alike / np.bincount(value)).mean() < FLAT:
            return False
    return True


def read_levels(path: str | Path, channels: int = 1) -> np.ndarray:
    """What a contour's file holds, labels or levels, (H, W) or of K channels (H, W, channels)."""
    array, _ = decode(path, marks=True)
    if array.ndim == 3 and array.shape[2] in (2, 3, 4) and channels != array.shape[2]:
        array = pictures.mark_levels(array, Path(path))
    return array


def read_contour(path: str | Path, channels: int = 1) -> np.ndarray:
    """A contour, bool (channels, H, W).

    With one channel: what the file marks, by `as_mask`. With K channels the file is a label map
    (0 outside, label k in channel k - 1) or an image of K channels, each taken by `as_mask`.
    """
    array = read_levels(path, channels)
    try:
        return as_contour(np.moveaxis(array, 2, 0) if array.ndim == 3 else array, channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def as_contour(array: np.ndarray, channels: int = 1) -> np.ndarray:
    """A mask, outline or label map (H, W), or its channels (K, H, W) -> bool (channels, H, W)."""
    in_channels = array.ndim == 3 and len(array) == channels
    if array.ndim != 2 and not in_channels:
        raise ValueError(f"expected a contour of {channels} channel(s), found shape {array.shape}")
    if in_channels or channels == 1:
        return np.stack([as_mask(mask) for mask in (array if in_channels else array[None])])
    labels = np.arange(1, channels + 1)
    if not np.isin(array, [0, *labels]).all():
        raise ValueError(
            f"expected labels 0 to {channels} (--contour_channels {channels}), found values from "
            f"{array.min()} up to {array.max()}"
        )
    return array[None] == labels[:, None, None]


def fit_square(
    array: np.ndarray,
    size: int,
    fill: float,
    spacing: tuple[float, float] = (1.0, 1.0),
    pixel: float | None = None,
) -> np.ndarray:
    """(..., H, W) -> float32 (..., size, size), centred, with square pixels.

    spacing: mm between rows and between columns. pixel: mm of a pixel of the result; by default the
    longer side just fits. What lies outside of the array is `fill`. Downwards each pixel is the
    mean of the area it covers; upwards bilinear. Values stay within their range.
    """
    array = np.asarray(array, np.float32)
    lengths = [n * mm for n, mm in zip(array.shape[-2:], spacing, strict=True)]
    pixel = pixel or max(lengths) / size
    rows, columns = (
        _weights(n, size, pixel / mm) for n, mm in zip(array.shape[-2:], spacing, strict=True)
    )
    outside = fill * (1 - np.outer(rows.sum(1), columns.sum(1)))
    flat = array.reshape(-1, *array.shape[-2:])
    fitted = [rows @ (columns @ image.T).T + outside for image in flat]
    return np.stack(fitted).astype(np.float32).reshape(*array.shape[:-2], size, size)


@cache
def _weights(count: int, size: int, scale: float) -> sparse.csr_array:
    """(size, count): what each of `size` centred pixels, `scale` old ones long, takes of those."""
    start = -math.floor(round((size * scale - count) / 2, 6))  # whole old pixels are cut or added
    low = start + scale * np.arange(size)[:, None]
    old = np.arange(count)
    if scale >= 1:
        share = np.clip(np.minimum(low + scale, old + 1) - np.maximum(low, old), 0, None) / scale
    else:
        centre = low + scale / 2
        share = np.clip(1 - abs(np.clip(centre - 0.5, 0, count - 1) - old), 0, None)
        share[((centre < 0) | (centre > count))[:, 0]] = 0
    return sparse.csr_array(share)


def contour_style(contour: np.ndarray) -> str | None:
    """ "outline" or "filled" for a contour (K, H, W), None where it is empty or too small to tell.

    Filling the holes of outlines more than doubles what is drawn; it adds little to a mask, which
    is also more than two pixels thick somewhere.
    """
    drawn = int((contour != 0).sum())
    added = int(fill_outline(contour).sum()) - drawn
    if added > drawn:
        return "outline"
    thick = any(ndimage.binary_erosion(channel).any() for channel in contour)
    return "filled" if thick and added < drawn / 4 else None


def common_style(
    contours: Sequence[np.ndarray], declared: str | None
) -> tuple[str | None, list[str]]:
    """The style of contours (N, K, H, W), and a warning where they differ in it.

    It is as dataset.json says (`declared`), else that of nine in ten of the contours which have
    a clear one, else None.
    """
    counts = Counter(contour_style(contour) for contour in contours)
    del counts[None]
    style, most = max(counts.items(), key=lambda item: item[1], default=(None, 0))
    notes = []
    if {declared or style} != {*counts, declared or style}:
        found = " and ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        said = f", and dataset.json says {declared}" if declared else ""
        notes.append(
            f"WARNING: contours of several styles: of {len(contours)} looked at {found}{said}; "
            "expected one style; convert them by scripts/prepare_data.py --contour_style"
        )
    if declared is None and most < 0.9 * counts.total():
        style = None
    return declared or style, notes


def fill_outline(contour: np.ndarray) -> np.ndarray:
    """Closed outlines (K, H, W) and what lies inside of them, bool."""
    return np.stack([ndimage.binary_fill_holes(channel) for channel in contour])


def outline_mask(contour: np.ndarray) -> np.ndarray:
    """The edge of masks (K, H, W), one pixel wide and inside of them, bool."""
    contour = contour != 0
    return contour & ~np.stack([ndimage.binary_erosion(channel) for channel in contour])


def fit_contour(contour: np.ndarray, size: int, style: str | None = None) -> np.ndarray:
    """Bool (K, H, W) -> uint8 (K, size, size), 0 or 1; an outline stays closed.

    A mask keeps the pixels that it covers by half; an outline, which is thinner than a pixel
    after reduction, all that it touches. With `style`, masks become outlines, or outlines masks.
    """
    found = contour_style(contour)
    if (found, style) == ("outline", "filled"):
        contour, found = fill_outline(contour), style
    soft = fit_square(contour, size, 0)
    fitted = soft > 0 if found == "outline" else soft >= 0.5
    if (found, style) == ("filled", "outline"):
        fitted = outline_mask(fitted)
    return fitted.astype(np.uint8)
