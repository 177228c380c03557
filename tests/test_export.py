"""Samples out of sample.py, in every format: HU, spacing, DICOM's marks, styles of contours."""

import csv
import json
import shutil
import subprocess
import warnings
from pathlib import Path

import gdcm
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from conftest import controlnet_options, sample_options, unet_options
from PIL import Image

import encode_dataset
import fibldm
import sample
import train_controlnet
import train_ldm_unet
from fibldm import ct, export
from fibldm.checkpoint import load_model
from fibldm.conditions import read_contours
from fibldm.encoding import LatentDataset
from fibldm.synthesis import Synthesizer
from fibldm.unet import UNet

pytestmark = pytest.mark.usefixtures("without_weights")


def run(script, arguments):
    script.main(script.parse_args([str(a) for a in arguments]))


def draw(stages: Path, folder: Path, *more) -> Path:
    wanted = ["--latent_data_dir", stages / "latents", *more]
    run(sample, sample_options(stages, folder, *wanted))
    return folder


def read_without_our_reader(path: Path) -> np.ndarray:
    """HU (H, W) by the format's own library and what stands in the file, or beside it."""
    if path.suffix == ".dcm":
        dataset = pydicom.dcmread(path)
        return dataset.pixel_array * dataset.RescaleSlope + dataset.RescaleIntercept
    if path.suffix == ".gz":
        return np.asarray(nibabel.load(path).dataobj)[:, :, 0].T
    if path.suffix == ".npy":
        return np.load(path)
    scale = json.loads((path.parent / "dataset.json").read_text())
    stored = np.asarray(Image.open(path))
    assert stored.dtype == np.uint16
    return stored * scale["rescale_slope"] + scale["rescale_intercept"]


@pytest.fixture(scope="module")
def drawn(stages, tmp_path_factory, without_weights) -> dict[str, Path]:
    """Five samples in each format, two at a time."""
    folder = tmp_path_factory.mktemp("drawn")
    more = ["--num_samples", "5", "--batch_size", "2", "--pixel_spacing", "0.75"]
    return {
        name: draw(stages, folder / name, *more, "--format", name, "--label", "fibrosis")
        for name in export.FORMATS
    }


def test_weights_of_labels(stages, tmp_path):
    """All of one class is that class; what lies between is neither; the table says what it is."""
    asked = {
        "fibrosis": ["fibrosis"],
        "all": ["fibrosis=1"],
        "between": ["normal=0.5", "fibrosis=0.5"],
        "normal": ["normal"],
    }
    images, more = {}, ["--num_samples", "2", "--format", "npy", "--guidance_scale", "4"]
    for name, words in asked.items():
        folder = draw(stages, tmp_path / name, *more, "--label", *words)
        images[name] = np.stack([np.load(path) for path in samples(folder)])
        table = (folder / "samples.csv").read_text().splitlines()
        assert [row["label"] for row in csv.DictReader(table)] == [" ".join(words)] * 2
    np.testing.assert_allclose(images["all"], images["fibrosis"], atol=0.01)
    assert np.abs(images["between"] - images["fibrosis"]).max() > 0.03
    assert np.abs(images["between"] - images["normal"]).max() > 0.03


def test_each_slice_is_asked_for_once_however_many_views_it_has(stages, tmp_path):
    data = LatentDataset(stages / "latents")
    slices = data.indices("train", views=False)
    assert len(data.indices("train")) == 8 * len(slices)
    folder = draw(stages, tmp_path / "train", "--split", "train", "--steps", "1")
    assert len(samples(folder)) == len(slices)


def samples(folder: Path) -> list[Path]:
    return sorted(folder.glob("sample_*"))


@pytest.mark.parametrize("file_format", export.FORMATS)
def test_what_is_read_back_is_what_was_sampled_to_1_hu(file_format, drawn, stages, monkeypatch):
    """Sampled: what the VAE decodes to, caught before it is written."""
    sampled = {}
    write_slice = export.write_slice

    def watched(path, image, *rest):
        sampled[path] = image
        write_slice(path, image, *rest)

    monkeypatch.setattr(export, "write_slice", watched)
    folder = drawn[file_format].parent / f"{file_format}_again"
    more = ["--num_samples", "5", "--batch_size", "2", "--format", file_format]
    draw(stages, folder, *more, "--label", "fibrosis")
    files = samples(drawn[file_format])
    assert len(files) == len(sampled) == 5
    for file, image in zip(files, sampled.values(), strict=True):
        hu = (image.astype(np.float64) + 1) * 700 - 1000
        assert hu.max() - hu.min() > 20  # not a blank that any reading would give back
        for read in (
            read_without_our_reader(file),
            ct.read_hu(file, ct.read_rescale(file.parent)),
        ):
            np.testing.assert_allclose(read, hu, rtol=0, atol=1)


def test_png_samples_are_a_data_set_that_is_read_as_hu(drawn):
    assert ct.read_dataset_info(drawn["png"]) == ct.DatasetInfo((1400 / 65535, -1000.0), 0.75)
    assert Image.open(drawn["png"] / "grid.png").mode == "RGB"
    for name in "npy", "nifti", "dicom":
        assert not (drawn[name] / "dataset.json").exists()


@pytest.mark.parametrize("file_format", ["npy", "nifti", "dicom"])
def test_the_grid_shows_the_same_samples_whatever_the_format(file_format, drawn):
    grids = [Image.open(drawn[name] / "grid.png").convert("L") for name in ("png", file_format)]
    png, other = (np.asarray(grid, dtype=int) for grid in grids)
    assert png.std() > 20 and np.abs(png - other).max() <= 2


def test_another_format_leaves_no_scale_of_the_last(stages, tmp_path):
    folder = draw(stages, tmp_path / "out", "--num_samples", "2", "--format", "png")
    assert (folder / "dataset.json").is_file()
    draw(stages, folder, "--num_samples", "1", "--format", "npy", "--overwrite")
    names = ["args.json", "grid.png", "sample_00000.npy", "samples.csv"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_the_scale_of_other_images_is_not_overwritten(stages, phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "data")
    before = (tmp_path / "data" / "dataset.json").read_bytes()
    with pytest.raises(ValueError, match=r"data holds a dataset\.json of other images"):
        draw(stages, tmp_path / "data", "--num_samples", "1", "--overwrite")
    assert (tmp_path / "data" / "dataset.json").read_bytes() == before


@pytest.mark.parametrize("file_format", export.FORMATS)
def test_the_same_command_writes_the_same_bytes(file_format, drawn, stages, tmp_path):
    more = ["--num_samples", "5", "--batch_size", "2", "--pixel_spacing", "0.75"]
    draw(stages, tmp_path, *more, "--format", file_format, "--label", "fibrosis")
    for file in samples(drawn[file_format]):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_does_not_show(batch_size, drawn, stages, tmp_path):
    more = ["--num_samples", "5", "--batch_size", batch_size, "--label", "fibrosis"]
    draw(stages, tmp_path, *more, "--format", "dicom")
    files = samples(tmp_path)
    assert [file.name for file in files] == [f"sample_{i:05d}.dcm" for i in range(5)]
    for file, other in zip(files, samples(drawn["dicom"]), strict=True):
        a, b = (read_without_our_reader(path) for path in (file, other))
        np.testing.assert_allclose(a, b, atol=1)
    studies = {pydicom.dcmread(file).StudyInstanceUID for file in [*files, other]}
    assert len(studies) == 1  # the same run, however it was cut


# DICOM


def test_dciodvfy_passes_each_file_without_errors(drawn):
    program = shutil.which("dciodvfy")
    if program is None:
        pytest.skip("no dciodvfy (Debian: apt-get install dicom3tools)")
    for file in samples(drawn["dicom"]):
        done = subprocess.run([program, file], capture_output=True, text=True)
        lines = (done.stdout + done.stderr).strip().splitlines()
        assert done.returncode == 0 and "CTImage" in lines
        assert not [line for line in lines if "Error" in line]
        # The one thing unsaid on purpose: a date of the study, which it never had.
        others = [line for line in lines if "Warning" in line and "Study" not in line]
        assert not others


def test_a_broken_file_fails_dciodvfy(drawn, tmp_path):
    """That the test above can fail."""
    program = shutil.which("dciodvfy")
    if program is None:
        pytest.skip("no dciodvfy (Debian: apt-get install dicom3tools)")
    dataset = pydicom.dcmread(samples(drawn["dicom"])[0])
    del dataset.PixelSpacing
    dataset.save_as(tmp_path / "a.dcm")
    done = subprocess.run([program, tmp_path / "a.dcm"], capture_output=True, text=True)
    assert "Error" in done.stderr


def test_dicom_is_marked_as_synthetic_wherever_one_may_look(drawn):
    for file in samples(drawn["dicom"]):
        dataset = pydicom.dcmread(file)
        for keyword in (
            *("PatientName", "PatientID", "PatientComments", "StudyID", "StudyDescription"),
            *("SeriesDescription", "ImageComments"),
        ):
            assert "SYNTHETIC" in str(dataset[keyword].value), keyword
        assert "Synthesized by" in dataset.DerivationDescription
        assert list(dataset.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
        assert dataset.BurnedInAnnotation == "NO"
        (equipment,) = dataset.ContributingEquipmentSequence
        for item in dataset, equipment:
            assert item.Manufacturer == "FibLDM"
            assert item.SoftwareVersions == fibldm.__version__
        assert "class fibrosis" in dataset.ImageComments and "seed 0" in dataset.ImageComments


def test_dicom_holds_hu_its_spacing_and_windows(drawn):
    dataset = pydicom.dcmread(samples(drawn["dicom"])[0])
    assert (dataset.RescaleSlope, dataset.RescaleIntercept) == (1, 0)
    assert dataset.RescaleType == "HU" and dataset.pixel_array.dtype == np.int16
    assert list(dataset.PixelSpacing) == [0.75, 0.75]
    windows = zip(
        dataset.WindowCenterWidthExplanation,
        dataset.WindowCenter,
        dataset.WindowWidth,
        strict=True,
    )
    assert list(windows) == [("LUNG", -600, 1500), ("MEDIASTINUM", 40, 400), ("DATA", -300, 1400)]


def test_another_dicom_library_sees_the_same_slice(drawn):
    """GDCM, which several viewers are built on."""
    for file in samples(drawn["dicom"]):
        reader = gdcm.ImageReader()
        reader.SetFileName(str(file))
        assert reader.Read()
        image = reader.GetImage()
        assert image.GetSpacing()[:2] == [0.75, 0.75]
        assert image.GetDirectionCosines() == [1, 0, 0, 0, 1, 0]
        raw = image.GetBuffer().encode("utf-8", errors="surrogateescape")
        stored = np.frombuffer(raw, "<i2").reshape(image.GetDimensions()[::-1])
        hu = stored * image.GetSlope() + image.GetIntercept()
        np.testing.assert_array_equal(hu, read_without_our_reader(file))


def test_samples_are_one_study_and_a_series_each(drawn):
    found = [pydicom.dcmread(file) for file in samples(drawn["dicom"])]
    for keyword in "StudyInstanceUID", "PatientID", "PatientName", "StudyID":
        assert len({str(d[keyword].value) for d in found}) == 1, keyword
    for keyword in "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID":
        assert len({d[keyword].value for d in found}) == 5, keyword
    assert [d.SeriesNumber for d in found] == [1, 2, 3, 4, 5]
    uids = {value for d in found for value in (d.SOPInstanceUID, d.SeriesInstanceUID)}
    assert all(pydicom.uid.UID(uid).is_valid for uid in uids)
    assert all(d.file_meta.MediaStorageSOPInstanceUID == d.SOPInstanceUID for d in found)


def test_another_run_is_another_study_of_another_patient(drawn, stages, tmp_path):
    more = ["--num_samples", "1", "--pixel_spacing", "0.75", "--format", "dicom"]
    first = pydicom.dcmread(samples(drawn["dicom"])[0])
    for name, option in (
        ("seed", ["--seed", "1", "--label", "fibrosis"]),
        ("steps", ["--steps", "4", "--label", "fibrosis"]),
        ("label", ["--label", "normal"]),
    ):
        other = pydicom.dcmread(samples(draw(stages, tmp_path / name, *more, *option))[0])
        for keyword in "StudyInstanceUID", "PatientID", "SeriesInstanceUID", "SOPInstanceUID":
            assert other[keyword].value != first[keyword].value, (name, keyword)


def test_no_path_and_no_date_reaches_dicom(drawn):
    for file in samples(drawn["dicom"]):
        assert str(file.parent.parent).encode() not in file.read_bytes()
        with warnings.catch_warnings(action="error"):
            elements = list(pydicom.dcmread(file).iterall())
        dates = [e for e in elements if e.VR in ("DA", "TM", "DT") and e.value]
        assert dates == []
        assert not [e for e in elements if "/" in str(e.value) and e.VR != "OW"]


# NIfTI


def test_nifti_has_its_spacing_and_stands_upright(drawn):
    for file in samples(drawn["nifti"]):
        volume = nibabel.load(file)
        assert volume.header["sform_code"] > 0 and volume.header["qform_code"] > 0
        np.testing.assert_allclose(volume.get_sform(), volume.get_qform(), atol=1e-6)
        assert volume.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(volume.header.get_zooms(), 0.75)
        assert nibabel.aff2axcodes(volume.affine) == ("L", "P", "S")
        assert b"SYNTHETIC" in volume.header["descrip"].tobytes()


# Spacing, from dataset.json to the samples


def encode(stages: Path, data: Path, folder: Path, *more) -> LatentDataset:
    options = ["--csv_file", data / "label.csv", "--img_dir", data, "--output_dir", folder, *more]
    options += ["--vae_checkpoint", stages / "vae" / "vae_best.pth", "--device", "cpu"]
    run(encode_dataset, [*options, "--num_workers", "0"])
    return LatentDataset(folder)


@pytest.fixture()
def data(phantoms, tmp_path) -> Path:
    """A copy of the phantoms that a test may change."""
    shutil.copytree(phantoms, tmp_path / "data")
    return tmp_path / "data"


def say(data: Path, **facts) -> None:
    """Add facts to a data set's dataset.json."""
    path = data / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def spacing_of(file: Path) -> float:
    return float(pydicom.dcmread(file).PixelSpacing[0])


def test_the_data_s_spacing_reaches_the_samples(stages, data, tmp_path, capsys):
    say(data, pixel_spacing=2.5, contour_style="filled")
    latents = encode(stages, data, tmp_path / "latents")
    assert (latents.pixel_spacing, latents.contour_style) == (2.5, "filled")
    shutil.copytree(stages / "vae", tmp_path / "vae")
    run(train_ldm_unet, unet_options(tmp_path, tmp_path / "unet", "--steps", "2"))
    _, content = load_model(tmp_path / "unet" / "unet_best.pth", UNet)
    assert (content["pixel_spacing"], content["contour_style"]) == (2.5, "filled")
    options = sample_options(tmp_path, tmp_path / "out", "--latent_data_dir", tmp_path / "latents")
    at = options.index("--controlnet_checkpoint")
    options = options[:at] + options[at + 2 :]
    options += ["--num_samples", "1", "--overwrite", "--format"]
    run(sample, [*options, "dicom"])
    assert spacing_of(tmp_path / "out" / "sample_00000.dcm") == 2.5
    run(sample, [*options, "dicom", "--pixel_spacing", "0.3333333333333333"])
    assert spacing_of(tmp_path / "out" / "sample_00000.dcm") == pytest.approx(1 / 3)
    run(sample, [*options, "png"])
    assert ct.read_dataset_info(tmp_path / "out").pixel_spacing == 2.5
    assert "assumption" not in capsys.readouterr().out


def test_spacing_grows_as_slices_are_reduced(stages, data, tmp_path):
    say(data, pixel_spacing=1.5)
    for path in [*(data / "images").iterdir(), *(data / "contours").iterdir()]:
        array = np.asarray(Image.open(path))
        Image.fromarray(np.repeat(np.repeat(array, 2, 0), 2, 1)).save(path)
    assert encode(stages, data, tmp_path / "latents").pixel_spacing == 3.0
    one = next((data / "images").iterdir())
    for path in one, data / "contours" / one.name:
        Image.fromarray(np.asarray(Image.open(path))[:48, :48]).save(path)
    found = encode(stages, data, tmp_path / "latents", "--overwrite").pixel_spacing
    assert found is None  # slices of two sizes


def test_facts_that_changed_mean_other_latents(stages, data, tmp_path):
    encode(stages, data, tmp_path / "latents")
    say(data, pixel_spacing=2.5)
    with pytest.raises(ValueError, match=r"dataset_json: found None.*2\.5.*--overwrite"):
        encode(stages, data, tmp_path / "latents")


@pytest.mark.parametrize("file_format", ["dicom", "nifti"])
def test_an_unknown_spacing_is_1_mm_and_that_is_said(file_format, stages, tmp_path, capsys):
    folder = draw(stages, tmp_path, "--num_samples", "1", "--format", file_format)
    assert "1 mm, an assumption" in capsys.readouterr().out
    (file,) = samples(folder)
    if file_format == "dicom":
        assert spacing_of(file) == 1.0
    else:
        assert nibabel.load(file).header.get_zooms()[0] == 1.0


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "wide"])
def test_a_spacing_that_is_none_is_refused(value, stages, tmp_path, capsys):
    with pytest.raises(SystemExit):
        draw(stages, tmp_path, "--pixel_spacing", value)
    assert "--pixel_spacing" in capsys.readouterr().err


def older(stages: Path, folder: Path) -> Path:
    """The stages as a FibLDM wrote them that knew neither spacing nor style."""
    shutil.copytree(stages, folder)
    content = torch.load(folder / "unet" / "unet_best.pth", weights_only=True)
    meta = json.loads((folder / "latents" / "meta.json").read_text())
    for key in "pixel_spacing", "contour_style":
        del content[key], meta[key]
    torch.save(content, folder / "unet" / "unet_best.pth")
    (folder / "latents" / "meta.json").write_text(json.dumps(meta))
    return folder


def test_older_latents_and_checkpoints_still_serve(stages, phantoms, tmp_path):
    old = older(stages, tmp_path / "old")
    encode(old, phantoms, old / "latents")  # holds these latents already
    run(train_ldm_unet, unet_options(old, tmp_path / "unet", "--steps", "1"))
    run(train_controlnet, controlnet_options(old, tmp_path / "controlnet", "--steps", "1"))
    options = sample_options(old, tmp_path / "out", "--latent_data_dir", old / "latents")
    at = options.index("--controlnet_checkpoint") + 1
    options[at] = tmp_path / "controlnet" / "controlnet_best.pth"
    run(sample, [*options, "--num_samples", "1", "--format", "dicom"])
    assert spacing_of(tmp_path / "out" / "sample_00000.dcm") == 1.0


# Contours: filled or outlines


def redraw(data: Path, every: int = 1) -> None:
    """Make outlines of every n-th contour, as another program would."""
    for path in sorted((data / "contours").iterdir())[::every]:
        mask = np.asarray(Image.open(path)) > 0
        Image.fromarray(ct.outline_mask(mask[None])[0].astype(np.uint8) * 255).save(path)


def test_the_style_is_measured_where_dataset_json_does_not_say(stages, data, tmp_path, capsys):
    assert LatentDataset(stages / "latents").contour_style == "filled"
    redraw(data)
    assert encode(stages, data, tmp_path / "outlines").contour_style == "outline"
    assert "several styles" not in capsys.readouterr().out


def test_mixed_styles_are_warned_of(stages, data, tmp_path, capsys):
    redraw(data, every=2)
    assert encode(stages, data, tmp_path / "mixed").contour_style is None
    out = capsys.readouterr().out
    assert out.count("WARNING: contours of several styles: of 24 looked at") == 1


def test_a_style_said_wrongly_is_warned_of(stages, data, tmp_path, capsys):
    say(data, contour_style="outline")
    assert encode(stages, data, tmp_path / "wrong").contour_style == "outline"
    assert "filled, and dataset.json says outline" in capsys.readouterr().out


def test_a_controlnet_takes_the_u_net_s_style(stages, data, tmp_path):
    redraw(data)
    encode(stages, data, tmp_path / "outlines")
    options = controlnet_options(stages, tmp_path / "run", "--steps", "1")
    options[options.index("--latent_data_dir") + 1] = str(tmp_path / "outlines")
    with pytest.raises(ValueError, match=r"found outline, expected filled.*prepare_data"):
        run(train_controlnet, options)


def test_outlines_given_to_a_u_net_of_masks_are_filled(stages, data, tmp_path, capsys):
    masks = sorted((data / "contours").iterdir())[:3]
    for name in "masks", "outlines":
        (tmp_path / name).mkdir()
        for path in masks:
            shutil.copy(path, tmp_path / name)
        if name == "masks":
            redraw(data)
    images = []
    for name in "masks", "outlines":
        options = sample_options(stages, tmp_path / f"of_{name}", "--contours", tmp_path / name)
        run(sample, [*options, "--format", "npy"])
        said = "3 of 3 contours are outlines: they are filled" in capsys.readouterr().out
        assert said == (name == "outlines")
        images.append([np.load(file) for file in samples(tmp_path / f"of_{name}")])
    np.testing.assert_allclose(images[0], images[1], atol=1)


def test_masks_given_to_a_u_net_of_outlines_become_outlines(stages, data):
    model = Synthesizer.from_checkpoints(
        stages / "vae" / "vae_best.pth", stages / "unet" / "unet_best.pth", device="cpu"
    )
    form = model.contour_form._replace(style="outline")
    masks = np.stack([np.asarray(Image.open(p)) > 0 for p in sorted(data.glob("contours/*"))])
    asked, notes = read_contours(data / "contours", form)
    drawn = [ct.outline_mask(mask[None])[0] for mask in masks]
    np.testing.assert_array_equal(asked.contours[:, 0], drawn)
    assert "24 of 24 contours are masks: their outlines are taken" in notes[0]
