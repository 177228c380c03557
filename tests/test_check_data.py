"""scripts/check_data.py prints what an inspection finds; its exit code says whether all is well."""

import shutil
import sys

from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "scripts"))

import check_data


def run(capsys, *options: object) -> tuple[int, str]:
    """Exit code and what was printed."""
    code = 0
    try:
        check_data.main(check_data.parse_args([*map(str, options), "--num_workers", "0"]))
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().out


def test_warnings_are_told_with_exit_code_0(phantoms, tmp_path, capsys):
    code, output = run(capsys, phantoms, "--contact_sheet", tmp_path / "sheet.png")
    assert code == 0 and output.startswith("24 slices of 12 patients, 0 of them with one slice\n")
    assert (
        "not checked: slices that are mirrored left-right or lie on their side (12 patients"
        in output
    )
    assert "warning   few patients                2  less than 5 patients in a split" in output
    assert f"kinds of errors: 0, of warnings: 1; contact sheet: {tmp_path}/sheet.png" in output
    assert Image.open(tmp_path / "sheet.png").width > 8 * 200
    assert not (phantoms / "contact_sheet.png").exists()


def test_errors_end_with_exit_code_1_and_are_cut_short_without_all(phantoms, tmp_path, capsys):
    data = shutil.copytree(phantoms, tmp_path / "data")
    (data / "dataset.json").unlink()
    code, output = run(capsys, data)
    assert code == 1 and "error     no scale                   24  16-bit images" in output
    assert output.count("rescale_intercept") == 1 and "... and 19 more (--all lists" in output
    assert max(len(line) for line in output.splitlines() if "error " in line) <= 100
    assert (data / "contact_sheet.png").exists()
    assert "more" not in run(capsys, data, "--all")[1].split("no scale", 1)[1]


def test_a_window_upside_down_is_refused(tmp_path, capsys):
    assert run(capsys, tmp_path, "--window", "400", "-1000")[0] == 2
