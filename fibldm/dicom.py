"""DICOM: the HU of a slice, upright."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.encaps import generate_fragments, parse_basic_offsets
from pydicom.pixels import apply_modality_lut, pixel_array
from scipy import ndimage

from fibldm import decoders, limits

AIR = -1000.0  # HU
OUTSIDE = -1500.0  # HU: no air is as dark, only marks of what is outside of the field of view


class _Deflatable(limits.Bounded):
    """A file of which pydicom reads all the rest at once only to inflate it, without a limit."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if size is None or size < 0:
            limits.require_inflatable(content, limits.DEFLATED)
        return content


def read_file(path: Path, **options: Any) -> pydicom.Dataset:
    """`pydicom.dcmread`, of files that lack a header, too; ValueError where a deflated one would
    fill the memory.
    """
    with _Deflatable(path) as file:
        dataset = pydicom.dcmread(file, force=True, **options)
    if "TransferSyntaxUID" not in dataset.file_meta:  # DICOM's default
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    return dataset


def group(dataset: pydicom.Dataset, name: str, frame: int) -> pydicom.Dataset:
    """The functional group `name` of a frame of an enhanced multi-frame data set (PS3.3 C.7.6.16).

    The frame's own, else the shared one; the data set itself where it has neither, as a
    single-frame image keeps the same attributes at its top.
    """
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for groups in [*per_frame[frame : frame + 1], *shared[:1]]:
        if groups.get(name):
            return groups[name][0]
    return dataset


def read_frame(dataset: pydicom.Dataset, frame: int = 0) -> np.ndarray:
    """HU, float32 (H, W), of one frame; what is outside of the field of view as AIR.

    Padding above AIR is tissue, but where it hangs together with the border. MONOCHROME1 says how
    to display, not what is stored, and changes nothing. Raises ValueError where HU cannot be told:
    no pixel data, colour, no rescale slope and intercept, slope 0.
    """
    if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ValueError("no pixel data")
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise ValueError(f"{dataset.SamplesPerPixel} values a pixel (colour), expected 1")
    scale = group(dataset, "PixelValueTransformationSequence", frame)
    slope, intercept = scale.get("RescaleSlope"), scale.get("RescaleIntercept")
    lut = dataset.get("ModalityLUTSequence")
    if not lut and (slope is None or intercept is None):
        raise ValueError("no RescaleSlope and RescaleIntercept, expected both: its HU are unknown")
    if not lut and (slope == 0 or not np.isfinite([float(slope), float(intercept)]).all()):
        raise ValueError(f"RescaleSlope {slope} and RescaleIntercept {intercept}: no HU follow")
    if str(scale.get("RescaleType") or "HU").upper() not in ("HU", "HOUNSFIELD", "US"):
        raise ValueError(f"RescaleType {scale.RescaleType}, expected HU")

    sides = [int(dataset.get(name) or 0) for name in ("Rows", "Columns")]
    if min(sides) < 1 or sides[0] * sides[1] > limits.SLICE:
        raise ValueError(f"{sides[0]}x{sides[1]} pixels, expected at most {limits.SLICE:,}")
    plugin = decoders.plugin_for(dataset.file_meta.get("TransferSyntaxUID"))
    try:
        stored = pixel_array(
            dataset, index=frame, decoding_plugin=plugin, correct_unused_bits=False
        )
    except RuntimeError as error:  # "Unable to decode ...: plugin: reason"
        raise ValueError(str(error).rpartition(f"{plugin}: ")[2]) from error
    padding = _padding(dataset, stored, 0)
    if spare := _spare_bits(dataset, stored[~padding]):
        stored = (stored << spare) >> spare
        padding = padding if padding.any() else _padding(dataset, stored, spare)
    if lut:
        hu = apply_modality_lut(stored, dataset).astype(np.float32)
    else:
        hu = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    hu[(padding & ((hu <= AIR) | from_border(padding))) | (hu < OUTSIDE)] = AIR
    if not np.isfinite(hu).all():
        raise ValueError(f"{int((~np.isfinite(hu)).sum())} values are not finite")
    return hu


def require_frames(dataset: pydicom.Dataset) -> None:
    """ValueError where the pixel data are of more frames, or of fewer, than NumberOfFrames says.

    Else a part of them is not seen, or frames are taken for others.
    """
    expected, pixels = int(dataset.get("NumberOfFrames") or 1), dataset.get("PixelData") or b""
    syntax = uid.UID(dataset.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian))
    if syntax.is_encapsulated and syntax != uid.DeflatedExplicitVRLittleEndian:
        buffer = io.BytesIO(pixels)
        offsets = parse_basic_offsets(buffer)
        parts = list(generate_fragments(buffer))
        starts = sum(part.startswith(decoders.STARTS) for part in parts)
        found = len(offsets) if len(offsets) > 1 else len(parts)
        if found > expected and syntax != uid.RLELossless:  # a frame may have several parts
            found = max(starts, expected)
    else:
        sizes = [int(dataset.get(n) or 1) for n in ("Rows", "Columns", "SamplesPerPixel")]
        size = math.prod(sizes) * int(dataset.get("BitsAllocated") or 8) // 8
        found = max(len(pixels) // max(size, 1), expected)  # pydicom says where they are fewer
    if found != expected:
        raise ValueError(f"pixel data of {found} frames, but NumberOfFrames is {expected}")


def _spare_bits(dataset: pydicom.Dataset, stored: np.ndarray) -> int:
    """How many bits above BitsStored are to be cut off, of the values and of the padding's.

    Old files keep overlays there, and some leave them 0 above negative values. Without an overlay
    bits that are used are of the values, and BitsStored is too low. `stored`: without padding.
    """
    bits = int(dataset.get("BitsStored") or 0)
    if stored.dtype.kind not in "iu" or not 0 < bits < 8 * stored.itemsize:
        return 0
    spare = 8 * stored.itemsize - bits
    overlaid = any(
        bits <= int(dataset[0x6000 + at, 0x0102].value or 0) < 8 * stored.itemsize
        for at in range(0, 0x20, 2)
        if (0x6000 + at, 0x0102) in dataset and (0x6000 + at, 0x3000) not in dataset
    )
    used = (stored.view(stored.dtype.str.replace("i", "u")) >> bits).any()
    return spare if overlaid or not used else 0


def from_border(marked: np.ndarray) -> np.ndarray:
    """What of the marked pixels (..., H, W) hangs together with the border of its slice, bool."""
    if not marked.any():
        return marked
    slices = marked.reshape(-1, *marked.shape[-2:])
    return np.stack([~ndimage.binary_fill_holes(~one) for one in slices]).reshape(marked.shape)


def _padding(dataset: pydicom.Dataset, stored: np.ndarray, spare: int) -> np.ndarray:
    """Where the stored values are padding (PS3.3 C.7.5.1.1.2), bool (H, W)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    ends = [value, dataset.get("PixelPaddingRangeLimit", value)]
    if stored.dtype.kind in "iu":
        # They may be encoded unsigned though the pixels are signed, or the other way round.
        ends = (np.array([int(end) for end in ends]).astype(stored.dtype) << spare) >> spare
    return (stored >= min(ends)) & (stored <= max(ends))


def upright(array: np.ndarray, orientation: tuple[float, ...]) -> np.ndarray:
    """An axial slice (H, W) turned: the patient's front at the top, the right side at the left."""
    row, column = orientation[:3], orientation[3:]
    if abs(row[0]) < abs(row[1]):
        array, row, column = array.T, column, row
    return array[:: 1 if column[1] > 0 else -1, :: 1 if row[0] > 0 else -1]
