"""The shell scripts: they parse, run from any folder, and pass the user's options last."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, sample_options, vae_options
from PIL import Image

LAUNCHERS = ["train_vae", "encode_dataset", "train_ldm_unet", "train_controlnet", "sample"]


def with_torchrun() -> dict[str, str]:
    """The environment with this interpreter's scripts first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_are_what_users_edit(name):
    path = ROOT / "scripts" / f"{name}.sh"
    text = path.read_text()
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in text and text.rstrip().endswith('"$@"')
    variables = [line for line in text.splitlines() if line[:1].isupper() and "=" in line]
    assert variables and all("#" in line for line in variables)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_reach_their_script_from_any_folder(name, tmp_path):
    """Options given on the command line come last, so --help wins over all others."""
    launcher = str(ROOT / "scripts" / f"{name}.sh")
    done = subprocess.run(
        ["bash", launcher, "--help"],
        cwd=tmp_path,
        env=with_torchrun(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: {name}.py" in done.stdout
    assert "(default: " in done.stdout
    assert f"python {name}.py" in done.stdout.split("example:")[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_trains_on_two_processes(phantoms, tmp_path, without_weights):
    launcher = str(ROOT / "scripts" / "train_vae.sh")
    options = vae_options(phantoms, tmp_path / "run", "--steps", "2")
    environment = {**with_torchrun(), "GPUS": "2"}
    done = subprocess.run(
        ["bash", launcher, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and (tmp_path / "run" / "vae_best.pth").is_file()


def test_a_launcher_shows_one_message_and_code_2(tmp_path):
    launcher = str(ROOT / "scripts" / "train_vae.sh")
    wrong = ["--csv_file", str(tmp_path / "nowhere.csv"), "--save_dir", str(tmp_path / "run")]
    done = subprocess.run(
        ["bash", launcher, *wrong, "--device", "cpu"],
        env=with_torchrun(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "nowhere.csv: no such file" in done.stderr


def test_the_sampling_launcher_takes_contours_of_the_users_own(stages, tmp_path):
    """They replace the held-out contours that the launcher asks for by default."""
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 4:14] = mask[8:24, 18:28] = 255
    Image.fromarray(mask).save(tmp_path / "contour.png")
    options = [*sample_options(stages, tmp_path / "out"), "--contours", tmp_path / "contour.png"]
    launcher = str(ROOT / "scripts" / "sample.sh")
    command = ["bash", launcher, *map(str, options), "--num_samples", "1"]
    done = subprocess.run(command, env=with_torchrun(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "sample_00000.png").is_file()


def test_several_nodes_need_an_endpoint():
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "sample.sh")],
        env={**with_torchrun(), "NODES": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "RDZV_ENDPOINT" in done.stderr


def test_readme_names_only_files_that_exist():
    for page in ROOT / "README.md", ROOT / "benchmarks" / "README.md":
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for name in re.findall(r"\b[a-z]\w*\.(?:py|sh)\b", text):
            assert list(ROOT.rglob(name)), f"{page.name}: {name}"
