"""The grain: texture too fine for a latent, drawn from noise instead of reconstructed.

Where a decoder can't know the fine scale of a slice, its best guess is none at all: a blur. It can
know how strong it is. Video codecs do the same with film grain (AV1; Norkin & Birkbeck 2018).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

CUTOFF = 0.28  # cycles per pixel: waves of 3.6 pixels; what is longer is left to the mean
SLOPE = 2.7  # power falls as frequency ** -2.7 in the lungs of 40 patients


@cache
def _bands(size: int) -> tuple[Tensor, Tensor]:
    """Of the frequencies that rfft2 gives for size x size: 1 in the grain's band, 0 below it; and
    the gain that gives white noise its spectrum there, with variance 1.
    """
    with torch.device("cpu"):  # it is kept, whatever the default device is now
        at, half = torch.fft.fftfreq(size), torch.fft.rfftfreq(size)
    radius = torch.hypot(at[:, None], half[None])
    band = (radius > CUTOFF).float()
    gain = band * radius.clamp(min=CUTOFF) ** (-SLOPE / 2)
    twice = torch.where((half == 0) | (half == 0.5), 1.0, 2.0)  # rfft2 leaves their mirrors out
    power = (gain.square() * twice).sum() / size**2
    return band, gain / power.clamp(min=1e-12).sqrt()


def fine_scale(x: Tensor) -> Tensor:
    """What of x (N, 1, S, S) is above CUTOFF; fp32."""
    band = _bands(x.shape[-1])[0].to(x.device)
    return torch.fft.irfft2(torch.fft.rfft2(x.float()) * band, s=x.shape[-2:])


def grain(noise: Tensor) -> Tensor:
    """White noise (N, 1, S, S) -> noise of variance 1 with the spectrum of CT's finest texture."""
    gain = _bands(noise.shape[-1])[1].to(noise.device)
    return torch.fft.irfft2(torch.fft.rfft2(noise.float()) * gain, s=noise.shape[-2:])


def moved(field: Tensor, uniform: Tensor) -> Tensor:
    """Copies (N, 1, S, S) of a grain (1, 1, S, S), which is periodic, moved by uniform (N, 2) of S.

    uniform in [0, 1). As good as new grain, and free: a draw for each slice takes 1.5 ms of a CPU.
    """
    offsets = (uniform * field.shape[-1]).long().tolist()
    return torch.cat([field.roll(offset, dims=(2, 3)) for offset in offsets])


def local_power(x: Tensor) -> Tensor:
    """Mean square of the fine scale around each pixel of x (N, 1, S, S), over 9x9 pixels."""
    return F.avg_pool2d(fine_scale(x).square(), 9, stride=1, padding=4, count_include_pad=False)


def grain_loss(mean: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
    """exp(logvar) - lacking * logvar, mean over pixels; lacking: power that the mean lacks of x.

    All are (N, 1, S, S), power is that of the fine scale. Its derivative by logvar is exp(logvar) -
    lacking (Poisson regression's): at the best estimate both have the same sum over all places that
    the decoder does not tell apart, so that decoded slices have the power of real ones, also where
    the mean has some of its own that is not x's. The mean learns nothing.
    """
    lacking = local_power(x) - local_power(mean.detach())
    return (torch.exp(logvar.float()) - lacking * logvar.float()).mean()
