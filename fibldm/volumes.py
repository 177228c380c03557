"""Slices and volumes of DICOM, NIfTI, PNG, TIFF, NPY, NPZ and MAT files: decoded, and upright."""

import contextlib
import gzip
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import imagecodecs
import nibabel
import numpy as np
import scipy.io
import tifffile
from PIL import Image

from fibldm import decoders, dicom, limits

AXIAL = 0.94  # cosine: axes may be tilted by 20 degrees
MM = {"meter": 1000.0, "micron": 0.001}  # of a unit; others are taken as mm
MAGIC = {  # how files of a kind begin
    **{"png": b"\x89PNG", "jpeg": b"\xff\xd8", "tiff": (b"II*\0", b"MM\0*", b"II+\0")},
    **{"npy": b"\x93NUMPY", "mat": b"MATLAB"},
}
SUFFIXES = {
    **{"dicom": (".dcm", ".dicom", ".ima"), "nifti": (".nii", ".nii.gz"), "png": ".png"},
    **{"tiff": (".tif", ".tiff"), "npy": ".npy", "npz": ".npz", "mat": ".mat"},
}
MAT_NUMBERS = (  # MATLAB's classes
    *("double", "single", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    "logical",
)
SMALLEST = 16  # pixels: shorter arrays are affines, spacings and the like
LABELS = 16  # distinct values of a label map, at most; an anti-aliased mask has more
JPEG_IN_TIFF = (6, 7, 33007, 34892)  # compressions
PICTURES = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP")  # none that runs programs, as EPS


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
            start = file.read(132)
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
            values = mark_levels(values, path) if marks else grey_levels(values, path)
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
        volume = Volume(_decode_variable(path, kind, variable, most), kind)
    else:
        with _naming(path):
            if kind == "dicom":
                dataset = dicom.read_file(path)
                _require_one_frame(int(dataset.get("NumberOfFrames") or 1))
                volume = Volume(dicom.read_frame(dataset), kind)
            elif kind == "npy":
                values = np.load(path, mmap_mode="r", allow_pickle=False)  # no larger than the file
                limits.require_values(path, values.shape, most)
                volume = Volume(np.array(values), kind)
            elif kind == "tiff":
                volume = _decode_tiff(path, most, marks)
            else:
                volume = _decode_picture(path, kind, marks)
    if volume.values.size == 0 or volume.values.dtype.kind not in "buif":
        found = f"{volume.values.dtype} {volume.values.shape}"
        raise ValueError(f"{path}: an array of {found}, expected numbers in 2D or 3D")
    return volume


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give errors of decoders, which raise anything on damaged files, the file's name."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: cannot be decoded as an image: {error}") from error


def _require_one_frame(count: int) -> None:
    if count != 1:
        raise ValueError(
            f"{count} frames, expected one slice; scripts/prepare_data.py makes slices of DICOM "
            "files with several"
        )


def _decode_picture(path: Path, kind: str | None, marks: bool) -> Volume:
    with limits.Bounded(path) as file, Image.open(file, formats=PICTURES) as image:
        limits.require_values(path, (*image.size, len(image.getbands())), limits.SLICE)
        _require_one_frame(getattr(image, "n_frames", 1))
        if kind == "png" and _is_deep(path):  # Pillow reads it as if it had 8 bits
            values = imagecodecs.png_decode(path.read_bytes())
        elif image.mode in ("P", "PA"):
            values = np.asarray(image.convert("RGB"))
            if marks:
                indices = np.asarray(image)
                values = _labels(indices if indices.ndim == 2 else indices[..., 0], values)
        else:
            values = np.asarray(image.convert("L") if image.mode == "1" else image)
    if values.ndim == 3 and values.shape[2] == 2 and not marks:  # grey and transparency
        values = values[..., 0]
    return Volume(values, kind, has_colours=values.ndim == 3)


def _is_deep(path: Path) -> bool:
    """Whether a PNG file has 16 bits in each of several channels."""
    with open(path, "rb") as file:
        start = file.read(26)
    return start[24:25] == b"\x10" and start[25:26] != b"\0"


def _labels(indices: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """What a mask (H, W) of a palette marks, shown in colours (H, W, 3): labels, or grey levels.

    ValueError where a marked index is black or 0 is not: it is unknown which of both is meant.
    """
    if ((indices > 0) != colours.any(axis=2)).any():
        raise ValueError(
            "a palette that shows 0 as a colour, or labels as black: do indices or colours mark "
            "the lungs? save the mask as grey levels, 0 outside"
        )
    is_grey = (colours == colours[..., :1]).all() and len(np.unique(indices)) > LABELS
    return colours[..., 0] if is_grey else indices


def _open_tiff(path: Path) -> tifffile.TiffFile:
    """A TIFF file by its own pages: no other file is read, which OME-XML and the like may name."""
    return tifffile.TiffFile(path, is_ome=False, is_mmstack=False, is_ndtiff=False)


def _decode_tiff(path: Path, most: int, marks: bool) -> Volume:
    with _open_tiff(path) as file:
        parts = _pages(path, file, most)
        for page in file.pages:
            if page.compression in JPEG_IN_TIFF:
                offsets = page.dataoffsets, page.databytecounts
                for data, _ in file.filehandle.read_segments(*offsets):
                    decoders.require_end(data or b"")
        values = np.stack([part.asarray() for part in parts])
        values = values if len(parts) > 1 else values[0]
        axes = "I" * (len(parts) > 1) + parts[0].axes
        if parts[0].keyframe.photometric == tifffile.PHOTOMETRIC.PALETTE:
            colours = parts[0].keyframe.colormap[:, values] >> 8
            shown = np.moveaxis(colours, 0, -1).astype(np.uint8)
            values = _labels(values, shown) if marks else shown
            return Volume(values, "tiff", has_colours=not marks)
    if "S" not in axes:
        return Volume(values, "tiff")
    return Volume(np.moveaxis(values, axes.index("S"), -1), "tiff", has_colours=True)


def _pages(path: Path, file: tifffile.TiffFile, most: int) -> list[tifffile.TiffPageSeries]:
    """The pictures of a TIFF file, all of one size and kind."""
    limits.require_tiff(path, file, most)
    kinds = {(part.shape, part.axes, part.dtype) for part in file.series}
    if len(kinds) > 1:
        found = ", ".join(f"{shape} of {dtype}" for shape, _, dtype in sorted(kinds, key=str))
        raise ValueError(f"{len(file.series)} pictures of several sizes ({found}), expected one")
    limits.require_values(path, (len(file.series), *file.series[0].shape), most)
    return file.series


def mark_levels(values: np.ndarray, path: Path) -> np.ndarray:
    """What a mask (..., 2 to 4) in colours, the last of which may be transparency, marks, as (...).

    Its colours, or its opacity where it is drawn in one colour upon nothing. ValueError where both
    mark something, but not the same.
    """
    has_alpha = values.shape[-1] in (2, 4)
    colours = (values[..., :-1] if has_alpha else values).max(axis=-1)
    if not has_alpha or (values[..., -1] == values.flat[-1]).all():
        return colours
    opacity = values[..., -1]
    drawn = colours[opacity > 0]
    if (drawn == drawn[0]).all():
        return opacity
    if colours[opacity == 0].any():
        raise ValueError(
            f"{path}: colours and transparency mark different pixels; save the mask as grey "
            "levels, 0 outside"
        )
    return colours


def grey_levels(values: np.ndarray, path: Path) -> np.ndarray:
    """Colours (..., 3 or 4) that are greys as (...); ValueError where they are not."""
    rgb = values[..., :3]
    if not (rgb == rgb[..., :1]).all():
        raise ValueError(f"{path}: a colour image, expected grey levels")
    return rgb[..., 0]


def dimensions(path: Path, variable: str | None = None) -> int:
    """2 for one slice, 3 for a volume, by the file's header; ValueError where it holds neither."""
    kind = kind_of(path)
    if kind in ("npz", "mat"):
        shapes = _shapes(path, kind)
        shape = shapes[_choose(path, shapes, variable)]
    else:
        shape = (2, 2)
        with _naming(path):
            if kind == "nifti":
                shape = _open_nifti(path).shape[:3]
            elif kind == "npy":
                shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            elif kind == "tiff":
                with _open_tiff(path) as file:
                    parts = _pages(path, file, limits.VOLUME)
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
    if packed == path.name.lower().endswith(".gz"):
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
    return sound[0] if sound else None


def _decode_nifti(path: Path, most: int) -> Volume:
    """Turned upright by the affine; as stored, with three axes, where the header has none.

    Raises ValueError where the affine is broken or its axes are oblique.
    """
    with _naming(path):
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


# NPZ, and MATLAB's files: 4, 5 and, as HDF5, 7.3. Arrays by name.


def _decode_variable(path: Path, kind: str, variable: str | None, most: int) -> np.ndarray:
    shapes = _shapes(path, kind)
    name = _choose(path, shapes, variable)
    with _naming(path):
        limits.require_values(path, shapes[name], most)
        if kind == "npz":
            with np.load(path, allow_pickle=False) as file:
                return file[name]
        if h5py.is_hdf5(path):
            with h5py.File(path) as file:
                _require_pieces(file[name])
                return file[name][()].T
        return scipy.io.loadmat(path, variable_names=[name])[name]


def _choose(path: Path, shapes: dict[str, tuple[int, ...]], variable: str | None) -> str:
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


def _shapes(path: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's numeric arrays, by name, from their headers."""
    with _naming(path):
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
