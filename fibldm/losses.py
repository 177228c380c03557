"""The VAE's perceptual loss without LPIPS, and the random shifts before either loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def structural_similarity(x: Tensor, y: Tensor, window: int = 7) -> Tensor:
    """SSIM (Wang et al. 2004) of x and y (N, 1, H, W) in [-1, 1], with uniform windows -> (N,).

    Only windows that lie wholly inside count. Without padding the gradient is deterministic.
    """
    xx, yy, xy = x.square(), y.square(), x * y
    mean_x, mean_y, xx, yy, xy = (F.avg_pool2d(v, window, 1) for v in (x, y, xx, yy, xy))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of a range of 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    spread = xx - mean_x.square() + yy - mean_y.square()
    structure = (2 * (xy - mean_x * mean_y) + c2) / (spread + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def structural_loss(x: Tensor, y: Tensor) -> Tensor:
    """L1 of gradients plus 0.1 (1 - SSIM), of x and y at the scales 1, 1/2 and 1/4 -> (N,).

    x, y: (N, 1, H, W) in [-1, 1]. Keeps edges and texture without a perceptual network. Computed in
    fp32. SSIM counts at scales of 7 pixels and more.
    """
    x, y = x.float(), y.float()
    total = x.new_zeros(x.shape[0])
    for _ in range(3):
        for axis in (2, 3):
            total = total + (x.diff(dim=axis) - y.diff(dim=axis)).abs().mean(dim=(1, 2, 3))
        if min(x.shape[2:]) >= 7:
            total = total + 0.1 * (1 - structural_similarity(x, y))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return total


def reconstruction_loss(
    mean: Tensor,
    drawn: Tensor,
    x: Tensor,
    offsets: Tensor,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    weight: float = 0.0,
    margin: int = 3,
) -> Tensor:
    """L1 of a decoded mean, and `weight` times the perceptual loss of what is drawn from it, (N,).

    mean, drawn and the slices x: (N, 1, H, W) in [-1, 1]. The perceptual loss looks at both from
    offsets (N, 2) in [0, 1) of `margin` pixels: see `view_at`.
    """
    loss = (mean - x).abs().mean(dim=(1, 2, 3))
    if perceptual is None:
        return loss
    drawn, x = (view_at(images, offsets, margin) for images in (drawn, x))
    return loss + weight * perceptual(drawn, x)


def view_at(x: Tensor, uniform: Tensor, margin: int) -> Tensor:
    """Slices x (N, C, H, W), moved up and left by 0 to `margin` pixels.

    uniform (N, 2) in [0, 1) says how far. The free border becomes air, -1. LPIPS's network samples
    on a grid of 4 pixels. Without random shifts it would teach a pattern on that grid.
    """
    height, width = x.shape[2:]
    x = F.pad(x, (0, margin, 0, margin), value=-1.0)
    offsets = (uniform * (margin + 1)).long().tolist()
    return torch.stack(
        [v[:, i : i + height, j : j + width] for v, (i, j) in zip(x, offsets, strict=True)]
    )
