"""The slices of an evaluation: which are compared; read, segmented and measured by processes.

What is kept of a slice is a few numbers; images and features of all slices lie on disk.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fibldm import ct, disease
from fibldm.datasets import CTDataset
from fibldm.disk import create_rows, file_hash
from fibldm.features import Networks
from fibldm.lungs import lung_mask
from fibldm.metrics import ContourAgreement, ImageSet, contour_dice, hausdorff95
from fibldm.samples import Samples, read_samples
from fibldm.tables import Row, Split, parse_table

BATCH = 32
NAN = float("nan")


# What is compared.


@dataclass(frozen=True)
class Inputs:
    """Slices to compare, all checked: nothing is computed yet. `no_copies` says why copies can't
    be looked for, "" where they can."""

    real: CTDataset
    rows: list[int]  # of `real` that are compared
    samples: Samples
    window: ct.Window
    train: CTDataset | None
    held_out: CTDataset | None
    no_copies: str
    notes: list[str]
    facts: dict[str, str]

    @property
    def patients(self) -> list[str]:
        return [self.real.rows[row].patient_id for row in self.rows]

    @property
    def real_labels(self) -> list[str]:
        return [self.real.rows[row].label for row in self.rows]

    @property
    def names(self) -> list[str]:
        return [item.path.name for item in self.samples.items]

    @property
    def asked_of(self) -> list[str]:
        """The patient whose contour each sample was asked to follow, or its name: samples that
        follow contours of one patient are no independent evidence."""
        return [
            item.path.name if item.row is None else self.real.rows[item.row].patient_id
            for item in self.samples.items
        ]

    @property
    def labels(self) -> list[str]:
        return [item.label for item in self.samples.items]

    @property
    def paired(self) -> bool:
        return any(item.row is not None for item in self.samples.items)


def read_inputs(
    real: Path, folder: Path, split: str, train: str | Path | None, window: ct.Window,
    patient_split: Split, size: int | None,
) -> Inputs:  # fmt: skip
    """Read and check what `evaluate` takes; size: that samples must have, None: any."""
    table = read_rows(real, patient_split)
    rows = [i for i, row in enumerate(table) if split in (row.split, "all")]
    if not rows:
        raise ValueError(f"{real}: none of its {len(table)} rows is in the {split} split")
    samples, notes = read_samples(folder, table, window)
    if size not in (None, samples.size):
        found, expected = f"{samples.size}x{samples.size}", f"{size}x{size}"
        raise ValueError(f"{folder}: samples of {found} pixels, expected {expected} as the VAE has")
    real_data = CTDataset(table, real, real, samples.size, window)
    train_rows, held_rows, held_folder, no_copies = (
        [],
        [],
        real,
        "no training data were given (--train).",
    )
    if train is not None:
        found = find_train(Path(train), patient_split, [table[row] for row in rows], real)
        train_rows, held_rows, held_folder, no_copies = found
    sides = [
        CTDataset(some, where, where, samples.size, window) if some else None
        for some, where in ((train_rows, Path(train or real)), (held_rows, held_folder))
    ]
    notes += real_data.notes()
    if split in ("train", "all"):
        notes.append("WARNING: the real slices include training slices (--split).")
    if split == "val" and any(row.split == "test" for row in table):
        notes.append("Checkpoints were chosen on these patients (--split val): report on test.")
    which = "all" if split == "all" else f"the {split} split"
    patients, trained = ({row.patient_id for row in some} for some in (
        [table[row] for row in rows], train_rows,
    ))  # fmt: skip
    facts = {
        "Samples": f"{len(samples.items)} slices of {samples.size}x{samples.size} pixels",
        "Real slices": f"{len(rows)} of {len(patients)} patients, {which} of label.csv (SHA-256 "
        f"{file_hash(real / 'label.csv')[:12]})",
        "Training slices": f"{len(train_rows)} of {len(trained)} patients"
        if train_rows
        else "not given",
        "Window": f"{window[0]:g} to {window[1]:g} HU",
        **{f"Samples' {kind}": text for kind, text in samples.models.items()},
    }
    if no_copies:
        no_copies = f"Copies were not looked for: {no_copies}"
    return Inputs(real_data, rows, samples, window, *sides, no_copies, notes, facts)


def read_rows(folder: Path, split: Split) -> list[Row]:
    """The rows of a folder's label.csv; no split of it needs to have patients."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with label.csv")
    rows, _, problems = parse_table(folder / "label.csv", folder, split)
    for problem in problems:
        if problem.kind != "empty split":
            raise ValueError(problem.message)
    return rows


def find_train(
    folder: Path, split: Split, real: list[Row], real_folder: Path
) -> tuple[list[Row], list[Row], Path, str]:
    """The training rows; held-out rows and their folder; and why copies can't be looked for.

    Held out are all of the folder's rows that are not in its train split, or else the real ones.
    """
    table = read_rows(folder, split)
    train = [row for row in table if row.split == "train"]
    if not train:
        raise ValueError(f"{folder}: none of its {len(table)} rows is in the train split")
    held_out, held_folder = [row for row in table if row.split != "train"], folder
    if not held_out:
        patients = {row.patient_id for row in train}
        held_out = [row for row in real if row.patient_id not in patients]
        held_folder = real_folder
    if len(held_out) >= 2:
        return train, held_out, held_folder, ""
    return train, [], held_folder, (
        f"{len(held_out)} slices of patients who are not trained on, expected 2 at least (100 for "
        "a percentile), to tell how near is too near."
    )  # fmt: skip


# Slices, one by one.


@dataclass(frozen=True)
class Measurement:
    """The numbers of one slice: its lungs' tissue, and how well they follow a contour."""

    measures: disease.Measures
    lung_count: int
    spacing: float = NAN  # mm of a pixel, NaN where unknown
    has_contour: bool = False
    dice: float = NAN  # of contour and lungs; NaN without contour
    hd95: float = NAN  # distance of their borders in pixels; NaN without contour or lungs
    implausible: str | None = None  # why these can't be lungs


@dataclass(frozen=True)
class MeasuredSlice:
    """One slice: its image (S, S) in [-1, 1], contour and lungs, bool (S, S), and its numbers."""

    image: np.ndarray
    lungs: np.ndarray
    contour: np.ndarray | None  # filled
    numbers: Measurement
    pair: np.ndarray | None = None  # (S, S) in [-1, 1]: the real slice whose contour was asked for


def filled_contour(contour: np.ndarray, size: int) -> np.ndarray:
    """A contour (K, H, W) of any style -> bool (size, size), the lungs that it asks for."""
    fitted = ct.fit_contour(contour, size)
    return ct.fill_outline(fitted.max(axis=0, keepdims=True))[0]


class SliceReader:
    """Reads and measures single slices; it travels to the processes that do so."""

    def __init__(self, real: CTDataset, samples: Samples, window: ct.Window) -> None:
        self.real, self.samples, self.window = real, samples, window

    def real_slice(self, row: int) -> MeasuredSlice:
        """A real slice as training sees it, and its own contour."""
        hu, contour = self.real.read_pair(row)
        contour = filled_contour(contour, self.samples.size)
        return self._measure(self._fit(hu), contour, self._spacing(hu))

    def sample(self, i: int, limits: disease.Limits | None = None) -> MeasuredSlice:
        """A sample, the contour it was asked to follow, and the real slice that has it."""
        item, size = self.samples.items[i], self.samples.size
        hu = ct.read_hu(item.path, self.samples.info.rescale, self.window)
        spacing, contour, pair = self.samples.info.pixel_spacing or NAN, None, None
        if item.row is not None:
            real_hu, contour = self.real.read_pair(item.row)
            contour, pair = filled_contour(contour, size), self._fit(real_hu)
            of_real = self._spacing(real_hu)
            spacing = spacing if np.isnan(of_real) else of_real
        elif item.contour is not None:
            contour = filled_contour(ct.read_contour(item.contour), size)
        found = self._measure(ct.hu_to_unit(hu, self.window), contour, spacing)
        hu = ct.unit_to_hu(found.image, self.window)
        reason = disease.implausible(hu, found.lungs, limits, self.window)
        return replace(found, pair=pair, numbers=replace(found.numbers, implausible=reason))

    def _measure(
        self, image: np.ndarray, contour: np.ndarray | None, spacing: float
    ) -> MeasuredSlice:
        hu = ct.unit_to_hu(image, self.window)
        lungs = lung_mask(hu)
        measures, count = disease.measure(hu, lungs, self.window), disease.count_lungs(lungs)
        dice = hd95 = NAN
        if contour is not None:
            dice = float(contour_dice(lungs[None], contour[None])[0])
            hd95 = float(hausdorff95(lungs[None], contour[None])[0])
        numbers = Measurement(measures, count, spacing, contour is not None, dice, hd95)
        return MeasuredSlice(image, lungs, contour, numbers)

    def _fit(self, hu: np.ndarray) -> np.ndarray:
        return ct.hu_to_unit(ct.fit_square(hu, self.samples.size, ct.AIR), self.window)

    def _spacing(self, hu: np.ndarray) -> float:
        """mm of a pixel after `_fit`; NaN where dataset.json does not say."""
        known = self.real.info.pixel_spacing
        return NAN if known is None else known * max(hu.shape) / self.samples.size


# Many slices.


class SliceSet:
    """Many slices, whose they are, and their labels; images and features in files of a folder.

    pairs: Networks.pairs of each slice and the real one whose contour it was given; NaN without.
    """

    def __init__(
        self, owners: Sequence[str], labels: Sequence[str], size: int, networks: Networks,
        folder: Path,
    ) -> None:  # fmt: skip
        folder.mkdir()
        self.owners, self.labels, self.networks = list(owners), list(labels), networks
        count, width = len(self.owners), networks.width
        self.images = create_rows(folder / "images.npy", np.float32, (count, size, size))
        self.features = np.empty((count, 0))
        if width:
            self.features = create_rows(folder / "features.npy", np.float32, (count, width))
        self.pairs = {name: np.full(count, NAN) for name in ("ssim", "lpips")}
        self.numbers: list[Measurement] = []

    def add(self, batch: list[MeasuredSlice]) -> None:
        """The next slices."""
        rows = len(self.numbers) + np.arange(len(batch))
        images = np.stack([one.image for one in batch])
        self.images[rows] = images
        self.features[rows] = self.networks.features(as_tensor(images)).numpy()
        paired = [k for k, one in enumerate(batch) if one.pair is not None]
        if paired:
            pairs = np.stack([batch[k].pair for k in paired])
            found = self.networks.pairs(as_tensor(images[paired]), as_tensor(pairs))
            for name, values in found.items():
                if len(values):
                    self.pairs[name][rows[paired]] = values
        self.numbers += [one.numbers for one in batch]

    @property
    def image_set(self) -> ImageSet:
        return ImageSet(self.images, self.features, self.owners)

    @property
    def measures(self) -> list[disease.Measures]:
        return [numbers.measures for numbers in self.numbers]

    @property
    def agreement(self) -> ContourAgreement:
        """Of the slices whose contour is known."""
        rows = [i for i, found in enumerate(self.numbers) if found.has_contour]
        columns = [[found.dice, found.hd95, found.spacing] for found in self.numbers]
        dice, hd95, spacing = np.array(columns).reshape(-1, 3)[rows].T
        return ContourAgreement(dice, hd95, spacing, [self.owners[i] for i in rows])


def as_tensor(images: np.ndarray) -> torch.Tensor:
    """(N, S, S) -> (N, 1, S, S)."""
    return torch.from_numpy(images)[:, None]


def image_of(data: CTDataset, row: int) -> np.ndarray:
    """A slice (S, S) in [-1, 1], as training has it."""
    return data[row]["image"][0].numpy()


def spread(count: int, shown: int) -> list[int]:
    """Evenly spaced numbers below count: nothing is chosen by its looks."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, shown)).round()})


class Calls(Dataset):
    """function(item) of each item, so that the processes of a DataLoader call it."""

    def __init__(self, function: Callable, items: Sequence) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> object:
        try:
            return self.function(self.items[i])
        except ValueError as error:  # a process of the pool would add its traceback to the message
            return error


def in_batches(
    function: Callable, items: Sequence, workers: int, what: str, size: int = BATCH
) -> Iterator[list]:
    """function(item) of each item in order, as lists of `size`, with a progress bar.

    `workers` processes call it, a little ahead of the use of what it returns; 0: this process.
    """
    own = torch.Generator()  # the global one stays where it is
    loader = DataLoader(
        Calls(function, items), size, num_workers=workers, collate_fn=list, generator=own
    )
    with tqdm(desc=what, total=len(items), disable=None) as bar:
        for batch in loader:
            for error in batch:
                if isinstance(error, ValueError):
                    raise error
            yield batch
            bar.update(len(batch))
