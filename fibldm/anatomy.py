"""Whether arrays show a chest: HU or other values, a contour that fits, how patients lie.

Limits were measured on real and on synthetic chest CT, clean and with each defect put in:
benchmarks/check_data.py.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage as ndi

from fibldm import ct
from fibldm.lungs import lung_mask

# Two peaks of a histogram, in HU: the darker of air and lungs, the brighter of fat or muscle.
DARK_PEAK = (-1150.0, -500.0)
BRIGHT_PEAK = (-135.0, 140.0)
PADDING = -1500.0  # HU: no tissue is darker, only marks of what is outside of the field of view
FEW_VALUES = 16  # distinct ones: a mask or a label map
CUT_OFF = 0.05  # share of the values at the very maximum: soft tissue was cut off
SATURATED = 100.0  # HU of that maximum, at most: bone alone is cut off by a higher one
CORNER = 1 / 16  # of a side: what is there is air, or tissue where the image is cropped
VALUES = 200_000  # of a volume at most are looked at


def hu_problem(hu: np.ndarray) -> str | None:
    """What is wrong with the values of a chest CT slice or volume; None where nothing is.

    hu: numbers of any shape and real dtype, meant to be HU; clipped to a window such as
    [-1000, 400] or not. Needs no lungs in them: neck and upper abdomen pass.
    """
    values = _sample(hu)
    if values.size == 0 or not np.isfinite(values).all():
        return "values that are not finite, or none at all"
    low, high = float(values.min()), float(values.max())
    span = f"values {low:g} to {high:g}"
    if low == high:
        return f"constant: every value is {low:g}"
    distinct = np.unique(values)
    if len(distinct) <= FEW_VALUES or _is_label_map(hu, distinct):
        return f"{span}, {len(distinct)} distinct: a mask, not CT"
    if high - low <= 2.5 and abs(low) <= 2:
        return f"{span}: normalized by minimum and maximum, HU are lost"
    if low > -1200 and (values < -850).mean() > 0.97:
        return f"{span}: air alone"

    # Values outside of the field of view are no tissue; they are all the same one, but for edges.
    outside = values < PADDING
    if 0 < outside.sum() < 0.95 * values.size and (values[outside] == low).mean() > 0.9:
        values = values[~outside]
    dark, bright = histogram_peaks(values)
    if _are_peaks_of_ct(dark, bright):
        if _is_inverted(values, dark, bright) or _has_bright_corners(hu):
            return f"{span}: inverted, air is bright and tissue dark"
        if high <= SATURATED and (values == high).mean() > CUT_OFF:
            return f"{span}: windowed, soft tissue was cut off at {high:g} HU"
        return None
    return f"{span}: {_explain(hu, values, dark, bright)}"


def _sample(hu: np.ndarray) -> np.ndarray:
    """At most about VALUES of the values, evenly spread, float32."""
    flat = np.asarray(hu).reshape(-1)
    return flat[:: max(1, flat.size // VALUES) | 1].astype(np.float32)


def _is_label_map(hu: np.ndarray, distinct: np.ndarray) -> bool:
    """Whether values are few integers from 0 on, and neighbours mostly the same one."""
    if len(distinct) > 256 or distinct[0] != 0 or (distinct != np.round(distinct)).any():
        return False
    hu = np.asarray(hu)
    lines = hu.reshape(-1, hu.shape[-1])
    lines = lines[:: max(1, lines.size // VALUES)]
    left, right = lines[:, :-1], lines[:, 1:]
    labelled = left > 0
    return bool(labelled.any() and (left == right)[labelled].mean() > 0.75)


def histogram_peaks(values: np.ndarray) -> tuple[float, float]:
    """The highest peaks on the two sides of Otsu's threshold, in the units of the values.

    Values at the very maximum are left out where they are few: bone that a window cut off.
    Otsu, "A threshold selection method from gray-level histograms" (IEEE SMC 1979).
    """
    below = values[values < values.max()]
    if below.size < 0.8 * values.size:
        below = values
    low, high = np.percentile(below, [0.1, 99])
    if high <= low:
        return float(low), float(high)
    counts, edges = np.histogram(np.clip(below, low, high), bins=200, range=(low, high))
    centers = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts) / counts.sum()
    mean = np.cumsum(counts * centers) / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean[-1] * weight - mean) ** 2 / (weight * (1 - weight))
    cut = int(np.nanargmax(between[:-1])) + 1
    smooth = np.convolve(np.pad(counts, 2), [1, 2, 3, 2, 1], "valid")
    return float(centers[np.argmax(smooth[:cut])]), float(centers[cut + np.argmax(smooth[cut:])])


def _are_peaks_of_ct(dark: float, bright: float) -> bool:
    return DARK_PEAK[0] <= dark <= DARK_PEAK[1] and BRIGHT_PEAK[0] <= bright <= BRIGHT_PEAK[1]


def _is_inverted(values: np.ndarray, dark: float, bright: float) -> bool:
    """Bone is far above soft tissue, but nothing is far below air; inverted it is the other way."""
    lowest, highest = np.percentile(values, [0.2, 99.8])
    return dark - lowest > max(2 * (highest - bright), 0.3 * (bright - dark))


def _has_bright_corners(hu: np.ndarray) -> bool:
    """Whether the corners of slices (..., H, W) are about as bright as anything in them."""
    hu = np.asarray(hu)
    if hu.ndim < 2:
        return False
    h, w = (max(1, round(CORNER * side)) for side in hu.shape[-2:])
    corners = [hu[..., y, x] for y in (np.s_[:h], np.s_[-h:]) for x in (np.s_[:w], np.s_[-w:])]
    low, high = np.percentile(_sample(hu), [0.1, 99.9])
    return bool(np.median(np.stack(corners)) > high - 0.05 * (high - low))


def _explain(hu: np.ndarray, values: np.ndarray, dark: float, bright: float) -> str:
    """Why peaks are not where those of chest CT are."""
    found = f"peaks at {dark:.0f} and {bright:.0f}, expected air or lung at -1050 to -500 and "
    found += "soft tissue at -135 to 140 HU"
    low, high = float(values.min()), float(values.max())
    if _is_inverted(values, dark, bright) or _has_bright_corners(hu):
        return f"inverted, air is bright and tissue dark ({found})"
    for shift, cause in (
        (-1024, "without air, off by 1024: the rescale intercept of -1024 is missing"),
        (1024, "off by -1024: the rescale intercept was applied twice"),
    ):
        if _are_peaks_of_ct(dark + shift, bright + shift):
            return f"{cause} ({found})"
    if low >= 0 and high <= 255:
        return f"grey levels of 8 bits, not HU ({found})"
    if low > -900 and (values == low).mean() > 0.1:
        return f"windowed, all below {low:g} was cut off: lungs are saturated ({found})"
    if high < 400 and (values == high).mean() > 0.15:
        return f"windowed, all above {high:g} was cut off: soft tissue is saturated ({found})"
    if bright - dark < 300 and (values < -500).mean() < 0.01 and abs(bright) < 200:
        return f"no air: lungs are missing, or cut off by a window ({found})"
    return f"wrong slope or intercept, or another window than taken ({found})"


def is_normalized_by_image(tops: np.ndarray, counts: np.ndarray) -> bool:
    """Whether each image was stretched to its own minimum and maximum, or percentiles.

    tops, counts: (N,) each image's highest value and how many of its pixels have it. Where nearly
    all reach the same top, but in a pixel or two or always in as many, it is the stretching that
    made it so; a window cuts off as much bone as there is. False for less than 8 images.
    """
    at_top = np.isclose(tops, tops.max()) if len(tops) >= 8 else np.zeros(1, bool)
    if at_top.mean() < 0.9:
        return False
    low, middle, high = np.percentile(counts[at_top], [10, 50, 90])
    return bool(high <= 4 or high - low < 0.1 * middle)


# A contour and its image.

GRID = 128  # pixels a side at which contours are compared with the lungs found in the image
FITS, MISFIT = 0.93, 0.75  # Dice with them: of clean data above the one, never below the other
SHIFT, GAIN = 0.012, 0.03  # of the side, and in Dice: what moving a contour must bring
TISSUE = -300.0  # HU: the median inside of a contour is below, even in severe fibrosis


# The symmetries of a square, for arrays (..., S, S), by how an upright one looks afterwards.
SYMMETRIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "upright": lambda a: a,
    "mirrored left-right": lambda a: a[..., ::-1],
    "mirrored top-bottom": lambda a: a[..., ::-1, :],
    "turned by 180 degrees": lambda a: a[..., ::-1, ::-1],
    "transposed": lambda a: a.swapaxes(-1, -2),
    "turned by 90 degrees": lambda a: np.rot90(a, 1, (-2, -1)),
    "turned by -90 degrees": lambda a: np.rot90(a, -1, (-2, -1)),
    "transposed and turned by 180 degrees": lambda a: a.swapaxes(-1, -2)[..., ::-1, ::-1],
}


class Problem(NamedTuple):
    """Something wrong with a slice: a short name of its kind, and what was found."""

    check: str
    reason: str


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap of two masks of one shape, 0 to 1; 1 where both are empty."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero(a & b) / total if total else 1.0


def to_grid(hu: np.ndarray, contour: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU (H, W) and contour (K, H, W) -> HU, filled contour and lungs found, all (GRID, GRID)."""
    if ct.contour_style(contour) == "outline":
        contour = ct.fill_outline(contour)
    small = ct.fit_square(hu, GRID, ct.AIR)
    filled = ct.fit_square(contour.any(axis=0), GRID, 0) >= 0.5
    return small, filled, lung_mask(small)


def contour_problem(
    contour: np.ndarray, hu: np.ndarray, filled: np.ndarray, lungs: np.ndarray, is_hu: bool = True
) -> Problem | None:
    """What is wrong with the contour of a slice; None where nothing is.

    contour: (K, H, W) bool, filled or outline. hu, filled, lungs: of `to_grid`. Where the image's
    values are no HU (`is_hu` False), or it shows no lungs, only the contour itself is judged.
    """
    if is_hu and not contour.any() and not lungs.any():
        return Problem("no lungs", "none are found in the image, and none are marked")
    problem = _shape_problem(contour)
    if problem or not is_hu:
        return problem
    if filled.any():
        level = float(np.median(hu[filled]))
        if level > TISSUE:
            reason = f"a median of {level:.0f} HU inside, expected lung, below {TISSUE:.0f}"
            if dice(~filled, lungs) > dice(filled, lungs):
                reason = f"inverted: lungs are outside of it ({reason})"
            return Problem("contour misplaced", reason)
    return _misfit(filled, lungs, max(contour.shape[1:]) / GRID) if lungs.any() else None


def _shape_problem(contour: np.ndarray) -> Problem | None:
    """A contour (K, H, W) that is none, whatever its image."""
    drawn = int(contour.sum())
    if not drawn:
        return Problem("contour empty", "nothing is marked")
    if contour.any(axis=0).mean() > 0.9:
        return Problem("contour empty", "nearly everything is marked")
    thick = sum(int(ndi.binary_erosion(channel).sum()) for channel in contour)
    long = drawn > sum(contour.shape[1:]) / 4
    if ct.contour_style(contour) is None and long and thick < drawn / 8:
        return Problem("contour open", "lines that do not close: they enclose nothing")
    return None


def _misfit(filled: np.ndarray, lungs: np.ndarray, pixels: float) -> Problem | None:
    """How a mask fails to fit the lungs found, both (GRID, GRID) of `pixels` of the file each."""
    fit = dice(filled, lungs)
    (down, right), moved = _best_shift(filled, lungs)
    if max(abs(down), abs(right)) >= SHIFT * GRID and moved > max(fit + GAIN, 0.85):
        where = f"{-right * pixels:.0f} pixels to the right and {-down * pixels:.0f} down"
        return Problem("contour misplaced", f"shifted by about {where}")
    if fit >= FITS:
        return None
    fits = {name: dice(turn(filled), lungs) for name, turn in SYMMETRIES.items()}
    name = max(fits, key=fits.__getitem__)
    if fits[name] > max(fit + GAIN, FITS):
        return Problem("contour misplaced", f"{name}, its image is not")
    if dice(~filled, lungs) > fit:
        return Problem("contour misplaced", "inverted: lungs are outside of it")
    if fit < MISFIT:
        covered = (filled & lungs).sum() / lungs.sum()
        outside = (filled & ~lungs).sum() / max(1, filled.sum())
        reason = f"covers {covered:.0%} of the lungs found, {outside:.0%} of it is outside of them"
        return Problem("contour fits badly", f"{reason} (Dice {fit:.2f})")
    return None


def _best_shift(mask: np.ndarray, target: np.ndarray) -> tuple[tuple[int, int], float]:
    """The shift (down, right) of a mask that overlaps most with the target, and its Dice."""
    shape = [2 * n for n in mask.shape]
    product = np.fft.rfft2(target, shape) * np.conj(np.fft.rfft2(mask, shape))
    overlap = np.fft.irfft2(product, shape)
    at = np.unravel_index(np.argmax(overlap), shape)
    down, right = ((int(i) + n // 2) % n - n // 2 for i, n in zip(at, shape, strict=True))
    return (down, right), 2 * float(overlap.max()) / (mask.sum() + target.sum())


def find_swapped(contours: np.ndarray, lungs: np.ndarray, rows: Sequence[int]) -> dict[int, int]:
    """{row: other}, of `rows` those whose contour fits another row's lungs far better.

    contours, lungs: (N, S, S) bool.
    """
    masks = lungs.reshape(len(lungs), -1).astype(np.float32)
    areas, found = masks.sum(axis=1), {}
    for row in rows:
        contour = contours[row].reshape(-1).astype(np.float32)
        fits = 2 * (masks @ contour) / np.maximum(areas + contour.sum(), 1)
        other = int(fits.argmax())
        if other != row and fits[other] > max(FITS, fits[row] + 0.1):
            found[row] = other
    return found


# How patients lie.

VIEW = 16  # pixels a side
MEDIASTINUM = (-200.0, 200.0)  # HU: where the heart and the vessels differ from fat
TURNED_PATIENTS = 20  # at least: fewer don't show how chests lie
TURNED_MARGIN = 0.4  # of the usual margin between upright and mirrored
AGREEMENT = 0.25  # median lead of upright: 0.4 to 1 where a fifth is turned at most, 0 for a half
FOLDS, TRAINED, RIDGE = 5, 4000, 0.1


def lung_view(hu: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """The box around the lungs, stretched to (VIEW, VIEW) float32: fat and heart in it, 0 to 1.

    Position, size and proportions are the patient's own; what is left tells how it is turned.
    """
    low, high = MEDIASTINUM
    centers, sizes = [], []
    for axis in (1, 0):
        at = np.flatnonzero(lungs.any(axis=axis))
        centers.append((at[0] + at[-1]) / 2)
        sizes.append(1.1 * (at[-1] - at[0] + 1))
    smooth = ndi.gaussian_filter(np.clip(hu, low, high), max(sizes) / VIEW / 2)
    steps = (np.arange(VIEW) + 0.5) / VIEW - 0.5
    grid = [center + size * steps for center, size in zip(centers, sizes, strict=True)]
    view = ndi.map_coordinates(smooth, np.meshgrid(*grid, indexing="ij"), order=1, mode="nearest")
    return ((view - low) / (high - low)).astype(np.float32)


class TurnedPatient(NamedTuple):
    """A patient whose slices are turned against the others', and by how clear a margin."""

    patient: str
    how: str
    margin: float
    slices: int
    agreeing: float  # share of the slices that say so


def find_turned(views: np.ndarray, patients: Sequence[str]) -> list[TurnedPatient] | None:
    """Patients whose slices lie otherwise than most; None where it can't be told.

    views: (N, VIEW, VIEW) by `lung_view`. A linear function is learned that tells views as they
    are from the same views under the other symmetries of the square; it judges patients that it
    has not seen (5 folds). It can't be told with few patients, or where they don't agree.
    """
    ids, owner = np.unique(np.asarray(patients), return_inverse=True)
    if len(ids) < TURNED_PATIENTS:
        return None
    views, counts = views.astype(np.float64), np.bincount(owner)
    trusted = np.ones(len(ids), bool)
    for _ in range(2):  # the second time what looked turned is no example
        scores = _uprightness(views, owner, trusted)
        means = np.stack([np.bincount(owner, s) / counts for s in scores.T], axis=1)
        if np.median(means[:, 0] - means[:, 1:].max(axis=1)) < AGREEMENT:
            return None
        trusted = means.argmax(axis=1) == 0
    usual = max(np.median(means[:, 0] - means[:, 1]), AGREEMENT)
    found, names = [], list(SYMMETRIES)
    for i in range(len(ids)):
        best = int(means[i].argmax())
        margin = float((means[i, best] - means[i, 0]) / usual)
        if margin > TURNED_MARGIN:
            agreeing = float((scores[owner == i].argmax(axis=1) == best).mean())
            how, slices = names[_INVERSE[best]], int(counts[i])
            found.append(TurnedPatient(str(ids[i]), how, margin, slices, agreeing))
    return found


_INVERSE = [0, 1, 2, 3, 4, 6, 5, 7]  # of each symmetry: what must be applied was done the other way


def _uprightness(views: np.ndarray, owner: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """(N, 8): how upright each view looks after each symmetry, by ridge regression over folds.

    owner: (N,) the patient's number; trusted: whether a patient may serve as an example.
    """
    turns = list(SYMMETRIES.values())
    scores = np.zeros((len(views), len(turns)))
    mean = np.mean([turn(views.mean(axis=0)) for turn in turns], axis=0)
    views = views - mean
    for fold in range(FOLDS):
        unseen = owner % FOLDS == fold
        examples = np.flatnonzero(~unseen & trusted[owner])
        examples = examples[:: len(examples) // TRAINED + 1]
        inputs = np.concatenate(
            [turn(views[examples]).reshape(len(examples), -1) for turn in turns]
        )
        targets = np.full(len(inputs), -1 / (len(turns) - 1))
        targets[: len(examples)] = 1
        gram = inputs.T @ inputs / len(inputs)
        ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        weights = np.linalg.solve(gram + ridge, inputs.T @ targets / len(inputs))
        for k, turn in enumerate(turns):
            scores[unseen, k] = turn(views[unseen]).reshape(unseen.sum(), -1) @ weights
    return scores
