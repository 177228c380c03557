"""The grain: its spectrum, and the strength that its loss teaches."""

import math

import pytest
import torch
from torch import Tensor

from fibldm.vae import CUTOFF, SLOPE, fine_scale, grain, grain_loss, moved


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def power(x: Tensor) -> tuple[Tensor, Tensor]:
    """Radial power spectrum of x (N, 1, S, S) at 8 frequencies, those in cycles a pixel."""
    size = x.shape[-1]
    at = torch.fft.fftfreq(size)
    radius = torch.hypot(at[:, None], at[None])
    spectrum = torch.fft.fft2(x[:, 0]).abs().square().mean(dim=0) / size**2
    rings = [(radius > (k - 0.5) / 16) & (radius <= (k + 0.5) / 16) for k in range(1, 9)]
    return torch.stack([spectrum[ring].mean() for ring in rings]), torch.arange(1, 9) / 16


@pytest.mark.parametrize("size", [32, 45, 256])
def test_grain_has_variance_1_and_the_spectrum_it_is_said_to_have(size):
    x = grain(normal(64, 1, size, size))
    assert float(x.var()) == pytest.approx(1.0, rel=0.05)
    torch.testing.assert_close(fine_scale(x), x, atol=1e-5, rtol=0)
    found, frequency = power(x)
    assert found[frequency < CUTOFF - 1 / 32].max() < 1e-6
    above = frequency > CUTOFF + 1 / 32
    slope = torch.log(found[above][0] / found[above][-1])
    slope = slope / torch.log(frequency[above][-1] / frequency[above][0])
    assert float(slope) == pytest.approx(SLOPE, abs=0.4)


def test_a_moved_grain_is_as_good_as_another_draw():
    """The same spectrum and no seam, since it is periodic; and it has little to do with itself."""
    field = grain(normal(1, 1, 64, 64))
    uniform = torch.tensor([[0.0, 0.0], [0.5, 0.25], [0.999, 0.1]])
    views = moved(field, uniform)
    assert torch.equal(views[0], field[0]) and views[1, 0, 32, 16] == field[0, 0, 0, 0]
    torch.testing.assert_close(fine_scale(views), views, atol=1e-5, rtol=0)
    assert float((views[0] * views[1]).mean().abs()) < 0.1


def test_grain_loss_is_least_where_decoded_slices_have_the_power_of_the_real_ones():
    """Also where the mean has texture of its own that is not x's: squared error would count it."""
    texture, own = grain(normal(8, 1, 64, 64)), grain(normal(8, 1, 64, 64, seed=1))
    x, mean = 0.1 * texture + 0.5, 0.06 * own - 0.2  # brightness is none of its business
    lacking = 2 * math.log(0.08)  # 0.08^2 = 0.1^2 - 0.06^2

    def at(value: float) -> float:
        return float(grain_loss(mean, torch.full_like(mean, value), x))

    assert at(lacking) < min(at(lacking - 0.3), at(lacking + 0.3))
    drawn = mean + math.exp(0.5 * lacking) * grain(normal(8, 1, 64, 64, seed=2))
    ratio = fine_scale(drawn).var() / fine_scale(x).var()
    assert float(ratio) == pytest.approx(1.0, abs=0.05)


def test_grain_has_the_right_power_in_all_where_the_places_cannot_be_told_apart():
    """One log-variance for faint and strong texture: the best one has the mean of their powers."""
    strength = torch.tensor([0.02, 0.3]).view(2, 1, 1, 1)
    x = strength * grain(normal(2, 1, 64, 64))
    logvar = torch.tensor(-5.0, requires_grad=True)
    optimizer = torch.optim.Adam([logvar], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        grain_loss(torch.zeros_like(x), logvar.expand_as(x), x).backward()
        optimizer.step()
    assert float(logvar.detach().exp()) == pytest.approx(float(x.square().mean()), rel=0.05)


def test_grain_loss_wants_less_where_the_mean_has_more_texture_than_the_slice():
    logvar = torch.full((1, 1, 32, 32), -10.0, requires_grad=True)
    mean = 0.3 * grain(normal(1, 1, 32, 32))
    for x in (torch.zeros(1, 1, 32, 32), 0.1 * mean):
        loss = grain_loss(mean, logvar, x)
        (gradient,) = torch.autograd.grad(loss, logvar)
        assert loss.isfinite() and (gradient > 0).all()


def test_what_is_kept_does_not_lie_on_another_default_device():
    """As where a network's shapes are asked for before it is built."""
    with torch.device("meta"):
        assert grain(torch.zeros(1, 1, 14, 14)).is_meta
    assert torch.isfinite(grain(torch.ones(1, 1, 14, 14))).all()
