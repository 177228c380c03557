"""Which way up axial slices of a chest lie, by the spine: a vertebra is looked for on both sides.

What is matched is its shape: a body that stands between the lungs, the dark canal behind it, the
arch around the canal, the ribs that begin beside it. So neither the table nor the heart matters.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import ndimage as ndi
from skimage.feature import match_template

WIDTH = 28.0  # cm of an adult's lungs: their width is the measure, no pixel spacing is needed
SCALES = (0.8, 0.95, 1.1)  # of a vertebra against the lungs
PIXELS = 4  # of a cm, in what is looked at
WINDOW = (-200.0, 350.0)  # HU
MIDDLE, BEYOND = 7.5, 5.0  # cm that are looked at: beside the lungs' middle, before and behind them
DEEP = 0.55  # of the way from the lungs' middle to their back, at least, lies the canal
CONTRAST, CHAMBER, SOFT = 180.0, 1.1, 60.0  # HU; cm: the radius of no bone; HU
SMALL = 0.01  # of a slice's pixels: with less lung it can't be told
LOW = 0.4  # of the largest lungs of a series: slices with less are not asked
ASKED = 32  # slices of a series at most
FEW = 5  # slices: less have to be surer
SURE, SURER = 0.04, 0.1  # how far below 0 the median of slices is that are upside down
AGREEING = 0.75  # of these slices


def uprightness(hu: np.ndarray, lungs: np.ndarray) -> float | None:
    """From -1, upside down, to 1, upright; None where it can't be told.

    hu: (H, W) HU with square pixels; lungs: (H, W) bool, both lungs. How well a vertebra matches
    behind the lungs, less how well one that is upside down matches in front of them.
    """
    if np.count_nonzero(lungs) < SMALL * lungs.size:
        return None
    view, half = _view(hu, lungs)
    return _match(view, half) - _match(view[::-1], half)


def are_upside_down(scores: Sequence[float]) -> bool:
    """Whether slices of one series are upside down for certain, by their `uprightness`."""
    if not len(scores):
        return False
    sure = SURE if len(scores) >= FEW else SURER
    return bool(np.median(scores) < -sure and np.less(scores, 0).mean() >= AGREEING)


def telling(areas: np.ndarray) -> np.ndarray:
    """Which slices of a series are worth asking, by their lungs' share of the pixels."""
    large = np.flatnonzero(areas >= max(LOW * areas.max(initial=0), SMALL))
    return large[:: len(large) // ASKED + 1]


def _view(hu: np.ndarray, lungs: np.ndarray) -> tuple[np.ndarray, float]:
    """The strip along the lungs' middle, and half of the lungs' depth in its pixels."""
    centers, sizes = [], []
    for axis in (1, 0):
        at = np.flatnonzero(lungs.any(axis))
        centers.append((at[0] + at[-1]) / 2)
        sizes.append(at[-1] - at[0] + 1)
    step = sizes[1] / WIDTH / PIXELS
    half = sizes[0] / 2 / step
    counts = int(half + BEYOND * PIXELS), int(MIDDLE * PIXELS)
    grid = [c + step * np.arange(-n, n + 1) for c, n in zip(centers, counts, strict=True)]
    view = ndi.map_coordinates(
        np.clip(hu, *WINDOW), np.meshgrid(*grid, indexing="ij"), order=1, mode="nearest"
    )

    # Contrast agent is as bright as bone, but no bone here is as thick as the heart and the aorta.
    radius = int(CHAMBER * PIXELS)
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = np.hypot(y, x) <= CHAMBER * PIXELS
    thick = ndi.binary_opening(ndi.gaussian_filter(view, 1) > CONTRAST, disk)
    thick = ndi.binary_dilation(thick, iterations=2)
    return np.where(thick, np.minimum(view, SOFT), view), half


def _match(view: np.ndarray, half: float) -> float:
    """The highest correlation of an upright vertebra with the back of a strip."""
    found = []
    for scale in SCALES:
        vertebra, canal = _vertebra(scale)
        fit = match_template(view, vertebra)
        rows = np.arange(len(fit)) + canal - (len(view) - 1) / 2  # of the canal
        found.append(fit[rows > DEEP * half].max(initial=-1))
    return float(max(found))


@cache
def _vertebra(scale: float) -> tuple[np.ndarray, float]:
    """A thoracic vertebra in HU, PIXELS a cm times `scale`, and the row of its canal's centre."""
    front, back, side, fine = 4.5, 3.5, 4.0, 16  # cm from the canal's centre; pixels of a cm
    at = [np.arange(-a, b + 1 / fine / 2, 1 / fine) for a, b in ((front, back), (side, side))]
    y, x = np.meshgrid(*at, indexing="ij")

    def oval(center: float, depth: float, width: float) -> np.ndarray:
        return ((y - center) / depth) ** 2 + (x / width) ** 2 < 1

    hu = np.full(y.shape, 50.0)
    hu[(abs(x) > 2.3) & (abs(x) > 2.2 + y / 2) & (y < 0.8)] = WINDOW[0]  # the lungs
    hu[oval(-2.2, 1.5, 1.8)] = 250.0  # the body
    hu[oval(0.1, 1.3, 1.6)] = 300.0  # the arch
    hu[(abs(x) < 0.35) & (y > 0) & (y < 2.6)] = 250.0  # the spinous process
    hu[(abs(x) < 3.2) & (abs(y - 0.3) < 0.5)] = 250.0  # the transverse processes, and the ribs
    hu[oval(0.0, 0.8, 0.9)] = 40.0  # the canal
    hu = ndi.zoom(ndi.gaussian_filter(hu, 3), PIXELS / fine * scale, order=1)
    return hu, (len(hu) - 1) * front / (front + back)
