"""A folder of samples: how `sample.py` writes it, and how evaluations read it."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fibldm import ct, export, limits
from fibldm.conditions import PAIRED, SUFFIXES, Conditions, label_name
from fibldm.disk import file_hash, replace_text
from fibldm.lungs import lung_mask
from fibldm.metrics import contour_dice
from fibldm.panels import write_samples
from fibldm.synthesis import ATTEMPTS
from fibldm.tables import Row, list_some, read_csv, write_csv

COLUMNS = ("file", "contour", "label", "seed", "attempt", "vae", "unet", "controlnet")
LEFT = ("samples.csv", "dataset.json", "args.json")  # what a run leaves beside its samples


def describe_copies(copies: Sequence[tuple[int, str]], left_out: Sequence[str]) -> str:
    """How many samples were drawn again, of how many patients, and which are not written.

    copies: (number, training patient) of each draw that was a copy.
    """
    again, patients = len({i for i, _ in copies}), len({patient for _, patient in copies})
    text = f"{again} samples drawn again ({len(copies)} draws were copies, of {patients} training "
    text += "patients)"
    if left_out:
        text += f"\nWARNING: {len(left_out)} samples are not written, still copies after "
        text += f"{ATTEMPTS} attempts:{list_some(left_out)}"
    return text


class SampleFolder:
    """A folder that gets samples: begun, gone on with, and whole once it has samples.csv.

    settings: what the samples follow from ("samples_of" is its hash, "environment" may differ
    where all samples are there); kept as args.json. Raises ValueError where the folder holds
    something else and `overwrite` is not given.
    """

    def __init__(self, folder: Path, file_format: str, settings: dict, overwrite: bool) -> None:
        self.folder, self.suffix, self.settings = folder, export.SUFFIXES[file_format], settings
        args, self.table = folder / "args.json", folder / "samples.csv"
        before = limits.read_json(args) if args.is_file() else {}
        if before and not (isinstance(before, dict) and "samples_of" in before):
            raise ValueError(f"{folder} holds a run of another script; use another --output_dir")
        if not before and not self.table.exists() and (folder / "dataset.json").exists():
            raise ValueError(
                f"{folder} holds a dataset.json of other images; use another --output_dir"
            )
        self.begun = self.whole = False
        if overwrite or not (before or self.table.exists()):
            return
        if settings | {"environment": None} != before | {"environment": None}:
            raise ValueError(
                f"{folder} holds other samples already; use --overwrite or another --output_dir"
            )
        environments = [s["environment"] | {"command": None} for s in (settings, before)]
        self.whole = self.table.exists()
        self.begun = self.whole or environments[0] == environments[1]

    def open(self, window: ct.Window, pixel_spacing: float | None) -> None:
        """Make the folder ready: remove what other runs left, write args.json and dataset.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.begun and any((self.folder / name).exists() for name in LEFT):
            self.table.unlink(missing_ok=True)  # first: it tells that all is there
            numbered = f"sample_{'[0-9]' * 5}*"
            for suffix in export.SUFFIXES.values():
                for path in self.folder.glob(numbered + suffix):
                    path.unlink()
            for name in LEFT:
                (self.folder / name).unlink(missing_ok=True)
        replace_text(self.folder / "args.json", json.dumps(self.settings, indent=2) + "\n")
        if self.suffix == ".png":
            export.require_scale(self.folder, window, pixel_spacing)

    def path(self, index: int) -> Path:
        return self.folder / f"sample_{index:05d}{self.suffix}"

    def look(
        self, indices: Sequence[int], asked: Conditions, window: ct.Window, shown: int
    ) -> tuple[list[np.ndarray], list[float]]:
        """The first `shown` samples, (S, S) in [-1, 1], and the Dice of contours and lungs of all.

        They are read from the files: what is given away is what is measured.
        """
        images, agreement = [], []
        rescale = export.png_info(window).rescale if self.suffix == ".png" else None
        for i in indices:
            hu = ct.read_hu(self.path(i), rescale, window)
            if len(images) < shown:
                images.append(ct.hu_to_unit(hu, window))
            if asked.contours is not None:
                contour = asked.of([i]).max(axis=1) > 0
                agreement.append(float(contour_dice(lung_mask(hu)[None], contour)[0]))
        return images, agreement

    def finish(
        self,
        indices: Sequence[int],
        rows: list[dict[str, object]],
        asked: Conditions,
        images: Sequence[np.ndarray],
    ) -> None:
        """Write grid.png of the first images (S, S) and, last, samples.csv of all indices.

        rows: what the table says of each sample, besides its file and what was asked for.
        """
        shown = asked.of(indices[: len(images)])
        write_samples(self.folder / "grid.png", np.stack(images), shown)
        for i, row in zip(indices, rows, strict=True):
            k = i % len(asked.names)
            row |= {"file": self.path(i).name, "contour": asked.names[k]}
            row["label"] = label_name(asked.labels[k])
        write_csv(self.table, rows, COLUMNS)


@dataclass(frozen=True)
class SampleFile:
    """A generated slice and what was asked for: the contour of a real row, or one in a file."""

    path: Path
    label: str = ""
    row: int | None = None
    contour: Path | None = None


@dataclass(frozen=True)
class Samples:
    """The samples of a folder, how their HU are read, and what their samples.csv says."""

    items: list[SampleFile]
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
        items = [SampleFile(path) for path in files if path.name != "grid.png"]
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


def has_contour(sample: SampleFile) -> bool:
    return sample.row is not None or sample.contour is not None


def read_samples_table(path: Path, rows: list[Row]) -> tuple[list[SampleFile], dict[str, str]]:
    """The samples of samples.csv, and the checkpoints that it names."""
    table = read_csv(path)
    if "file" not in table.columns:
        raise ValueError(f"{path}: columns {list(table.columns)}, expected file, contour, label")
    lines = table.to_dict("records")
    outside = [line["file"] for line in lines if not limits.inside(line["file"])]
    if outside:
        raise ValueError(f"{path}: files that are not beside it:{list_some(outside)}")
    known = {row.image: i for i, row in enumerate(rows)}
    items, lost = [], []
    for line in lines:
        contour, row, file = line.get("contour", ""), None, None
        if contour.startswith(PAIRED):
            row = known.get(contour.removeprefix(PAIRED))
            if row is None:
                lost.append(contour.removeprefix(PAIRED))
        elif contour:
            beside = path.parent / contour
            file = beside if beside.is_file() else Path(contour)
            if not file.is_file():
                lost.append(contour)
        name = path.parent / line["file"]
        items.append(SampleFile(name, line.get("label", ""), row, file))
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
        files = sorted({line.get(kind, "") for line in lines} - {""})
        if files:
            models[kind] = ", ".join(describe_file(Path(file)) for file in files)
    return items, models


def describe_file(path: Path) -> str:
    """A checkpoint's name, and the start of its hash where the file is there."""
    return f"{path.name}, SHA-256 {file_hash(path)[:12]}" if path.is_file() else path.name


def check_samples(
    items: list[SampleFile], info: ct.DatasetInfo, window: ct.Window, folder: Path
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

    def look(item: SampleFile) -> str | tuple[tuple[int, ...], float, float]:
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
