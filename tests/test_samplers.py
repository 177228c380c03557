"""The samplers with exact denoisers, where the answer is known, and guidance in closed form."""

import diffusers
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fibldm.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, guide, transitions
from fibldm.scheduler import CLEAN, SPACINGS, CosineScheduler, Denoiser

SCHEDULER = CosineScheduler()
MIXTURE = (0.3, -1.0, 0.15), (0.7, 0.6, 0.1)  # weight, mean, SD
COUNT = 20_000


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantiles() -> Tensor:
    """The quantiles of a standard normal, (COUNT, 1, 1, 1): a sample without chance in it."""
    levels = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    return torch.special.ndtri(levels).float().view(-1, 1, 1, 1)


def step_noise(shape: torch.Size, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return lambda k: torch.randn(shape, generator=generator)


def mixture_denoiser(*components: tuple[float, float, float]) -> Denoiser:
    """The exact denoiser of a Gaussian mixture: E[x0 | x_t] in closed form, as v."""
    weight, mean, sd = torch.tensor(components).T

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = SCHEDULER.alpha[t[0]], SCHEDULER.sigma[t[0]]
        variance = alpha**2 * sd**2 + sigma**2
        off = x - alpha * mean  # (N, 1, 1, components)
        log_density = weight.log() - 0.5 * off**2 / variance - 0.5 * variance.log()
        x0 = mean + alpha * sd**2 / variance * off
        x0 = (log_density.softmax(dim=-1) * x0).sum(dim=-1, keepdim=True)
        return SCHEDULER.v_from_x0(x, x0, t)

    return denoiser


def exact_quantiles() -> np.ndarray:
    """The mixture's quantiles: its distribution function inverted on a fine grid."""
    grid = np.linspace(-2.5, 1.5, 200_001)
    cdf = sum(w * stats.norm.cdf(grid, m, s) for w, m, s in MIXTURE)
    return np.interp((np.arange(COUNT) + 0.5) / COUNT, cdf, grid)


def distance(samples: Tensor) -> float:
    """Wasserstein distance to the mixture."""
    return float(np.abs(np.sort(samples.flatten().double().numpy()) - exact_quantiles()).mean())


def mixture_samples(sampler, steps: int, spacing: str = "logsnr") -> Tensor:
    timesteps = SCHEDULER.timesteps(steps, spacing)
    return sampler(mixture_denoiser(*MIXTURE), SCHEDULER, quantiles(), timesteps)


def test_transitions_end_clean():
    assert list(transitions([999, 500, 3])) == [(999, 500), (500, 3), (3, CLEAN)]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 1000])
def test_an_exact_oracle_gives_x0(name, spacing, steps):
    x0, x = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1)

    def oracle(x_t: Tensor, t: Tensor) -> Tensor:
        return SCHEDULER.v_from_x0(x_t, x0, t)

    result = SAMPLERS[name](
        oracle, SCHEDULER, x, SCHEDULER.timesteps(steps, spacing), step_noise(x.shape)
    )
    torch.testing.assert_close(result, x0, atol=1e-4, rtol=0)


def test_dpmpp_2m_gets_the_mixture_in_20_steps():
    samples = mixture_samples(dpmpp_2m, 20).flatten()
    (weight, low_mean, low_sd), (_, high_mean, high_sd) = MIXTURE
    low = samples < -0.25
    assert float(low.float().mean()) == pytest.approx(weight, abs=0.002)
    assert float(samples[low].mean()) == pytest.approx(low_mean, abs=0.01)
    assert float(samples[~low].mean()) == pytest.approx(high_mean, abs=0.01)
    assert float(samples[low].std()) == pytest.approx(low_sd, abs=0.01)
    assert float(samples[~low].std()) == pytest.approx(high_sd, abs=0.01)


def test_steps_even_in_log_snr_beat_steps_even_in_t():
    assert distance(mixture_samples(dpmpp_2m, 20)) < 0.5 * distance(
        mixture_samples(dpmpp_2m, 20, "trailing")
    )


@pytest.mark.parametrize("steps", [10, 20, 40])
def test_second_order_beats_first_order(steps):
    assert distance(mixture_samples(dpmpp_2m, steps)) < 0.5 * distance(mixture_samples(ddim, steps))


@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
def test_more_steps_are_closer(sampler):
    distances = [distance(mixture_samples(sampler, steps)) for steps in (5, 20, 200)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.01


def test_ddpm_draws_a_gaussian():
    x = normal(COUNT, 1, 1, 1)
    samples = ddpm(
        mixture_denoiser((1.0, 0.7, 0.3)),
        SCHEDULER,
        x,
        SCHEDULER.timesteps(1000),
        step_noise(x.shape),
    ).flatten()
    assert float(samples.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(samples.std()) == pytest.approx(0.3, abs=0.01)
    assert stats.kstest(samples.numpy(), stats.norm(0.7, 0.3).cdf).pvalue > 1e-3


def test_ddpm_draws_anew_and_the_others_do_not():
    x, steps = quantiles()[::1000], SCHEDULER.timesteps(10)
    denoiser = mixture_denoiser(*MIXTURE)
    for name, sampler in SAMPLERS.items():
        a, b = (sampler(denoiser, SCHEDULER, x, steps, step_noise(x.shape, s)) for s in (1, 2))
        assert torch.equal(a, b) == (name != "ddpm"), name


def test_ddpm_asks_for_the_noise_of_each_step_but_the_last():
    asked = []

    def noise(k: int) -> Tensor:
        asked.append(k)
        return torch.zeros(1, 1, 1, 1)

    ddpm(mixture_denoiser(*MIXTURE), SCHEDULER, torch.zeros(1, 1, 1, 1), [999, 500, 100], noise)
    assert asked == [0, 1]


def test_ddpm_without_noise_is_refused():
    with pytest.raises(ValueError, match="noise"):
        ddpm(mixture_denoiser(*MIXTURE), SCHEDULER, quantiles()[:2], [999])


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_is_diffusers_step_by_step(steps):
    theirs = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    theirs.set_timesteps(steps)
    timesteps = SCHEDULER.timesteps(steps, "trailing")
    assert theirs.timesteps.tolist() == timesteps

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(2 * x) - x.roll(1, dims=-1) * t.view(-1, 1, 1, 1) / 1000

    seen = []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return model(x, t)

    x = normal(2, 3, 4, 4)
    ours = ddim(recorded, SCHEDULER, x, timesteps)
    for t, mine in zip(timesteps, [*seen[1:], ours], strict=True):
        v = model(x, torch.full((2,), t))
        x = theirs.step(v, t, x).prev_sample
        torch.testing.assert_close(mine, x, atol=2e-3, rtol=0)


def constant(value: float) -> Denoiser:
    return lambda x, t: torch.full_like(x, value)


def guided_by(conditional: Denoiser, unconditional: Denoiser, *how, **more) -> Denoiser:
    both = lambda x, t: (conditional(x, t), unconditional(x, t))  # noqa: E731
    return guide(conditional, both, SCHEDULER, *how, **more)


def test_guidance_of_scale_1_is_the_conditional_denoiser():
    conditional = constant(3.0)

    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the unconditional denoiser costs time here and adds nothing")

    assert guide(conditional, never, SCHEDULER, 1.0) is conditional


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1.5, 4.0), (4.0, 9.0)])
def test_guidance_in_closed_form(scale, expected):
    guided = guided_by(constant(3.0), constant(1.0), scale)
    v = guided(torch.zeros(2, 1, 2, 2), torch.tensor([400, 400]))
    torch.testing.assert_close(v, torch.full((2, 1, 2, 2), expected))


@pytest.mark.parametrize(
    ("t", "acts"), [(999, False), (801, False), (800, True), (500, True), (200, True), (199, False)]
)
def test_guidance_acts_within_its_interval(t, acts):
    guided = guided_by(constant(3.0), constant(1.0), 2.0, interval=(0.2, 0.8))
    v = guided(torch.zeros(1, 1, 1, 1), torch.tensor([t]))
    assert float(v) == (5.0 if acts else 3.0)


def test_rescale_pulls_back_to_the_conditional_standard_deviation():
    x, t = normal(4, 2, 8, 8), torch.full((4,), 600)
    target, other = normal(4, 2, 8, 8, seed=1), 0.2 * normal(4, 2, 8, 8, seed=2)

    def towards(x0: Tensor) -> Denoiser:
        return lambda x, t: SCHEDULER.v_from_x0(x, x0, t)

    def spread(rescale: float) -> Tensor:
        guided = guided_by(towards(target), towards(other), 4.0, rescale=rescale)
        return SCHEDULER.x0_from_v(x, guided(x, t), t).std(dim=(1, 2, 3))

    plain, half, full = spread(0.0), spread(0.5), spread(1.0)
    wanted = target.std(dim=(1, 2, 3))
    assert (plain > 2 * wanted).all()
    torch.testing.assert_close(full, wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(half, (plain + wanted) / 2, atol=1e-3, rtol=1e-3)


def test_guided_sampling_sharpens_towards_the_condition():
    """Of two Gaussians of one SD, guidance by w has the mean (1 - w) m + w m_c."""
    narrow, wide = mixture_denoiser((1.0, 0.5, 0.5)), mixture_denoiser((1.0, 0.0, 0.5))
    timesteps = SCHEDULER.timesteps(50)
    means = [
        float(dpmpp_2m(guided_by(narrow, wide, w), SCHEDULER, quantiles(), timesteps).mean())
        for w in (0.0, 1.0, 2.0)
    ]
    assert means[0] == pytest.approx(0.0, abs=0.01)
    assert means[1] == pytest.approx(0.5, abs=0.01)
    assert means[2] == pytest.approx(1.0, abs=0.02)
