"""Each failure of a VAE's training is named with its remedy, and a healthy one is not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fibldm.phantom import phantom_slice
from fibldm.reconstruction import (
    heldout_latents,
    input_warnings,
    latent_warnings,
    moments,
    reconstruction_warnings,
)


def test_a_collapsed_channel_is_named():
    std, noise = torch.tensor([1.0, 0.01, 2.0]), torch.tensor([0.1, 1.0, 0.5])
    (warning,) = latent_warnings(std, noise)
    assert "[1]" in warning and "collapsed" in warning and "--kl_weight" in warning
    (warning,) = latent_warnings(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.1]))
    assert "[0]" in warning


def test_an_exploding_latent_scale_is_named():
    (warning,) = latent_warnings(torch.tensor([1.0, 500.0]), torch.tensor([0.1, 0.1]))
    assert "500" in warning and "explodes" in warning and "--lr" in warning


def test_nan_is_named_as_divergence_alone():
    nan = float("nan")
    (warning,) = latent_warnings(torch.tensor([nan, 1.0]), torch.tensor([0.1, 0.1]))
    assert "diverged" in warning and "--lr" in warning
    (warning,) = reconstruction_warnings(nan, 1.0)
    assert "diverged" in warning


def test_a_healthy_latent_is_not_named():
    assert latent_warnings(torch.tensor([0.3, 1.0, 4.0]), torch.tensor([0.1, 0.2, 1.0])) == []


@pytest.mark.parametrize(("brightness", "word"), [(-0.1, "darker"), (0.1, "brighter")])
def test_another_brightness_is_named(brightness, word):
    (warning,) = reconstruction_warnings(brightness, 1.0)
    assert word in warning and "5.0%" in warning


def test_flat_reconstructions_are_named():
    (warning,) = reconstruction_warnings(0.0, 0.5)
    assert "flatter" in warning and "0.50" in warning and "--kl_weight" in warning
    assert reconstruction_warnings(0.005, 0.97) == []


def test_inputs_that_are_not_hu_are_named():
    slices = [phantom_slice(i, 0.5, 128)[0] for i in range(4)]
    data = SimpleNamespace(
        rows=[SimpleNamespace(image=f"{i}.png") for i in range(4)],
        indices=lambda split: range(4),
        read_or_replace=lambda row: (slices[row], None, []),
    )
    assert input_warnings(data) == []
    slices[2] = (slices[2] + 1000) / 3000  # normalized: no HU
    (warning,) = input_warnings(data)
    assert "1 of 4" in warning and "2.png" in warning and "check_data.py" in warning
    assert "rescale_slope" not in warning  # one slice is bad, not the scale of all
    slices[:] = [(hu + 1000) / 3000 if hu.min() < -100 else hu for hu in slices]
    (warning,) = input_warnings(data)
    assert "4 of 4" in warning and "rescale_slope" in warning


def test_moments_are_those_of_numpy():
    values = np.random.default_rng(0).normal(3, 2, (5, 1000))
    sums = torch.from_numpy(np.stack([values.sum(1), (values**2).sum(1)]))
    mean, std = moments(sums, 1000)
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-5)
    np.testing.assert_allclose(std, values.std(1), rtol=1e-5)


def test_heldout_latents_reports_the_worst_channel():
    train = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])
    assert heldout_latents(train, train) == {"latent_mean": 0.0, "latent_variance": 1.0}
    found = heldout_latents(train, (torch.tensor([0.1, 0.0]), torch.tensor([1.1, 1.0])))
    assert found["latent_mean"] == pytest.approx(-0.5)
    assert found["latent_variance"] == pytest.approx(0.25)
