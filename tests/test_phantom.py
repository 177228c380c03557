"""Phantoms look like CT where a number can tell, and the data set of them is whole."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage as ndi

from fibldm import phantom
from fibldm.phantom import Patient, phantom_slice, write_dataset

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "make_phantom_data.py"
LEVELS = (0.2, 0.4, 0.6, 0.8)


def load_script():
    spec = importlib.util.spec_from_file_location("make_phantom_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def around(hu, who, x, y, radius=2):
    """Median HU around a point in the patient's coordinates."""
    column, row = (int((v + shift + 1) * 128) for v, shift in zip((x, y), who.shift, strict=True))
    return np.median(hu[row - radius : row + radius + 1, column - radius : column + radius + 1])


def high_attenuation(hu, mask):
    """Share of the lung between -600 and -250 HU, a measure of interstitial disease."""
    inside = hu[mask]
    return np.mean((inside > -600) & (inside < -250))


# One slice.


def test_a_function_of_its_arguments():
    hu, mask = phantom_slice(3, 0.6, 128)
    again, mask_again = phantom_slice(3, 0.6, 128)
    assert np.array_equal(hu, again)
    assert np.array_equal(mask, mask_again)
    for other in (phantom_slice(5, 0.6, 128), phantom_slice(3, 0.61, 128)):
        assert not np.array_equal(hu, other[0])
    assert not np.array_equal(hu, phantom_slice(3, 0.6, 128, seed=1)[0])


@pytest.mark.parametrize("size", [64, 128, 200, 256, 512])
def test_shape_type_and_range(size):
    hu, mask = phantom_slice(1, 0.7, size)
    assert hu.shape == mask.shape == (size, size)
    assert hu.dtype == np.float32
    assert mask.dtype == bool
    assert hu.min() >= -1024
    assert 300 < hu.max() < 3071


def test_sizes_show_the_same_chest():
    _, mask = phantom_slice(1, 0.5, 256)
    for size in (64, 128, 512):
        _, other = phantom_slice(1, 0.5, size)
        assert abs(other.mean() / mask.mean() - 1) < 0.03


@pytest.mark.parametrize("patient", [0, 1, 2, 3])
def test_tissues_have_their_hu(patient):
    who = Patient.draw(patient, 0)
    hu, mask = phantom_slice(patient, 0.62)
    corners = [corner.mean() for corner in (hu[:15, :15], hu[:15, -15:])]
    assert max(corners) < -970
    assert 10 < around(hu, who, who.lean - 0.05, -0.36 * who.depth, 4) < 200  # heart
    assert 150 < around(hu, who, 0, 0.82 * who.depth, 3) < 500  # vertebra
    assert np.mean((hu > 300) & (hu < 900)) > 0.005  # cortex of ribs and spine
    assert np.mean((hu > -150) & (hu < -50)) > 0.02  # fat
    assert np.mean((hu > 0) & (hu < 100)) > 0.08  # muscle and organs
    assert -910 < np.median(hu[mask]) < -600


def test_the_trachea_is_air_and_no_lung():
    for patient in range(4):
        who = Patient.draw(patient, 0)
        hu, mask = phantom_slice(patient, 0.3)
        assert around(hu, who, 0, 0.03) < -930
        column, row = (int((v + 1) * 128) for v in (who.shift[0], 0.03 + who.shift[1]))
        assert not mask[row, column]


@pytest.mark.parametrize("level", [0.0, *LEVELS, 1.0])
def test_two_lungs_inside_the_body(level):
    for patient in range(4):
        hu, mask = phantom_slice(patient, level)
        labels, _ = ndi.label(hu > -350)
        body = ndi.binary_fill_holes(labels == np.bincount(labels.ravel())[1:].argmax() + 1)
        assert not (mask & ~ndi.binary_erosion(body, iterations=2)).any()
        middle = round((Patient.draw(patient, 0).shift[0] + 1) * 128)
        right, left = mask[:, :middle].sum(), mask[:, middle:].sum()
        assert min(right, left) > 0.01 * mask.size
        assert np.array_equal(ndi.binary_fill_holes(mask[:, :middle]), mask[:, :middle])


def test_the_heart_takes_room_from_the_lung_on_the_right_of_the_image():
    for patient in range(6):
        _, mask = phantom_slice(patient, 0.6)
        middle = round((Patient.draw(patient, 0).shift[0] + 1) * 128)
        assert mask[:, middle:].sum() < 0.95 * mask[:, :middle].sum()


def test_the_back_of_the_lung_is_denser():
    hu, mask = phantom_slice(0, 0.5)
    rows = np.nonzero(mask.any(1))[0]
    third = len(rows) // 3
    front, back = (np.median(hu[part][mask[part]]) for part in (rows[:third], rows[-third:]))
    assert back > front + 10


# Fibrosis.


def test_odd_patients_have_fibrosis():
    severities = [Patient.draw(patient, 0).severity for patient in range(20)]
    assert all(0 < s <= 1 for s in severities[1::2])
    assert not any(severities[::2])


def test_fibrosis_raises_high_attenuation_and_more_so_at_the_base():
    def rise(patient, level):
        healthy = high_attenuation(*phantom_slice(patient, level, fibrosis=0.0))
        return high_attenuation(*phantom_slice(patient, level, fibrosis=0.9)) - healthy

    top = np.mean([rise(patient, 0.25) for patient in range(4)])
    base = np.mean([rise(patient, 0.8) for patient in range(4)])
    assert top > 0
    assert base > 0.1
    assert base > 2.5 * top


def test_fibrosis_grows_with_severity():
    shares = [
        np.mean([high_attenuation(*phantom_slice(p, 0.7, fibrosis=f)) for p in range(3)])
        for f in (0.0, 0.3, 0.6, 1.0)
    ]
    assert np.all(np.diff(shares) > 0)


def test_fibrosis_is_subpleural_and_leaves_the_contour_alone():
    hu, mask = phantom_slice(3, 0.6, fibrosis=0.6)
    healthy, same = phantom_slice(3, 0.6, fibrosis=0.0)
    assert np.array_equal(mask, same)
    depth = ndi.distance_transform_edt(mask)
    rim, core = mask & (depth < 8), mask & (depth > 16)
    assert (hu - healthy)[rim].mean() > 3 * abs((hu - healthy)[core].mean())


@pytest.mark.parametrize("wrong", [{"level": 1.2}, {"level": 0.5, "fibrosis": 1.5}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        phantom_slice(0, **wrong)


# The data set.


def read_rows(folder):
    with (folder / "label.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_data_set_is_whole(tmp_path):
    write_dataset(tmp_path, patients=4, slices_per_patient=3, size=64)
    rows = read_rows(tmp_path)
    assert list(rows[0]) == ["image", "contour", "patient_id", "label"]
    assert len(rows) == 12
    assert json.loads((tmp_path / "dataset.json").read_text()) == {
        "rescale_slope": 1.0,
        "rescale_intercept": -1024.0,
    }
    for row in rows:
        with Image.open(tmp_path / row["image"]) as image:
            assert image.mode.startswith("I;16")
            hu = np.asarray(image).astype(float) - 1024
        with Image.open(tmp_path / row["contour"]) as image:
            assert image.mode == "L"
            contour = np.asarray(image)
        assert hu.shape == contour.shape == (64, 64)
        assert set(np.unique(contour)) == {0, 255}
        assert -910 < np.median(hu[contour > 0]) < -500
    labels = {row["patient_id"]: row["label"] for row in rows}
    assert sorted(labels.values()) == ["fibrosis", "fibrosis", "normal", "normal"]
    assert {len({r["image"] for r in rows}), len({r["contour"] for r in rows})} == {12}


def test_a_data_set_with_more_patients_starts_with_the_same(tmp_path):
    write_dataset(tmp_path / "few", 1, 2, 64)
    write_dataset(tmp_path / "more", 2, 2, 64)
    for row in read_rows(tmp_path / "few"):
        few, more = (tmp_path / name / row["image"] for name in ("few", "more"))
        assert few.read_bytes() == more.read_bytes()


def test_an_interrupted_run_is_no_data_set(tmp_path, monkeypatch):
    draw = phantom.phantom_slice

    def stop(patient, *args, **kwargs):
        if patient == 1:
            raise KeyboardInterrupt
        return draw(patient, *args, **kwargs)

    monkeypatch.setattr(phantom, "phantom_slice", stop)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, 2, 1, 64)
    assert not (tmp_path / "label.csv").exists()


# The script.

SMALL = ["--patients", "2", "--slices_per_patient", "1", "--image_size", "64"]


def test_the_script_runs_from_any_folder(tmp_path):
    command = [sys.executable, str(SCRIPT), "--output_dir", "data", *SMALL]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert len(read_rows(tmp_path / "data")) == 2


def test_the_script_refuses_a_folder_in_use(tmp_path, capsys):
    script = load_script()
    options = ["--output_dir", str(tmp_path), *SMALL]
    script.main(script.parse_args(options))
    before = (tmp_path / "label.csv").read_text()
    with pytest.raises(SystemExit) as stop:
        script.parse_args([*options, "--seed", "1"])
    assert stop.value.code == 2
    assert "--output_dir" in capsys.readouterr().err
    assert (tmp_path / "label.csv").read_text() == before


def test_overwriting_leaves_no_old_slices_and_spares_other_files(tmp_path):
    script = load_script()
    options = ["--output_dir", str(tmp_path), *SMALL]
    script.main(script.parse_args(options))
    (tmp_path / "images" / "mine.png").write_bytes(b"")
    script.main(script.parse_args([*options, "--patients", "1", "--overwrite"]))
    assert len(read_rows(tmp_path)) == 1
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"P0000_S000.png", "mine.png"}


def test_outlines_are_one_pixel_wide(tmp_path):
    script = load_script()
    for style in ("filled", "outline"):
        folder = ["--output_dir", str(tmp_path / style), "--contour_style", style]
        script.main(script.parse_args([*folder, *SMALL]))
    for row in read_rows(tmp_path / "filled"):
        filled, outline = (
            np.asarray(Image.open(tmp_path / style / row["contour"])) > 0
            for style in ("filled", "outline")
        )
        assert np.array_equal(outline, filled & ~ndi.binary_erosion(filled))
        assert np.array_equal(ndi.binary_fill_holes(outline), filled)


@pytest.mark.parametrize("option", ["--patients", "--slices_per_patient", "--image_size"])
def test_the_script_names_a_bad_number(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as stop:
        load_script().parse_args(["--output_dir", str(tmp_path), option, "0"])
    assert stop.value.code == 2
    assert option in capsys.readouterr().err
