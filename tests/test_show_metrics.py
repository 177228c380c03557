"""scripts/show_metrics.py: the last validation of runs side by side."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import show_metrics


def write_log(path: Path, *rows: dict[str, float], end: str = "") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_the_last_validation_of_each_run_is_shown(tmp_path, capsys):
    vae, unet = tmp_path / "vae", tmp_path / "unet"
    write_log(vae / "metrics.jsonl", {"step": 1, "val/psnr": 1.0}, {"step": 2, "val/psnr": 30.25})
    write_log(unet / "metrics.0001.jsonl", {"step": 50, "val/loss": 0.125, "val/loss_t500": 9.0})
    write_log(unet / "metrics.jsonl", {"step": 60, "train/loss": 7.0}, end='{"step": 61, "tra')
    show_metrics.main(show_metrics.parse_args([str(vae), str(unet)]))
    table = {
        line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:6]
    }
    assert table["step"] == ["2", "50"]
    assert table["psnr"] == ["30.25", "-"] and table["loss"] == ["-", "0.125"]
    assert table["fid"] == table["kid"] == ["-", "-"]


def test_a_folder_without_a_validation_is_named(tmp_path):
    for rows, told in (None, "expected a run's folder"), ([{"step": 1}], "no validation"):
        if rows:
            write_log(tmp_path / "metrics.jsonl", *rows)
        with pytest.raises(ValueError, match=f"{tmp_path}.*{told}"):
            show_metrics.main(show_metrics.parse_args([str(tmp_path)]))
