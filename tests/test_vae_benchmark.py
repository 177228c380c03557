"""What benchmarks/vae.py measures, where the answer is known."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "vae.py"
spec = importlib.util.spec_from_file_location("vae_benchmark", FILE)
vae_benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vae_benchmark)


def slices() -> tuple[torch.Tensor, np.ndarray]:
    """Noise of 100 HU in a disc of lung, (2, 1, 256, 256), and the disc."""
    at = torch.arange(256) - 127.5
    disc = (torch.hypot(at[:, None], at[None]) < 90).expand(2, 1, 256, 256)
    noise = torch.randn(disc.shape, generator=torch.Generator().manual_seed(0))
    return torch.where(disc, -0.7 + noise / 7, -1.0), disc[:, 0].numpy()


def test_a_slice_beside_itself_is_as_sharp_and_without_error():
    x, lungs = slices()
    found = vae_benchmark.measure(x, x, lungs, None)
    assert found["noise_power"] == found["noise_power_all"] == found["gradient"] == 1
    assert found["hu_error"] == found["hu_error_sd"] == 0
    assert found["ssim"] == found["lung_ssim"] == 1


def test_blur_and_brightness_are_measured_as_what_they_are():
    x, lungs = slices()
    blurred = vae_benchmark.measure(avg_pool2d(x, 3, 1, 1), x, lungs, None)
    assert blurred["noise_power"] < 0.1 < blurred["noise_power_all"] < 0.5
    assert 0.1 < blurred["gradient"] < 0.5
    brighter = vae_benchmark.measure(x + 0.1, x, lungs, None)  # the window is 1400 HU, or 2
    assert brighter["hu_error"] == pytest.approx(70, rel=0.01)
    assert brighter["psnr"] == pytest.approx(20 * np.log10(2 / 0.1), rel=1e-3)
    assert brighter["gradient"] == pytest.approx(1, abs=1e-3)


def test_the_haar_transform_is_orthonormal_and_taken_back():
    model = vae_benchmark.Haar(8)
    there, back = model.vae.encoder.network[0][1], model.vae.decoder.mean[1][0]
    x = torch.randn(2, 16, 8, 8)
    assert torch.allclose(there(x).square().sum(), x.square().sum(), rtol=1e-4)
    again = back(there(x).repeat(1, 8, 1, 1))
    assert torch.allclose(again, x.repeat(1, 8, 1, 1), atol=1e-5)
    flat = there(torch.ones(1, 16, 1, 1)).flatten()
    assert flat[0] == pytest.approx(4) and flat[1:].abs().max() < 1e-6  # one mean, 15 differences


def test_models_are_compared_after_as_many_images_as_all_have_seen():
    runs = {
        "ours": [{"images": n, "psnr": 20.0 + n} for n in (100, 200, 400)],
        "plain": [{"images": n, "psnr": 10.0 + n} for n in (100, 200)],
    }
    end, same = vae_benchmark.quality_table(runs).split("\n\n")
    assert "| ours | 400 | 420.00 |" in end and "| plain | 200 | 210.00 |" in end
    assert "| ours | 200 | 220.00 |" in same and "| plain | 200 | 210.00 |" in same
