"""The denoising U-Net on latents, as two modules: an encoder, which the ControlNet copies, and a
decoder (Ho et al. 2020; Dhariwal & Nichol 2021).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fibldm.layers import (
    Downsample,
    ResBlock,
    SelfAttention,
    Upsample,
    group_norm,
    timestep_embedding,
    zero_init,
)

ATTENTION_MAX_SIZE = 8  # attention where feature maps are at most 8x8: there it is cheap
NO_LABEL = -1


def contour_condition(contour: Tensor, size: int, keep: Tensor | None = None) -> Tensor:
    """Contour (N, K, H, W) in {0, 1} -> the U-Net's input (N, K + 1, size, size) in [0, 1].

    Averaged down to the latent's size, with one channel of ones that says "a contour is given".
    Where `keep` (N,) is false all channels are 0: no contour, which is not "no lungs".
    """
    contour = F.adaptive_avg_pool2d(contour.float(), size)
    condition = torch.cat([contour, torch.ones_like(contour[:, :1])], dim=1)
    return condition if keep is None else condition * keep.view(-1, 1, 1, 1)


class Stage(nn.Module):
    """A ResBlock and, at small sizes, self-attention."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, attend: bool):
        super().__init__()
        self.block = ResBlock(in_channels, out_channels, emb_channels)
        self.attention = SelfAttention(out_channels) if attend else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (N, in_channels, H, W), emb (N, emb_channels) -> (N, out_channels, H, W)."""
        return self.attention(self.block(x, emb))


class UNetEncoder(nn.Module):
    """Noisy latent and conditions -> features at each resolution, the middle block's last."""

    def __init__(
        self,
        latent_dim: int,
        latent_size: int,
        contour_channels: int,
        num_classes: int,
        channels: tuple[int, ...],
        blocks: int,
    ) -> None:
        super().__init__()
        self.condition_channels = contour_channels + 1
        self.time_channels, emb = channels[0], 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(channels[0], emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(num_classes + 1, emb) if num_classes else None
        in_channels = latent_dim + self.condition_channels
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        # One list of stages and downsamplings; the width of each feature map is kept for skips.
        self.layers, self.widths, size = nn.ModuleList(), [channels[0]], latent_size
        for i, width in enumerate(channels):
            for _ in range(blocks):
                self.layers.append(Stage(self.widths[-1], width, emb, size <= ATTENTION_MAX_SIZE))
                self.widths.append(width)
            if i + 1 < len(channels):
                self.layers.append(Downsample(width, width))
                self.widths.append(width)
                size = (size + 1) // 2
        self.middle = nn.ModuleList(
            [
                Stage(channels[-1], channels[-1], emb, True),
                Stage(channels[-1], channels[-1], emb, False),
            ]
        )
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

        contour comes from `contour_condition`; label is a class index or NO_LABEL; `hint`
        (N, channels[0], h, w), the ControlNet's, is added to the first feature map.
        """
        # Conditions: time and label are embedded, the contour joins the latent's channels.
        emb = self.time(timestep_embedding(t, self.time_channels))
        if self.label is not None:
            if label is None:
                label = torch.full_like(t, NO_LABEL, dtype=torch.long)
            none = self.label.num_embeddings - 1
            emb = emb + self.label(torch.where(label == NO_LABEL, none, label))
        if contour is None:
            contour = x.new_zeros(x.shape[0], self.condition_channels, *x.shape[2:])

        # Features.
        h = self.conv_in(torch.cat([x, contour.to(x.dtype)], dim=1))
        features = [h if hint is None else h + hint]
        for layer in self.layers:
            h = features[-1]
            features.append(layer(h) if isinstance(layer, Downsample) else layer(h, emb))
        h = features[-1]
        for stage in self.middle:
            h = stage(h, emb)
        return [*features, h], emb


class UNetDecoder(nn.Module):
    """Features and embedding -> the prediction for the latent."""

    def __init__(
        self,
        latent_dim: int,
        latent_size: int,
        channels: tuple[int, ...],
        blocks: int,
        skip_widths: list[int],
    ) -> None:
        super().__init__()
        skips, width, emb = list(skip_widths), channels[-1], 4 * channels[0]
        sizes = [latent_size]
        for _ in channels[1:]:
            sizes.append((sizes[-1] + 1) // 2)
        self.layers = nn.ModuleList()
        for i in reversed(range(len(channels))):
            for _ in range(blocks + 1):
                attend = sizes[i] <= ATTENTION_MAX_SIZE
                self.layers.append(Stage(width + skips.pop(), channels[i], emb, attend))
                width = channels[i]
            if i > 0:
                self.layers.append(Upsample(width, width))
        self.norm = group_norm(width)
        self.conv_out = zero_init(nn.Conv2d(width, latent_dim, 3, padding=1))

    def forward(self, features: list[Tensor], emb: Tensor) -> Tensor:
        """Features of UNetEncoder and emb (N, E) -> (N, C, h, w), fp32."""
        *skips, h = features
        for layer in self.layers:
            if isinstance(layer, Upsample):
                h = layer(h, size=skips[-1].shape[2:])
            else:
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
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
        channels: tuple[int, ...] = (128, 256, 512),
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.config = {
            "latent_dim": latent_dim,
            "latent_size": latent_size,
            "contour_channels": contour_channels,
            "num_classes": num_classes,
            "channels": list(channels),
            "blocks": blocks,
        }
        self.encoder = UNetEncoder(
            latent_dim, latent_size, contour_channels, num_classes, channels, blocks
        )
        self.decoder = UNetDecoder(
            latent_dim, latent_size, channels, blocks, self.encoder.widths[:-1]
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        contour: Tensor | None = None,
        label: Tensor | None = None,
        control: list[Tensor] | None = None,
    ) -> Tensor:
        """x (N, C, h, w), t (N,), contour (N, K + 1, h, w), label (N,) -> v (N, C, h, w), fp32.

        `control`, from a ControlNet, holds what is added to each of the encoder's features.
        """
        features, emb = self.encoder(x, t, contour, label)
        if control is not None:
            features = [f + c for f, c in zip(features, control, strict=True)]
        return self.decoder(features, emb)
