"""Lungs in chest CT without a network: thresholds, connected components and morphology in HU.

After Hu et al., "Automatic lung segmentation for accurate quantitation of volumetric X-ray CT
images" (IEEE TMI 2001); closing by local density is what keeps fibrotic tissue inside the mask.
"""

import numpy as np
from scipy import ndimage as ndi

WORK_SIDE = 256  # larger slices are reduced: the outline of a lung is smooth at this scale

# Thresholds in HU.
AIR = -350.0  # between lung (-850) and soft tissue (50), on the side that keeps blurred edges
FIBROTIC = -250.0  # the local mean of reticulation and honeycombing lies below, muscle above
GAS = -940.0  # a small piece that is darker is trachea or bowel gas
AIRY = -905.0  # and so is one below this that is also DARKER than the largest piece by this much
DARKER = 100.0

# Lengths as fractions of the body's equivalent diameter and areas as fractions of the body's area,
# so that no pixel spacing is needed. Tuned on normal lungs and on phantoms with fibrosis.
SKIN = 0.015  # the chest's wall is thicker; gaps between body and table are not as deep
SMALLEST, LARGE = 0.003, 0.1  # area of a piece of lung, and of one that is lung however dark
NEAR = 0.1  # cysts are looked for at this distance from the lungs
WIDE, NARROW = 0.06, 0.02  # radii of the closings: over fibrosis, and over vessels
BLUR = 0.012  # scale of the local mean
HOLE = 0.01  # area of the largest hole to fill: a vessel, not a heart or a dome of the diaphragm


def lung_mask(hu: np.ndarray) -> np.ndarray:
    """Filled mask of both lungs, fibrosis included, airways outside the lungs excluded.

    hu: (H, W) slice or (D, H, W) volume of axial slices in HU, any real dtype, about 64 to 768
    pixels a side; clipped to [-1000, 400] or not. Returns bool of the same shape, all False
    where there is no lung. Each slice is treated by itself.
    Raises ValueError for another number of dimensions.
    """
    hu = np.asarray(hu)
    if hu.ndim not in (2, 3):
        raise ValueError(f"lung_mask: expected (H, W) or (D, H, W), found shape {hu.shape}")
    slices = hu[None] if hu.ndim == 2 else hu
    masks = np.zeros(slices.shape, bool)
    for image, mask in zip(slices, masks, strict=True):
        mask[:] = _slice_mask(np.nan_to_num(image.astype(np.float32), nan=-1000.0))
    return masks.reshape(hu.shape)


def _slice_mask(image: np.ndarray) -> np.ndarray:
    """(H, W) float32 HU -> (H, W) bool."""
    image = np.clip(image, -1000, 400)
    factor = max(1, round(max(image.shape) / WORK_SIDE))
    if factor == 1:
        return _find_lungs(image)
    pad = [(0, -n % factor) for n in image.shape]
    padded = np.pad(image, pad, mode="edge")
    h, w = (n // factor for n in padded.shape)
    small = _find_lungs(padded.reshape(h, factor, w, factor).mean((1, 3)))
    grid = [np.clip((np.arange(n) + 0.5) / factor - 0.5, 0, None) for n in image.shape]
    soft = ndi.map_coordinates(
        small.astype(np.float32), np.meshgrid(*grid, indexing="ij"), order=1, mode="nearest"
    )
    return soft >= 0.5


def _find_lungs(image: np.ndarray) -> np.ndarray:
    empty = np.zeros(image.shape, bool)
    smooth = ndi.gaussian_filter(image, 0.5 * max(image.shape) / WORK_SIDE)

    # Body: the largest piece of tissue, its cavities included.
    body = ndi.binary_fill_holes(_largest(smooth > AIR))
    area = np.count_nonzero(body)
    if area < 0.02 * image.size:
        return empty
    size = 2 * np.sqrt(area / np.pi)

    # Lungs: pieces of air in the body that are large; small ones only where they are not gas.
    inner = ndi.binary_erosion(body, iterations=max(1, round(SKIN * size)))
    labels, count = ndi.label(inner & (smooth < AIR))
    sizes = np.bincount(labels.ravel(), minlength=count + 1) / area
    sizes[0] = 0
    core = ndi.binary_erosion(labels > 0, iterations=max(1, round(0.008 * size)))
    level = np.full(count + 1, -1000.0)
    for label in np.flatnonzero(sizes > SMALLEST / 3):
        inside = image[core & (labels == label)]
        level[label] = np.median(inside) if inside.size else 0.0
    lung = sizes > LARGE
    typical = level[np.argmax(sizes)]
    dark = (level < GAS) | ((level < AIRY) & (level < typical - DARKER))
    lung |= (sizes > SMALLEST) & ~dark
    lungs = lung[labels]
    if not lungs.any():
        return empty
    gas = ((sizes > SMALLEST / 3) & dark & ~lung)[labels]
    margin = int(NEAR * size) + 2
    rows, cols = ndi.find_objects(lungs.astype(np.uint8))[0]
    box = np.s_[
        max(0, rows.start - margin) : rows.stop + margin,
        max(0, cols.start - margin) : cols.stop + margin,
    ]
    part = lungs[box]

    # Fibrosis: cysts near the lungs, and what a closing adds and is, on average, not solid.
    cysts = (labels[box] > 0) & ~gas[box] & ~part
    if cysts.any():
        part |= cysts & (ndi.distance_transform_edt(~part) <= NEAR * size)
    local = ndi.gaussian_filter(image[box], BLUR * size)
    part |= _close(part, WIDE * size) & (local < FIBROTIC)

    # Vessels: a narrower closing, whatever the density, and holes.
    part = _close(part, NARROW * size)
    lungs[box] = _fill_small(part, HOLE * area)
    return lungs & body & ~gas


def _fill_small(mask: np.ndarray, largest: float) -> np.ndarray:
    """Fill holes of at most `largest` pixels: vessels, not a heart that the lungs surround."""
    labels, count = ndi.label(ndi.binary_fill_holes(mask) & ~mask)
    small = np.bincount(labels.ravel(), minlength=count + 1) <= largest
    small[0] = False
    return mask | small[labels]


def _largest(mask: np.ndarray) -> np.ndarray:
    labels, count = ndi.label(mask)
    if count == 0:
        return mask
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


def _close(mask: np.ndarray, radius: float) -> np.ndarray:
    """Closing by a disk of `radius` pixels; by distances, so its cost does not grow with it."""
    margin = int(radius) + 2
    padded = np.pad(mask, margin)
    dilated = ndi.distance_transform_edt(~padded) <= radius
    closed = ndi.distance_transform_edt(dilated) > radius
    return closed[margin:-margin, margin:-margin] | mask
