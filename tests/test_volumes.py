"""Every format is decoded in one place: told by content, upright, and nothing read wrongly."""

import gzip
import itertools
import struct
import uuid

import h5py
import imagecodecs
import nibabel
import numpy as np
import pytest
import scipy.io
import tifffile
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image
from scans import enhanced, write_dicom

from fibldm import ct, volumes

GREY = (np.arange(20 * 24).reshape(20, 24) // 2).astype(np.uint8)
STORED = GREY.astype(np.uint16) * 7


def save_png(path, array=STORED):
    Image.fromarray(array).save(path, "PNG")


def save_npy(path):
    with open(path, "wb") as file:
        np.save(file, STORED)


def save_npz(path):
    with open(path, "wb") as file:
        np.savez(file, slice=STORED, spacing=[1.0, 2.0])


def save_mat(path):
    with open(path, "wb") as file:
        scipy.io.savemat(file, {"slice": STORED})


def save_tiff(path):
    tifffile.imwrite(path, STORED)


@pytest.mark.parametrize("save", [save_png, save_npy, save_npz, save_mat, save_tiff])
def test_all_that_holds_one_slice_is_the_same_slice(tmp_path, save):
    path = tmp_path / f"a.{save.__name__.removeprefix('save_')}"
    save(path)
    np.testing.assert_array_equal(ct.read_hu(path, (1.0, -1024.0)), STORED - 1024.0)
    np.testing.assert_array_equal(volumes.read_volume(path).values, STORED[None])
    assert volumes.dimensions(path) == 2


@pytest.mark.parametrize("save", [save_png, save_npy, save_mat, save_tiff])
@pytest.mark.parametrize("name", ["slice", "slice.png", "slice.tif"])
def test_the_content_tells_the_format_and_not_the_name(tmp_path, save, name):
    save(tmp_path / name)
    np.testing.assert_array_equal(volumes.decode(tmp_path / name).values, STORED)


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".gif", ".ppm", ".webp", ".png", ".tif"])
def test_pictures_are_images_and_contours(tmp_path, suffix):
    """8 bits are the window; JPEG and the like lose HU, and are what the user has."""
    lossless = {} if suffix != ".webp" else {"lossless": True}
    mask = np.zeros((40, 48), np.uint8)
    mask[8:32, 8:24] = 255
    Image.fromarray(mask).save(tmp_path / f"a{suffix}", **lossless)
    contour = ct.read_contour(tmp_path / f"a{suffix}")
    assert (contour[0] != (mask > 0)).mean() < 0.02
    hu = ct.read_hu(tmp_path / f"a{suffix}")
    assert np.abs(hu - np.where(mask > 0, 400, -1000)).mean() < 15


def test_palettes_are_colours(tmp_path):
    colours = Image.fromarray(np.stack([GREY, GREY, 255 - GREY], 2)).quantize(16)
    colours.save(tmp_path / "colour.png")
    Image.fromarray(GREY).convert("P").save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"colour\.png: a colour image, expected grey levels"):
        ct.read_hu(tmp_path / "colour.png")
    np.testing.assert_array_equal(
        ct.read_hu(tmp_path / "grey.png", (1.0, 0.0)), GREY.astype(np.float32)
    )


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bits_in_several_channels_are_not_read_as_8(tmp_path, channels):
    picture = np.stack([STORED] * channels, 2)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(picture))
    np.testing.assert_array_equal(ct.read_hu(tmp_path / "a.png", (1.0, 0.0)), STORED)
    np.testing.assert_array_equal(volumes.read_volume(tmp_path / "a.png").values, STORED[None])
    if channels > 2:
        picture[3, 4, 1] += 1
        (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(picture))
        with pytest.raises(ValueError, match=r"a\.png: a colour image, expected grey levels"):
            ct.read_hu(tmp_path / "a.png", (1.0, 0.0))


def test_pictures_of_several_sizes_in_one_tiff_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(STORED)
        file.write(GREY[:7])
    for read in ct.read_hu, volumes.read_volume, volumes.dimensions:
        with pytest.raises(ValueError, match=r"a\.tif: .*2 pictures of several sizes"):
            read(tmp_path / "a.tif")


def test_pages_of_one_size_are_a_volume_however_they_are_packed(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for i, packed in enumerate([None, "lzw", "deflate"]):
            file.write(STORED + i, compression=packed)
    assert volumes.dimensions(tmp_path / "a.tif") == 3
    values = volumes.read_volume(tmp_path / "a.tif").values
    np.testing.assert_array_equal(values, np.stack([STORED, STORED + 1, STORED + 2]))


def test_jpeg_that_ends_early_within_tiff_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, GREY, compression="jpeg", photometric="minisblack")
    assert np.abs(volumes.decode(path).values.astype(int) - GREY).max() < 30
    with tifffile.TiffFile(path) as file:
        end = file.pages[0].dataoffsets[-1] + file.pages[0].databytecounts[-1] - 20
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ValueError, match=r"a\.tif: .*end early"):
        volumes.decode(path)


def palette_file(path, indices: np.ndarray, colours: list[int]) -> None:
    picture = Image.fromarray(indices.astype(np.uint8), "P")
    picture.putpalette(colours)
    if path.suffix == ".png":
        picture.save(path)
        return
    table = np.zeros((3, 256), np.uint16)
    table[:, : len(colours) // 3] = np.array(colours).reshape(-1, 3).T * 257
    tifffile.imwrite(path, indices.astype(np.uint8), photometric="palette", colormap=table)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_palettes_indices_and_colours_are_told_apart(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    indices = np.zeros((40, 48), int)
    indices[8:32, 8:24], indices[8:32, 30:40] = 1, 2
    palette_file(path, indices, [0, 0, 0, 90, 0, 0, 0, 0, 255])
    np.testing.assert_array_equal(ct.read_contour(path)[0], indices > 0)
    read = volumes.read_volume(path, marks=True)
    np.testing.assert_array_equal(ct.as_mask(read.values[0]), indices > 0)
    np.testing.assert_array_equal(
        ct.read_contour(path, channels=2), np.stack([indices == 1, indices == 2])
    )
    with pytest.raises(ValueError, match="a colour image, expected grey levels"):
        ct.read_hu(path)
    for colours in (
        [255, 255, 255, 90, 0, 0, 0, 0, 255],  # a white background
        [255, 255, 255, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 255],  # a label shown as the background
    ):
        palette_file(path, indices, colours)
        with pytest.raises(ValueError, match="do indices or colours mark the lungs"):
            ct.read_contour(path)


def test_a_grey_palette_is_an_anti_aliased_mask(tmp_path):
    ramp = np.clip(1800 - 120 * np.hypot(*np.mgrid[-20:20, -24:24]), 0, 255).astype(int)
    palette_file(tmp_path / "a.png", ramp, list(np.repeat(np.arange(256), 3)))
    np.testing.assert_array_equal(ct.read_contour(tmp_path / "a.png")[0], ramp > 127.5)


@pytest.mark.parametrize("grey", [True, False])
def test_masks_with_transparency(tmp_path, grey):
    mask = np.zeros((40, 48), np.uint8)
    mask[8:32, 8:24] = 255
    ones = np.full_like(mask, 255)

    def saved(colour, opacity):
        channels = [colour, opacity] if grey else [colour, 0 * colour, colour, opacity]
        path = tmp_path / "a.png"
        Image.fromarray(np.stack(channels, 2)).save(path)
        return path

    for path in (
        saved(mask, ones),  # opaque
        saved(0 * mask, mask),  # drawn in black upon nothing
        saved(ones, mask),  # drawn in white upon nothing
        saved(mask, mask),
        saved(np.where(mask, 7, 0).astype(np.uint8), np.maximum(mask, 90)),
    ):
        np.testing.assert_array_equal(ct.read_contour(path)[0], mask > 0)
        read = volumes.read_volume(path, marks=True)
        np.testing.assert_array_equal(ct.as_mask(read.values[0]), mask > 0)
    path = saved(mask, np.roll(mask, 4, axis=1))
    with pytest.raises(ValueError, match=r"a\.png: .*colours and transparency mark different"):
        ct.read_contour(path)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_with_colours_that_are_greys(tmp_path, planar):
    stacked = np.stack([GREY] * 3, 2 if planar == "contig" else 0)
    tifffile.imwrite(tmp_path / "a.tif", stacked, photometric="rgb", planarconfig=planar)
    assert volumes.dimensions(tmp_path / "a.tif") == 2
    np.testing.assert_array_equal(volumes.read_volume(tmp_path / "a.tif").values, GREY[None])
    np.testing.assert_array_equal(ct.read_hu(tmp_path / "a.tif", (1.0, 0.0)), GREY)


@pytest.mark.parametrize("shape", [(0, 20, 24), (20, 0)])
def test_an_array_without_values_is_refused(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    with pytest.raises(ValueError, match=r"a\.npy: an array of float64 .*, expected numbers"):
        volumes.decode(tmp_path / "a.npy")


def test_the_variable_of_several(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, image=STORED, other=STORED[::-1])
    np.testing.assert_array_equal(volumes.decode(path, "other").values, STORED[::-1])
    with pytest.raises(ValueError, match=r"a\.npz: 2 arrays in 2D or 3D.*name it by --variable"):
        volumes.decode(path)
    with pytest.raises(ValueError, match=r"a\.npz: --variable lung: not in the file, which has"):
        volumes.decode(path, "lung")


# MATLAB's files.


@pytest.mark.parametrize("deflated", [True, False])
@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8, bool, np.float32])
def test_what_matlab_files_may_hold_is_read(dtype, deflated, tmp_path):
    """Beside the volume all that MATLAB writes: small numbers, words, structures, nothing."""
    values = (np.random.default_rng(0).random((20, 30, 40)) * 100).astype(dtype)
    scalars = {
        "a": 1.0,
        "b": np.int8(2),
        "c": "words",
        "d": {"e": np.zeros(9)},
        "f": np.zeros((0, 3)),
    }
    content = {**scalars, "volume": values, "g": np.array(["x", 1], object)}
    scipy.io.savemat(tmp_path / "a.mat", content, do_compression=deflated)
    assert np.array_equal(volumes.decode(tmp_path / "a.mat").values, values)


@pytest.mark.parametrize(("kind", "size"), [(8, 4800), (9, 4801), (9, 2**31 - 8)])
def test_damaged_values_of_matlab_files_do_not_reach_scipy(kind, size, tmp_path):
    """It crashes on kinds that are no numbers, and takes the room that it is told of."""
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"volume": np.ones((20, 30))})
    content = path.read_bytes()
    tag = struct.pack("<II", 9, 4800)
    assert content.count(tag) == 1
    path.write_bytes(content.replace(tag, struct.pack("<II", kind, size)))
    what = rf"damaged: {size:,} bytes of kind {kind} for an array of \(20, 30\)"
    message = rf"a\.mat: cannot be decoded as an image: {what}"
    with pytest.raises(ValueError, match=message):
        volumes.decode(path)


def test_complex_values_are_no_slices(tmp_path):
    content = {"k_space": np.ones((20, 30), complex), "k": np.ones((20, 30), complex)}
    scipy.io.savemat(tmp_path / "a.mat", content)
    with pytest.raises(ValueError, match=r"a\.mat: 0 arrays in 2D or 3D, expected one"):
        volumes.decode(tmp_path / "a.mat")
    scipy.io.savemat(tmp_path / "a.mat", content | {"volume": np.full((20, 30), 7.0)})
    assert np.array_equal(volumes.decode(tmp_path / "a.mat").values, np.full((20, 30), 7.0))


def test_what_hdf5_files_may_hold_is_read(tmp_path):
    """Large pieces, pieces that are not deflated or not there, beside an empty array of any."""
    path, values = tmp_path / "a.mat", np.arange(40 * 64 * 64, dtype=np.int16).reshape(40, 64, 64)
    with h5py.File(path, "w") as file:
        grown = {"maxshape": (None, 64, 64), "chunks": (64, 64, 64), "shuffle": True}
        made = file.create_dataset(
            "volume", data=values, compression="gzip", fletcher32=True, **grown
        )
        made.resize((200, 64, 64))
        made.id.write_direct_chunk((128, 0, 0), np.ones((64, 64, 64), "i2").tobytes() + b"0" * 4, 7)
        file.create_dataset("log", (0,), "f4", maxshape=(None,), chunks=(2**21,))
    read = volumes.decode(path).values.T
    assert (
        np.array_equal(read[:40], values) and (read[128:192] == 1).all() and not read[64:128].any()
    )


def test_an_mat_file_reads_no_other_file(tmp_path):
    """HDF5 has links, and arrays whose bytes lie in any file of the machine."""
    other = tmp_path / "secret.bin"
    other.write_bytes(bytes(range(256)) * 4)
    with h5py.File(tmp_path / "a.mat", "w") as file:
        file.create_dataset("V", (32, 32), "u1", external=[(str(other), 0, 1024)])
    with h5py.File(tmp_path / "b.mat", "w") as file:
        file["V"] = h5py.ExternalLink(str(tmp_path / "a.mat"), "V")
    for name in "a.mat", "b.mat":
        with pytest.raises(ValueError, match=rf"{name}: 0 arrays in 2D or 3D"):
            volumes.decode(tmp_path / name)


# NIfTI's orientation.


ORIENTATIONS = [
    "".join(codes) for codes in itertools.product("LR", "AP", "IS")
] + ["PLS", "ARI", "SLP", "IAR"]  # fmt: skip


def picture() -> np.ndarray:
    """HU (12, 16): another value in each pixel; front at the top, right at the left."""
    return np.arange(12 * 16, dtype=np.int16).reshape(12, 16) - 500


@pytest.mark.parametrize("form", ["sform", "qform"])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_nifti_slice_is_upright_whatever_its_orientation(tmp_path, codes, form):
    """Each voxel keeps its place in the patient while its axes are turned; nibabel turns them."""
    volume = nibabel.Nifti1Image(picture().T[:, :, None], np.diag([-0.7, -0.7, 2.0, 1.0]))
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    volume = volume.as_reoriented(turn)
    assert "".join(nibabel.aff2axcodes(volume.affine)) == codes
    affine = volume.affine.copy()  # the next lines write into it
    volume.set_sform(affine, code=1 if form == "sform" else 0)
    volume.set_qform(affine, code=1 if form == "qform" else 0)
    nibabel.save(volume, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(ct.read_hu(tmp_path / "a.nii.gz"), picture())


def test_a_nifti_slice_without_a_third_axis_is_read(tmp_path):
    volume = nibabel.Nifti1Image(picture().T[::-1, ::-1], np.diag([1.0, 1.0, 1.0, 1.0]))
    nibabel.save(volume, tmp_path / "a.nii")
    np.testing.assert_array_equal(ct.read_hu(tmp_path / "a.nii"), picture())


def test_a_nifti_slice_without_orientation_is_read_as_stored(tmp_path):
    volume = nibabel.Nifti1Image(picture().T[:, :, None], None)
    assert volume.header["sform_code"] == volume.header["qform_code"] == 0
    nibabel.save(volume, tmp_path / "a.nii")
    np.testing.assert_array_equal(ct.read_hu(tmp_path / "a.nii"), picture())


@pytest.mark.parametrize(
    "affine",
    [np.diag([1.0, 0.0, 1.0, 1.0]), np.diag([np.nan, 1.0, 1.0, 1.0]),
     np.diag([np.inf, 1.0, 1.0, 1.0]), np.zeros((4, 4))],
)  # fmt: skip
def test_a_nifti_slice_with_a_broken_affine_is_refused_by_name(tmp_path, affine):
    volume = nibabel.Nifti1Image(picture().T[:, :, None], None)
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        volume.header[name] = affine[row]
    volume.header["sform_code"] = 1
    # Written by hand, as nibabel writes no such header.
    (tmp_path / "a.nii").write_bytes(
        volume.header.binaryblock + bytes(4) + picture().T.tobytes(order="F")
    )
    with pytest.raises(ValueError, match=r"a\.nii: .*affine"):
        ct.read_hu(tmp_path / "a.nii")


def test_a_coronal_nifti_slice_is_refused(tmp_path):
    volume = nibabel.Nifti1Image(picture().T[:, None, :], np.diag([-1.0, -1.0, 1.0, 1.0]))
    nibabel.save(volume, tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii: .*not an axial one"):
        ct.read_hu(tmp_path / "a.nii")


def test_a_file_of_a_multi_file_ome_tiff_is_its_own_plane_alone(tmp_path):
    """Its XML names the other files of the volume, also outside of the folder."""
    names = [f"ct_Z{i}.ome.tif" for i in range(3)]
    tags = [uuid.uuid4() for _ in names]
    planes = "".join(
        f'<TiffData IFD="0" FirstZ="{i}" PlaneCount="1">'
        f'<UUID FileName="{name}">urn:uuid:{tag}</UUID></TiffData>'
        for i, (name, tag) in enumerate(zip(names, tags, strict=True))
    )
    for i, (name, tag) in enumerate(zip(names, tags, strict=True)):
        text = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{tag}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" '
            'SizeX="24" SizeY="20" SizeZ="3" SizeC="1" SizeT="1">'
            f'<Channel ID="Channel:0:0" SamplesPerPixel="1"/>{planes}</Pixels></Image></OME>'
        )
        tifffile.imwrite(tmp_path / name, STORED + i, description=text, metadata=None)
    for i, name in enumerate(names):
        assert volumes.dimensions(tmp_path / name) == 2
        np.testing.assert_array_equal(volumes.read_volume(tmp_path / name).values, STORED[None] + i)


def test_a_file_of_several_frames_is_no_slice(tmp_path):
    """Nor is its first frame."""
    write_dicom(tmp_path, [enhanced()])
    (path,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="5 frames, expected one slice"):
        ct.read_hu(path)
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="2 frames, expected one slice"):
        ct.read_contour(tmp_path / "two.gif")
    for i in range(2):
        tifffile.imwrite(tmp_path / "pages.tif", STORED + i, append=i > 0)
    with pytest.raises(ValueError, match="expected"):
        ct.read_hu(tmp_path / "pages.tif", (1.0, 0.0))


def upright_nifti(values: np.ndarray) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(values, np.diag([-1.0, -1.0, 2.0, 1.0]))


def test_nifti_is_told_from_gzip_by_content(tmp_path):
    values = np.random.default_rng(0).normal(0, 300, (20, 24, 3)).astype(np.float32)
    nibabel.save(upright_nifti(values), tmp_path / "right.nii")
    nibabel.save(upright_nifti(values), tmp_path / "right.nii.gz")
    (tmp_path / "plain.nii.gz").write_bytes((tmp_path / "right.nii").read_bytes())
    (tmp_path / "packed.nii").write_bytes((tmp_path / "right.nii.gz").read_bytes())
    expected = volumes.read_volume(tmp_path / "right.nii")
    for name in ("plain.nii.gz", "packed.nii"):
        assert volumes.dimensions(tmp_path / name) == 3
        found = volumes.read_volume(tmp_path / name)
        np.testing.assert_array_equal(found.values, expected.values)
        assert found.spacing == expected.spacing


def test_of_two_affines_a_broken_one_gives_way_and_a_contradiction_is_refused(tmp_path):
    values = np.random.default_rng(0).normal(0, 300, (20, 24, 3)).astype(np.float32)
    image, path = upright_nifti(values), tmp_path / "a.nii"
    image.set_qform(image.affine, 1)
    nibabel.save(image, path)
    expected = volumes.read_volume(path).values
    for row in ("srow_x", "srow_y", "srow_z"):
        image.header[row] = 0
    image.header["sform_code"] = 1
    broken = nibabel.Nifti1Image(values, None, image.header)
    nibabel.save(broken, path)
    np.testing.assert_array_equal(volumes.read_volume(path).values, expected)
    mirrored = upright_nifti(values)
    mirrored.set_qform(np.diag([1.0, -1.0, 2.0, 1.0]), 1)
    mirrored.set_sform(np.diag([-1.0, -1.0, 2.0, 1.0]), 2)
    nibabel.save(mirrored, path)
    with pytest.raises(ValueError, match="left and right are unknown"):
        volumes.read_volume(path)


def test_nan_around_the_field_of_view_is_air_and_within_it_an_error(tmp_path):
    hu = np.full((16, 16), 40.0, np.float32)
    hu[:2], hu[2:, 13:] = np.nan, np.nan
    np.save(tmp_path / "a.npy", hu)
    found = ct.read_hu(tmp_path / "a.npy")
    assert (found[:2] == ct.AIR).all() and (found[2:, 13:] == ct.AIR).all()
    assert (found[2:, :13] == 40).all()
    hu[8, 8] = np.nan
    np.save(tmp_path / "b.npy", hu)
    with pytest.raises(ValueError, match="1 values are not finite"):
        ct.read_hu(tmp_path / "b.npy")


@pytest.mark.parametrize("name", ["s", "s.gz", "s.nii.gz.1", "s.img.gz", "s.dcm", "s.bin", "s.nii"])
@pytest.mark.parametrize("packed", [True, False])
def test_nifti_is_told_by_its_content(tmp_path, name, packed):
    nibabel.save(upright_nifti(SMALL), tmp_path / f"a.nii{'.gz' * packed}")
    (tmp_path / f"a.nii{'.gz' * packed}").rename(tmp_path / name)
    assert volumes.kind_of(tmp_path / name) == "nifti"
    np.testing.assert_array_equal(volumes.decode(tmp_path / name).values.shape, (3, 5, 4))


SMALL = np.arange(60, dtype=np.int16).reshape(4, 5, 3)


@pytest.mark.parametrize("damage", ["flip", "checksum", "trailer"])
def test_damaged_gzip_is_refused(tmp_path, damage):
    path = tmp_path / "a.nii.gz"
    nibabel.save(upright_nifti(np.arange(2**18, dtype=np.int32).reshape(64, 64, 64)), path)
    content = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), 0))
    if damage == "flip":
        content[-200] ^= 1
    elif damage == "checksum":
        content[-8] ^= 1
    else:
        del content[-4:]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.nii\.gz: .*gzipped, and damaged"):
        volumes.decode(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (np.diag([2.0, 2.0, 1.0, 1.0]), "voxels of"),
        (np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "20 degrees"),
        (np.diag([1.001, 1.001, 1.0, 1.0]), None),
    ],
)
def test_sform_and_qform_that_differ_in_size_or_angle(tmp_path, change, said):
    image = upright_nifti(SMALL)
    image.set_qform(image.affine, 1)
    image.set_sform(change @ image.affine, 1)
    nibabel.save(image, tmp_path / "a.nii")
    if said is None:
        volumes.decode(tmp_path / "a.nii")
        return
    with pytest.raises(ValueError, match=f"contradict each other: .*{said}"):
        volumes.decode(tmp_path / "a.nii")


def test_a_tiff_whose_parts_are_not_there_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, GREY, rowsperstrip=10)
    with tifffile.TiffFile(path) as file:
        counts = file.pages[0].databytecounts
    content, packed = path.read_bytes(), np.array(counts, "<u2").tobytes()
    if content.count(packed) != 1:
        packed = np.array(counts, "<u4").tobytes()
    assert content.count(packed) == 1
    size = len(packed) // len(counts)
    path.write_bytes(content.replace(packed, packed[:-size] + bytes(size)))
    with pytest.raises(ValueError, match="parts of the picture are not there"):
        volumes.decode(path)
