"""How real generated slices look, and whether their lungs are those asked for.

Each score comes with what it takes to believe it: an interval, a baseline, counts and its source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from fibldm.disk import StoredRows
from fibldm.distances import (
    Features,
    among,
    frechet_distance,
    frechet_estimate,
    kernel_estimate,
    on_device,
)
from fibldm.features import Networks
from fibldm.verdicts import (
    DICE_MARGIN,
    KID_MARGIN,
    SHARE_MARGIN,
    Score,
    difference,
    halves,
    mean_estimate,
)

FEW = 100  # below so many images or pairs a number has the warning
PAIRS = 200  # at most, for the diversity and for the baselines of what is measured on pairs
FID_IMAGES = 2048  # with fewer, the covariance of as many features is singular and FID biased up
FID_HALVINGS = 5  # of the patients: each takes eigenvalues twice

SET_METRICS = {"fid": 2, "kid": 2, "precision": 8, "recall": 8}  # images needed of each
PAIR_METRICS = ("lpips", "ssim", "diversity")


def set_distances(real: Features, fake: Features, device: torch.device) -> dict[str, float]:
    """FID and KID of features (N, D) and (M, D), without intervals; none of too few images."""
    if min(len(real), len(fake)) < 2:
        return {}
    sides = on_device(real, device), on_device(fake, device)
    owners = [list(map(str, range(len(rows)))) for rows in sides]
    return {"fid": float(frechet_distance(*sides)), "kid": kernel_estimate(*sides, *owners).value}


def set_score(
    name: str, real: Features, fake: Features, patients: Sequence[str], names: Sequence[str],
    device: torch.device, source: str, seed: int = 0,
) -> Score:  # fmt: skip
    """FID, KID, precision or recall of features (N, D) and (M, D), whose owners are given.

    Where a metric depends on the number of images, value and baseline are of equal numbers.
    """
    least, n, m = SET_METRICS[name], len(real), len(fake)
    if min(n, m) < least:
        text = f"{n} real images and {m} samples, at least {least} of each are needed"
        return Score(name, *[np.nan] * 4, n, m, source, text)
    sides = on_device(real, device), on_device(fake, device)
    warnings = [f"under {FEW} images"] if min(n, m) < FEW and name != "fid" else []
    if min(len(set(patients)), len(set(names))) < 2:
        warnings.append(
            "no interval: the real images, or the samples' contours, are of one patient"
        )
    if name == "fid":
        found, judged = frechet_estimate(*sides, patients, names), {}
        baseline, text = frechet_baseline(*sides, patients, seed)
        warnings.append(text)
    elif name == "kid":
        found, baseline = kernel_estimate(*sides, patients, names), 0.0
        judged = {"difference": found, "margin": KID_MARGIN}
    else:
        owners = (patients, names) if name == "precision" else (names, patients)
        share = among(*(sides if name == "precision" else sides[::-1]), *owners, seed)
        found, baseline = share.value, share.baseline
        judged = {"difference": share.difference, "margin": SHARE_MARGIN}
    low, high = found.interval()
    if name != "kid":
        low, high = np.clip([low, high], 0, np.inf if name == "fid" else 1).tolist()
    warning = "; ".join(warnings)
    return Score(name, found.value, low, high, baseline, n, m, source, warning, **judged)


def frechet_baseline(
    real: Tensor, fake: Tensor, patients: Sequence[str], seed: int
) -> tuple[float, str]:
    """FID between halves of the real patients, NaN if these are too few; and of how many images,
    beside what as many samples have: it falls as numbers grow."""
    found, generator = [], np.random.default_rng(seed)
    for i in range(FID_HALVINGS):
        first, second = map(generator.permutation, halves(patients, seed + i))
        count = min(len(first), len(second), len(fake))
        if count < 2:
            return np.nan, "too few real patients for a baseline"
        first, second, some = (
            torch.from_numpy(rows[:count]).to(real.device)
            for rows in (first, second, generator.permutation(len(fake)))
        )
        ours = real[first]
        found += [frechet_distance(ours, real[second]), frechet_distance(ours, fake[some])]
    baseline, value = torch.stack(found).reshape(-1, 2).mean(0).tolist()
    text = f"baseline of {count} against {count} images, where samples have {value:.4g}"
    if len(fake) < FID_IMAGES or len(real) < FID_IMAGES:
        text += f"; under {FID_IMAGES:,} images FID is biased up: compare at equal numbers"
    return baseline, text


def pair_score(
    name: str, values: np.ndarray, names: Sequence[str], unrelated: np.ndarray,
    counts: tuple[int, int], source: str,
) -> Score:  # fmt: skip
    """The mean of a metric over pairs (N,); its baseline over pairs of unrelated real patients."""
    warnings = [f"under {FEW} pairs"] if 0 < len(values) < FEW else []
    if len(values) == 0:
        wanted = "two samples" if name == "diversity" else "a sample and its real slice"
        warnings.append(f"no pair: {wanted} would be one")
    if len(unrelated) == 0:
        warnings.append("too few real patients for a baseline")
    found, warning = mean_estimate(values, names), "; ".join(warnings)
    baseline = float(unrelated.mean()) if len(unrelated) else np.nan
    return Score(name, found.value, *found.interval(), baseline, *counts, source, warning)


@dataclass(frozen=True)
class ImageSet:
    """Slices and whose they are: images (N, S, S) in [-1, 1], Networks.features of them (N, D).

    owners: the patient of each; of a sample the patient whose contour it was given, or its name.
    """

    images: np.ndarray | StoredRows
    features: Features
    owners: Sequence[str]


def realism_scores(
    real: ImageSet, fake: ImageSet, pairs: Mapping[str, np.ndarray], networks: Networks,
    seed: int = 0,
) -> list[Score]:  # fmt: skip
    """FID, KID, precision, recall, LPIPS, SSIM, diversity: a row for each whose weights are here.

    pairs: Networks.pairs of samples and the real slices whose contours they were given, (M,) each,
    NaN where there is none. Diversity is the LPIPS of samples and other samples. For these three
    the baseline is that of real slices of unrelated patients: a sample should be nearer than that
    to its own real slice, and as far as that from other samples. With too few images for a number
    it is NaN, and the warning says how many it takes.
    """
    found = []
    if networks.inception is not None:
        sets = real.features, fake.features, real.owners, fake.owners, networks.device
        found = [set_score(name, *sets, networks.sources[name], seed) for name in SET_METRICS]
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
            found.append(pair_score(name, values, names, unrelated, counts, source))
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


def control_scores(samples: ContourAgreement, real: ContourAgreement) -> list[Score]:
    """Do samples have the lungs asked for? Mean Dice and 95th-percentile Hausdorff distance.

    real: the same segmenter's on real slices with their own contours. Their mean is the baseline,
    since it errs on them too. hd95_mm is there if a sample's spacing is known. Dice is judged.
    """
    scores = []
    spacing, pixels = samples.spacing, (samples.hd95, real.hd95)
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
        found = mean_estimate(own[kept], np.asarray(samples.owners, str)[kept])
        baseline = mean_estimate(of_real[kept_real], np.asarray(real.owners, str)[kept_real])
        if kept_real.any():
            patients = len({real.owners[i] for i in np.flatnonzero(kept_real)})
            low, high = baseline.interval()
            source += f"; baseline {low:.3g} to {high:.3g} over {patients} patients"
        else:
            warnings.append("no real slices for a baseline")
        numbers = int(kept_real.sum()), int(kept.sum()), source, "; ".join(warnings)
        judged = difference(found, baseline), DICE_MARGIN if name == "dice" else ()
        bounds = np.clip(found.interval(), 0, 1 if name == "dice" else np.inf).tolist()
        scores.append(Score(name, found.value, *bounds, baseline.value, *numbers, *judged))
    return scores
