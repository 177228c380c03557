"""The ControlNet: steers a trained, frozen U-Net by a contour at full resolution.

Zhang, Rao & Agrawala 2023, "Adding Conditional Control to Text-to-Image Diffusion Models".
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fibldm.layers import zero_init
from fibldm.scheduler import Denoiser
from fibldm.unet import NO_LABEL, UNet, contour_condition


class HintEncoder(nn.Sequential):
    """Contour (N, K, H, W) -> (N, out_channels, h, w): the pixels of a latent's cell as channels.

    A binary map has no texture to learn filters for; the unshuffle keeps its every pixel.
    """

    def __init__(self, contour_channels: int, factor: int, out_channels: int) -> None:
        super().__init__(
            nn.PixelUnshuffle(factor),
            nn.Conv2d(contour_channels * factor * factor, out_channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.SiLU(),
            zero_init(nn.Conv2d(out_channels, out_channels, 1)),
        )


class ControlNet(nn.Module):
    """A trainable copy of a U-Net's encoder; its features pass zero convolutions.

    At the start all its outputs are 0, so the steered U-Net equals the plain one to the bit.
    """

    kind = "controlnet"

    def __init__(self, unet: UNet, image_size: int = 256) -> None:
        super().__init__()
        self.config = {"image_size": image_size}
        latent_size, channels = unet.config["latent_size"], unet.config["channels"]
        if image_size % latent_size:
            raise ValueError(
                f"image size {image_size} is not a multiple of latent size {latent_size}"
            )
        self.encoder = copy.deepcopy(unet.encoder).requires_grad_(True).train()
        factor = image_size // latent_size
        self.hint = HintEncoder(unet.config["contour_channels"], factor, channels[0])
        self.zero_convs = nn.ModuleList(
            zero_init(nn.Conv2d(width, width, 1)) for width in self.encoder.widths
        )

    def embed(self, contour: Tensor) -> Tensor:
        """Contour (N, K, H, W), 0 or 1 -> hint features (N, channels[0], h, w).

        They do not depend on the timestep: a sampler computes them once.
        """
        return self.hint(contour.float())

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        full_contour: Tensor,
        contour: Tensor | None = None,
        label: Tensor | None = None,
        embedded: bool = False,
    ) -> list[Tensor]:
        """As UNet.forward, and full_contour (N, K, H, W) -> `control`, a list for UNet.forward.

        With `embedded`, full_contour is what `embed` made of it.
        """
        hint = full_contour if embedded else self.embed(full_contour)
        features, _ = self.encoder(x, t, contour, label, hint)
        return [conv(f) for conv, f in zip(self.zero_convs, features, strict=True)]


def make_denoiser(
    unet: UNet,
    controlnet: ControlNet | None = None,
    contour: Tensor | None = None,
    label: Tensor | None = None,
) -> Denoiser:
    """The denoiser (x_t, t) -> v for contours (N, K, H, W) and labels, each optional.

    Labels are as UNet.forward has them: classes (N,), or their weights (N, num_classes).
    """
    condition, control = _prepare(unet, controlnet, contour, label)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return unet(x, t, condition, label, control(x, t))

    return denoiser


def make_pair(
    unet: UNet,
    controlnet: ControlNet | None = None,
    contour: Tensor | None = None,
    label: Tensor | None = None,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For `guide`: (x_t, t) -> v as of `make_denoiser`, and v of the U-Net alone, in one batch."""
    condition, control = _prepare(unet, controlnet, contour, label)
    conditions = None if condition is None else _then_zeros(condition)
    labels = label
    if label is not None and label.ndim == 2:
        labels = F.pad(label, (0, 1, 0, len(label)))  # the last weight is that of no label
        labels[len(label) :, -1] = 1
    elif label is not None:
        labels = torch.cat([label, torch.full_like(label, NO_LABEL)])

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        steering = control(x, t)
        steering = steering and [_then_zeros(feature) for feature in steering]
        x, t = torch.cat([x, x]), torch.cat([t, t])
        return unet(x, t, conditions, labels, steering).chunk(2)

    return pair


def _then_zeros(x: Tensor) -> Tensor:
    """x (N, ...) and N items of zeros."""
    return torch.cat([x, torch.zeros_like(x)])


def _prepare(
    unet: UNet, controlnet: ControlNet | None, contour: Tensor | None, label: Tensor | None
) -> tuple[Tensor | None, Callable[[Tensor, Tensor], list[Tensor] | None]]:
    """The U-Net's view of a contour, and the function (x_t, t) -> what the ControlNet adds."""
    if contour is None:
        return None, lambda x, t: None
    condition = contour_condition(contour, unet.config["latent_size"])
    if controlnet is None:
        return condition, lambda x, t: None
    hint = controlnet.embed(contour)
    return condition, lambda x, t: controlnet(x, t, hint, condition, label, embedded=True)
