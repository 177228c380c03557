"""How real generated slices look, and whether their lungs are those asked for.

Each score comes with what it takes to believe it: an interval, a baseline, counts and its source.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from fibldm.disk import StoredRows
from fibldm.features import (
    Features,
    Networks,
    frechet_distances,
    kernel_distances,
    precisions,
    recalls,
)

WORDS = ("good", "doubtful", "bad", "not judged")  # of verdicts
DASH = "\N{EN DASH}"  # for a number that is not there


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


def number(value: float) -> str:
    """Four digits, or a dash for a value that is not there."""
    return f"{value:.4g}" if math.isfinite(value) else DASH


@dataclass(frozen=True)
class Verdict:
    """One of WORDS for a group of metrics, and the sentence that says why."""

    word: str
    sentence: str


def judge(score: Score, higher_is_better: bool = False, squared: bool = False) -> Verdict:
    """A score against its baseline.

    Good: its interval reaches the baseline. Doubtful: at most twice as far. Bad: farther. How far
    counts from 0, or from 1 where higher is better (Dice); of a squared distance (FID, KID) its
    root counts.
    """
    shown = f"{score.name} {number(score.value)}"
    value, baseline, best = score.value, score.baseline, score.low
    if squared:
        baseline = max(baseline, 0.0)  # an estimate of 0 may lie below it by chance
    if not math.isfinite(value + baseline) or (baseline == 0 and not squared):
        return Verdict("not judged", f"{shown}, no baseline to compare it with")
    if higher_is_better:
        value, baseline, best = 1 - value, 1 - baseline, 1 - score.high
    if math.isnan(best):
        best = value
    near = value <= (4 if squared else 2) * baseline
    word = "good" if best <= baseline else "doubtful" if near else "bad"
    if math.isfinite(score.low):
        shown += f" (interval {number(score.low)} to {number(score.high)})"
    return Verdict(word, f"{shown}, baseline {number(score.baseline)}")


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst word of several verdicts, and all their sentences."""
    words = [verdict.word for verdict in verdicts]
    word = next(word for word in ("bad", "doubtful", "good", "not judged") if word in words)
    return Verdict(word, "; ".join(verdict.sentence for verdict in verdicts))


def halves(groups: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two disjoint halves of the groups (patients), drawn by `seed`."""
    names, owner = np.unique(np.asarray(groups, str), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    first = np.isin(owner, order[: len(names) // 2])
    return np.flatnonzero(first), np.flatnonzero(~first)


def resamples(groups: Sequence[str], draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Rows of bootstrap resamples: whole groups with replacement.

    Slices of one patient are no independent evidence.
    """
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
PAIR_METRICS = ("lpips", "ssim", "diversity")


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
    name: str, real: Features, fake: Features, patients: Sequence[str], names: Sequence[str],
    device: torch.device, source: str, draws: int = DRAWS, seed: int = 0,
) -> Score:  # fmt: skip
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
    low, high = map(float, moved_interval(value, np.array(drawn)).clip(lowest, highest))
    baseline, text = set_baseline(name, real, fake, patients, device, seed)
    warning = "; ".join([*warnings, text])
    return Score(name, float(value), low, high, baseline, n, m, source, warning)


def set_baseline(
    name: str, real: Features, fake: Features, patients: Sequence[str], device: torch.device,
    seed: int,
) -> tuple[float, str]:  # fmt: skip
    """A set metric between two halves of the real patients, NaN if these are too few; and of how
    many images, beside what as many samples have: all but KID depend on the number.
    """
    first, second = halves(patients, seed)
    generator = np.random.default_rng(seed)
    second = np.sort(generator.permutation(second)[: len(fake)])
    some = np.sort(generator.permutation(len(fake))[: len(second)])
    half = real[first]
    found = set_distances(half, real[second], device, [name])
    if not found:
        return np.nan, "too few real patients for a baseline"
    text = f"baseline of {len(first)} against {len(second)} images"
    if name != "kid":
        alike = set_distances(half, fake[some], device, [name])
        text += f", where samples have {alike.get(name, np.nan):.4g}"
    return found[name], text


def pair_score(
    name: str, values: np.ndarray, names: Sequence[str], unrelated: np.ndarray,
    counts: tuple[int, int], source: str, draws: int = DRAWS, seed: int = 0,
) -> Score:  # fmt: skip
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


@dataclass(frozen=True)
class ImageSet:
    """Slices and whose they are: images (N, S, S) in [-1, 1], Networks.features of them (N, D)."""

    images: np.ndarray | StoredRows
    features: Features
    owners: Sequence[str]


def realism_scores(
    real: ImageSet, fake: ImageSet, pairs: Mapping[str, np.ndarray], networks: Networks,
    draws: int = DRAWS, seed: int = 0,
) -> list[Score]:  # fmt: skip
    """FID, KID, precision, recall, LPIPS, SSIM, diversity: a row for each whose weights are here.

    pairs: Networks.pairs of samples and the real slices whose contours they were given, (M,) each,
    NaN where there is none. Diversity is the LPIPS of samples and other samples. For these three
    the baseline is that of real slices of unrelated patients: a sample should be nearer than that
    to its own real slice, and as far as that from other samples. With too few images for a number
    it is NaN, and the warning says how many it takes.
    """
    found, how = [], (draws, seed)
    if networks.inception is not None:
        sets = real.features, fake.features, real.owners, fake.owners, networks.device
        found = [set_score(name, *sets, networks.sources[name], *how) for name in SET_METRICS]
    order = np.random.default_rng(seed).permutation(len(fake.owners))
    diverse = _distances(fake.images, order[0::2], order[1::2], networks)["lpips"]
    apart = _distances(real.images, *halves(real.owners, seed), networks, seed)
    for name in PAIR_METRICS:
        if name == "diversity":
            values, names, unrelated = diverse, list(map(str, range(len(diverse)))), apart["lpips"]
            counts = 2 * len(unrelated), 2 * len(values)
        else:
            rows = np.flatnonzero(np.isfinite(pairs[name]))
            values, names = pairs[name][rows], [fake.owners[i] for i in rows]
            unrelated, counts = apart[name], (len(rows), len(rows))
        if name not in networks.missing:
            source = networks.sources[name]
            found.append(pair_score(name, values, names, unrelated, counts, source, *how))
    return found


def _distances(
    images: np.ndarray | StoredRows, first: np.ndarray, second: np.ndarray, networks: Networks,
    seed: int = 0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """`Networks.pairs` of images (N, S, S) in these rows, shuffled: at most PAIRS pairs."""
    generator = np.random.default_rng(seed)
    count = min(len(first), len(second), PAIRS)
    rows = [generator.permutation(half)[:count] for half in (first, second)]
    return networks.pairs(*(torch.from_numpy(images[some])[:, None] for some in rows))


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
class ContourAgreement:
    """How well lungs follow contours, slice by slice: Dice and hausdorff95 in pixels, (N,) each.

    spacing: mm a pixel (N,), NaN where unknown; owners: whose slice it is, a patient or a sample.
    """

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
    samples: ContourAgreement, real: ContourAgreement, draws: int = DRAWS, seed: int = 0
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
