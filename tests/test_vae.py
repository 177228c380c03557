"""The VAE: its sizes, its KL, and the calibration that makes latents standard."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fibldm.texture import Likelihood
from fibldm.vae import LATENT_SCALE, VAE, DiagonalGaussian, reconstruct

ROOT = Path(__file__).parents[1]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, so that no zero convolution hides anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def tiny_vae(image_size: int = 32, latent_size: int = 4, latent_dim: int = 3) -> VAE:
    torch.manual_seed(0)
    return perturb(VAE(image_size, latent_size, latent_dim, base_channels=6, blocks=1)).eval()


def slices(count: int = 6, size: int = 32) -> Tensor:
    """Smooth, so that the latents differ over the slice and between slices."""
    coarse = normal(count, 1, 4, 4)
    return nn.functional.interpolate(coarse, size, mode="bilinear").clamp(-1, 1)


def moments(vae: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    mean = vae.encode(x).mean.double()
    mean, std = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3), correction=0)
    return mean.float(), std.float()


def assert_standard(latents: Tensor) -> None:
    mean, variance = latents.mean(dim=(0, 2, 3)), latents.var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(variance, torch.ones_like(mean), atol=1e-3, rtol=0)


@torch.no_grad()
def test_calibration_makes_latents_standard_and_changes_no_reconstruction():
    vae, x = tiny_vae(), slices()
    before, sampled_before = reconstruct(vae, x), trained_once(vae)[0]
    raw = vae.encode(x).mean * LATENT_SCALE
    assert (raw.var(dim=(0, 2, 3)) - 1).abs().max() > 0.1
    vae.calibrate(*moments(vae, x))
    assert_standard(vae.encode(x).mean * LATENT_SCALE)
    torch.testing.assert_close(reconstruct(vae, x), before, atol=1e-5, rtol=0)
    torch.testing.assert_close(trained_once(vae)[0], sampled_before, atol=1e-4, rtol=0)


@torch.no_grad()
def test_calibrating_again_follows_the_new_data():
    vae, x, other = tiny_vae(), slices(), 0.3 * slices().flip(2) - 0.4
    before = reconstruct(vae, x)
    vae.calibrate(*moments(vae, x))
    gain = vae.latent_gain.clone()
    vae.calibrate(*moments(vae, x))
    torch.testing.assert_close(vae.latent_gain, gain, rtol=1e-3, atol=0)
    vae.calibrate(*moments(vae, other))
    assert_standard(vae.encode(other).mean * LATENT_SCALE)
    torch.testing.assert_close(reconstruct(vae, x), before, atol=1e-4, rtol=0)


@torch.no_grad()
def test_calibration_is_part_of_the_saved_state():
    vae, x = tiny_vae(), slices()
    vae.calibrate(*moments(vae, x))
    other = VAE(**vae.config).eval()
    other.load_state_dict(vae.state_dict())
    latent, posterior = vae.encode(x).mean, other.encode(x)
    assert torch.equal(posterior.mean, latent)
    assert torch.equal(other.decode(latent), vae.decode(latent))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (float("nan"), 1.0), (0.0, float("nan"))])
def test_a_collapsed_channel_is_refused(mean, std):
    vae = tiny_vae()
    before = vae.latent_gain.clone(), vae.latent_shift.clone()
    with pytest.raises(ValueError, match=r"collapsed.*--kl_weight"):
        vae.calibrate(torch.tensor([0.1, mean, 0.2]), torch.tensor([1.0, std, 2.0]))
    assert torch.equal(vae.latent_gain, before[0]) and torch.equal(vae.latent_shift, before[1])


@pytest.mark.parametrize(
    ("image_size", "latent_size"), [(96, 16), (60, 4), (64, 64), (45, 15), (256, 16), (64, 1)]
)
def test_any_sizes_that_divide(image_size, latent_size):
    vae, x = tiny_vae(image_size, latent_size), slices(2, image_size)
    posterior = vae.encode(x)
    assert posterior.mean.shape == (2, 3, latent_size, latent_size)
    recon = vae.decode(posterior.mean)
    assert recon.shape == x.shape and recon.dtype == torch.float32
    assert not torch.equal(recon[0], recon[1])


def test_the_untrained_vae_is_a_truncated_cosine_transform():
    """Of the frequencies it has channels for, all come back; of others, nothing."""
    from scipy.fft import idctn

    vae = VAE(32, 4, 6, base_channels=8, blocks=1)
    for frequency, kept in (((0, 0), True), ((1, 1), True), ((0, 2), True), ((3, 4), False)):
        coefficients = torch.zeros(8, 8)
        coefficients[frequency] = 1.0
        patch = torch.from_numpy(idctn(coefficients.numpy(), norm="ortho")).float()
        x = patch.repeat(4, 4)[None, None]
        expected = x if kept else torch.zeros_like(x)
        found = vae.likelihood(vae.encode(x).mean).mean
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_its_latents_start_at_about_unit_scale():
    """On an image whose amplitude falls as 1 / frequency, as natural ones' does."""
    at = torch.fft.fftfreq(256) * 256
    radius = torch.hypot(at[:, None], at[None]).clamp(min=1)
    noise = torch.fft.fft2(normal(8, 1, 256, 256))
    x = torch.fft.ifft2(noise / radius).real
    x = 0.5 * x / x.std()  # as of CT in [-1, 1]
    std = VAE(base_channels=8).encode(x).mean.std(dim=(0, 2, 3))
    assert (std > 0.2).all() and (std < 2).all()


@pytest.mark.parametrize("base_channels", [5, 100])
def test_any_width(base_channels):
    vae = VAE(32, 4, 3, base_channels, blocks=1)
    assert vae.decode(vae.encode(slices(1)).mean).shape == (1, 1, 32, 32)


@pytest.mark.parametrize(("image_size", "latent_size"), [(100, 16), (16, 32), (64, 0)])
def test_sizes_that_do_not_divide_are_refused_with_both(image_size, latent_size):
    with pytest.raises(ValueError, match=rf"image size {image_size}.*latent size {latent_size}"):
        VAE(image_size, latent_size)


@pytest.mark.parametrize("shape", [(1, 1, 32, 40), (1, 1, 16, 16), (1, 3, 32, 32)])
def test_slices_of_another_size_are_refused_with_both(shape):
    with pytest.raises(ValueError, match=rf"\(N, 1, 32, 32\), found \(1, {shape[1]}, {shape[2]}"):
        tiny_vae().encode(torch.zeros(shape))


def test_kl_is_that_of_torch_distributions():
    mean, logvar = normal(4, 3, 5, 5), 2 * normal(4, 3, 5, 5, seed=1)
    q = Normal(mean, torch.exp(0.5 * logvar))
    expected = kl_divergence(q, Normal(torch.zeros(1), torch.ones(1))).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected)
    assert DiagonalGaussian(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).kl() == 0


def test_posterior_samples_have_its_mean_and_variance():
    posterior = DiagonalGaussian(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -2.0))
    z = posterior.sample(normal(100_000, 1, 1, 1))
    assert float(z.mean()) == pytest.approx(2.0, abs=0.01)
    assert float(z.var().log()) == pytest.approx(-2.0, abs=0.02)
    assert torch.equal(posterior.sample(torch.zeros(1, 1, 1, 1)), posterior.mean)


def trained_once(vae: VAE) -> tuple[Tensor, DiagonalGaussian, Tensor]:
    """What training gets of two slices."""
    return vae(slices(), normal(6, 3, 4, 4), normal(6, 1, 32, 32), torch.linspace(0.1, 1.5, 6))


def test_texture_teaches_the_latents_and_the_features_but_not_the_mean():
    vae = tiny_vae().train()
    trained_once(vae)[2].sum().backward()
    taught = {name for name, p in vae.named_parameters() if p.grad is not None}
    untaught = {name for name, _ in vae.named_parameters()} - taught
    assert {name.rsplit(".", 1)[0] for name in untaught} == {
        *("decoder.shortcut.0", "decoder.mean.0", "decoder.mean.2")
    }


@torch.no_grad()
def test_decoding_draws_texture_from_the_noise_given():
    vae, z, noise = tiny_vae(), normal(2, 3, 4, 4), normal(2, 1, 32, 32, seed=3)
    torch.testing.assert_close(vae.decode(z, noise), vae.draw(vae.likelihood(z), noise))
    assert torch.equal(vae.decode(z), vae.decode(z))
    assert not torch.equal(vae.decode(z), vae.decode(z, noise))
    together, alone = vae.decode(z, noise), vae.decode(z[1:], noise[1:])
    torch.testing.assert_close(together[1:], alone)
    mean = vae.likelihood(z).mean
    vae.texture.logvar[2].bias.fill_(-100.0)
    assert 0 < float((vae.decode(z, noise) - mean).abs().max()) < 0.01  # the least there is


class Fixed(nn.Module):
    """Stands in for an encoder or a decoder: the same value everywhere."""

    def __init__(self, value: float, *shape: int) -> None:
        super().__init__()
        self.value, self.shape = value, shape

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((x.shape[0], *self.shape), self.value)


class FixedSlices(Fixed):
    """A decoder of slices of one value."""

    def forward(self, z: Tensor) -> Likelihood:
        return Likelihood(super().forward(z), torch.zeros(len(z), 6, 8, 8))


def test_log_variance_has_a_floor_and_a_ceiling():
    vae = tiny_vae()
    for value, bound in ((-100.0, -12.0), (100.0, 10.0)):
        vae.encoder = Fixed(value, 6, 4, 4)
        assert (vae.encode(slices()).logvar == bound).all()
        assert (vae.encode(slices()).mean == value).all()


def test_reconstructions_are_clipped():
    vae = tiny_vae()
    for value, expected in ((50.0, 1.0), (-50.0, -1.0), (0.5, 0.5)):
        vae.decoder = FixedSlices(value, 1, 32, 32)
        torch.nn.init.constant_(vae.texture.logvar[2].bias, -100.0)  # hardly any texture
        with torch.no_grad():
            assert float((reconstruct(vae, slices()) - expected).abs().max()) < 0.02


def test_every_parameter_is_trained():
    vae = tiny_vae().train()
    mean, posterior, texture = trained_once(vae)
    (mean.square().mean() + texture.mean() + posterior.kl()).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None] == []
    assert [name for name, p in vae.named_parameters() if not (p.grad != 0).any()] == []


def test_the_latent_scale_is_written_once():
    files = [*ROOT.glob("*.py"), *ROOT.glob("fibldm/**/*.py"), *ROOT.glob("scripts/**/*.py")]
    found = {path.name: path.read_text().count("0.18215") for path in files}
    assert {name: count for name, count in found.items() if count} == {"vae.py": 1}
