"""Does synthetic lung look diseased as real lung does? Density, texture and noise inside the lungs.

Density as in quantitative CT of fibrosis: mean, skewness and kurtosis (Best et al., Radiology
228:407, 2003), high-attenuation area (Lederer et al., Am J Respir Crit Care Med 180:407, 2009); and
of emphysema: low-attenuation area (Gevenois et al. 1996, doi:10.1164/ajrccm.154.1.8680679).
Texture: Haralick et al. 1973, doi:10.1109/TSMC.1973.4309314.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage
from skimage.feature import graycomatrix, graycoprops

from fibldm.ct import DEFAULT_WINDOW, Window
from fibldm.verdicts import (
    SHIFT_MARGIN,
    SPREAD_MARGIN,
    Estimate,
    Score,
    difference,
    mean_estimate,
)

Measures = dict[str, float]  # of one slice, as `measure` gives them

HIGH_ATTENUATION = (-600.0, -250.0)  # HU, both included
LOW_ATTENUATION = -950.0  # HU, below it

# What is compared: the name of a measure and what it is, with its unit.
QUANTITIES = {
    "mean": "mean attenuation (HU)",
    "median": "median attenuation (HU)",
    "sd": "standard deviation (HU)",
    "skewness": "skewness",
    "kurtosis": "excess kurtosis (0: normal)",
    "high_attenuation": "high attenuation, -600 to -250 HU (share)",
    "low_attenuation": "low attenuation, below -950 HU (share)",
    "glcm_contrast": "texture: contrast",
    "glcm_homogeneity": "texture: homogeneity",
    "glcm_energy": "texture: energy",
    "glcm_correlation": "texture: correlation",
    "area": "lung area (share of the slice)",
}

COMPARED = {**QUANTITIES, "noise_power": "noise power, upper half of frequencies (log10 HU² px²)"}

SHARES = ("high_attenuation", "low_attenuation")  # skewed: their spread is that of log2
LEAST_SHARE = 0.001  # less is none: about ten pixels

# Texture: grey levels of 50 HU over lung and soft tissue; what lies beyond counts as the last one.
GREY_LEVELS = np.arange(-950.0, 200.0, 50.0)  # edges between them
ANGLES = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)  # of neighbours, one pixel apart

# Noise: squares of PATCH pixels; frequencies in cycles per pixel, each the middle of its ring.
PATCH, STRIDE = 16, 4
FREQUENCIES = np.arange(1, PATCH // 2 + 1) / PATCH
NOISE = [f"noise_{frequency:.4f}" for frequency in FREQUENCIES]
LEAST_POWER = 0.01  # HU^2 px^2: less is no noise, only rounding

FINE = slice(PATCH // 4, PATCH // 2)  # of FREQUENCIES, the upper half: what a blur takes away

FEW = 30  # patients or samples: with fewer a distribution is hardly known


# One slice.


def measure(hu: np.ndarray, mask: np.ndarray, window: Window = DEFAULT_WINDOW) -> Measures:
    """Density, texture and noise of the lung in one slice.

    hu: (H, W) HU; mask: (H, W), the lungs (`fibldm.lungs.lung_mask`), vessels in them included.
    Real slices are clipped to `window` here, as samples are by the data's window: for another
    window than the default give it for both. Pixels outside the mask count for nothing.
    Returns QUANTITIES and NOISE by name; NaN for what can't be had (no lung, lungs too narrow).
    ValueError for shapes that differ, or HU in the lungs that are not finite.
    """
    hu, mask = _checked(hu, mask, window)
    inside = hu[mask]
    if not inside.size:
        return dict.fromkeys([*QUANTITIES, *NOISE], float("nan"))
    spread = float(inside.std())
    even = spread < 1e-3  # skewness and kurtosis divide by it
    standard = np.full_like(inside, np.nan) if even else (inside - inside.mean()) / spread
    found = {
        "mean": inside.mean(),
        "median": np.median(inside),
        "sd": spread,
        "skewness": (standard**3).mean(),
        "kurtosis": (standard**4).mean() - 3,
        "high_attenuation": high_attenuation(hu, mask),
        "low_attenuation": (inside < LOW_ATTENUATION).mean(),
        **_texture(hu, mask),
        "area": mask.mean(),
        **dict(zip(NOISE, noise_power(hu, mask, window), strict=True)),
    }
    return {name: float(value) for name, value in found.items()}


def high_attenuation(hu: np.ndarray, mask: np.ndarray) -> float:
    """The share of a lung mask (H, W) with HU in HIGH_ATTENUATION; NaN for an empty mask."""
    low, high = HIGH_ATTENUATION
    inside = hu[mask]
    return float(((inside >= low) & (inside <= high)).mean()) if inside.size else float("nan")


def _checked(hu: np.ndarray, mask: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """HU in float64, clipped to the window; and the mask as bool."""
    hu, mask = np.asarray(hu, np.float64), np.asarray(mask) > 0
    if hu.shape != mask.shape or hu.ndim != 2:
        raise ValueError(f"hu {hu.shape} and mask {mask.shape}: expected the same (H, W)")
    if not np.isfinite(hu[mask]).all():
        raise ValueError("NaN or infinite HU inside the lungs, expected numbers")
    return np.clip(hu, *window), mask


def _texture(hu: np.ndarray, mask: np.ndarray) -> Measures:
    """Properties of the grey-level co-occurrence matrix: neighbours that both are lung, in all
    directions alike; contrast in squared levels of 50 HU. NaN where no two pixels touch."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    levels = len(GREY_LEVELS) + 1
    grey = np.where(mask[box], np.digitize(hu[box], GREY_LEVELS) + 1, 0).astype(np.uint8)
    pairs = graycomatrix(grey, [1], ANGLES, levels + 1, symmetric=True)
    pairs = pairs[1:, 1:].sum(-1, keepdims=True).astype(np.float64)  # level 0 is no lung
    names = ("contrast", "homogeneity", "energy", "correlation")
    if not pairs.sum():
        return {f"glcm_{name}": float("nan") for name in names}
    pairs /= pairs.sum()
    return {f"glcm_{name}": float(graycoprops(pairs, name)[0, 0]) for name in names}


def noise_power(hu: np.ndarray, mask: np.ndarray, window: Window = DEFAULT_WINDOW) -> np.ndarray:
    """Radial noise power spectrum of the lungs at FREQUENCIES (cycles per pixel): (8,) HU^2 px^2.

    hu, mask, window: as for `measure`. The mean over all squares of 16 pixels that lie wholly in
    the lungs, less their fitted plane (Boedeker et al., Phys Med Biol 52:4027, 2007).
    Vessels and disease are in it beside the scanner's noise. White noise of variance v gives v at
    each frequency. NaN where no such square fits into the lungs.
    """
    hu, mask = _checked(hu, mask, window)
    if min(hu.shape) < PATCH:
        return np.full(len(FREQUENCIES), np.nan)
    view = np.lib.stride_tricks.sliding_window_view
    some = np.s_[::STRIDE, ::STRIDE]
    whole = view(mask, (PATCH, PATCH))[some].all((-1, -2))
    if not whole.any():
        return np.full(len(FREQUENCIES), np.nan)
    power = _spectra(view(hu, (PATCH, PATCH))[some][whole]).mean(0) / _white_spectrum()
    return np.array([power[_rings() == k].mean() for k in range(1, PATCH // 2 + 1)])


@cache
def _rings() -> np.ndarray:
    """(PATCH, PATCH): the number of the bin of each frequency of the Fourier transform."""
    at = np.fft.fftfreq(PATCH) * PATCH
    return np.round(np.hypot(*np.meshgrid(at, at)))


@cache
def _plane() -> np.ndarray:
    """(PATCH^2, 3): orthonormal patches whose sums are the planes."""
    at = np.arange(PATCH) - (PATCH - 1) / 2
    x, y = np.meshgrid(at, at)
    flat = np.stack([np.ones(PATCH**2), x.ravel(), y.ravel()], 1)
    return flat / np.linalg.norm(flat, axis=0)


def _spectra(patches: np.ndarray) -> np.ndarray:
    """|Fourier transform|^2 of (N, PATCH, PATCH), less their planes, under a Hann window."""
    flat, plane = patches.reshape(len(patches), -1), _plane()
    flat = flat - flat @ plane @ plane.T
    hann = np.sin(np.pi * (np.arange(PATCH) + 0.5) / PATCH) ** 2
    return np.abs(np.fft.fft2(flat.reshape(patches.shape) * np.outer(hann, hann))) ** 2


@cache
def _white_spectrum() -> np.ndarray:
    """What `_spectra` expects of white noise of variance 1: exact, the sum over single pixels."""
    return _spectra(np.eye(PATCH**2).reshape(-1, PATCH, PATCH)).sum(0)


# Many slices.


def compare(
    real: Sequence[Measures],
    patients: Sequence[str],
    fake: Sequence[Measures],
    names: Sequence[str],
) -> list[Score]:
    """How real and generated slices differ: for each quantity its mean, then its spread.

    real, fake: what `measure` gave, slice by slice; patients, names: whose each slice is. Baseline:
    the same of the real slices. `noise_power` is the mean log10 of the upper half of FREQUENCIES.
    Spread: how far slices of different patients lie apart on average (Gini's mean difference, 1.13
    SD of a normal distribution): unlike an SD it does not grow with their number, nor hang on the
    farthest few. Of SHARES that of log2: 1 is a factor of 2 between two patients. Slices without a
    value are left out and counted in the warning.
    """
    for what, rows, owners in (("real", real, patients), ("fake", fake, names)):
        if len(rows) != len(owners):
            raise ValueError(
                f"{len(rows)} {what} slices and {len(owners)} names: expected one each"
            )
        if not len(rows):
            raise ValueError(f"no {what} slices to compare")
    tables, owners = (_table(real), _table(fake)), [np.asarray(o, str) for o in (patients, names)]
    means, spreads = [], []
    for i, (name, meaning) in enumerate(COMPARED.items()):
        kept = [np.isfinite(table[:, i]) for table in tables]
        columns = [table[has, i] for table, has in zip(tables, kept, strict=True)]
        whose = [owner[has] for owner, has in zip(owners, kept, strict=True)]
        warning = "; ".join(_warnings(whose, kept))
        found = [mean_estimate(*side) for side in zip(columns, whose, strict=True)]
        scale, of_mean = float(np.std(columns[0])) if kept[0].any() else np.nan, f"mean: {meaning}"
        if name in SHARES:
            meaning = f"log2 of {meaning}"
            columns = [np.log2(np.maximum(column, LEAST_SHARE)) for column in columns]
        apart = [spread(*side) for side in zip(columns, whose, strict=True)]
        counts = len(columns[0]), len(columns[1])
        for rows, title, source, sides, margin in (
            (means, name, of_mean, found, SHIFT_MARGIN * scale),
            (spreads, f"{name}, spread", f"between patients: {meaning}", apart,
             SPREAD_MARGIN * apart[0].value),
        ):  # fmt: skip
            baseline, value = sides
            judged = difference(value, baseline), (-margin, margin)
            numbers = value.value, *value.interval(), baseline.value, *counts
            rows.append(Score(title, *numbers, source, warning, *judged))
    return means + spreads


def spread(values: np.ndarray, owners: Sequence[str]) -> Estimate:
    """Gini's mean difference of values (N,) of different owners; NaN for one owner."""
    owner = np.unique(np.asarray(owners, str), return_inverse=True)[1]
    values = values - (values.min() if len(values) else 0)  # equal values: 0 without rounding
    sums, others = _sums_of_distances(values), np.full(len(values), len(values))
    for rows in np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1]):
        sums[rows] -= _sums_of_distances(values[rows])
        others[rows] -= len(rows)
    if not others.all() or not len(values):
        return Estimate(float("nan"))
    found = mean_estimate(sums / others, owners)
    return Estimate(found.value, 2 * found.error, found.freedom)  # each slice is in pairs twice


def _sums_of_distances(values: np.ndarray) -> np.ndarray:
    """Of each value (N,) to all values."""
    order = np.argsort(values, kind="stable")
    ordered, place = values[order], np.arange(len(values))
    below = np.cumsum(ordered) - ordered
    sums = np.empty(len(values))
    sums[order] = ordered * (2 * place - len(values) + 1) - 2 * below + ordered.sum() - ordered
    return sums


def _warnings(whose: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> list[str]:
    """Of a quantity that few slices have; whose: the owners of those that have it."""
    warnings = []
    for what, slices, owners, has in zip(
        ("patients", "samples"), ("real slices", "samples"), whose, kept, strict=True
    ):
        if (count := len(set(owners))) < FEW:
            warnings.append(f"few {what}: {count}, fewer than {FEW}")
        if missing := int((~has).sum()):
            warnings.append(f"{missing} of {len(has)} {slices} have no value")
    return warnings


def _table(rows: Sequence[Measures]) -> np.ndarray:
    """(N, quantities and noise power)."""
    try:
        table = np.array([[row[name] for name in (*QUANTITIES, *NOISE)] for row in rows], float)
    except KeyError as error:
        raise ValueError(f"a slice without {error}: expected what `measure` returns") from None
    quantities, noise = np.split(table, [len(QUANTITIES)], axis=1)
    fine = np.log10(np.maximum(noise[:, FINE], LEAST_POWER)).mean(1, keepdims=True)
    return np.hstack([quantities, fine])


def compare_by_label(
    real: Sequence[Measures],
    patients: Sequence[str],
    real_labels: Sequence[str],
    fake: Sequence[Measures],
    names: Sequence[str],
    fake_labels: Sequence[str],
) -> tuple[dict[str, list[Score]], list[str]]:
    """`compare` for each label that both have; and a sentence for each label that only one has."""
    labels, notes = shared_labels(real_labels, fake_labels)
    scores = {}
    for label in labels:
        a, b = _rows(real_labels, label), _rows(fake_labels, label)
        scores[label] = compare(
            *([real[i] for i in a], [patients[i] for i in a]),
            *([fake[i] for i in b], [names[i] for i in b]),
        )
    return scores, notes


def shared_labels(
    real_labels: Sequence[str], fake_labels: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Labels that real and generated slices have, sorted; and a sentence for each other one.
    "" is no label: such slices are in no comparison by label."""
    real, fake = set(real_labels) - {""}, set(fake_labels) - {""}
    notes = [f"{label}: no sample has this label" for label in sorted(real - fake)]
    notes += [f"{label}: no real slice has this label" for label in sorted(fake - real)]
    for what, labels in (("real slices", real_labels), ("samples", fake_labels)):
        if without := sum(label == "" for label in labels):
            notes.append(f"{without} of {len(labels)} {what} have no label")
    return sorted(real & fake), notes


def _rows(labels: Sequence[str], label: str) -> list[int]:
    return [i for i, found in enumerate(labels) if found == label]


# Slices that can't be lungs.


@dataclass(frozen=True)
class Limits:
    """Between what a slice's lungs are plausible, both ends included.

    Without real slices: the median lies in aerated lung, -500 HU and darker (Gattinoni et al.,
    Am J Respir Crit Care Med 164:1701, 2001), and above air; `sd` in HU is above a scanner's noise
    and below that of random pixels; `area` is a share of the slice.
    """

    median: tuple[float, float] = (-970.0, -500.0)
    sd: tuple[float, float] = (10.0, 400.0)
    area: tuple[float, float] = (0.01, 0.6)
    lungs: tuple[int, int] = (2, 2)


PIECE = 0.05  # share of the lungs' area from which a piece counts as a lung
PERCENTILES, WIDER = (0.5, 99.5), 0.25  # of real slices; and by this part of their distance
ENOUGH = 30  # real slices: with fewer other patients lie outside of their percentiles too often


def count_lungs(mask: np.ndarray) -> int:
    """Connected pieces of a mask (H, W) that hold 5 % of its area or more."""
    labels, _ = ndimage.label(np.asarray(mask) > 0)
    sizes = np.bincount(labels.ravel())[1:]
    return int((sizes >= PIECE * sizes.sum()).sum())


def limits_of(real: Sequence[Measures], lungs: Sequence[int]) -> Limits:
    """Limits from real slices: what `measure` and `count_lungs` gave of each.

    The 0.5th to 99.5th percentile, widened by a quarter of their distance to either side; numbers
    of lungs that 1 % of the slices have. With fewer than 30 slices with lungs: those of `Limits`.
    """
    rows = [i for i, row in enumerate(real) if np.isfinite(row["median"])]
    if len(rows) < ENOUGH:
        return Limits()

    def between(name: str) -> tuple[float, float]:
        low, high = np.percentile([real[i][name] for i in rows], PERCENTILES)
        more = WIDER * (high - low)
        return float(max(low - more, 0) if low >= 0 else low - more), float(high + more)

    number, times = np.unique([lungs[i] for i in rows], return_counts=True)
    usual = number[times >= 0.01 * len(rows)]
    counts = int(usual.min()), int(usual.max())
    return Limits(between("median"), between("sd"), between("area"), counts)


def implausible(
    hu: np.ndarray,
    mask: np.ndarray,
    limits: Limits | None = None,
    window: Window = DEFAULT_WINDOW,
) -> str | None:
    """Why a slice's lungs can't be lungs, in one line; None where nothing speaks against them.

    hu, mask, window: as for `measure`; limits: `limits_of` real slices, by default those of
    `Limits`.
    """
    limits = limits or Limits()
    hu, mask = _checked(hu, mask, window)
    if not mask.any():
        return "no lung found"
    inside, reasons = hu[mask], []
    for what, value, (low, high), digits, unit in (
        ("median of the lungs", np.median(inside), limits.median, 0, " HU"),
        ("standard deviation in the lungs", inside.std(), limits.sd, 0, " HU"),
        ("area of the lungs", 100 * mask.mean(), [100 * a for a in limits.area], 1, " %"),
        ("lungs", count_lungs(mask), limits.lungs, 0, ""),
    ):
        if not low <= value <= high:
            between = f"{low:.{digits}f} to {high:.{digits}f}" if low != high else f"{low}"
            reasons.append(f"{what}: {value:.{digits}f}{unit}, expected {between}{unit}")
    return "; ".join(reasons) or None
