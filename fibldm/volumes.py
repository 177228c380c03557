"""Slices and volumes of DICOM, NIfTI, PNG, TIFF, NPY, NPZ and MAT files: decoded, and upright."""

import gzip
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np

from fibldm import arrays, dicom, limits, pictures

AXIAL = 0.94  # cosine: axes may be tilted by 20 degrees
SAME_SIZE = 0.02  # of a voxel: sform and qform may differ by rounding
MM = {"meter": 1000.0, "micron": 0.001}  # of a unit; others are taken as mm
MAGIC = {  # how files of a kind begin
    **{"png": b"\x89PNG", "jpeg": b"\xff\xd8", "tiff": (b"II*\0", b"MM\0*", b"II+\0")},
    **{"npy": b"\x93NUMPY", "mat": b"MATLAB"},
}
SUFFIXES = {
    **{"dicom": (".dcm", ".dicom", ".ima"), "nifti": (".nii", ".nii.gz"), "png": ".png"},
    **{"tiff": (".tif", ".tiff"), "npy": ".npy", "npz": ".npz", "mat": ".mat"},
}


@dataclass(frozen=True)
class Volume:
    """What a file of a `kind` holds: a slice (H, W) or a volume; its last axis may be of colours.

    values: numbers as stored, of DICOM and NIfTI in HU. NIfTI's are float32 axial slices (D, H, W),
    the first nearest to the head, each with the patient's front at the top and the right side at
    the left. Then `spacing` is mm between rows and between columns, `heights` mm towards the head
    (D,), `corner` the first pixel, mm to the patient's left and to the back. A NIfTI file without
    orientation is as stored, (X, Y, Z), and these are None, as they are of other kinds.
    """

    values: np.ndarray
    kind: str | None
    has_colours: bool = False
    spacing: tuple[float, float] | None = None
    heights: np.ndarray | None = None
    corner: np.ndarray | None = None

    @property
    def is_hu(self) -> bool:
        return self.kind in ("dicom", "nifti")


def kind_of(path: Path) -> str | None:
    """dicom, nifti, png, tiff, npy, npz, mat or jpeg, told by content; None for other files.

    Raises ValueError naming a file that can't be read.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from error
    name = path.name.lower()
    # A DICOM file may lack its preamble: then it starts with an element of group 2 or 8.
    if start[128:132] == b"DICM" or (start[:2] in (b"\x02\0", b"\x08\0") and start[3:4] == b"\0"):
        return "dicom"
    for kind, magic in MAGIC.items():
        if start.startswith(magic):
            return kind
    if limits.is_nifti(start):
        return "nifti"
    return next((kind for kind, suffix in SUFFIXES.items() if name.endswith(suffix)), None)


def read_volume(
    path: Path, variable: str | None = None, axes: str | None = None, marks: bool = False
) -> Volume:
    """A file's axial slices (D, H, W), D = 1 for one, from head to feet and upright.

    variable: its name in an NPZ or MAT file; None for the only 2D or 3D one. axes: of a file that
    gives no orientation; see `_orient`. marks: whether it is a mask. Raises ValueError naming the
    file where it can't be decoded or holds something else.
    """
    volume = decode(path, variable, marks=marks)
    if volume.heights is not None:
        return volume
    values = volume.values
    if volume.kind != "nifti":
        if volume.has_colours:
            values = (
                pictures.mark_levels(values, path) if marks else pictures.grey_levels(values, path)
            )
        values = np.squeeze(values)
    elif axes is None:
        raise ValueError(
            f"{path}: its header has no orientation (sform_code and qform_code are 0); give "
            "--array_axes"
        )
    if axes is None:
        axes = _usual_axes(path, values.shape, volume.kind)
    return replace(volume, values=_orient(path, values, axes), has_colours=False)


def decode(
    path: Path, variable: str | None = None, most: int = limits.VOLUME, marks: bool = False
) -> Volume:
    """Decode an image file, told by its content, of at most `most` values: the only decoder.

    variable: see `read_volume`. marks: of a mask, the labels that a palette shows as colours, and
    transparency as a last channel; else a palette's colours, and no transparency of greys. What the
    file asks of the memory is looked at first. Raises ValueError naming the file where it is
    missing, damaged, holds no numbers, or would be read as other numbers than it holds.
    """
    kind = kind_of(path)
    if kind == "nifti":
        volume = _decode_nifti(path, most)
    elif kind in ("npz", "mat"):
        volume = Volume(arrays.decode(path, kind, variable, most), kind)
    else:
        with limits.naming(path):
            if kind == "dicom":
                with warnings.catch_warnings():  # at each reading of each file
                    warnings.simplefilter("ignore")
                    dataset = dicom.read_file(path)
                    limits.require_one_frame(int(dataset.get("NumberOfFrames") or 1))
                    dicom.require_frames(dataset)
                    volume = Volume(dicom.read_frame(dataset), kind)
            elif kind == "npy":
                values = np.load(path, mmap_mode="r", allow_pickle=False)  # no larger than the file
                limits.require_values(path, values.shape, most)
                volume = Volume(np.array(values), kind)
            elif kind == "tiff":
                values, has_colours = pictures.decode_tiff(path, most, marks)
                volume = Volume(values, kind, has_colours)
            else:
                values = pictures.decode(path, kind == "png", marks)
                volume = Volume(values, kind, has_colours=values.ndim == 3)
    if volume.values.size == 0 or volume.values.dtype.kind not in "buif":
        found = f"{volume.values.dtype} {volume.values.shape}"
        raise ValueError(f"{path}: an array of {found}, expected numbers in 2D or 3D")
    return volume


def dimensions(path: Path, variable: str | None = None) -> int:
    """2 for one slice, 3 for a volume, by the file's header; ValueError where it holds neither."""
    kind = kind_of(path)
    if kind in ("npz", "mat"):
        shapes = arrays.shapes_of(path, kind)
        shape = shapes[arrays.choose(path, shapes, variable)]
    else:
        shape = (2, 2)
        with limits.naming(path):
            if kind == "nifti":
                shape = _open_nifti(path).shape[:3]
            elif kind == "npy":
                shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            elif kind == "tiff":
                with pictures.open_tiff(path) as file:
                    parts = pictures.pages(path, file, limits.VOLUME)
                    of = zip(parts[0].shape, parts[0].axes, strict=True)
                    shape = (len(parts), *(n for n, axis in of if axis != "S"))
    count = sum(n > 1 for n in shape)
    if count not in (2, 3):
        raise ValueError(f"{path}: an array of {shape}, expected numbers in 2D or 3D")
    return count


def _usual_axes(path: Path, shape: tuple[int, ...], kind: str | None) -> str:
    """Which axis counts slices (z), rows (y), columns (x); ValueError where lengths do not tell."""
    if len(shape) == 2:
        return "yx"
    if len(shape) == 3:
        a, b, c = shape
        if kind == "tiff" or b == c != a:
            return "zyx"
        if a == b != c:
            return "yxz"
        raise ValueError(
            f"{path}: an array of {shape}: which axis counts the slices? give --array_axes, as zyx "
            "for slices first, yxz for slices last"
        )
    raise ValueError(f"{path}: an array of {shape}, expected numbers in 2D or 3D")


def _orient(path: Path, values: np.ndarray, axes: str) -> np.ndarray:
    """An array in 2D or 3D as (D, H, W), from head to feet, front to back, right to left.

    axes: z counts slices from head to feet, y rows from front to back, x columns from the patient's
    right to left; a capital letter the other way.
    """
    if values.ndim == 2:
        axes = "".join(axis for axis in axes if axis not in "zZ")
    if len(axes) != values.ndim:
        raise ValueError(
            f"{path}: an array of {values.shape}, expected as many axes as --array_axes {axes} has"
        )
    order = [axes.lower().index(name) for name in "zyx" if name in axes.lower()]
    turned = values.transpose(order)
    turned = turned[tuple(slice(None, None, -1 if axes[i].isupper() else 1) for i in order)]
    return turned.reshape((-1, *turned.shape[-2:]))


# NIfTI.


def _open_nifti(path: Path) -> nibabel.Nifti1Image:
    """By content: some files are gzipped under the name .nii, or plain under .nii.gz."""
    limits.require_nifti(path)
    packed = limits.is_gzip(path)
    if packed:
        limits.require_gzip(path)
    if path.name.lower().endswith(".nii.gz" if packed else ".nii"):
        return nibabel.load(path)
    return nibabel.Nifti1Image.from_stream((gzip.open if packed else open)(path, "rb"))


def _affine(path: Path, header: nibabel.Nifti1Header) -> np.ndarray | None:
    """The sform, or the qform where that is broken; None where the header has neither.

    ValueError where both are broken, or where they contradict each other: which side is left is
    unknown then.
    """
    found = []
    for name in ("sform", "qform"):
        if header[f"{name}_code"] > 0:
            found.append(getattr(header, f"get_{name}")())
    sound = [a for a in found if np.isfinite(a).all() and np.linalg.matrix_rank(a[:3, :3]) == 3]
    if found and not sound:
        raise ValueError(
            f"{path}: a broken affine {found[0][:3].tolist()}, expected one that gives orientation "
            "and spacing"
        )
    axes = ["".join(nibabel.aff2axcodes(affine)) for affine in sound]
    if len(set(axes)) > 1:
        raise ValueError(
            f"{path}: sform and qform contradict each other, so left and right are unknown: axes "
            f"run to {axes[0]} and to {axes[1]}; set both to the right one (nibabel's set_sform)"
        )
    sizes, cosines = [], []
    for affine in sound:
        sizes.append(np.linalg.norm(affine[:3, :3], axis=0))
        cosines.append(affine[:3, :3] / sizes[-1])
    if len(sound) == 2 and not np.allclose(*sizes, rtol=SAME_SIZE):
        raise ValueError(
            f"{path}: sform and qform contradict each other: voxels of {np.round(sizes[0], 3)} and "
            f"of {np.round(sizes[1], 3)} mm; set both to the right one (nibabel's set_sform)"
        )
    if len(sound) == 2 and (cosines[0] * cosines[1]).sum(axis=0).min() < AXIAL:
        raise ValueError(
            f"{path}: sform and qform contradict each other: their axes are more than 20 degrees "
            "apart; set both to the right one (nibabel's set_sform)"
        )
    return sound[0] if sound else None


def _decode_nifti(path: Path, most: int) -> Volume:
    """Turned upright by the affine; as stored, with three axes, where the header has none.

    Raises ValueError where the affine is broken or its axes are oblique.
    """
    with limits.naming(path):
        image = _open_nifti(path)
        if len(image.shape) < 2 or any(n != 1 for n in image.shape[3:]):
            raise ValueError(f"an array of {image.shape}, expected a slice or a volume")
        limits.require_values(path, image.shape, most)
        values = image.get_fdata(dtype=np.float32)
    values = values.reshape((*values.shape[:3], *(1,) * (3 - values.ndim)))
    affine = _affine(path, image.header)
    if affine is None:
        return Volume(values, "nifti")
    affine = np.diag([*(MM.get(image.header.get_xyzt_units()[0], 1.0),) * 3, 1]) @ affine
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine))
    spacing, corner = np.linalg.norm(image.affine[:3, :3], axis=0), image.affine[:3, 3]
    if (image.affine[:3, :3] / spacing).diagonal().min() < AXIAL:
        raise ValueError(
            f"{path}: oblique, expected axes within 20 degrees of the patient's; found the affine "
            f"{affine[:3].tolist()}"
        )
    values = np.asarray(image.dataobj).T[::-1, ::-1, ::-1]  # right, front, head -> feet, back, left
    last = corner + spacing * (np.array(image.shape) - 1)
    heights = corner[2] + spacing[2] * np.arange(len(values))[::-1]
    across = float(spacing[1]), float(spacing[0])
    return Volume(values, "nifti", spacing=across, heights=heights, corner=-last[:2])
