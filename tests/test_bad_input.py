"""Users' mistakes: one clear message, before any training, nothing lost."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, controlnet_options, sample_options, unet_options, vae_options
from PIL import Image

import encode_dataset
import sample
import train_controlnet
import train_ldm_unet
import train_vae

pytestmark = pytest.mark.usefixtures("without_weights")


def error_of(script, arguments, capsys) -> str:
    """The one message of a script that refuses: from main's ValueError or argparse's exit 2."""
    try:
        script.main(script.parse_args([str(a) for a in arguments]))
    except ValueError as error:
        return str(error)
    except SystemExit as error:
        assert error.code == 2
        return capsys.readouterr().err
    pytest.fail("nothing was refused")


@pytest.fixture()
def data(phantoms, tmp_path) -> Path:
    """A copy of the phantoms that a test may spoil."""
    shutil.copytree(phantoms, tmp_path / "data")
    return tmp_path / "data"


def rows_of(data: Path) -> list[list[str]]:
    return list(csv.reader((data / "label.csv").read_text().splitlines()))


def write_rows(data: Path, rows: list[list[str]]) -> None:
    (data / "label.csv").write_text("".join(",".join(row) + "\n" for row in rows))


def no_table(data):
    (data / "label.csv").unlink()


def empty_table(data):
    (data / "label.csv").write_text("")


def header_alone(data):
    write_rows(data, rows_of(data)[:1])


def one_column(data):
    write_rows(data, [row[:1] for row in rows_of(data)])


def missing_files(data):
    shutil.rmtree(data / "contours")


def truncated_image(data):
    path = data / rows_of(data)[3][0]
    path.write_bytes(path.read_bytes()[:200])


def text_as_image(data):
    (data / rows_of(data)[3][0]).write_text("not an image")


def contour_of_another_size(data):
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(data / rows_of(data)[2][1])


def one_patient(data):
    rows = rows_of(data)
    column = rows[0].index("patient_id")
    write_rows(data, [rows[0], *([*r[:column], "p", *r[column + 1 :]] for r in rows[1:])])


def scale_not_given(data):
    (data / "dataset.json").unlink()


def damaged_scale(data):
    (data / "dataset.json").write_text('{"rescale_slope": "one"}')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_table, ["label.csv", "no such file"]),
        (empty_table, ["label.csv", "0 lines"]),
        (header_alone, ["label.csv", "1 lines"]),
        (one_column, ["label.csv", "1 column", "at least two"]),
        (missing_files, ["label.csv", "24 files are missing", "... and 4 more", "contours"]),
        (truncated_image, ["1 of 24 rows", "cannot be decoded", ".png"]),
        (text_as_image, ["1 of 24 rows", "cannot be decoded", ".png"]),
        (contour_of_another_size, ["1 of 24 rows", "(16, 16)", "(32, 32)"]),
        (one_patient, ["of 1 patients none falls into the", "expected at least 1"]),
        (scale_not_given, ["uint16", "dataset.json"]),
        (damaged_scale, ["dataset.json", "rescale_slope"]),
    ],
)
def test_bad_data_is_refused_before_training(spoil, words, data, tmp_path, capsys):
    spoil(data)
    message = error_of(train_vae, vae_options(data, tmp_path / "run", "--steps", "1"), capsys)
    for word in words:
        assert word in message
    assert message.count("\n  ") <= 21  # at most 20 rows and "... and N more"
    # At most the note of which files could be read, so that the next start reads the others alone.
    assert {path.name for path in tmp_path.glob("run/*")} <= {"checked.json"}


def test_sizes_that_do_not_divide(phantoms, tmp_path, capsys):
    options = vae_options(phantoms, tmp_path / "run", "--image_size", "100", "--latent_size", "16")
    message = error_of(train_vae, options, capsys)
    assert "100" in message and "16" in message


def test_batch_size_that_does_not_divide(phantoms, tmp_path, capsys):
    options = vae_options(phantoms, tmp_path / "run", "--steps", "1", "--grad_accum", "3")
    assert "--batch_size 4" in error_of(train_vae, options, capsys)
    assert not (tmp_path / "run").exists()  # so the corrected command is not another's settings


@pytest.mark.parametrize("stage", ["vae", "unet", "controlnet"])
def test_classes_to_balance_that_are_not_those_of_the_data(
    stage, stages, phantoms, tmp_path, capsys
):
    inputs, script = {
        "vae": (vae_options(phantoms, tmp_path), train_vae),
        "unet": (unet_options(stages, tmp_path), train_ldm_unet),
        "controlnet": (controlnet_options(stages, tmp_path), train_controlnet),
    }[stage]
    more = ["--steps", "1", "--balance_labels", "fibrose=0.5", "normal=0.5"]
    message = error_of(script, [*inputs, *more], capsys)
    for word in "--balance_labels fibrose=0.5 normal=0.5", "expected a weight", "fibrosis: ":
        assert word in message
    assert not list(tmp_path.glob("*.pth"))


def test_labels_to_balance_that_are_absent(data, tmp_path, capsys):
    write_rows(data, [row[:3] for row in rows_of(data)])
    words = vae_options(data, tmp_path / "run", "--steps", "1", "--balance_labels")
    message = error_of(train_vae, words, capsys)
    assert "at least two classes in the column label" in message and "unlabeled: " in message


def test_a_gpu_that_is_absent(phantoms, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    options = vae_options(phantoms, tmp_path / "run", "--device", "cuda")
    message = error_of(train_vae, options, capsys)
    assert "--device cuda" in message and "0 are visible" in message


@pytest.mark.parametrize("option", ["--latent_dim", "--latent_size"])
@pytest.mark.parametrize("stage", ["unet", "controlnet"])
def test_another_latent_shape_than_the_data_has(stage, option, stages, tmp_path, capsys):
    make, script = {
        "unet": (unet_options, train_ldm_unet),
        "controlnet": (controlnet_options, train_controlnet),
    }[stage]
    message = error_of(script, make(stages, tmp_path / "run", option, "16"), capsys)
    assert f"{option} 16" in message and ("4" if option == "--latent_dim" else "8") in message


def test_other_contour_channels_than_the_unet_has(stages, tmp_path, capsys):
    options = controlnet_options(stages, tmp_path / "run", "--contour_channels", "2")
    message = error_of(train_controlnet, options, capsys)
    assert "--contour_channels" in message and "2" in message and "1" in message


def test_a_vae_given_as_a_unet(stages, tmp_path, capsys):
    options = sample_options(stages, tmp_path / "out", "--unconditional")
    options[options.index("--unet_checkpoint") + 1] = str(stages / "vae" / "vae_best.pth")
    at = options.index("--controlnet_checkpoint")
    message = error_of(sample, options[:at] + options[at + 2 :], capsys)
    assert "expected a unet checkpoint, found kind 'vae'" in message


def test_a_truncated_checkpoint(stages, tmp_path, capsys):
    content = (stages / "vae" / "vae_best.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(content[: len(content) // 2])
    options = unet_options(stages, tmp_path / "run")
    options[options.index("--vae_checkpoint") + 1] = str(tmp_path / "short.pth")
    message = error_of(train_ldm_unet, options, capsys)
    assert "short.pth: cannot be read as a checkpoint" in message


def test_a_truncated_last_pth_is_no_fresh_start(stages, tmp_path, capsys):
    shutil.copytree(stages / "unet", tmp_path / "run")
    last = tmp_path / "run" / "last.pth"
    last.write_bytes(last.read_bytes()[:1000])
    options = unet_options(stages, tmp_path / "run", "--steps", "4")
    message = error_of(train_ldm_unet, options, capsys)
    assert "last.pth" in message and "1000 bytes" in message
    assert last.stat().st_size == 1000


def test_another_vae_than_the_latents_are_of(stages, phantoms, tmp_path, capsys):
    train_vae.main(
        train_vae.parse_args(vae_options(phantoms, tmp_path / "vae", "--steps", "1", "--seed", "1"))
    )
    other = str(tmp_path / "vae" / "vae_best.pth")
    hashes = [
        __import__("hashlib").sha256(path.read_bytes()).hexdigest()
        for path in (stages / "vae" / "vae_best.pth", Path(other))
    ]
    for script, options in (
        (train_ldm_unet, unet_options(stages, tmp_path / "run")),
        (train_controlnet, controlnet_options(stages, tmp_path / "run")),
        (sample, sample_options(stages, tmp_path / "run", "--unconditional")),
    ):
        if script is sample:
            at = options.index("--controlnet_checkpoint")
            options = options[:at] + options[at + 2 :]
        options[options.index("--vae_checkpoint") + 1] = other
        message = error_of(script, options, capsys)
        assert hashes[0] in message and hashes[1] in message
    table = ["--csv_file", phantoms / "label.csv", "--img_dir", phantoms]
    options = [*table, "--vae_checkpoint", other, "--output_dir", stages / "latents"]
    message = error_of(encode_dataset, [*options, "--device", "cpu"], capsys)
    assert hashes[0] in message and hashes[1] in message and "--overwrite" in message


def test_another_architecture_than_the_run_has(stages, tmp_path, capsys):
    shutil.copytree(stages / "unet", tmp_path / "run")
    options = unet_options(stages, tmp_path / "run", "--channels", "8", "24")
    message = error_of(train_ldm_unet, options, capsys)
    assert "other settings" in message and "[8, 16]" in message and "[8, 24]" in message


def test_overwrite_spares_what_is_no_latent_data_set(stages, phantoms, capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    options = ["--csv_file", phantoms / "label.csv", "--img_dir", phantoms, "--overwrite"]
    options += ["--vae_checkpoint", stages / "vae" / "vae_best.pth", "--device", "cpu"]
    message = error_of(encode_dataset, [*options, "--output_dir", tmp_path / "mine"], capsys)
    assert "not a latent data set" in message
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--contours", "/nowhere"], ["--contours /nowhere", "no such"]),
        (["--unconditional"], ["leave out --controlnet_checkpoint"]),
        (["--latent_data_dir", "/nowhere"], ["/nowhere", "encode_dataset.py"]),
        (["--latent_data_dir", "LATENTS", "--label", "asthma"], ["asthma", "fibrosis"]),
        (
            ["--latent_data_dir", "LATENTS", "--label", "normal=1", "asthma=0"],
            ["label asthma", "normal"],
        ),
        (
            ["--latent_data_dir", "LATENTS", "--label", "normal=x", "fibrosis=1"],
            ["normal=x", "number"],
        ),
        (["--latent_data_dir", "LATENTS", "--label", "normal=0.4", "fibrosis=0.4"], ["sum to 0.8"]),
        (["--latent_data_dir", "LATENTS", "--label", "normal=2", "fibrosis=-1"], ["at least 0"]),
        (["--latent_data_dir", "LATENTS", "--label", "normal=nan"], ["sum to nan"]),
        (["--latent_data_dir", "LATENTS", "--steps", "2000"], ["2000", "1000"]),
        ([], ["--contours", "required"]),
    ],
)
def test_samples_that_cannot_be_drawn(more, words, stages, tmp_path, capsys):
    more = [str(stages / "latents") if word == "LATENTS" else word for word in more]
    message = error_of(sample, sample_options(stages, tmp_path / "out", *more), capsys)
    for word in words:
        assert word in message


def test_samples_are_not_overwritten_unasked(stages, tmp_path, capsys):
    options = sample_options(stages, tmp_path / "out", "--latent_data_dir", stages / "latents")
    options += ["--num_samples", "1"]
    sample.main(sample.parse_args([str(o) for o in options]))
    assert "--overwrite" in error_of(sample, [*options, "--seed", "1"], capsys)
    before = (tmp_path / "out" / "sample_00000.png").read_bytes()
    sample.main(sample.parse_args([str(o) for o in options]))  # the same command finds them
    assert "holds these samples already" in capsys.readouterr().out
    sample.main(sample.parse_args([str(o) for o in [*options, "--seed", "1", "--overwrite"]]))
    assert (tmp_path / "out" / "sample_00000.png").read_bytes() != before


def test_the_folder_of_a_run_is_no_place_for_samples(stages, tmp_path, capsys):
    shutil.copytree(stages / "unet", tmp_path / "unet")
    options = sample_options(stages, tmp_path / "unet", "--latent_data_dir", stages / "latents")
    assert "a run of another script" in error_of(sample, [*options, "--overwrite"], capsys)
    assert (tmp_path / "unet" / "unet_best.pth").is_file()


@pytest.mark.parametrize("script", [train_vae, encode_dataset, sample])
def test_a_folder_that_cannot_be_written_is_one_message(script, stages, phantoms, tmp_path):
    """/proc refuses even an administrator, as a read-only file system does."""
    place = "/proc/fibldm"
    options = {
        train_vae: lambda: vae_options(phantoms, place),
        encode_dataset: lambda: [
            *("--csv_file", phantoms / "label.csv", "--img_dir", phantoms, "--output_dir", place),
            *("--vae_checkpoint", stages / "vae" / "vae_best.pth", "--device", "cpu"),
        ],
        sample: lambda: sample_options(stages, place, "--latent_data_dir", stages / "latents"),
    }[script]()
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr
    assert place in errors[0] or "/proc/" in errors[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_terminal_shows_one_message_and_code_2(processes, tmp_path):
    """No traceback from the script itself; torchrun adds its own summary."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "train_vae.py"), "--csv_file", "nowhere.csv", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "train_vae.py: error" in done.stderr and "nowhere.csv: no such file" in done.stderr
    if processes == 1:
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    else:
        assert done.returncode != 0
