"""Pictures of slices side by side: grids of samples, panels of reconstructions."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.segmentation import find_boundaries

from fibldm.disk import write_atomically

OUTLINE = (255, 190, 0)
MIN_CELL = 128  # pixels: smaller slices are enlarged by a whole factor
SHEET_CELL, CAPTION_LINES, CAPTION_WIDTH = 224, 5, 34  # pixels; lines; characters a line, at most


def grey(images: np.ndarray) -> np.ndarray:
    """(N, H, W) in [-1, 1] -> RGB uint8 (N, H, W, 3)."""
    pixels = np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1)


def overlay(images: np.ndarray, contours: np.ndarray) -> np.ndarray:
    """Slices (N, H, W) in [-1, 1] with the borders of contours (N, K, H, W) drawn on, as RGB."""
    rgb = grey(images)
    for picture, contour in zip(rgb, contours, strict=True):
        for channel in contour:
            picture[find_boundaries(channel > 0, mode="inner")] = OUTLINE
    return rgb


def beside(columns: Sequence[np.ndarray]) -> np.ndarray:
    """RGB pictures of one size in a row, with white lines between."""
    line = np.full((len(columns[0]), max(1, len(columns[0]) // 64), 3), 255, np.uint8)
    parts = [part for column in columns for part in (line, column)]
    return np.concatenate(parts[1:], axis=1)


def write_panel(path: Path, columns: dict[str, np.ndarray], per_line: int = 4) -> None:
    """Write a PNG: for each of N items its cells side by side, `per_line` items a line.

    `columns` maps a title to RGB uint8 (N, H, W, 3), all of one shape.
    """
    titles, arrays = list(columns), list(columns.values())
    count, height, width = arrays[0].shape[:3]
    factor = -(-MIN_CELL // height)
    height, width = factor * height, factor * width
    per_line = min(per_line, count)
    lines, gap, header = -(-count // per_line), 8, 24
    item = width * len(arrays) + gap
    canvas = Image.new("RGB", (per_line * item - gap, header + lines * (height + gap) - gap))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for i in range(per_line):
        for j, title in enumerate(titles):
            draw.text((i * item + j * width + 4, 3), title, font=font, fill=(255, 255, 255))
    for i in range(count):
        top, left = header + (i // per_line) * (height + gap), (i % per_line) * item
        for j, array in enumerate(arrays):
            cell = Image.fromarray(array[i]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(cell, (left + j * width, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, canvas.save)


def write_samples(path: Path, images: np.ndarray, contours: np.ndarray | None) -> None:
    """The grid of samples (N, H, W) in [-1, 1]: contour, sample, overlay; or samples alone."""
    if contours is None:
        write_panel(path, {"sample": grey(images)}, per_line=8)
        return
    drawn = grey(2.0 * contours.max(axis=1) - 1)
    columns = {"contour": drawn, "sample": grey(images), "overlay": overlay(images, contours)}
    write_panel(path, columns, per_line=4)


def write_reconstructions(path: Path, inputs: np.ndarray, outputs: np.ndarray) -> None:
    """The VAE's panel of slices (N, H, W) in [-1, 1]: input, reconstruction, 4 x the difference."""
    columns = {
        "input": grey(inputs),
        "reconstruction": grey(outputs),
        "4 x difference": grey(4 * (outputs - inputs)),
    }
    write_panel(path, columns, per_line=2)


def _broken(caption: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """A caption's lines, none of them longer than a cell of the sheet."""
    for width in range(CAPTION_WIDTH, 1, -1):
        lines = textwrap.wrap(caption, width)
        if all(font.getlength(line) <= SHEET_CELL for line in lines):
            break
    return lines


def write_sheet(path: Path, cells: list[tuple[np.ndarray, str]]) -> None:
    """Write a PNG of pictures, RGB uint8 (H, W, 3) of any size, each with its caption below.

    A caption is broken into lines and cut off after CAPTION_LINES of them; one that starts with
    "!" is in the colour of OUTLINE.
    """
    per_line = min(8, len(cells))
    font, gap, text_height = ImageFont.load_default(13), 8, 17
    texts = [_broken(caption, font)[:CAPTION_LINES] for _, caption in cells]
    tops = [0]
    for start in range(0, len(cells), per_line):
        most = max(len(text) for text in texts[start : start + per_line])
        tops.append(tops[-1] + SHEET_CELL + most * text_height + gap)
    canvas = Image.new("RGB", (per_line * (SHEET_CELL + gap) - gap, tops[-1]))
    draw = ImageDraw.Draw(canvas)
    for i, ((picture, _), text) in enumerate(zip(cells, texts, strict=True)):
        left, top = i % per_line * (SHEET_CELL + gap), tops[i // per_line]
        factor = SHEET_CELL / max(picture.shape[:2])
        size = [max(1, round(side * factor)) for side in picture.shape[1::-1]]
        canvas.paste(Image.fromarray(picture).resize(size), (left, top))
        colour = OUTLINE if text and text[0].startswith("!") else (255, 255, 255)
        for k, line in enumerate(text):
            at = left, top + SHEET_CELL + 1 + k * text_height
            draw.text(at, line, font=font, fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, canvas.save)
