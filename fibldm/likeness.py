"""Near copies of a slice, found by fine detail: coarse structure is alike in all chests."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage as ndi

from fibldm import ct

THUMBNAIL = 64  # pixels a side
DETAIL = 3.0  # pixels of a thumbnail: what is coarser is the same in all chests
COPY_CANDIDATE, COPY = 0.90, 0.96  # correlation of thumbnails: at first sight, and aligned
CANDIDATES, BLOCK = 4000, 1024  # pairs to align at most; rows compared at a time


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Slices (..., H, W) in [-1, 1] -> (..., THUMBNAIL, THUMBNAIL) float32, padded with -1."""
    return ct.fit_square(images, THUMBNAIL, -1)


def coarse_detail(small: np.ndarray, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Thumbnails (N, S, S) -> their detail at half the size, (N, S * S / 4), of mean 0 and norm 1.

    Products of two such rows are correlations. shift: pixels of that half size, down and right.
    """
    half = small.shape[-1] // 2
    small = small.astype(np.float32).reshape(-1, half, 2, half, 2).mean(axis=(2, 4))
    if any(shift):
        small = ndi.shift(small, (0, *shift), order=1, mode="nearest")
    fine = small - ndi.gaussian_filter(small, (0, DETAIL, DETAIL))
    fine = fine - fine.mean(axis=(1, 2), keepdims=True)
    norm = np.sqrt((fine**2).sum(axis=(1, 2), keepdims=True))
    return (fine / np.maximum(norm, 1e-6)).reshape(len(fine), -1)


def aligned_likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the detail of two thumbnails (S, S), shifted against each other for the best.

    Up to a pixel each way in steps of a half, then a quarter around the best of them.
    """
    a, b = (
        t - ndi.gaussian_filter(t, DETAIL) for t in (a.astype(np.float32), b.astype(np.float32))
    )
    inner = np.s_[3:-3, 3:-3]
    first = (a[inner] - a[inner].mean()).ravel()
    tried: dict[tuple[float, float], float] = {}

    def likeness(shift: tuple[float, float]) -> float:
        if shift not in tried:
            moved = ndi.shift(b, shift, order=3, mode="nearest")[inner]
            second = (moved - moved.mean()).ravel()
            norm = np.linalg.norm(first) * np.linalg.norm(second)
            tried[shift] = float(first @ second / max(norm, 1e-6))
        return tried[shift]

    steps = (-1.0, -0.5, 0.0, 0.5, 1.0)
    down, right = max(((y, x) for y in steps for x in steps), key=likeness)
    near = (-0.25, 0.0, 0.25)
    return max(likeness((down + y, right + x)) for y in near for x in near)


class Copy(NamedTuple):
    """Two slices of different patients that show the same."""

    first: int
    second: int
    likeness: float


def find_copies(small: np.ndarray, patients: Sequence[str]) -> list[Copy]:
    """Pairs of rows of different patients that are one slice: shifted a little, brighter, recoded.

    small: (N, THUMBNAIL, THUMBNAIL) of `thumbnails`. Block by block, so that N = 20,000 fits in
    memory. Slices of one patient resemble each other and are not compared.
    """
    owner = np.unique(np.asarray(patients), return_inverse=True)[1]
    blocks = [np.s_[start : start + BLOCK] for start in range(0, len(small), BLOCK)]
    coarse = np.concatenate([coarse_detail(small[rows]) for rows in blocks])
    pairs: dict[tuple[int, int], float] = {}
    for number, rows in enumerate(blocks):
        for others in blocks[number:]:
            likeness = coarse[rows] @ coarse[others].T
            likeness[owner[rows, None] == owner[None, others]] = -1
            few = min(3, likeness.shape[1])  # suffice to name a copy
            best = np.argpartition(-likeness, few - 1, axis=1)[:, :few]
            values = np.take_along_axis(likeness, best, axis=1)
            for i, j in np.argwhere(values > COPY_CANDIDATE):
                a, b = rows.start + int(i), others.start + int(best[i, j])
                pairs[min(a, b), max(a, b)] = float(values[i, j])
    likeliest = sorted(pairs, key=pairs.__getitem__, reverse=True)[:CANDIDATES]
    found = [Copy(a, b, aligned_likeness(small[a], small[b])) for a, b in likeliest]
    return [copy for copy in found if copy.likeness > COPY]
