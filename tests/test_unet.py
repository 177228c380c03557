"""The U-Net: how it starts, what its conditions change, which shapes it takes, what it trains."""

import pytest
import torch
from torch import Tensor, nn

from fibldm.layers import Downsample
from fibldm.scheduler import CosineScheduler, diffusion_loss
from fibldm.unet import NO_LABEL, UNet, contour_condition

TINY = {"latent_dim": 3, "latent_size": 8, "channels": (12, 20), "blocks": 1}
TIMES = torch.tensor([10, 700])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, so that no zero convolution hides anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def contours(count: int = 2, size: int = 32, channels: int = 1) -> Tensor:
    contour = torch.zeros(count, channels, size, size, dtype=torch.uint8)
    contour[:, :, size // 4 : size // 2, size // 4 : -3] = 1
    return contour


def differs(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, atol=1e-4)


def test_predicts_0_until_it_has_learnt():
    unet, x = UNet(**TINY), normal(2, 3, 8, 8)
    assert (unet(x, TIMES) == 0).all()
    v = perturb(unet)(x, TIMES)
    assert v.abs().mean() > 1e-3
    assert v.dtype == torch.float32


def test_depends_on_the_timestep_and_treats_items_alone():
    unet, x = perturb(UNet(**TINY)), normal(2, 3, 8, 8)
    together = unet(x, TIMES)
    assert differs(unet(x, TIMES + 200), together)
    for i in range(2):
        alone = unet(x[i : i + 1], TIMES[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


def test_contour_condition_averages_and_says_that_it_is_there():
    contour = torch.zeros(1, 1, 4, 4)
    contour[..., :2, :2] = 1
    contour[..., 0, 2] = 1
    condition = contour_condition(contour, 2)
    assert torch.equal(condition[0, 0], torch.tensor([[1.0, 0.25], [0.0, 0.0]]))
    assert torch.equal(condition[0, 1], torch.ones(2, 2))


def test_a_withheld_contour_is_not_an_empty_one():
    empty = torch.zeros(2, 1, 32, 32)
    keep = torch.tensor([True, False])
    condition = contour_condition(empty, 8, keep)
    assert differs(condition[0], condition[1])

    unet, x = perturb(UNet(**TINY)), normal(2, 3, 8, 8)
    v = unet(x, TIMES, condition)
    plain = unet(x, TIMES)
    assert differs(v[0], plain[0])
    torch.testing.assert_close(v[1], plain[1])
    assert differs(unet(x, TIMES, contour_condition(contours(), 8))[0], v[0])


def test_each_contour_channel_counts():
    unet, x = perturb(UNet(**TINY, contour_channels=2)), normal(2, 3, 8, 8)
    one, other = contours(channels=2), contours(channels=2)
    one[:, 1], other[:, 0] = 0, 0
    a, b = (unet(x, TIMES, contour_condition(c, 8)) for c in (one, other))
    assert differs(a, b)


def test_labels_count_where_there_are_classes():
    unet, x = perturb(UNet(**TINY, num_classes=3)), normal(2, 3, 8, 8)
    outputs = [unet(x, TIMES, label=torch.full((2,), k)) for k in (0, 1, 2, NO_LABEL)]
    for i, a in enumerate(outputs):
        assert all(differs(a, b) for b in outputs[:i])
    torch.testing.assert_close(unet(x, TIMES), outputs[3])
    mixed = unet(x, TIMES, label=torch.tensor([1, NO_LABEL]))
    torch.testing.assert_close(mixed[0], outputs[1][0])
    torch.testing.assert_close(mixed[1], outputs[3][1])


def test_weights_of_labels_lie_between_them():
    unet, x = perturb(UNet(**TINY, num_classes=3)), normal(2, 3, 8, 8)
    named = [unet(x, TIMES, label=torch.full((2,), k)) for k in range(3)]
    for k in range(3):
        one = torch.eye(3)[[k, k]]
        torch.testing.assert_close(unet(x, TIMES, label=one), named[k])
    between = unet(x, TIMES, label=torch.tensor([[0.5, 0.0, 0.5]] * 2))
    assert differs(between, named[0]) and differs(between, named[2])
    mean = (unet.encoder.label.weight[0] + unet.encoder.label.weight[2]) / 2
    with torch.no_grad():
        unet.encoder.label.weight[1] = mean
    torch.testing.assert_close(unet(x, TIMES, label=torch.tensor([1, 1])), between)


def test_labels_do_nothing_without_classes():
    unet, x = perturb(UNet(**TINY)), normal(2, 3, 8, 8)
    assert torch.equal(unet(x, TIMES, label=torch.tensor([0, 1])), unet(x, TIMES))


@pytest.mark.parametrize("latent_size", [1, 4, 10, 15, 16])
@pytest.mark.parametrize("channels", [(8,), (6, 10), (8, 12, 16)])
def test_any_latent_size(latent_size, channels):
    unet = perturb(UNet(4, latent_size, channels=channels, blocks=1))
    x = normal(2, 4, latent_size, latent_size)
    condition = contour_condition(contours(size=60), latent_size)
    assert unet(x, TIMES, condition).shape == x.shape


@pytest.mark.parametrize("channels", [(7, 9), (5,), (100, 200)])
def test_any_widths(channels):
    unet = perturb(UNet(4, 4, channels=channels, blocks=1))
    x = normal(2, 4, 4, 4)
    assert unet(x, TIMES).shape == x.shape


def test_blocks_are_one_number_or_one_for_each_resolution():
    def count(blocks):
        return UNet(3, 8, channels=(8, 12), blocks=blocks).config["blocks"]

    assert [count(b) for b in (2, [2], [2, 1], None)] == [[2, 2], [2, 2], [2, 1], [1, 3]]
    with pytest.raises(ValueError, match=r"--blocks 1 2 3: 3 numbers.*--channels has 2"):
        count([1, 2, 3])


def test_small_maps_attend_and_the_smallest_do_nothing_else():
    def kinds(unet: UNet) -> list[str]:
        layers = [*unet.encoder.layers, unet.encoder.middle]
        return [type(layer).__name__ for layer in layers if not isinstance(layer, Downsample)]

    small = kinds(UNet(4, 16, channels=(8, 8, 8), blocks=1))
    assert small == ["ResBlock", "Attended", "TransformerBlock", "TransformerBlock"]
    assert kinds(UNet(4, 24, channels=(8, 8), blocks=1)) == ["ResBlock", "ResBlock", "Attended"]


def test_dropout_acts_in_training_alone():
    unet, x = perturb(UNet(**TINY, dropout=0.5)), normal(2, 3, 8, 8)
    unet.train()
    assert differs(unet(x, TIMES), unet(x, TIMES))
    unet.eval()
    assert torch.equal(unet(x, TIMES), unet(x, TIMES))


@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_parameter_is_trained(num_classes):
    """DDP needs a gradient of each parameter at each step; no weight may stay without effect."""
    torch.manual_seed(0)
    unet, scheduler = UNet(**TINY, num_classes=num_classes), CosineScheduler()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    x0, noise, label = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1), torch.tensor([0, 1, 2, -1])
    condition = contour_condition(contours(4), 8, torch.tensor([True, True, False, True]))
    t = torch.tensor([5, 200, 500, 900])
    for _ in range(4):
        optimizer.zero_grad(set_to_none=True)
        loss = diffusion_loss(lambda x, t: unet(x, t, condition, label), scheduler, x0, t, noise)
        loss.mean().backward()
        assert [name for name, p in unet.named_parameters() if p.grad is None] == []
        optimizer.step()
    idle = [name for name, p in unet.named_parameters() if not (p.grad != 0).any()]
    assert idle == []


def test_learns_to_denoise_one_latent():
    torch.manual_seed(0)
    unet, scheduler = UNet(**TINY), CosineScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    generator, x0 = torch.Generator().manual_seed(0), normal(1, 3, 8, 8).expand(16, -1, -1, -1)
    losses = []
    for _ in range(100):
        t = torch.randint(0, 1000, (16,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = diffusion_loss(unet, scheduler, x0, t, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_config_rebuilds_it():
    unet = perturb(UNet(**TINY, num_classes=2, contour_channels=2))
    other = UNet(**unet.config)
    other.load_state_dict(unet.state_dict())
    x, label = normal(2, 3, 8, 8), torch.tensor([1, 0])
    assert torch.equal(unet(x, TIMES, label=label), other(x, TIMES, label=label))


def test_weights_of_another_are_taken_with_classes_by_name():
    def network(classes: list[str], seed: int) -> UNet:
        return perturb(UNet(**TINY, num_classes=len(classes)), seed)

    known = ["a", "b", "c"]
    source, plain, x = network(known, 0), network([], 0), normal(2, 3, 8, 8)
    for classes, same in (
        (["b", "d", "a"], [1, NO_LABEL, 0]),  # d is new: it starts as no label
        (known, [0, 1, 2]),
        ([], []),
    ):
        unet = network(classes, 1)
        unet.load_from(source, classes, known)
        torch.testing.assert_close(unet(x, TIMES), source(x, TIMES))
        for i, j in enumerate(same):
            mine, theirs = (torch.full((2,), label) for label in (i, j))
            assert torch.equal(unet(x, TIMES, label=mine), source(x, TIMES, label=theirs))
    unet = network(known, 1)
    unet.load_from(plain, known, [])
    assert torch.equal(unet(x, TIMES, label=torch.full((2,), 2)), plain(x, TIMES))
