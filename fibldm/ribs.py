"""Air outside of the ribs that may look as lung: subcutaneous emphysema, and air beside the body.

Two things tell it from a piece of lung: bone stands between it and the lungs, or it lies nearer to
the skin than lung does anywhere else.
"""

import numpy as np
from scipy import ndimage as ndi
from scipy.spatial import cKDTree

BONE, TISSUE = 150.0, -350.0  # HU: what is above

LARGE = 0.2  # of the largest piece's area: a thick piece so large is lung for certain

# Lengths as fractions of the body's equivalent diameter.
THICK = 0.02  # half the thickness of a piece that is lung for certain
REACH = 0.18  # what is farther from the lungs than the chest's wall is thick is not judged
EDGE = 0.015  # between a piece and the end of a body that the field of view cuts
GAP = 0.05  # half the gap between ribs in a slice

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
    size = 2 * np.sqrt(np.count_nonzero(body) / np.pi)
    rim_of_body = _rim(body)
    cut = _cut(labels, rim_of_body & (hu <= TISSUE), size, len(lung))
    sure = _sure(labels, lung & ~cut, lung & cut, size)
    judged = (labels > 0) & ~sure[labels]
    if not sure.any() or not judged.any():
        return np.zeros(len(lung), bool)
    pixels, pieces = np.argwhere(judged), labels[judged]
    rim = np.argwhere(_rim(sure[labels]))
    far, nearest = cKDTree(rim).query(pixels)

    # What lies outwards from the lungs: beyond where they are nearest, seen from the body's middle.
    close_by = far <= _quantiles(far, pieces, len(lung), NEAREST)[pieces]
    start, end, piece = pixels[close_by], rim[nearest[close_by]], pieces[close_by]
    length = far[close_by]
    middle = np.argwhere(body).mean(0)
    radius = np.linalg.norm(start - middle, axis=1)
    outwards = radius - np.linalg.norm(end - middle, axis=1) > OUTWARDS * length
    outwards &= length < REACH * size
    counts = np.maximum(1, np.bincount(piece, minlength=len(lung)))

    # Nearer to the skin than any lung.
    shallow = _shallow(pixels, pieces, rim, np.argwhere(rim_of_body & (hu > TISSUE)), len(lung))
    shallow &= np.bincount(piece, outwards, len(lung)) > 0.5 * counts

    # Bone on the way to the lungs, or to the middle. Ribs run obliquely: a slice has parts of them.
    cage = _cage(hu, body, size)
    inwards = start + (middle - start) * np.minimum(1, length / np.maximum(1, radius))[:, None]
    crossed = outwards & (_cross(cage, start, end) | _cross(cage, start, inwards))
    behind = np.bincount(piece, crossed, len(lung)) > BEHIND * counts
    return behind | (shallow & ~cut)


def _shallow(
    pixels: np.ndarray, pieces: np.ndarray, rim: np.ndarray, skin: np.ndarray, count: int
) -> np.ndarray:
    """(count,) bool: pieces nearer to the skin than lungs with this rim; all (N, 2) pixels.

    Where the field of view cuts a body there is no skin.
    """
    if not len(skin):
        return np.zeros(count, bool)
    tree = cKDTree(skin)
    least = np.quantile(tree.query(rim)[0], OUTER)
    depth = tree.query(pixels)[0]
    outer, middle = (_quantiles(depth, pieces, count, part) for part in (OUTER, 0.5))
    return (outer < WALL * least) | (middle < MIDDLE * least)


def _cross(mask: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(N,) bool: which straight ways, (N, 2) their ends, cross a mask."""
    ways = start + (end - start) * np.linspace(0, 1, STEPS)[:, None, None]
    y, x = np.moveaxis(ways.round().astype(int), -1, 0)
    return mask[y, x].any(0)


def _sure(labels: np.ndarray, whole: np.ndarray, cut: np.ndarray, size: float) -> np.ndarray:
    """(pieces + 1,) bool: large and thick pieces, and thick ones that the field of view cuts.

    Where two large ones that are whole lie side by side these are the lungs, and no others.
    """
    core = ndi.binary_erosion(labels > 0, iterations=max(1, round(THICK * size)), border_value=1)
    thick = np.bincount(labels[core], minlength=len(whole)) > 0
    thick[0] = False
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
