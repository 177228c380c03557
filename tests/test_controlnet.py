"""The ControlNet: it starts as identity, trains alone, and steers a U-Net that stays frozen."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fibldm.controlnet import ControlNet, make_denoiser, make_pair
from fibldm.scheduler import CosineScheduler, diffusion_loss
from fibldm.unet import NO_LABEL, UNet, contour_condition

SIZE = 32
TIMES = torch.tensor([10, 700])
SCHEDULER = CosineScheduler()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, so that no zero convolution hides anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def tiny_unet(**options: int) -> UNet:
    """As a trained one is loaded: frozen, with no weight at 0."""
    unet = perturb(UNet(3, 8, channels=(12, 20), blocks=1, **options))
    return unet.requires_grad_(False).eval()


def contours(count: int = 2, channels: int = 1) -> Tensor:
    contour = torch.zeros(count, channels, SIZE, SIZE, dtype=torch.uint8)
    contour[:, :, 8:16, 8:-3] = 1
    contour[1:, :, 20:30, 2:9] = 1
    return contour


def steered(unet, control, x, t, contour, label=None) -> Tensor:
    """Written out as the training script has it."""
    condition = contour_condition(contour, unet.config["latent_size"])
    return unet(x, t, condition, label, control(x, t, contour, condition, label))


def train(unet: UNet, control: ControlNet, steps: int, label: Tensor | None = None) -> None:
    optimizer = torch.optim.SGD(control.parameters(), lr=0.1)
    x0, noise, contour = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1), contours()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = diffusion_loss(
            lambda x, t: steered(unet, control, x, t, contour, label),
            SCHEDULER, x0, TIMES, noise,
        )  # fmt: skip
        loss.mean().backward()
        assert [name for name, p in control.named_parameters() if p.grad is None] == []
        optimizer.step()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("num_classes", [0, 2])
def test_starts_as_the_plain_unet_to_the_bit(num_classes):
    unet, x, contour = tiny_unet(num_classes=num_classes), normal(2, 3, 8, 8), contours()
    label = torch.tensor([1, NO_LABEL])
    plain = unet(x, TIMES, contour_condition(contour, 8), label)
    assert torch.equal(steered(unet, ControlNet(unet, SIZE), x, TIMES, contour, label), plain)
    assert torch.equal(make_denoiser(unet, ControlNet(unet, SIZE), contour, label)(x, TIMES), plain)
    assert plain.abs().mean() > 1e-3


def test_its_encoder_is_a_copy_of_the_unets():
    unet = tiny_unet()
    control = ControlNet(unet, SIZE)
    assert all(torch.equal(v, bits(unet.encoder)[n]) for n, v in bits(control.encoder).items())
    ours = {p.data_ptr() for p in unet.parameters()}
    assert not any(p.data_ptr() in ours for p in control.parameters())
    assert all(p.requires_grad for p in control.parameters())
    assert not any(p.requires_grad for p in unet.parameters())


def test_it_drops_out_as_the_unet_was_trained_and_the_frozen_unet_does_not():
    unet = perturb(UNet(3, 8, channels=(12, 20), blocks=1, dropout=0.5)).eval()
    control, x, contour = perturb(ControlNet(unet, SIZE), seed=1), normal(2, 3, 8, 8), contours()
    assert not torch.equal(control(x, TIMES, contour)[0], control(x, TIMES, contour)[0])
    assert torch.equal(unet(x, TIMES), unet(x, TIMES))


def test_two_steps_move_it_and_not_the_unet():
    torch.manual_seed(0)
    unet = tiny_unet()
    control = ControlNet(unet, SIZE)
    before, unet_before = bits(control), bits(unet)
    x, contour = normal(2, 3, 8, 8), contours()
    plain = unet(x, TIMES, contour_condition(contour, 8))
    train(unet, control, 2)
    assert all(torch.equal(value, unet_before[name]) for name, value in bits(unet).items())
    assert all(p.grad is None for p in unet.parameters())
    for part in ("zero_convs", "encoder"):
        moved = [n for n, v in bits(control).items() if not torch.equal(v, before[n])]
        assert any(name.startswith(part) for name in moved)
    assert not torch.allclose(steered(unet, control, x, TIMES, contour), plain, atol=1e-5)


@pytest.mark.parametrize("num_classes", [0, 2])
def test_every_parameter_is_trained(num_classes):
    torch.manual_seed(0)
    unet = tiny_unet(num_classes=num_classes)
    control = ControlNet(unet, SIZE)
    train(unet, control, 4, torch.tensor([1, NO_LABEL]))
    idle = [name for name, p in control.named_parameters() if not (p.grad != 0).any()]
    assert idle == []


def test_learns_what_the_unet_cannot_see():
    """Two contours that are equal at the latent's size: only the full resolution tells them."""
    torch.manual_seed(0)
    unet = tiny_unet()
    control = ControlNet(unet, SIZE)
    contour = torch.zeros(2, 1, SIZE, SIZE)
    contour[0, :, ::2], contour[1, :, 1::2] = 1, 1
    condition = contour_condition(contour, 8)
    assert torch.equal(condition[0], condition[1])

    x = normal(1, 3, 8, 8).expand(2, -1, -1, -1)
    t = torch.tensor([500, 500])
    target = unet(x, t, condition) + torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    optimizer = torch.optim.AdamW(control.parameters(), lr=1e-2)
    for _ in range(80):
        loss = (steered(unet, control, x, t, contour) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25  # 1 for a model that cannot tell them apart


@pytest.mark.parametrize("num_classes", [0, 2])
def test_embedding_once_equals_embedding_each_time(num_classes):
    unet, contour = tiny_unet(num_classes=num_classes), contours()
    control = perturb(ControlNet(unet, SIZE), seed=1)
    label = torch.tensor([1, NO_LABEL])
    calls = []
    control.hint.register_forward_hook(lambda *_: calls.append(1))
    denoiser = make_denoiser(unet, control, contour, label)
    results = [
        (denoiser(x, t), x, t)
        for x, t in ((normal(2, 3, 8, 8, seed=s), TIMES + s) for s in range(3))
    ]
    assert len(calls) == 1
    for v, x, t in results:
        assert torch.equal(v, steered(unet, control, x, t, contour, label))


def test_a_denoiser_without_controlnet_or_contour_is_the_unet():
    unet, x = tiny_unet(num_classes=2), normal(2, 3, 8, 8)
    control, label = perturb(ControlNet(unet, SIZE), seed=1), torch.tensor([1, 0])
    assert torch.equal(make_denoiser(unet)(x, TIMES), unet(x, TIMES))
    assert torch.equal(
        make_denoiser(unet, None, None, label)(x, TIMES), unet(x, TIMES, None, label)
    )
    assert torch.equal(make_denoiser(unet, control)(x, TIMES), unet(x, TIMES))
    condition = contour_condition(contours(), 8)
    assert torch.equal(make_denoiser(unet, None, contours())(x, TIMES), unet(x, TIMES, condition))


@pytest.mark.parametrize("label", [None, torch.tensor([1, NO_LABEL]), torch.eye(2) * 0.4 + 0.3])
@pytest.mark.parametrize("steered", [True, False])
@pytest.mark.parametrize("contour", [None, contours()])
def test_a_pair_for_guidance_is_two_denoisers_in_one_batch(label, steered, contour):
    unet, x = tiny_unet(num_classes=2), normal(2, 3, 8, 8)
    asked = perturb(ControlNet(unet, SIZE), seed=1) if steered else None, contour, label
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    v, other = make_pair(unet, *asked)(x, TIMES)
    assert len(calls) == 1
    torch.testing.assert_close(v, make_denoiser(unet, *asked)(x, TIMES), atol=1e-5, rtol=0)
    torch.testing.assert_close(other, make_denoiser(unet)(x, TIMES), atol=1e-5, rtol=0)


def test_the_frozen_encoder_stores_no_graph_and_the_decoder_passes_gradients():
    unet, x, contour = tiny_unet(), normal(2, 3, 8, 8), contours()
    features, emb = unet.encoder(x, TIMES, contour_condition(contour, 8))
    assert not emb.requires_grad and not any(f.requires_grad for f in features)
    control = ControlNet(unet, SIZE)
    steered(unet, control, x, TIMES, contour).square().mean().backward()
    assert all((conv.weight.grad != 0).any() for conv in control.zero_convs)


@pytest.mark.parametrize(("latent_size", "image_size"), [(10, 40), (15, 45), (8, 8)])
def test_odd_sizes(latent_size, image_size):
    unet = perturb(UNet(2, latent_size, 2, channels=(6, 10), blocks=1)).requires_grad_(False)
    control = ControlNet(unet, image_size)
    contour = torch.ones(2, 2, image_size, image_size)
    x = normal(2, 2, latent_size, latent_size)
    plain = unet(x, TIMES, contour_condition(contour, latent_size))
    assert torch.equal(steered(unet, control, x, TIMES, contour), plain)
    assert not torch.equal(steered(unet, perturb(control), x, TIMES, contour), plain)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"30.*8"):
        ControlNet(tiny_unet(), 30)


def test_config_rebuilds_it():
    unet = tiny_unet()
    control = perturb(ControlNet(unet, SIZE))
    other = ControlNet(copy.deepcopy(unet), **control.config)
    other.load_state_dict(control.state_dict())
    x, contour = normal(2, 3, 8, 8), contours()
    expected = steered(unet, control, x, TIMES, contour)
    assert torch.equal(steered(unet, other, x, TIMES, contour), expected)
