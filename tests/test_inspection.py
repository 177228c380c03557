"""Inspection: clean data pass, and each defect is found, named, and an error or a warning."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage as ndi

from fibldm import anatomy, ct
from fibldm.inspection import inspect
from fibldm.phantom import write_dataset
from fibldm.tables import read_csv, write_csv

PATIENTS, SLICES = 24, 3


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """24 synthetic patients, 3 slices of 64x64 each, with labels and a split: 14, 5 and 5."""
    folder = tmp_path_factory.mktemp("clean")
    write_dataset(folder, PATIENTS, SLICES, 64)
    rows = read_rows(folder)
    for row in rows:
        number = int(row["patient_id"][1:])
        row["split"] = "val" if number < 5 else "test" if number < 10 else "train"
    write_rows(folder, rows)
    return folder


@pytest.fixture()
def data(clean, tmp_path) -> Path:
    """A copy of the clean data that a test may spoil."""
    shutil.copytree(clean, tmp_path / "data")
    return tmp_path / "data"


def read_rows(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "label.csv").to_dict("records")


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    write_csv(folder / "label.csv", rows, list(rows[0]))


def flagged(folder: Path, **options) -> dict[str, list[str]]:
    """{"severity check": where it is} of what an inspection finds."""
    findings = inspect(folder, **options).findings
    return {f"{finding.severity} {finding.check}": finding.lines for finding in findings}


def hu_of(folder: Path, row: dict[str, str]) -> np.ndarray:
    return ct.read_hu(folder / row["image"], (1.0, -1024.0))


def write_hu(folder: Path, row: dict[str, str], hu: np.ndarray) -> None:
    stored = np.clip(np.round(hu + 1024), 0, 65535).astype(np.uint16)
    Image.fromarray(stored).save(folder / row["image"])


def mask_of(folder: Path, row: dict[str, str]) -> np.ndarray:
    return np.asarray(Image.open(folder / row["contour"])) > 0


def write_mask(folder: Path, row: dict[str, str], mask: np.ndarray) -> None:
    Image.fromarray(np.uint8(mask) * 255).save(folder / row["contour"])


# Clean data.


def test_clean_data_pass(clean):
    inspection = inspect(clean)
    assert inspection.findings == inspection.errors == inspection.notes == []
    assert ("train", "fibrosis", 7, 21) in inspection.counts
    assert sum(group.slices for group in inspection.counts) == 72 == len(inspection.rows)
    assert not (clean / "contact_sheet.png").exists()


def test_small_data_pass_and_say_what_was_not_checked(phantoms):
    inspection = inspect(phantoms)
    (note,) = inspection.notes
    assert "not checked: slices that are mirrored left-right" in note and "(12 patients" in note
    assert [finding.check for finding in inspection.findings] == ["few patients"]


def test_outlines_pass(tmp_path):
    write_dataset(tmp_path, 20, 1, 64, contour_style="outline")
    assert not any("contour" in key or "error" in key for key in flagged(tmp_path))


def test_eight_bits_without_a_scale_pass_with_a_note(data):
    (data / "dataset.json").unlink()
    for row in read_rows(data):
        unit = ct.hu_to_unit(hu_of(data, row))
        Image.fromarray(np.uint8((unit + 1) * 127.5)).save(data / row["image"])
    inspection = inspect(data)
    assert "72 images have 8 bits" in inspection.notes[0] and inspection.findings == []


def test_real_ct_passes(ct_folder):
    """But for three slices of the 200 that really are upside down."""
    found = flagged(ct_folder / "lungs")
    upside_down = found.pop("error upside down")
    assert [line.split(":")[0] for line in upside_down] == [
        *("patient ID_0045", "patient ID_0200", "patient ID_0214")
    ]
    assert found.keys() <= {"warning contour fits badly", "warning turned?"}
    badly = " ".join(found["warning contour fits badly"])
    assert all(name in badly for name in ("ID_0079", "ID_0134", "ID_0254"))
    assert sum(len(lines) for lines in found.values()) < 20


# The table.


def test_all_problems_of_the_table_are_told_at_once(data):
    rows = read_rows(data)
    (data / rows[70]["image"]).unlink()
    rows[0]["split"] = "train"  # the rest of the patient is in val
    rows[20]["patient_id"] = ""
    rows[30] = {**rows[29]}
    rows[40]["contour"] = rows[41]["contour"]
    rows[50]["label"] = ""
    rows[60]["label"] = "Fibrosis "
    for row in rows:
        row["split"] = row["split"].replace("test", "train")
    rows[10]["split"] = "holdout"
    write_rows(data, rows)
    with open(data / "label.csv", "a") as file:
        file.write("images/short.png\nimages/long.png,,,,,,,,,x\n")
    found = flagged(data)
    for key, word in {
        "error short lines": "line 74",
        "error long lines": "line 75",
        "error missing files": rows[70]["image"],
        "error patient in two splits": "P0000",
        "error unknown split": "holdout",
        "error files used twice": rows[41]["contour"],
        "warning rows listed twice": rows[29]["image"],
        "warning no patient_id": rows[20]["image"],
        "warning no label": rows[50]["image"],
        "warning labels alike": "Fibrosis and fibrosis",
    }.items():
        assert any(word in line for line in found[key]), key


def test_an_empty_split_is_an_error_and_a_small_one_a_warning(data):
    rows = read_rows(data)
    for row in rows:
        row["split"] = "test" if row["patient_id"] == "P0003" else "train"
    write_rows(data, rows)
    found = flagged(data)
    assert any("val" in line for line in found["error empty split"])
    assert any("test: 1 patients" in line for line in found["warning few patients"])


def test_paths_that_leave_the_folder_are_not_read(data, tmp_path):
    rows = read_rows(data)
    shutil.copy(data / rows[0]["image"], tmp_path / "outside.png")
    rows[0]["image"] = "../outside.png"
    write_rows(data, rows)
    found = flagged(data)
    assert list(found) == ["error paths that leave the folder"]
    assert "../outside.png" in found["error paths that leave the folder"][0]


def test_a_folder_without_a_table_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"label\.csv: no such file"):
        inspect(tmp_path)


# Files.


def test_unusable_files_are_named(data):
    rows = read_rows(data)
    (data / rows[0]["image"]).write_bytes(b"no image")
    (data / rows[1]["contour"]).write_bytes((data / rows[1]["contour"]).read_bytes()[:60])
    write_mask(data, rows[2], np.ones((32, 32), bool))
    big = ndi.zoom(hu_of(data, rows[3]), 2, order=1)[:, :120]
    write_hu(data, rows[3], big)
    write_mask(data, rows[3], np.kron(mask_of(data, rows[3]), np.ones((2, 2), bool))[:, :120])
    found = flagged(data)
    for key, word in {
        "error image unreadable": rows[0]["image"],
        "error contour unreadable": rows[1]["contour"],
        "error sizes differ": rows[2]["image"],
        "warning sizes": rows[3]["image"],
        "warning not square": rows[3]["image"],
    }.items():
        assert any(word in line for line in found[key]), key
    assert "cannot identify image file" in found["error image unreadable"][0]
    contours = [line for key in found if "contour" in key for line in found[key]]
    assert not any(rows[2]["image"] in line for line in contours)  # one problem, said once


def test_a_missing_scale_is_said_once_with_the_remedy(data):
    (data / "dataset.json").unlink()
    (finding,) = inspect(data).errors
    assert finding.check == "no scale" and len(finding.lines) == 72
    assert "72 of 72 look like chest CT" in finding.meaning
    assert "rescale_intercept" in finding.meaning


def test_swapped_columns(data):
    rows = read_rows(data)
    rows = [{**row, "image": row["contour"], "contour": row["image"]} for row in rows]
    write_rows(data, rows)
    found = flagged(data)
    assert {"error contour unreadable", "error HU: a mask"} & found.keys()


# Values.


NO_HU = [
    (lambda hu: hu + 1024, "HU: off by 1024"),
    (lambda hu: 2047 - hu, "HU: inverted"),
    (lambda hu: np.clip(hu, -160, 240), "HU: windowed"),
    (lambda hu: np.clip(hu, -1000, 0), "HU: windowed"),
    (lambda hu: 2 * hu + 1024, "HU: values"),
    (lambda hu: (hu > -400) * 255 - 1024, "HU: a mask"),
    (lambda hu: np.minimum(hu, -950), "HU: air alone"),
    (lambda hu: 0 * hu, "HU: constant"),
]


def test_values_that_are_no_hu(data):
    rows = read_rows(data)
    for i, (spoil, _) in enumerate(NO_HU):
        write_hu(data, rows[4 * i], spoil(hu_of(data, rows[4 * i])))
    found = flagged(data)
    for i, (_, name) in enumerate(NO_HU):
        lines = found[f"error {name}"]
        assert any(line.startswith(rows[4 * i]["image"]) for line in lines), name
        assert len(lines) == sum(other == name for _, other in NO_HU), name
    assert len(found) == len({name for _, name in NO_HU})


def test_a_wrong_intercept_is_told_with_the_right_one(data):
    (data / "dataset.json").write_text(json.dumps({"rescale_slope": 1, "rescale_intercept": 0}))
    meanings = [finding.meaning for finding in inspect(data).errors]
    assert any('"rescale_slope": 1, "rescale_intercept": -1024' in text for text in meanings)


def test_images_stretched_each_to_its_own_range(data):
    (data / "dataset.json").unlink()
    for row in read_rows(data):
        hu = hu_of(data, row)
        unit = (hu - hu.min()) / np.ptp(hu)
        Image.fromarray(np.uint8(np.round(255 * unit))).save(data / row["image"])
    assert "error HU: by image" in flagged(data)


# Contours.


def shifted(mask: np.ndarray) -> np.ndarray:
    return np.roll(mask, (3, -3), (0, 1))


def opened(mask: np.ndarray) -> np.ndarray:
    line = mask & ~ndi.binary_erosion(mask)
    return line & (np.arange(len(mask))[:, None] % 8 > 0)


BAD_CONTOURS = [
    (lambda mask: mask & False, "error contour empty", "nothing is marked"),
    (lambda mask: ~mask, "error contour misplaced", "inverted"),
    (shifted, "error contour misplaced", "shifted by about -3 pixels to the right and 3 down"),
    (lambda mask: mask[::-1], "error contour misplaced", "mirrored top-bottom"),
    (lambda mask: mask.T, "error contour misplaced", ""),
    (opened, "error contour open", "do not close"),
    (lambda mask: mask & (np.arange(64) < 32), "warning contour fits badly", "of the lungs found"),
    (lambda mask: mask ^ ndi.binary_erosion(mask), "error contour styles mixed", "outline"),
]


def test_contours_that_do_not_fit(data):
    rows = read_rows(data)
    for i, (spoil, _, _) in enumerate(BAD_CONTOURS):
        row = rows[6 * i + 1]  # a slice from the middle of the lungs
        write_mask(data, row, spoil(mask_of(data, row)))
    found = flagged(data)
    for i, (_, name, word) in enumerate(BAD_CONTOURS):
        image = rows[6 * i + 1]["image"]
        assert any(line.startswith(image) and word in line for line in found[name]), name
    assert sum(len(lines) for lines in found.values()) == len(BAD_CONTOURS)


def test_one_contour_that_fits_badly_is_no_error(data):
    row = read_rows(data)[7]
    write_mask(data, row, mask_of(data, row) & (np.arange(64) < 32))
    assert list(flagged(data)) == ["warning contour fits badly"]


def test_a_slice_without_lungs_needs_no_contour(data):
    row = read_rows(data)[7]
    hu = hu_of(data, row)
    write_hu(data, row, np.where(ndi.binary_dilation(mask_of(data, row), iterations=2), 40, hu))
    write_mask(data, row, np.zeros(hu.shape, bool))
    assert list(flagged(data)) == ["warning no lungs"]


def test_a_contour_of_another_slice_names_that_slice(data):
    rows = read_rows(data)
    first, second = mask_of(data, rows[12]), mask_of(data, rows[14])
    write_mask(data, rows[12], second)
    write_mask(data, rows[14], first)
    lines = flagged(data)["error contour misplaced"]
    for a, b in ((12, 14), (14, 12)):
        assert any(f"{rows[a]['image']}: its contour fits {rows[b]['image']}" in x for x in lines)


# Slices among others.


def turn_patient(folder: Path, patient: str, turn) -> list[str]:
    rows = [row for row in read_rows(folder) if row["patient_id"] == patient]
    for row in rows:
        write_hu(folder, row, turn(hu_of(folder, row)))
        write_mask(folder, row, turn(mask_of(folder, row)))
    return [row["image"] for row in rows]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("mirrored left-right", "turned by 90 degrees"),) * 2,
        (
            ("mirrored top-bottom", "turned by -90 degrees"),
            ("mirrored left-right once its spine is below", "turned by -90 degrees"),
        ),
    ],
)
def test_turned_patients_are_named_and_how(names, said, data):
    patients = ("P0011", "P0018")
    for patient, name in zip(patients, names, strict=True):
        turn_patient(data, patient, anatomy.SYMMETRIES[name])
    lines = flagged(data)["error turned"]
    for patient, how, line in zip(patients, said, lines, strict=True):
        first = next(row for row in read_rows(data) if row["patient_id"] == patient)["image"]
        assert line == f"patient {patient}: {how} ({first} and 2 more)"


def test_a_minority_with_its_spine_below_is_not_what_is_wrong(data):
    for number in range(PATIENTS - 2):
        turn_patient(data, f"P{number:04d}", anatomy.SYMMETRIES["turned by 180 degrees"])
    (finding,) = inspect(data).findings
    assert finding.check == "upside down" and len(finding.lines) == PATIENTS - 2
    assert len(finding.rows) == SLICES * (PATIENTS - 2)


CHANGES = [
    lambda hu: hu,
    lambda hu: 1.03 * hu + 20,
    lambda hu: hu + np.random.default_rng(0).normal(0, 15, hu.shape),
    lambda hu: np.roll(hu, (0, 1), (0, 1)),
]


@pytest.mark.parametrize("across", [True, False])
def test_copies_under_two_patients(across, data):
    rows = read_rows(data)
    pairs = []
    for i, change in enumerate(CHANGES):
        source = rows[60 + 3 * i]  # of train
        target = rows[3 * i + (1 if across else 31)]  # of val, or of train
        write_hu(data, target, change(hu_of(data, source)))
        moved = (0, 1) if change is CHANGES[-1] else (0, 0)
        write_mask(data, target, np.roll(mask_of(data, source), moved, (0, 1)))
        pairs.append({source["image"], target["image"]})
    found = flagged(data)
    lines = found["error copies across splits" if across else "warning copies"]
    for pair in pairs:
        assert any(all(image in line for image in pair) for line in lines)
    assert len(lines) == len(pairs) and len(found) == 1


def test_orientations_without_a_majority_are_an_error(data):
    for number in range(0, PATIENTS, 2):
        turn_patient(data, f"P{number:04d}", anatomy.SYMMETRIES["mirrored left-right"])
    assert list(flagged(data)) == ["error orientations mixed"]


def test_slices_of_one_patient_may_be_alike_but_not_the_same(data):
    rows = read_rows(data)
    hu = hu_of(data, rows[30])
    write_hu(data, rows[31], hu + np.random.default_rng(0).normal(0, 15, hu.shape))
    shutil.copy(data / rows[30]["contour"], data / rows[31]["contour"])
    assert not any("copies" in key for key in flagged(data))
    shutil.copy(data / rows[30]["image"], data / rows[31]["image"])
    (line,) = flagged(data)["warning copies in a patient"]
    assert rows[31]["image"] in line


def test_two_processes_see_what_one_sees(data):
    rows = read_rows(data)
    write_hu(data, rows[5], hu_of(data, rows[5]) + 1024)
    one, two = inspect(data), inspect(data, workers=2)
    assert one.findings == two.findings and len(one.errors) == 1


def test_the_contact_sheet_shows_flagged_slices_first(data):
    """Cells of 224 pixels, 8 a line; contours and the captions of flagged slices are amber."""
    row = read_rows(data)[40]
    write_mask(data, row, mask_of(data, row) & (np.arange(64) < 32))
    inspect(data).write_contact_sheet(data / "sheet.png")
    sheet = np.asarray(Image.open(data / "sheet.png").convert("RGB")).astype(int)
    amber = np.abs(sheet - (255, 190, 0)).max(axis=2) < 40
    assert sheet.shape[1] == 8 * 232 - 8
    captions = amber[225:300]
    assert captions[:, :224].any() and not captions[:, 232:].any()
    left_lung, right_lung = amber[:224, 20:100], amber[:224, 124:204]
    assert left_lung.any() and not right_lung[:, 20:].any()
    assert amber[:224, 232 + 124 : 232 + 204].any()
