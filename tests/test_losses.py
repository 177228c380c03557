"""The VAE's losses against closed forms."""

import pytest
import torch
from skimage.metrics import structural_similarity as skimage_ssim

from fibldm.losses import (
    structural_loss,
    structural_similarity,
    view_at,
)


def test_structural_similarity_is_that_of_skimage():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 40, 48, generator=generator) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    for a, b, found in zip(x, y, structural_similarity(x, y), strict=True):
        a, b = a[0].double().numpy(), b[0].double().numpy()
        known = skimage_ssim(a, b, win_size=7, data_range=2, use_sample_covariance=False)
        assert float(found) == pytest.approx(known, abs=1e-4)


def test_structural_loss_is_0_for_equal_slices_and_the_same_under_autocast():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 32, 32, generator=generator) * 2 - 1
    y = x + 0.05 * torch.randn(x.shape, generator=generator)
    torch.testing.assert_close(structural_loss(x, x), torch.zeros(2), atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = structural_loss(x, y)
    assert torch.equal(half, structural_loss(x, y))


def test_structural_loss_sees_edges_and_hardly_brightness():
    x = torch.zeros(2, 1, 16, 16)
    stripes = x.clone()
    stripes[0, :, :, ::2] = 1.0
    loss = structural_loss(stripes, x)
    # |difference| 1 along one axis, which pooling removes, and 0.1 (1 - SSIM) at two scales.
    assert 1.0 < loss[0] < 1.2 and abs(float(loss[1])) < 1e-6
    assert structural_loss(x, x + 0.1)[0] < 0.2 * loss[0]


def test_structural_loss_tells_blur_from_noise_free_copies_at_equal_error():
    """L1 alone can't: the same error spread evenly, or at the texture's frequency."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(1, 1, 64, 64, generator=generator)
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    shifted = x + (x - blurred).abs().mean()
    assert (x - shifted).abs().mean() == pytest.approx(float((x - blurred).abs().mean()), rel=1e-4)
    assert structural_loss(x, blurred) > 3 * structural_loss(x, shifted)


def test_structural_loss_has_finite_gradients_also_for_equal_flat_images():
    x = torch.full((2, 1, 24, 24), -1.0, requires_grad=True)
    structural_loss(x, torch.full((2, 1, 24, 24), -1.0)).sum().backward()
    assert x.grad.isfinite().all()


def test_views_are_at_each_slices_own_offset_and_keep_its_size():
    x = torch.arange(2 * 36.0).view(2, 1, 6, 6).requires_grad_()
    views = view_at(x, torch.tensor([[0.0, 0.99], [0.5, 0.3]]), 3)
    assert torch.equal(views[0, :, :, :3], x[0, :, :, 3:]) and (views[0, :, :, 3:] == -1).all()
    assert torch.equal(views[1, :, :4, :5], x[1, :, 2:, 1:])
    views.sum().backward()
    assert x.grad.sum() == 6 * 3 + 4 * 5
    uniform = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    corners = view_at(x.detach()[:1].expand(200, 1, 6, 6), uniform, 3)[:, 0, 0, 0]
    assert len(corners.unique()) == 16
