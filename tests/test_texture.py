"""The texture decoder: what it draws, what it is taught, and by which noise."""

import math

import pytest
import torch
from torch import Tensor

from fibldm.optim import Muon
from fibldm.texture import LOGVAR_RANGE, Likelihood, TextureDecoder, random_angles

SIZE, PATCH, CHANNELS = 32, 4, 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def known(count: int = 3) -> Likelihood:
    """The means of some slices, and features as of a decoder."""
    side = SIZE // PATCH
    return Likelihood(
        0.3 * normal(count, 1, SIZE, SIZE, seed=5), normal(count, CHANNELS, side, side, seed=6)
    )


def decoder() -> TextureDecoder:
    torch.manual_seed(0)
    return TextureDecoder(PATCH, CHANNELS)


class Oracle(TextureDecoder):
    """Knows that the residual is `r` everywhere, of standard deviation `std`."""

    def __init__(self, r: float, std: float) -> None:
        super().__init__(PATCH, CHANNELS)
        self.r, self.level = r, 2 * math.log(std)

    def strength(self, features: Tensor) -> Tensor:
        return torch.full((len(features), 1, SIZE, SIZE), self.level)

    def forward(self, u: Tensor, angle: Tensor, known: Likelihood, logvar: Tensor) -> Tensor:
        cos, sin = torch.cos(angle)[:, None, None, None], torch.sin(angle)[:, None, None, None]
        return cos * (u - cos * self.r) / sin - sin * self.r


def test_the_loss_of_an_exact_oracle_is_that_of_the_strength_alone():
    oracle, p, noise = Oracle(0.5, 0.2), known(), normal(3, 1, SIZE, SIZE)
    found = oracle.loss(p, p.mean + 0.1, noise, torch.tensor([0.1, 0.8, 1.5]))
    expected = 0.5 * (math.log(0.2**2) + (0.1**2 + 1e-6) / 0.2**2)
    torch.testing.assert_close(found, torch.full((3,), expected))


@torch.no_grad()
def test_sampling_goes_to_what_an_oracle_knows():
    oracle, p, noise = Oracle(0.5, 0.2), known(), normal(3, 1, SIZE, SIZE)
    errors = [(oracle.sample(p, noise, steps) - p.mean - 0.1).abs().max() for steps in (2, 20)]
    assert errors[1] < 0.001 < 0.1 < errors[0]


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_an_untrained_decoder_draws_white_noise_of_its_strength(steps):
    """Of few steps as of many: v of white noise is 0."""
    texture, p, noise = decoder(), known(), normal(3, 1, SIZE, SIZE)
    expected = p.mean + torch.exp(0.5 * texture.strength(p.features)) * noise
    torch.testing.assert_close(texture.sample(p, noise, steps), expected)


def test_the_strength_is_taught_to_be_that_of_the_residual():
    """In each place: left and right differ by a factor of 4."""
    texture, p = decoder(), known()
    level = torch.ones(1, 1, SIZE, SIZE)
    level[..., SIZE // 2 :] = 0.25
    p.features[..., : SIZE // PATCH // 2] += 2.0  # what tells them apart
    optimizer = Muon(texture, 0.02)
    for step in range(80):
        x = p.mean + 0.2 * level * normal(3, 1, SIZE, SIZE, seed=100 + step)
        loss = texture.loss(p, x, normal(3, 1, SIZE, SIZE, seed=step), torch.full((3,), 0.8)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = torch.exp(0.5 * texture.strength(p.features)).detach().mean(dim=(0, 1, 2))
    assert float(found[4:12].mean()) == pytest.approx(0.2, rel=0.25)
    assert float(found[20:28].mean()) == pytest.approx(0.05, rel=0.25)


def test_it_learns_texture_that_is_no_noise():
    """Squares of 4x4 pixels that are brighter or darker, at random: samples have such squares."""
    texture, p = decoder(), known(8)
    optimizer = Muon(texture, 0.01)
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        sign = torch.rand(8, 1, SIZE // 4, SIZE // 4, generator=generator).round() * 2 - 1
        x = p.mean + 0.2 * sign.repeat_interleave(4, 2).repeat_interleave(4, 3)
        angles = random_angles(torch.rand(8, generator=generator))
        texture.loss(p, x, normal(8, 1, SIZE, SIZE, seed=step), angles).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        residual = texture.sample(p, normal(8, 1, SIZE, SIZE, seed=9999), 8) - p.mean
    squares = residual.reshape(8, SIZE // 4, 4, SIZE // 4, 4).mean(dim=(2, 4))
    assert float(squares.abs().mean()) > 0.15  # 0.04 in noise of this power
    assert float((squares > 0).float().mean()) == pytest.approx(0.5, abs=0.1)


@torch.no_grad()
def test_a_slice_follows_from_its_own_noise_alone():
    texture, p, noise = decoder(), known(), normal(3, 1, SIZE, SIZE)
    texture.output[-1].weight.normal_(0, 0.1)
    together = texture.sample(p, noise)
    alone = texture.sample(Likelihood(p.mean[1:2], p.features[1:2]), noise[1:2])
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.equal(together, texture.sample(p, noise.flip(0)))


@torch.no_grad()
def test_v_depends_on_all_that_is_known():
    texture, p, u = decoder(), known(), normal(3, 1, SIZE, SIZE)
    for k, weight in enumerate(texture.parameters()):
        weight += 0.1 * normal(*weight.shape, seed=k)  # nothing stays 0
    angle, logvar = torch.full((3,), 0.8), texture.strength(p.features)
    v = texture(u, angle, p, logvar)
    for other in (
        texture(u, angle, p, logvar + 1),
        texture(u, angle + 0.1, p, logvar),
        texture(u, angle, p._replace(mean=p.mean + 1), logvar),
        texture(u, angle, p._replace(features=p.features + 1), logvar),
    ):
        assert float((v - other).abs().mean()) > 1e-3


def test_the_strength_has_a_floor_and_a_ceiling():
    texture = decoder()
    for value, bound in zip((-100.0, 100.0), LOGVAR_RANGE, strict=True):
        torch.nn.init.constant_(texture.logvar[2].bias, value)
        assert (texture.strength(known().features) == bound).all()


def test_angles_are_logit_normal():
    angles = random_angles(torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    assert float(angles.min()) > 0 and float(angles.max()) < math.pi / 2
    logit = torch.logit(angles / (math.pi / 2))
    assert float(logit.mean()) == pytest.approx(0, abs=0.01)
    assert float(logit.std()) == pytest.approx(1, abs=0.01)
    assert random_angles(torch.tensor([0.0, 1.0 - 2**-24])).isfinite().all()
