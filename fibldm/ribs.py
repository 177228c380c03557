"""Air outside of the ribs that may look as lung: subcutaneous emphysema, and air beside the body.

Three things tell it from a piece of lung: bone stands between it and the lungs, it lies nearer to
the skin than lung does, or the picture's border cuts it where both lungs are whole.
"""

import numpy as np
from scipy import ndimage as ndi
from scipy.spatial import cKDTree

BONE, TISSUE = 150.0, -350.0  # HU: what is above

LARGE = 0.2  # of the largest piece's area: a thick piece so large is lung for certain

# Lengths as fractions of the body's equivalent diameter.
THICK = 0.02  # half the thickness of a piece that is lung for certain
REACH = 0.18  # beyond it is what is farther from the lungs than the chest's wall is thick
OUTERMOST, HALFWAY = 0.045, 0.09  # depths under the skin of a lung's outer part and of its middle
EDGE = 0.015  # between a piece and the end of a body that the field of view cuts
GAP = 0.05  # half the gap between ribs in a slice

CIRCLE = 0.96  # of half the picture's side: the scanner's circle begins there
ACROSS = 0.3  # parts of a piece's area left of the body's middle: as near to a half
PAIR = 0.05  # of the body's area: two lungs that are one piece are larger
WALL = 0.8  # of the chest wall's least thickness over the lungs: no lung is nearer to the skin
MIDDLE = 1.0  # of it: nor lies the middle of a piece of lung
OUTER, NEAREST = 0.02, 0.25  # parts of a piece: next to the skin, and next to the lungs
BEHIND = 0.3  # of the lines from a piece to the lungs: more do not cross bone
OUTWARDS = 0.5  # of its length, such a line leads away from the body's middle
STEPS = 24  # on each line


def outside_of_ribs(
    labels: np.ndarray, lung: np.ndarray, hu: np.ndarray, body: np.ndarray
) -> np.ndarray:
    """(pieces + 1,) bool: which pieces of air are not within the rib cage.

    labels: (H, W) pieces of air in a body, numbered from 1; lung: (pieces + 1,) bool, those whose
    air may be that of lungs; hu: (H, W); body: (H, W) bool. Large and thick pieces are what the
    others are measured by; see `_sure`.
    """
    size, count = 2 * np.sqrt(np.count_nonzero(body) / np.pi), len(lung)
    rim_of_body = _rim(body)
    cut = _cut(labels, rim_of_body & (hu <= TISSUE), size, count)
    depth = _depth(rim_of_body & (hu > TISSUE))
    thick = _thick(labels, size, count)
    under_skin = _under_skin(labels, depth, body, size, count) & ~cut
    sure = _sure(labels, lung & ~cut & ~under_skin, lung & cut, thick)
    if not sure.any():  # a thin body: its lungs are as near to the skin
        under_skin[:] = False
        sure = _sure(labels, lung & ~cut, lung & cut, thick)
    if not sure.any() or sure[labels[labels > 0]].all():
        return np.zeros(count, bool)

    behind, shallow = _beyond(labels, sure, depth, hu, body, size)
    outside = under_skin | behind | (shallow & ~cut)
    if np.count_nonzero(sure) == 2 and not sure[cut].any():  # both lungs are whole
        sizes = np.bincount(labels.ravel(), minlength=count)
        outside |= cut & thick & (sizes < sizes[sure].min())
    return outside & ~sure


def _beyond(
    labels: np.ndarray,
    sure: np.ndarray,
    depth: np.ndarray,
    hu: np.ndarray,
    body: np.ndarray,
    size: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Two (pieces + 1,) bool of what lies outwards from the pieces that are lung for certain:
    pieces behind bone, and pieces nearer to the skin than those are."""
    judged, count = (labels > 0) & ~sure[labels], len(sure)
    pixels, pieces = np.argwhere(judged), labels[judged]
    rim = np.argwhere(_rim(sure[labels]))
    far, nearest = cKDTree(rim).query(pixels)

    # What lies outwards from the lungs: beyond where they are nearest, seen from the body's middle.
    close_by = far <= _quantiles(far, pieces, count, NEAREST)[pieces]
    start, end, piece = pixels[close_by], rim[nearest[close_by]], pieces[close_by]
    length = far[close_by]
    middle = np.argwhere(body).mean(0)
    radius = np.linalg.norm(start - middle, axis=1)
    outwards = radius - np.linalg.norm(end - middle, axis=1) > OUTWARDS * length
    outwards &= length < REACH * size
    counts = np.maximum(1, np.bincount(piece, minlength=count))

    # Bone on the way to the lungs, or to the middle. Ribs run obliquely: a slice has parts of them.
    cage = _cage(hu, body, size)
    inwards = start + (middle - start) * np.minimum(1, length / np.maximum(1, radius))[:, None]
    crossed = outwards & (_cross(cage, start, end) | _cross(cage, start, inwards))
    behind = np.bincount(piece, crossed, count) > BEHIND * counts

    least = np.quantile(depth[_rim(sure[labels])], OUTER, method="lower")
    outer, half = _depths(labels, depth, count)
    shallow = (outer < WALL * least) | (half < MIDDLE * least)
    return behind, shallow & (np.bincount(piece, outwards, count) > 0.5 * counts)


def _under_skin(
    labels: np.ndarray, depth: np.ndarray, body: np.ndarray, size: float, count: int
) -> np.ndarray:
    """(count,) bool: pieces nearer to the skin than lungs are in any body but a thin one.

    Between breasts that touch, air lies twice as deep, and across the body's middle.
    """
    outer, half = _depths(labels, depth, count)
    sizes = np.bincount(labels.ravel(), minlength=count)
    column = np.average(np.arange(body.shape[1]), weights=body.sum(0))
    left = np.bincount(labels[:, : round(column)].ravel(), minlength=count) / np.maximum(1, sizes)
    across = (abs(left - 0.5) < ACROSS) & (sizes < PAIR * np.count_nonzero(body))
    twice = 1 + across
    # Half a pixel less: in small pictures depths are coarse.
    return (outer < twice * OUTERMOST * size - 0.5) & (half < twice * HALFWAY * size)


def _depth(skin: np.ndarray) -> np.ndarray:
    """(H, W): pixels from the skin; infinite where there is none.

    Where the field of view cuts a body there is no skin, nor where the scanner's circle does.
    """
    y, x = (np.linspace(-1, 1, n) for n in skin.shape)
    skin = skin & (np.hypot(y[:, None], x) < CIRCLE)
    return ndi.distance_transform_edt(~skin) if skin.any() else np.full(skin.shape, np.inf)


def _depths(labels: np.ndarray, depth: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two (count,): the depths of each piece's outer part and of its middle."""
    depth, pieces = depth[labels > 0], labels[labels > 0]
    return _quantiles(depth, pieces, count, OUTER), _quantiles(depth, pieces, count, 0.5)


def _cross(mask: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(N,) bool: which straight ways, (N, 2) their ends, cross a mask."""
    ways = start + (end - start) * np.linspace(0, 1, STEPS)[:, None, None]
    y, x = np.moveaxis(ways.round().astype(int), -1, 0)
    return mask[y, x].any(0)


def _thick(labels: np.ndarray, size: float, count: int) -> np.ndarray:
    """(count,) bool: pieces that are more than a slit."""
    core = ndi.binary_erosion(labels > 0, iterations=max(1, round(THICK * size)), border_value=1)
    thick = np.bincount(labels[core], minlength=count) > 0
    thick[0] = False
    return thick


def _sure(labels: np.ndarray, whole: np.ndarray, cut: np.ndarray, thick: np.ndarray) -> np.ndarray:
    """(pieces + 1,) bool: large and thick pieces, and thick ones that the field of view cuts.

    Where two large ones that are whole lie side by side these are the lungs, and no others.
    """
    sizes = np.bincount(labels.ravel(), minlength=len(whole)) * thick * (whole | cut)
    large = sizes > LARGE * sizes.max()
    pair = np.argsort(sizes * (large & whole))[-2:]
    if (large & whole)[pair].all():
        down, right = np.diff(ndi.center_of_mass(labels > 0, labels, pair), axis=0)[0]
        if abs(right) > abs(down):
            return large & whole
    return large | (thick & cut)


def _cut(labels: np.ndarray, open_: np.ndarray, size: float, count: int) -> np.ndarray:
    """(count,) bool: pieces at the picture's border, or where a body is open: it ends in air."""
    edge = open_
    if open_.any():
        edge = ndi.binary_dilation(open_, np.ones((3, 3)), iterations=int(EDGE * size) + 2)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    return np.bincount(labels[edge], minlength=count) > 0


def _rim(mask: np.ndarray) -> np.ndarray:
    """The outermost pixels of a mask, where it does not reach the picture's border."""
    return mask & ~ndi.binary_erosion(mask, border_value=1)


def _cage(hu: np.ndarray, body: np.ndarray, size: float) -> np.ndarray:
    """(H, W) bool: bones and the gaps between them."""
    return close((hu > BONE) & body, GAP * size)


def _quantiles(values: np.ndarray, pieces: np.ndarray, count: int, part: float) -> np.ndarray:
    """(count,): below which lies a part of each piece's values; infinite where it has none."""
    order = np.lexsort((values, pieces))
    counts = np.bincount(pieces, minlength=count)
    first = np.cumsum(counts) - counts
    found = np.full(count, np.inf)
    has = counts > 0
    found[has] = values[order][(first + part * (counts - 1)).astype(int)[has]]
    return found


def close(mask: np.ndarray, radius: float) -> np.ndarray:
    """Closing by a disk of `radius` pixels; by distances, so its cost does not grow with it."""
    margin = int(radius) + 2
    padded = np.pad(mask, margin)
    dilated = ndi.distance_transform_edt(~padded) <= radius
    closed = ndi.distance_transform_edt(dilated) > radius
    return closed[margin:-margin, margin:-margin] | mask
