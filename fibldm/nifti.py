"""NIfTI: a file's axial slices, upright and from head to feet by its affine."""

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from fibldm import limits

AXIAL = 0.94  # cosine: axes may be tilted by 20 degrees
MM = {"meter": 1000.0, "micron": 0.001}  # of a unit; others are taken as mm


@dataclass(frozen=True)
class Volume:
    """Axial slices, the first nearest to the head, each with the patient's front at the top and
    the right side at the left.

    values: float32 (D, H, W). spacing: mm between rows and between columns. heights: mm towards the
    head (D,). corner: of the first pixel, mm to the patient's left and to the back. Where the file
    gives no orientation, values are as stored, with three axes, and the others None.
    """

    values: np.ndarray
    spacing: tuple[float, float] | None = None
    heights: np.ndarray | None = None
    corner: np.ndarray | None = None


def depth(path: Path) -> int:
    """The number of a file's axes that have more than one voxel; reads its header alone."""
    return sum(n > 1 for n in _open(path).shape)


def read_volume(path: Path, most: int = limits.VOLUME) -> Volume:
    """Read a slice or a volume of at most `most` values, turned upright by its affine.

    Raises ValueError naming the file where it can't be decoded, its affine is broken, or its axes
    are oblique.
    """
    image = _open(path)
    if len(image.shape) < 2 or any(n != 1 for n in image.shape[3:]):
        raise ValueError(f"{path}: an array of {image.shape}, expected a slice or a volume")
    try:
        limits.require_values(path, image.shape, most)
        values = image.get_fdata(dtype=np.float32)
    except Exception as error:  # nibabel raises anything on damaged files
        raise ValueError(f"{path}: cannot be decoded as NIfTI: {error}") from error
    values = values.reshape((*values.shape[:3], *(1,) * (3 - values.ndim)))
    if image.header["sform_code"] <= 0 and image.header["qform_code"] <= 0:
        return Volume(values)
    affine = image.affine
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError(
            f"{path}: a broken affine {affine[:3].tolist()}, expected one that gives orientation "
            "and spacing"
        )
    affine = np.diag([*(MM.get(image.header.get_xyzt_units()[0], 1.0),) * 3, 1]) @ affine
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine))
    spacing, corner = np.linalg.norm(image.affine[:3, :3], axis=0), image.affine[:3, 3]
    if (image.affine[:3, :3] / spacing).diagonal().min() < AXIAL:
        raise ValueError(
            f"{path}: oblique, expected axes within 20 degrees of the patient's; found the affine "
            f"{affine[:3].tolist()}"
        )
    volume = np.asarray(image.dataobj).T[::-1, ::-1, ::-1]  # right, front, head -> feet, back, left
    last = corner + spacing * (np.array(image.shape) - 1)
    heights = corner[2] + spacing[2] * np.arange(len(volume))[::-1]
    return Volume(volume, (float(spacing[1]), float(spacing[0])), heights, -last[:2])


def _open(path: Path) -> nibabel.Nifti1Image:
    try:
        limits.require_nifti(path)
        return nibabel.load(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # nibabel raises anything on damaged files
        raise ValueError(f"{path}: cannot be decoded as NIfTI: {error}") from error
