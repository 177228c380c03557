"""The noise schedule against closed forms, an exact oracle, and diffusers' schedulers."""

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import scipy
import torch
from scipy import stats
from torch import Tensor

from fibldm.batches import item_uniform
from fibldm.scheduler import CLEAN, SPACINGS, CosineScheduler, diffusion_loss

SCHEDULER = CosineScheduler()
EVERY_T = torch.arange(1000)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def diffusers_scheduler(name: str):
    return getattr(diffusers, name)(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )


def test_ends_in_noise_alone_and_starts_almost_clean():
    assert SCHEDULER.alpha[999] == 0 and SCHEDULER.sigma[999] == 1
    assert SCHEDULER.alpha[CLEAN] == 1 and SCHEDULER.sigma[CLEAN] == 0
    assert 0 < SCHEDULER.sigma[0] < 0.01
    assert (SCHEDULER.alpha[:1000].diff() < 0).all()
    x0, noise = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1)
    assert torch.equal(SCHEDULER.add_noise(x0, noise, torch.tensor([999, 999])), noise)
    assert torch.equal(SCHEDULER.add_noise(x0, noise, torch.tensor([CLEAN, CLEAN])), x0)


@pytest.mark.parametrize("steps", [10, 1000, 4000])
def test_variance_is_preserved(steps):
    scheduler = CosineScheduler(steps)
    power = scheduler.alpha.double() ** 2 + scheduler.sigma.double() ** 2
    torch.testing.assert_close(power, torch.ones_like(power), atol=1e-6, rtol=0)


def test_conversions_invert_each_other():
    x0, noise = normal(1000, 2, 2, 2), normal(1000, 2, 2, 2, seed=1)
    x_t = SCHEDULER.add_noise(x0, noise, EVERY_T)
    v = SCHEDULER.velocity(x0, noise, EVERY_T)
    torch.testing.assert_close(SCHEDULER.x0_from_v(x_t, v, EVERY_T), x0, atol=1e-5, rtol=0)
    back = SCHEDULER.v_from_x0(x_t, x0, EVERY_T)  # divides by sigma, 0.006 at t = 0
    torch.testing.assert_close(back, v, atol=1e-3, rtol=0)


def test_log_snr_is_infinite_at_both_ends():
    for t in (0, 10, 500, 998):
        expected = math.log(float(SCHEDULER.alpha[t] / SCHEDULER.sigma[t]))
        assert SCHEDULER.log_snr(t) == pytest.approx(expected, abs=1e-5)
    assert SCHEDULER.log_snr(999) == -math.inf and SCHEDULER.log_snr(CLEAN) == math.inf


def test_an_exact_oracle_has_no_loss_at_any_timestep():
    x0, noise = normal(1000, 1, 2, 2), normal(1000, 1, 2, 2, seed=1)

    def oracle(x_t: Tensor, t: Tensor) -> Tensor:
        return SCHEDULER.v_from_x0(x_t, x0, t)

    loss = diffusion_loss(oracle, SCHEDULER, x0, EVERY_T, noise)
    assert loss.shape == (1000,)
    assert loss.max() < 1e-6
    exact = SCHEDULER.velocity(x0, noise, EVERY_T)
    assert (diffusion_loss(lambda x, t: exact, SCHEDULER, x0, EVERY_T, noise) == 0).all()


def test_an_error_of_v_counts_alike_at_all_timesteps():
    x0, noise = normal(1000, 1, 2, 2), normal(1000, 1, 2, 2, seed=1)

    def wrong_by_two(x_t: Tensor, t: Tensor) -> Tensor:
        return SCHEDULER.velocity(x0, noise, t) + 2

    loss = diffusion_loss(wrong_by_two, SCHEDULER, x0, EVERY_T, noise)
    torch.testing.assert_close(loss, torch.full((1000,), 4.0), atol=1e-4, rtol=0)


def test_loss_is_fp32_whatever_the_denoiser_gives():
    x0, noise = normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1)
    loss = diffusion_loss(
        lambda x, t: x.to(torch.bfloat16), SCHEDULER, x0, torch.tensor([3, 700]), noise
    )
    assert loss.dtype == torch.float32


def test_training_timesteps_are_logit_normal_and_an_items_own():
    uniform = item_uniform(0, "draws", 5, range(20_000), 1)[:, 0]
    t = SCHEDULER.training_timesteps(uniform)
    assert t.dtype == torch.long
    known = stats.norm.cdf(scipy.special.logit(np.arange(1, 1000) / 1000))
    counts = torch.bincount(t, minlength=1000).numpy()
    found = np.cumsum(counts)[:-1] / len(t)  # the share below 1 / T, 2 / T, ...
    assert np.abs(found - known).max() < 0.014  # Kolmogorov-Smirnov, p = 0.001
    # A rank that has some positions of the batch draws for them what one process would.
    some = item_uniform(0, "draws", 5, range(100, 200), 1)[:, 0]
    assert torch.equal(SCHEDULER.training_timesteps(some), t[100:200])


def test_every_uniform_number_gives_a_timestep():
    ends = torch.tensor([0, 1 - 2**-24])
    low, high = SCHEDULER.training_timesteps(ends).tolist()
    assert low == 0 and 990 < high < 1000


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_of_any_count(spacing):
    for steps in [*range(1, 60), 100, 333, 500, 997, 998, 999, 1000]:
        chosen = SCHEDULER.timesteps(steps, spacing)
        assert len(chosen) == steps
        assert chosen[0] == 999 and chosen[-1] >= 0
        assert all(a > b for a, b in pairwise(chosen))
        assert all(isinstance(t, int) for t in chosen)
    assert SCHEDULER.timesteps(1000, spacing) == list(range(999, -1, -1))


def test_spacings_are_even_in_what_they_say():
    assert SCHEDULER.timesteps(5, "trailing") == [999, 799, 599, 399, 199]
    chosen = SCHEDULER.timesteps(11, "logsnr")[1:]
    widths = torch.tensor([SCHEDULER.log_snr(t) for t in chosen]).diff()
    assert widths.max() < 1.1 * widths.min()
    chosen = SCHEDULER.timesteps(11, "karras")[1:]
    noise = torch.tensor([math.exp(-SCHEDULER.log_snr(t)) for t in chosen])  # sigma / alpha
    widths = (noise ** (1 / 7)).diff()
    assert widths.max() < 0 and widths.min() > 1.1 * widths.max()
    assert SCHEDULER.timesteps(10) == SCHEDULER.timesteps(10, "logsnr")


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_impossible_counts_are_refused(steps, spacing):
    with pytest.raises(ValueError, match=rf"{steps} sampling steps.*1 to 1000"):
        SCHEDULER.timesteps(steps, spacing)


def test_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match=r"'leading'.*logsnr, trailing, karras"):
        SCHEDULER.timesteps(5, "leading")


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_agrees_with_diffusers(name):
    theirs = diffusers_scheduler(name)
    power = SCHEDULER.alpha[:1000] ** 2
    torch.testing.assert_close(power, theirs.alphas_cumprod.float(), atol=2e-5, rtol=0)

    x0, noise = normal(1000, 1, 2, 2), normal(1000, 1, 2, 2, seed=1)
    for ours, other in (
        (SCHEDULER.add_noise, theirs.add_noise),
        (SCHEDULER.velocity, theirs.get_velocity),
    ):
        torch.testing.assert_close(
            ours(x0, noise, EVERY_T), other(x0, noise, EVERY_T), atol=1e-3, rtol=0
        )
