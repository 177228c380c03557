"""PNG, TIFF and other pictures: their values; and what masks mark by palette and transparency."""

import re
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from fibldm import decoders, limits

LABELS = 16  # distinct values of a label map, at most; an anti-aliased mask has more
JPEG_IN_TIFF = (6, 7, 33007, 34892)  # compressions
LOSSY = ("JPEG", "WEBP")
PICTURES = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP")  # none that runs programs, as EPS


def decode(path: Path, is_png: bool, marks: bool) -> np.ndarray:
    """Values of a picture, (H, W) or (H, W, channels). marks: see `volumes.decode`."""
    with limits.Bounded(path) as file, Image.open(file, formats=PICTURES) as image:
        limits.require_values(path, (*image.size, len(image.getbands())), limits.SLICE)
        limits.require_one_frame(getattr(image, "n_frames", 1))
        if is_png and _is_deep(path):  # Pillow reads it as if it had 8 bits
            values = imagecodecs.png_decode(path.read_bytes())
        elif image.mode in ("P", "PA"):
            values = np.asarray(image.convert("RGB"))
            if marks:
                indices = np.asarray(image)
                values = _labels(indices if indices.ndim == 2 else indices[..., 0], values)
        else:
            values = np.asarray(image.convert("L") if image.mode == "1" else image)
            if marks and image.format in LOSSY:  # which make noise beside edges
                values = np.where(values > 127, np.uint8(255), np.uint8(0))
    if values.ndim == 3 and values.shape[2] == 2 and not marks:  # grey and transparency
        values = values[..., 0]
    return values


def _is_deep(path: Path) -> bool:
    """Whether a PNG file has 16 bits in each of several channels."""
    with open(path, "rb") as file:
        start = file.read(26)
    return start[24:25] == b"\x10" and start[25:26] != b"\0"


def _labels(indices: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """What a mask (H, W) of a palette marks, shown in colours (H, W, 3): labels, or grey levels.

    ValueError where a marked index is black or 0 is not: it is unknown which of both is meant.
    """
    if ((indices > 0) != colours.any(axis=2)).any():
        raise ValueError(
            "a palette that shows 0 as a colour, or labels as black: do indices or colours mark "
            "the lungs? save the mask as grey levels, 0 outside"
        )
    is_grey = (colours == colours[..., :1]).all() and len(np.unique(indices)) > LABELS
    return colours[..., 0] if is_grey else indices


def open_tiff(path: Path) -> tifffile.TiffFile:
    """A TIFF file by its own pages: no other file is read, which OME-XML and the like may name."""
    return tifffile.TiffFile(path, is_ome=False, is_mmstack=False, is_ndtiff=False)


def decode_tiff(path: Path, most: int, marks: bool) -> tuple[np.ndarray, bool]:
    """Values of a TIFF file; whether their last axis is of colours. marks: see `volumes.decode`."""
    with open_tiff(path) as file:
        parts = pages(path, file, most)
        for page in file.pages:
            if not all(page.databytecounts):
                raise ValueError("parts of the picture are not there: damaged")
            if page.compression in JPEG_IN_TIFF:
                offsets = page.dataoffsets, page.databytecounts
                for data, _ in file.filehandle.read_segments(*offsets):
                    decoders.require_end(data or b"")
        values = np.stack([part.asarray() for part in parts])
        values = values if len(parts) > 1 else values[0]
        axes = "I" * (len(parts) > 1) + parts[0].axes
        if parts[0].keyframe.photometric == tifffile.PHOTOMETRIC.PALETTE:
            colours = parts[0].keyframe.colormap[:, values] >> 8
            shown = np.moveaxis(colours, 0, -1).astype(np.uint8)
            values = _labels(values, shown) if marks else shown
            return values, not marks
    if "S" not in axes:
        return values, False
    return np.moveaxis(values, axes.index("S"), -1), True


def is_of_several_files(path: Path) -> bool:
    """Whether a TIFF file's OME-XML says that it is a part of a volume in several files."""
    with open_tiff(path) as file:
        description = file.pages[0].description if len(file.pages) else ""
    return len(set(re.findall(r'FileName="([^"]+)"', description))) > 1


def pages(path: Path, file: tifffile.TiffFile, most: int) -> list[tifffile.TiffPageSeries]:
    """The pictures of a TIFF file, all of one size and kind."""
    limits.require_tiff(path, file, most)
    kinds = {(part.shape, part.axes, part.dtype) for part in file.series}
    if len(kinds) > 1:
        found = ", ".join(f"{shape} of {dtype}" for shape, _, dtype in sorted(kinds, key=str))
        raise ValueError(f"{len(file.series)} pictures of several sizes ({found}), expected one")
    limits.require_values(path, (len(file.series), *file.series[0].shape), most)
    return file.series


def mark_levels(values: np.ndarray, path: Path) -> np.ndarray:
    """What a mask (..., 2 to 4) in colours, the last of which may be transparency, marks, as (...).

    Its colours, or its opacity where it is drawn in one colour upon nothing. ValueError where both
    mark something, but not the same.
    """
    has_alpha = values.shape[-1] in (2, 4)
    colours = (values[..., :-1] if has_alpha else values).max(axis=-1)
    if not has_alpha and colours.all():
        raise ValueError(f"{path}: colours everywhere, expected a mask: black outside")
    if not has_alpha or (values[..., -1] == values.flat[-1]).all():
        return colours
    opacity = values[..., -1]
    drawn = colours[opacity > 0]
    if (drawn == drawn[0]).all():
        return opacity
    if colours[opacity == 0].any():
        raise ValueError(
            f"{path}: colours and transparency mark different pixels; save the mask as grey "
            "levels, 0 outside"
        )
    return colours


def grey_levels(values: np.ndarray, path: Path) -> np.ndarray:
    """Colours (..., 3 or 4) that are greys as (...); ValueError where they are not."""
    rgb = values[..., :3]
    if not (rgb == rgb[..., :1]).all():
        raise ValueError(f"{path}: a colour image, expected grey levels")
    return rgb[..., 0]
