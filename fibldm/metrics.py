"""How real generated slices look, and whether their lungs are those asked for.

Each score comes with what it takes to believe it: an interval, a baseline, counts and its source.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from fibldm.features import (
    ALEXNET,
    INCEPTION,
    Features,
    Networks,
    RowFile,
    frechet_distances,
    kernel_distances,
    precisions,
    recalls,
    to_bytes,
    weights_hash,
)


@dataclass(frozen=True)
class Score:
    """One row of a table of metrics.

    `low` and `high` are the 95 % bootstrap interval. `baseline` is the real-vs-real baseline: the
    same metric between two disjoint halves of the real patients. NaN where it can't be had.
    `source` names what measured it (a network and its weights' hash, an operator); `warning` says
    why not to trust the number, "" where there is nothing to say.
    """

    name: str
    value: float
    low: float
    high: float
    baseline: float
    n_real: int
    n_fake: int
    source: str
    warning: str = ""

    def as_dict(self) -> dict:
        """Plain values for JSON: NaN, which JSON lacks, as None."""
        return {
            key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def halves(groups: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two disjoint halves of the groups (patients), drawn by `seed`."""
    names, owner = np.unique(np.asarray(groups, str), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    first = np.isin(owner, order[: len(names) // 2])
    return np.flatnonzero(first), np.flatnonzero(~first)


def resamples(groups: Sequence[str], draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Rows of bootstrap resamples: whole groups with replacement, since slices of one patient
    are no independent evidence."""
    owner = np.unique(np.asarray(groups, str), return_inverse=True)[1]
    rows = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1])
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.concatenate([rows[i] for i in generator.integers(len(rows), size=len(rows))])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The central 95 % of resampled values, low and high; NaN for fewer than 2 finite ones."""
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


SIDES = ("real", "fake")
DRAWS = 200  # of the bootstrap
FEW = 100  # below so many images or pairs a number has the warning
PAIRS = 200  # at most, for the diversity and for the baselines of what is measured on pairs
FID_IMAGES = 2048  # with fewer, the covariance of as many features is singular and FID biased up

SetMetric = Callable[[Features, Features, Tensor, Tensor, torch.device], np.ndarray]
SET_METRICS: dict[str, tuple[SetMetric, int, float, float]] = {  # images needed, lowest, highest
    "fid": (frechet_distances, 2, 0.0, np.inf),
    "kid": (kernel_distances, 2, -np.inf, np.inf),
    "precision": (precisions, 4, 0.0, 1.0),
    "recall": (recalls, 4, 0.0, 1.0),
}


def set_distances(
    real: Features, fake: Features, device: torch.device, names: Sequence[str] = ("fid", "kid")
) -> dict[str, float]:
    """Set metrics of features (N, D) and (M, D), without intervals; none of too few images."""
    enough = [name for name in names if min(len(real), len(fake)) >= SET_METRICS[name][1]]
    once = torch.ones(1, len(real)), torch.ones(1, len(fake))
    return {name: float(SET_METRICS[name][0](real, fake, *once, device)[0]) for name in enough}


def times_drawn(groups: Sequence[str], draws: int, seed: int) -> Tensor:
    """(1 + draws, N): once each, then how often bootstrap resamples of the groups have each row."""
    counts = [np.ones(len(groups))]
    counts += [np.bincount(r, minlength=len(groups)) for r in resamples(groups, draws, seed)]
    return torch.from_numpy(np.array(counts, np.float32))


def fid_draws(draws: int, smaller: int) -> int:
    """Fewer draws where both sets are large: eigenvalues cost the third power of the smaller."""
    return min(draws, max(20, draws * 400 // min(smaller, FID_IMAGES)))


def moved_interval(value: float, drawn: np.ndarray) -> np.ndarray:
    """The 95 % interval of resamples, moved so that their mean is the value.

    Resamples repeat images, by which FID rises and precision and recall fall: their spread says
    how far the value may be off, their mean does not.
    """
    return value + np.array(interval(drawn - drawn.mean() if len(drawn) else drawn))


def set_score(
    name: str,
    real: Features,
    fake: Features,
    patients: Sequence[str],
    names: Sequence[str],
    device: torch.device,
    source: str,
    draws: int = DRAWS,
    seed: int = 0,
) -> Score:
    """FID, KID, precision or recall of features (N, D) and (M, D), whose groups are given."""
    metric, least, lowest, highest = SET_METRICS[name]
    n, m = len(real), len(fake)
    if min(n, m) < least:
        text = f"{n} real images and {m} samples, at least {least} of each are needed"
        return Score(name, *[np.nan] * 4, n, m, source, text)
    warnings = []
    if name == "fid" and min(n, m) < FID_IMAGES:
        warnings.append(f"under {FID_IMAGES:,} images FID is biased up: compare at equal numbers")
    elif name != "fid" and min(n, m) < FEW:
        warnings.append(f"under {FEW} images")
    if len(set(patients)) < 2:
        draws = 0
        warnings.append("no interval: the real images are of one patient")
    elif name == "fid" and fid_draws(draws, min(n, m)) < draws:
        draws = fid_draws(draws, min(n, m))
        warnings.append(f"interval from {draws} resamples")
    resampled = times_drawn(patients, draws, seed), times_drawn(names, draws, seed + 1)
    value, *drawn = metric(real, fake, *resampled, device)
    low, high = moved_interval(value, np.array(drawn)).clip(lowest, highest)

    # The baseline, and samples in the same numbers: all but KID depend on those.
    first, second = halves(patients, seed)
    generator = np.random.default_rng(seed)
    second = np.sort(generator.permutation(second)[:m])
    some = np.sort(generator.permutation(m)[: len(second)])
    baseline = np.nan
    if min(len(first), len(second)) < least:
        warnings.append("too few real patients for a baseline")
    else:
        half = real[first]
        baseline = set_distances(half, real[second], device, [name])[name]
        text = f"baseline of {len(first)} against {len(second)} images"
        if name != "kid":
            alike = set_distances(half, fake[some], device, [name])
            text += f", where samples have {alike.get(name, np.nan):.4g}"
        warnings.append(text)
    bounds = float(low), float(high)
    return Score(name, float(value), *bounds, baseline, n, m, source, "; ".join(warnings))


def pair_score(
    name: str,
    values: np.ndarray,
    names: Sequence[str],
    unrelated: np.ndarray,
    counts: tuple[int, int],
    source: str,
    draws: int = DRAWS,
    seed: int = 0,
) -> Score:
    """The mean of a metric over pairs (N,); its baseline over pairs of unrelated real patients."""
    warnings = [f"under {FEW} pairs"] if 0 < len(values) < FEW else []
    if len(values) == 0:
        wanted = "two samples" if name == "diversity" else "a sample and its real slice"
        warnings.append(f"no pair: {wanted} would be one")
    if len(unrelated) == 0:
        warnings.append("too few real patients for a baseline")
    low, high = interval(resampled_means(values, names, draws, seed))
    baseline = float(unrelated.mean()) if len(unrelated) else np.nan
    value = float(values.mean()) if len(values) else np.nan
    return Score(name, value, low, high, baseline, *counts, source, "; ".join(warnings))


def resampled_means(
    values: np.ndarray, groups: Sequence[str], draws: int, seed: int
) -> list[float]:
    """Means of bootstrap resamples of the groups; none of no values."""
    if len(values) == 0:
        return []
    return [float(values[rows].mean()) for rows in resamples(groups, draws, seed)]


class Realism:
    """FID, KID, precision, recall, LPIPS, SSIM and diversity of samples, with what it takes to
    believe them: intervals, the baseline of two halves of the real patients, sources, warnings.

    LPIPS and SSIM are of samples and the real slices whose contours they were given; diversity is
    the LPIPS of samples and other samples. For these three the baseline is that of real slices of
    unrelated patients: a sample should be nearer than that to its own real slice, and as far as
    that from other samples.

    Features and images go to files below `folder`: 8 KB and 2 bytes a pixel for each image.
    ValueError if a weight file is damaged.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.networks, folder = Networks(device), Path(folder)
        self.sources = {"ssim": "torchmetrics, Gaussian window of sigma 1.5"}
        if self.networks.inception is not None:
            source = f"Inception-v3 (torchmetrics), weights {weights_hash(INCEPTION)}"
            self.sources |= dict.fromkeys(SET_METRICS, source)
        if self.networks.lpips is not None:
            source = f"AlexNet (lpips 0.1), weights {weights_hash(ALEXNET)}"
            self.sources |= dict.fromkeys(("lpips", "diversity"), source)
        folder.mkdir(parents=True, exist_ok=True)
        self._features = {side: RowFile(folder / f"{side}_features", "<f4") for side in SIDES}
        self._images = {side: RowFile(folder / f"{side}_images", "<f2") for side in SIDES}
        self._groups: dict[str, list[str]] = {side: [] for side in SIDES}
        self._pairs: dict[str, list[float]] = {"lpips": [], "ssim": []}
        self._paired: list[str] = []  # the samples of the pairs

    def add_real(self, images: Tensor, patients: Sequence[str]) -> None:
        """Add real slices, (N, 1, H, W) in [-1, 1], and whose they are.

        ValueError for NaN, another shape than before, or another number of patients than images.
        """
        self._add("real", images, patients)

    def add_fake(
        self, images: Tensor, names: Sequence[str], paired_real: Tensor | None = None
    ) -> None:
        """Add samples, (N, 1, H, W) in [-1, 1], and their names; ValueError as in `add_real`.

        paired_real: of the same shape, the real slices whose contours were asked for.
        """
        pairs = {} if paired_real is None else self.networks.pairs(images, paired_real)
        self._add("fake", images, names)
        if paired_real is not None:
            self._paired += [str(name) for name in names]
        for name, values in pairs.items():
            self._pairs[name] += values.tolist()

    def _add(self, side: str, images: Tensor, groups: Sequence[str]) -> None:
        if len(groups) != len(images):
            raise ValueError(f"{len(images)} images, {len(groups)} names: expected one for each")
        to_bytes(images)  # raises for images that have no metrics
        self._images[side].append(images[:, 0].float().clamp(-1, 1))
        self._features[side].append(self.networks.features(images))
        self._groups[side] += [str(group) for group in groups]

    def scores(self, draws: int = DRAWS, seed: int = 0) -> list[Score]:
        """A row for each metric whose weights are there.

        With too few images for a number it is NaN, and the warning says how many it takes.
        """
        images = {side: self._images[side].rows() for side in SIDES}
        found: list[Score] = []
        if self.networks.inception is not None:
            features = [self._features[side].rows() for side in SIDES]
            groups = [self._groups[side] for side in SIDES]
            for name in SET_METRICS:
                how = self.networks.device, self.sources[name], draws, seed
                found.append(set_score(name, *features, *groups, *how))
        order = np.random.default_rng(seed).permutation(len(images["fake"]))
        diverse = self._distant(images["fake"], order[0::2], order[1::2])["lpips"]
        apart = self._distant(images["real"], *halves(self._groups["real"], seed), seed)
        own = {name: np.array(values) for name, values in self._pairs.items()}
        measured = {
            "lpips": (own["lpips"], self._paired, apart["lpips"]),
            "ssim": (own["ssim"], self._paired, apart["ssim"]),
            "diversity": (diverse, [str(i) for i in range(len(diverse))], apart["lpips"]),
        }
        for name, (values, names, unrelated) in measured.items():
            if name not in self.networks.missing:
                count = len(values)
                counts = (2 * len(unrelated), 2 * count) if name == "diversity" else (count,) * 2
                how = counts, self.sources[name], draws, seed
                found.append(pair_score(name, values, names, unrelated, *how))
        return found

    def _distant(
        self, images: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """`Networks.pairs` of images (N, H, W) in these rows, shuffled: at most PAIRS pairs."""
        generator = np.random.default_rng(seed)
        count = min(len(first), len(second), PAIRS)
        rows = [generator.permutation(half)[:count] for half in (first, second)]
        pair = [torch.from_numpy(images[r].astype(np.float32))[:, None] for r in rows]
        return self.networks.pairs(*pair)


def filled(mask: np.ndarray, contour: np.ndarray) -> list[np.ndarray]:
    """Both as booleans (N, H, W) with holes filled; ValueError if their shapes differ."""
    pair = [np.asarray(masks) > 0 for masks in (mask, contour)]
    if pair[0].shape != pair[1].shape or pair[0].ndim != 3:
        raise ValueError(
            f"mask {pair[0].shape} and contour {pair[1].shape}: expected the same (N, H, W)"
        )
    for masks in pair:
        for i, image in enumerate(masks):
            masks[i] = ndimage.binary_fill_holes(image)
    return pair


def contour_dice(mask: np.ndarray, contour: np.ndarray) -> np.ndarray:
    """Dice overlap of lung masks with the contours that were asked for, holes of both filled.

    mask, contour: (N, H, W), boolean or 0 and 1; a contour is a filled mask or a closed outline.
    Returns (N,) in [0, 1]; 1 where both are empty.
    """
    mask, contour = filled(mask, contour)
    scores = np.ones(len(mask))
    for i, (a, b) in enumerate(zip(mask, contour, strict=True)):
        if a.any() or b.any():
            scores[i] = 2 * (a & b).sum() / (a.sum() + b.sum())
    return scores


def hausdorff95(mask: np.ndarray, contour: np.ndarray) -> np.ndarray:
    """95th percentile of the distances between the borders of two filled masks, in pixels.

    From each border pixel of one to the nearest of the other; the larger of the percentiles in the
    two directions. mask, contour: as for `contour_dice`. Returns (N,); 0 where both are
    empty, NaN where one is.
    """
    mask, contour = filled(mask, contour)
    distances = np.zeros(len(mask))
    for i, pair in enumerate(zip(mask, contour, strict=True)):
        if not all(image.any() for image in pair):
            distances[i] = np.nan if any(image.any() for image in pair) else 0
            continue
        a, b = (image & ~ndimage.binary_erosion(image) for image in pair)
        directed = [
            np.percentile(ndimage.distance_transform_edt(~other)[border], 95)
            for border, other in ((a, b), (b, a))
        ]
        distances[i] = max(directed)
    return distances


@dataclass(frozen=True)
class Following:
    """How well lungs follow contours, slice by slice: Dice and hausdorff95 in pixels, (N,) each;
    mm a pixel (N,), NaN where unknown; whose slice it is, a patient or a sample's name."""

    dice: np.ndarray
    hd95: np.ndarray
    spacing: np.ndarray
    owners: Sequence[str]

    def __post_init__(self) -> None:
        counts = [len(part) for part in (self.dice, self.hd95, self.spacing, self.owners)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"{counts[0]} Dice, {counts[1]} distances, {counts[2]} spacings, {counts[3]} "
                "owners, expected equal numbers"
            )


def control_scores(
    samples: Following, real: Following, draws: int = DRAWS, seed: int = 0
) -> list[Score]:
    """Do samples have the lungs asked for? Mean Dice and 95th-percentile Hausdorff distance.

    real: the same segmenter's on real slices with their own contours. Their mean is the baseline,
    since it errs on them too. hd95_mm is there if a sample's spacing is known.
    """
    scores = []
    spacing, patients, pixels = samples.spacing, real.owners, (samples.hd95, real.hd95)
    measured = {
        "dice": (samples.dice, real.dice),
        "hd95_px": pixels,
        "hd95_mm": (samples.hd95 * spacing, real.hd95 * real.spacing),
    }
    for name, (own, of_real) in measured.items():
        if name == "hd95_mm" and not np.isfinite(spacing).any():
            continue
        kept, kept_real = np.isfinite(own), np.isfinite(of_real)
        warnings = [f"under {FEW} samples"] if kept.sum() < FEW else []
        for what, distance in zip(("samples", "real slices"), pixels, strict=True):
            empty = int(np.isnan(distance).sum())
            if name != "dice" and empty:
                warnings.append(f"{empty} {what} without lungs or without contour left out")
        if name == "hd95_mm" and not np.isfinite(spacing).all():
            warnings.append(f"{np.isnan(spacing).sum()} samples of unknown spacing left out")
        source = "filled masks" if name == "dice" else "borders of filled masks"
        baseline = np.nan
        if kept_real.any():
            owners = np.asarray(patients, str)[kept_real]
            baseline = float(of_real[kept_real].mean())
            low, high = interval(resampled_means(of_real[kept_real], owners, draws, seed))
            source += f"; baseline {low:.3g} to {high:.3g} over {len(set(owners))} patients"
        else:
            warnings.append("no real slices for a baseline")
        value = float(own[kept].mean()) if kept.any() else np.nan
        groups = np.asarray(samples.owners, str)[kept]
        bounds = interval(resampled_means(own[kept], groups, draws, seed))
        numbers = int(kept_real.sum()), int(kept.sum())
        scores.append(Score(name, value, *bounds, baseline, *numbers, source, "; ".join(warnings)))
    return scores
