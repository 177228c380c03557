"""The texture decoder: draws the finest structures of a slice, for which a latent has no room.

A decoder that gives only the mean of p(x | z) blurs them. So a small diffusion model at full
resolution draws what the mean lacks. This residual, divided by its local standard deviation, is r.
The model runs on a circle (TrigFlow; Lu & Song 2024, arXiv 2410.11081), from white noise at angle
pi / 2 to r at angle 0: u = cos(a) r + sin(a) noise, and v = du / da = cos(a) noise - sin(a) r.

So divided the residual has about variance 1 and a white spectrum, as noise has. Where r is no more
than noise, v is 0. Sampling starts with the right power and keeps it, and two Euler steps along v
are enough to draw edges, vessels and septa.
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
    Upsample,
    timestep_embedding,
    zero_init,
)
from fibldm.scheduler import logit_normal

STEPS = 2  # of sampling; more change little, and each takes most of the time of the decoder
LOGVAR_RANGE = (-16.0, 1.0)  # of the residual: 0.2 to 1,150 HU in the default window
INITIAL_LOGVAR = -5.0
FREQUENCIES, EMBEDDING = 64, 128  # of the angle
FURTHEST = 8.0  # standard deviations: residuals beyond are metal and borders
AROUND = 9  # pixels: side of the squares over which a residual's power is averaged


class Likelihood(NamedTuple):
    """p(x | z) of slices: its mean (N, 1, H, W), and the decoder's features (N, C, h, w)."""

    mean: Tensor
    features: Tensor


class TextureDecoder(nn.Module):
    """Draws slices of a `Likelihood`: the strength of texture in each place, and its shape.

    Patches of pixels become channels, as in the VAE; a level of half the size sees further.
    """

    def __init__(self, patch: int, channels: int) -> None:
        super().__init__()
        self.patch, width = patch, max(1, 3 * channels // 4)
        self.logvar = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, 1, 3, padding=1)),
            nn.Upsample(scale_factor=patch, mode="bilinear"),
        )
        nn.init.constant_(self.logvar[2].bias, INITIAL_LOGVAR)
        self.embedding = nn.Sequential(
            nn.Linear(FREQUENCIES, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING)
        )
        self.input = nn.Conv2d(2 * patch * patch + channels + 1, width, 3, padding=1)
        self.first = ResBlock(width, EMBEDDING)
        self.down = Downsample(width, channels)
        self.middle = nn.ModuleList(ResBlock(channels, EMBEDDING) for _ in range(2))
        self.up = Upsample(channels, width)
        self.last = ResBlock(width, EMBEDDING)
        self.output = nn.Sequential(
            ChannelNorm(width),
            nn.SiLU(),
            nn.Conv2d(width, 4 * patch * patch, 3, padding=1),
            nn.PixelShuffle(patch),
            zero_init(nn.Conv2d(4, 1, 3, padding=1)),  # hides the borders of patches
        )

    def strength(self, features: Tensor) -> Tensor:
        """Features (N, C, h, w) -> log-variance of the residual (N, 1, H, W), fp32."""
        return self.logvar(features).float().clamp(*LOGVAR_RANGE)

    def forward(self, u: Tensor, angle: Tensor, known: Likelihood, logvar: Tensor) -> Tensor:
        """u (N, 1, H, W) at angles (N,), 0 to pi / 2 -> v (N, 1, H, W), fp32."""
        patches = [F.pixel_unshuffle(image, self.patch) for image in (u, known.mean)]
        level = F.avg_pool2d((logvar - INITIAL_LOGVAR) / 2, self.patch)
        emb = self.embedding(timestep_embedding(angle * (2000 / math.pi), FREQUENCIES))

        x = self.first(self.input(torch.cat([*patches, known.features, level], dim=1)), emb)
        h = self.down(x)
        for block in self.middle:
            h = block(h, emb)
        x = self.last(x + self.up(h, x.shape[2:]), emb)
        return self.output(x).float()

    def sample(self, known: Likelihood, noise: Tensor, steps: int = STEPS) -> Tensor:
        """Slices (N, 1, H, W), about [-1, 1], drawn from standard normal noise of this shape.

        Euler's method along v starts with white noise of the right power, and keeps it with few
        steps. DDIM's first step would go to the mean of r, which is 0: it blurs.
        """
        logvar, u, step = self.strength(known.features), noise, math.pi / 2 / steps
        for k in range(steps, 0, -1):
            u = u - step * self(u, u.new_full((len(u),), k * step), known, logvar)
        return known.mean + torch.exp(0.5 * logvar) * u

    def loss(self, known: Likelihood, x: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
        """The error of v at angles (N,), and of the strength, in nats -> mean over pixels (N,).

        x: slices (N, 1, H, W); noise: standard normal, of this shape. Both errors are those of
        Gaussians. No gradient goes to the mean, nor from the error of v to the strength. Through
        the features latents learn what texture there is.
        """
        known = known._replace(mean=known.mean.detach())
        residual, logvar = (x - known.mean).float(), self.strength(known.features)
        power = F.avg_pool2d(residual.square(), AROUND, 1, AROUND // 2, count_include_pad=False)
        strength = 0.5 * (logvar + (power + 1e-6) * torch.exp(-logvar))

        logvar = logvar.detach()
        r = (residual * torch.exp(-0.5 * logvar)).clamp(-FURTHEST, FURTHEST)
        cos, sin = torch.cos(angle)[:, None, None, None], torch.sin(angle)[:, None, None, None]
        v = self(cos * r + sin * noise, angle, known, logvar)
        return ((v - (cos * noise - sin * r)).square() + strength).mean(dim=(1, 2, 3))


def random_angles(uniform: Tensor) -> Tensor:
    """Angles to train at, 0 to pi / 2, logit-normal (arXiv 2403.03206), of uniform numbers (N,)."""
    return logit_normal(uniform) * (math.pi / 2)
