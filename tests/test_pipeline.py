"""The scripts end to end: the design's commands on real slices, resume, processes, precision."""

import csv
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    controlnet_options,
    sample_options,
    unet_options,
    vae_options,
)
from PIL import Image

import encode_dataset
import sample
import train_controlnet
import train_ldm_unet
import train_vae
from fibldm import ct, datasets, encoding
from fibldm.checkpoint import load_model, save
from fibldm.disk import file_hash
from fibldm.encoding import LatentDataset
from fibldm.optim import Muon
from fibldm.run import Run
from fibldm.samplers import SAMPLERS
from fibldm.tables import Split, read_table
from fibldm.texture import TextureDecoder
from fibldm.unet import UNet
from fibldm.vae import LATENT_SCALE, TEXTURE_WEIGHT, VAE

pytestmark = pytest.mark.usefixtures("without_weights", "one_thread")


@pytest.fixture(scope="module")
def one_thread():
    """As the processes that are killed: the number of threads decides the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read_log(run_folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(row) for row in (run_folder / "metrics.jsonl").read_text().splitlines()]


SCRIPTS = {"vae": train_vae, "unet": train_ldm_unet, "controlnet": train_controlnet}


def run(script, arguments):
    script.main(script.parse_args([str(a) for a in arguments]))


def options(stage, stages, phantoms, save_dir, *more):
    """The tiny options of a training stage."""
    if stage == "vae":
        return vae_options(phantoms, save_dir, *more)
    return {"unet": unet_options, "controlnet": controlnet_options}[stage](stages, save_dir, *more)


def copy_slices(source: Path, target: Path, count: int) -> None:
    """The first slices of a data set, with its table and dataset.json."""
    rows = list(csv.reader((source / "label.csv").open()))[: count + 1]
    for name in {cell for row in rows[1:] for cell in row[:2]}:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)
    with open(target / "label.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    if (source / "dataset.json").is_file():
        shutil.copy(source / "dataset.json", target)


def test_the_five_commands_of_the_design_on_real_slices(ct_folder, tmp_path, monkeypatch):
    """256x256 -> (8, 16, 16), flags as written there, plus small sizes and steps."""
    copy_slices(ct_folder / "lungs", tmp_path / "data", 24)
    monkeypatch.chdir(tmp_path)
    small = "--batch_size 2 --num_workers 0 --device cpu --steps 2"
    few = f"--val_samples 2 --val_sampling_steps 2 {small}"
    models = """--vae_checkpoint ./vae_run_1/vae_best.pth
        --unet_checkpoint ./model_runs/ldm_unet_run_1/unet_best.pth"""
    run(train_vae, shlex.split(f"--base_channels 8 --blocks 1 --val_fraction 0.2 {small}"))
    run(
        encode_dataset,
        shlex.split("""--csv_file ./data/label.csv --img_dir ./data/
        --vae_checkpoint ./vae_run_1/vae_best.pth --output_dir ./data/latents_dataset"""),
    )
    run(
        train_ldm_unet,
        shlex.split(f"""--latent_data_dir ./data/latents_dataset
        --vae_checkpoint ./vae_run_1/vae_best.pth --save_dir ./model_runs/ldm_unet_run_1
        --latent_dim 8 --latent_size 16 --channels 16 32 {few}"""),
    )
    run(
        train_controlnet,
        shlex.split(f"""--data_path ./data --csv_path label.csv {models}
        --save_dir ./model_runs/controlnet_run_1
        --latent_dim 8 --latent_size 16 --contour_channels 1 {few}"""),
    )
    run(
        sample,
        shlex.split(f"""{models}
        --controlnet_checkpoint ./model_runs/controlnet_run_1/controlnet_best.pth
        --contours ./data/contours --num_samples 3 --sampler dpmpp_2m --steps 4
        --guidance_scale 1.5 --format png --seed 0 --output_dir samples"""),
    )

    data = LatentDataset("data/latents_dataset")
    train = len(data.indices("train", views=False))
    count = 24 + 7 * train
    assert data.latents.shape == (count, 8, 16, 16)
    assert data.contours.shape == (count, 1, 256, 256)
    made = LatentDataset("model_runs/controlnet_run_1/latents")
    assert np.array_equal(made.latents[:], data.latents[:])
    table = Path("samples/samples.csv").read_text().splitlines()
    assert [row["file"] for row in csv.DictReader(table)] == [
        f"sample_{i:05d}.png" for i in range(3)
    ]
    assert Image.open("samples/sample_00000.png").size == (256, 256)
    assert Image.open("samples/grid.png").width >= 3 * 3 * 256
    for folder in "vae_run_1", "model_runs/ldm_unet_run_1", "model_runs/controlnet_run_1":
        names = {path.name for path in Path(folder).iterdir()}
        assert {"args.json", "metrics.jsonl", "tensorboard", "samples", "last.pth"} <= names
        assert any(name.endswith("_best.pth") for name in names)
        assert list(Path(folder, "samples").glob("step_*.png"))


def test_the_tiny_vae_has_matrices_for_muon():
    """Else the tests of resume, of processes and of precision here would be of AdamW alone."""
    vae = VAE(32, 8, 4, base_channels=16, blocks=1)
    assert [group["matrix"] for group in Muon(vae, 1e-3).param_groups] == [True, False]


def test_the_latents_of_the_training_split_are_standard(stages):
    data = LatentDataset(stages / "latents")
    latents = data.latents[data.indices("train", views=False)]
    assert np.allclose(latents.mean(axis=(0, 2, 3)), 0, atol=1e-3)
    assert np.allclose(latents.var(axis=(0, 2, 3)), 1, atol=1e-2)
    vae, _ = load_model(stages / "vae" / "vae_best.pth", VAE)
    image = data.heldout_images([data.indices("val")[0]], torch.device("cpu"))
    again = vae.encode(image).mean * LATENT_SCALE
    assert np.allclose(again, data.latents[data.indices("val")[:1]], atol=1e-2)  # float16 images


def test_a_dry_run_of_encoding_reads_all_and_writes_nothing(stages, phantoms, tmp_path, capsys):
    shutil.copytree(phantoms, tmp_path / "data")
    table = ["--csv_file", tmp_path / "data" / "label.csv", "--img_dir", tmp_path / "data"]
    vae = ["--vae_checkpoint", stages / "vae" / "vae_best.pth", "--device", "cpu"]
    words = [*table, *vae, "--output_dir", tmp_path / "latents", "--num_workers", "0", "--dry_run"]
    run(encode_dataset, words)
    assert "latents of 24 slices can be encoded into" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    next((tmp_path / "data" / "images").iterdir()).write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 24 rows are bad"):
        run(encode_dataset, words)


def test_8_bit_images_without_dataset_json(phantoms, tmp_path, capsys):
    for row in csv.DictReader((phantoms / "label.csv").open()):
        hu = ct.read_hu(phantoms / row["image"], (1.0, -1024.0))
        path = tmp_path / row["image"]
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.round((ct.hu_to_unit(hu) + 1) * 127.5).astype(np.uint8)).save(path)
    shutil.copytree(phantoms / "contours", tmp_path / "contours")
    shutil.copy(phantoms / "label.csv", tmp_path)
    run(train_vae, vae_options(tmp_path, tmp_path / "run", "--steps", "2"))
    out = capsys.readouterr().out
    assert out.count("8-bit, taken as already windowed") == 1
    assert (tmp_path / "run" / "vae_best.pth").is_file()


def test_16_bit_images_without_dataset_json_are_told_the_remedy_once(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "data")
    (tmp_path / "data" / "dataset.json").unlink()
    with pytest.raises(ValueError, match="24 of 24 rows are bad") as error:
        run(train_vae, vae_options(tmp_path / "data", tmp_path / "run", "--steps", "2"))
    assert str(error.value).count("uint16 values without a scale") == 20  # of those listed
    assert str(error.value).count("write a dataset.json beside label.csv") == 1


def test_what_goes_wrong_in_a_vae_is_said_with_its_remedy(phantoms, tmp_path, capsys):
    """A scale that is not the files', and a KL weight that drowns every channel in noise."""
    shutil.copytree(phantoms, tmp_path / "data")
    facts = json.loads((tmp_path / "data" / "dataset.json").read_text())
    facts |= {"rescale_slope": facts["rescale_slope"] / 1000, "rescale_intercept": 0}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(facts))
    steps = ("--steps", "30", "--kl_weight", "10", "--lr", "0.02")
    run(train_vae, vae_options(tmp_path / "data", tmp_path / "run", *steps))
    out = capsys.readouterr().out
    assert len(re.findall(r"WARNING: (\d+) of \1 slices looked at do not have the HU", out)) == 1
    assert "rescale_slope" in out and "scripts/check_data.py" in out
    assert "have collapsed" in out and "lower --kl_weight" in out


def test_the_vae_is_stepped_by_muon_at_the_rate_given(phantoms, tmp_path, monkeypatch):
    rates, step = {}, train_vae.optimizer_step

    def watched(optimizer, *rest):
        step(optimizer, *rest)
        rates[type(optimizer).__name__] = {group["lr"] for group in optimizer.param_groups}

    monkeypatch.setattr(train_vae, "optimizer_step", watched)
    run(train_vae, vae_options(phantoms, tmp_path / "run", "--steps", "4", "--lr", "1e-3"))
    assert rates == {"Muon": {1e-3}}


def test_slices_are_moved_in_training(phantoms, tmp_path):
    """The first step's reconstruction loss is of slices as they are, or of moved ones."""
    losses = {}
    for most in "0", "0.125", "default":
        more = () if most == "default" else ("--max_shift", most)
        folder = tmp_path / most
        run(train_vae, vae_options(phantoms, folder, "--steps", "1", *more))
        losses[most] = read_log(folder)[0]["train/reconstruction"]
    assert losses["0"] != losses["0.125"] == losses["default"]  # 1 / 8


def test_each_slice_is_trained_with_noise_and_angle_of_its_own(phantoms, tmp_path, monkeypatch):
    seen, loss = [], TextureDecoder.loss

    def watched(self, known, x, noise, angle):
        seen.append((x, noise, angle))
        return loss(self, known, x, noise, angle)

    monkeypatch.setattr(TextureDecoder, "loss", watched)
    more = ("--steps", "2", "--val_interval", "2", "--no_preflight")
    run(train_vae, vae_options(phantoms, tmp_path / "run", *more))
    trained, validated = seen[:2], seen[2:]
    for column in 1, 2:
        values = {one[column][i].numpy().tobytes() for one in trained for i in range(4)}
        assert len(values) == 8  # 2 steps of 4
    run(train_vae, vae_options(phantoms, tmp_path / "other", *more, "--seed", "5"))
    for one, other in zip(validated, seen[-len(validated) :], strict=True):
        assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def noise_drawn_from(monkeypatch, script, arguments) -> torch.Tensor:
    """The noise that the VAE decodes with, one for each slice, (N, 1, S, S)."""
    seen, decode = [], VAE.decode

    def watched(self, z, noise=None):
        seen.append(noise)
        return decode(self, z, noise)

    with monkeypatch.context() as patch:
        patch.setattr(VAE, "decode", watched)
        run(script, arguments)
    return torch.cat(seen)


def test_each_sample_has_texture_of_its_own(stages, phantoms, tmp_path, monkeypatch):
    def drawn(name, *more):
        more = ("--latent_data_dir", str(stages / "latents"), "--num_samples", "3", *more)
        return noise_drawn_from(monkeypatch, sample, sample_options(stages, tmp_path / name, *more))

    together, alone, other = drawn("a"), drawn("b", "--batch_size", "1"), drawn("c", "--seed", "1")
    assert torch.equal(together, alone) and not torch.equal(together, other)
    assert len({float(noise.sum()) for noise in together}) == 3
    validated = unet_options(stages, tmp_path / "unet", "--steps", "1")
    noise = noise_drawn_from(monkeypatch, train_ldm_unet, validated)
    assert len({float(one.sum()) for one in noise}) == len(noise) == 4


def test_a_vae_can_start_from_another_ones_weights(stages, phantoms, tmp_path, capsys):
    source = stages / "vae" / "vae_best.pth"
    more = ("--steps", "1", "--lr", "1e-9", "--init_checkpoint", str(source))
    run(train_vae, vae_options(phantoms, tmp_path / "run", *more))
    (before, _), (after, content) = (
        load_model(path, VAE) for path in (source, tmp_path / "run" / "vae_best.pth")
    )
    assert content["lineage"]["init_checkpoint"] == file_hash(source)
    for name, weight in before.named_parameters():
        torch.testing.assert_close(dict(after.named_parameters())[name], weight, atol=1e-6, rtol=0)
    x = torch.linspace(-1, 1, 32 * 32).view(1, 1, 32, 32)
    found, expected = (v.likelihood(v.encode(x).mean).mean for v in (after, before))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    first = read_log(tmp_path / "run")[0]["train/kl"]
    assert first == pytest.approx(read_log(stages / "vae")[0]["train/kl"], rel=0.5)  # uncalibrated
    for wrong, found in {
        "--blocks 2": "its blocks: found 1, expected 2",
        "--window -160 240": r"its window: found \[-1000.*-160",
        "--split_seed 3": r"its split: found .*'seed': 0.*'seed': 3",
    }.items():
        with pytest.raises(ValueError, match=rf"vae_best.pth: {found}"):
            run(train_vae, vae_options(phantoms, tmp_path / "other", *more, *wrong.split()))
    with pytest.raises(ValueError, match=r"init_checkpoint: found .*, expected None"):
        run(train_vae, vae_options(phantoms, tmp_path / "run", *more[:4]))
    assert "trained on another table" not in capsys.readouterr().out
    shutil.copytree(phantoms, tmp_path / "data")
    (tmp_path / "data" / "label.csv").open("a").write("\n")
    run(train_vae, vae_options(tmp_path / "data", tmp_path / "new", *more))
    assert "trained on another table" in capsys.readouterr().out


def test_a_unet_can_start_from_another_ones_weights(stages, tmp_path, capsys):
    """Another dropout is no obstacle; classes are found by name; patients and VAE are warned of."""
    source = tmp_path / "start.pth"
    content = torch.load(stages / "unet" / "unet_best.pth", weights_only=True)
    content["classes"] = content["classes"][::-1]
    save(source, content)
    more = ("--steps", "1", "--lr", "1e-9", "--init_checkpoint", str(source), "--dropout", "0.1")
    run(train_ldm_unet, unet_options(stages, tmp_path / "run", *more))
    assert "WARNING: " + str(source) not in capsys.readouterr().out
    path = tmp_path / "run" / "unet_best.pth"
    (before, _), (after, content) = load_model(source, UNet), load_model(path, UNet)
    assert content["lineage"]["init_checkpoint"] == file_hash(source)
    assert content["split"] == {"seed": 0, "val_fraction": 0.3, "test_fraction": 0.1}
    expected = before.state_dict()
    expected["encoder.label.weight"] = expected["encoder.label.weight"][[1, 0, 2]]
    for name, weight in after.state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"init_checkpoint: found .*, expected None"):
        run(train_ldm_unet, unet_options(stages, tmp_path / "run", *more[:4], *more[6:]))
    wider = ("--channels", "16", "32")
    with pytest.raises(ValueError, match=r"start.pth: its channels: found \[8, 16\]"):
        run(train_ldm_unet, unet_options(stages, tmp_path / "other", *more, *wider))
    content = torch.load(source, weights_only=True)
    content["lineage"] |= {"label_csv": "0" * 64, "vae": "0" * 64}
    save(source, content)
    run(train_ldm_unet, unet_options(stages, tmp_path / "new", *more))
    out = capsys.readouterr().out
    assert "trained on another table" in out and "latents of another VAE" in out


def test_the_vae_is_trained_and_chosen_by_its_mean_and_its_texture(phantoms, tmp_path):
    options = vae_options(phantoms, tmp_path, "--steps", "2", "--val_interval", "2")
    run(train_vae, [*options, "--kl_weight", "0", "--log_interval", "2"])
    row = {name: value for part in read_log(tmp_path) for name, value in part.items()}
    texture = TEXTURE_WEIGHT * row["train/texture"]
    assert row["train/loss"] == pytest.approx(row["train/reconstruction"] + texture, rel=1e-4)

    vae, content = load_model(tmp_path / "vae_best.pth", VAE)
    rows, _ = read_table(phantoms / "label.csv", phantoms, Split(**content["split"]))
    data = datasets.CTDataset(rows, phantoms, phantoms, 32)
    x = torch.stack([data[i]["image"] for i in data.indices("val")])
    with torch.no_grad():
        error = float((vae.likelihood(vae.encode(x).mean).mean - x).abs().mean())
    texture = TEXTURE_WEIGHT * row["val/texture"]
    assert row["val/loss"] == pytest.approx(error + texture, rel=1e-3)
    untrained = VAE(**content["config"]).texture.logvar[2].bias
    assert not torch.equal(vae.texture.logvar[2].bias, untrained)


def test_a_healthy_vae_is_not_warned_of(phantoms, tmp_path, capsys):
    run(train_vae, vae_options(phantoms, tmp_path / "run", "--steps", "4"))
    assert "WARNING" not in capsys.readouterr().out


def test_validation_logs_what_it_should(stages, without_weights):
    last = read_log(stages / "vae")[-1]
    assert {"val/psnr", "val/mean_psnr", "val/ssim", "val/loss", "val/sharpness"} <= last.keys()
    assert last["val/mean_psnr"] > last["val/psnr"]  # texture is not the slice's own
    assert abs(last["val/brightness"]) < 0.1 and 0.5 < last["val/contrast"] < 1.2
    best = [row for row in read_log(stages / "vae") if "val/latent_mean" in row][-1]
    assert abs(best["val/latent_mean"]) < 1 and 0.2 < best["val/latent_variance"] < 5
    for stage in "unet", "controlnet":
        last = read_log(stages / stage)[-1]
        assert {"val/loss", "val/ssim", "val/dice", "val/n_real", "val/n_fake"} <= last.keys()
        assert sum(name.startswith("val/loss_t") for name in last) == 8
        assert {"val/contour_gap", "val/copies", "val/distance_to_training"} <= last.keys()
        assert {"val/copies_fibrosis", "val/copies_normal"} & last.keys()
        assert "val/fid" not in last and "val/lpips" not in last  # no weights: no number
        assert all(np.isfinite(value) for value in last.values())


# Resume


KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import {script} as script
from fibldm.run import Run
end_step = Run.end_step
def end_step_and_die(self, step, validate):
    def die(*_):
        os.kill(os.getpid(), {number})
    if step == {step} - 1 and {number} != signal.SIGKILL:
        die()
    end_step(self, step, die if step == {step} else validate)
    if step == {step}:
        die()
Run.end_step = end_step_and_die
from fibldm.cli import run_script
run_script(script.main, script.parse_args)
"""


def run_and_die(script, arguments, step: int, number: int) -> int:
    """Run a script in a process that gets SIGKILL at the end of a step, or another signal before
    it; its exit code.
    """
    code = KILL.format(root=str(ROOT), script=script.__name__, step=step, number=int(number))
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


def assert_same_state(a: Path, b: Path) -> None:
    """Two checkpoints hold the same values, to the bit."""

    def compare(x, y, where):
        assert type(x) is type(y), where
        if where.endswith("/environment"):
            return  # the command line names the folder
        if isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for key in x:
                compare(x[key], y[key], f"{where}/{key}")
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, y), where
        elif isinstance(x, list | tuple):
            for i, (u, v) in enumerate(zip(x, y, strict=True)):
                compare(u, v, f"{where}/{i}")
        else:
            assert x == y, where

    compare(*(torch.load(path, weights_only=True) for path in (a, b)), a.name)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_12_steps_equal_5_and_kill_and_7(stage, stages, phantoms, tmp_path):
    """Killed at step 7, after the save at step 5; the same command ends bit-identical."""
    script, more = SCRIPTS[stage], ["--steps", "12", "--save_interval", "5", "--val_interval", "4"]
    more += {
        "vae": ["--balance_labels"],
        "unet": ["--dropout", "0.3", "--lr_schedule", "cosine"],
        "controlnet": ["--lr_schedule", "cooldown"],
    }[stage]
    if stage != "vae":
        more += ["--balance_labels", "fibrosis=0.8", "normal=0.2"]
    run(script, options(stage, stages, phantoms, tmp_path / "whole", *more))
    killed = options(stage, stages, phantoms, tmp_path / "killed", *more)
    assert run_and_die(script, killed, step=7, number=signal.SIGKILL) == -signal.SIGKILL
    before = torch.load(tmp_path / "killed" / "last.pth", weights_only=True)["step"]
    assert before == 5  # steps 6 and 7 are lost, and done again
    run(script, killed)
    assert_same_state(tmp_path / "whole" / "last.pth", tmp_path / "killed" / "last.pth")
    best = next((tmp_path / "whole").glob("*_best.pth")).name
    assert_same_state(tmp_path / "whole" / best, tmp_path / "killed" / best)
    steps = [row["step"] for row in read_log(tmp_path / "killed")]
    assert steps == sorted(steps) and steps.count(12) == 2  # one row of training, one of validation


@pytest.mark.parametrize("stage", SCRIPTS)
def test_classes_are_balanced_in_each_stage(stage, stages, phantoms, tmp_path, monkeypatch, capsys):
    """The rows that are trained on, what is said of them, and that a run keeps its weights."""
    seen, batches_of = [], Run.batches_of

    def watched(self, rows, *rest, **labels):
        batches = batches_of(self, rows, *rest, **labels)
        seen.append([row for step in range(1, 6) for row in batches.rows_of(step)])
        return batches

    monkeypatch.setattr(Run, "batches_of", watched)

    def train(*given):
        script = SCRIPTS[stage]
        run(script, options(stage, stages, phantoms, tmp_path, "--steps", "5", *given))

    train("--balance_labels", "normal=0.20", "fibrosis=0.8")
    labels = LatentDataset(stages / "latents").table["label"]
    if stage == "vae":
        labels = [row.label for row in read_table(phantoms / "label.csv", phantoms, Split())[0]]
    counts = Counter(labels[row] for row in seen[0])
    assert counts["fibrosis"] == pytest.approx(16, abs=2) and sum(counts.values()) == 20
    assert "--balance_labels, shares of 20 draws: fibrosis 0.8 from" in capsys.readouterr().out
    kept = json.loads((tmp_path / "args.json").read_text())
    assert kept["balance_labels"] == ["fibrosis=0.8", "normal=0.2"]
    train("--balance_labels", "fibrosis=0.8", "normal=0.2")  # in another order: the same run
    for other in [], ["--balance_labels"], ["--balance_labels", "normal=0.5", "fibrosis=0.5"]:
        with pytest.raises(
            ValueError, match=r"other settings: --balance_labels was \['fibrosis=0.8'"
        ):
            train(*other)


def test_a_longer_cooldown_equals_one_that_was_never_shorter(stages, tmp_path):
    more = (
        "--lr_schedule",
        "cooldown",
        "--lr",
        "0.1",
        "--log_interval",
        "1",
        "--val_interval",
        "4",
    )
    for folder, steps in (("whole", 10), ("prolonged", 6), ("prolonged", 10)):
        run(train_ldm_unet, unet_options(stages, tmp_path / folder, "--steps", str(steps), *more))
    for name in "last.pth", "unet_best.pth":
        assert_same_state(tmp_path / "whole" / name, tmp_path / "prolonged" / name)
    logs = [read_log(tmp_path / folder) for folder in ("whole", "prolonged")]
    for row in itertools.chain(*logs):
        row.pop("train/images_per_s", None)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_dry_run_takes_no_step(stage, stages, phantoms, tmp_path, capsys):
    script, folder = SCRIPTS[stage], tmp_path / "run"
    words = options(stage, stages, phantoms, folder, "--steps", "3", "--dry_run")
    with pytest.raises(SystemExit) as ended:
        run(script, words)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "preflight: a step" in out and "--dry_run: steps 1 to 3 can be taken" in out
    assert list(folder.glob("*.pth")) == [] and not (folder / "metrics.jsonl").exists()
    assert "dry_run" not in json.loads((folder / "args.json").read_text())


def test_a_kill_in_validation_loses_neither_it_nor_the_step(stages, phantoms, tmp_path):
    """All is on disk when a validation begins; on resume it is made up for."""
    arguments = unet_options(
        stages, tmp_path / "run", "--steps", "4", "--val_interval", "2", "--save_interval", "100"
    )
    assert run_and_die(train_ldm_unet, arguments, 2, signal.SIGKILL) == -signal.SIGKILL
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "val/loss" not in rows
    run(train_ldm_unet, arguments)
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows if "val/loss" in row] == [2, 4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_leave_within_the_step(number, stages, phantoms, tmp_path):
    arguments = vae_options(phantoms, tmp_path / "run", "--steps", "8", "--val_interval", "8")
    assert run_and_die(train_vae, arguments, 3, number) == 75
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"] == 3
    run(train_vae, arguments)
    run(train_vae, vae_options(phantoms, tmp_path / "whole", "--steps", "8", "--val_interval", "8"))
    assert_same_state(tmp_path / "run" / "vae_best.pth", tmp_path / "whole" / "vae_best.pth")


def test_a_signal_to_the_whole_group_saves_too(phantoms, tmp_path):
    """torchrun, timeout and Slurm signal the decoding processes as well."""
    options = vae_options(phantoms, tmp_path / "run", "--steps", "100000", "--num_workers", "2")
    command = [sys.executable, str(ROOT / "train_vae.py"), *options, "--log_interval", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 75
    step = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"]
    assert step >= 3 and f"stopped after step {step}, all saved" in rest


def test_a_missing_last_pth_is_no_fresh_start(stages, tmp_path):
    shutil.copytree(stages / "unet", tmp_path / "unet")
    (tmp_path / "unet" / "last.pth").unlink()
    with pytest.raises(ValueError, match=r"last\.pth: no such file"):
        run(train_ldm_unet, unet_options(stages, tmp_path / "unet", "--steps", "4"))


@pytest.mark.parametrize("stage", SCRIPTS)
def test_gradients_that_are_not_finite_reach_no_weight(
    stage, stages, phantoms, tmp_path, monkeypatch
):
    """One such step is skipped, and the rest is as if its weights had been left alone."""
    script = SCRIPTS[stage]
    clip, state = script.clip_gradients, {"step": 0}

    def poisoned(optimizer, scaler, most):
        state["step"] += 1
        if state["step"] in bad:
            optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
        return clip(optimizer, scaler, most)

    monkeypatch.setattr(script, "clip_gradients", poisoned)
    more = ("--steps", "4", "--log_interval", "1", "--max_bad_steps", "2")
    bad = {2}
    run(script, options(stage, stages, phantoms, tmp_path / "run", *more))
    content = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert content["step"] == 4 and content["skipped"] == 1
    assert content["states"]["ema"]["updates"] == 3
    assert all(torch.isfinite(value).all() for value in content["states"][stage].values())
    bad, state["step"] = {3, 4}, 0
    with pytest.raises(ValueError, match="training diverged"):
        run(script, options(stage, stages, phantoms, tmp_path / "two", *more))
    assert (tmp_path / "two" / "bad_batch.json").is_file()


def test_a_finished_run_is_left_as_it_is(stages, phantoms, tmp_path):
    shutil.copytree(stages / "unet", tmp_path / "unet")
    before = (tmp_path / "unet" / "unet_best.pth").read_bytes()
    run(train_ldm_unet, unet_options(stages, tmp_path / "unet", "--steps", "4"))
    assert (tmp_path / "unet" / "unet_best.pth").read_bytes() == before


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_preflight_changes_nothing(stage, stages, phantoms, tmp_path, capsys):
    """Of all that follows: with it and without it, also where a run goes on."""
    for name, before in ("with", []), ("without", ["--no_preflight"]):
        for steps in "3", "6":
            words = ("--steps", steps, "--val_interval", "3", *before)
            arguments = options(stage, stages, phantoms, tmp_path / name, *words)
            arguments.remove("--no_preflight")
            run(SCRIPTS[stage], arguments)
        said = capsys.readouterr().out
        assert said.count("preflight: a step, a validation") == 2 * (name == "with")
    assert_same_state(tmp_path / "with" / "last.pth", tmp_path / "without" / "last.pth")
    rows = [read_log(tmp_path / name) for name in ("with", "without")]
    for with_it, without in zip(*rows, strict=True):
        assert with_it | {"train/images_per_s": 0} == without | {"train/images_per_s": 0}


def test_what_a_result_was_computed_with_is_kept_in_every_file(stages, tmp_path):
    run(sample, sample_options(stages, tmp_path, "--latent_data_dir", str(stages / "latents")))
    kept = [json.loads((tmp_path / "args.json").read_text())["environment"]]
    kept += [json.loads((stages / "latents" / "meta.json").read_text())["environment"]]
    for stage in SCRIPTS:
        kept += [json.loads((stages / stage / "args.json").read_text())["environment"]]
        for path in (stages / stage).glob("*.pth"):
            kept.append(torch.load(path, weights_only=True)["environment"])
    assert len(kept) == 2 + 3 * 3
    for found in kept:
        assert found["packages"]["torch"] == torch.__version__.split("+")[0] or (
            found["packages"]["torch"] == torch.__version__
        )
        assert found["command"] == shlex.join(sys.argv) and found["gpus"] == []
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        assert (found["git_commit"] or "").startswith(commit)


# What goes wrong under way


def spoil_after(monkeypatch, step: int, path: Path) -> None:
    """An image becomes unreadable when a step begins."""
    draw = datasets.item_noise

    def watched(seed, stream, number, *rest):
        if number == step and path.stat().st_size > 10:
            path.write_bytes(b"gone")
        return draw(seed, stream, number, *rest)

    monkeypatch.setattr(datasets, "item_noise", watched)


def test_an_image_that_becomes_unreadable_is_replaced_and_left_out_on_resume(
    phantoms, tmp_path, monkeypatch, capsys
):
    shutil.copytree(phantoms, tmp_path / "data")
    rows = list(csv.DictReader((tmp_path / "data" / "label.csv").open()))
    bad = min(trained_rows(tmp_path / "data"))
    spoil_after(monkeypatch, 3, tmp_path / "data" / rows[bad]["image"])
    words = ["--steps", "12", "--save_interval", "4", "--max_bad_images", "1"]
    run(train_vae, vae_options(tmp_path / "data", tmp_path / "run", *words))
    said = capsys.readouterr().out
    assert f"rows [{bad}] of the table (from 0) cannot be read any more: 1 in all" in said
    monkeypatch.undo()
    words[1] = "16"
    run(train_vae, vae_options(tmp_path / "data", tmp_path / "run", *words))
    last = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert last["step"] == 16 and last["bad_images"] == [bad]
    words[-1] = "0"
    with pytest.raises(ValueError, match=rf"{rows[bad]['image']}: cannot be decoded"):
        run(train_vae, vae_options(tmp_path / "data", tmp_path / "run", *words))


def trained_rows(data: Path) -> set[int]:
    """Rows that the tiny VAE trains on."""
    table, _ = read_table(data / "label.csv", data, Split(0, 0.3, 0.1))
    return {i for i, row in enumerate(table) if row.split == "train"}


def test_an_image_that_becomes_unreadable_ends_the_run_by_name_unless_allowed(
    phantoms, tmp_path, monkeypatch
):
    shutil.copytree(phantoms, tmp_path / "data")
    rows = list(csv.DictReader((tmp_path / "data" / "label.csv").open()))
    image = rows[min(trained_rows(tmp_path / "data"))]["image"]
    spoil_after(monkeypatch, 3, tmp_path / "data" / image)
    words = ["--steps", "12", "--save_interval", "2"]
    with pytest.raises(ValueError, match=rf"{image}: cannot be decoded"):
        run(train_vae, vae_options(tmp_path / "data", tmp_path / "run", *words))
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"] >= 2


def test_a_table_that_changed_is_refused_on_resume(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "data")
    run(train_vae, vae_options(tmp_path / "data", tmp_path / "run", "--steps", "2"))
    with (tmp_path / "data" / "label.csv").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"SHA-256 of its label_csv: found .*, expected"):
        run(train_vae, vae_options(tmp_path / "data", tmp_path / "run", "--steps", "3"))


# Processes, accumulation, precision


def torchrun(script, arguments, processes: int = 2) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(ROOT / f"{script.__name__}.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_close_weights(a: Path, b: Path, name: str) -> None:
    one, two = (torch.load(p / "last.pth", weights_only=True)["states"][name] for p in (a, b))
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=2e-5), (key, (value - two[key]).abs().max())


@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_gloo_processes_equal_one(stage, stages, phantoms, tmp_path):
    """Same global batch, same weights; also with the share cut in two parts."""
    script, more = SCRIPTS[stage], ["--steps", "3", "--lr", "1e-3"]
    more += [] if stage == "controlnet" else ["--balance_labels", "fibrosis=0.7", "normal=0.3"]
    parts = ["--grad_accum", "2"]
    run(script, options(stage, stages, phantoms, tmp_path / "one", *more))
    torchrun(script, options(stage, stages, phantoms, tmp_path / "two", *more, *parts))
    assert_close_weights(tmp_path / "one", tmp_path / "two", stage)
    last = [
        {name: value for row in read_log(tmp_path / run_name) for name, value in row.items()}
        for run_name in ("one", "two")
    ]
    assert last[0].keys() == last[1].keys()
    for name in last[0].keys() - {"train/images_per_s"}:
        assert last[0][name] == pytest.approx(last[1][name], abs=2e-2), name


def test_three_processes_go_on_to_the_bit(stages, tmp_path):
    """The order in which sums over processes are made is the same in each start."""
    more = ["--batch_size", "6", "--val_interval", "2", "--dropout", "0.3", "--grad_accum", "2"]
    for folder, steps in ("whole", "4"), ("halves", "2"), ("halves", "4"):
        arguments = unet_options(stages, tmp_path / folder, "--steps", steps, *more)
        torchrun(train_ldm_unet, arguments, processes=3)
    for name in "last.pth", "unet_best.pth":
        assert_same_state(tmp_path / "whole" / name, tmp_path / "halves" / name)


def test_accumulation_equals_one_batch(stages, phantoms, tmp_path):
    for name, parts in ("one", "1"), ("four", "4"):
        more = ["--steps", "3", "--grad_accum", parts]
        run(train_ldm_unet, unet_options(stages, tmp_path / name, *more))
    assert_close_weights(tmp_path / "one", tmp_path / "four", "unet")


def test_two_processes_encode_and_sample_as_one(stages, phantoms, tmp_path):
    table = ["--csv_file", str(phantoms / "label.csv"), "--img_dir", str(phantoms)]
    vae = ["--vae_checkpoint", str(stages / "vae" / "vae_best.pth"), "--device", "cpu"]
    latents = tmp_path / "latents"
    torchrun(encode_dataset, [*table, *vae, "--output_dir", latents, "--num_workers", "0"])
    one, two = LatentDataset(stages / "latents"), LatentDataset(latents)
    assert np.allclose(one.latents[:], two.latents[:], atol=1e-5)
    assert np.array_equal(one.contours[:], two.contours[:]) and one.table.equals(two.table)

    wanted = ["--latent_data_dir", stages / "latents", "--num_samples", "5", "--format", "npy"]
    run(sample, sample_options(stages, tmp_path / "one", *wanted))
    torchrun(sample, sample_options(stages, tmp_path / "two", *wanted, "--batch_size", "2"))
    for i in range(5):
        a, b = (np.load(tmp_path / f / f"sample_{i:05d}.npy") for f in ("one", "two"))
        assert np.allclose(a, b, atol=0.5)  # HU
    tables = [(tmp_path / name / "samples.csv").read_text() for name in ("one", "two")]
    assert tables[0] == tables[1]


def test_overwritten_latents_are_never_half_removed(stages, phantoms, tmp_path, monkeypatch):
    """A kill would leave a folder that is neither old nor new, which is refused: it is renamed."""
    shutil.copytree(stages / "latents", tmp_path / "latents")
    removed, rmtree = [], shutil.rmtree

    def watched(path, *rest, **more):
        removed.append((Path(path).name, (tmp_path / "latents" / "meta.json").is_file()))
        rmtree(path, *rest, **more)

    monkeypatch.setattr(encoding.shutil, "rmtree", watched)
    table = ["--csv_file", phantoms / "label.csv", "--img_dir", phantoms, "--num_workers", "0"]
    vae = ["--vae_checkpoint", stages / "vae" / "vae_best.pth", "--device", "cpu"]
    run(encode_dataset, [*table, *vae, "--output_dir", tmp_path / "latents", "--overwrite"])
    assert (".latents.old", True) in removed and all(whole for _, whole in removed)
    assert "latents" not in {name for name, _ in removed}
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", SCRIPTS)
def test_half_precision_trains(stage, precision, stages, phantoms, tmp_path):
    more = ["--steps", "3", "--precision", precision]
    run(SCRIPTS[stage], options(stage, stages, phantoms, tmp_path / "run", *more))
    content = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert bool(content["states"]["scaler"]) == (precision == "fp16")
    for value in content["states"][stage].values():
        assert value.dtype == torch.float32 and torch.isfinite(value).all()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_compile_gives_the_same_training(stage, stages, phantoms, tmp_path, monkeypatch):
    """All but inductor's code generation, which takes minutes on a CPU."""
    compile_module, compiled = torch.nn.Module.compile, []

    def compile_quickly(self):
        compiled.append(type(self).__name__)
        compile_module(self, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    for name, more in ("plain", []), ("compiled", ["--compile"]):
        more = ["--steps", "2", *more]
        run(SCRIPTS[stage], options(stage, stages, phantoms, tmp_path / name, *more))
    assert compiled
    assert_close_weights(tmp_path / "plain", tmp_path / "compiled", stage)


# Sampling


def test_sample_i_depends_on_the_seed_and_i_alone(stages, tmp_path):
    wanted = ["--latent_data_dir", str(stages / "latents"), "--format", "npy"]
    for name, more in {
        "all": ["--num_samples", "4", "--batch_size", "4"],
        "few": ["--num_samples", "2", "--batch_size", "1"],
        "other": ["--num_samples", "2", "--seed", "1"],
    }.items():
        for sampler in SAMPLERS:
            folder = tmp_path / name / sampler
            run(sample, sample_options(stages, folder, *wanted, *more, "--sampler", sampler))
    for sampler in SAMPLERS:
        first = [
            np.load(tmp_path / n / sampler / "sample_00001.npy") for n in ("all", "few", "other")
        ]
        assert np.allclose(first[0], first[1], atol=0.5)
        assert not np.allclose(first[0], first[2], atol=5)


def test_sampling_goes_on_with_what_is_there(stages, tmp_path, capsys):
    """Samples of the same request by the same software are kept, others are drawn anew."""
    words = ["--latent_data_dir", str(stages / "latents"), "--num_samples", "4"]
    arguments = sample_options(stages, tmp_path / "out", *words)
    run(sample, arguments)
    folder = tmp_path / "out"
    names = [f"sample_{i:05d}.png" for i in range(4)]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = capsys.readouterr().out

    def left_at(place: str) -> dict[str, int]:
        """As a kill leaves it before the table: one sample is missing."""
        (folder / "samples.csv").unlink()
        (folder / names[2]).unlink()
        settings = json.loads(before["args.json"])
        settings["environment"]["git_commit"] = place
        (folder / "args.json").write_text(json.dumps(settings))
        return {name: (folder / name).stat().st_mtime_ns for name in names if name != names[2]}

    for place, kept in (
        (json.loads(before["args.json"])["environment"]["git_commit"], True),
        (
            "another",
            False,
        ),
    ):
        times = left_at(place)
        run(sample, arguments)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        for name, time in times.items():
            assert ((folder / name).stat().st_mtime_ns == time) == kept
        assert capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1]  # Dice of all


def test_conditions_reach_the_model(stages, tmp_path):
    """Another contour, another label, no contour at all: each changes the sample."""
    data = LatentDataset(stages / "latents")
    unet, content = load_model(stages / "unet" / "unet_best.pth", UNet)
    assert content["classes"] == ["fibrosis", "normal"] and unet.config["num_classes"] == 2
    Image.fromarray(data.contours[0][0] * 255).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "b.png")
    images = {}
    common = ["--num_samples", "1", "--format", "npy", "--guidance_scale", "1"]
    for name, more in {
        "contour": ["--contours", tmp_path / "a.png"],
        "empty": ["--contours", tmp_path / "b.png"],
        "label": ["--contours", tmp_path / "a.png", "--label", "fibrosis"],
        "guided": ["--contours", tmp_path / "a.png", "--guidance_scale", "3"],
    }.items():
        run(sample, sample_options(stages, tmp_path / name, *common, *more))
        images[name] = np.load(tmp_path / name / "sample_00000.npy")
    for name in "empty", "label", "guided":
        assert not np.array_equal(images["contour"], images[name]), name
    models = sample_options(stages, tmp_path / "free", "--num_samples", "2", "--unconditional")
    at = models.index("--controlnet_checkpoint")
    run(sample, models[:at] + models[at + 2 :])
    assert len(list((tmp_path / "free").glob("sample_*.png"))) == 2
