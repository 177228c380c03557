"""Tables: what is read, written and refused; label.csv and its split by patient."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fibldm.tables import Row, Split, read_csv, read_table, write_csv

HEADER = "image,contour,patient_id,label,split"
SPLIT = Split(0, 0.2, 0.1)


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "a.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Any table.


def test_cells_are_stripped_strings_by_line_number(tmp_path):
    frame = read_csv(written(tmp_path, " a ,b,c\n007, NA ,nan\n\n , ,\n1.50,,True\n"))
    assert list(frame.columns) == ["a", "b", "c"] and list(frame.index) == [2, 5]
    assert frame.values.tolist() == [["007", "NA", "nan"], ["1.50", "", "True"]]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks(tmp_path, end, mark):
    lines = ["a,b", '"x, y","say ""no"""', f'"two{end}lines, and",é', "u,v"]
    frame = read_csv(written(tmp_path, mark + end.join(lines) + end))
    cells = [["x, y", 'say "no"'], ["two\nlines, and", "é"], ["u", "v"]]
    assert frame.values.tolist() == cells and list(frame.index) == [2, 3, 5]
    assert list(frame.columns) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "0 lines"),
        ("a,b,c\n1,2,3\n\n4,5\n6\n", r"2 lines have fewer cells than .* 3:\n  line 4: 4,5\n  .* 5"),
        ("a,b\n1,2\n3,4,5\n", r"1 lines have more cells than .* 2:\n  line 3: 3,4,5"),
        ('a,b\n1,"2\n3,4\n', r"unbalanced quotes(?s:.*)line 2: a quote is opened and never"),
        ('a,b\n1,2\n3,4"\n', "unbalanced quotes(?s:.*)line 3"),
        ('a,b\n1,2"x"\n', "unbalanced quotes(?s:.*)line 2"),
        ('a,b\n1,"2"x\n', "unbalanced quotes(?s:.*)line 2"),
        ('a,b\n1,"2\n3,4\n5,6"\n', "unbalanced quotes(?s:.*)lines 2 to 4: 1"),
        ("a;b\n1;2\n", "separated by semicolons .*'a;b'.*, expected commas"),
        ("a\tb\n1\t2\n", "separated by tabs"),
        ("a,b,a\n1,2,3\n", "several columns are named 'a'"),
        ("," * 5000 + "\n", "0 lines"),
        ("a" + "," * 5000 + "\n", "5,001 columns, expected at most 4,096"),
        ("a,b\n1" + "," * 10**6 + "\n", "1 lines have more cells"),
        (b"a,b\n\xff\xfe,c\n", "not a CSV text file in UTF-8"),
        ("a,b\n1,2\0\n", "zero bytes"),
    ],
)
def test_bad_tables_are_refused_with_file_and_line(tmp_path, content, match):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ": .*" + match):
        read_csv(path)
    with pytest.raises(ValueError, match=r"gone\.csv: no such file"):
        read_csv(tmp_path / "gone.csv")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_csv(tmp_path)


def test_columns_without_a_name(tmp_path):
    """Empty ones, as spreadsheets leave them, go; numbers of rows, as pandas writes them, stay."""
    frame = read_csv(written(tmp_path, ",a,,\n0,x,,\n1,y,,\n"))
    assert list(frame.columns) == ["", "a"] and frame["a"].tolist() == ["x", "y"]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "b.csv"
    cells = ["007", "NA", "", 'a "b"', "c, d", "e\nf,g", "é\u2028é", "-", "None"]
    rows = [{"x": cell, "y": i} for i, cell in enumerate(cells)]
    write_csv(path, rows, ["y", "x"])
    frame = read_csv(path)
    assert list(frame.columns) == ["y", "x"] and frame["x"].tolist() == cells
    assert frame["y"].tolist() == [str(i) for i in range(len(cells))]
    write_csv(path, pd.DataFrame(rows[:2]), ["x"])
    assert path.read_bytes() == b"x\n007\nNA\n"
    write_csv(path, [{"x": None}, {"y": 0.1}, {"x": "z", "y": 3}], ["x", "y"])
    assert path.read_bytes() == b"x,y\n,\n,0.1\nz,3\n"
    with pytest.raises(ValueError, match=r"cells \['z'\]"):
        write_csv(path, [{"z": 1}], ["x"])


def test_a_table_is_whole_or_not_there(tmp_path):
    path = tmp_path / "b.csv"
    write_csv(path, [{"x": 1}], ["x"])
    with pytest.raises(UnicodeEncodeError):
        write_csv(path, [{"x": "\udcff"}], ["x"])
    assert path.read_text() == "x\n1\n" and [p.name for p in tmp_path.iterdir()] == ["b.csv"]


def test_utf8_whatever_the_locale(tmp_path):
    path = tmp_path / "b.csv"
    code = (
        "import locale, sys; from fibldm.tables import *; "
        "assert 'utf' not in locale.getencoding().lower(), locale.getencoding(); "
        "write_csv(sys.argv[1], [{'x': '\\xe9'}], ['x']); "
        "print(ascii(read_csv(sys.argv[1])['x'][2]))"
    )
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=environment,
        cwd=Path(__file__).parents[1], check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "'\\xe9'", done.stderr
    assert path.read_bytes() == "x\né\n".encode()


# label.csv.


def table(root: Path, text: str, split: Split = SPLIT, files: bool = True):
    """`read_table` of a text, with the files that its first two columns name."""
    (root / "label.csv").write_text(text)
    if files:
        for line in text.splitlines()[1:]:
            for name in line.split(",")[:2]:
                (root / name.strip()).touch()
    return read_table(root / "label.csv", root, split)


def patients(count: int, **columns: str) -> str:
    """label.csv of so many patients with two slices each."""
    lines = [",".join(["image", "contour", "patient_id", *columns])]
    for i in range(2 * count):
        lines.append(",".join([f"{i}.png", f"{i}_c.png", f"p{i // 2}", *columns.values()]))
    return "\n".join(lines)


# The split.


def test_split_fractions():
    parts = [Split(3, 0.2, 0.1).of(f"patient {i}") for i in range(5000)]
    assert parts.count("val") / 5000 == pytest.approx(0.2, abs=0.02)
    assert parts.count("test") / 5000 == pytest.approx(0.1, abs=0.02)


def test_split_depends_on_seed_and_patient_alone():
    first, second = Split(0, 0.5, 0.2), Split(1, 0.5, 0.2)
    names = [f"p{i}" for i in range(200)]
    assert [first.of(n) for n in names] == [Split(0, 0.5, 0.2).of(n) for n in names]
    assert [first.of(n) for n in names] != [second.of(n) for n in names]
    assert Split(0, 0.2, 0.1).of("p0") == "train"  # of all time: SHA-256 of "0:p0"


def test_more_patients_reshuffle_nobody(tmp_path):
    few, _ = table(tmp_path, patients(20))
    many, _ = table(tmp_path, patients(60))
    assert [row.split for row in few] == [row.split for row in many[:40]]
    assert {row.split for row in many} == {"train", "val", "test"}


def test_a_patient_is_in_one_split(tmp_path):
    rows, notes = table(tmp_path, patients(40))
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        assert a.patient_id == b.patient_id and a.split == b.split
    assert notes == []


def test_the_split_column_wins(tmp_path):
    lines = ["a.png,a_c.png,p0,,test", "b.png,b_c.png,p1,,train", "c.png,c_c.png,p2,,VAL"]
    for split in (Split(0, 0.0, 0.0), Split(1, 1.0, 0.0)):
        rows, _ = table(tmp_path, "\n".join([HEADER, *lines]), split)
        assert [row.split for row in rows] == ["test", "train", "val"]


def test_without_patient_id_each_row_is_a_patient_and_the_user_is_warned(tmp_path):
    lines = ["image,contour", *(f"{i}.png,{i}_c.png" for i in range(40))]
    rows, notes = table(tmp_path, "\n".join(lines))
    assert [row.patient_id for row in rows] == [f"{i}.png" for i in range(40)]
    assert len(notes) == 1 and re.search(r"WARNING.*patient_id.*held-out", notes[0])


# label.csv.


def test_rows_are_read(tmp_path):
    text = f"{HEADER}\n a.png , a_c.png,p0, fibrosis ,train\n\nb.png,b_c.png,p1,,val\n"
    rows, notes = table(tmp_path, text)
    assert rows == [
        Row("a.png", "a_c.png", "p0", "fibrosis", "train"),
        Row("b.png", "b_c.png", "p1", "", "val"),
    ]
    assert notes == []


def test_patients_whose_names_differ_in_case_alone_are_told(tmp_path):
    text = patients(20)
    assert table(tmp_path, text)[1] == []
    _, (note,) = table(tmp_path, text.replace(",p3\n", ",P4 \n"))
    assert note.startswith("WARNING") and "1 patients" in note and "'P4' and 'p4'" in note


def test_columns_in_another_order_with_a_byte_order_mark(tmp_path):
    text = "\ufeffSplit,Contour,patient_id,Image\ntrain,a_c.png,p0,a.png\nval,b_c.png,p1,b.png\n"
    for name in ("a.png", "a_c.png", "b.png", "b_c.png"):
        (tmp_path / name).touch()
    rows, _ = table(tmp_path, text, files=False)
    assert [row.image for row in rows] == ["a.png", "b.png"]
    assert [row.contour for row in rows] == ["a_c.png", "b_c.png"]
    assert [row.split for row in rows] == ["train", "val"]


def test_a_byte_order_mark_hides_no_first_column(tmp_path):
    _, notes = table(tmp_path, "\ufeff" + patients(20))
    assert notes == []


def test_other_names_mean_image_and_contour(tmp_path):
    text = patients(20).replace("image,contour", "slice_path,mask_path")
    rows, notes = table(tmp_path, text)
    assert rows[0].image == "0.png" and rows[0].contour == "0_c.png"
    assert rows[0].patient_id == "p0"
    assert len(notes) == 1 and "slice_path" in notes[0] and "mask_path" in notes[0]


def test_cells_may_be_quoted(tmp_path):
    for name in ("a,1.png", "a_c.png", "b.png", "b_c.png"):
        (tmp_path / name).touch()
    text = f'{HEADER}\n"a,1.png",a_c.png,p0,"x, y",train\nb.png,b_c.png,p1,,val\n'
    rows, _ = table(tmp_path, text, files=False)
    assert rows[0].image == "a,1.png" and rows[0].label == "x, y"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "0 lines"),
        ("\n\n", "0 lines"),
        (HEADER + "\n", "1 lines.*header"),
        ("image\na.png\nb.png\n", "1 column.*image.*contour"),
        (f"{HEADER}\na.png,a_c.png\n", "1 lines have fewer cells.*5.*line 2.*a_c.png"),
        (f"{HEADER}\na.png,c.png,p0,,validation\n", "'validation'.*train, val, test"),
        (f"{HEADER}\na.png,c.png,p0,,train\nb.png,d.png,p0,,val\n", "p0.*train.*val"),
        (f"{HEADER}\na.png,c.png,p0,,train\nb.png,d.png,p1,,test\n", "2 patients.*val split"),
        (f"{HEADER}\na.png,c.png,p0,,val\nb.png,d.png,p1,,test\n", "2 patients.*train split"),
    ],
)
def test_bad_tables_are_refused_by_name(tmp_path, text, match):
    with pytest.raises(ValueError, match=rf"(?s)label\.csv: .*{match}"):
        table(tmp_path, text)


def test_an_empty_image_cell_is_refused(tmp_path):
    for name in ("a.png", "a_c.png"):
        (tmp_path / name).touch()
    text = f"{HEADER}\n,a_c.png,p0,,train\na.png,a_c.png,p1,,val\n"
    with pytest.raises(ValueError, match=r"label\.csv: 1 files are missing"):
        table(tmp_path, text, files=False)


def test_a_table_that_is_missing_or_no_text_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.csv: no such file"):
        read_table(tmp_path / "gone.csv", tmp_path, SPLIT)
    (tmp_path / "label.csv").write_bytes(b"image,contour\n\xff\xfe\xfa,b\n")
    with pytest.raises(ValueError, match=r"label\.csv: not a CSV"):
        read_table(tmp_path / "label.csv", tmp_path, SPLIT)


@pytest.mark.parametrize("count", [1, 20, 21, 50])
def test_missing_files_are_listed_20_at_most_and_counted(tmp_path, count):
    text = patients(50)
    table(tmp_path, text)
    for i in range(count):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(ValueError, match=rf"label\.csv: {count} files are missing") as error:
        table(tmp_path, text, files=False)
    message = str(error.value)
    assert message.count(".png") == min(count, 20)
    assert "\n  line 2: 0.png" in message
    assert (f"and {count - 20} more" in message) == (count > 20)
