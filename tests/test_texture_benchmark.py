"""The texture decoders that benchmarks/texture.py compares, and its classifier."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fibldm.texture import Likelihood

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "texture.py"
spec = importlib.util.spec_from_file_location("texture_benchmark", FILE)
benchmark = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = benchmark
spec.loader.exec_module(benchmark)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arm", benchmark.ARMS)
def test_each_decoder_can_be_trained_and_draws_slices(arm):
    torch.manual_seed(0)
    texture = benchmark.ARMS[arm](4, 8)
    known = Likelihood(normal(2, 1, 32, 32, seed=1), normal(2, 8, 8, 8, seed=2))
    noise = normal(2, 1, 32, 32, seed=3)
    loss = texture.loss(known, known.mean + 0.1 * noise, noise, torch.tensor([0.3, 1.2]))
    assert loss.shape == (2,)
    loss.mean().backward()
    assert any((p.grad != 0).any() for p in texture.output.parameters())
    with torch.no_grad():
        assert texture.sample(known, noise, 2).shape == noise.shape


@torch.no_grad()
def test_untrained_ddim_draws_the_mean_where_euler_draws_noise():
    known = Likelihood(torch.zeros(1, 1, 32, 32), torch.zeros(1, 8, 8, 8))
    noise, std = normal(1, 1, 32, 32), math.exp(-2.5)
    ddim, euler = (benchmark.ARMS[arm](4, 8).sample(known, noise, 2) for arm in ("by_ddim", "ours"))
    assert float(ddim.std()) == pytest.approx(std * 0.5, rel=0.1)  # cos(pi / 4) twice
    assert float(euler.std()) == pytest.approx(std, rel=0.1)


def test_the_classifier_tells_noise_from_flat_slices_and_not_noise_from_noise(monkeypatch):
    monkeypatch.setattr(benchmark, "LOOKS", 30)
    patients = np.array([f"p{i}" for i in range(10)])
    noise, other = normal(10, 1, 128, 128), normal(10, 1, 128, 128, seed=1)
    assert benchmark.classified(noise, torch.zeros_like(noise), patients) > 0.9
    assert 0.2 < benchmark.classified(noise, other, patients) < 0.8
    assert math.isnan(benchmark.classified(noise, other, np.array(["a"] * 10)))


@pytest.mark.parametrize("period", [2, 4, 8, 16])
def test_a_pattern_on_the_grid_of_the_patches_is_seen_and_noise_is_none(period):
    noise = torch.randn(8, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    assert benchmark.grid_power(noise) < 1.5
    pattern = torch.zeros(256, 256)
    pattern[::period, ::period] = 0.02 * period**2
    assert benchmark.grid_power(noise + pattern) > 3
