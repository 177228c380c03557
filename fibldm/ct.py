"""CT slices: HU, the window, reading and writing one slice whatever its file format."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import tifffile
from PIL import Image
from scipy import ndimage
from skimage.transform import resize

from fibldm import dicom

Window = tuple[float, float]
AIR = dicom.AIR
DEFAULT_WINDOW: Window = (-1000.0, 400.0)  # HU; air to just below dense bone
FORMATS = ("png", "npy", "nifti", "dicom")
SUFFIXES = {"png": ".png", "npy": ".npy", "nifti": ".nii.gz", "dicom": ".dcm"}


def hu_to_unit(hu: np.ndarray, window: Window = DEFAULT_WINDOW) -> np.ndarray:
    """HU, any shape -> [-1, 1] float32, linear over the window and clipped to it."""
    low, high = window
    return np.clip((np.asarray(hu, np.float32) - low) * (2 / (high - low)) - 1, -1, 1)


def unit_to_hu(image: np.ndarray, window: Window = DEFAULT_WINDOW) -> np.ndarray:
    """[-1, 1], any shape -> HU float32: the inverse of `hu_to_unit` inside the window."""
    low, high = window
    return (np.asarray(image, np.float32) + 1) * ((high - low) / 2) + low


def read_rescale(folder: Path) -> tuple[float, float] | None:
    """(slope, intercept) of the folder's dataset.json, None where there is no such file."""
    path = folder / "dataset.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        slope, intercept = float(content["rescale_slope"]), float(content["rescale_intercept"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected numbers rescale_slope and rescale_intercept ({error!r})"
        ) from error
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise ValueError(f"{path}: rescale_slope {slope}, rescale_intercept {intercept}")
    return slope, intercept


def _decode(path: Path) -> tuple[np.ndarray, bool]:
    """Stored values (H, W) or (H, W, channels), and whether they already are HU."""
    name = path.name.lower()
    if name.endswith(".npy"):
        return np.asarray(np.load(path, allow_pickle=False)), False
    if name.endswith((".nii", ".nii.gz")):
        return np.squeeze(nibabel.load(path).get_fdata(dtype=np.float32)).T, True
    if name.endswith((".dcm", ".dicom")):
        return dicom.read_frame(pydicom.dcmread(path)), True
    if name.endswith((".tif", ".tiff")):
        return tifffile.imread(path), False
    with Image.open(path) as image:
        if image.mode in ("P", "1", "LA", "PA"):
            image = image.convert("L")
        return np.asarray(image), False


def decode(path: str | Path) -> tuple[np.ndarray, bool]:
    """Stored values of an image file, and whether they already are HU (DICOM, NIfTI).

    Raises ValueError naming the file where it is missing or can't be decoded.
    """
    path = Path(path)
    try:
        array, is_hu = _decode(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(f"{path}: cannot be decoded as an image: {error}") from error
    if array.size == 0 or array.dtype.kind not in "buif":
        raise ValueError(
            f"{path}: expected a 2D array of numbers, found {array.dtype} {array.shape}"
        )
    return array, is_hu


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
        rgb = array[..., :3]
        if not (rgb == rgb[..., :1]).all():
            raise ValueError(f"{path}: a colour image, expected grey levels")
        array = rgb[..., 0]
    if array.ndim != 2:
        raise ValueError(f"{path}: expected one 2D slice, found an array of shape {array.shape}")
    if is_hu:
        slope, intercept = 1.0, 0.0
    elif rescale is not None:
        slope, intercept = rescale
    elif array.dtype == np.uint8:
        slope, intercept = (window[1] - window[0]) / 255, window[0]
    elif array.dtype.kind in "if":
        slope, intercept = 1.0, 0.0
    else:
        raise ValueError(
            f"{path}: {array.dtype} values without a scale; write a dataset.json beside label.csv, "
            'as {"rescale_slope": 1.0, "rescale_intercept": -1024.0} for HU = stored - 1024'
        )
    hu = array.astype(np.float32) * slope + intercept
    if not np.isfinite(hu).all():
        raise ValueError(f"{path}: {int((~np.isfinite(hu)).sum())} values are not finite")
    return hu


def read_contour(path: str | Path, channels: int = 1) -> np.ndarray:
    """A contour, bool (channels, H, W).

    With one channel: where the file exceeds half of its maximum. With K channels the file is a
    label map (0 outside, label k in channel k - 1) or an image of K channels, each halved so.
    """
    array, _ = decode(path)
    if array.ndim == 3 and array.shape[2] in (3, 4) and channels != array.shape[2]:
        array = array[..., :3].max(axis=2)
    if array.ndim == 3 and array.shape[2] == channels:
        array = np.moveaxis(array, 2, 0)
        return array > np.maximum(array.max(axis=(1, 2), keepdims=True), 1e-6) / 2
    if array.ndim != 2:
        raise ValueError(
            f"{path}: expected a contour of {channels} channel(s), found shape {array.shape}"
        )
    if channels == 1:
        return (array > max(float(array.max()), 1e-6) / 2)[None]
    if array.max() > channels or (array != np.round(array)).any():
        raise ValueError(
            f"{path}: expected labels 0 to {channels} (--contour_channels {channels}), found "
            f"values up to {array.max()}"
        )
    return array[None] == np.arange(1, channels + 1)[:, None, None]


def fit_square(array: np.ndarray, size: int, fill: float) -> np.ndarray:
    """(..., H, W) -> float32 (..., size, size): padded to a square around its centre, resized.

    Downwards by area, with anti-aliasing; upwards bilinear. Values stay within their range.
    """
    height, width = array.shape[-2:]
    array = np.asarray(array, np.float32)
    side = max(height, width)
    if height != width:
        top, left = (side - height) // 2, (side - width) // 2
        pad = [(0, 0)] * (array.ndim - 2)
        pad += [(top, side - height - top), (left, side - width - left)]
        array = np.pad(array, pad, constant_values=fill)
    if side == size:
        return array
    if side % size == 0:  # the common case, 512 to 256: the mean of each block is exact
        f = side // size
        return array.reshape(*array.shape[:-2], size, f, size, f).mean(axis=(-3, -1))
    shape = (*array.shape[:-2], size, size)
    return resize(array, shape, order=1, anti_aliasing=side > size).astype(np.float32)


def fit_contour(contour: np.ndarray, size: int) -> np.ndarray:
    """Bool (K, H, W) -> uint8 (K, size, size), 0 or 1; an outline stays closed.

    A mask keeps the pixels that it covers by half; an outline, which is thinner than a pixel
    after reduction, all that it touches.
    """
    soft = fit_square(contour, size, 0)
    filled = np.stack([ndimage.binary_fill_holes(channel) for channel in contour])
    outline = filled.sum() > 2 * contour.sum()
    return (soft > 0 if outline else soft >= 0.5).astype(np.uint8)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file with the same suffixes, then rename it to `path`."""
    temporary = path.with_name(f".tmp_{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_slice(
    path: Path, image: np.ndarray, window: Window, file_format: str, spacing: float = 1.0
) -> None:
    """Write one slice (H, W), in [-1, 1] over `window`.

    "png" holds the window over 0 to 255; "npy" float32 HU; "nifti" and "dicom" int16 HU with
    pixels of `spacing` mm.
    """
    if file_format == "png":
        pixels = np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)
        write_atomically(path, Image.fromarray(pixels).save)
        return
    hu = unit_to_hu(np.clip(image, -1, 1), window)
    if file_format == "npy":
        write_atomically(path, lambda temporary: np.save(temporary, hu))
        return
    stored = np.round(hu).astype(np.int16)
    if file_format == "nifti":
        # NIfTI's axes point to the patient's right, front and head: the image's x and y turned.
        affine = np.diag([-spacing, -spacing, spacing, 1.0])
        volume = nibabel.Nifti1Image(stored.T[:, :, None], affine)
        write_atomically(path, lambda temporary: nibabel.save(volume, temporary))
    elif file_format == "dicom":
        dataset = dicom.synthetic_dicom(stored, window, spacing, path.name)
        write_atomically(
            path, lambda temporary: dataset.save_as(temporary, enforce_file_format=True)
        )
    else:
        raise ValueError(f"format {file_format!r}; expected one of {', '.join(FORMATS)}")
