"""Slices of label.csv as tensors, and latents encoded from them."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from scipy.ndimage import affine_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fibldm import ct, distributed
from fibldm.balance import class_of
from fibldm.batches import (
    Batches,
    item_generator,
    item_noise,
    item_uniform,
    next_row,
    shift_slices,
    to_device,
)
from fibldm.disk import replace_text
from fibldm.limits import TEXT, read_json
from fibldm.tables import Row, list_some

Item = TypeVar("Item")
CHECKED = "checked.json"  # in a run's folder: the files that could be read
READING = 1  # to be raised when another version reads files in another way
NOTHING = -1  # where fewer rows are unreadable
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Views:
    """How often each training slice is encoded: as it is, and moved and scaled a little.

    A latent cannot be moved by less than one cell of the VAE, nor scaled. So the slice is.
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


class CTDataset(Dataset):
    """Slices of a table as {"image": (1, S, S) float32 in [-1, 1], "contour": (K, S, S), "row"}.

    The contour is uint8, 0 or 1. Images of another size are padded to a square and resized. The
    first `slices` rows are the table's, those after them further `views` of training slices.
    A file that cannot be read is a ValueError; where `max_bad` is above 0, the next slice of the
    same split, and with `by_label` of the same label, takes its place, and "unreadable" (rows,)
    says for which rows it did. Contours take longer to read: `images_alone` only checks them.
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
        images_alone: bool = False,
        by_label: bool = False,
    ) -> None:
        self.rows, self.root, self.image_size = views.of(rows), Path(root), image_size
        self.slices, self.views, self.max_bad = len(rows), views, max_bad
        self.window, self.contour_channels = window, contour_channels
        self.images_alone, self.by_label = images_alone, by_label
        assert not (images_alone and views.count > 1), "views move contours too"
        self.info = ct.read_dataset_info(Path(rescale_folder))
        if self.info.rescale is None:
            self.info = ct.read_dataset_info(self.root)
        self.rescale = self.info.rescale

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

    def read_or_replace(self, row: int) -> tuple[np.ndarray, np.ndarray | None, list[int]]:
        """`read_pair` of a row, or of the next one like it that can be read; and the rows that
        can't. Of `images_alone` the contour is None.
        """
        unreadable, place = [], row
        while True:
            try:
                if self.images_alone:
                    image = self.root / self.rows[place].image
                    return ct.read_hu(image, self.rescale, self.window), None, unreadable
                return *self.read_pair(place), unreadable
            except ValueError:
                unreadable.append(place)
                if len(unreadable) > self.max_bad:
                    raise
            alike = self.alike(row)
            if len(unreadable) == len(alike):
                raise ValueError(f"none of the {self.rows[row].split} slices can be read")
            place = next_row(place, alike, unreadable)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        hu, contour, unreadable = self.read_or_replace(row)
        hu, item = ct.fit_square(hu, self.image_size, ct.AIR), {}
        if contour is not None:
            contour = ct.fit_contour(contour, self.image_size)
            hu, contour = self.views.move(hu, contour, self.rows[row])
            item["contour"] = torch.from_numpy(contour)
        return item | {
            "image": torch.from_numpy(ct.hu_to_unit(hu, self.window))[None],
            "row": torch.tensor(row),
            "unreadable": torch.tensor((unreadable + [NOTHING] * self.max_bad)[: self.max_bad]),
        }

    def indices(self, *splits: str) -> list[int]:
        """Rows that belong to one of the splits."""
        return [i for i, row in enumerate(self.rows) if row.split in splits]

    def label_names(self, *splits: str) -> list[str]:
        """The labels of the `indices` of the splits, "" for none."""
        return [self.rows[i].label for i in self.indices(*splits)]

    def alike(self, row: int) -> list[int]:
        """The rows of its split, and with `by_label` of its label, of which one may replace it."""
        rows, label = self.indices(self.rows[row].split), class_of(self.rows[row].label)
        return [i for i in rows if not self.by_label or class_of(self.rows[i].label) == label]

    def summary(self) -> str:
        """How many slices there are to train on and to validate with."""
        train, held = len(self.indices("train")), len(self.indices("val"))
        return f"{train} slices to train on, {held} held out for validation"

    def fingerprint(self) -> str:
        """SHA-256 of the files' names and sizes and of their scale: whether the data changed."""
        names = [n for row in self.rows[: self.slices] for n in (row.image, row.contour)]
        found = stat_files([self.root / name for name in names])
        files = [(name, file.st_size) for name, file in zip(names, found, strict=True)]
        return hashlib.sha256(json.dumps([self.rescale, files]).encode()).hexdigest()

    def notes(self) -> list[str]:
        """What is assumed of the files: their scale, and whether they are resized."""
        unreadable = self.read_or_replace(0)[2] if self.max_bad else []
        first = next_row(0, self.alike(0), unreadable) if unreadable else 0
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

    def check(
        self, record: Path | None = None, update: bool = True
    ) -> tuple[set[tuple[int, int]], list[int]]:
        """Decode the files, shared over the ranks; return their sizes (H, W) and the bad rows.

        record: a file in which to note those that could be read. What it has of an earlier check,
        with the same size and time of change, is not decoded again; without `update` it is only
        read. Raises ValueError with a list of the bad rows where they are more than `max_bad`.
        """
        own = distributed.share(self.slices)
        known, versions = self._read_record(record), self._versions(own)
        unknown = [row for row, version in zip(own, versions, strict=True) if version not in known]
        quiet = None if distributed.is_main() and unknown else True
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            decoded = pool.map(self._size_or_problem, unknown)
            found = list(tqdm(decoded, "checking files", len(unknown), disable=quiet))
        results = dict(zip(unknown, found, strict=True))
        checked = [
            (version, results[row] if row in results else known[version])
            for row, version in zip(own, versions, strict=True)
        ]
        everywhere = [pair for part in distributed.gather(checked) for pair in part]
        sound = {pair[0]: pair[1] for pair in everywhere if not isinstance(pair[1], str)}
        if record is not None and update and distributed.is_main() and sound != known:
            self._write_record(record, sound)
        bad = [row for row, (_, result) in enumerate(everywhere) if isinstance(result, str)]
        if len(bad) > self.max_bad:
            problems = [everywhere[row][1] for row in bad]
            short = [text.replace(f"; {ct.SCALE_REMEDY}", "") for text in problems]
            remedy = "" if short == problems else f"\n{ct.SCALE_REMEDY}"
            raise ValueError(
                f"{len(problems)} of {self.slices} rows are bad:{list_some(short)}{remedy}"
            )
        return set(sound.values()), bad

    def _size_or_problem(self, row: int) -> str | tuple[int, int]:
        distributed.alive()
        try:
            return self.read_pair(row)[0].shape
        except ValueError as error:
            return str(error)

    def _versions(self, rows: Sequence[int]) -> list[str]:
        """What each row's files are hashed to: their names, sizes and times of change."""
        names = [(self.rows[row].image, self.rows[row].contour) for row in rows]
        found = stat_files([self.root / name for pair in names for name in pair])
        facts = [(file.st_size, file.st_mtime_ns) for file in found]
        return [
            hashlib.sha256(repr((*pair, *facts[2 * i : 2 * i + 2])).encode()).hexdigest()[:16]
            for i, pair in enumerate(names)
        ]

    def _reading(self) -> list:
        """What else decides whether a file can be read."""
        return [READING, self.rescale and list(self.rescale), list(self.window),
                self.contour_channels]  # fmt: skip

    def _read_record(self, record: Path | None) -> dict[str, tuple[int, int]]:
        """Size (H, W) of each version of a row that could be read; {} where there is no record."""
        try:
            content = read_json(record, TEXT) if record is not None else {}
            if content["reading"] != self._reading():
                return {}
            sizes = content["sizes"]
            return {name: (int(h), int(w)) for h, w, names in sizes for name in names}
        except (OSError, ValueError, LookupError, TypeError):  # absent or damaged: check all again
            return {}

    def _write_record(self, record: Path, sound: dict[str, tuple[int, int]]) -> None:
        sizes = [
            [*size, [version for version, other in sound.items() if other == size]]
            for size in sorted(set(sound.values()))
        ]
        text = json.dumps({"reading": self._reading(), "sizes": sizes})
        with contextlib.suppress(OSError):  # a full disk: the next start checks again
            record.parent.mkdir(parents=True, exist_ok=True)
            replace_text(record, text)

    def fitted_spacing(self, sizes: set[tuple[int, int]]) -> float | None:
        """mm of a pixel of the resized slices; None where unknown or where sizes differ."""
        sides = {max(size) for size in sizes}
        if self.info.pixel_spacing is None or len(sides) != 1:
            return None
        return self.info.pixel_spacing * sides.pop() / self.image_size


def stat_files(paths: Sequence[Path]) -> list[os.stat_result]:
    """What the file system says of the files, many at a time: a network file system answers late.

    Raises OSError with the name of a file that is not there.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:
        parts = pool.map(lambda part: [os.stat(path) for path in part], chunks(paths, 1000))
        return [result for part in parts for result in part]


def load_batches(dataset: Dataset, batches: Iterable[list[int]], workers: int) -> DataLoader:
    """Batches of a dataset in the order given; `workers` processes decode ahead of their use.

    Batches are passed in shared memory. If there is too little of it, fewer processes decode, or
    this one alone, with a warning. The batches are the same.
    """
    if workers:
        size = getattr(batches, "size", None) or max(map(len, batches), default=0)
        item = sum(value.nbytes for value in dataset[0].values())
        fitting, problem = fitting_workers(workers, 2 * size * item)  # two batches under way each
        if problem and distributed.is_main():
            print(
                f"WARNING: {fitting} processes decode images, not {workers} "
                f"(--num_workers {fitting}): {problem}"
            )
        workers = fitting
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals
    )


def fitting_workers(workers: int, needed: int) -> tuple[int, str | None]:
    """How many of these processes find `needed` bytes of shared memory each; why not all do."""
    try:
        multiprocessing.get_context().Lock()
        torch.zeros(1).share_memory_()
    except (OSError, RuntimeError, ImportError) as error:
        return 0, f"there is no shared memory: {str(error).splitlines()[0]}"
    if not os.path.isdir(SHARED_MEMORY):
        return workers, None
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free >= workers * needed:
        return workers, None
    return free // needed, (
        f"{free / 2**20:.0f} MiB are free in {SHARED_MEMORY}, and each needs "
        f"{needed / 2**20:.0f}; give it more (docker run --shm-size)"
    )


def load_slices(
    dataset: Dataset, batches: list[list[int]], workers: int, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of slices, in order, and their images on the device.

    The processes start here, not at the first batch, which a thread of `ahead` may ask for: one
    that is forked from a pool's thread ends with exit code 1.
    """
    loaded = iter(load_batches(dataset, batches, workers))
    return ((batch, to_device(batch["image"], device)) for batch in loaded)


def training_slices(
    data: Dataset,
    batches: Batches,
    workers: int,
    most: int,
    latent_shape: Sequence[int],
    device: torch.device,
) -> Iterator[tuple[Tensor, ...]]:
    """Moved slices, noise (as latents, as slices), uniform draws (N,), unreadable rows.

    Of each micro-batch, in the order of `batches`, made while the one before trains. The slices are
    moved by `most` pixels at most.
    """
    loaded = iter(load_batches(data, batches, workers))  # not in a thread: see `load_slices`

    def make() -> Iterator[tuple[Tensor, ...]]:
        for batch, (step, positions, _) in zip(loaded, batches.all_micro_batches(), strict=True):
            seed, image = batches.plan.seed, batch["image"]
            uniform = item_uniform(seed, "shift", step, positions, 3)
            drawn = (
                shift_slices(image, uniform[:, :2], most),
                item_noise(seed, "vae", step, positions, latent_shape),
                item_noise(seed, "texture", step, positions, image.shape[1:]),
                uniform[:, 2],
            )
            yield *(to_device(tensor, device) for tensor in drawn), batch["unreadable"]

    return ahead(make())


def ignore_signals(worker: int) -> None:
    """In a decoding process: the main process decides when to stop, after it has saved."""
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGUSR1:
        signal.signal(number, signal.SIG_IGN)


def chunks(items: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive parts of at most `size` items."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    count = min(len(items), most)
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, count).round()]


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items of an iterator, each made by a thread while the one before it is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item
