"""The VAE: a 2D slice to a small latent and back (Kingma & Welling 2013; Rombach et al. 2022).

Pixels are moved into channels first (pixel-unshuffle), since work at full resolution is expensive.
256x256 becomes (8, 16, 16) at the defaults. An untrained VAE is a truncated cosine transform (Ahmed
et al. 1974), as in JPEG. Training adds what is not linear.

The finest texture does not fit into a latent, and a decoder that gives only the mean blurs it. So
this decoder gives a distribution, p(x | z), from which `fibldm.texture` draws.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fibldm.layers import (
    ChannelNorm,
    Downsample,
    ResBlock,
    SelfAttention,
    Upsample,
    zero_init,
)
from fibldm.texture import STEPS, Likelihood, TextureDecoder

LATENT_SCALE = 0.18215  # Rombach et al. 2022: on disk, latent = mu * LATENT_SCALE
LOGVAR_RANGE = (-12.0, 10.0)
INITIAL_LOGVAR = -6.0
# The texture's loss is in nats a pixel. So is |x - mean| / b for a Laplacian, whose b is about:
TEXTURE_WEIGHT = 0.05


class DiagonalGaussian(NamedTuple):
    """The posterior q(z | x): mean and log-variance, each (N, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, noise standard normal and of the same shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats a slice, mean over the batch; fp32."""
        mean, logvar = self.mean.float(), self.logvar.float()
        elements = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
        return elements.sum(dim=(1, 2, 3)).mean()


def cosine_basis(size: int, count: int) -> tuple[Tensor, Tensor]:
    """The lowest `count` patterns of the 2D cosine transform of size x size pixels, and gains.

    Returns orthonormal patterns (k, size, size), k = min(count, size^2), and gains (k, 1, 1):
    images' amplitude falls about as 1 / frequency, so that coefficient * gain is of order 1 in
    every channel.
    """
    frequencies = sorted(
        ((i, j) for i in range(size) for j in range(size)), key=lambda f: (math.hypot(*f), f)
    )[:count]
    phase = (torch.arange(size) + 0.5) * (math.pi / size)
    waves = torch.stack([torch.cos(k * phase) for k in range(size)])
    waves = waves / waves.norm(dim=1, keepdim=True)
    patterns = torch.stack([torch.outer(waves[i], waves[j]) for i, j in frequencies])
    gains = torch.tensor([(math.hypot(i, j) + 0.25) * 8 / size for i, j in frequencies])
    return patterns, gains[:, None, None]


class Encoder(nn.Module):
    """(N, 1, H, W) -> moments (N, 2C, h, w): the network's, and for the mean a linear shortcut.

    The shortcut starts as a cosine transform and the network at zero, so that what is linear in a
    slice (most of its energy) need not be learnt; the network adds the rest.
    """

    def __init__(self, patch: int, widths: list[int], blocks: int, latent_dim: int) -> None:
        super().__init__()
        factor = patch * 2 ** (len(widths) - 1)
        self.shortcut = nn.Conv2d(1, latent_dim, factor, stride=factor)
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(patch),
            nn.Conv2d(patch * patch, widths[0], 3, padding=1),
        ]
        for i, width in enumerate(widths):
            layers += [ResBlock(width) for _ in range(blocks)]
            if i + 1 < len(widths):
                layers.append(Downsample(width, widths[i + 1]))
        layers += [
            SelfAttention(widths[-1]),
            ResBlock(widths[-1]),
            ChannelNorm(widths[-1]),
            nn.SiLU(),
            zero_init(nn.Conv2d(widths[-1], 2 * latent_dim, 3, padding=1)),
        ]
        self.network = nn.Sequential(*layers)

        # Start with little posterior noise: it hides the signal that is to be learnt first.
        nn.init.constant_(self.network[-1].bias[latent_dim:], INITIAL_LOGVAR)
        patterns, gains = cosine_basis(factor, latent_dim)
        with torch.no_grad():
            self.shortcut.weight[: len(patterns), 0] = gains * patterns
            self.shortcut.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Slices (N, 1, H, W) -> mean and log-variance, stacked, (N, 2C, h, w)."""
        mean, logvar = self.network(x).chunk(2, dim=1)
        return torch.cat([mean + self.shortcut(x), logvar], dim=1)


class Decoder(nn.Module):
    """(N, C, h, w) -> the mean of p(x | z) (N, 1, H, W), and features of which texture is drawn.

    The mean has a linear shortcut that starts as the encoder's inverse. The last convolution, at
    full resolution, hides the borders of patches.
    """

    def __init__(self, patch: int, widths: list[int], blocks: int, latent_dim: int) -> None:
        super().__init__()
        factor = patch * 2 ** (len(widths) - 1)
        self.shortcut = nn.Sequential(
            nn.Conv2d(latent_dim, factor * factor, 3, padding=1), nn.PixelShuffle(factor)
        )
        layers: list[nn.Module] = [
            nn.Conv2d(latent_dim, widths[-1], 3, padding=1),
            ResBlock(widths[-1]),
            SelfAttention(widths[-1]),
        ]
        for i, width in reversed(list(enumerate(widths))):
            layers += [ResBlock(width) for _ in range(blocks)]
            if i > 0:
                layers.append(Upsample(width, widths[i - 1]))
        self.network = nn.Sequential(*layers, ChannelNorm(widths[0]), nn.SiLU())
        self.mean = nn.Sequential(
            nn.Conv2d(widths[0], 8 * patch * patch, 3, padding=1),
            nn.PixelShuffle(patch),
            zero_init(nn.Conv2d(8, 1, 3, padding=1)),
        )
        patterns, gains = cosine_basis(factor, latent_dim)
        inverse = zero_init(self.shortcut[0])
        with torch.no_grad():
            inverse.weight[:, : len(patterns), 1, 1] = (patterns / gains).flatten(1).T

    def forward(self, z: Tensor) -> Likelihood:
        """Latents (N, C, h, w) -> p(x | z) of slices (N, 1, H, W), fp32."""
        h = self.network(z)
        return Likelihood(self.mean(h).float() + self.shortcut(z).float(), h)


class VAE(nn.Module):
    """Slices (N, 1, H, W) in [-1, 1] <-> latents (N, C, h, w).

    `encode` and `decode` apply the buffers `latent_shift` and `latent_gain`, which `calibrate`
    sets at the end of training so that `mean * LATENT_SCALE` has mean 0 and variance 1 in each
    channel. Until then they are the identity.
    """

    kind = "vae"

    def __init__(
        self,
        image_size: int = 256,
        latent_size: int = 16,
        latent_dim: int = 8,
        base_channels: int = 64,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.config = {
            "image_size": image_size,
            "latent_size": latent_size,
            "latent_dim": latent_dim,
            "base_channels": base_channels,
            "blocks": blocks,
        }
        if latent_size < 1 or image_size % latent_size:
            raise ValueError(
                f"image size {image_size} is not a multiple of latent size {latent_size}"
            )

        # The factor splits into a patch, 4x4 where that divides, and halvings in the network.
        # Widths grow by half of the first a level, not by all: work lies where the pixels are.
        patch, widths = image_size // latent_size, [base_channels]
        while patch > 4 and patch % 2 == 0:
            patch //= 2
            widths.append(base_channels * (len(widths) + 2) // 2)
        self.encoder = Encoder(patch, widths, blocks, latent_dim)
        self.decoder = Decoder(patch, widths, blocks, latent_dim)
        self.texture = TextureDecoder(patch, widths[0])
        self.register_buffer("latent_shift", torch.zeros(1, latent_dim, 1, 1))
        self.register_buffer("latent_gain", torch.ones(1, latent_dim, 1, 1))
        noise = torch.randn(
            1, 1, image_size, image_size, generator=torch.Generator().manual_seed(0)
        )
        self.register_buffer("noise", noise, persistent=False)
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Slices (N, 1, H, W) in [-1, 1] -> posterior over (N, C, h, w), calibrated, fp32."""
        size = self.config["image_size"]
        if x.shape[1:] != (1, size, size):
            raise ValueError(f"expected slices (N, 1, {size}, {size}), found {tuple(x.shape)}")
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)
        logvar = logvar.clamp(*LOGVAR_RANGE)
        return DiagonalGaussian(
            (mean - self.latent_shift) * self.latent_gain,
            logvar + 2 * self.latent_gain.log(),
        )

    def likelihood(self, z: Tensor) -> Likelihood:
        """z as for `decode` -> p(x | z); its mean is what the latents know of a slice."""
        return self.decoder(z / self.latent_gain + self.latent_shift)

    def draw(self, known: Likelihood, noise: Tensor | None = None, steps: int = STEPS) -> Tensor:
        """A slice of each p(x | z), (N, 1, H, W), fp32; see `decode`."""
        if noise is None:
            noise = self.noise.expand_as(known.mean)
        return self.texture.sample(known, noise, steps)

    def decode(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """z = latent / LATENT_SCALE (N, C, h, w) -> slices (N, 1, H, W), about [-1, 1], fp32.

        noise: standard normal, (N, 1, H, W), from which texture is drawn; by default the same for
        all slices and calls.
        """
        return self.draw(self.likelihood(z), noise)

    def forward(
        self, x: Tensor, noise: Tensor, texture_noise: Tensor, angle: Tensor
    ) -> tuple[Tensor, DiagonalGaussian, Tensor]:
        """Slices -> the mean of p(x | z) for one z, the posterior, and the texture's loss (N,).

        x (N, 1, H, W); noise (N, C, h, w), which draws z; texture_noise (N, 1, H, W) and angle
        (N,), at which `TextureDecoder.loss` is taken.
        """
        posterior = self.encode(x)
        known = self.likelihood(posterior.sample(noise))
        return known.mean, posterior, self.texture.loss(known, x, texture_noise, angle)

    @torch.no_grad()
    def calibrate(self, mean: Tensor, std: Tensor) -> None:
        """Make latents standard, given mean and SD (C,) of `encode(x).mean` as it is now."""
        if not (torch.isfinite(mean).all() and (std > 1e-6).all()):
            raise ValueError(
                f"collapsed latent channels: mean {mean.tolist()}, standard deviation "
                f"{std.tolist()}; train longer, or lower --kl_weight"
            )
        mean, std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
        self.latent_shift += mean / self.latent_gain
        self.latent_gain /= std * LATENT_SCALE

    def uncalibrate(self) -> None:
        """Give the latents the scale they have in training."""
        self.latent_shift.zero_()
        self.latent_gain.fill_(1.0)


def clipped(x: Tensor) -> Tensor:
    """Decoded slices, clipped to [-1, 1], the range of the window."""
    return F.hardtanh(x)


def reconstruct(vae: VAE, x: Tensor) -> Tensor:
    """Slices (N, 1, H, W) through the posterior's mean and back, clipped to [-1, 1]."""
    return clipped(vae.decode(vae.encode(x).mean))
