"""SIGKILL at any time, before and within every kind of write: the same command ends the same."""

import random
import shutil

import pytest
from conftest import controlnet_options, sample_options, unet_options, vae_options
from killing import (
    SCRIPTS,
    contents,
    differences,
    draw_death,
    one_thread,
    run,
)

IN_A_ROW = 4  # deaths of one folder, at most, before it is let come to its end


@pytest.fixture(scope="module", autouse=True)
def single_threaded():
    with one_thread():
        yield


def command(script: str, stages, phantoms) -> list[str]:
    """A command of a second or two, which writes everything that the script can write."""
    steps = ["--steps", "9", "--save_interval", "2", "--val_interval", "3", "--log_interval", "1"]
    steps += ["--keep_last", "2"]
    table = ["--csv_file", phantoms / "label.csv", "--img_dir", phantoms, "--num_workers", "0"]
    vae = ["--vae_checkpoint", stages / "vae" / "vae_best.pth", "--device", "cpu"]
    latents = ["--latent_data_dir", stages / "latents", "--num_samples", "6", "--batch_size", "2"]
    words = {
        "train_vae": lambda: vae_options(phantoms, "run", *steps),
        "encode_dataset": lambda: [*table, *vae, "--output_dir", "latents", "--batch_size", "4"],
        "train_ldm_unet": lambda: unet_options(stages, "run", *steps),
        "train_controlnet": lambda: encoding(controlnet_options(stages, "run", *steps), phantoms),
        "sample": lambda: sample_options(stages, "samples", *latents, "--format", "png"),
    }[script]()
    return [str(word) for word in words if word != "--no_preflight"]


def encoding(options: list, phantoms) -> list:
    """Train the ControlNet on slices that it encodes itself."""
    at = options.index("--latent_data_dir")
    data = ["--data_path", str(phantoms), "--views", "2"]
    return [*options[:at], *options[at + 2 :], *data]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_anywhere_the_same_command_ends_the_same(
    script, stages, phantoms, tmp_path, full, tally
):
    arguments = command(script, stages, phantoms)
    whole = tmp_path / "whole"
    whole.mkdir()
    code, _, changes = run(script, arguments, whole)
    assert code == 0, (tmp_path / "whole.log").read_text()
    code, seconds, _ = run(script, arguments, whole)  # again: nothing is left to do
    assert code == 0, (tmp_path / "whole.log").read_text()
    expected = contents(whole)
    assert sum(isinstance(value, bytes) for value in expected.values()) > 3

    deaths, left = [], 40 if full else 3
    generator = random.Random(script)
    folder, survivors = tmp_path / "killed", []
    while left:
        folder.mkdir()
        for _ in range(min(left, generator.randrange(1, IN_A_ROW + 1))):
            death = draw_death(generator, 1.2 * seconds, changes)
            code, _, _ = run(script, arguments, folder, death)
            log = (tmp_path / "killed.log").read_text()
            assert code in (0, -9, -25), f"{death} after {deaths}: {log}"
            if code:
                deaths.append(death)
                survivors.append(tally(f"SIGKILL of {script}.py"))
                left -= 1
        code, _, _ = run(script, arguments, folder)
        assert code == 0, f"after {deaths}: {(tmp_path / 'killed.log').read_text()}"
        assert differences(expected, contents(folder)) == [], deaths
        for survived in survivors:
            survived()
        shutil.rmtree(folder)
        deaths, survivors = [], []
