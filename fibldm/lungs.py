"""Lungs in chest CT without a network: thresholds, connected components and morphology in HU.

After Hu et al., "Automatic lung segmentation for accurate quantitation of volumetric X-ray CT
images" (IEEE TMI 2001); closing by local density is what keeps fibrotic tissue inside the mask.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi
from skimage.segmentation import watershed

from fibldm.ribs import close, outside_of_ribs

WORK_SIDE = 256  # larger slices are reduced: the outline of a lung is smooth at this scale

# Thresholds in HU.
AIR = -350.0  # between lung (-850) and soft tissue (50), on the side that keeps blurred edges
FIBROTIC = -250.0  # the local mean of reticulation and honeycombing lies below, muscle above
GAS = -940.0  # a small piece that is darker is trachea or bowel gas
AIRY = -905.0  # and so is one below this that is also DARKER than the largest piece by this much
DARKER = 100.0
LIGHTER = 70.0  # by as much at least lung differs from the room's air
PADDING = -995.0  # as dark is the padding outside the scanner's circle
UNSHIFTED = -975.0  # above this the room's air shows that HU are shifted
CYST = -500.0  # no cyst is lighter in its darkest pixel: noise and streaks are
ROOM = -985.0  # no lung is as dark: the room's air, held between arm and chest
JUNCTIONS = (AIR, -500.0, -650.0)  # below these two lungs that touch are looked for, in turn

# Lengths as fractions of the body's equivalent diameter and areas as fractions of the body's area,
# so that no pixel spacing is needed. Tuned on normal lungs and on phantoms with fibrosis.
SKIN = 0.015  # the chest's wall is thicker; gaps between body and table are not as deep
SMALLEST, LARGE = 0.003, 0.1  # area of a piece of lung, and of one that is lung however dark
NEAR = 0.1  # cysts are looked for at this distance from the lungs
WALL = 0.03  # thickness of a wall between cysts
WIDE, NARROW = 0.06, 0.02  # radii of the closings: over fibrosis, and over vessels
BLUR = 0.012  # scale of the local mean
AMIDST = 0.8  # part of a cyst's surroundings that is lung
HOLE = 0.01  # area of the largest hole to fill: a vessel, not a heart or a dome of the diaphragm
NECKS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.045)  # half the width of a bridge between two lungs
LUNG = 0.01  # area of the least lung that is looked for behind such a bridge
ACROSS = 0.25  # part of a lung's area that may lie across the body's middle
MEDIASTINUM = 0.05  # tissue between the centres of two lungs
HELD = 0.15  # part of a cut lung's area that has tissue on three sides; the room has less
SLIVER = 0.0005  # area of a piece that is lung where the slices beside it say so
ALONE = 0.05  # volume of a false piece, as a fraction of the largest lung's
ROUNDS = 10  # of looking at the slices beside


def lung_mask(hu: np.ndarray) -> np.ndarray:
    """Filled mask of both lungs, fibrosis included, airways outside the lungs excluded.

    hu: (H, W) slice or (D, H, W) volume of axial slices in HU, any real dtype, about 64 to 768
    pixels a side; clipped to [-1000, 400] or not; head or feet first. Returns bool of the same
    shape, all False where there is no lung. Two lungs that touch are kept apart by a gap. The
    slices of a volume are evidence for their neighbours: see `_agree`.
    Raises ValueError for another number of dimensions.
    """
    hu = np.asarray(hu)
    if hu.ndim not in (2, 3):
        raise ValueError(f"lung_mask: expected (H, W) or (D, H, W), found shape {hu.shape}")
    slices = hu[None] if hu.ndim == 2 else hu
    factor = max(1, round(max(hu.shape[-2:]) / WORK_SIDE))
    found = [_find_pieces(_reduce(image, factor)) for image in slices]
    typical = [pieces.typical for pieces in found if pieces and pieces.lung_is_large()]
    if typical:
        for pieces in filter(None, found):
            pieces.judge(float(np.median(typical)))
    side = [-(-n // factor) for n in slices.shape[1:]]
    small = np.stack([_outline(pieces) if pieces else np.zeros(side, bool) for pieces in found])
    if len(slices) > 1:
        _agree(found, small)
    return np.stack([_enlarge(mask, factor, hu.shape[-2:]) for mask in small]).reshape(hu.shape)


# Resolution.


def _reduce(image: np.ndarray, factor: int) -> np.ndarray:
    """(H, W) HU -> float32 in [-1000, 400], the means of squares of `factor` pixels."""
    image = np.clip(np.nan_to_num(image.astype(np.float32), nan=-1000.0), -1000, 400)
    image = _without_padding(image)
    if factor == 1:
        return image
    padded = np.pad(image, [(0, -n % factor) for n in image.shape], mode="edge")
    h, w = (n // factor for n in padded.shape)
    return padded.reshape(h, factor, w, factor).mean((1, 3))


def _enlarge(mask: np.ndarray, factor: int, shape: tuple[int, int]) -> np.ndarray:
    """The reverse for a mask: bilinear, then halved. Separable, so each axis in turn."""
    if factor == 1:
        return mask
    soft = mask.astype(np.float32)
    for axis, n in enumerate(shape):
        at = np.clip((np.arange(n) + 0.5) / factor - 0.5, 0, mask.shape[axis] - 1)
        low = at.astype(int)
        high = np.minimum(low + 1, mask.shape[axis] - 1)
        part = (at - low).astype(np.float32).reshape(-1, *[1] * (1 - axis))
        soft = soft.take(low, axis) * (1 - part) + soft.take(high, axis) * part
    return soft >= 0.5


def _without_padding(image: np.ndarray) -> np.ndarray:
    """Bright padding outside the scanner's circle becomes air: it would be taken for a body."""
    value = image[0, 0]
    corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
    if value <= AIR or (corners != value).any():
        return image
    labels, _ = ndi.label(image == value)
    padding = np.isin(labels, labels[[0, 0, -1, -1], [0, -1, 0, -1]])
    edge = max(1, round(max(image.shape) / WORK_SIDE))  # pixels on the circle are mixed
    mixed = ndi.binary_dilation(padding, iterations=2 * edge) & (image > AIR)
    return np.where(padding | mixed, np.float32(-1000), image)


# One slice.


@dataclass
class _Pieces:
    """Pieces of air inside the body of one slice, numbered from 1; 0 is everything else."""

    image: np.ndarray  # (H, W) HU
    body: np.ndarray  # (H, W) bool
    area: int  # of the body, in pixels
    labels: np.ndarray  # (H, W) int32
    sizes: np.ndarray  # (pieces + 1,) areas, as fractions of the body's
    level: np.ndarray  # (pieces + 1,) median HU, of the inside of small ones; 0: there is none
    darkest: np.ndarray  # (pieces + 1,) HU
    typical: float  # HU of lung: of the largest piece's inside
    lung: np.ndarray  # (pieces + 1,) bool
    barred: np.ndarray  # (pieces + 1,) bool, no lung, near as it may be
    outside: np.ndarray  # (pieces + 1,) bool, outside of the ribs

    def __post_init__(self):
        self.size = 2 * np.sqrt(self.area / np.pi)  # the body's equivalent diameter in pixels

    def lung_is_large(self) -> bool:
        return bool((self.lung & (self.sizes > LARGE)).any())

    def judge(self, typical: float) -> None:
        """Choose the pieces that are lung as far as this slice alone can tell."""
        dark = (self.level < GAS) | ((self.level < AIRY) & (self.level < typical - DARKER))
        dark = (dark & (self.sizes <= LARGE)) | (self.level < ROOM)
        self.lung = (self.sizes > SMALLEST) & ~dark & ~self.outside
        self.barred = (self.sizes > SMALLEST / 3) & dark | self.outside


def _find_pieces(image: np.ndarray) -> _Pieces | None:
    """(H, W) HU -> the pieces of air in the body; None where there is no body."""
    smooth = ndi.gaussian_filter(image, 0.5 * max(image.shape) / WORK_SIDE)
    body, shift = _find_body(smooth)
    area = np.count_nonzero(body)
    if area < 0.02 * image.size:
        return None
    size = 2 * np.sqrt(area / np.pi)
    inner = ndi.binary_erosion(body, iterations=max(1, round(SKIN * size)), border_value=1)
    labels, count = ndi.label(inner & (smooth < AIR))
    labels[(np.bincount(labels.ravel(), (smooth < CYST).ravel()) == 0)[labels]] = 0
    sizes = np.bincount(labels.ravel(), minlength=count + 1) / area
    sizes[0] = 0
    core = ndi.binary_erosion(labels > 0, iterations=max(1, round(0.008 * size)))
    cores, level, darkest = np.zeros((3, count + 1))
    for label, box in enumerate(ndi.find_objects(labels), 1):
        if sizes[label] > SLIVER:
            here = labels[box] == label
            darkest[label] = smooth[box][here].min() - shift
            inside = image[box][core[box] & here]
            cores[label] = level[label] = np.median(inside) - shift if inside.size else 0.0
            if sizes[label] > LUNG:  # a lung's base may be half a bulla: its core is not all
                level[label] = np.median(image[box][here]) - shift
    no, typical = np.zeros(count + 1, bool), float(cores[np.argmax(sizes)])
    found = _Pieces(image, body, area, labels, sizes, level, darkest, typical, no, no, no)
    found.judge(typical)
    found.outside = outside_of_ribs(labels, found.lung, smooth, body)
    found.judge(typical)
    return found


def _find_body(smooth: np.ndarray) -> tuple[np.ndarray, float]:
    """The largest piece of tissue, its cavities included, open ones too; and HU of the room's air
    above -1000, 0 where it is as it should be."""
    tissue = _largest(smooth > AIR)
    body = ndi.binary_fill_holes(tissue)
    sides = np.zeros(body.shape, np.int8)  # of the four on which a pixel has tissue
    for turn in (np.s_[:], np.s_[::-1]):
        sides[turn] += np.logical_or.accumulate(tissue[turn], 0)
        sides[:, turn] += np.logical_or.accumulate(tissue[:, turn], 1)

    # The room's air is -1000 HU. Some files have it higher, and all other air with it.
    air, held = (smooth > PADDING) & (smooth < AIR), sides >= 3
    few = np.s_[::2, ::2]
    room, closed = (smooth[few][m[few]] for m in (air & ~body & (sides <= 1), air & body))
    darkest, shift = GAS, 0.0
    if closed.size > 0.0025 * smooth.size:
        darkest = max(darkest, float(np.median(closed)) - DARKER)
        if room.size > 0.0025 * smooth.size:
            level = float(np.median(room))
            if level < np.percentile(closed, 75) - LIGHTER:
                shift = float(np.clip(level - UNSHIFTED, 0, 250))

    # Lungs that the border or the scanner's circle cuts are open to it: air lighter than the
    # room's with tissue on three or four sides, and what hangs together with it.
    open_ = air & ~body
    area = np.count_nonzero(body)
    if np.count_nonzero(open_ & held) > LUNG * area:
        radius = max(1, round(SKIN * np.sqrt(area)))
        labels, _ = ndi.label(ndi.binary_opening(open_, iterations=radius))
        flat = labels.ravel()
        sizes = np.maximum(1, np.bincount(flat))
        cavity = np.bincount(flat, held.ravel()) > HELD * sizes
        cavity &= np.bincount(flat, smooth.ravel()) > max(darkest, GAS + shift) * sizes
        cavity &= sizes > LUNG * area
        cavity[0] = False
        if cavity.any():
            grown = ndi.binary_dilation(cavity[labels], iterations=radius, mask=open_)
            body = ndi.binary_fill_holes(body | grown)
    return body, shift


def _outline(found: _Pieces) -> np.ndarray:
    """(H, W) bool: the lungs that the slice's chosen pieces make."""
    lungs = np.zeros(found.body.shape, bool)
    if not found.lung.any():
        return lungs
    size, reach = found.size, int(WIDE * found.size) + 3
    box = _box(found.lung[found.labels], int(NEAR * size) + 2)
    labels, image = found.labels[box], found.image[box]
    part = found.lung[labels]

    # Cysts: small pieces near the lungs, and those that only a wall parts from them.
    cysts = (labels > 0) & ~found.barred[labels] & ~part
    if cysts.any():
        part |= cysts & (ndi.distance_transform_edt(~part) <= NEAR * size)
    if (cysts & ~part).any():
        combs, _ = ndi.label(ndi.distance_transform_edt(~(part | cysts)) <= WALL / 2 * size)
        part |= cysts & np.isin(combs, combs[part])

    # Fibrosis: what a closing adds and is, on average, not solid. Vessels: a narrower closing,
    # whatever the density, and holes. One lung at a time: the mediastinum is not to be closed.
    local = ndi.gaussian_filter(image, BLUR * size) < FIBROTIC
    sides = _sides(part, image, found, box[1].start)
    grown = []
    for side in sides:
        where = _box(side, reach)
        closed = side[where] | (close(side[where], WIDE * size) & local[where])
        closed = _fill_small(close(closed, NARROW * size), HOLE * found.area)
        grown.append(np.zeros_like(side))
        grown[-1][where] = closed
    both = grown[0]
    if len(sides) == 2:
        a = sides[0] | (grown[0] & ~grown[1])
        b = sides[1] | (grown[1] & ~grown[0])
        both = a | (b & ~ndi.binary_dilation(a, np.ones((3, 3))))

    # Gas is out, but for cysts in the midst of a lung.
    gas = found.barred[labels] & both
    for label in np.unique(labels[gas]):
        where = _box(labels == label, int(WALL * size) + 1)
        here = labels[where] == label
        ring = ndi.binary_dilation(here, iterations=max(1, round(WALL * size))) & ~here
        if both[where][ring].mean() > AMIDST:
            gas[where] &= ~here
    lungs[box] = both & found.body[box] & ~gas
    return lungs


def _sides(part: np.ndarray, image: np.ndarray, found: _Pieces, left: int) -> list[np.ndarray]:
    """The two lungs of which `part` (H, W) is made; `part` alone where it is but one.

    `part` and `image` begin at column `left` of the slice. Where lungs touch, the bridge between
    them is narrow or, where the pleura shows, less dark than they are.
    """
    middle = np.average(np.arange(found.body.shape[1]), weights=found.body.sum(0)) - left
    labels, _ = ndi.label(part)
    sides = _seeds(labels, middle, LUNG * found.area, ACROSS)
    if sides is None:
        seeds = _seeds_of_touching(part, image, found, middle)
        if seeds is not None:
            sides = watershed(image, seeds, mask=part)
        else:
            sides = _seeds(labels, middle, LUNG * found.area, 0.5)
    if sides is None:
        return [part]
    rest = part & (sides == 0)
    if rest.any():  # small pieces, each whole
        share = np.bincount(labels.ravel(), _left(labels, middle).ravel())
        on_left = share > 0.5 * np.maximum(1, np.bincount(labels.ravel()))
        sides = np.where(rest, np.where(on_left, 1, 2)[labels], sides)
    return [sides == 1, sides == 2]


def _seeds_of_touching(part, image, found: _Pieces, middle: float) -> np.ndarray | None:
    for threshold in JUNCTIONS:
        depth = ndi.distance_transform_edt(part & (image < threshold))
        for neck in NECKS:
            labels, _ = ndi.label(depth > neck * found.size)
            seeds = _seeds(labels, middle, LUNG * found.area, ACROSS)
            if seeds is not None and _tissue_between(seeds, image) > MEDIASTINUM * found.size:
                return seeds
    return None


def _seeds(labels: np.ndarray, middle: float, least: float, across: float) -> np.ndarray | None:
    """(H, W) int32, 1 and 2 in the large pieces left and right of the column `middle`.

    None where all lie on one side, or where one has more than the fraction `across` on either
    side: no lung has.
    """
    sizes = np.bincount(labels.ravel())
    large = sizes >= least
    large[0] = False
    share = np.bincount(labels.ravel(), _left(labels, middle).ravel()) / np.maximum(1, sizes)
    side = np.where(large, np.where(share > 0.5, 1, 2), 0).astype(np.int32)
    if np.minimum(share, 1 - share)[large].max(initial=0) > across or len(set(side[large])) < 2:
        return None
    return side[labels]


def _left(labels: np.ndarray, middle: float) -> np.ndarray:
    return np.broadcast_to(np.arange(labels.shape[1]) < middle, labels.shape)


def _tissue_between(seeds: np.ndarray, image: np.ndarray) -> float:
    """Pixels of tissue on the line from one seed's centre to the other's."""
    ends = np.array(ndi.center_of_mass(seeds > 0, seeds, (1, 2)))
    length = np.hypot(*(ends[1] - ends[0]))
    rows, columns = np.linspace(*ends, int(length) + 2).round().astype(int).T
    return np.count_nonzero(image[rows, columns] > AIR)


def _box(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """The rows and columns of `mask` and `margin` more."""
    return tuple(
        slice(max(0, s.start - margin), s.stop + margin)
        for s in ndi.find_objects(mask.astype(np.uint8))[0]
    )


# Slices beside each other.


def _agree(found: list[_Pieces | None], masks: np.ndarray) -> None:
    """Correct the slices of a volume by their neighbours: changes `found` and `masks` (D, H, W).

    What hangs together with neither lung is dropped. A piece too small to be lung by itself is
    lung where it continues lung, and near lung it is a cyst only there: bowel lies near, too.
    All slices look at their neighbours before any changes, so the direction does not matter.
    """
    for _ in range(ROUNDS):
        labels, count = ndi.label(masks)
        volumes = np.bincount(labels.ravel(), minlength=count + 1)
        volumes[0] = 0
        kept = (volumes > ALONE * volumes.max())[labels]
        changed = []
        for z, pieces in enumerate(found):
            if pieces is None:
                continue
            beside = kept[max(0, z - 1) : z + 2 : 2].any(0) if z else kept[1]
            flat, least = pieces.labels.ravel(), len(pieces.sizes)
            pixels = np.maximum(1, np.bincount(flat, minlength=least))
            continued = np.bincount(flat, beside.ravel(), least) / pixels
            used, safe = (np.bincount(flat, m[z].ravel(), least) > 0 for m in (masks, kept))
            lung = pieces.lung & safe
            lung |= (pieces.sizes > SLIVER) & (pieces.darkest > GAS) & (continued > 0.5)
            lung &= ~pieces.outside
            lung[0] = False
            barred = (pieces.barred | ((continued == 0) & beside.any())) & ~lung
            barred[0] = False
            if (lung != pieces.lung).any() or (barred & used & ~pieces.barred).any():
                changed.append(z)
            pieces.lung, pieces.barred = lung, barred
        if not changed:
            return
        for z in changed:
            masks[z] = _outline(found[z])


# Masks.


def _fill_small(mask: np.ndarray, largest: float) -> np.ndarray:
    """Fill holes of at most `largest` pixels: vessels, not a heart that the lungs surround."""
    labels, _ = ndi.label(ndi.binary_fill_holes(mask) & ~mask)
    small = np.bincount(labels.ravel()) <= largest
    small[0] = False
    return mask | small[labels]


def _largest(mask: np.ndarray) -> np.ndarray:
    labels, _ = ndi.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return mask & (labels == sizes.argmax())
