"""Who is a patient: what is one person's must not land on both sides of the split."""

import nibabel
import numpy as np
import pytest
from scans import ct_datasets, nifti, scan, write_dicom
from test_bad_scans import listed, listing
from test_prepare_data import prepare, rows_of

from fibldm.patients import is_placeholder


def study(folder, number: int, patient: str, study: str, **elements) -> None:
    """A series of a study, with slices of its own."""
    uids = {"StudyInstanceUID": f"1.2.{study}", "SeriesInstanceUID": f"1.2.{study}.{number}"}
    own = {"PatientID": patient, "PatientName": "", **uids, **elements}
    write_dicom(folder / f"s{number}", ct_datasets(number, **own))


def listed_anew(folder, table: str, number: int = 1) -> None:
    """`listed`, of other slices."""
    listed(folder, table)
    for path in folder.glob("*/*.png"):
        path.write_bytes(path.read_bytes() + bytes(number))


def patients(data) -> int:
    return len({row["patient_id"] for row in rows_of(data)})


def notes(capsys) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]


@pytest.mark.parametrize("names", [["P7", "p7", ""], ["ANONYMOUS", "P7", "p 7"], ["A", "B", "C"]])
def test_a_study_is_of_one_patient(tmp_path, capsys, names):
    for number, name in enumerate(names):
        study(tmp_path / "in", number, name, "9")
    assert patients(prepare(tmp_path / "in")) == 1
    (note,) = [note for note in notes(capsys) if "one patient for" in note]
    assert all(repr(name) in note for name in names if name) and "--patient_pattern" in note


@pytest.mark.parametrize("name", ["", "Muster^Erika"])
def test_a_series_is_of_one_patient_whatever_its_spelling(tmp_path, capsys, name):
    datasets = ct_datasets(PatientName=name)
    for dataset, spelling in zip(datasets, ["", "p7", "P7", "P7 ", ""], strict=True):
        dataset.PatientID = spelling
    write_dicom(tmp_path / "in", datasets)
    assert len(rows_of(prepare(tmp_path / "in"))) == 5
    datasets[3].PatientID = "P8"
    write_dicom(tmp_path / "in", datasets)
    with pytest.raises(ValueError, match="2 patients in one series"):
        prepare(tmp_path / "in")


def test_volumes_of_one_stem_in_one_folder_are_a_patient_each_stem(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(2):
        nibabel.save(nifti(scan(number)), tmp_path / "in" / f"S{number}.nii")
        np.save(tmp_path / "in" / f"S{number}.npy", scan(number + 2))
    assert patients(prepare(tmp_path / "in")) == 2


def test_names_that_differ_in_case_and_spaces_are_one(tmp_path, capsys):
    for number, name in enumerate(["P 7", "p  7", "P7"]):
        study(tmp_path / "in", number, name, str(number))
    nibabel.save(nifti(scan(5)), tmp_path / "in" / "p 7.nii")
    assert patients(prepare(tmp_path / "in")) == 2
    assert any("'P 7', 'p  7'" in note and "P7" not in note for note in notes(capsys))


def test_studies_of_nobody_are_one_patient_and_it_is_said(tmp_path, capsys):
    for number in range(3):
        study(tmp_path / "in", number, "ANONYMOUS", str(number))
    study(tmp_path / "in", 3, "Erika", "3")
    study(tmp_path / "in", 4, "ANONYMOUS", "3")  # Erika's too
    assert patients(prepare(tmp_path / "in")) == 2
    said = notes(capsys)
    assert any("'ANONYMOUS' is taken as one, but 3 studies" in note for note in said)
    pattern = prepare(tmp_path / "in", "--patient_pattern", "(s[0-9])/", "--overwrite")
    assert patients(pattern) == 5 and not any("taken as one" in note for note in notes(capsys))


def test_studies_without_a_name_are_patients_and_it_is_said(tmp_path, capsys):
    for number in range(2):
        study(tmp_path / "in", number, "", str(number))
    assert patients(prepare(tmp_path / "in")) == 2
    assert any("2 studies have no PatientID" in note for note in notes(capsys))


def test_one_id_of_people_born_on_different_days_is_said(tmp_path, capsys):
    study(tmp_path / "in", 0, "1", "0", PatientBirthDate="19500101", PatientSex="")
    study(tmp_path / "in", 1, "1", "1", PatientBirthDate="19500101", PatientSex="F")
    prepare(tmp_path / "in")
    assert not any("birth date" in note for note in notes(capsys))
    study(tmp_path / "in", 2, "1", "2", PatientBirthDate="19610102")
    assert patients(prepare(tmp_path / "in")) == 1
    assert any("19500101, 19610102" in note for note in notes(capsys))


@pytest.mark.parametrize("form", ["images", "volume", "table"])
def test_one_name_in_two_inputs_is_said(tmp_path, capsys, form):
    for number, site in enumerate(["north", "south"]):
        folder = tmp_path / site / "001"
        if form == "table":
            listed_anew(folder, listing().replace("p1,val", "p1,train"), number)
            continue
        folder.mkdir(parents=True)
        volume = scan(number)
        for i, hu in enumerate(volume if form == "images" else [volume]):
            nibabel.save(nifti(hu.reshape(-1, 64, 64)), folder / f"ct{i}.nii")
    data = prepare(tmp_path / "north", tmp_path / "south")
    assert patients(data) == 1 + (form == "table")
    said = [note for note in notes(capsys) if "is taken as one" in note]
    assert len(said) == 1 + (form == "table") and "north" in said[0] and "south" in said[0]
    if form != "table":
        assert patients(prepare(tmp_path, "--output_dir", tmp_path / "both")) == 2


def test_a_patient_whom_two_tables_put_into_two_splits_is_an_error(tmp_path):
    listed(tmp_path / "a", listing())
    listed_anew(tmp_path / "b", listing().replace("p1,val", "P1,train"))
    with pytest.raises(ValueError, match="patient P1 is in val and in train"):
        prepare(tmp_path / "a", tmp_path / "b")


def test_labels_name_patients_as_any_of_their_series_does(tmp_path):
    for number, name in enumerate(["P7", "p7", ""]):
        study(tmp_path / "in", number, name, "9")
    (tmp_path / "labels.csv").write_text("patient_id,label\np7,fibrosis\n")
    data = prepare(tmp_path / "in", "--labels", tmp_path / "labels.csv")
    assert {row["label"] for row in rows_of(data)} == {"fibrosis"}
    (tmp_path / "labels.csv").write_text("patient_id,label\np7,fibrosis\nP7,normal\n")
    with pytest.raises(ValueError, match="P7 is normal, but the same patient is fibrosis"):
        prepare(tmp_path / "in", "--labels", tmp_path / "labels.csv")


def test_placeholders():
    for name in ("ANONYMOUS", "Anon^Anon", "anonymized patient", "0000", "xxx", "N/A", "?"):
        assert is_placeholder(name), name
    for name in ("1", "11", "P7", "anon1", "MRN-4711", "patient 3", "x7"):
        assert not is_placeholder(name), name
