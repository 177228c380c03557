"""prepare_data.py: whatever wrote the scan, the same slices come out, and no names."""

import csv
import importlib.util
import json
import stat
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import scipy.io
import tifffile
from conftest import QUICK, ROOT, TINY_VAE
from PIL import Image
from pydicom import uid
from scans import (
    SIZE,
    SPACING,
    ct_dataset,
    ct_datasets,
    enhanced,
    lungs,
    nifti,
    scan,
    write_dicom,
)

import train_vae
from fibldm import ct, disk, export, preparation, slices
from fibldm.datasets import CTDataset
from fibldm.slices import Settings
from fibldm.tables import Split, read_table


def load(name: str):
    """A script of scripts/ as a module: one for all tests, as processes are sent its classes."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare_data = load("prepare_data")


def prepare(*arguments) -> Path:
    """Run the script with inputs and options; return the output folder."""
    words = [str(argument) for argument in arguments]
    if "--output_dir" not in words:
        words += ["--output_dir", str(Path(words[0]).parent / "data")]
    args = prepare_data.parse_args(["--image_size", str(SIZE), "--num_workers", "1", *words])
    prepare_data.main(args)
    return args.output_dir


def rows_of(data: Path) -> list[dict]:
    with open(data / "label.csv", newline="") as file:
        return list(csv.DictReader(file))


def volume_of(data: Path, patient: str | None = None) -> np.ndarray:
    """HU of the prepared slices (D, H, W), by position."""
    rows = [row for row in rows_of(data) if patient in (None, row["patient_id"])]
    rows.sort(key=lambda row: float(row["position"] or 0))
    return np.stack([ct.read_hu(data / row["image"], ct.read_rescale(data)) for row in rows])


def assert_is_the_scan(data: Path, tolerance: float = 1.0) -> None:
    np.testing.assert_allclose(volume_of(data), scan(), atol=tolerance)


def outputs(data: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(data)): path.read_bytes()
        for path in sorted(data.rglob("*"))
        if path.is_file()
    }


# Formats.


def test_dicom_in_any_order_under_any_name(tmp_path):
    write_dicom(tmp_path / "in" / "a" / "b", ct_datasets())
    data = prepare(tmp_path / "in")
    assert_is_the_scan(data)
    positions = [float(row["position"]) for row in rows_of(data)]
    assert positions == [0, 0.25, 0.5, 0.75, 1]
    assert {row["pixel_spacing"] for row in rows_of(data)} == {f"{SPACING:g}"}
    facts = json.loads((data / "dataset.json").read_text())
    assert (facts["rescale_slope"], facts["rescale_intercept"]) == (1, -1024)
    assert Image.open(data / rows_of(data)[0]["image"]).mode == "I;16"


def test_the_contours_are_the_lungs(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    data = prepare(tmp_path / "in")
    for row, truth in zip(rows_of(data), lungs(), strict=True):
        found = ct.read_contour(data / row["contour"])[0]
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.9


def test_what_is_prepared_is_what_training_reads(tmp_path):
    for patient in range(6):
        write_dicom(
            tmp_path / "in" / str(patient),
            ct_datasets(patient, PatientID=f"P{patient}", SeriesInstanceUID=f"1.2.{patient}"),
        )
    (tmp_path / "data.key").write_text("0" * 64)
    data = prepare(tmp_path / "in")
    rows, notes = read_table(data / "label.csv", data, Split(val_fraction=0.4))
    dataset = CTDataset(rows, data, data, SIZE)
    dataset.check()
    assert len({row.patient_id for row in rows}) == 6
    assert not [note for note in notes + dataset.notes() if "WARNING" in note]


def prone(dataset):
    dataset.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
    turn(dataset, lambda stored: stored[::-1, ::-1])


def rows_along_the_back(dataset):
    dataset.ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
    turn(dataset, np.transpose)


def turn(dataset, change):
    stored = np.frombuffer(dataset.PixelData, "<u2").reshape(SIZE, SIZE)
    dataset.PixelData = np.ascontiguousarray(change(stored)).tobytes()


def signed(dataset):
    stored = np.frombuffer(dataset.PixelData, "<u2").astype(np.int32) - 1024
    dataset.PixelData = stored.astype("<i2").tobytes()
    dataset.PixelRepresentation, dataset.RescaleIntercept = 1, 0
    dataset.BitsStored, dataset.HighBit = 16, 15


def signed_12_bits(dataset):
    signed(dataset)
    stored = np.frombuffer(dataset.PixelData, "<i2")
    dataset.PixelData = (np.clip(stored, -2048, 2047).astype("<u2") & 0x0FFF).tobytes()
    dataset.BitsStored, dataset.HighBit = 12, 11


def steep(dataset):
    stored = np.frombuffer(dataset.PixelData, "<u2") * 2
    dataset.PixelData = stored.astype("<u2").tobytes()
    dataset.RescaleSlope, dataset.BitsStored, dataset.HighBit = 0.5, 16, 15


def padded(dataset):
    """Outside of a circle, air is stored as a value that means -2000 HU."""
    signed(dataset)
    stored = np.frombuffer(dataset.PixelData, "<i2").reshape(SIZE, SIZE).copy()
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    stored[x**2 + y**2 > 1.75] = -2000
    dataset.PixelData = stored.tobytes()


def padded_beyond_bits_stored(dataset):
    signed_12_bits(dataset)
    stored = np.frombuffer(dataset.PixelData, "<u2").reshape(SIZE, SIZE).copy()
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    stored[x**2 + y**2 > 1.75] = 62512  # -3024 in 16 bits, 1072 in 12
    dataset.PixelData, dataset.PixelPaddingValue = stored.tobytes(), 62512
    dataset["PixelPaddingValue"].VR = "US"


def padded_by_a_range(dataset):
    padded(dataset)
    stored = np.frombuffer(dataset.PixelData, "<i2").copy()
    stored[stored == -2000] = np.arange((stored == -2000).sum()) % 50 + 3000
    dataset.PixelData = stored.tobytes()
    dataset.PixelPaddingValue, dataset.PixelPaddingRangeLimit = 3049, 3000
    for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        dataset[name].VR = "SS"


def padded_and_said(dataset):
    padded(dataset)
    stored = np.frombuffer(dataset.PixelData, "<i2").copy()
    stored[stored == -2000] = 3000
    dataset.PixelData, dataset.PixelPaddingValue = stored.tobytes(), 3000
    dataset["PixelPaddingValue"].VR = "SS"


def overlay_bits(dataset):
    stored = np.frombuffer(dataset.PixelData, "<u2").copy()
    stored[::3] |= 0x8000
    dataset.PixelData = stored.tobytes()
    dataset.add_new(0x60000100, "US", 16)
    dataset.add_new(0x60000102, "US", 15)


def monochrome1(dataset):
    dataset.PhotometricInterpretation = "MONOCHROME1"


def run_lengths(dataset):
    dataset.compress(uid.RLELossless)


def deflated(dataset):
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian


def implicit(dataset):
    dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian


def big_endian(dataset):
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    stored = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    dataset.PixelData = stored


@pytest.mark.parametrize(
    "change",
    [
        *(prone, rows_along_the_back, signed, signed_12_bits, steep, padded, padded_and_said),
        *(padded_beyond_bits_stored, padded_by_a_range),
        *(overlay_bits, monochrome1, run_lengths, deflated, implicit),
    ],
)
def test_dicom_as_scanners_write_it(tmp_path, change):
    datasets = ct_datasets()
    for dataset in datasets:
        change(dataset)
    write_dicom(tmp_path / "in", datasets)
    outside = "padded" in change.__name__
    assert_is_the_scan(prepare(tmp_path / "in"), 60 if outside else 1)


def test_big_endian_dicom(tmp_path):
    datasets = ct_datasets()
    (tmp_path / "in").mkdir()
    for i, dataset in enumerate(datasets):
        big_endian(dataset)
        dataset.save_as(
            tmp_path / "in" / f"{i}", implicit_vr=False, little_endian=False, force_encoding=True
        )
    assert_is_the_scan(prepare(tmp_path / "in"))


@pytest.mark.parametrize(
    "syntax", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"]
)
def test_compressed_dicom(tmp_path, syntax):
    gdcm = pytest.importorskip("gdcm")
    for path in write_dicom(tmp_path / "in", ct_datasets()):
        reader, change = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.SetFileName(str(path))
        assert writer.Write()
    assert_is_the_scan(prepare(tmp_path / "in"))


def test_enhanced_multi_frame_dicom(tmp_path):
    write_dicom(tmp_path / "in", [enhanced()])
    data = prepare(tmp_path / "in")
    assert_is_the_scan(data)
    assert {row["pixel_spacing"] for row in rows_of(data)} == {f"{SPACING:g}"}


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "RPI", "SLP", "PSR", "ALI"])
def test_nifti_of_any_orientation(tmp_path, codes):
    (tmp_path / "in").mkdir()
    nibabel.save(nifti(scan(), codes), tmp_path / "in" / "scan.nii.gz")
    data = prepare(tmp_path / "in")
    assert_is_the_scan(data)
    assert [float(row["position"]) for row in rows_of(data)] == [0, 0.25, 0.5, 0.75, 1]


def npy(folder):
    np.save(folder / "scan.npy", scan())


def npz(folder):
    np.savez_compressed(folder / "scan.npz", image=scan(), spacing=[1.0, 2.0, 3.0])


def mat5(folder):
    scipy.io.savemat(folder / "scan.mat", {"V": scan().transpose(1, 2, 0), "affine": np.eye(4)})


def mat73(folder):
    with h5py.File(folder / "scan.mat", "w", userblock_size=512) as file:
        file["V"] = scan().transpose(1, 2, 0).T  # MATLAB's axes are stored in reverse
    with open(folder / "scan.mat", "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64")


def tiff_stack(folder):
    tifffile.imwrite(folder / "scan.tif", scan().astype(np.float32))


def png_16_bit(folder):
    for i, hu in enumerate(scan()):
        Image.fromarray((hu + 1024).astype(np.uint16)).save(folder / f"slice_{8 + i}.png")
    scale = {"rescale_slope": 1, "rescale_intercept": -1024}
    (folder / "dataset.json").write_text(json.dumps(scale))


def tiff_16_bit(folder):
    png_16_bit(folder)
    for path in folder.glob("*.png"):
        tifffile.imwrite(path.with_suffix(".tif"), np.asarray(Image.open(path)), compression="lzw")
        path.unlink()


def npy_slices(folder):
    for i, hu in enumerate(scan()):
        np.save(folder / f"{i}.npy", hu)


@pytest.mark.parametrize(
    "write", [npy, npz, mat5, mat73, tiff_stack, png_16_bit, tiff_16_bit, npy_slices]
)
def test_arrays_and_pictures(tmp_path, write):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    data = prepare(tmp_path / "in")
    assert_is_the_scan(data)
    assert len({row["patient_id"] for row in rows_of(data)}) == 1


def test_8_bit_pictures_are_the_window(tmp_path):
    (tmp_path / "in").mkdir()
    for i, hu in enumerate(scan()):
        pixels = np.round(np.clip((hu + 1350) / 1500, 0, 1) * 255).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(tmp_path / "in" / f"{i}.png")
    data = prepare(tmp_path / "in", "--window", -1350, 150)
    np.testing.assert_allclose(volume_of(data), np.clip(scan(), -1350, 150), atol=4)


def test_axes_of_arrays_as_the_user_says(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "scan.npy", scan()[::-1].transpose(2, 0, 1)[::-1])
    assert_is_the_scan(prepare(tmp_path / "in", "--array_axes", "XZy"))


def test_the_variable_that_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in" / "scan.npz", image=scan(), other=scan()[::-1])
    assert_is_the_scan(prepare(tmp_path / "in", "--variable", "image"))


def test_a_label_csv_brings_patients_labels_split_and_contours(tmp_path, phantoms):
    data = prepare(phantoms, "--output_dir", tmp_path / "data", "--min_lung_area", 0)
    before = rows_of(phantoms)
    after = rows_of(data)
    assert len(after) == len(before) == 24
    assert len({row["patient_id"] for row in after}) == 12
    assert sorted(row["label"] for row in after) == sorted(row["label"] for row in before)


# Masks, sizes and styles.


def test_masks_beside_the_scans(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    half = lungs().copy()
    half[:, :, : SIZE // 2] = False
    nibabel.save(nifti(scan()), folder / "a.nii.gz")
    nibabel.save(nifti(half.astype(np.uint8) * 7, "RAS"), folder / "a_seg.nii.gz")
    data = prepare(folder, "--mask_suffix", "_seg")
    for row, truth in zip(rows_of(data), half, strict=True):
        np.testing.assert_array_equal(ct.read_contour(data / row["contour"])[0], truth)


def test_a_mask_that_is_not_finite_is_refused_as_such(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    nibabel.save(nifti(scan()), tmp_path / "in" / "a.nii")
    mask = lungs().astype(np.float32)
    mask[:, 0] = np.nan
    nibabel.save(nifti(mask), tmp_path / "in" / "a_mask.nii")
    with pytest.raises(ValueError, match="no slice is usable"):
        prepare(tmp_path / "in", "--mask_suffix", "_mask")
    assert "values are not finite" in capsys.readouterr().out


@pytest.mark.parametrize("shift", [(0, 0, 0), (12, 0, 0), (0, -12, 0), (0, 0, 12)])
def test_one_mask_for_a_folder_of_dicom(tmp_path, capsys, shift):
    datasets = ct_datasets()
    for dataset in datasets:
        prone(dataset)  # its rows begin at the patient's left and back
    write_dicom(tmp_path / "in", datasets)
    half = lungs().copy()
    half[:, : SIZE // 2] = False
    mask = nifti(half.astype(np.uint8))
    left, back = (180 + SPACING * (SIZE - 1) for _ in range(2))  # mm to the right and the front
    mask.affine[:3, 3] = np.array([left, back, 300 - 4 * 40.0]) + shift
    nibabel.save(nibabel.Nifti1Image(mask.dataobj, mask.affine), tmp_path / "in" / "x_seg.nii.gz")
    arguments = (tmp_path / "in", "--mask_suffix", "_seg", "--min_lung_area", 0.01)
    if any(shift):
        with pytest.raises(ValueError, match="no slice is usable"):
            prepare(*arguments)
        assert "expected the same place" in capsys.readouterr().out
        return
    data = prepare(*arguments)
    assert rows_of(data)
    for row in rows_of(data):
        number = int(row["image"][-8:-4])
        np.testing.assert_array_equal(ct.read_contour(data / row["contour"])[0], half[number])


@pytest.mark.parametrize("form", ["dicom", "nifti"])
def test_probabilities_are_cut_by_the_volume(tmp_path, form):
    """A slice that is unsure has no lung, and per cent are per cent in all slices."""
    (tmp_path / "in").mkdir()
    if form == "dicom":
        write_dicom(tmp_path / "in", ct_datasets())
    else:
        nibabel.save(nifti(scan()), tmp_path / "in" / "x.nii.gz")
    likely = lungs().astype(np.float32) * 90.5
    likely[1] *= 0.4
    mask = nifti(likely)
    mask.affine[:3, 3] = [180, 180, 300 - 4 * 40.0] if form == "dicom" else mask.affine[:3, 3]
    mask = nibabel.Nifti1Image(mask.dataobj, mask.affine)
    nibabel.save(mask, tmp_path / "in" / "x_seg.nii.gz")
    data = prepare(tmp_path / "in", "--mask_suffix", "_seg", "--min_lung_area", 0.01)
    assert [int(row["image"][-8:-4]) for row in rows_of(data)] == [0, 2, 3, 4]


def test_a_mask_of_a_multi_frame_file(tmp_path, capsys):
    folder = tmp_path / "in"
    (path,) = write_dicom(folder, [enhanced()])
    half = lungs().copy()
    half[:, : SIZE // 2] = False
    mask = nifti(half.astype(np.uint8))
    mask.affine[:3, 3] = 180, 180, 0
    nibabel.save(nibabel.Nifti1Image(mask.dataobj, mask.affine), f"{path}_seg.nii.gz")
    data = prepare(folder, "--mask_suffix", "_seg", "--min_lung_area", 0)
    for row, truth in zip(rows_of(data), half, strict=True):
        np.testing.assert_array_equal(ct.read_contour(data / row["contour"])[0], truth)
    Path(f"{path}_seg.nii.gz").unlink()
    Image.fromarray(half[0].astype(np.uint8)).save(f"{path}_seg.png")
    prepare(folder, "--mask_suffix", "_seg", "--min_lung_area", 0)
    assert "one slice, expected a NIfTI volume for several frames" in capsys.readouterr().out


def test_outlines(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    filled = prepare(tmp_path / "in")
    drawn = prepare(
        tmp_path / "in", "--output_dir", tmp_path / "lines", "--contour_style", "outline",
        "--key_file", tmp_path / "data.key",
    )  # fmt: skip
    for line, mask in zip(rows_of(drawn), rows_of(filled), strict=True):
        outline = ct.read_contour(drawn / line["contour"])
        assert ct.contour_style(outline) == "outline"
        np.testing.assert_array_equal(
            ct.fill_outline(outline), ct.read_contour(filled / mask["contour"])
        )


def test_a_fixed_spacing_pads_and_crops(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    data = prepare(tmp_path / "in", "--spacing", 2 * SPACING, "--min_lung_area", 0)
    small = volume_of(data)
    q = SIZE // 4
    blocks = scan().reshape(-1, SIZE // 2, 2, SIZE // 2, 2).mean((2, 4))
    np.testing.assert_allclose(small[:, q:-q, q:-q], blocks, atol=1)
    assert (small[:, :q] == -1000).all()
    assert {row["pixel_spacing"] for row in rows_of(data)} == {f"{2 * SPACING:g}"}


def test_slices_whose_lungs_do_not_fit_are_left_out(tmp_path, capsys):
    write_dicom(tmp_path / "in", ct_datasets())
    with pytest.raises(ValueError, match="no slice is usable"):
        prepare(tmp_path / "in", "--spacing", SPACING / 3)
    assert "lungs reach beyond the image" in capsys.readouterr().out


def test_slices_with_little_lung_are_left_out(tmp_path, capsys):
    write_dicom(tmp_path / "in", ct_datasets())
    areas = lungs().mean((1, 2))
    limit = float(np.sort(areas)[1:3].mean())
    data = prepare(tmp_path / "in", "--min_lung_area", limit)
    assert len(rows_of(data)) == 3
    assert f"2  less lung than {limit:g}" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["dicom", "turned dicom", "nifti"])
def test_pixels_that_are_not_square_and_slices_that_are_not(tmp_path, form):
    """Every second row alone, cut at the sides: rows are 2 * SPACING apart; so is the mask."""
    (tmp_path / "in").mkdir()
    flat, mask = scan()[:, ::2, 4:-4], np.roll(lungs(), 3, axis=2)[:, ::2, 4:-4]
    if form == "nifti":
        spacing = (2 * SPACING, SPACING)
        nibabel.save(nifti(flat, "RAS", spacing), tmp_path / "in" / "a.nii")
        nibabel.save(nifti(mask.astype(np.uint8), "LPS", spacing), tmp_path / "in" / "a_m.nii")
    else:
        datasets = []
        for i, hu in enumerate(flat):
            changes = {"PixelSpacing": [2 * SPACING, SPACING]}
            if form == "turned dicom":
                hu = hu.T
                changes = {"PixelSpacing": [SPACING, 2 * SPACING]}
                changes["ImageOrientationPatient"] = [0, 1, 0, 1, 0, 0]
            datasets.append(ct_dataset(np.ascontiguousarray(hu), -40 * i, **changes))
        for path, part in zip(write_dicom(tmp_path / "in", datasets), mask, strict=True):
            part = part.T if form == "turned dicom" else part
            Image.fromarray(part.astype(np.uint8) * 255).save(f"{path}_m.png")
    data = prepare(tmp_path / "in", "--mask_suffix", "_m", "--min_lung_area", 0)
    assert {float(row["pixel_spacing"]) for row in rows_of(data)} == {SPACING}
    found = volume_of(data)
    assert (found[:, :, :4] == -1000).all() and (found[:, :, -4:] == -1000).all()
    inner = found[:, 2:-2, 4:-4]
    expected = (scan()[:, ::2].repeat(2, axis=1))[:, 2:-2, 4:-4]
    assert np.abs(inner - expected).mean() < 60  # rows between are interpolated
    assert np.abs(inner[:, ::-1] - expected).mean() > 100
    for row, truth in zip(rows_of(data), np.roll(lungs(), 3, axis=2), strict=True):
        contour = ct.read_contour(data / row["contour"])[0]
        assert 2 * (contour & truth).sum() / (contour.sum() + truth.sum()) > 0.87


def test_a_table_brings_positions_and_spacing(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    png_16_bit(folder)
    lines = [f"slice_{8 + i}.png,p,{0.9 - i / 10},{SPACING}" for i in range(5)]
    (folder / "label.csv").write_text(
        "\n".join(["image,patient_id,position,pixel_spacing", *lines])
    )
    data = prepare(folder, "--spacing", SPACING)
    assert [float(row["position"]) for row in rows_of(data)] == [0.9, 0.8, 0.7, 0.6, 0.5]
    hu = np.stack([ct.read_hu(data / r["image"], ct.read_rescale(data)) for r in rows_of(data)])
    np.testing.assert_allclose(hu, scan(), atol=1)


def test_metal_stays_bright(tmp_path):
    (tmp_path / "in").mkdir()
    volume = scan().astype(np.float32)
    volume[:, 30:32, 30:32] = 60000
    nibabel.save(nifti(volume), tmp_path / "in" / "a.nii")
    assert (volume_of(prepare(tmp_path / "in"))[:, 30:32, 30:32] > 30000).all()


# Patients.


def test_nothing_of_the_patient_reaches_the_output(tmp_path):
    write_dicom(tmp_path / "Muster Erika" / "MRN-4711", ct_datasets())
    nibabel.save(nifti(scan(1)), tmp_path / "Muster Erika" / "Hans_Meier.nii.gz")
    labels = tmp_path / "diagnoses.csv"
    labels.write_text("patient_id,label\nMRN-4711,fibrosis\nHans_Meier,normal\n")
    data = prepare(tmp_path / "Muster Erika", "--labels", labels)
    assert sorted(row["label"] for row in rows_of(data)) == ["fibrosis"] * 5 + ["normal"] * 5
    secrets = ["4711", "Muster", "Erika", "Meier", "Hans", "1.2.3", "1950", "Elsewhere", "IM00"]
    for name, content in outputs(data).items():
        for secret in secrets:
            assert secret not in name and secret.encode() not in content, f"{secret} in {name}"
    key = (tmp_path / "data.key").read_text().strip()
    assert key.encode() not in b"".join(outputs(data).values())
    assert stat.S_IMODE((tmp_path / "data.key").stat().st_mode) == 0o600


def test_the_same_key_gives_the_same_names_and_another_key_others(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    one = prepare(tmp_path / "in", "--output_dir", tmp_path / "one")
    key = tmp_path / "one.key"
    two = prepare(tmp_path / "in", "--output_dir", tmp_path / "two", "--key_file", key)
    three = prepare(tmp_path / "in", "--output_dir", tmp_path / "three")
    assert outputs(one) == outputs(two)
    assert not {r["patient_id"] for r in rows_of(one)} & {r["patient_id"] for r in rows_of(three)}


def test_a_patients_series_stay_one_patient(tmp_path):
    write_dicom(tmp_path / "in" / "a", ct_datasets(0))
    write_dicom(tmp_path / "in" / "b", ct_datasets(1, SeriesInstanceUID="1.2.9"))
    data = prepare(tmp_path / "in")
    assert len(rows_of(data)) == 10
    assert len({row["patient_id"] for row in rows_of(data)}) == 1


def test_volumes_of_one_name_are_patients_by_their_folders(tmp_path):
    for i in range(3):
        (tmp_path / "in" / f"pat{i}").mkdir(parents=True)
        nibabel.save(nifti(scan(i)), tmp_path / "in" / f"pat{i}" / "ct.nii.gz")
    (tmp_path / "labels.csv").write_text("patient_id,label\npat0,a\npat1,b\npat2,c\n")
    data = prepare(tmp_path / "in", "--labels", tmp_path / "labels.csv")
    assert len({row["patient_id"] for row in rows_of(data)}) == 3
    assert {row["label"] for row in rows_of(data)} == {"a", "b", "c"}


def test_the_same_slices_are_not_taken_twice_under_two_names(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        npy_slices(tmp_path / "in" / name)
        nibabel.save(nifti(scan(1)), tmp_path / "in" / name / f"{name}.nii")
    data = prepare(tmp_path / "in")
    assert len(rows_of(data)) == 10
    assert "6  a copy" in capsys.readouterr().out


def test_single_slices_in_nifti_are_one_patient_by_folder(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(5):
        nibabel.save(nifti(scan()[i : i + 1]), tmp_path / "in" / f"{i}.nii")
    data = prepare(tmp_path / "in")
    assert len({row["patient_id"] for row in rows_of(data)}) == 1
    assert len(rows_of(data)) == 5


def test_other_programs_dataset_json_is_no_scale(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "dataset.json").write_text('{"labels": {"lung": 1}}')
    nibabel.save(nifti(scan()), tmp_path / "in" / "a.nii")
    npy(tmp_path / "in")
    assert len(rows_of(prepare(tmp_path / "in"))) == 10


def test_an_earlier_output_is_no_input(tmp_path, capsys):
    write_dicom(tmp_path / "in" / "a", ct_datasets())
    prepare(tmp_path / "in", "--output_dir", tmp_path / "in" / "data")
    second = prepare(tmp_path / "in", "--output_dir", tmp_path / "second")
    assert len(rows_of(second)) == 5
    assert "an output of prepare_data.py" in capsys.readouterr().out


def test_synthetic_slices_are_no_patient(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    export.write_slice(tmp_path / "in" / "s.dcm", ct.hu_to_unit(scan()[2]), (-1000, 400), "dicom")
    with pytest.raises(ValueError, match="no CT found"):
        prepare(tmp_path / "in")


def test_a_pattern_finds_the_patient_in_paths(tmp_path):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("p1_base", "p1_followup", "p2_base")):
        nibabel.save(nifti(scan(i)), tmp_path / "in" / f"{name}.nii")
    data = prepare(tmp_path / "in", "--patient_pattern", r"(p\d+)_")
    assert len({row["patient_id"] for row in rows_of(data)}) == 2


def test_from_python(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    labels = {"MRN-4711": "fibrosis", "nobody": "normal"}
    arguments = ([tmp_path / "in"], tmp_path / "data", Settings(image_size=SIZE))
    first = preparation.prepare(*arguments, labels=labels)
    assert first.rows == rows_of(tmp_path / "data")
    assert {row["label"] for row in first.rows} == {"fibrosis"}
    assert [(one.found, one.masks, one.error) for one in first.prepared["dicom"]] == [(5, 0, None)]
    assert (first.unchanged, first.left_out) == (0, [])
    assert first.notes == ["1 patients of --labels are in no input: nobody"]
    assert first.key_file.is_file() and first.report.is_file()
    second = preparation.prepare(*arguments)
    assert (second.rows, second.prepared, second.unchanged) == (first.rows, {}, 1)


# Again, in parallel, interrupted.


def times(data: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in data.rglob("*.png")}


def test_run_again_it_does_only_what_is_new(tmp_path, capsys):
    write_dicom(tmp_path / "in" / "a", ct_datasets())
    data = prepare(tmp_path / "in")
    before = times(data)
    write_dicom(tmp_path / "in" / "b", ct_datasets(1, PatientID="new", SeriesInstanceUID="1.9"))
    capsys.readouterr()
    prepare(tmp_path / "in")
    assert "1 series new or changed, 1 unchanged" in capsys.readouterr().out
    after = times(data)
    assert before.items() <= after.items() and len(after) == 2 * len(before)
    assert len(rows_of(data)) == 10
    prepare(tmp_path / "in")
    assert times(data) == after


def test_files_that_moved_are_not_taken_twice(tmp_path):
    (tmp_path / "in").mkdir()
    nibabel.save(nifti(scan()), tmp_path / "in" / "a.nii.gz")
    data = prepare(tmp_path / "in")
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    prepare(tmp_path / "elsewhere")
    assert len(rows_of(data)) == 5


def test_a_series_that_changed_is_made_anew(tmp_path):
    paths = write_dicom(tmp_path / "in", ct_datasets())
    data = prepare(tmp_path / "in")
    paths[-1].unlink()
    prepare(tmp_path / "in")
    assert len(rows_of(data)) == 4
    assert len(list((data / "images").iterdir())) == 4


def test_a_corrected_file_takes_the_place_of_the_old_one(tmp_path):
    (tmp_path / "in").mkdir()
    nibabel.save(nifti(scan(1)), tmp_path / "in" / "a.nii")
    data = prepare(tmp_path / "in")
    nibabel.save(nifti(scan()), tmp_path / "in" / "a.nii")
    prepare(tmp_path / "in")
    assert_is_the_scan(data)
    assert len(list((data / "images").iterdir())) == 5


def test_a_folder_that_lost_its_first_slice_is_not_taken_twice(tmp_path, capsys):
    (tmp_path / "in" / "p").mkdir(parents=True)
    npy_slices(tmp_path / "in" / "p")
    data = prepare(tmp_path / "in")
    (tmp_path / "in" / "p" / "0.npy").unlink()
    prepare(tmp_path / "in")
    assert len(rows_of(data)) == 4
    assert "1 of the files that an earlier run found are gone" in capsys.readouterr().out
    prepare(tmp_path / "in" / "p")  # by another way
    assert len(rows_of(data)) == 4


def test_one_series_uid_of_two_patients_in_two_runs_loses_nobody(tmp_path):
    write_dicom(tmp_path / "one", ct_datasets())
    write_dicom(tmp_path / "two", ct_datasets(1, PatientID="other"))
    data = prepare(tmp_path / "one")
    prepare(tmp_path / "two", "--output_dir", data)
    assert len(rows_of(data)) == 10
    assert len({row["patient_id"] for row in rows_of(data)}) == 2


def blank_and_slices(folder: Path, seed: int) -> None:
    """One blank slice, the same in all folders, and a scan of one's own."""
    folder.mkdir(parents=True)
    np.save(folder / "00.npy", np.full((SIZE, SIZE), -1024.0, np.float32))
    for i, hu in enumerate(scan(seed)):
        np.save(folder / f"{i + 1:02d}.npy", hu)


def test_a_slice_that_two_patients_share_deletes_neither(tmp_path):
    for patient, seed in ("a", 0), ("b", 1):
        blank_and_slices(tmp_path / f"in_{patient}" / patient, seed)
        data = prepare(tmp_path / f"in_{patient}", "--output_dir", tmp_path / "data")
    for _ in range(2):
        assert len(rows_of(data)) == 10
        assert len({row["patient_id"] for row in rows_of(data)}) == 2
        prepare(tmp_path / "in_a", "--output_dir", data)


def datasets_of_shared_uids(patient: int) -> list:
    """A patient's series, whose slices have the SOPInstanceUIDs of other patients' slices."""
    names = {"PatientID": f"p{patient}", "SeriesInstanceUID": f"1.2.{patient + 1}"}
    datasets = ct_datasets(patient, **names)
    for k, dataset in enumerate(datasets):
        dataset.SOPInstanceUID = f"1.2.3.{k + 1}"
    return datasets


def test_series_that_share_their_uids_are_kept_however_often_it_runs(tmp_path):
    for i in range(3):
        write_dicom(tmp_path / "in" / str(i), datasets_of_shared_uids(i))
    for _ in range(2):
        data = prepare(tmp_path / "in")
        assert len(rows_of(data)) == 15
    prepare(tmp_path / "in" / "1", "--output_dir", data)
    assert len({row["patient_id"] for row in rows_of(data)}) == 3


def test_patients_that_share_their_uids_in_two_runs_are_both_kept(tmp_path):
    for i in range(2):
        write_dicom(tmp_path / f"in_{i}", datasets_of_shared_uids(i))
        data = prepare(tmp_path / f"in_{i}", "--output_dir", tmp_path / "data")
    assert len(rows_of(data)) == 10
    assert len({row["patient_id"] for row in rows_of(data)}) == 2


def test_a_folder_that_moved_and_grew_is_not_taken_twice(tmp_path):
    (tmp_path / "in" / "p").mkdir(parents=True)
    npy_slices(tmp_path / "in" / "p")
    data = prepare(tmp_path / "in")
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    np.save(tmp_path / "elsewhere" / "p" / "9.npy", scan(1)[2])
    prepare(tmp_path / "elsewhere")
    assert len(rows_of(data)) == 6


def test_two_patients_whose_files_change_places_are_both_kept(tmp_path):
    (tmp_path / "in").mkdir()
    first, second = (tmp_path / "in" / f"{name}.nii" for name in "ab")
    nibabel.save(nifti(scan()), first)
    nibabel.save(nifti(scan(1)), second)
    prepare(tmp_path / "in")
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    data = prepare(tmp_path / "in")
    assert len(rows_of(data)) == 10
    assert len({row["patient_id"] for row in rows_of(data)}) == 2


def test_records_that_identify_files_as_before_are_brought_up_to_date(tmp_path, capsys):
    write_dicom(tmp_path / "in", ct_datasets())
    data = prepare(tmp_path / "in")
    (file,) = (data / "series").iterdir()
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "contents": ["of an earlier version"]}))
    capsys.readouterr()
    prepare(tmp_path / "in")
    assert json.loads(file.read_text()) == record
    assert "gone" not in capsys.readouterr().out


def test_labels_of_patients_who_are_prepared_already_are_taken(tmp_path):
    """Also where the inputs of this run have none of them."""
    write_dicom(tmp_path / "one", ct_datasets())
    write_dicom(tmp_path / "two", ct_datasets(1, PatientID="other", SeriesInstanceUID="1.9"))
    (tmp_path / "labels.csv").write_text("patient_id,label\nMRN-4711,mild\n")
    data = prepare(tmp_path / "one")
    prepare(tmp_path / "two", "--output_dir", data, "--labels", tmp_path / "labels.csv")
    assert sorted(row["label"] for row in rows_of(data)) == [""] * 5 + ["mild"] * 5


def test_what_takes_the_place_of_another_record_is_named(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    nibabel.save(nifti(scan()), tmp_path / "in" / "a.nii.gz")
    prepare(tmp_path / "in")
    (tmp_path / "in" / "a.nii.gz").rename(tmp_path / "in" / "b.nii.gz")
    data = prepare(tmp_path / "in")
    assert len(rows_of(data)) == 5
    assert "were prepared before under another name or place" in capsys.readouterr().out


def test_a_pattern_that_changes_renames_and_does_not_double(tmp_path):
    (tmp_path / "in").mkdir()
    nibabel.save(nifti(scan()), tmp_path / "in" / "p1_base.nii")
    data = prepare(tmp_path / "in")
    first = {row["patient_id"] for row in rows_of(data)}
    prepare(tmp_path / "in", "--patient_pattern", r"(p\d+)_")
    assert len(rows_of(data)) == 5
    assert first.isdisjoint(row["patient_id"] for row in rows_of(data))


def test_labels_of_other_patients_alone_are_refused_before_work(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    (tmp_path / "labels.csv").write_text("patient_id,label\nP1,a\n")
    with pytest.raises(ValueError, match=r"none of its 1 patients \(P1\).*named MRN-4711"):
        prepare(tmp_path / "in", "--labels", tmp_path / "labels.csv")
    assert not (tmp_path / "data").exists()


def test_8_bit_pictures_without_a_scale_are_told(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i, hu in enumerate(scan()):
        unit = np.round((ct.hu_to_unit(hu) + 1) * 127.5).astype(np.uint8)
        Image.fromarray(unit).save(tmp_path / "in" / f"{i}.png")
    prepare(tmp_path / "in")
    assert "those of 8 bits are taken as -1000 to 400 HU" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["dicom", "nifti"])
def test_a_changed_mask_is_seen(tmp_path, form):
    if form == "dicom":
        write_dicom(tmp_path / "in", ct_datasets())
        mask = tmp_path / "in" / "IM000_m.png"
    else:
        (tmp_path / "in").mkdir()
        nibabel.save(nifti(scan()), tmp_path / "in" / "a.nii")
        mask = tmp_path / "in" / "a_m.nii"

    def write(lung):
        if form == "dicom":
            Image.fromarray(lung[0].astype(np.uint8)).save(mask)
        else:
            nibabel.save(nifti(lung.astype(np.uint8)), mask)

    write(lungs())
    data = prepare(tmp_path / "in", "--mask_suffix", "_m", "--min_lung_area", 0)
    write(np.roll(lungs(), 5, axis=1))
    prepare(tmp_path / "in", "--mask_suffix", "_m", "--min_lung_area", 0)
    contour = ct.read_contour(data / rows_of(data)[0]["contour"])[0]
    np.testing.assert_array_equal(contour, np.roll(lungs()[0], 5, axis=0))


def test_a_deleted_image_is_made_again(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    data = prepare(tmp_path / "in")
    before = outputs(data)
    next((data / "images").iterdir()).unlink()
    prepare(tmp_path / "in")
    assert outputs(data) == before


def test_the_report_keeps_what_is_not_looked_at_again(tmp_path):
    write_dicom(tmp_path / "in" / "a", ct_datasets())
    prepare(tmp_path / "in", "--min_lung_area", 0.12)
    report = tmp_path / "data.left_out.csv"
    before = report.read_text()
    assert before.count("less lung than") > 0
    prepare(tmp_path / "in", "--min_lung_area", 0.12)
    assert report.read_text() == before
    assert stat.S_IMODE(report.stat().st_mode) == 0o600


def test_an_edited_table_is_kept_beside_the_new_one(tmp_path, capsys):
    write_dicom(tmp_path / "in", ct_datasets())
    data = prepare(tmp_path / "in")
    (data / "label.csv").write_text("image;contour\n")
    prepare(tmp_path / "in")
    assert len(rows_of(data)) == 5
    assert (data / "label.edited.csv").read_text() == "image;contour\n"
    assert "was edited" in capsys.readouterr().out


def test_two_runs_at_once_are_refused(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    with (
        disk.locked(tmp_path / "data"),
        pytest.raises(ValueError, match="data: another process is writing to it"),
    ):
        prepare(tmp_path / "in")


def test_labels_are_kept_and_can_be_changed(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    labels = tmp_path / "labels.csv"
    labels.write_text("who,label\nMRN-4711,mild\n")
    data = prepare(tmp_path / "in", "--labels", labels)
    prepare(tmp_path / "in")
    assert {row["label"] for row in rows_of(data)} == {"mild"}
    labels.write_text("who,label\nMRN-4711,severe\n")
    prepare(tmp_path / "in", "--labels", labels)
    assert {row["label"] for row in rows_of(data)} == {"severe"}


def test_two_processes_make_what_one_makes(tmp_path):
    for patient in range(3):
        write_dicom(
            tmp_path / "in" / str(patient),
            ct_datasets(patient, PatientID=f"P{patient}", SeriesInstanceUID=f"1.2.{patient}"),
        )
    one = prepare(tmp_path / "in", "--output_dir", tmp_path / "one")
    two = prepare(
        tmp_path / "in", "--output_dir", tmp_path / "two", "--key_file", tmp_path / "one.key",
        "--num_workers", 2,
    )  # fmt: skip
    assert outputs(one) == outputs(two)


def test_overwrite_makes_all_anew(tmp_path):
    write_dicom(tmp_path / "in", ct_datasets())
    data = prepare(tmp_path / "in")
    prepare(tmp_path / "in", "--overwrite", "--image_size", 32)
    assert volume_of(data).shape == (5, 32, 32)
    assert len(list((data / "images").iterdir())) == 5


def test_killed_anywhere_and_run_again_it_ends_as_if_undisturbed(tmp_path, monkeypatch):
    for patient in range(3):
        write_dicom(
            tmp_path / "in" / str(patient),
            ct_datasets(patient, PatientID=f"P{patient}", SeriesInstanceUID=f"1.2.{patient}"),
        )
    (tmp_path / "in" / "2" / "IM000").rename(tmp_path / "IM000")
    prepare(tmp_path / "in")  # an earlier state, of which a series changes below
    (tmp_path / "IM000").rename(tmp_path / "in" / "2" / "IM000")
    (tmp_path / "key").write_text((tmp_path / "data.key").read_text())

    class Killed(BaseException):
        pass

    real, left = disk.write_atomically, 0

    def write_atomically(path, write):
        nonlocal left
        left -= 1
        if left == 0:
            write(path.with_name(f".tmp_{path.name}"))  # the file is there, its name is not
            raise Killed
        real(path, write)

    # The report, an image, a contour, the record; then, with it, the table and the report again.
    for writes in (2, 3, 8, 13, 14, 4, 7):
        left = writes
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(disk, "write_atomically", write_atomically)
            prepare(tmp_path / "in")
    data = prepare(tmp_path / "in")
    assert len(rows_of(data)) == 15
    undisturbed = prepare(
        tmp_path / "in", "--output_dir", tmp_path / "once", "--key_file", tmp_path / "key"
    )
    assert outputs(data) == outputs(undisturbed)


def test_interrupted_it_keeps_what_is_done_and_goes_on(tmp_path, monkeypatch, capsys):
    for patient in range(3):
        changes = {"PatientID": f"P{patient}", "SeriesInstanceUID": f"1.2.{patient}"}
        write_dicom(tmp_path / "in" / str(patient), ct_datasets(patient, **changes))
    real = slices.prepare_series

    def prepare_series(series, *arguments):
        if series.patient == "P1":
            raise KeyboardInterrupt
        return real(series, *arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(slices, "prepare_series", prepare_series)
        prepare(tmp_path / "in")
    assert stop.value.code == 130
    assert (
        "interrupted: 1 of 3 series are done; the same command goes on" in capsys.readouterr().out
    )
    assert len(rows_of(tmp_path / "data")) == 5
    prepare(tmp_path / "in")
    assert "2 series new or changed, 1 unchanged" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "data")) == 15


# Real CT.


def test_three_kinds_of_real_input_in_one_command(tmp_path, ct_folder, without_weights, capsys):
    (tmp_path / "data.key").write_text("0" * 64)  # names, and so splits, that do not change
    data = prepare(
        ct_folder / "lungs", ct_folder / "ipf_dicom", ct_folder / "volumes", "--image_size", 64,
        "--mask_suffix", "_lung_mask", "--output_dir", tmp_path / "data",
    )  # fmt: skip
    rows = rows_of(data)
    assert len({row["patient_id"] for row in rows}) == 203
    assert len(rows) > 280
    check_data = load("check_data")
    check_data.main(check_data.parse_args([str(data)]))  # errors would raise SystemExit
    assert "kinds of errors: 0" in capsys.readouterr().out
    assert (data / "contact_sheet.png").is_file()
    run = tmp_path / "vae"
    table = ["--csv_file", str(data / "label.csv"), "--img_dir", str(data)]
    arguments = [*table, "--save_dir", str(run), *QUICK, *TINY_VAE, "--steps", "3"]
    train_vae.main(train_vae.parse_args(arguments))
    assert (run / "vae_best.pth").is_file()


@pytest.mark.parametrize("form", ["png", "dicom"])
def test_masks_of_a_slice_each_are_cut_alike(tmp_path, form):
    """An apex of few and low probabilities is no label map."""
    folder = tmp_path / "in"
    if form == "png":
        folder.mkdir()
        png_16_bit(folder)
        stems = [f"slice_{8 + i}" for i in range(5)]
    else:
        stems = [path.name for path in write_dicom(folder, ct_datasets())]
    ramp = np.linspace(0.6, 1, SIZE)[None]
    for i, (name, mask) in enumerate(zip(stems, lungs(), strict=True)):
        likely = mask * ramp * 255 * (0.04 if i == 0 else 1)
        Image.fromarray(np.round(likely).astype(np.uint8)).save(folder / f"{name}_seg.png")
    data = prepare(folder, "--mask_suffix", "_seg", "--min_lung_area", 0.001)
    assert [int(row["image"][-8:-4]) for row in rows_of(data)] == [1, 2, 3, 4]


def test_masks_that_mark_nothing_are_said(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    nibabel.save(nifti(scan()), tmp_path / "in" / "a.nii")
    nibabel.save(nifti(np.zeros((5, SIZE, SIZE), np.uint8)), tmp_path / "in" / "a_seg.nii")
    with pytest.raises(ValueError, match="no slice is usable"):
        prepare(tmp_path / "in", "--mask_suffix", "_seg")
    assert "its 5 masks mark nothing" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["all", "jpeg"])
def test_masks_that_mark_all_are_left_out_and_jpeg_ones_are_taken(tmp_path, capsys, kind):
    (tmp_path / "in").mkdir()
    png_16_bit(tmp_path / "in")
    half = lungs().copy()
    half[:, :, : SIZE // 2] = False
    for i, mask in enumerate(np.ones_like(half) if kind == "all" else half):
        path = tmp_path / "in" / f"slice_{8 + i}_seg{'.png' if kind == 'all' else '.jpg'}"
        Image.fromarray(mask * np.uint8(255)).save(path, quality=95)
    options = (tmp_path / "in", "--mask_suffix", "_seg", "--min_lung_area", 0.01)
    if kind == "all":
        with pytest.raises(ValueError, match="no slice is usable"):
            prepare(*options)
        assert "every pixel is marked" in capsys.readouterr().out
        return
    data = prepare(*options)
    for row, truth in zip(rows_of(data), half, strict=True):
        assert (ct.read_contour(data / row["contour"])[0] != truth).mean() < 0.01
