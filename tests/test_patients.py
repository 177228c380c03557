"""Who is a patient: what is one person's must not land on both sides of the split."""

import nibabel
import numpy as np
import pytest
import tifffile
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


# Nothing vanishes, also in a later run.


def test_spellings_of_one_patient_in_one_table_are_one_series(tmp_path):
    listed(tmp_path / "in", listing().replace("p1,val", "P0,train"))
    data = prepare(tmp_path / "in", "--min_lung_area", 0)
    assert len(rows_of(data)) == 10 and patients(data) == 1


def test_a_file_beside_its_folder_is_one_series(tmp_path):
    folder = tmp_path / "in" / "p1"
    folder.mkdir(parents=True)
    for i, hu in enumerate(scan()):
        np.save(folder / f"s{i}.npy", hu)
    data = prepare(folder / "s0.npy", tmp_path / "in", "--output_dir", tmp_path / "data")
    assert len(rows_of(data)) == 5


def test_rows_that_are_deleted_or_renamed_go_in_the_next_run(tmp_path, capsys):
    listed(tmp_path / "in", listing())
    options = (tmp_path / "in", "--min_lung_area", 0)
    assert len(rows_of(prepare(*options))) == 10
    lines = listing().replace("p1,val", "q1,val").splitlines()
    (tmp_path / "in" / "label.csv").write_text("\n".join(lines[:-1]))
    data = prepare(*options)
    assert len(rows_of(data)) == 9 and patients(data) == 2
    assert any("1 patients of an earlier run are in no line any more" in n for n in notes(capsys))
    (tmp_path / "in" / "label.csv").write_text("\n".join(lines[:6]))
    data = prepare(*options)
    assert len(rows_of(data)) == 5 and {row["split"] for row in rows_of(data)} == {"train"}
    assert len(list((data / "images").iterdir())) == 5


def test_what_no_input_makes_any_more_is_counted(tmp_path, capsys):
    study(tmp_path / "in", 0, "P1", "1")
    study(tmp_path / "in", 1, "P2", "2")
    prepare(tmp_path / "in")
    data = prepare(tmp_path / "in" / "s0", "--output_dir", tmp_path / "data")
    assert patients(data) == 2
    assert any("1 series of earlier runs are in none of these inputs" in n for n in notes(capsys))


@pytest.mark.parametrize(("name", "what"), [("P8", "study"), ("p7 ", "study"), ("P  7", "person")])
def test_a_patient_who_has_another_name_in_a_later_run_is_told(tmp_path, capsys, name, what):
    study(tmp_path / "a", 0, "P7" if what == "study" else "P 7", "1")
    study(tmp_path / "b", 1, name, "1" if what == "study" else "2")
    for folder in "ab":
        prepare(tmp_path / folder, "--output_dir", tmp_path / "data")
    assert any(f"the same {what} as another patient" in note for note in notes(capsys))


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_below_its_table_is_refused(tmp_path, link):
    listed(tmp_path / "in", listing())
    top = tmp_path / "in" / "images"
    if link:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "link").symlink_to(top)
        top = tmp_path / "other" / "link"
    with pytest.raises(ValueError, match="lists files of the inputs, and lies outside"):
        prepare(top, "--output_dir", tmp_path / "data")
    lines = listing().splitlines()
    (tmp_path / "in" / "label.csv").write_text("\n".join(lines[:6]))
    inputs = [tmp_path / "other"] * link + [tmp_path / "in"]
    options = ("--min_lung_area", 0, "--rescale", 1, -1024)
    data = prepare(*inputs, "--output_dir", tmp_path / "data", *options)
    assert len(rows_of(data)) == 5 and patients(data) == 1


def test_lines_without_a_patient_are_told(tmp_path, capsys):
    listed(tmp_path / "in", listing().replace("p1_2.png,p1,val", "p1_2.png,,val"))
    assert patients(prepare(tmp_path / "in", "--min_lung_area", 0)) == 3
    assert any("1 lines have no patient_id" in note and "9" in note for note in notes(capsys))


def test_a_table_without_names_of_columns_is_refused(tmp_path):
    listed(tmp_path / "in", "\n".join(listing().splitlines()[1:]))
    with pytest.raises(ValueError, match=r"'images/p0_0\.png' in the first line"):
        prepare(tmp_path / "in")


@pytest.mark.parametrize("header", ["image,mask,patient,split", "slice,lung,PatientID,split"])
def test_other_names_of_patient_id(tmp_path, header):
    listed(tmp_path / "in", listing(header))
    assert patients(prepare(tmp_path / "in", "--min_lung_area", 0)) == 2


def test_an_image_of_two_patients_is_an_error(tmp_path):
    listed(tmp_path / "in", listing() + "images/p0_0.png,masks/p0_0.png,p1,val\n")
    with pytest.raises(ValueError, match=r"p0_0\.png is listed as of two patients: p0 and p1"):
        prepare(tmp_path / "in")


@pytest.mark.parametrize("name", ["", "ANON"])
def test_one_series_uid_in_two_studies_is_two_series(tmp_path, name):
    for number in range(2):
        study(tmp_path / "in", number, name, str(number), SeriesInstanceUID="1.9")
    data = prepare(tmp_path / "in")
    assert len(rows_of(data)) == 10 and patients(data) == (1 if name else 2)
    assert len(list((data / "series").iterdir())) == 2


def test_uids_that_another_patient_has_replace_no_one(tmp_path, capsys):
    datasets = ct_datasets(0, PatientID="P7", StudyInstanceUID="1.2")
    write_dicom(tmp_path / "a", datasets)
    for dataset in datasets:
        dataset.PatientID = "P8"
    write_dicom(tmp_path / "b", datasets)
    prepare(tmp_path / "a", "--output_dir", tmp_path / "data")
    data = prepare(tmp_path / "b", "--output_dir", tmp_path / "data")
    assert len(rows_of(data)) == 10 and patients(data) == 2
    assert any("both are kept" in note for note in notes(capsys))


@pytest.mark.parametrize("order", [1, -1])
def test_a_placeholder_in_the_study_of_a_name_leaves_others_their_labels(tmp_path, order):
    numbers = ["1", "2"][::order]
    study(tmp_path / "in", 0, "P7", numbers[0])
    study(tmp_path / "in", 1, "ANONYMOUS", numbers[0])
    study(tmp_path / "in", 2, "ANONYMOUS", numbers[1])
    (tmp_path / "labels.csv").write_text("patient_id,label\nANONYMOUS,a\nP7,b\n")
    data = prepare(tmp_path / "in", "--labels", tmp_path / "labels.csv")
    assert sorted(row["label"] for row in rows_of(data)) == ["a"] * 5 + ["b"] * 10


@pytest.mark.parametrize("spelling", ["p7", " P7", "P7\u200b", "\uff307"])
def test_labels_in_any_spelling(tmp_path, spelling):
    study(tmp_path / "in", 0, "P7", "1")
    (tmp_path / "labels.csv").write_text(f"patient_id,label\n{spelling},a\n")
    data = prepare(tmp_path / "in", "--labels", tmp_path / "labels.csv")
    assert {row["label"] for row in rows_of(data)} == {"a"}


def test_volumes_of_one_name_in_folders_of_several_are_patients_each(tmp_path):
    for i, name in enumerate(["A/001", "A/002", "B/001", "B/002"]):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nifti(scan(i)), tmp_path / "in" / f"{name}.nii")
    assert patients(prepare(tmp_path / "in")) == 4


def test_hidden_files_are_counted(tmp_path, capsys):
    study(tmp_path / "in", 0, "P7", "1")
    study(tmp_path / "in" / ".cache", 1, "P8", "2")
    (tmp_path / "in" / "._IM000").write_text("x")
    assert patients(prepare(tmp_path / "in")) == 1
    assert "2 files and folders, as " in capsys.readouterr().out


def test_volumes_that_are_parts_of_one_are_one_patient(tmp_path):
    (tmp_path / "in" / "p1").mkdir(parents=True)
    plane = '<TiffData><UUID FileName="{}.ome.tif">urn:uuid:{}</UUID></TiffData>'
    for name, part in ("a", scan()[:3]), ("b", scan()[3:]):
        text = "".join(plane.format(n, n) for n in "ab")
        tifffile.imwrite(
            tmp_path / "in" / "p1" / f"{name}.ome.tif",
            part.astype(np.float32),
            description=f"<OME><Image><Pixels>{text}</Pixels></Image></OME>",
            metadata=None,
            photometric="minisblack",
        )
    data = prepare(tmp_path / "in", "--min_lung_area", 0)
    assert len(rows_of(data)) == 5 and patients(data) == 1
