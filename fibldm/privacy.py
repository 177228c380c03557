"""Are samples copies of training patients? The distance of each to its nearest training slice.

In two spaces: the VAE's latents, by correlation about the training mean, and pixels, by normalized
cross-correlation over small shifts of what is finer than all chests share. Slices of held-out
patients, which no model has seen, tell how near is too near. After Dar et al., "Unconditional
latent diffusion models memorize patient imaging data" (2025, doi:10.1038/s41551-025-01468-8).
Measured in benchmarks/privacy.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi

from fibldm.encoding import LatentDataset
from fibldm.likeness import THUMBNAIL, aligned_likeness, coarse_detail, thumbnails
from fibldm.verdicts import Score, interval, resamples, share_interval

LATENTS, PIXELS = "latents", "pixels"  # the spaces
HELDOUT_SHARE = 0.01  # of held-out slices are nearer than the thresholds of all spaces together
FEW, SPREAD = 100, 4.0  # held-out slices: of fewer a percentile is not defined; SD, see `threshold`
FOUND, FALSE = 0.95, 0.02  # of copies at least, of held-out slices at most: else a warning
FOLDS = 50  # of the negative control, by patient
BLOCK = 1024  # slices at a time
CALIBRATED = 1024  # held-out slices at most that set the thresholds
CANDIDATES = 3  # training slices of the highest coarse likeness, of which the nearest is sought
SHIFT = 3 / 256  # of the side: by how much copies of the positive control are moved
COARSE_STEP = SHIFT * THUMBNAIL / 2  # pixels of half a thumbnail, searched each way

Images = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Match:
    """The training slice that a sample is nearest to.

    `distances` and `rows`: in each space (LATENTS, PIXELS), 0 for the same slice to 2, and which
    training slice that is. `row` is that of the space where the distance is smallest beside its
    threshold, `ratio` this quotient; `flagged` where it is below 1.
    """

    row: int
    ratio: float
    flagged: bool
    distances: dict[str, float]
    rows: dict[str, int]


class Rows:
    """Some rows of an array, such as one in a file, read only when they are asked for."""

    def __init__(self, array: np.ndarray, rows: Sequence[int]) -> None:
        self.array, self.rows = array, np.asarray(rows, int)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        return self.array[self.rows[index]]


class Privacy:
    """Training slices to compare samples with, and the distances that held-out slices have to them.

    train: (N, H, W) in [-1, 1], train_latents: (N, C, h, w) with mean about 0, or None for a space
    that is left out; train_patients: N. The first two may be anything that has a length and gives
    rows by a slice or a number (`StoredRows`, `Rows`): they are read block by block, and 2 KiB a
    slice are kept. Call `calibrate` first. Raises ValueError where lengths differ or there is
    nothing to compare.
    """

    def __init__(
        self,
        train: np.ndarray | Rows | None,
        train_patients: Sequence[str],
        train_latents: np.ndarray | Rows | None = None,
    ) -> None:
        self.patients = np.asarray(train_patients, str)
        spaces = {PIXELS: train, LATENTS: train_latents}
        self.spaces = tuple(name for name, values in spaces.items() if values is not None)
        lengths = {name: len(spaces[name]) for name in self.spaces}
        if not lengths or {*lengths.values(), len(self.patients)} != {len(self.patients)}:
            raise ValueError(f"training slices {lengths} of {len(self.patients)} patients' rows")
        if not len(self.patients):
            raise ValueError("no training slices to compare samples with")
        self.train, self.latents = train, train_latents
        self.thresholds: dict[str, float] = {}
        self.heldout: dict[str, np.ndarray] = {}
        self.heldout_patients = np.empty(0, str)
        blocks = [np.s_[i : i + BLOCK] for i in range(0, len(self.patients), BLOCK)]
        if train is not None:
            parts = [coarse_detail(thumbnails(train[b])).astype(np.float16) for b in blocks]
            self._coarse = np.concatenate(parts)
        if train_latents is not None:
            total = sum(np.asarray(train_latents[b], np.float64).sum(axis=0) for b in blocks)
            self._mean = (total / len(self.patients)).astype(np.float32)

    # Distances.

    def distances(
        self, images: np.ndarray | None, latents: np.ndarray | None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Distance (n,) to the nearest training slice in each space, and the training slice's row.

        images: (n, H, W) in [-1, 1]; latents: (n, C, h, w) on the scale of the training latents.
        """
        given = {PIXELS: images, LATENTS: latents}
        missing = [name for name in self.spaces if given[name] is None]
        if missing:
            raise ValueError(f"no {', '.join(missing)} given, the training slices have them")
        search = {PIXELS: self._nearest_pixels, LATENTS: self._nearest_latents}
        found, rows = {}, {}
        for name in self.spaces:
            values = given[name]
            parts = [
                search[name](np.asarray(values[i : i + BLOCK], np.float32))
                for i in range(0, len(values), BLOCK)
            ]
            found[name] = np.concatenate([np.empty(0), *(part[0] for part in parts)])
            rows[name] = np.concatenate([np.empty(0, int), *(part[1] for part in parts)])
        return found, rows

    def _nearest_latents(self, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        queries = _correlated(latents - self._mean)
        likeness, rows = np.full(len(queries), -np.inf), np.zeros(len(queries), int)
        for start in range(0, len(self.patients), BLOCK):
            block = np.asarray(self.latents[start : start + BLOCK], np.float32)
            found = queries @ _correlated(block - self._mean).T
            best = found.argmax(axis=1)
            value = found[np.arange(len(found)), best]
            rows = np.where(value > likeness, start + best, rows)
            likeness = np.maximum(likeness, value)
        return 1 - likeness, rows

    def _nearest_pixels(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # The likeliest few at half a thumbnail's size, moved a little each way.
        small = thumbnails(images)
        steps = (-COARSE_STEP, 0.0, COARSE_STEP)
        moved = [coarse_detail(small, (y, x)) for y in steps for x in steps]
        likeness = np.empty((len(images), 0), np.float32)
        rows = np.empty((len(images), 0), int)
        for start in range(0, len(self.patients), BLOCK):
            block = self._coarse[start : start + BLOCK].astype(np.float32).T
            found = moved[0] @ block
            for queries in moved[1:]:
                np.maximum(found, queries @ block, out=found)
            numbers = np.broadcast_to(np.arange(start, start + found.shape[1]), found.shape)
            likeness = np.concatenate([likeness, found], axis=1)
            rows = np.concatenate([rows, numbers], axis=1)
            if likeness.shape[1] > CANDIDATES:
                best = np.argpartition(-likeness, CANDIDATES - 1, axis=1)[:, :CANDIDATES]
                likeness, rows = (np.take_along_axis(a, best, axis=1) for a in (likeness, rows))

        # Of these the one that is likest when aligned.
        distances, nearest = np.empty(len(images)), np.empty(len(images), int)
        for i, candidates in enumerate(rows):
            others = thumbnails(np.stack([self.train[int(row)] for row in candidates]))
            found = [aligned_likeness(small[i], other) for other in others]
            distances[i] = 1 - max(found)
            nearest[i] = candidates[int(np.argmax(found))]
        return distances, nearest

    # Thresholds, from slices that no model has seen.

    def calibrate(
        self,
        images: np.ndarray | None,
        latents: np.ndarray | None,
        patients: Sequence[str],
    ) -> dict[str, float]:
        """Set and return the threshold in each space, from slices of held-out patients.

        images: (n, H, W), latents: (n, C, h, w), as in `distances`. Each of two spaces gets half of
        HELDOUT_SHARE. Of more than CALIBRATED slices so many are taken, evenly spaced over the
        patients: a percentile of a sample, and the time no longer grows with the product of
        held-out and training slices. Raises ValueError for less than 2 slices, or patients who are
        trained on.
        """
        both = np.intersect1d(np.asarray(patients, str), self.patients)
        if len(both):
            raise ValueError(f"patients {both[:5].tolist()} are held out and trained on")
        if len(patients) < 2:
            raise ValueError(f"{len(patients)} held-out slices, expected 2 at least")
        rows = evenly_over(patients, CALIBRATED)
        images, latents = (None if a is None else Rows(a, rows) for a in (images, latents))
        self.heldout, _ = self.distances(images, latents)
        self.heldout_patients = np.asarray(patients, str)[rows]
        self.thresholds = self._thresholds_without(np.zeros(len(rows), bool))
        return self.thresholds

    def _thresholds_without(self, left_out: np.ndarray) -> dict[str, float]:
        share = HELDOUT_SHARE / len(self.spaces)
        return {name: threshold(self.heldout[name][~left_out], share) for name in self.spaces}

    def nearest(self, images: np.ndarray | None, latents: np.ndarray | None) -> list[Match]:
        """The nearest training slice of each sample, and whether it is too near."""
        if not self.thresholds:
            raise ValueError("not calibrated: held-out slices tell how near is too near")
        distances, rows = self.distances(images, latents)
        matches = []
        for i in range(len(distances[self.spaces[0]])):
            near = {name: float(distances[name][i]) for name in self.spaces}
            ratios = {name: near[name] / max(self.thresholds[name], 1e-9) for name in self.spaces}
            space = min(ratios, key=ratios.__getitem__)
            found = {name: int(rows[name][i]) for name in self.spaces}
            matches.append(Match(found[space], ratios[space], ratios[space] < 1, near, found))
        return matches

    # What to report.

    def caution(self) -> str:
        """Why not to trust the thresholds; "" where there is nothing to say."""
        slices, patients = len(self.heldout_patients), len(np.unique(self.heldout_patients))
        if slices >= FEW:
            return ""
        return (
            f"{slices} held-out slices of {patients} patients: too few for a percentile (below "
            f"{FEW}); the threshold is their minimum, or, where that is lower, {SPREAD:g} "
            "standard deviations of their logarithms below the mean"
        )

    def scores(
        self, matches: Sequence[Match], names: Sequence[str], draws: int = 200, seed: int = 0
    ) -> list[Score]:
        """Shares of samples flagged and of training patients concerned; the median distances.

        matches: of `nearest`; names: of the samples. The baseline is what held-out slices show: the
        share flagged of those that did not set the threshold, their median distance. Raises
        ValueError for no samples.
        """
        held, fake = len(self.heldout_patients), len(matches)
        if not fake:
            raise ValueError("no samples to compare with training slices")
        source = ", ".join(f"{name} below {self.thresholds[name]:.3f}" for name in self.spaces)
        source = f"distance to {len(self.patients)} training slices: {source}"
        flagged = np.array([match.flagged for match in matches], bool)
        rows = np.array([match.row for match in matches], int)
        picks = list(resamples(names, draws, seed))

        def score(name: str, value: float, between: tuple[float, float], of_held: float) -> Score:
            return Score(name, value, *between, of_held, held, fake, source, self.caution())

        false = self._false_flags()
        baseline = float("nan") if false is None else float(false.mean())
        between = share_interval(flagged, names)
        copied = len(np.unique(self.patients[rows[flagged]])) / len(np.unique(self.patients))
        found = [
            score("samples flagged as copies", float(flagged.mean()), between, baseline),
            score("training patients copied", copied, interval([]), float("nan")),
        ]
        for name in self.spaces:
            values = np.array([match.distances[name] for match in matches])
            medians = [float(np.median(values[pick])) for pick in picks]
            baseline = float(np.median(self.heldout[name]))
            title = f"distance to the nearest training slice, {name}, median"
            found.append(score(title, float(np.median(values)), interval(medians), baseline))
        return found

    # Controls.

    def _false_flags(self) -> np.ndarray | None:
        """Which held-out slices are flagged by thresholds that other patients set; None for one."""
        number = np.unique(self.heldout_patients, return_inverse=True)[1]
        if number.max() == 0:
            return None
        flagged, folds = np.zeros(len(number), bool), min(FOLDS, number.max() + 1)
        for fold in range(folds):
            left_out = number % folds == fold
            for name, limit in self._thresholds_without(left_out).items():
                flagged[left_out] |= self.heldout[name][left_out] < limit
        return flagged

    def negative_control(self) -> Score:
        """The share of held-out slices flagged, by thresholds that other patients set."""
        flagged, count = self._false_flags(), len(self.heldout_patients)
        value = low = high = float("nan")
        warning = "one held-out patient: there is no other to set a threshold by"
        if flagged is not None:
            value = float(flagged.mean())
            low, high = share_interval(flagged, self.heldout_patients)
            warning = self.caution()
            if value > FALSE:
                warning = f"more than {FALSE:.0%} of slices that are no copies. {warning}".strip()
        name, source = "held-out slices flagged", "cross-validated over held-out patients"
        return Score(name, value, low, high, float("nan"), count, 0, source, warning)

    def positive_control(
        self,
        encode: Images | None = None,
        decode: Images | None = None,
        count: int = 100,
        seed: int = 0,
    ) -> list[Score]:
        """The shares of changed training slices that are flagged, and as their own patient's.

        encode: (n, H, W) -> (n, C, h, w), needed where there are latents; decode: back; without it
        the round trip is left out. count: training slices at most, drawn by `seed`.
        """
        if self.train is None:
            raise ValueError("the positive control changes training slices: give their images")
        if self.latents is not None and encode is None:
            raise ValueError("the positive control needs the encoder of the training latents")
        generator = np.random.default_rng(seed)
        rows = generator.permutation(len(self.patients))[:count]
        images = np.stack([np.asarray(self.train[int(row)], np.float32) for row in rows])
        changed = altered_copies(images, seed)
        if encode is not None and decode is not None:
            changed["VAE round trip"] = np.clip(decode(encode(images)), -1, 1)
        scores = []
        for name, copies in changed.items():
            latents = encode(copies) if self.latents is not None else None
            matches = self.nearest(copies, latents)
            nearest = self.patients[[match.row for match in matches]]
            flagged = np.array([match.flagged for match in matches], bool)
            found = flagged & (nearest == self.patients[rows])
            value = float(found.mean())
            warning = self.caution()
            if value < FOUND:
                warning = (
                    f"below {FOUND:.0%}: such copies are missed; is a training patient among those "
                    f"held out? {warning}"
                ).strip()
            low, high = share_interval(found, self.patients[rows])
            scores.append(
                Score(
                    f"copies found: {name}", value, low, high, float("nan"),
                    len(self.heldout_patients), len(rows), "changed training slices", warning,
                )
            )  # fmt: skip
        return scores


def read_privacy(data: LatentDataset, most: int | None = None) -> Privacy | None:
    """The training latents, with thresholds by the held-out ones; None where these are too few.

    most: training rows at most, evenly spaced over the patients. Copies of the others are not
    found then. The thresholds hold all the same: held-out slices set them by the same rows that
    samples are compared with, so that as few of them are flagged.
    """
    patients = data.table["patient_id"].to_numpy(str)
    train, held = (np.array(data.indices(*s), int) for s in (("train",), ("val", "test")))
    if len(held) < 2:
        return None
    if most is not None:
        train = train[evenly_over(patients[train], most)]
    privacy = Privacy(None, patients[train], Rows(data.latents, train))
    privacy.calibrate(None, Rows(data.latents, held), patients[held])
    return privacy


def evenly_over(patients: Sequence[str], most: int) -> np.ndarray:
    """At most so many rows of the patients' (n,), evenly spaced over them, in ascending order."""
    order = np.argsort(np.asarray(patients, str), kind="stable")
    picked = np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)
    return np.sort(order[picked])


def threshold(distances: np.ndarray, share: float) -> float:
    """The distance (n,) that at most a `share` of held-out slices fall below: one of them.

    Of fewer than FEW slices that is the minimum, and the next slice is often below it: then it is
    lowered to SPREAD standard deviations of their logarithms below the mean, if that is lower.
    """
    lowest = float(np.quantile(distances, share, method="lower"))
    if len(distances) >= FEW:
        return lowest
    logs = np.log(np.maximum(distances, 1e-6))
    return min(lowest, float(np.exp(logs.mean() - SPREAD * logs.std())))


def altered_copies(images: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Slices (n, H, W) in [-1, 1] as copies of them might look, each (n, H, W) float32.

    Noise of 50 HU (of a window of 1400), moved by 3 pixels of 256 down, right or both, and 10 %
    more or less contrast with 50 HU more or less.
    """
    generator = np.random.default_rng(seed)
    count, pixels = len(images), SHIFT * images.shape[-1]
    noise = 50 / 700 * generator.standard_normal(images.shape, np.float32)
    ways = np.array([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)])
    ways = pixels * ways[generator.integers(len(ways), size=count)]
    moved = [
        ndi.shift(a, way, order=1, mode="nearest") for a, way in zip(images, ways, strict=True)
    ]
    sign = generator.choice([-1, 1], count)[:, None, None]
    changed = {
        "noise": images + noise,
        "3-pixel shift": np.stack(moved),
        "intensity": images * (1 + 0.1 * sign) + 50 / 700 * sign,
    }
    return {name: np.clip(values, -1, 1).astype(np.float32) for name, values in changed.items()}


def _correlated(values: np.ndarray) -> np.ndarray:
    """(n, ...) -> (n, K), each of mean 0 and norm 1: products are correlations."""
    flat = values.reshape(len(values), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
