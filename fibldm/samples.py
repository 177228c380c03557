"""A folder of samples: how `sample.py` writes it, and how evaluations read it."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fibldm import comparison, ct, export, limits
from fibldm.conditions import PAIRED, SUFFIXES, Conditions, label_caption, label_name
from fibldm.datasets import chunks
from fibldm.disease import high_attenuation
from fibldm.disk import file_hash, replace_text
from fibldm.encoding import LatentDataset
from fibldm.lungs import lung_mask
from fibldm.metrics import contour_dice
from fibldm.panels import write_samples
from fibldm.privacy import Privacy, read_privacy
from fibldm.synthesis import ATTEMPTS, NEXT_SEED, Sample, Sampling, Synthesizer
from fibldm.tables import Row, list_some, read_csv, write_csv

COLUMNS = ("file", "contour", "label", "noise", "seed", "attempt", "vae", "unet", "controlnet")
LEFT = ("samples.csv", "dataset.json", "args.json")  # what a run leaves beside its samples
GRID = 32  # samples in grid.png, unless labels are compared


class Look(NamedTuple):
    """What a sample's file shows: Dice of contour and lungs (NaN without contour), and the share of
    the lungs with high attenuation (NaN without lungs)."""

    sample: int
    dice: float
    high_attenuation: float


def draw(
    model: Synthesizer,
    asked: Conditions,
    noises: Sequence[int],
    there: Collection[int],
    seed: int,
    how: Sampling,
    batch_size: int,
    avoid: Privacy | None,
) -> Iterator[tuple[int, Sample]]:
    """Each sample of these noises, with its number, but for batches that are `there` whole.

    A batch of which some are there is drawn whole: in another the last bits would differ. What the
    models cannot give is refused at once, by ValueError.
    """

    def numbered(drawn: Iterator[Sample], k: int) -> Iterator[tuple[int, Sample]]:
        return ((sample.index * asked.per_noise + k, sample) for sample in drawn)

    parts = []
    for k, label in enumerate(asked.compared or [asked.labels]):
        batches = [
            batch
            for batch in chunks(noises, batch_size)
            if not all(noise * asked.per_noise + k in there for noise in batch)
        ]
        drawn = model.sample(
            asked.contours, label, indices=chain(*batches), seed=seed,
            batch_size=batch_size, avoid=avoid, copies=True, **asdict(how),
        )  # fmt: skip
        parts.append(numbered(drawn, k))
    return chain.from_iterable(parts)


def read_avoid(folder: str | None, vae_file: str) -> tuple[Privacy | None, list[str]]:
    """The training slices of --drop_copies with thresholds by its held-out ones, and notes."""
    if folder is None:
        return None, []
    data = LatentDataset(folder)
    data.lineage(vae_file)
    privacy, what = read_privacy(data), f"--drop_copies {folder}"
    if privacy is None:
        raise ValueError(
            f"{what}: fewer than 2 held-out slices, expected more: they tell how near is too near"
        )
    caution = privacy.caution()
    return privacy, [f"WARNING: {what}: {caution}"] if caution else []


# What is said of samples.


def describe_copies(
    copies: Sequence[tuple[int, str]], left_out: Sequence[str], asked: Conditions
) -> str:
    """How many samples were drawn again, of how many patients, and which are not written.

    copies: (number, training patient) of each draw that was a copy.
    """
    again, patients = len({i for i, _ in copies}), len({patient for _, patient in copies})
    text = f"{again} samples drawn again ({len(copies)} draws were copies, of {patients} training "
    text += "patients)"
    if asked.compared and again:
        drawn = Counter(label_caption(asked.label(i)) for i in {i for i, _ in copies})
        text += f": {', '.join(f'{count} of {label}' for label, count in drawn.items())}"
        text += "\nSamples drawn again have other noise than those beside them (samples.csv: seed)."
    if left_out:
        text += f"\nWARNING: {len(left_out)} samples are not written, still copies after "
        text += f"{ATTEMPTS} attempts:{list_some(left_out)}"
    return text


def describe_agreement(looks: Sequence[Look]) -> str:
    """How well the lungs of samples follow the contours."""
    mean = np.mean([look.dice for look in looks])
    return f"mean Dice of contours and lungs segmented from {len(looks)} samples: {mean:.3f}"


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

    def _read(self, index: int, window: ct.Window) -> np.ndarray:
        """A sample's HU, (S, S), from its file: what is given away is what is measured."""
        rescale = export.png_info(window).rescale if self.suffix == ".png" else None
        return ct.read_hu(self.path(index), rescale, window)

    def look(self, indices: Sequence[int], asked: Conditions, window: ct.Window) -> list[Look]:
        """How well the lungs follow the contours, and how diseased they are."""
        found = []
        for i in indices:
            hu = self._read(i, window)
            mask, contour = lung_mask(hu), asked.of([i])
            dice = np.nan if contour is None else contour_dice(mask[None], contour.max(1) > 0)[0]
            found.append(Look(i, float(dice), high_attenuation(hu, mask)))
        return found

    def finish(
        self,
        attempts: Mapping[int, int],
        seed: int,
        models: dict[str, str],
        asked: Conditions,
        window: ct.Window,
    ) -> None:
        """Write grid.png and, last, samples.csv, which tells that all is there.

        attempts: of each sample that is written; models: the checkpoints.
        """
        grid = self.folder / "grid.png"
        if asked.compared:
            read = partial(self._read, window=window)
            comparison.write_rows(grid, attempts, asked, read)
        else:
            self._write_grid(grid, sorted(attempts)[:GRID], asked, window)
        rows = [
            {
                "file": self.path(i).name,
                "contour": asked.names[asked.place(i)],
                "label": label_name(asked.label(i)),
                "noise": i // asked.per_noise,
                "seed": seed + attempts[i] * NEXT_SEED,
                "attempt": attempts[i],
                **models,
            }
            for i in sorted(attempts)
        ]
        write_csv(self.table, rows, COLUMNS)

    def _write_grid(
        self, path: Path, shown: Sequence[int], asked: Conditions, window: ct.Window
    ) -> None:
        """Some samples, with the names of their labels where any has one."""
        images = np.stack([ct.hu_to_unit(self._read(i, window), window) for i in shown])
        labels = [asked.label(i) for i in shown]
        captions = [label_caption(label) for label in labels] if any(labels) else []
        write_samples(path, images, asked.of(shown), captions)


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
