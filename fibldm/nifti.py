"""NIfTI: a volume's axial slices, upright and from head to feet, and writing one slice."""

from pathlib import Path

import nibabel
import numpy as np

AXIAL = 0.94  # cosine: axes may be tilted by 20 degrees


def read_volume(
    path: Path,
) -> tuple[np.ndarray, tuple[float, float] | None, np.ndarray | None]:
    """Values float32 (D, H, W), mm between rows and between columns, mm towards the head (D,).

    The first slice is the one nearest to the head; each has the patient's front at the top and the
    right side at the left. Where the header gives no orientation (sform_code and qform_code are 0)
    the values are as stored, with three axes, and the others None. Raises ValueError naming the
    file where it can't be decoded, its affine is broken, or its axes are oblique.
    """
    try:
        image = nibabel.load(path)
        if len(image.shape) < 2 or any(n != 1 for n in image.shape[3:]):
            raise ValueError(f"an array of {image.shape}, expected a slice or a volume")
        values = image.get_fdata(dtype=np.float32)
        oriented = image.header["sform_code"] > 0 or image.header["qform_code"] > 0
    except FileNotFoundError:
        raise
    except Exception as error:  # nibabel raises anything on damaged files
        raise ValueError(f"{path}: cannot be decoded as NIfTI: {error}") from error
    values = values.reshape((*values.shape[:3], *(1,) * (3 - values.ndim)))
    if not oriented:
        return values, None, None
    affine = image.affine
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError(
            f"{path}: a broken affine {affine[:3].tolist()}, expected one that gives orientation "
            "and spacing"
        )
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine))
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    if (image.affine[:3, :3] / spacing).diagonal().min() < AXIAL:
        raise ValueError(
            f"{path}: oblique, expected axes within 20 degrees of the patient's; found the affine "
            f"{affine[:3].tolist()}"
        )
    volume = np.asarray(image.dataobj).T[::-1, ::-1, ::-1]  # right, front, head -> feet, back, left
    heights = image.affine[2, 3] + spacing[2] * np.arange(len(volume))[::-1]
    return volume, (float(spacing[1]), float(spacing[0])), heights
