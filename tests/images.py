"""Images for tests of metrics, and stand-ins for the networks that see them."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from fibldm import features

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


class Pixels(nn.Module):
    """2048 averages of pixels as features; counts the images that it has seen."""

    seen = 0

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        self.seen += len(images)
        return nn.functional.adaptive_avg_pool2d(images[:, 0].float() / 255, (32, 64)).flatten(1)


def mean_difference(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().mean(dim=(1, 2, 3))


def pixel_networks() -> features.Networks:
    """Networks that need no weights."""
    networks = features.Networks(CPU, dict.fromkeys(features.WEIGHTS, "not loaded"))
    networks.missing, networks.inception, networks.lpips = {}, Pixels(), mean_difference
    networks.sources = dict.fromkeys(features.WEIGHTS, "pixels")
    return networks
