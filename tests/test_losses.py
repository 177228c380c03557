"""The VAE's losses against closed forms."""

import pytest
import torch

from fibldm.losses import PatchDiscriminator, adaptive_weight, discriminator_loss, gradient_loss


def test_gradient_loss_sees_edges_and_not_brightness():
    x = torch.zeros(2, 1, 16, 16)
    assert torch.equal(gradient_loss(x, x), torch.zeros(2))
    assert torch.allclose(gradient_loss(x, x + 0.5), torch.zeros(2), atol=1e-6)
    stripes = x.clone()
    stripes[0, :, :, ::2] = 1.0
    loss = gradient_loss(stripes, x)
    assert loss[0] == pytest.approx(1.0)  # |difference| 1 along one axis; pooling removes the rest
    assert loss[1] == 0


def test_hinge_loss():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss(real, fake) == pytest.approx(0.5 * ((0 + 1) / 2 + (0 + 1.5) / 2))


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    found = adaptive_weight((3 * weight).sum(), (0.5 * weight).sum(), weight)
    assert found == pytest.approx(6.0, rel=1e-4)
    assert not found.requires_grad


def test_adaptive_weight_after_an_fp16_overflow_is_0():
    """The scaler skips such a step; the weight must not make the logged loss NaN."""
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    huge = torch.tensor(float("inf"))
    assert adaptive_weight((huge * weight).sum(), (huge * weight).sum(), weight) == 0


def test_discriminator_judges_patches_and_each_slice_alone():
    torch.manual_seed(0)
    net, x = PatchDiscriminator(8), torch.randn(3, 1, 64, 64)
    assert net(x).shape == (3, 1, 8, 8)
    assert torch.allclose(net(x)[1:2], net(x[1:2]), atol=1e-5)
