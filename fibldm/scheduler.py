"""The noise schedule: cosine (Nichol & Dhariwal 2021, arXiv 2102.09672) with zero terminal SNR
(Lin et al. 2023, arXiv 2305.08891), v-prediction, and the loss that trains a denoiser.

x_t = alpha_t x0 + sigma_t noise, alpha_t^2 + sigma_t^2 = 1, v = alpha_t noise - sigma_t x0.
A denoiser is any function (x_t, t) -> v, with x_t (N, C, h, w) and t (N,) of integers.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
SPACINGS = ("logsnr", "trailing", "karras")
KARRAS_RHO = 7.0
CLEAN = -1  # the "timestep" of data without noise


class CosineScheduler:
    """Tables of alpha and sigma over timesteps 0 (almost clean) to T - 1 (noise alone), fp32."""

    def __init__(self, num_timesteps: int = 1000, device: torch.device | str = "cpu") -> None:
        self.num_timesteps = num_timesteps
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        signal = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
        alpha = (1 - betas).cumprod(0).sqrt()

        # Shift and stretch alpha so that it ends at 0 and starts as before (arXiv 2305.08891).
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        sigma = (1 - alpha**2).sqrt()

        # One more entry, found at index CLEAN. What a sampler asks for needs no wait for a GPU.
        alpha = torch.cat([alpha, torch.ones(1)]).float()
        sigma = torch.cat([sigma, torch.zeros(1)]).float()
        self.numbers = list(zip(alpha.tolist(), sigma.tolist(), strict=True))
        self.alpha, self.sigma = alpha.to(device), sigma.to(device)

    def alpha_sigma(self, t: Tensor | int) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """t (N,) -> alpha_t and sigma_t, each (N, 1, 1, 1); of one t for all, two numbers."""
        if isinstance(t, int):
            return self.numbers[t]
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def log_snr(self, t: int) -> float:
        """Half the log of the SNR, log(alpha / sigma): -inf at T - 1, inf at CLEAN."""
        alpha, sigma = self.numbers[t]
        return math.inf if sigma == 0 else -math.inf if alpha == 0 else math.log(alpha / sigma)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of x0 and standard normal noise, both (N, C, h, w), at t (N,)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target v = alpha noise - sigma x0 (Salimans & Ho 2022, arXiv 2202.00512)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * noise - sigma * x0

    def x0_from_v(self, x_t: Tensor, v: Tensor, t: Tensor | int) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_t - sigma * v

    def v_from_x0(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The v that belongs to an estimate of x0; sigma_t must not be 0."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha * x_t - x0) / sigma

    def training_timesteps(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1), (N,) -> timesteps (N,) to train on, t / T logit-normal.

        The middle of the schedule comes most often (Esser et al. 2024, arXiv 2403.03206).
        """
        return (logit_normal(uniform) * self.num_timesteps).long()

    def timesteps(self, steps: int, spacing: str = "logsnr") -> list[int]:
        """Descending timesteps of a sampler, T - 1 first; `steps` of them, all different.

        "trailing" spaces them evenly in t (arXiv 2305.08891), "logsnr" evenly in log-SNR over most
        of the schedule (arXiv 2211.01095), "karras" evenly in (sigma / alpha)^(1/7) over the same
        (Karras et al. 2022, arXiv 2206.00364).
        """
        last = self.num_timesteps - 1
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"{steps} sampling steps; expected 1 to {self.num_timesteps}")
        if spacing not in SPACINGS:
            raise ValueError(f"spacing {spacing!r}; expected one of {', '.join(SPACINGS)}")
        if spacing == "trailing":
            return [round((i + 1) * self.num_timesteps / steps) - 1 for i in reversed(range(steps))]

        # T - 1 has no finite log-SNR; beyond this range steps bring next to nothing.
        alpha, sigma = torch.tensor(self.numbers[:last]).T
        table = torch.log(alpha / sigma)
        if spacing == "karras":
            table = -torch.exp(-table / KARRAS_RHO)
        start, end = table[int(0.95 * last)], table[int(0.008 * last)]
        grid = torch.linspace(float(start), float(end), max(steps - 1, 1))
        chosen = [last]
        for i, value in enumerate(grid[: steps - 1]):
            nearest = int((table - value).abs().argmin())
            remaining = steps - 2 - i  # leave room: timesteps are whole numbers
            chosen.append(max(min(nearest, chosen[-1] - 1), remaining))
        return chosen


def logit_normal(uniform: Tensor) -> Tensor:
    """Numbers in [0, 1), most of them in the middle, of uniform ones: sigmoids of normal ones."""
    return torch.special.ndtri(uniform).sigmoid()


def diffusion_loss(
    denoiser: Denoiser, scheduler: CosineScheduler, x0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of v. What a timestep counts is how often `training_timesteps` draws it.

    x0 and noise (N, C, h, w), t (N,) -> loss of each item (N,), fp32; 0 for an exact denoiser.
    """
    v = denoiser(scheduler.add_noise(x0, noise, t), t)
    return (v.float() - scheduler.velocity(x0, noise, t)).square().mean(dim=(1, 2, 3))
