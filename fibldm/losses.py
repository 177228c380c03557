"""Losses of the VAE: L1, perceptual, KL, and a patch discriminator (Esser et al. 2021,
arXiv 2012.09841).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from fibldm import distributed
from fibldm.layers import group_norm


def structural_loss(x: Tensor, y: Tensor, scales: int = 3) -> Tensor:
    """Gradients (L1) and structural similarity (1 - SSIM) of x and y at several scales -> (N,).

    x, y: (N, 1, H, W) in [-1, 1]. Keeps edges and texture where no perceptual network is at hand;
    needs no weights. SSIM: Wang et al. 2004, with windows that fit into 11 pixels.
    """
    x, y = x.float(), y.float()
    total = x.new_zeros(x.shape[0])
    for _ in range(scales):
        for axis in (2, 3):
            total = total + (x.diff(dim=axis) - y.diff(dim=axis)).abs().mean(dim=(1, 2, 3))
        if min(x.shape[2:]) >= 11:
            ssim = structural_similarity_index_measure(x, y, reduction="none", data_range=2.0)
            total = total + 0.1 * (1 - ssim.reshape(-1))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return total


class PatchDiscriminator(nn.Sequential):
    """Slices (N, 1, H, W) -> logits (N, 1, H/8, W/8), one for each patch (arXiv 1611.07004).

    Group norm keeps each slice apart from its batch, so that processes and batches agree.
    """

    def __init__(self, base_channels: int = 64) -> None:
        layers: list[nn.Module] = [nn.Conv2d(1, base_channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = base_channels
        for _ in range(2):
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), group_norm(2 * width)]
            layers.append(nn.LeakyReLU(0.2))
            width *= 2
        layers.append(nn.Conv2d(width, 1, 3, padding=1))
        super().__init__(*layers)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of logits for real slices and reconstructions (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Weight that gives the adversarial loss the gradient norm of the reconstruction loss.

    Both gradients are taken at the decoder's last layer (arXiv 2012.09841, equation 7) and
    averaged over ranks, so that all ranks agree.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(distributed.mean(gradient.float()).norm())
    weight = norms[0] / (norms[1] + 1e-6)
    return torch.nan_to_num(weight, nan=0.0).clamp(0, 1e4).detach()  # fp16 overflow: step skipped
