"""A folder of generated slices as sample.py writes it, and what was asked of each of them."""

import csv
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fibldm import ct, limits
from fibldm.disk import file_hash
from fibldm.tables import Row, list_some

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".npy", ".nii", ".nii.gz", ".dcm")
PAIRED = "contour of "  # before an image of label.csv, in the column `contour` of samples.csv


@dataclass(frozen=True)
class Sample:
    """A generated slice and what was asked for: the contour of a real row, or one in a file."""

    path: Path
    label: str = ""
    row: int | None = None
    contour: Path | None = None


@dataclass(frozen=True)
class Samples:
    """The samples of a folder, how their HU are read, and what their samples.csv says."""

    items: list[Sample]
    info: ct.DatasetInfo
    size: int
    models: dict[str, str]


def read_samples(folder: Path, rows: list[Row], window: ct.Window) -> tuple[Samples, list[str]]:
    """The folder's samples, all decoded once; and notes. ValueError says what they lack."""
    if not folder.is_dir():
        raise ValueError(f"--samples {folder}: no such folder")
    table, notes, models = folder / "samples.csv", [], {}
    if table.is_file():
        items, models = read_samples_table(table, rows)
    else:
        files = sorted(p for p in folder.iterdir() if p.name.lower().endswith(SUFFIXES))
        items = [Sample(path) for path in files if path.name != "grid.png"]
        notes.append(
            "No samples.csv beside the samples: which contours they were asked to follow is not "
            "known. Control and pairs are left out."
        )
    if not items:
        raise ValueError(
            f"--samples {folder}: no samples in it; expected what sample.py writes: images "
            f"({', '.join(SUFFIXES)}) and samples.csv"
        )
    if table.is_file() and not any(has_contour(item) for item in items):
        notes.append("samples.csv names no contours: control and pairs are left out.")
    info = ct.read_dataset_info(folder)
    size, some = check_samples(items, info, window, folder)
    return Samples(items, info, size, models), notes + some


def has_contour(sample: Sample) -> bool:
    return sample.row is not None or sample.contour is not None


def read_samples_table(path: Path, rows: list[Row]) -> tuple[list[Sample], dict[str, str]]:
    """The samples of samples.csv, and the checkpoints that it names."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table: {error}") from error
    if lines and not lines[0].get("file"):
        raise ValueError(f"{path}: columns {list(lines[0])}, expected file, contour, label")
    outside = [line["file"] for line in lines if not limits.inside((line["file"] or "").strip())]
    if outside:
        raise ValueError(f"{path}: files that are not beside it:{list_some(outside)}")
    known = {row.image: i for i, row in enumerate(rows)}
    items, lost = [], []
    for line in lines:
        contour, row, file = (line.get("contour") or "").strip(), None, None
        if contour.startswith(PAIRED):
            row = known.get(contour.removeprefix(PAIRED))
            if row is None:
                lost.append(contour.removeprefix(PAIRED))
        elif contour:
            beside = path.parent / contour
            file = beside if beside.is_file() else Path(contour)
            if not file.is_file():
                lost.append(contour)
        name = path.parent / (line["file"] or "").strip()
        items.append(Sample(name, (line.get("label") or "").strip(), row, file))
    missing = [str(item.path) for item in items if not item.path.is_file()]
    if missing:
        raise ValueError(f"{path}: {len(missing)} samples are not there:{list_some(missing)}")
    if lost:
        raise ValueError(
            f"{path}: {len(lost)} of {len(items)} contours are not found; --real is to be the data "
            f"set that the samples' contours are of:{list_some(lost)}"
        )
    models = {}
    for kind in ("vae", "unet", "controlnet"):
        files = sorted({line.get(kind) or "" for line in lines} - {""})
        if files:
            models[kind] = ", ".join(describe_file(Path(file)) for file in files)
    return items, models


def describe_file(path: Path) -> str:
    """A checkpoint's name, and the start of its hash where the file is there."""
    return f"{path.name}, SHA-256 {file_hash(path)[:12]}" if path.is_file() else path.name


def check_samples(
    items: list[Sample], info: ct.DatasetInfo, window: ct.Window, folder: Path
) -> tuple[int, list[str]]:
    """Decode all samples; return their side and notes. ValueError lists those that do not fit."""
    low, high = window
    if info.rescale is not None and all(item.path.suffix == ".png" for item in items):
        slope, intercept = info.rescale
        least, most = intercept, intercept + ct.PNG_LEVELS * slope
        if least > low + 1 or most < high - 1:
            raise ValueError(
                f"--samples {folder}: another window: by their dataset.json they can hold "
                f"{least:g} to {most:g} HU, expected {low:g} to {high:g}; give --window "
                f"{least:g} {most:g} if that is the data's, or sample by a model of this window"
            )

    def look(item: Sample) -> str | tuple[tuple[int, ...], float, float]:
        try:
            hu = ct.read_hu(item.path, info.rescale, window)
        except ValueError as error:
            remedy = ct.SCALE_REMEDY.replace("label.csv", "the samples")
            return str(error).replace(ct.SCALE_REMEDY, remedy)
        return hu.shape, float(hu.min()), float(hu.max())

    with ThreadPoolExecutor(4) as pool:
        seen = list(tqdm(pool.map(look, items), "checking samples", len(items), disable=None))
    bad = [result for result in seen if isinstance(result, str)]
    if bad:
        raise ValueError(f"{len(bad)} of {len(items)} samples are bad:{list_some(bad)}")
    shapes = Counter(shape for shape, _, _ in seen)
    usual = shapes.most_common(1)[0][0]
    others = [
        f"{item.path.name}: {shape[0]}x{shape[1]}"
        for item, (shape, _, _) in zip(items, seen, strict=True)
        if shape != usual
    ]
    if others:
        raise ValueError(
            f"--samples {folder}: sizes differ: {shapes[usual]} samples have {usual[0]}x{usual[1]} "
            f"pixels, {len(others)} have not; evaluate them apart:{list_some(others)}"
        )
    if usual[0] != usual[1]:
        raise ValueError(f"--samples {folder}: {usual[0]}x{usual[1]} pixels, expected squares")
    notes = []
    lowest, highest = min(least for _, least, _ in seen), max(most for _, _, most in seen)
    if lowest < low - 1 or highest > high + 1:
        notes.append(
            f"Samples hold {lowest:.0f} to {highest:.0f} HU: they are clipped to the window as the "
            "real slices are."
        )
    if lowest > low + 100 or highest < high - 100:
        notes.append(
            f"WARNING: samples hold {lowest:.0f} to {highest:.0f} HU only, the window is {low:g} "
            f"to {high:g}: were they made with another window?"
        )
    return usual[0], notes
