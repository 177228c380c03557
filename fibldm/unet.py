"""The denoising U-Net on latents, as two modules: an encoder, which the ControlNet copies, and a
decoder (Ho et al. 2020; Dhariwal & Nichol 2021).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fibldm.layers import (
    ChannelNorm,
    Downsample,
    ResBlock,
    SelfAttention,
    TransformerBlock,
    Upsample,
    timestep_embedding,
    zero_init,
)

ATTENTION_MAX_SIZE = 8  # attention where feature maps are at most 8x8: there it is cheap
TRANSFORMER_MAX_SIZE = 4  # and at most 4x4 no convolutions at all
NO_LABEL = -1


def contour_condition(contour: Tensor, size: int, keep: Tensor | None = None) -> Tensor:
    """Contour (N, K, H, W) in {0, 1} -> the U-Net's input (N, K + 1, size, size) in [0, 1].

    The contour is averaged down to the latent's size. One more channel of ones says "a contour is
    given". For items whose `keep` (N,) is false all channels are 0: the contour is unknown.
    """
    contour = F.adaptive_avg_pool2d(contour.float(), size)
    condition = torch.cat([contour, torch.ones_like(contour[:, :1])], dim=1)
    return condition if keep is None else condition * keep.view(-1, 1, 1, 1)


def blocks_per_level(blocks: int | Sequence[int] | None, levels: int) -> tuple[int, ...]:
    """The number of blocks at each level, from one number for each level, one for all, or None.

    None gives 1 at each level and 3 at the last. Raises ValueError for another count of numbers.
    """
    if blocks is None:
        return (*[1] * (levels - 1), 3)
    blocks = (blocks,) if isinstance(blocks, int) else tuple(blocks)
    if len(blocks) == 1:
        blocks *= levels
    if len(blocks) != levels:
        raise ValueError(
            f"--blocks {' '.join(map(str, blocks))}: {len(blocks)} numbers, but --channels has "
            f"{levels}; expected one for each, or one for all"
        )
    return blocks


class Attended(nn.Module):
    """A ResBlock and self-attention."""

    def __init__(self, channels: int, emb_channels: int, dropout: float) -> None:
        super().__init__()
        self.block = ResBlock(channels, emb_channels, dropout)
        self.attention = SelfAttention(channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (N, C, H, W), emb (N, emb_channels) -> (N, C, H, W)."""
        return self.attention(self.block(x, emb))


def stage(
    channels: int, emb_channels: int, dropout: float, size: int, attend: bool = False
) -> nn.Module:
    """The block for feature maps of this size: (x, emb) -> x. `attend` asks for attention."""
    if size <= TRANSFORMER_MAX_SIZE:
        return TransformerBlock(channels, emb_channels, dropout)
    kind = Attended if attend or size <= ATTENTION_MAX_SIZE else ResBlock
    return kind(channels, emb_channels, dropout)


def level_sizes(latent_size: int, levels: int) -> list[int]:
    """Height and width of the feature maps at each level."""
    sizes = [latent_size]
    for _ in range(levels - 1):
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


class UNetEncoder(nn.Module):
    """Noisy latent and conditions -> features at each resolution, the middle's last."""

    def __init__(
        self,
        latent_dim: int,
        latent_size: int,
        contour_channels: int,
        num_classes: int,
        channels: Sequence[int],
        blocks: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.condition_channels = contour_channels + 1
        self.time_channels, emb = channels[0], 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(channels[0], emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(num_classes + 1, emb) if num_classes else None
        in_channels = latent_dim + self.condition_channels
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        # One list of stages and downsamplings; each stage's feature map is kept for a skip.
        self.layers, self.widths = nn.ModuleList(), []
        sizes = level_sizes(latent_size, len(channels))
        for i, width in enumerate(channels):
            for _ in range(blocks[i]):
                self.layers.append(stage(width, emb, dropout, sizes[i]))
                self.widths.append(width)
            if i + 1 < len(channels):
                self.layers.append(Downsample(width, channels[i + 1]))
        self.middle = stage(channels[-1], emb, dropout, sizes[-1], attend=True)
        self.widths.append(channels[-1])

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        contour: Tensor | None = None,
        label: Tensor | None = None,
        hint: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """x (N, C, h, w), t (N,), contour (N, K + 1, h, w), label (N,) -> features, embedding.

        contour comes from `contour_condition`; label is a class index or NO_LABEL, or, between
        classes, weights (N, num_classes) of their embeddings, one more being no label's; `hint`
        (N, channels[0], h, w), the ControlNet's, is added to the first feature map.
        """
        # Conditions: time and label are embedded, the contour joins the latent's channels.
        emb = self.time(timestep_embedding(t, self.time_channels))
        if self.label is not None:
            if label is None:
                label = torch.full_like(t, NO_LABEL, dtype=torch.long)
            none = self.label.num_embeddings - 1
            if label.ndim == 2:
                emb = emb + label @ self.label.weight[: label.shape[1]]
            else:
                emb = emb + self.label(torch.where(label == NO_LABEL, none, label))
        if contour is None:
            contour = x.new_zeros(x.shape[0], self.condition_channels, *x.shape[2:])

        # Features.
        h = self.conv_in(torch.cat([x, contour.to(x.dtype)], dim=1))
        h = h if hint is None else h + hint
        features = []
        for layer in self.layers:
            if isinstance(layer, Downsample):
                h = layer(h)
            else:
                h = layer(h, emb)
                features.append(h)
        return [*features, self.middle(h, emb)], emb


class Merge(nn.Conv2d):
    """Join features and a skip connection by a 1x1 convolution, which costs less than a 3x3 one."""

    def __init__(self, channels: int) -> None:
        super().__init__(2 * channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x and skip (N, C, H, W) -> (N, C, H, W)."""
        return super().forward(torch.cat([x, skip], dim=1))


class UNetDecoder(nn.Module):
    """Features and embedding -> the prediction for the latent: the encoder's levels, mirrored."""

    def __init__(
        self,
        latent_dim: int,
        latent_size: int,
        channels: Sequence[int],
        blocks: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        emb, sizes = 4 * channels[0], level_sizes(latent_size, len(channels))
        self.layers = nn.ModuleList()
        for i, width in reversed(list(enumerate(channels))):
            for _ in range(blocks[i]):
                self.layers.append(Merge(width))
                self.layers.append(stage(width, emb, dropout, sizes[i]))
            if i > 0:
                self.layers.append(Upsample(width, channels[i - 1]))
        self.norm = ChannelNorm(channels[0])
        self.conv_out = zero_init(nn.Conv2d(channels[0], latent_dim, 3, padding=1))

    def forward(self, features: list[Tensor], emb: Tensor) -> Tensor:
        """Features of UNetEncoder and emb (N, E) -> (N, C, h, w), fp32."""
        *skips, h = features
        for layer in self.layers:
            if isinstance(layer, Merge):
                h = layer(h, skips.pop())
            elif isinstance(layer, Upsample):
                h = layer(h, size=skips[-1].shape[2:])
            else:
                h = layer(h, emb)
        return self.conv_out(F.silu(self.norm(h))).float()


class UNet(nn.Module):
    """Predicts v from a noisy latent, its timestep and, where given, contour and class label."""

    kind = "unet"

    def __init__(
        self,
        latent_dim: int = 8,
        latent_size: int = 16,
        contour_channels: int = 1,
        num_classes: int = 0,
        channels: Sequence[int] = (128, 256, 768),
        blocks: int | Sequence[int] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        blocks = blocks_per_level(blocks, len(channels))
        self.config = {
            "latent_dim": latent_dim,
            "latent_size": latent_size,
            "contour_channels": contour_channels,
            "num_classes": num_classes,
            "channels": list(channels),
            "blocks": list(blocks),
            "dropout": dropout,
        }
        self.encoder = UNetEncoder(
            latent_dim, latent_size, contour_channels, num_classes, channels, blocks, dropout
        )
        self.decoder = UNetDecoder(latent_dim, latent_size, channels, blocks, dropout)
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        contour: Tensor | None = None,
        label: Tensor | None = None,
        control: list[Tensor] | None = None,
    ) -> Tensor:
        """x (N, C, h, w), t (N,), contour (N, K + 1, h, w), label (N,) -> v (N, C, h, w), fp32.

        Between classes label is (N, num_classes), weights that sum to 1. `control`, from a
        ControlNet, holds what is added to each of the encoder's features.
        """
        features, emb = self.encoder(x, t, contour, label)
        if control is not None:
            features = [f + c for f, c in zip(features, control, strict=True)]
        return self.decoder(features, emb)

    def load_from(self, other: "UNet", classes: Sequence[str], known: Sequence[str]) -> None:
        """Take the weights of a U-Net of the same sizes; embeddings of classes go by their names.

        `classes` are this one's, `known` the other's. One that the other does not know starts as
        no label does.
        """
        state = other.state_dict()
        rows = state.pop(name := "encoder.label.weight", None)
        if rows is None:
            rows = torch.zeros_like(state["encoder.time.2.bias"])[None]
        if self.encoder.label is None:  # no label is all that there is
            state["encoder.time.2.bias"] = state["encoder.time.2.bias"] + rows[-1]
        else:
            numbers = dict(zip(known, range(len(rows) - 1), strict=False))
            state[name] = rows[[numbers.get(label, -1) for label in [*classes, None]]]
        self.load_state_dict(state)
