"""Samplers: functions that take any denoiser (x_t, t) -> v, and guidance, which makes one of two.

Each starts from x (N, C, h, w), standard normal, walks the descending `timesteps`, and returns x0.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from fibldm.scheduler import CLEAN, CosineScheduler, Denoiser


def transitions(timesteps: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Pairs (from, to) of neighbouring timesteps; the last one ends in CLEAN."""
    steps = [int(t) for t in timesteps]
    yield from zip(steps, [*steps[1:], CLEAN], strict=True)


def predict_x0(denoiser: Denoiser, scheduler: CosineScheduler, x: Tensor, t: int) -> Tensor:
    """The denoiser's estimate of x0 at timestep t, for the whole batch."""
    times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
    return scheduler.x0_from_v(x, denoiser(x, times), t)


def ddpm(
    denoiser: Denoiser,
    scheduler: CosineScheduler,
    x: Tensor,
    timesteps: Iterable[int],
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020): draws from q(x_s | x_t, x0) with x0 predicted.

    `noise(k)` gives the k-th step's standard normal noise, shaped like x.
    """
    if noise is None:
        raise ValueError("ddpm draws noise at each step: pass `noise`, a function of the step")
    for k, (t, s) in enumerate(transitions(timesteps)):
        x0 = predict_x0(denoiser, scheduler, x, t)
        (alpha, sigma), (alpha_s, sigma_s) = map(scheduler.alpha_sigma, (t, s))
        ratio, keep = alpha / alpha_s, sigma_s**2 / sigma**2
        fresh = max(0.0, 1 - ratio**2 * keep)  # sigma_{t|s}^2 / sigma_t^2, in closed form
        x = alpha_s * fresh * x0 + ratio * keep * x
        if s != CLEAN:
            x = x + sigma_s * math.sqrt(fresh) * noise(k)
    return x


def ddim(
    denoiser: Denoiser,
    scheduler: CosineScheduler,
    x: Tensor,
    timesteps: Iterable[int],
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, arXiv 2010.02502); `noise` is not used."""
    for t, s in transitions(timesteps):
        x0 = predict_x0(denoiser, scheduler, x, t)
        (alpha, sigma), (alpha_s, sigma_s) = map(scheduler.alpha_sigma, (t, s))
        x = alpha_s * x0 + sigma_s / sigma * (x - alpha * x0)
    return x


def dpmpp_2m(
    denoiser: Denoiser,
    scheduler: CosineScheduler,
    x: Tensor,
    timesteps: Iterable[int],
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095); `noise` is not used.

    Second order in log-SNR. The first and the last step, of infinite length, are first order.
    """
    previous, h_previous = None, None
    for t, s in transitions(timesteps):
        x0 = predict_x0(denoiser, scheduler, x, t)
        h = scheduler.log_snr(s) - scheduler.log_snr(t)
        if previous is None or s == CLEAN:
            estimate = x0
        else:
            estimate = x0 + (x0 - previous) * (h / (2 * h_previous))  # 0 after an infinite step
        (_, sigma), (alpha_s, sigma_s) = map(scheduler.alpha_sigma, (t, s))
        x = sigma_s / sigma * x + alpha_s * -math.expm1(-h) * estimate
        previous, h_previous = x0, h
    return x


SAMPLERS = {"dpmpp_2m": dpmpp_2m, "ddim": ddim, "ddpm": ddpm}


def guide(
    conditional: Denoiser,
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    scheduler: CosineScheduler,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022) as a denoiser; scale 1 is `conditional`.

    both: (x_t, t) -> v as of `conditional`, and the unconditional v. Guidance acts where t / T lies
    within `interval` (Kynkaanniemi et al. 2024, arXiv 2404.07724). `rescale` in [0, 1] pulls the
    guided estimate of x0 back to the standard deviation of the conditional one (arXiv 2305.08891).
    """
    if scale == 1.0:
        return conditional
    return partial(_guided, conditional, both, scheduler, scale, tuple(interval), rescale)


def _guided(conditional, both, scheduler, scale, interval, rescale, x, t):
    low, high = interval
    # Where it always acts, a GPU need not be asked for t.
    if interval != (0.0, 1.0) and not low <= float(t[0]) / scheduler.num_timesteps <= high:
        return conditional(x, t)
    v, other = both(x, t)
    guided = other + scale * (v - other)
    if rescale == 0.0:
        return guided
    x0, x0_guided = (scheduler.x0_from_v(x, value, t) for value in (v, guided))
    std, std_guided = (value.std(dim=(1, 2, 3), keepdim=True) for value in (x0, x0_guided))
    factor = rescale * std / std_guided.clamp(min=1e-6) + (1 - rescale)
    return scheduler.v_from_x0(x, x0_guided * factor, t)
