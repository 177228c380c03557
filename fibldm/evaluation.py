"""Slices read, segmented and measured in several processes, for an evaluation of any length.

What is kept of a slice is a few numbers; images and latents of all slices lie on disk.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fibldm import ct, disease
from fibldm.datasets import CTDataset, chunks
from fibldm.disk import StoredRows, create_rows
from fibldm.lungs import lung_mask
from fibldm.metrics import Following, contour_dice, hausdorff95
from fibldm.privacy import Match, Privacy
from fibldm.samples import Samples
from fibldm.vae import LATENT_SCALE, VAE

BATCH = 32
PAIRS = 12  # closest pairs whose images are kept


@dataclass(frozen=True)
class Looked:
    """What is kept of one slice: image (S, S) in [-1, 1], contour and lungs, and measures."""

    image: np.ndarray
    asked: np.ndarray | None  # bool (S, S), the filled contour
    found: np.ndarray  # bool (S, S), the lungs
    measures: dict[str, float]
    lungs: int
    spacing: float  # mm of a pixel, NaN where unknown
    dice: (
        float  # of contour and lungs, and the distance of their borders in pixels; NaN: no contour
    )
    hd95: float
    pair: np.ndarray | None = None  # (S, S) in [-1, 1]: the real slice whose contour was asked for
    implausible: str | None = None


def filled_contour(contour: np.ndarray, size: int) -> np.ndarray:
    """A contour (K, H, W) of any style -> bool (size, size), the lungs that it asks for."""
    fitted = ct.fit_contour(contour, size)
    return ct.fill_outline(fitted.max(axis=0, keepdims=True))[0]


class Reader:
    """Reads and measures single slices; it travels to the processes that do so."""

    def __init__(self, real: CTDataset, samples: Samples, window: ct.Window) -> None:
        self.real, self.samples, self.window = real, samples, window

    def real_slice(self, row: int) -> Looked:
        """A real slice as training sees it, and its own contour."""
        hu, contour = self.real.read_pair(row)
        image = self.fit(hu)
        return self.measure(image, filled_contour(contour, self.samples.size), self.spacing(hu))

    def sample(self, i: int, limits: disease.Limits | None = None) -> Looked:
        """A sample, the contour it was asked to follow, and the real slice that has it."""
        item, size = self.samples.items[i], self.samples.size
        image = ct.hu_to_unit(
            ct.read_hu(item.path, self.samples.info.rescale, self.window), self.window
        )
        spacing = self.samples.info.pixel_spacing or float("nan")
        asked = pair = None
        if item.row is not None:
            hu, contour = self.real.read_pair(item.row)
            pair, asked = self.fit(hu), filled_contour(contour, size)
            of_real = self.spacing(hu)
            spacing = spacing if np.isnan(of_real) else of_real
        elif item.contour is not None:
            asked = filled_contour(ct.read_contour(item.contour), size)
        looked = self.measure(image, asked, spacing)
        reason = disease.implausible(self.to_hu(image), looked.found, limits, self.window)
        return replace(looked, pair=pair, implausible=reason)

    def measure(self, image: np.ndarray, asked: np.ndarray | None, spacing: float) -> Looked:
        hu = self.to_hu(image)
        found = lung_mask(hu)
        measures, lungs = disease.measure(hu, found, self.window), disease.count_lungs(found)
        dice = hd95 = float("nan")
        if asked is not None:
            dice = float(contour_dice(found[None], asked[None])[0])
            hd95 = float(hausdorff95(found[None], asked[None])[0])
        return Looked(image, asked, found, measures, lungs, spacing, dice, hd95)

    def fit(self, hu: np.ndarray) -> np.ndarray:
        return ct.hu_to_unit(ct.fit_square(hu, self.samples.size, ct.AIR), self.window)

    def to_hu(self, image: np.ndarray) -> np.ndarray:
        return ct.unit_to_hu(image, self.window)

    def spacing(self, hu: np.ndarray) -> float:
        """mm of a pixel after `fit`; NaN where dataset.json does not say."""
        known = self.real.info.pixel_spacing
        return float("nan") if known is None else known * max(hu.shape) / self.samples.size


def image_of(data: CTDataset, row: int) -> np.ndarray:
    """A slice (S, S) in [-1, 1], as training has it."""
    return data[row]["image"][0].numpy()


class Workers:
    """Processes that call a function on items; results come in order, read a little ahead of their
    use, so that what is read but not yet used does not grow with the number of items."""

    AHEAD = 32  # items a process

    def __init__(self, count: int) -> None:
        self.count = count  # 0: this process alone

    def map(self, function: Callable, items: Sequence[int], what: str) -> Iterator:
        """function(item) of each item, with a progress bar."""
        return iter(tqdm(self._map(function, items), what, len(items), disable=None, unit="slice"))

    def _map(self, function: Callable, items: Iterable[int]) -> Iterator:
        if not self.count:
            yield from map(function, items)
            return
        waiting: deque = deque()
        pool = ProcessPoolExecutor(self.count, initializer=_hold, initargs=(function,))
        try:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) > self.AHEAD * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_held: list[Callable] = []  # in a process of a pool: what it calls, given once and not per item


def _hold(function: Callable) -> None:
    _held.append(function)


def _call(*arguments: object) -> object:
    return _held[-1](*arguments)


class Measured:
    """What is kept of many slices: numbers alone."""

    def __init__(self, owners: Sequence[str]) -> None:
        self.owners = owners  # patients, or the names of samples
        self.control: list[tuple[float, float, float]] = []  # Dice, distance in pixels, spacing
        self.asked: list[bool] = []  # whether its contour is known
        self.measures: list[disease.Measures] = []
        self.lungs: list[int] = []
        self.implausible: dict[int, str] = {}

    def add(self, looked: Looked) -> None:
        if looked.implausible:
            self.implausible[len(self.measures)] = looked.implausible
        self.measures.append(looked.measures)
        self.lungs.append(looked.lungs)
        self.control.append((looked.dice, looked.hd95, looked.spacing))
        self.asked.append(looked.asked is not None)

    def following(self) -> Following:
        """Of the slices whose contour is known."""
        rows = np.flatnonzero(self.asked)
        dice, hd95, spacing = np.array(self.control).reshape(-1, 3)[rows].T
        return Following(dice, hd95, spacing, [self.owners[i] for i in rows])


def batches(looked: Iterator[Looked]) -> Iterator[list[Looked]]:
    """Consecutive lists of at most BATCH."""
    batch: list[Looked] = []
    for one in looked:
        batch.append(one)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def stack(images: Sequence[np.ndarray]) -> torch.Tensor:
    """(S, S) images -> (N, 1, S, S)."""
    return torch.from_numpy(np.stack(images))[:, None]


def spread(count: int, shown: int) -> list[int]:
    """Evenly spaced numbers below count: nothing is chosen by its looks."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, shown)).round()})


# Copies of training slices.

Images = Callable[[np.ndarray], np.ndarray]  # of slices to latents, or back


def coders(vae: VAE, device: torch.device) -> tuple[Images, Images]:
    """Slices (n, S, S) in [-1, 1] -> latents (n, C, h, w) as training has them; and back."""
    vae = vae.to(device)

    @torch.no_grad()
    def encode(images: np.ndarray) -> np.ndarray:
        parts = [
            vae.encode(stack(images[rows]).to(device)).mean.cpu() * LATENT_SCALE
            for rows in chunks(range(len(images)), BATCH)
        ]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def decode(latents: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(latents) / LATENT_SCALE
        parts = [vae.decode(part.to(device)).clamp(-1, 1)[:, 0].cpu() for part in z.split(BATCH)]
        return torch.cat(parts).numpy()

    return encode, decode


class Copies:
    """The search for copies of training slices among samples; arrays of all slices stay on disk."""

    def __init__(
        self, data: CTDataset, held_out: CTDataset, vae: VAE | None, device: torch.device,
        folder: Path, workers: Workers,
    ) -> None:  # fmt: skip
        self.encode, self.decode = coders(vae, device) if vae is not None else (None, None)
        train, latents = self.read(data, folder / "train", workers)
        self.privacy = Privacy(train, [row.patient_id for row in data.rows], latents)
        held, latents = self.read(held_out, folder / "held_out", workers)
        self.privacy.calibrate(held, latents, [row.patient_id for row in held_out.rows])
        self.train, self.matches = train, list[Match]()
        # The search takes as long as Inception does: a process of its own, forked with its arrays.
        self.waiting: deque = deque()
        self.pool = None
        if workers.count:
            self.pool = ProcessPoolExecutor(1, initializer=_hold, initargs=(self.privacy.nearest,))
        self.closest: list[tuple[float, int, np.ndarray]] = []  # ratio, sample, its image

    def read(
        self, data: CTDataset, path: Path, workers: Workers
    ) -> tuple[StoredRows, StoredRows | None]:
        """All slices (N, S, S), and their latents where there is a VAE, in files."""
        shape = len(data), data.image_size, data.image_size
        images = create_rows(path.with_name(f"{path.name}_images.npy"), np.float32, shape)
        read = workers.map(partial(image_of, data), range(len(data)), f"{path.name} slices")
        for i, image in enumerate(read):
            images[i] = image
        if self.encode is None:
            return images, None
        latents = None
        for rows in chunks(range(len(data)), BATCH):
            some = self.encode(images[rows])
            if latents is None:
                file = path.with_name(f"{path.name}_latents.npy")
                latents = create_rows(file, some.dtype, (len(data), *some.shape[1:]))
            latents[rows] = some
        return images, latents

    def add(self, images: np.ndarray) -> None:
        """The next samples (n, S, S) in [-1, 1]; call `finish` after the last."""
        latents = self.encode(images) if self.encode else None
        if self.pool is None:
            self._take(images, self.privacy.nearest(images, latents))
            return
        self.waiting.append((images, self.pool.submit(_call, images, latents)))
        if len(self.waiting) > Workers.AHEAD // 4:
            self._take_first()

    def finish(self) -> None:
        """Wait for what is being searched; `matches` and `closest` are complete then."""
        while self.waiting:
            self._take_first()
        if self.pool is not None:
            self.pool.shutdown()

    def _take_first(self) -> None:
        images, future = self.waiting.popleft()
        self._take(images, future.result())

    def _take(self, images: np.ndarray, found: list[Match]) -> None:
        start = len(self.matches)
        self.matches += found
        pairs = [(match.ratio, start + i, i) for i, match in enumerate(found)]
        self.closest += [(ratio, k, images[i].copy()) for ratio, k, i in sorted(pairs)[:PAIRS]]
        self.closest = sorted(self.closest, key=lambda pair: pair[:2])[:PAIRS]
