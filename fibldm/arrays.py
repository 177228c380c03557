"""Arrays by name: NPZ, and MATLAB's files: 4, 5 and, as HDF5, 7.3."""

import math
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import scipy.io

from fibldm import limits

MAT_NUMBERS = (  # MATLAB's classes
    *("double", "single", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    "logical",
)
SMALLEST = 16  # pixels: shorter arrays are affines, spacings and the like


def decode(path: Path, kind: str, variable: str | None, most: int) -> np.ndarray:
    """The variable named, or the only one in 2D or 3D, of at most `most` values."""
    shapes = shapes_of(path, kind)
    name = choose(path, shapes, variable)
    with limits.naming(path):
        limits.require_values(path, shapes[name], most)
        if kind == "npz":
            with np.load(path, allow_pickle=False) as file:
                return file[name]
        if h5py.is_hdf5(path):
            with h5py.File(path) as file:
                _require_pieces(file[name])
                return file[name][()].T
        return scipy.io.loadmat(path, variable_names=[name])[name]


def choose(path: Path, shapes: dict[str, tuple[int, ...]], variable: str | None) -> str:
    """The variable named, or the only one in 2D or 3D."""
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"
    if variable is not None:
        if variable not in shapes:
            raise ValueError(f"{path}: --variable {variable}: not in the file, which has {found}")
        return variable
    images = []
    for name, shape in shapes.items():
        long = sorted(n for n in shape if n > 1)
        if len(long) in (2, 3) and long[-2] > SMALLEST:
            images.append(name)
    if len(images) != 1:
        raise ValueError(
            f"{path}: {len(images)} arrays in 2D or 3D, expected one (found {found}); name it by "
            "--variable"
        )
    return images[0]


def shapes_of(path: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's numeric arrays, by name, from their headers."""
    with limits.naming(path):
        if kind == "npz":
            return _shapes_of_npz(path)
        if h5py.is_hdf5(path):
            return _shapes_of_hdf5(path)
        is_mat_5 = scipy.io.matlab.matfile_version(path)[0] == 1
        no_images = limits.require_mat(path) if is_mat_5 else set()
        found = {
            name: shape
            for name, shape, of in scipy.io.whosmat(path)
            if of in MAT_NUMBERS and name.encode("latin1") not in no_images
        }
        if not is_mat_5:  # MATLAB 4, never deflated: a value has a byte at least
            for shape in found.values():
                limits.require_values(path, shape, path.stat().st_size)
        return found


def _shapes_of_npz(path: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    with zipfile.ZipFile(path) as file:
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


def _shapes_of_hdf5(path: Path) -> dict[str, tuple[int, ...]]:
    with h5py.File(path) as file:
        return {
            name: item.shape[::-1]  # its axes are stored in reverse
            for name, item in file.items()
            if isinstance(item, h5py.Dataset)
            and item.dtype.kind in "buif"
            # No other file is read, to which links and the like may lead.
            and isinstance(file.get(name, getlink=True), h5py.HardLink)
            and not item.external
            and not item.is_virtual
        }


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
