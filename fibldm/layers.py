"""The blocks that the VAE, the U-Net and the ControlNet are built from."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters to zero, so that a residual branch starts as identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`; 1 where there is none."""
    return next((d for d in range(limit, 1, -1) if number % d == 0), 1)


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least 4 channels: a group of one would lose its brightness."""
    return nn.GroupNorm(largest_divisor(channels, min(32, channels // 4)), channels)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position: what is far away changes nothing.

    Unlike group norm it keeps a place's code free of the rest of its slice, and in channels-last
    memory its backward is several times faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def timestep_embedding(t: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of t (N,) at geometric frequencies (Vaswani et al. 2017) -> (N, channels) fp32.

    An odd number of channels ends in a zero.
    """
    half = channels // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    )
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, channels % 2))


class ResBlock(nn.Module):
    """Residual block: norm, SiLU, convolution, twice; the embedding scales and shifts between.

    The modulation by scale and shift is Dhariwal & Nichol 2021 (arXiv 2105.05233), section 3.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int = 0,
        norm: Callable[[int], nn.Module] = group_norm,
    ) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * out_channels) if emb_channels else None
        self.norm2 = norm(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x (N, in_channels, H, W), emb (N, emb_channels) -> (N, out_channels, H, W)."""
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.emb is not None:
            scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """Residual self-attention over all positions.

    Queries and keys are RMS-normalized (arXiv 2302.05442), so that logits stay bounded in fp16.
    """

    def __init__(
        self,
        channels: int,
        head_channels: int = 64,
        norm: Callable[[int], nn.Module] = group_norm,
    ) -> None:
        super().__init__()
        self.heads = largest_divisor(channels, channels // head_channels)
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.query_norm = nn.RMSNorm(channels // self.heads)
        self.key_norm = nn.RMSNorm(channels // self.heads)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, C, H, W)."""
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(dim=1)  # each (N, heads, positions, head channels)
        q = self.query_norm(q.float()).to(v.dtype)
        k = self.key_norm(k.float()).to(v.dtype)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(2, 3).reshape(n, c, height, width))


class Downsample(nn.Conv2d):
    """Half the height and width, rounded up, by a 3x3 convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Nearest-neighbour upsampling, then a 3x3 convolution: no checkerboard."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """x (N, in_channels, H, W) -> (N, out_channels, *size); size is by default (2H, 2W)."""
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return super().forward(F.interpolate(x, size=size, mode="nearest"))
