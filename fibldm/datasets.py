"""Slices listed in label.csv, latents encoded from them, and their split by patient."""

import csv
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from scipy.ndimage import affine_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fibldm import ct, distributed, limits
from fibldm.checkpoint import file_hash, require_equal, sync_folder
from fibldm.environment import environment
from fibldm.training import Batches, item_generator, item_noise, item_uniform, next_row
from fibldm.unet import NO_LABEL
from fibldm.vae import LATENT_SCALE, VAE

Item = TypeVar("Item")
SPLITS = ("train", "val", "test")
SHOWN = 20  # of a list of bad rows in an error
LINEAGE = ("vae", "latents", "contours", "label_csv")  # what latents come from, and they
NOTHING = -1  # where fewer rows are unreadable
SHARED_MEMORY = "/dev/shm"
MEASURED = 512  # contours at most, evenly spaced, whose style is measured


@dataclass(frozen=True)
class Split:
    """How patients without a `split` column are divided; kept in the VAE's checkpoint."""

    seed: int = 0
    val_fraction: float = 0.1
    test_fraction: float = 0.1

    def of(self, patient_id: str) -> str:
        """A stable hash of seed and patient decides, so that more patients reshuffle nobody."""
        digest = hashlib.sha256(f"{self.seed}:{patient_id}".encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        if position < self.val_fraction:
            return "val"
        return "test" if position < self.val_fraction + self.test_fraction else "train"


@dataclass(frozen=True)
class Row:
    """One line of label.csv; label is "" where there is none. View 0 is the slice itself."""

    image: str
    contour: str
    patient_id: str
    label: str
    split: str
    view: int = 0


@dataclass(frozen=True)
class Views:
    """How often each training slice is encoded: as it is, and moved and scaled a little.

    Latents can't be moved by less than a cell of the VAE, nor scaled: what is moved is the slice.
    """

    count: int = 1
    max_shift: float = 0.0  # of the side, each way, by whole pixels
    max_scale: float = 0.0  # 0.05: from 0.95 to 1.05 times its size

    def __post_init__(self) -> None:
        if not (0 <= self.max_shift <= 0.5 and 0 <= self.max_scale <= 0.5):
            raise ValueError(
                f"--max_shift {self.max_shift:g} --max_scale {self.max_scale:g}: expected 0 to 0.5"
            )

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, and at their end the further views of those in the train split."""
        train = [row for row in rows if row.split == "train"]
        return [*rows, *(replace(row, view=i) for i in range(1, self.count) for row in train)]

    def move(self, hu: np.ndarray, contour: np.ndarray, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """A square slice (S, S) and its contour (K, S, S) as this view shows them; air comes in.

        It depends on the image's name and the number of the view, not on the other rows.
        """
        if row.view == 0:
            return hu, contour
        name = int.from_bytes(hashlib.sha256(row.image.encode()).digest()[:8], "big")
        draws = 2 * item_generator(name, "view", row.view, 0).random(3) - 1
        shift = np.round(draws[:2] * self.max_shift * len(hu))
        scale = 1 + draws[2] * self.max_scale
        center = (np.array(hu.shape) - 1) / 2
        place = {"matrix": np.full(2, 1 / scale), "offset": center - (center + shift) / scale}
        moved = affine_transform(hu, **place, order=3, cval=ct.AIR)
        outlined = ct.contour_style(contour) == "outline"
        masks = ct.fill_outline(contour) if outlined else contour
        masks = np.stack([affine_transform(m.astype(np.uint8), **place, order=0) for m in masks])
        contour = ct.outline_mask(masks).astype(np.uint8) if outlined else masks
        return moved.clip(hu.min(), hu.max()), contour


def list_some(lines: Sequence[str]) -> str:
    shown = "\n  ".join(lines[:SHOWN])
    more = f"\n  ... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"\n  {shown}{more}"


@dataclass(frozen=True)
class TableProblem:
    """Something wrong in label.csv that training refuses, and the lines, files or patients."""

    kind: str
    names: list[str]
    message: str


def read_table(csv_file: str | Path, root: str | Path, split: Split) -> tuple[list[Row], list[str]]:
    """Read label.csv, whose paths are relative to `root`; return its rows and notes for the user.

    Raises ValueError for a missing or empty table, missing columns, files or patients.
    """
    rows, notes, problems = parse_table(csv_file, root, split)
    if problems:
        raise ValueError(problems[0].message)
    return rows, notes


def read_lines(path: str | Path) -> list[tuple[int, list[str]]]:
    """The lines of a CSV file that are not empty: their number in the file, their stripped cells.

    Raises ValueError naming the file where it can't be read.
    """
    limits.require_bytes(path, limits.TEXT)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV text file in UTF-8: {error}") from error
    return [(number, line) for number, line in lines if any(line)]


def parse_table(
    csv_file: str | Path, root: str | Path, split: Split
) -> tuple[list[Row], list[str], list[TableProblem]]:
    """`read_table` that returns all that is wrong beside the rows, which may lack cells and files.

    Raises ValueError where there are no rows: no table, no text, no second column.
    """
    csv_file, root, notes = Path(csv_file), Path(root), []
    problems: list[TableProblem] = []
    if not csv_file.is_file():
        raise ValueError(f"{csv_file}: no such file; expected a table with columns image,contour")
    numbered = read_lines(csv_file)
    lines = [line for _, line in numbered]
    if len(lines) < 2:
        raise ValueError(f"{csv_file}: {len(lines)} lines; expected a header and a line a slice")

    # Columns by name, or the first two.
    header = [name.lower() for name in lines[0]]
    if len(header) < 2:
        raise ValueError(
            f"{csv_file}: 1 column ({lines[0][0]!r}); expected at least two, image and contour"
        )
    column = {name: i for i, name in enumerate(header)}
    if "image" not in column or "contour" not in column:
        column |= {"image": 0, "contour": 1}
        notes.append(f"{csv_file}: columns {lines[0][:2]} are taken as image and contour")
    short = [f"line {i}: {line}" for i, line in numbered[1:] if len(line) < len(header)]
    if short:
        message = (
            f"{csv_file}: {len(short)} lines have fewer cells than the header's {len(header)}:"
            + list_some(short)
        )
        problems.append(TableProblem("short lines", short, message))

    # Rows, with their files and their split.
    rows, missing, unknown, outside = [], [], [], []
    for line in lines[1:]:
        line = line + [""] * (len(header) - len(line))
        cells = {name: line[i] for name, i in column.items()}
        patient = cells.get("patient_id") or cells["image"]
        part = cells.get("split", "").lower() or split.of(patient)
        if part not in SPLITS:
            unknown.append(part)
        rows.append(Row(cells["image"], cells["contour"], patient, cells.get("label", ""), part))
        pair = rows[-1].image, rows[-1].contour
        outside += [name for name in pair if not limits.inside(name)]
        missing += [n for n in pair if limits.inside(n) and not os.path.isfile(root / n)]
    if outside:
        message = (
            f"{csv_file}: {len(outside)} paths do not stay below {root}, expected paths relative "
            f"to it without ..:" + list_some([repr(name) for name in outside])
        )
        problems.append(TableProblem("paths that leave the folder", outside, message))
    if unknown:
        message = f"{csv_file}: split {unknown[0]!r}; expected one of {', '.join(SPLITS)}"
        problems.append(TableProblem("unknown split", unknown, message))
    if missing:
        message = (
            f"{csv_file}: {len(missing)} files are missing below {root} (paths in the table are "
            f"relative to that folder):" + list_some(missing)
        )
        problems.append(TableProblem("missing files", missing, message))
    problems += check_split(csv_file, rows)
    if "patient_id" not in column:
        notes.append(
            f"WARNING: {csv_file} has no patient_id column: each row counts as its own patient. If "
            "a patient has several slices, some land in training and some in validation, and "
            "held-out numbers will look better than they are."
        )
    return rows, notes, problems


def check_split(csv_file: Path, rows: list[Row]) -> list[TableProblem]:
    """Patients that are in two splits, and a split that training needs and nobody is in."""
    parts: dict[str, str] = {}
    torn: dict[str, str] = {}
    for row in rows:
        if parts.setdefault(row.patient_id, row.split) != row.split:
            torn.setdefault(row.patient_id, row.split)
    problems = []
    if torn:
        patient, second = next(iter(torn.items()))
        message = (
            f"{csv_file}: patient {patient} is in {parts[patient]} and in {second}; a patient's "
            "slices belong to one split"
        )
        problems.append(TableProblem("patient in two splits", list(torn), message))
    count = Counter(parts.values())
    for part, remedy in ("train", "lower"), ("val", "raise"):
        if not count[part]:
            message = (
                f"{csv_file}: of {len(parts)} patients none falls into the {part} split, expected "
                f"at least 1; {remedy} --val_fraction of train_vae.py, change its --split_seed, "
                "or add a split column"
            )
            problems.append(TableProblem("empty split", [part], message))
    return problems


class CTDataset(Dataset):
    """Slices of a table as {"image": (1, S, S) float32 in [-1, 1], "contour": (K, S, S), "row"}.

    The contour is uint8, 0 or 1. Images of another size are padded to a square and resized. The
    first `slices` rows are the table's, those after them further `views` of training slices.
    A file that cannot be read is a ValueError; where `max_bad` is above 0, the next slice of the
    same split takes its place, and "unreadable" (rows,) says for which rows it did.
    """

    def __init__(
        self,
        rows: list[Row],
        root: str | Path,
        rescale_folder: str | Path,
        image_size: int,
        window: ct.Window = ct.DEFAULT_WINDOW,
        contour_channels: int = 1,
        views: Views = Views(),
        max_bad: int = 0,
    ) -> None:
        self.rows, self.root, self.image_size = views.of(rows), Path(root), image_size
        self.slices, self.views, self.max_bad = len(rows), views, max_bad
        self.window, self.contour_channels = window, contour_channels
        self.facts = ct.read_facts(Path(rescale_folder))
        if self.facts.rescale is None:
            self.facts = ct.read_facts(self.root)
        self.rescale = self.facts.rescale

    def __len__(self) -> int:
        return len(self.rows)

    def read_pair(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """HU (H, W) and contour (K, H, W) as the files have them; ValueError where they differ."""
        image = self.root / self.rows[row].image
        hu = ct.read_hu(image, self.rescale, self.window)
        contour = ct.read_contour(self.root / self.rows[row].contour, self.contour_channels)
        if contour.shape[1:] != hu.shape:
            raise ValueError(
                f"{self.root / self.rows[row].contour}: a contour of {contour.shape[1:]} pixels, "
                f"but its image {self.rows[row].image} has {hu.shape}"
            )
        return hu, contour

    def read_or_replace(self, row: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """`read_pair` of a row, or of the next one of its split that can be read; and the rows
        that can't.
        """
        unreadable, place = [], row
        while True:
            try:
                return *self.read_pair(place), unreadable
            except ValueError:
                unreadable.append(place)
                if len(unreadable) > self.max_bad:
                    raise
            alike = self.indices(self.rows[row].split)
            if len(unreadable) == len(alike):
                raise ValueError(f"none of the {self.rows[row].split} slices can be read")
            place = next_row(place, alike, unreadable)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        hu, contour, unreadable = self.read_or_replace(row)
        hu = ct.fit_square(hu, self.image_size, ct.AIR)
        contour = ct.fit_contour(contour, self.image_size)
        hu, contour = self.views.move(hu, contour, self.rows[row])
        image = ct.hu_to_unit(hu, self.window)
        return {
            "image": torch.from_numpy(image)[None],
            "contour": torch.from_numpy(contour),
            "row": torch.tensor(row),
            "unreadable": torch.tensor((unreadable + [NOTHING] * self.max_bad)[: self.max_bad]),
        }

    def indices(self, *splits: str) -> list[int]:
        """Rows that belong to one of the splits."""
        return [i for i, row in enumerate(self.rows) if row.split in splits]

    def fingerprint(self) -> str:
        """SHA-256 of the files' names and sizes and of their scale: whether the data changed."""
        files = [
            (name, (self.root / name).stat().st_size)
            for row in self.rows[: self.slices]
            for name in (row.image, row.contour)
        ]
        return hashlib.sha256(json.dumps([self.rescale, files]).encode()).hexdigest()

    def notes(self) -> list[str]:
        """What is assumed of the files: their scale, and whether they are resized."""
        unreadable = self.read_or_replace(0)[2] if self.max_bad else []
        alike = self.indices(self.rows[0].split)
        first = next_row(0, alike, unreadable) if unreadable else 0
        array, is_hu = ct.decode(self.root / self.rows[first].image)
        notes = []
        if not is_hu and self.rescale is None:
            low, high = self.window
            scale = (
                f"8-bit, taken as already windowed: 0 is {low:g} HU, 255 is {high:g} HU"
                if array.dtype == np.uint8
                else f"{array.dtype}, taken as HU"
            )
            notes.append(f"no dataset.json: images are {scale}")
        if array.shape[:2] != (self.image_size, self.image_size):
            notes.append(
                f"images of {array.shape[0]}x{array.shape[1]} are padded to a square and resized "
                f"to {self.image_size}x{self.image_size}"
            )
        return notes

    def check(self) -> tuple[set[tuple[int, int]], list[int]]:
        """Decode every file, shared over the ranks; return their sizes (H, W) and the bad rows.

        Raises ValueError with a list of the bad ones where they are more than `max_bad`.
        """

        def problem_or_size(row: int) -> str | tuple[int, int]:
            distributed.alive()
            try:
                return self.read_pair(row)[0].shape
            except ValueError as error:
                return str(error)

        mine = distributed.share(self.slices)
        quiet = None if distributed.is_main() else True
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            looked_at = pool.map(problem_or_size, mine)
            found = list(tqdm(looked_at, "checking files", len(mine), disable=quiet))
        everywhere = [result for part in distributed.gather(found) for result in part]
        bad = [row for row, result in enumerate(everywhere) if isinstance(result, str)]
        if len(bad) > self.max_bad:
            problems = [everywhere[row] for row in bad]
            short = [text.replace(f"; {ct.SCALE_REMEDY}", "") for text in problems]
            remedy = "" if short == problems else f"\n{ct.SCALE_REMEDY}"
            raise ValueError(
                f"{len(problems)} of {self.slices} rows are bad:{list_some(short)}{remedy}"
            )
        return {result for result in everywhere if not isinstance(result, str)}, bad

    def fitted_spacing(self, sizes: set[tuple[int, int]]) -> float | None:
        """mm of a pixel of the resized slices; None where unknown or where sizes differ."""
        sides = {max(size) for size in sizes}
        if self.facts.pixel_spacing is None or len(sides) != 1:
            return None
        return self.facts.pixel_spacing * sides.pop() / self.image_size


def shift_slices(x: Tensor, uniform: Tensor, most: int) -> Tensor:
    """Slices x (N, C, H, W) in [-1, 1], each moved by whole pixels, -most to most.

    uniform (N, 2) in [0, 1) says how far down and right: from 0, up and left, over 0.5, not at all.
    Nothing is interpolated, so that texture stays as it is; what comes in is air, -1.
    """
    height, width = x.shape[2:]
    offsets = (uniform * (2 * most + 1)).long() - most
    moved = torch.full_like(x, -1.0)
    for source, target, (down, right) in zip(x, moved, offsets.tolist(), strict=True):
        kept = source[:, max(0, -down) : height - max(0, down)]
        kept = kept[:, :, max(0, -right) : width - max(0, right)]
        top, left = max(0, down), max(0, right)
        target[:, top : top + kept.shape[1], left : left + kept.shape[2]] = kept
    return moved


def load_batches(dataset: Dataset, batches: Iterable[list[int]], workers: int) -> DataLoader:
    """Batches of a dataset in the order given; `workers` processes decode ahead of their use.

    They hand them over in shared memory. Where there is none, or too little, this process decodes,
    and says so; what is decoded is the same.
    """
    if workers:
        size = getattr(batches, "size", None) or max(map(len, batches), default=0)
        item = sum(value.nbytes for value in dataset[0].values())
        problem = shared_memory_problem(2 * workers * size * item)  # each has two batches under way
        if problem:
            workers = 0
            if distributed.is_main():
                print(f"WARNING: no processes decode images (--num_workers 0): {problem}")
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals
    )


def shared_memory_problem(needed: int) -> str | None:
    """Why `needed` bytes can't go from one process to another in shared memory; None: they can."""
    try:
        multiprocessing.get_context().Lock()
        torch.zeros(1).share_memory_()
    except (OSError, RuntimeError, ImportError) as error:
        return f"there is no shared memory: {str(error).splitlines()[0]}"
    if not os.path.isdir(SHARED_MEMORY):
        return None
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free >= needed:
        return None
    return (
        f"{free / 2**20:.0f} MiB are free in {SHARED_MEMORY}, the batches under way need "
        f"{needed / 2**20:.0f}; give it more (docker run --shm-size), or lower --num_workers"
    )


def load_slices(
    dataset: Dataset, batches: list[list[int]], workers: int, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of slices, in order, and their images on the device."""
    for batch in load_batches(dataset, batches, workers):
        yield batch, to_device(batch["image"], device)


def ignore_signals(worker: int) -> None:
    """In a decoding process: the main process decides when to stop, after it has saved."""
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGUSR1:
        signal.signal(number, signal.SIG_IGN)


def chunks(items: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive parts of at most `size` items."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def create_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file, mapped, for which the disk has room: the whole is taken at once.

    Else writing through the map would end the process without a word (SIGBUS) once the disk is
    full. Raises OSError where it is.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    size = path.stat().st_size
    try:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        path.unlink()
        what = f"{error.strerror} for {size / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free"
        raise OSError(error.errno, what, str(path)) from error
    return array


class StoredRows:
    """The rows of a .npy file with numbers in 4D, each read when it is asked for.

    Not a memory map: in one, a file that is cut short or whose disk fails while it is in use ends
    the process without a word (SIGBUS). Raises ValueError where the file holds something else, is
    shorter than its header says, or has become so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy raises anything on damaged headers
            size = path.stat().st_size if path.is_file() else 0
            raise ValueError(f"{path.name} of {size:,} bytes cannot be read: {error}") from error
        if found.ndim != 4 or found.dtype.kind not in "fui" or np.isfortran(found):
            raise ValueError(
                f"{path.name}: {found.dtype} {found.shape}, expected 4D, the last axis innermost"
            )
        self.shape, self.dtype, self.start = found.shape, found.dtype, found.offset
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (as long as this lives)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int]) -> np.ndarray:
        rows = np.arange(len(self))[index]
        values = np.empty((rows.size, math.prod(self.shape[1:])), self.dtype)
        for row, place in zip(rows.flat, values.view(np.uint8), strict=True):
            at = self.start + int(row) * place.nbytes
            try:
                size = os.preadv(self.file.fileno(), [place], at)
            except OSError as error:
                error.filename = str(self.path)
                raise
            if size < place.nbytes:
                raise ValueError(
                    f"{self.path}: row {row} is cut off ({size} of {place.nbytes} bytes): the file "
                    "became shorter while it was in use; copy it again, or encode again"
                )
        return values.reshape(*rows.shape, *self.shape[1:])


class LatentDataset:
    """A folder of latents, read row by row: see `write_latents` for what it holds.

    latents (rows, C, h, w) float32, contours (rows, K, H, W) uint8, and for the rows held out
    of training the real slices. Raises ValueError where the folder is incomplete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "meta.json").is_file():
            raise ValueError(
                f"{self.folder}: not a latent data set (no meta.json); make one with "
                "encode_dataset.py"
            )
        try:
            self.meta = limits.read_json(self.folder / "meta.json")
            limits.require_bytes(self.folder / "manifest.csv", limits.TEXT)
            with open(self.folder / "manifest.csv", newline="") as file:
                lines = list(csv.DictReader(file))
            names = ("image", "patient_id", "label", "split")
            cells = [[line[name] or "" for name in names] for line in lines]
            views = [int(line.get("view") or 0) for line in lines]
            self.latents, self.contours, self._heldout = (
                StoredRows(self.folder / f"{name}.npy")
                for name in ("latents", "contours", "heldout_images")
            )
            self._read_facts()
        except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{self.folder}: damaged latent data set: {what}") from error
        self.rows = [Row(c[0], "", *c[1:], view) for c, view in zip(cells, views, strict=True)]
        held = self.indices("val", "test")
        for name, array, expected in (
            ("latents", self.latents, len(self.rows)),
            ("contours", self.contours, len(self.rows)),
            ("heldout_images", self._heldout, len(held)),
        ):
            what = f"{self.folder / name}.npy: rows, by manifest.csv"
            require_equal(what, len(array), expected, "copy it again, or encode again")
        self._heldout_position = {row: i for i, row in enumerate(held)}

        self.use_classes(self.meta["classes"])
        self.latent_dim, self.latent_size = self.latents.shape[1:3]
        self.contour_channels, self.image_size = self.contours.shape[1:3]

    def _read_facts(self) -> None:
        """What meta.json says; ValueError, KeyError or TypeError where it says something else."""
        if not isinstance(self.meta, dict):
            raise ValueError("meta.json: expected an object")
        scale = self.meta.get("latent_scale")
        require_equal("meta.json: its latent scale", scale, LATENT_SCALE, "encode again")
        low, high = (float(end) for end in self.meta["window"])
        if not -np.inf < low < high < np.inf:
            raise ValueError(f"meta.json: window {low:g} to {high:g}, expected two HU, LOW first")
        self.window: ct.Window = low, high
        spacing, style = self.meta.get("pixel_spacing"), self.meta.get("contour_style")
        if spacing is not None and not 0 < float(spacing) < np.inf:
            raise ValueError(f"meta.json: pixel_spacing {spacing}, expected mm above 0")
        if style not in (None, *ct.STYLES):
            raise ValueError(f"meta.json: contour_style {style!r}, expected {ct.STYLES}")
        self.pixel_spacing: float | None = spacing  # mm, None: unknown
        self.contour_style: str | None = style
        if not all(isinstance(name, str) for name in self.meta["classes"]):
            raise ValueError(f"meta.json: classes {self.meta['classes']!r}, expected names")

    def __len__(self) -> int:
        return len(self.rows)

    def indices(self, *splits: str, views: bool = True) -> list[int]:
        """Rows that belong to one of the splits; without `views` each slice once."""
        rows = enumerate(self.rows)
        return [i for i, row in rows if row.split in splits and (views or row.view == 0)]

    def use_classes(self, classes: list[str]) -> None:
        """Number the labels by these class names; other labels count as none given."""
        self.classes = list(classes)
        numbers = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([numbers.get(row.label, NO_LABEL) for row in self.rows])

    def require_shape(
        self, latent_dim: int | None, latent_size: int | None, contour_channels: int | None = None
    ) -> None:
        """Raise ValueError where one of these options is given and not what the data have."""
        for option, asked, found in (
            ("--latent_dim", latent_dim, self.latent_dim),
            ("--latent_size", latent_size, self.latent_size),
            ("--contour_channels", contour_channels, self.contour_channels),
        ):
            if asked is not None and asked != found:
                raise ValueError(f"{option} {asked}, but the latents in {self.folder} have {found}")

    def lineage(self, vae_file: str | Path) -> dict[str, str]:
        """Hashes of these latents and of their VAE; ValueError where `vae_file` is another."""
        hashes = {name: self.meta.get(f"{name}_sha256") for name in LINEAGE}
        absent = [name for name, digest in hashes.items() if not isinstance(digest, str)]
        if absent:
            raise ValueError(f"{self.folder}: meta.json has no SHA-256 of {absent}; encode again")
        vae = file_hash(vae_file) if Path(vae_file).is_file() else "no such file"
        require_equal(
            f"{vae_file}: its SHA-256",
            vae,
            hashes["vae"],
            f"the VAE that {self.folder} was encoded with; encode again, or give that VAE",
        )
        return hashes

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (N, C, h, w) as loaded, contours (N, K, H, W) and labels (N,) of the rows."""
        found = self.latents[rows], self.contours[rows], self.labels[rows]
        return tuple(to_device(torch.from_numpy(array), device) for array in found)

    def heldout_images(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Real slices (N, 1, H, W) in [-1, 1] of rows outside of the train split."""
        positions = [self._heldout_position[row] for row in rows]
        return torch.from_numpy(self._heldout[positions].astype(np.float32)).to(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a GPU copies it while it computes."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items of an iterator, each made by a thread while the one before it is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


def training_batches(
    data: LatentDataset, batches: Batches, stream: str, draws: int, device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Latents, contours, labels, noise (as latents) and uniform draws (N, draws) of each part.

    In the order of `batches`, read and drawn while the part before trains; `stream` names the
    noise.
    """

    def make() -> Iterator[tuple[Tensor, ...]]:
        seed, shape = batches.args.seed, data.latents.shape[1:]
        for step, positions, rows in batches.parts():
            drawn = (
                item_noise(seed, stream, step, positions, shape),
                item_uniform(seed, "draws", step, positions, draws),
            )
            yield *data.batch(rows, device), *(to_device(value, device) for value in drawn)

    return ahead(make())


def write_latents(
    folder: str | Path,
    dataset: CTDataset,
    vae: VAE,
    facts: dict,
    device: torch.device,
    batch_size: int = 32,
    workers: int = 0,
) -> list[str]:
    """Encode a data set into `folder`, whole or not at all; the ranks share the work.

    Writes latents.npy (mean * LATENT_SCALE), contours.npy, heldout_images.npy (float16, rows of
    val and test), manifest.csv, meta.json (`facts`, shapes, the contours' style). Call it on every
    rank; the main one gets notes for the user.
    """
    notes = []
    folder = Path(folder)
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    held = dataset.indices("val", "test")
    count, size = len(dataset), dataset.image_size
    latent = (vae.config["latent_dim"], vae.config["latent_size"], vae.config["latent_size"])
    shapes = {
        "latents": ((count, *latent), np.float32),
        "contours": ((count, dataset.contour_channels, size, size), np.uint8),
        "heldout_images": ((len(held), 1, size, size), np.float16),
    }

    # The main process lays the files out, each rank fills its rows.
    if distributed.is_main():
        for left in partial, old:
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, (shape, dtype) in shapes.items():
            create_array(partial / f"{name}.npy", dtype, shape)
    distributed.barrier()
    arrays = {name: np.load(partial / f"{name}.npy", mmap_mode="r+") for name in shapes}
    position = {row: i for i, row in enumerate(held)}
    mine = chunks(distributed.share(count), batch_size)
    loaded = ahead(load_slices(dataset, mine, workers, device))
    latents, before = None, []
    quiet = None if distributed.is_main() else True
    for batch, images in tqdm(loaded, "encoding", len(mine), disable=quiet):
        distributed.alive()
        rows = batch["row"].tolist()
        with torch.no_grad():
            encoded = vae.encode(images).mean * LATENT_SCALE
        # A GPU is still at it: meanwhile write what is here, and the batch before.
        arrays["contours"][rows] = batch["contour"].numpy()
        for row, image in zip(rows, batch["image"].numpy(), strict=True):
            if row in position:
                arrays["heldout_images"][position[row]] = image
        if before:
            arrays["latents"][before] = latents.cpu().numpy()
        latents, before = encoded, rows
    if before:
        arrays["latents"][before] = latents.cpu().numpy()
    for array in arrays.values():
        array.flush()
    distributed.barrier()

    # The main process describes them and makes the folder appear.
    if distributed.is_main():
        if not np.isfinite(arrays["latents"]).all():
            raise ValueError(
                f"{folder}: not written, since the VAE gives latents that are not finite"
            )
        with open(partial / "manifest.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "image", "patient_id", "label", "split", "view"])
            for i, row in enumerate(dataset.rows):
                writer.writerow([i, row.image, row.patient_id, row.label, row.split, row.view])
        style, notes = measure_style(
            arrays["contours"][: dataset.slices], dataset.facts.contour_style
        )
        labels = {row.label for row in dataset.rows if row.split == "train"}
        meta = {
            "latent_shape": [count, *latent],
            "contour_shape": list(shapes["contours"][0]),
            "window": list(dataset.window),
            "latent_scale": LATENT_SCALE,
            "classes": sorted(labels - {""}),
            "contour_style": style,
            "latents_sha256": file_hash(partial / "latents.npy"),
            "contours_sha256": file_hash(partial / "contours.npy"),
            "environment": environment(),
            **facts,
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return notes


def measure_style(contours: np.ndarray, declared: str | None) -> tuple[str | None, list[str]]:
    """The style of contours (rows, K, H, W), and a warning where they have several.

    It is as dataset.json says (`declared`), else that of nine in ten of the contours which have
    a clear one, else None.
    """
    rows = np.linspace(0, len(contours) - 1, min(len(contours), MEASURED)).round().astype(int)
    counts = Counter(ct.contour_style(contours[row]) for row in rows)
    del counts[None]
    style, most = max(counts.items(), key=lambda item: item[1], default=(None, 0))
    notes = []
    if {declared or style} != {*counts, declared or style}:
        found = " and ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        said = f", and dataset.json says {declared}" if declared else ""
        notes.append(
            f"WARNING: contours of several styles: of {len(rows)} looked at {found}{said}; "
            "expected one style; convert them by scripts/prepare_data.py --contour_style"
        )
    if declared is None and most < 0.9 * counts.total():
        style = None
    return declared or style, notes


def encode_csv(
    folder: str | Path,
    csv_file: str | Path,
    root: str | Path,
    vae: VAE,
    vae_file: str | Path,
    vae_content: dict,
    contour_channels: int,
    device: torch.device,
    batch_size: int,
    workers: int,
    views: Views = Views(),
    overwrite: bool = False,
    remedy: str = "use --overwrite",
) -> list[str]:
    """Make `folder` the latents of a table by a VAE file, or find that it is; return notes.

    Window and split come from the VAE's checkpoint, so that all stages agree. A folder made
    from other data or another VAE is an error (ValueError with both hashes and `remedy`) unless
    `overwrite`.
    """
    folder = Path(folder)
    rows, notes = read_table(csv_file, root, Split(**vae_content["split"]))
    dataset = CTDataset(
        rows,
        root,
        Path(csv_file).parent,
        vae.config["image_size"],
        tuple(vae_content["window"]),
        contour_channels,
        views,
    )
    facts = {
        "views": list(astuple(views)),
        "vae_sha256": file_hash(vae_file),
        "label_csv_sha256": file_hash(csv_file),
        "files_sha256": dataset.fingerprint(),
        "split": vae_content["split"],
    }
    said = dataset.facts.pixel_spacing, dataset.facts.contour_style
    if said != (None, None):
        facts["dataset_json"] = list(said)
    notes += dataset.notes()
    if vae_content["lineage"].get("label_csv") != facts["label_csv_sha256"]:
        notes.append(
            f"WARNING: {csv_file} is not the table that the VAE was trained with. A patient whose "
            "patient_id or split changed since may now be held out, but was trained on."
        )
    present = folder.exists() and any(folder.iterdir())
    if present and not (folder / "meta.json").is_file():
        raise ValueError(f"{folder}: not a latent data set, and not empty; it is left as it is")
    if present and not overwrite:
        existing = LatentDataset(folder)
        for name, value in facts.items():
            found = existing.meta.get(name)
            require_equal(f"{folder}: its {name}", found, value, remedy)
        require_equal(
            f"{folder}: its contour channels",
            existing.contour_channels,
            contour_channels,
            f"{remedy}, or the same --contour_channels",
        )
        return [*notes, f"{folder} holds these latents already; nothing to encode"]
    sizes, _ = dataset.check()  # also a barrier: no rank sees what another is about to write
    facts["pixel_spacing"] = dataset.fitted_spacing(sizes)
    return notes + write_latents(folder, dataset, vae, facts, device, batch_size, workers)
