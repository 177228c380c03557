"""Data and tiny trained stages that several test files share."""

import contextlib
import os
import socket
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import encode_dataset
import train_controlnet
import train_ldm_unet
import train_vae
from fibldm.phantom import write_dataset

ROOT = Path(__file__).resolve().parents[1]

# Options that make a run small and quick; each stage adds its own.
QUICK = ["--device", "cpu", "--batch_size", "4", "--num_workers", "0", "--warmup_steps", "2"]
QUICK += ["--no_preflight"]
TINY_VAE = ["--image_size", "32", "--latent_size", "8", "--latent_dim", "4"]
TINY_VAE += ["--base_channels", "16", "--blocks", "1", "--val_fraction", "0.3"]
TINY_UNET = ["--channels", "8", "16", "--blocks", "1"]
TINY_VALIDATION = ["--val_samples", "4", "--val_sampling_steps", "2"]


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--chaos", choices=("quick", "full"), default="quick", help="how many faults are tried"
    )


@pytest.fixture(scope="session")
def ct_folder() -> Path:
    """The folder of real CT; the test is skipped where there is none."""
    folder = Path(os.environ.get("FIBLDM_CT", ROOT.parent / "shared" / "ct"))
    if not (folder / "lungs" / "label.csv").is_file():
        pytest.skip(f"no real CT at {folder} (set FIBLDM_CT)")
    return folder


@contextlib.contextmanager
def torch_home(folder: Path):
    """PyTorch looks for weights in this folder."""
    before, before_set = os.environ.get("TORCH_HOME"), torch.hub._hub_dir
    os.environ["TORCH_HOME"], torch.hub._hub_dir = str(folder), None
    yield
    torch.hub._hub_dir = before_set
    if before is None:
        del os.environ["TORCH_HOME"]
    else:
        os.environ["TORCH_HOME"] = before


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory):
    """No metric weights are found: Inception would take most of a tiny run's time."""
    with torch_home(tmp_path_factory.mktemp("torch_home")):
        yield


@pytest.fixture
def no_sockets(monkeypatch):
    """Nothing is fetched."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def no_weights(tmp_path, no_sockets):
    """No metric weights are found, and none are fetched."""
    with torch_home(tmp_path):
        yield


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """12 synthetic patients, 2 slices of 32x32 each, with labels."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_dataset(folder, patients=12, slices_per_patient=2, size=32)
    return folder


def training_options(**changed: object) -> dict:
    """What a training script gives to a run, without data."""
    values = {"batch_size": 8, "grad_accum": 1, "seed": 0, "steps": 10, "time_limit": None}
    values |= {"save_interval": 100, "val_interval": 100, "log_interval": 1, "keep_last": 1}
    values |= {"lr": 0.1, "warmup_steps": 0, "grad_clip": 1.0, "ema_decay": 0.9, "patience": 0}
    values |= {"lr_schedule": "constant"}
    values |= {"max_bad_steps": 3, "max_bad_images": 0, "no_preflight": True}
    return {**values, **changed}


def vae_options(data: Path, save_dir: Path, *more: str) -> list[str]:
    table = ["--csv_file", str(data / "label.csv"), "--img_dir", str(data)]
    return [*table, "--save_dir", str(save_dir), *QUICK, *TINY_VAE, *more]


def unet_options(stages: Path, save_dir: Path, *more: str) -> list[str]:
    inputs = ["--latent_data_dir", str(stages / "latents")]
    inputs += ["--vae_checkpoint", str(stages / "vae" / "vae_best.pth")]
    return [*inputs, "--save_dir", str(save_dir), *QUICK, *TINY_UNET, *TINY_VALIDATION, *more]


def controlnet_options(stages: Path, save_dir: Path, *more: str) -> list[str]:
    inputs = ["--latent_data_dir", str(stages / "latents")]
    inputs += ["--vae_checkpoint", str(stages / "vae" / "vae_best.pth")]
    inputs += ["--unet_checkpoint", str(stages / "unet" / "unet_best.pth")]
    return [*inputs, "--save_dir", str(save_dir), *QUICK, *TINY_VALIDATION, *more]


def sample_options(stages: Path, output_dir: Path, *more: str) -> list[str]:
    models = ["--vae_checkpoint", str(stages / "vae" / "vae_best.pth")]
    models += ["--unet_checkpoint", str(stages / "unet" / "unet_best.pth")]
    models += ["--controlnet_checkpoint", str(stages / "controlnet" / "controlnet_best.pth")]
    return [*models, "--output_dir", str(output_dir), "--steps", "3", "--device", "cpu", *more]


@pytest.fixture(scope="session")
def stages(tmp_path_factory, phantoms) -> Path:
    """A folder with vae/, latents/, unet/ and controlnet/, each trained for a few steps."""
    folder = tmp_path_factory.mktemp("stages")
    table = ["--csv_file", str(phantoms / "label.csv"), "--img_dir", str(phantoms)]
    vae = ["--vae_checkpoint", str(folder / "vae" / "vae_best.pth"), "--device", "cpu"]
    encoding = [*table, *vae, "--output_dir", str(folder / "latents"), "--num_workers", "0"]
    with torch_home(tmp_path_factory.mktemp("torch_home")):
        for script, arguments in (
            (train_vae, vae_options(phantoms, folder / "vae", "--steps", "6")),
            (encode_dataset, encoding),
            (train_ldm_unet, unet_options(folder, folder / "unet", "--steps", "4")),
            (train_controlnet, controlnet_options(folder, folder / "controlnet", "--steps", "4")),
        ):
            script.main(script.parse_args(arguments))
    return folder


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; its `begun` are the arguments of `init`, `ended` its ends."""
    package = SimpleNamespace(begun=[], ended=[])

    def init(**options):
        package.begun.append(options)
        return SimpleNamespace(finish=lambda: package.ended.append(options["id"]))

    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_CONSOLE", raising=False)
    return package


# Faults: how many are tried, and what came of them.

TRIED, SURVIVED = Counter(), Counter()


@pytest.fixture
def full(request) -> bool:
    return request.config.getoption("--chaos") == "full"


@pytest.fixture
def tally():
    """tally(fault) before it is tried, and the function that it returns when it was survived."""

    def tried(fault: str):
        TRIED[fault] += 1

        def survived() -> None:
            SURVIVED[fault] += 1

        return survived

    return tried


def pytest_terminal_summary(terminalreporter) -> None:
    if not TRIED:
        return
    terminalreporter.write_line("\n| fault | tried | survived | lost |\n|---|---|---|---|")
    for fault, count in TRIED.items():
        lost = count - SURVIVED[fault]
        terminalreporter.write_line(f"| {fault} | {count} | {SURVIVED[fault]} | {lost} |")
