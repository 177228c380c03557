"""Bad input of prepare_data.py: named with its reason; the rest is prepared, nothing half done."""

import csv
import errno
import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import scipy.io
import tifffile
from PIL import Image
from pydicom.uid import SecondaryCaptureImageStorage
from scans import SIZE, ct_dataset, ct_datasets, lungs, nifti, scan, write_dicom
from test_prepare_data import prepare, rows_of, volume_of

from fibldm import ct, disk, slices
from fibldm.tables import Split, read_table

BAD = {"PatientID": "bad", "SeriesInstanceUID": "1.9"}


def bad_series(folder: Path, change=None, one: int | None = None, **elements) -> list[Path]:
    """A DICOM series, `change` done to all of its data sets or to one."""
    datasets = ct_datasets(1, **{**BAD, **elements})
    for i, dataset in enumerate(datasets):
        if change is not None and one in (None, i):
            change(dataset)
    return write_dicom(folder, datasets)


def setting(**elements):
    """A change of DICOM elements; None deletes."""

    def change(dataset):
        for name, value in elements.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)

    return change


def dicom_with(one: int | None = None, **elements):
    return lambda folder: bad_series(folder, setting(**elements), one)


def truncated_pixels(folder):
    path = bad_series(folder)[2]
    path.write_bytes(path.read_bytes()[:-3000])


def truncated_header(folder):
    path = bad_series(folder)[2]
    path.write_bytes(path.read_bytes()[:180])


def two_patients(folder):
    bad_series(folder, setting(PatientID="other"), one=3)


def copied_slice(folder):
    paths = bad_series(folder)
    (folder / "copy").write_bytes(paths[1].read_bytes())


def same_position(folder):
    datasets = ct_datasets(1, **BAD)
    again = ct_dataset(scan(1)[2], float(datasets[2].ImagePositionPatient[2]), **BAD)
    write_dicom(folder, [*datasets, again])


def other_spacing(folder):
    bad_series(folder, setting(PixelSpacing=[1.0, 1.0]), one=0)


def other_matrix(folder):
    def crop(dataset):
        stored = np.frombuffer(dataset.PixelData, "<u2").reshape(SIZE, SIZE)[8:-8, 8:-8]
        dataset.PixelData = np.ascontiguousarray(stored).tobytes()
        dataset.Rows, dataset.Columns = stored.shape

    bad_series(folder, crop, one=0)


def gap(folder):
    bad_series(folder)[2].unlink()


def colour_dicom(folder):
    def paint(dataset):
        dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
        dataset.PhotometricInterpretation = "RGB"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelData = bytes(SIZE * SIZE * 3)

    bad_series(folder, paint)


def dose_report(folder):
    bad_series(folder, setting(Modality="SR", SOPClassUID=SecondaryCaptureImageStorage), one=0)


def inverted(folder):
    def invert(dataset):
        stored = np.frombuffer(dataset.PixelData, "<u2")
        dataset.PixelData = (2100 - stored.astype(int)).clip(0, 4095).astype("<u2").tobytes()
        dataset.PhotometricInterpretation = "MONOCHROME1"

    bad_series(folder, invert)


def save_nifti(folder, affine=None, volume=None, codes=1):
    image = nifti(scan(1) if volume is None else volume)
    image.header.set_sform(image.affine if affine is None else affine, codes)
    image.header.set_qform(None, 0)
    nibabel.save(nibabel.Nifti1Image(image.dataobj, None, image.header), folder / "scan.nii")


def nifti_singular(folder):
    save_nifti(folder, np.diag([1.0, 1.0, 0.0, 1.0]))


def nifti_oblique(folder):
    affine = np.eye(4)
    affine[:3, :3] = [[0.7, 0.7, 0], [-0.7, 0.7, 0], [0, 0, 5]]
    save_nifti(folder, affine)


def nifti_without_orientation(folder):
    save_nifti(folder, codes=0)


def nifti_in_four_dimensions(folder):
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((32, 32, 4, 3), np.int16), np.eye(4)), folder / "scan.nii"
    )


def nifti_truncated(folder):
    save_nifti(folder)
    content = (folder / "scan.nii").read_bytes()
    (folder / "scan.nii").write_bytes(content[: len(content) // 2])


def nifti_of_labels(folder):
    save_nifti(folder, volume=lungs(1).astype(np.int16))


def nifti_normalized(folder):
    save_nifti(folder, volume=((scan(1) + 1024) / 3000).astype(np.float32))


def mat_without_image(folder):
    scipy.io.savemat(folder / "scan.mat", {"name": "Erika", "spacing": [1.0, 2.0]})


def mat_with_two(folder):
    scipy.io.savemat(folder / "scan.mat", {"a": scan(1), "b": scan(1)})


def mat_truncated(folder):
    scipy.io.savemat(folder / "scan.mat", {"a": scan(1)}, do_compression=True)
    (folder / "scan.mat").write_bytes((folder / "scan.mat").read_bytes()[:4000])


def npy_truncated(folder):
    np.save(folder / "scan.npy", scan(1))
    (folder / "scan.npy").write_bytes((folder / "scan.npy").read_bytes()[:5000])


def npy_of_objects(folder):
    np.save(folder / "scan.npy", np.array([{"a": 1}, None], dtype=object), allow_pickle=True)


def npy_ambiguous(folder):
    np.save(folder / "scan.npy", scan(1)[:, :60])


def npy_unsigned(folder):
    np.save(folder / "scan.npy", (scan(1) + 1024).astype(np.uint16))


def npy_not_finite(folder):
    volume = scan(1).astype(np.float32)
    volume[0, 30, 30] = np.nan
    np.save(folder / "scan.npy", volume)


def png_colour(folder):
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "scan.png")


def png_truncated(folder):
    Image.fromarray((scan(1)[0] + 1024).astype(np.uint16)).save(folder / "scan.png")
    (folder / "scan.png").write_bytes((folder / "scan.png").read_bytes()[:1000])


def png_16_bit_without_scale(folder):
    Image.fromarray((scan(1)[0] + 1024).astype(np.uint16)).save(folder / "scan.png")


def jpeg(folder):
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(folder / "scan.jpg")


def tiff_normalized(folder):
    tifffile.imwrite(folder / "scan.tif", ((scan(1)[2] + 1024) / 2000).astype(np.float32))


def tiff_constant(folder):
    tifffile.imwrite(folder / "scan.tif", np.zeros((SIZE, SIZE), np.float32))


def empty_file(folder):
    (folder / "scan.nii.gz").write_bytes(b"")


def mask_of_another_shape(folder):
    save_nifti(folder)
    nibabel.save(nifti(lungs(1)[:, :40].astype(np.uint8)), folder / "scan_mask.nii")


def mask_elsewhere(folder):
    save_nifti(folder)
    image = nifti(lungs(1).astype(np.uint8))
    image.affine[2, 3] += 90
    nibabel.save(nibabel.Nifti1Image(image.dataobj, image.affine), folder / "scan_mask.nii")


def mask_without_image(folder):
    nibabel.save(nifti(lungs(1).astype(np.uint8)), folder / "scan_mask.nii")


def mask_that_is_a_picture(folder):
    np.save(folder / "scan.npy", scan(1)[2])
    np.save(folder / "scan_mask.npy", (scan(1)[2] + 1024).astype(np.uint16))


def frames_that_are_not_there(folder):
    bad_series(folder, setting(NumberOfFrames=300000), one=0)


def not_finite_dicom(folder):
    def spoil(dataset):
        hu = scan(1)[2].astype(np.float32)
        hu[0, 0] = np.nan
        del dataset.PixelData
        dataset.FloatPixelData = hu.tobytes()
        dataset.BitsAllocated, dataset.RescaleIntercept = 32, 0

    bad_series(folder, spoil, one=2)


def png_16_bit_colour(folder):
    import imagecodecs

    pixels = np.repeat((scan(1)[2] + 1024).astype(np.uint16)[..., None], 3, axis=2)
    pixels[..., 1] += 5
    (folder / "scan.png").write_bytes(imagecodecs.png_encode(pixels))


def archive(folder):
    (folder / "scan.nrrd").write_bytes(b"NRRD0004")


def latin_1_name(folder):
    path = os.fsencode(folder) + b"/M\xfcller.nii"
    save_nifti(folder, np.diag([1.0, 1.0, 0.0, 1.0]))
    os.rename(folder / "scan.nii", path)


# What is bad, the reason that is given, the file that is named, and how many slices are still used.
CASES = [
    (truncated_pixels, "pixel data", "IM003", 4),
    (truncated_header, "cut short", "IM003", 4),
    (dicom_with(PixelData=None), "no pixel data", "IM000", 0),
    (two_patients, "2 patients in one series, expected one", "IM010", 0),
    (copied_slice, "a copy", "copy", 5),
    (same_position, "a duplicate", "IM002", 5),
    (other_spacing, "another pixel spacing in mm than most", "IM000", 4),
    (other_matrix, "another matrix", "IM000", 4),
    (
        dicom_with(0, ImageOrientationPatient=[-1, 0, 0, 0, -1, 0]),
        "another orientation",
        "IM000",
        4,
    ),
    (gap, "a gap of 80.0 mm", "IM007", 4),
    (dicom_with(PhotometricInterpretation="MONOCHROME1"), "MONOCHROME1", "IM000", 5),
    (inverted, "inverted", "bad", 0),
    (dicom_with(RescaleSlope=0), "RescaleSlope 0", "IM000", 0),
    (dicom_with(2, RescaleIntercept=None), "no RescaleSlope and RescaleIntercept", "IM003", 4),
    (dicom_with(RescaleIntercept=0), "intercept", "bad", 0),
    (dicom_with(RescaleType="mgml"), "RescaleType mgml, expected HU", "IM000", 0),
    (dicom_with(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "not axial", "IM000", 0),
    (dicom_with(0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "a localizer", "IM000", 4),
    (dicom_with(Modality="MR"), "modality MR", "IM000", 0),
    (dicom_with(1, ImagePositionPatient=None), "its place is unknown", "IM007", 4),
    (dicom_with(1, PixelSpacing=[0, 0]), "PixelSpacing", "IM007", 4),
    (colour_dicom, "(colour), expected 1", "IM000", 0),
    (dose_report, "modality SR", "IM000", 4),
    (nifti_singular, "a broken affine", "scan.nii", 0),
    (nifti_oblique, "oblique", "scan.nii", 0),
    (nifti_without_orientation, "give --array_axes", "scan.nii", 0),
    (nifti_in_four_dimensions, "expected a slice or a volume", "scan.nii", 0),
    (nifti_truncated, "cannot be decoded", "scan.nii", 0),
    (nifti_of_labels, "a mask, not CT", "scan.nii", 0),
    (nifti_normalized, "normalized", "scan.nii", 0),
    (mat_without_image, "0 arrays in 2D or 3D, expected one", "scan.mat", 0),
    (mat_with_two, "name it by --variable", "scan.mat", 0),
    (mat_truncated, "", "scan.mat", 0),
    (npy_truncated, "", "scan.npy", 0),
    (npy_of_objects, "", "scan.npy", 0),
    (npy_ambiguous, "which axis counts the slices", "scan.npy", 0),
    (npy_unsigned, "uint16 values without a scale", "scan.npy", 0),
    (npy_not_finite, "not finite", "scan.npy", 0),
    (png_colour, "a colour image", "scan.png", 0),
    (png_truncated, "cannot be decoded", "scan.png", 0),
    (png_16_bit_without_scale, "uint16 values without a scale", "scan.png", 0),
    (jpeg, "a JPEG picture", "scan.jpg", 0),
    (tiff_normalized, "normalized", "scan.tif", 0),
    (tiff_constant, "constant", "scan.tif", 0),
    (empty_file, "", "scan.nii.gz", 0),
    (mask_of_another_shape, "a mask of (5, 40, 64) pixels, expected (5, 64, 64)", "scan_mask", 0),
    (mask_elsewhere, "90.0 mm (to the left", "scan_mask", 0),
    (mask_without_image, "a mask without an image", "scan_mask", 0),
    (mask_that_is_a_picture, "a picture rather than a contour", "scan.npy", 0),
    (frames_that_are_not_there, "NumberOfFrames 300000, but 0", "IM000", 4),
    (not_finite_dicom, "values are not finite", "IM003", 4),
    (png_16_bit_colour, "a colour image, expected grey levels", "scan.png", 0),
    (archive, "of a kind that is not read", "scan.nrrd", 0),
    (latin_1_name, "a broken affine", "ller.nii", 0),
]


@pytest.mark.parametrize(
    ("spoil", "reason", "name", "used"),
    CASES,
    ids=[f"{i}-{case[1][:25]}" for i, case in enumerate(CASES)],
)
def test_bad_input_is_named_and_the_rest_is_prepared(tmp_path, capsys, spoil, reason, name, used):
    write_dicom(tmp_path / "in" / "good", ct_datasets(0))
    (tmp_path / "in" / "bad").mkdir()
    spoil(tmp_path / "in" / "bad")
    data = prepare(tmp_path / "in", "--mask_suffix", "_mask", "--min_lung_area", 0.01)
    printed = capsys.readouterr().out
    assert reason in printed
    assert name in printed
    rows = rows_of(data)
    assert len(rows) == 5 + used
    assert len({row["patient_id"] for row in rows}) == 1 + bool(used)
    for folder, column in ("images", "image"), ("contours", "contour"):
        files = {f"{folder}/{path.name}" for path in (data / folder).iterdir()}
        assert files == {row[column] for row in rows}
    with open(tmp_path / "data.left_out.csv", newline="") as file:
        report = list(csv.DictReader(file))
    if used < 5 and "gap" not in reason:
        assert any(name in row["what"] + row["reason"] for row in report)


# A label.csv owns its folder.


def listed(folder: Path, table: str | bytes) -> None:
    """Ten slices of two patients and contours of half of their lungs, and a label.csv."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for patient in (0, 1):
        for i, (hu, mask) in enumerate(zip(scan(patient), lungs(patient), strict=True)):
            stored = Image.fromarray((hu + 1024).astype(np.uint16))
            stored.save(folder / "images" / f"p{patient}_{i}.png")
            half = np.where(np.arange(SIZE) < SIZE // 2, mask, False)
            Image.fromarray(half * np.uint8(255)).save(folder / "masks" / f"p{patient}_{i}.png")
    (folder / "dataset.json").write_text('{"rescale_slope": 1, "rescale_intercept": -1024}')
    content = table if isinstance(table, bytes) else table.encode()
    (folder / "label.csv").write_bytes(content)


def listing(header: str = "image,contour,patient_id,split", line: str = "{i},{m},p{p},{s}") -> str:
    """A table of all slices: of p0 in train, of p1 in val."""
    lines = [header]
    for p in (0, 1):
        for k in range(5):
            i, m, s = f"images/p{p}_{k}.png", f"masks/p{p}_{k}.png", ("train", "val")[p]
            lines.append(line.format(i=i, m=m, p=p, s=s, k=k))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["label.csv", "LABEL.CSV"])
def test_rows_that_are_deleted_do_not_come_back(tmp_path, capsys, name):
    lines = listing().splitlines()
    listed(tmp_path / "in" / "a", "\n".join([lines[0], *lines[2:8]]))
    (tmp_path / "in" / "a" / "label.csv").rename(tmp_path / "in" / "a" / name)
    (tmp_path / "in" / "a" / "more").mkdir()
    nibabel.save(nifti(scan(2)), tmp_path / "in" / "a" / "more" / "scan.nii")
    data = prepare(tmp_path / "in", "--min_lung_area", 0.01)
    rows = rows_of(data)
    assert sorted(row["split"] for row in rows) == ["train"] * 4 + ["val"] * 2
    assert len({row["patient_id"] for row in rows}) == 2
    printed = capsys.readouterr().out
    assert "9  not listed" in printed and "a/images/p0_0.png: in " in printed
    assert "more/scan.nii" in (tmp_path / "data.left_out.csv").read_text()


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("image,contour,patient_id", "{i},{m},p{p}"),
        ("image,mask,patient_id", "{i},{m},p{p}"),
        ("slice_path,lung_path,patient_id", "{i},{m},p{p}"),
        ("patient_id,image,mask", "p{p},{i},{m}"),
        ("patient_id,Contour,note,IMAGE", "p{p},{m},x,{i}"),
        ("contour,slice,patient_id", "{m},{i},p{p}"),
    ],
)
def test_contours_are_those_that_training_takes(tmp_path, capsys, header, line):
    listed(tmp_path / "in", listing(header, line))
    rows, _ = read_table(tmp_path / "in" / "label.csv", tmp_path / "in", Split(2, 0.5, 0))
    assert {row.contour for row in rows} == {
        f"masks/p{p}_{k}.png" for p in (0, 1) for k in range(5)
    }
    data = prepare(tmp_path / "in", "--min_lung_area", 0)
    for row in rows_of(data):
        assert not ct.read_contour(data / row["contour"])[0, :, SIZE // 2 :].any()
    assert "are not copied" in capsys.readouterr().out or "note" not in header


@pytest.mark.parametrize(
    ("header", "line"),
    [("image,patient_id", "{i},p{p}"), ("patient_id,image", "p{p},{i}"), ("image", "{i}")],
)
def test_a_table_without_contours_has_them_found(tmp_path, header, line):
    listed(tmp_path / "in", listing(header, line))
    data = prepare(tmp_path / "in", "--min_lung_area", 0)
    assert all(ct.read_contour(data / row["contour"])[0, :, 32:].any() for row in rows_of(data))
    with pytest.raises(ValueError, match="no contours in"):
        read_table(tmp_path / "in" / "label.csv", tmp_path / "in", Split())


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (listing().replace(",", ";"), "separated by semicolons"),
        (listing().replace(",", "\t"), "separated by tabs"),
        (listing().replace("/", "\\"), r"20 files are missing.*write / between"),
        (listing().replace("images/p0_4.png", ""), "1 files are missing"),
        (listing().replace("masks/p1_2", "mask/p1_2"), r"line 9: mask/p1_2\.png"),
        (listing().replace("images/p0_4", "images/" + "x" * 300), "line 6: images/xxx"),
        (listing().replace("images/p0_4", "../p0_4"), r"line 6: '\.\./p0_4\.png'"),
        (listing().replace("p0_1.png,p0", 'p0_1.png,"p0'), "unbalanced quotes"),
        (listing().replace("p1,val", "p1,Erika"), "line 7: split 'Erika', expected one of train"),
        (listing().replace("p1_4.png,p1,val", "p1_4.png,p1,train"), "p1 is in val and in train"),
        (listing().replace("p1_4.png,p1,val", "p1_4.png,p1,"), "p1 is in val and in no split"),
        (listing().replace("p1_4.png,p1,val", "p1_4.png,p1"), "1 lines have fewer cells"),
        (listing("image,position", "{i},{k}mm"), "line 2: position '0mm', expected a number"),
        (listing("image,pixel_spacing", "{i},-{k}"), "line 2: pixel_spacing '-0', expected"),
        (listing().replace("p1,", "M\xfcller,").encode("latin-1"), "not a CSV text file in UTF-8"),
        ("image,contour\n", "expected a header and a line a slice"),
        ("patient,label\nP1,fibrosis\n", "1 files are missing.*rename it, if it is no table"),
    ],
)
def test_a_table_that_cannot_be_resolved_stops_all(tmp_path, table, said):
    """Its slices would come back as another patient's, without split, with other contours."""
    write_dicom(tmp_path / "in" / "good", ct_datasets(0))
    listed(tmp_path / "in" / "bad", table)
    with pytest.raises(ValueError, match=f"(?s)bad/label.csv.*{said}"):
        prepare(tmp_path / "in")
    assert not (tmp_path / "data").exists()


def test_values_that_do_not_look_like_ct_can_be_trusted(tmp_path):
    bad_series(tmp_path / "in", setting(RescaleIntercept=-1224))
    refused("no slice is usable", tmp_path / "in")
    data = prepare(tmp_path / "in", "--trust_hu", "--min_lung_area", 0)
    np.testing.assert_allclose(volume_of(data), np.maximum(scan(1) - 200, -1024), atol=1)


def refused(match: str, *arguments) -> None:
    with pytest.raises(ValueError, match=match):
        prepare(*arguments)


def test_an_input_that_is_not_there(tmp_path):
    refused("nowhere: no such file or folder", tmp_path / "nowhere")


def test_an_empty_folder(tmp_path):
    (tmp_path / "in").mkdir()
    refused("in: no CT found", tmp_path / "in")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_folder_without_permission(tmp_path, capsys, monkeypatch):
    write_dicom(tmp_path / "in" / "good", ct_datasets())
    closed = tmp_path / "in" / "closed"
    closed.mkdir()
    if os.access(closed, os.R_OK) and os.geteuid() == 0:  # nothing is closed to root
        real = os.scandir

        def scandir(path):
            if str(path) == str(closed):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
    else:
        closed.chmod(0)
    data = prepare(tmp_path / "in")
    assert len(rows_of(data)) == 5
    printed = capsys.readouterr().out
    assert "cannot be opened" in printed and f"{closed}: Permission denied" in printed


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    for patient in range(3):
        changes = {"PatientID": f"P{patient}", "SeriesInstanceUID": f"1.2.{patient}"}
        write_dicom(tmp_path / "in" / str(patient), ct_datasets(patient, **changes))
    written, real = [], disk.write_atomically

    def write_atomically(path, write):
        written.append(path)
        if len(written) > 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_atomically", write_atomically)
        refused("No space left on device; 2 of 3 series are done and kept", tmp_path / "in")
    data = tmp_path / "data"
    assert len(list((data / "images").iterdir())) == len(list((data / "contours").iterdir())) == 10
    prepare(tmp_path / "in")
    assert len(rows_of(data)) == 15


def test_a_full_disk_at_the_table_keeps_the_old_one(tmp_path, monkeypatch):
    write_dicom(tmp_path / "in" / "0", ct_datasets())
    data = prepare(tmp_path / "in")
    before = (data / "label.csv").read_bytes()
    write_dicom(tmp_path / "in" / "1", ct_datasets(1, **BAD))
    real = disk.write_atomically

    def write_atomically(path, write):
        if path.name == "label.csv":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_atomically", write_atomically)
        refused("No space left on device", tmp_path / "in")
    assert (data / "label.csv").read_bytes() == before
    prepare(tmp_path / "in")
    assert len(rows_of(data)) == 10


def dies(series, *_):
    if series.patient == "bad":
        os._exit(9)
    return real_prepare(series, *_)


real_prepare = slices.prepare_series


def test_a_process_that_dies_takes_no_other_series_with_it(tmp_path, capsys, monkeypatch):
    for patient in range(3):
        changes = {"PatientID": f"P{patient}", "SeriesInstanceUID": f"1.2.{patient}"}
        write_dicom(tmp_path / "in" / str(patient), ct_datasets(patient, **changes))
    bad_series(tmp_path / "in" / "bad")
    monkeypatch.setattr(slices, "prepare_series", dies)
    data = prepare(tmp_path / "in", "--num_workers", 2)
    assert len(rows_of(data)) == 15
    assert "ended its process" in capsys.readouterr().out


def test_labels_of_unknown_patients_are_named(tmp_path, capsys):
    write_dicom(tmp_path / "in", ct_datasets())
    labels = tmp_path / "labels.csv"
    labels.write_text("patient_id,label\nMRN-4711,\nMRN-4712,fibrosis\n")
    prepare(tmp_path / "in", "--labels", labels)
    printed = capsys.readouterr().out
    assert "1 patients of --labels are in no input: MRN-4712" in printed
    assert "1 patients have no label" in printed


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("patient_id,label\na,x\na,y\n", "patient a is x and y, expected one label a patient"),
        (
            "patient_id\na\n",
            "found the columns patient_id and 1 lines; expected patient_id and label",
        ),
        ("Patient,Age\na,59\n", "found the columns Patient, Age"),
        ("label,Age\na,59\n", "found the columns label, Age"),
        ("", "0 lines; expected a header"),
        ("id,x,patient_id,label\n1,2\n", "1 lines have fewer cells than the header"),
    ],
)
def test_bad_labels(tmp_path, text, match):
    write_dicom(tmp_path / "in", ct_datasets())
    (tmp_path / "labels.csv").write_text(text)
    refused(f"labels.csv: {match}", tmp_path / "in", "--labels", tmp_path / "labels.csv")
    assert not (tmp_path / "data").exists()


def test_other_settings_are_refused_with_both_values(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    prepare(tmp_path / "in")
    refused("its image_size is 64, asked for is 32", tmp_path / "in", "--image_size", 32)


def test_a_lost_key_is_an_error_and_so_is_another(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    prepare(tmp_path / "in")
    (tmp_path / "data.key").rename(tmp_path / "moved.key")
    refused("data.key: no such file, and the data set was made with one", tmp_path / "in")
    (tmp_path / "data.key").write_text("1" * 64)
    refused("its key_check is", tmp_path / "in")
    prepare(tmp_path / "in", "--key_file", tmp_path / "moved.key")


@pytest.mark.parametrize("option", ["--key_file", "--report"])
def test_what_names_patients_may_not_lie_in_the_output(tmp_path, option):
    data = tmp_path / "data"
    arguments = (option, data / "x", "--output_dir", data)
    refused(f"{option} .*keep it outside of --output_dir", tmp_path, *arguments)
    assert not data.exists()


@pytest.mark.parametrize("what", ["label.csv", "dataset.json"])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, what):
    write_dicom(tmp_path / "in", ct_datasets())
    (tmp_path / "data").mkdir()
    content = json.dumps({"rescale_slope": 1.0, "rescale_intercept": 0.0})
    (tmp_path / "data" / what).write_text(content)
    refused("another folder", tmp_path / "in")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [what]


def test_a_pattern_that_matches_nothing(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    nibabel.save(nifti(scan()), tmp_path / "in" / "p1.nii")
    nibabel.save(nifti(scan(1)), tmp_path / "in" / "other.nii")
    data = prepare(tmp_path / "in", "--patient_pattern", r"(p\d+)")
    assert len(rows_of(data)) == 5
    assert "no patient found by --patient_pattern" in capsys.readouterr().out


@pytest.mark.parametrize("pattern", ["(p", "p"])
def test_bad_patterns(tmp_path, capsys, pattern):
    with pytest.raises(SystemExit):
        prepare(tmp_path, "--patient_pattern", pattern)
    assert "--patient_pattern" in capsys.readouterr().err


def test_a_pipe_is_not_waited_for(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    os.mkfifo(tmp_path / "in" / "pipe.dcm")
    assert len(rows_of(prepare(tmp_path / "in"))) == 5


def test_out_of_memory_in_one_series_stops_no_other(tmp_path, capsys, monkeypatch):
    write_dicom(tmp_path / "in" / "good", ct_datasets())
    bad_series(tmp_path / "in" / "bad")

    def read_series(series, options):
        if series.patient == "bad":
            raise MemoryError
        return real_read_series(series, options)

    monkeypatch.setattr(slices, "read_series", read_series)
    assert len(rows_of(prepare(tmp_path / "in"))) == 5
    assert "MemoryError" in capsys.readouterr().out


real_read_series = slices.read_series


def test_a_damaged_record_is_named(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    data = prepare(tmp_path / "in")
    record = next((data / "series").glob("*.json"))
    record.write_text("[]")
    refused(f"{record.name}: damaged", tmp_path / "in")


@pytest.mark.parametrize("axes", ["zy", "xyzz", "abc", ""])
def test_bad_axes(tmp_path, capsys, axes):
    with pytest.raises(SystemExit):
        prepare(tmp_path, "--array_axes", axes)
    assert "expected the letters x, y and z" in capsys.readouterr().err
