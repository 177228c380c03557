"""Arrays of one slice or of a volume in PNG, TIFF, NPY, NPZ and MAT files, and their axes."""

from pathlib import Path

import h5py
import numpy as np
import scipy.io
import tifffile

from fibldm import ct

SMALLEST = 16  # pixels: shorter arrays are affines, spacings and the like


def kind_of(path: Path) -> str | None:
    """dicom, nifti, png, tiff, npy, npz or mat, told by content; None for other files.

    Raises ValueError for a file that can't be read, and for picture formats that lose HU.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(132)
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from error
    name = path.name.lower()
    if start[128:132] == b"DICM" or name.endswith((".dcm", ".dicom", ".ima")):
        return "dicom"
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    for kind, magic in (
        ("png", b"\x89PNG"),
        ("tiff", b"II*\0"),
        ("tiff", b"MM\0*"),
        ("tiff", b"II+\0"),
        ("npy", b"\x93NUMPY"),
        ("mat", b"MATLAB"),
    ):
        if start.startswith(magic):
            return kind
    if start.startswith(b"\xff\xd8"):
        raise ValueError(f"{path}: a JPEG picture, whose HU are lost")
    for suffix, kind in ((".png", "png"), (".tif", "tiff"), (".tiff", "tiff"), (".npy", "npy"),
                         (".npz", "npz"), (".mat", "mat")):  # fmt: skip
        if name.endswith(suffix):
            return kind
    # A DICOM file may lack its preamble: then it starts with an element of group 2 or 8.
    return "dicom" if start[:2] in (b"\x02\0", b"\x08\0") and start[3:4] == b"\0" else None


def read(path: Path, variable: str | None = None, axes: str | None = None) -> np.ndarray:
    """Values as stored (D, H, W), one slice as D = 1, from head to feet and upright.

    variable: its name in an NPZ or MAT file; None for the only 2D or 3D one. axes: see `orient`.
    Raises ValueError naming the file where it can't be decoded or holds something else.
    """
    return orient(load(path, variable), path, axes)


def load(path: Path, variable: str | None = None) -> np.ndarray:
    """Values as stored, in 2D or 3D: see `read`."""
    kind = kind_of(path)
    try:
        if kind in ("npz", "mat"):
            return _read_variable(path, variable)
        if kind == "npy":
            array = np.load(path, allow_pickle=False)
        elif kind == "tiff":
            array = tifffile.imread(path)
            if array.ndim == 3 and array.shape[2] in (3, 4):
                array = ct.grey_levels(array, path)
        else:
            array = ct.grey_levels(ct.decode(path)[0], path)
    except Exception as error:  # decoders raise anything on damaged files
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {reason}") from error
    array = np.squeeze(array)
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3):
        raise ValueError(
            f"{path}: an array of {array.dtype} {array.shape}, expected numbers in 2D or 3D"
        )
    return array


def dimensions(path: Path, variable: str | None) -> int:
    """2 for one slice, 3 for a volume; ValueError where the file holds neither."""
    kind = kind_of(path)
    if kind in ("nifti", "png"):
        return 3 if kind == "nifti" else 2
    return load(path, variable).ndim


def orient(values: np.ndarray, path: Path, axes: str | None) -> np.ndarray:
    """An array in 2D or 3D as (D, H, W), from head to feet, front to back, right to left.

    axes: z counts slices from head to feet, y rows from front to back, x columns from the patient's
    right to left; a capital letter the other way. None: zyx, or yxz where the first two axes are
    as long and the third is not; ValueError where the lengths do not tell.
    """
    if values.ndim == 2:
        axes = "yx" if axes is None else "".join(a for a in axes if a not in "zZ")
    elif axes is None:
        a, b, c = values.shape
        if kind_of(path) == "tiff" or b == c != a:
            axes = "zyx"
        elif a == b != c:
            axes = "yxz"
        else:
            raise ValueError(
                f"{path}: an array of {values.shape}: which axis counts the slices? give "
                "--array_axes, as zyx for slices first, yxz for slices last"
            )
    order = [axes.lower().index(name) for name in "zyx" if name in axes.lower()]
    turned = values.transpose(order)
    turned = turned[tuple(slice(None, None, -1 if axes[i].isupper() else 1) for i in order)]
    return turned.reshape((-1, *turned.shape[-2:]))


def _read_variable(path: Path, variable: str | None) -> np.ndarray:
    """The variable named, or the only 2D or 3D one, of an NPZ or MAT file."""
    if kind_of(path) == "npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    elif h5py.is_hdf5(path):  # MATLAB 7.3; its axes are stored in reverse
        with h5py.File(path) as file:
            arrays = {n: item[()].T for n, item in file.items() if isinstance(item, h5py.Dataset)}
    else:
        arrays = scipy.io.loadmat(path)
    numbers = {
        name: np.squeeze(array)
        for name, array in arrays.items()
        if isinstance(array, np.ndarray) and array.dtype.kind in "buif"
    }
    found = ", ".join(f"{name} {array.shape}" for name, array in numbers.items()) or "none"
    if variable is not None:
        if variable not in numbers:
            raise ValueError(f"--variable {variable}: not in the file, which has {found}")
        numbers = {variable: numbers[variable]}
    images = [a for a in numbers.values() if a.ndim in (2, 3) and sorted(a.shape)[-2] > SMALLEST]
    if len(images) != 1:
        raise ValueError(
            f"{len(images)} arrays in 2D or 3D, expected one (found {found}); name it by --variable"
        )
    return images[0]
