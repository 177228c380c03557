"""The field of view in a picture that is larger: a constant surround that passes for tissue."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi

AIR = -1000.0  # HU
EMPTY = -990.0  # HU: rows and columns of air that were added around a frame are no darker than this
TISSUE = -350.0  # HU: a surround below is seen for air
BONE = 1000.0  # HU: a surround below is brighter than all bone only where the picture is inverted
MIXED = 3  # lines between a frame and air that was added around it: resizing mixes the two
WHOLE = 0.9  # an edge of the field with less of the line beside it is mixed with the surround
ROUND = 0.97  # radius of the nearest surround, by that of the farthest pixel of a round field


@dataclass(frozen=True)
class Field:
    """Rows and columns of the field of view; where in these there is none, and its HU there."""

    box: tuple[slice, slice]
    outside: np.ndarray
    value: float

    def cut(self, image: np.ndarray, fill: float | bool = AIR) -> np.ndarray:
        """What an image (H, W) or a mask shows within the field; `fill` is what is outside."""
        return np.where(self.outside, image.dtype.type(fill), image[self.box])

    def inside(self, hu: np.ndarray) -> np.ndarray:
        """The values within the field, of whatever shape: what is to be judged as HU."""
        return hu[self.box][~self.outside] if self.outside.any() else hu[self.box]


class Surround:
    """Watches the slices of a series, one by one: what is the same in all of them?"""

    def __init__(self) -> None:
        self.first: np.ndarray | None = None  # HU (H, W)
        self.same: np.ndarray | None = None  # bool (H, W)
        self.shapes: set[tuple[int, ...]] = set()

    def add(self, hu: np.ndarray) -> None:
        """Look at a slice (H, W) in HU. Those of a single value tell nothing."""
        hu = np.round(hu)  # resizing leaves a constant all but constant
        self.shapes.add(hu.shape)
        if len(self.shapes) > 1 or hu.min() == hu.max():
            return
        if self.first is None:
            self.first, self.same = hu, np.ones(hu.shape, bool)
        self.same &= self.first == hu

    def field(self) -> Field | None:
        """The field of view; None where it is all of the picture, as it should be.

        A surround has one value above air, takes whole edges of the picture or all of its corners,
        and leaves a rectangle or a circle: no body has that shape.
        """
        if self.first is None or len(self.shapes) > 1:
            return None
        empty = self.same & (self.first <= EMPTY)
        if empty.all():
            return None
        outer = _box(~empty)
        for lines in range(MIXED + 1):
            inner = _without_lines(outer, lines, empty.shape)
            value = _value(self.first[inner], self.same[inner])
            if value is not None and (found := self._field_in(inner, value)):
                return found
        return None

    def _field_in(self, inner: tuple[slice, slice], value: float) -> Field | None:
        """The field of view that a frame of this value leaves in these rows and columns."""
        # Single pixels of the same value within the field are tissue, also on its edges.
        alike = self.same[inner] & (self.first[inner] == value)
        square = np.ones((3, 3))
        around = _reached(ndi.binary_opening(alike, square))
        if around.all() or not around.any():
            return None
        box = _without_mixed(self.first[inner], _box(~around), value)
        outside = around[box]
        if outside.any():  # corners around a circle: they run out in lines along the edges
            opened = ndi.binary_opening(np.pad(alike[box], 2, mode="edge"), square)[2:-2, 2:-2]
            outside = ndi.binary_dilation(_reached(opened), square, iterations=2) & alike[box]
        if self.first.max() <= value < BONE or not _is_round(outside):
            return None
        rows, columns = (
            slice(of.start + part.start, of.start + part.stop)
            for of, part in zip(inner, box, strict=True)
        )
        return Field((rows, columns), outside, value)


def find_field(hu: np.ndarray) -> Field | None:
    """The field of view of one slice (H, W) in HU; see `Surround.field`."""
    surround = Surround()
    surround.add(hu)
    return surround.field()


def _value(hu: np.ndarray, same: np.ndarray) -> float | None:
    """What whole edges of a picture (H, W) show, or else its corners; None where that is no tissue.

    same: bool (H, W), where all slices show the same.
    """
    for line in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1], np.ix_((0, -1), (0, -1))):
        found = hu[line].ravel()
        if same[line].all() and (found == found[0]).all() and found[0] > TISSUE:
            return float(found[0])
    return None


def _reached(mask: np.ndarray) -> np.ndarray:
    """What of a mask (H, W) hangs together with the picture's border."""
    labels, _ = ndi.label(mask)
    border = np.concatenate([*labels[[0, -1]], *labels[:, [0, -1]].T])
    return np.isin(labels, border[border > 0])


def _without_lines(
    box: tuple[slice, slice], lines: int, shape: tuple[int, ...]
) -> tuple[slice, slice]:
    """A box without so many lines of each side on which it does not reach the picture's border."""
    cut = []
    for side, length in zip(box, shape, strict=True):
        start = side.start + lines * (side.start > 0)
        cut.append(slice(start, max(start + 1, side.stop - lines * (side.stop < length))))
    return tuple(cut)


def _without_mixed(hu: np.ndarray, box: tuple[slice, slice], value: float) -> tuple[slice, slice]:
    """A box (rows, columns) of HU without edges that are partly the surround of this value."""
    cut = []
    for axis, side in enumerate(box):
        lines = np.moveaxis(hu[box], axis, 0) - value
        first, last = _mixed_lines(lines), _mixed_lines(lines[::-1])
        cut.append(slice(side.start + first, side.stop - last))
    return tuple(cut)


def _mixed_lines(lines: np.ndarray) -> int:
    """How many of the first lines (N, M), less the surround's value, are mixed with it."""
    if len(lines) < 4 * MIXED:
        return 0
    for n in range(MIXED):
        edge, beside = lines[n : n + 2]
        whole = edge @ beside >= WHOLE * (beside @ beside)
        if whole or np.count_nonzero(edge) < WHOLE * edge.size:
            return n
    return MIXED


def _is_round(outside: np.ndarray) -> bool:
    """Whether only what lies outside of a circle around the middle of a box (H, W) is missing."""
    if not outside.any():
        return True
    y, x = (np.arange(n) - (n - 1) / 2 for n in outside.shape)
    radius = np.hypot(y[:, None], x)
    return bool(radius[outside].min() > ROUND * radius[~outside].max())


def _box(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of a mask that is not empty."""
    return ndi.find_objects(mask.astype(np.uint8))[0]
