"""Arrays of one slice or of a volume in PNG, TIFF, NPY, NPZ and MAT files, and their axes."""

import math
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import scipy.io
import tifffile

from fibldm import ct, limits, nifti

MAT_NUMBERS = (  # MATLAB's classes
    *("double", "single", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    "logical",
)
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
            name = _choose(path, variable)
            limits.require_values(path, _shapes(path)[name], limits.VOLUME)
            array = _read_variable(path, name)
        elif kind == "npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            limits.require_values(path, array.shape, limits.VOLUME)
            array = np.array(array)
        elif kind == "tiff":
            with tifffile.TiffFile(path) as file:
                limits.require_tiff(path, file, limits.VOLUME)
                _require_one(file)
                array = file.series[0].asarray()
                channels = file.series[0].axes.find("S")
            if channels >= 0:
                array = ct.grey_levels(np.moveaxis(array, channels, -1), path)
        else:
            _require_8_bit_channels(path)
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
    """2 for one slice, 3 for a volume, by the file's header; ValueError where it holds neither."""
    kind = kind_of(path)
    try:
        if kind == "nifti":
            shape = (2,) * min(3, nifti.depth(path))
        elif kind in ("npz", "mat"):
            shape = _shapes(path)[_choose(path, variable)]
        elif kind == "npy":
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        elif kind == "tiff":
            with tifffile.TiffFile(path) as file:
                limits.require_tiff(path, file, limits.VOLUME)
                _require_one(file)
                of = zip(file.series[0].shape, file.series[0].axes, strict=True)
                shape = [n for n, axis in of if axis != "S"]
        else:
            return 2
    except Exception as error:  # decoders raise anything on damaged files
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {reason}") from error
    count = sum(n > 1 for n in shape)
    if count not in (2, 3):
        raise ValueError(f"{path}: an array of {tuple(shape)}, expected numbers in 2D or 3D")
    return count


def _require_one(file: tifffile.TiffFile) -> None:
    if len(file.series) > 1:
        shapes = ", ".join(str(series.shape) for series in file.series)
        raise ValueError(f"{len(file.series)} pictures of different kinds ({shapes}), expected one")


def _require_8_bit_channels(path: Path) -> None:
    """Pillow reads a PNG of 16 bits and several channels as if it had 8."""
    with open(path, "rb") as file:
        depth, colour = file.read(26)[24:26]
    if depth == 16 and colour != 0:
        raise ValueError("16 bits in several channels, expected one channel of grey levels")


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
    if len(axes) != values.ndim:
        raise ValueError(
            f"{path}: an array of {values.shape}, expected as many axes as --array_axes {axes} has"
        )
    order = [axes.lower().index(name) for name in "zyx" if name in axes.lower()]
    turned = values.transpose(order)
    turned = turned[tuple(slice(None, None, -1 if axes[i].isupper() else 1) for i in order)]
    return turned.reshape((-1, *turned.shape[-2:]))


def _choose(path: Path, variable: str | None) -> str:
    """The variable named, or the only 2D or 3D one, of an NPZ or MAT file."""
    shapes = _shapes(path)
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"
    if variable is not None:
        if variable not in shapes:
            raise ValueError(f"--variable {variable}: not in the file, which has {found}")
        return variable
    images = []
    for name, shape in shapes.items():
        long = sorted(n for n in shape if n > 1)
        if len(long) in (2, 3) and long[-2] > SMALLEST:
            images.append(name)
    if len(images) != 1:
        raise ValueError(
            f"{len(images)} arrays in 2D or 3D, expected one (found {found}); name it by --variable"
        )
    return images[0]


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the numeric arrays of an NPZ or MAT file, by name, from their headers."""
    if kind_of(path) == "npz":
        with zipfile.ZipFile(path) as file:
            shapes = {}
            for part in file.infolist():
                if part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("packed by another method than NumPy's")  # without a limit
                with file.open(part) as member:
                    if np.lib.format.read_magic(member) != (1, 0):  # its header may be of any size
                        continue
                    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
                if dtype.kind in "buif":
                    shapes[part.filename.removesuffix(".npy")] = shape
            return shapes
    if h5py.is_hdf5(path):  # MATLAB 7.3; its axes are stored in reverse
        with h5py.File(path) as file:
            found = {
                name: item
                for name, item in file.items()
                if isinstance(item, h5py.Dataset)
                and item.dtype.kind in "buif"
                # No other file is read, to which links and the like may lead.
                and isinstance(file.get(name, getlink=True), h5py.HardLink)
                and not item.external
                and not item.is_virtual
            }
            return {name: item.shape[::-1] for name, item in found.items()}
    is_mat_5 = scipy.io.matlab.matfile_version(path)[0] == 1
    no_images = limits.require_mat(path) if is_mat_5 else set()
    found = {
        name: shape
        for name, shape, kind in scipy.io.whosmat(path)
        if kind in MAT_NUMBERS and name.encode("latin1") not in no_images
    }
    if not is_mat_5:  # MATLAB 4, never deflated: a value has a byte at least
        for shape in found.values():
            limits.require_values(path, shape, path.stat().st_size)
    return found


def _read_variable(path: Path, name: str) -> np.ndarray:
    if kind_of(path) == "npz":
        with np.load(path, allow_pickle=False) as file:
            return file[name]
    if h5py.is_hdf5(path):
        with h5py.File(path) as file:
            _require_pieces(file[name])
            return file[name][()].T
    return scipy.io.loadmat(path, variable_names=[name])[name]


def _require_pieces(item: h5py.Dataset) -> None:
    """ValueError where an HDF5 array's pieces are, or inflate to, far more than it needs."""
    if item.chunks is None:
        return
    made = item.id.get_create_plist()
    filters = [made.get_filter(i)[0] for i in range(made.get_nfilters())]
    plain = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
    if not plain.issuperset(filters) or len(set(filters)) < len(filters):
        raise ValueError(f"packed by the filters {filters}, expected what MATLAB uses: deflate")
    values = math.prod(item.chunks)
    if values > max(item.size, limits.SLICE):
        raise ValueError(
            f"an array of {item.shape} in pieces of {item.chunks}: damaged, or made to fill the "
            "memory"
        )
    if h5py.h5z.FILTER_DEFLATE in filters:
        for i in range(item.id.get_num_chunks()):
            place = item.id.get_chunk_info(i).chunk_offset
            left_out, piece = item.id.read_direct_chunk(place)  # bits of filters
            if not left_out >> filters.index(h5py.h5z.FILTER_DEFLATE) & 1:
                limits.require_inflatable(piece, values * item.dtype.itemsize + 4, zlib.MAX_WBITS)
