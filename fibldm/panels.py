"""Pictures of slices side by side: grids of samples, panels of reconstructions."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.segmentation import find_boundaries

from fibldm.disk import write_atomically

OUTLINE = (255, 190, 0)
REAL = "real slice"  # the title of its column
MIN_CELL = 128  # pixels: smaller slices are enlarged by a whole factor
PANEL_LINE = 18  # pixels from one line of text to the next
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


def write_panel(
    path: Path,
    columns: dict[str, np.ndarray],
    per_line: int = 4,
    captions: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Write a PNG: for each of N items its cells side by side, `per_line` items a line.

    `columns` maps a title to RGB uint8 (N, H, W, 3), all of one shape; `captions` a title to N
    texts below its cells. Titles and captions are broken into lines where they are long.
    """
    arrays = list(columns.values())
    count, height, width = arrays[0].shape[:3]
    factor = -(-MIN_CELL // height)
    height, width = factor * height, factor * width
    per_line = min(per_line, count)
    font, gap = ImageFont.load_default(15), 8
    titles = [_broken(title, font, width - 8) for title in columns]
    below = {
        list(columns).index(title): [_broken(text, font, width - 8) for text in texts]
        for title, texts in captions.items()
    }
    header = 6 + PANEL_LINE * max(1, *map(len, titles))
    texts = [len(text) for column in below.values() for text in column]
    footer = PANEL_LINE * max(texts, default=0) + 4 * any(texts)
    item, line = width * len(arrays) + gap, height + footer + gap
    lines = -(-count // per_line)
    canvas = Image.new("RGB", (per_line * item - gap, header + lines * line - gap))
    draw = ImageDraw.Draw(canvas)
    for i, (j, title) in product(range(per_line), enumerate(titles)):
        _write_lines(draw, (i * item + j * width + 4, 3), title, font)
    for i, (j, array) in product(range(count), enumerate(arrays)):
        top, left = header + (i // per_line) * line, (i % per_line) * item + j * width
        cell = Image.fromarray(array[i]).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(cell, (left, top))
        if j in below:
            _write_lines(draw, (left + 4, top + height + 2), below[j][i], font)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, canvas.save)


def _write_lines(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[str], font: ImageFont.FreeTypeFont
) -> None:
    for k, line in enumerate(lines):
        draw.text((at[0], at[1] + k * PANEL_LINE), line, font=font, fill=(255, 255, 255))


def write_samples(
    path: Path, images: np.ndarray, contours: np.ndarray | None, captions: Sequence[str] = ()
) -> None:
    """The grid of samples (N, H, W) in [-1, 1], with N captions if there are any.

    Contour, sample, overlay; or samples alone.
    """
    below = {"sample": captions} if captions else {}
    if contours is None:
        write_panel(path, {"sample": grey(images)}, per_line=8, captions=below)
        return
    drawn = grey(2.0 * contours.max(axis=1) - 1)
    columns = {"contour": drawn, "sample": grey(images), "overlay": overlay(images, contours)}
    write_panel(path, columns, per_line=4, captions=below)


def write_comparison(
    path: Path,
    samples: dict[str, np.ndarray],
    contours: np.ndarray | None,
    real: np.ndarray | None,
    captions: dict[str, Sequence[str]],
) -> None:
    """The grid of samples that differ in their label alone, a row for each of N noises.

    Contour, real slice, a column for each title of `samples` (N, H, W) in [-1, 1], and the last of
    them with its contour; without contours or real slices (N, H, W) these columns are left out.
    captions: N texts below the cells of a title; that of real slices is REAL.
    """
    columns = {} if contours is None else {"contour": grey(2.0 * contours.max(axis=1) - 1)}
    columns |= {} if real is None else {REAL: grey(real)}
    columns |= {title: grey(images) for title, images in samples.items()}
    if contours is not None:
        title, images = list(samples.items())[-1]
        columns[f"contour on {title}"] = overlay(images, contours)
    write_panel(path, columns, per_line=1, captions=captions)


def write_reconstructions(path: Path, inputs: np.ndarray, outputs: np.ndarray) -> None:
    """The VAE's panel of slices (N, H, W) in [-1, 1]: input, reconstruction, 4 x the difference."""
    columns = {
        "input": grey(inputs),
        "reconstruction": grey(outputs),
        "4 x difference": grey(4 * (outputs - inputs)),
    }
    write_panel(path, columns, per_line=2)


def _broken(caption: str, font: ImageFont.FreeTypeFont, pixels: int = SHEET_CELL) -> list[str]:
    """A caption's lines, none of them longer than a cell of so many pixels."""
    for width in range(CAPTION_WIDTH, 0, -1):
        lines = [line for part in caption.splitlines() for line in textwrap.wrap(part, width)]
        if all(font.getlength(line) <= pixels for line in lines):
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
