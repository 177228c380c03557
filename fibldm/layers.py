"""The blocks that the VAE, the U-Net and the ControlNet are built from."""

import math

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


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position.

    Group norm averages over the whole slice; here no position depends on the others. In
    channels-last memory its backward pass is several times faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of t (N,) at geometric frequencies (Vaswani et al. 2017) -> (N, channels) fp32.

    An odd number of channels ends in a zero.
    """
    half = channels // 2
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    )
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, channels % 2))


class ResBlock(nn.Module):
    """Residual block: norm, SiLU, convolution, twice; the embedding scales and shifts between.

    The modulation by scale and shift is Dhariwal & Nichol 2021 (arXiv 2105.05233), section 3.1.
    """

    def __init__(self, channels: int, emb_channels: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * channels) if emb_channels else None
        self.norm2 = ChannelNorm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x (N, C, H, W), emb (N, emb_channels) -> (N, C, H, W)."""
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.emb is not None:
            scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.conv2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """Residual self-attention over all positions.

    Queries and keys are normalized (arXiv 2302.05442), so that logits stay bounded in fp16. For
    maps of at most some hundred positions this code is faster on a CPU than torch's own attention.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = largest_divisor(channels, channels // 64)
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.query_norm = nn.LayerNorm(channels // self.heads, bias=False)
        self.key_norm = nn.LayerNorm(channels // self.heads, bias=False)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, C, H, W)."""
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)
        q, k, v = qkv.reshape(n, height * width, 3, self.heads, c // self.heads).unbind(dim=2)
        q = self.query_norm(q).to(v.dtype) * (c // self.heads) ** -0.5
        k = self.key_norm(k).to(v.dtype)
        weights = torch.einsum("nqhd,nkhd->nhqk", q, k).softmax(dim=-1).to(v.dtype)
        h = torch.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, height, width, c)
        return x + self.out(h.permute(0, 3, 1, 2))


class TransformerBlock(nn.Module):
    """Self-attention, then an MLP at each position, scaled and shifted by the embedding.

    Used for the smallest maps (Hoogeboom et al. 2023, "Simple diffusion", arXiv 2301.11093). A
    weight here costs a ninth of the arithmetic of a weight in a 3x3 convolution.
    """

    def __init__(self, channels: int, emb_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = SelfAttention(channels)
        self.norm = ChannelNorm(channels)
        self.emb = nn.Linear(emb_channels, 2 * channels)
        self.conv1 = nn.Conv2d(channels, 4 * channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(4 * channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (N, C, H, W), emb (N, emb_channels) -> (N, C, H, W)."""
        x = self.attention(x)
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm(x) * (1 + scale) + shift
        return x + self.conv2(self.dropout(F.gelu(self.conv1(h), approximate="tanh")))


class Downsample(nn.Conv2d):
    """Half the height and width, rounded up, by a 3x3 convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """A 1x1 convolution at the small size, then nearest-neighbour upsampling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """x (N, in_channels, H, W) -> (N, out_channels, *size); size is by default (2H, 2W)."""
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return F.interpolate(super().forward(x), size=size, mode="nearest")
