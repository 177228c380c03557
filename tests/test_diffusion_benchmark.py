"""What benchmarks/diffusion.py asks for and how it samples a peer, where the answer is known."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import diffusion

from fibldm.phantom import phantom_slice


@pytest.fixture(scope="module")
def contours() -> np.ndarray:
    masks = [phantom_slice(patient, 0.5)[1] for patient in range(3)]
    return np.stack(masks)[:, None].astype(np.uint8)


def test_unusual_contours_are_what_they_say(contours):
    found = diffusion.unusual(contours)
    area = {kind: made.sum(axis=(1, 2, 3)) for kind, made in found.items()}
    for made in found.values():
        assert made.shape == contours.shape and set(np.unique(made)) == {0, 1}
    usual = area["as they are"]
    np.testing.assert_allclose(area["scaled by 0.75"], 0.75**2 * usual, rtol=0.02)
    assert (area["20 px to the side"] == usual).all() and (area["20 px up"] == usual).all()
    moved = [ndimage.center_of_mass(c[0]) for c in found["20 px to the side"]]
    before = [ndimage.center_of_mass(c[0]) for c in contours]
    np.testing.assert_allclose(np.subtract(moved, before), [[0, 20]] * 3, atol=1e-6)
    for kind, pieces in (("one lung", 1), ("two ellipses", 2)):
        assert [ndimage.label(c[0])[1] for c in found[kind]] == [pieces] * 3
    assert (area["one lung"] < 0.7 * usual).all()


@pytest.mark.parametrize("name", ["diffusers", "ours_eps"])
def test_a_peers_ddim_recovers_x0_of_an_exact_oracle(name):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 8, 4, 4, generator=generator) for _ in "ab")
    train, _ = diffusion.peer_schedulers(name)
    signal = train.alphas_cumprod

    def oracle(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (v.sqrt().view(-1, 1, 1, 1) for v in (signal[t], 1 - signal[t]))
        return (x - alpha * x0) / sigma

    found = diffusion.peer_ddim(name, oracle, noise, 50)
    torch.testing.assert_close(found, x0, atol=2e-2, rtol=0)


def test_networks_have_the_same_size_within_5_percent():
    args = diffusion.parse_args(["speed", "--out", "x", "--batch_size", "2"])
    args.memory_format = "contiguous"
    ours, theirs = (
        diffusion.train_call(name, False, args).parameters for name in ("ours", "diffusers")
    )
    assert abs(ours / theirs - 1) < 0.05


def test_pooled_latents_are_means_of_cells():
    latents = np.zeros((1, 8, 16, 16), np.float32)
    latents[0, 0, :4, 4:8] = 3.0
    features = diffusion.pooled(latents)
    assert features.shape == (1, 128)
    assert features[0].tolist() == [0, 3, *[0] * 126]
