"""Networks and distances of pairs, against other libraries."""

import io

import numpy as np
import pytest
import torch
from images import CPU, needs, pixel_networks, slices
from scipy import ndimage
from torch import Tensor, nn

from fibldm import features, metrics
from fibldm.distances import frechet_distance

# Reconstruction, against scikit-image.


def test_psnr_and_ssim_are_those_of_skimage():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    x = slices(3, seed=0, size=64)
    y = (x + 0.1 * slices(3, seed=1, size=64)).clamp(-1, 1)
    # A frame of air, as around a body: at the very border the libraries pad in different ways.
    x, y = (nn.functional.pad(image, [12] * 4, value=-1) for image in (x, y))
    found = features.reconstruction_metrics(x, y)
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
    found = features.reconstruction_metrics(y + 0.1, y)
    torch.testing.assert_close(found["brightness"], torch.full((2,), 0.1))
    torch.testing.assert_close(found["contrast"], torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(found["sharpness"], torch.ones(2), atol=1e-4, rtol=0)
    found = features.reconstruction_metrics(0.5 * y, y)
    torch.testing.assert_close(found["contrast"], torch.full((2,), 0.5), atol=1e-4, rtol=0)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    blurred = nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert (features.reconstruction_metrics(blurred, noise)["sharpness"] < 0.5).all()
    blank = torch.full_like(y, -1.0)
    assert (features.reconstruction_metrics(blank + 0.01 * noise, blank)["contrast"] < 1).all()


def test_equal_images_are_perfect_and_tiny_ones_are_refused():
    x = slices(2, seed=0, size=32)
    found = features.reconstruction_metrics(x, x)
    assert bool(found["psnr"].isinf().all())
    torch.testing.assert_close(found["ssim"], torch.ones(2))
    with pytest.raises(ValueError, match="11x11"):
        features.reconstruction_metrics(x[..., :8, :8], x[..., :8, :8])


# Without weights, and without a network to fetch them over.


def test_missing_weights_are_named_and_the_rest_works(no_weights, tmp_path):
    networks = features.Networks(CPU)
    assert set(networks.missing) == set(features.WEIGHTS) - {"ssim", "psnr"}
    for name, text in networks.missing.items():
        assert "scripts/fetch_metric_weights.py" in text and str(tmp_path) in text
        assert text.startswith(f"{name.upper()} is left out") and features.WEIGHTS[name][0] in text
    assert networks.inception is None and networks.lpips is None
    x, y = slices(3, seed=0, size=64), slices(3, seed=1, size=64)
    assert networks.features(x).shape == (3, 0)
    found = networks.pairs(x, y)
    assert found["lpips"].shape == (0,) and found["ssim"].shape == (3,)
    expected = features.reconstruction_metrics(x, y)["ssim"].numpy()
    np.testing.assert_allclose(found["ssim"], expected, atol=1e-6)


@pytest.mark.parametrize("bad", ["nan", "channels", "pair"])
def test_images_that_have_no_metric_are_refused(bad):
    networks, images = pixel_networks(), slices(2, seed=0, size=64)
    with pytest.raises(ValueError, match={"nan": "NaN", "channels": "1, H", "pair": "pairs"}[bad]):
        if bad == "nan":
            networks.features(images * torch.nan)
        elif bad == "channels":
            networks.features(images.expand(-1, 3, -1, -1))
        else:
            networks.pairs(images, images[:1])


def test_mixed_precision_around_does_not_change_the_numbers():
    x, y = slices(6, seed=0, size=64), slices(6, seed=1, size=64)
    found = []
    for enabled in (False, True):
        networks = pixel_networks()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            seen = [networks.features(images) for images in (x, y)]
            found.append((metrics.set_distances(*seen, CPU), networks.pairs(x, y)["ssim"].tolist()))
    assert found[0] == found[1] and set(found[0][0]) == {"fid", "kid"}


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


# With the real networks.


@needs("lpips")
def test_lpips_is_that_of_torchmetrics_and_carries_gradients():
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    lpips = features.load_lpips(CPU)
    x, y = slices(3, seed=0, size=64), slices(3, seed=1, size=64)
    known = learned_perceptual_image_patch_similarity(
        x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1), net_type="alex", reduction="none"
    )
    found = features.reconstruction_metrics(x, y, lpips)["lpips"]
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


@needs("fid")
def test_fid_tells_worse_images(no_sockets):
    real, fake = slices(8, seed=0), slices(8, seed=1)
    networks = features.Networks(CPU)
    assert not networks.inception.training
    assert not any(p.requires_grad for p in networks.inception.parameters())
    of_real = networks.features(real)

    def fid_of(images: Tensor) -> float:
        return float(frechet_distance(of_real, networks.features(images)))

    assert fid_of(real) < 1e-3 * fid_of(fake)
    blurred = torch.from_numpy(ndimage.gaussian_filter(fake.numpy(), (0, 0, 3, 3)))
    noise = torch.randn(fake.shape, generator=torch.Generator().manual_seed(0))
    assert fid_of(blurred) > 1.5 * fid_of(fake)
    assert fid_of((fake + 0.3 * noise).clamp(-1, 1)) > 1.5 * fid_of(fake)
