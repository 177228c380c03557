"""A step of training: learning rates, clipping, precision; the averaged weights; Muon."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fibldm.optim import (
    COEFFICIENTS,
    EMA,
    NEWTON_SCHULZ,
    RMS,
    SCHEDULES,
    Muon,
    Precision,
    clip_gradients,
    cooldown_start,
    learning_rate,
    optimizer_step,
    orthogonalize,
)
from fibldm.unet import UNet

CPU = torch.device("cpu")


class Kernels(TorchDispatchMode):
    """Counts what computes, but not views or what is read of AdamW's step; or one kind alone."""

    def __init__(self, kind: torch._ops.OpOverload | None = None) -> None:
        super().__init__()
        self.kind, self.count = kind, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        silent = func.is_view or func is torch.ops.aten._local_scalar_dense.default
        self.count += not silent if self.kind is None else func is self.kind
        return func(*args, **kwargs or {})


def rates(schedule: str, steps: int, warmup_steps: int = 0, lr: float = 1.0) -> list[float]:
    return [learning_rate(s, lr, warmup_steps, schedule, steps) for s in range(1, steps + 1)]


def test_constant_warms_up_and_stays():
    assert rates("constant", 6, 4, 0.2) == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert learning_rate(1, 0.2) == 0.2
    assert rates("constant", 40, 4) == rates("constant", 60, 4)[:40]


def test_cosine_falls_from_the_end_of_the_warm_up_to_nothing():
    found = rates("cosine", 24, 4, 0.2)
    assert found[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    expected = 0.1 * (1 + np.cos(np.linspace(0, np.pi, 21)[1:]))
    assert found[4:] == pytest.approx(expected, abs=1e-9)
    assert found[13] == pytest.approx(0.1) and found[-1] == 0


def test_cooldown_falls_over_the_last_fifth_by_one_minus_a_root():
    found = rates("cooldown", 50, 4, 0.2)
    assert cooldown_start(50) == 40
    assert found[:40] == rates("constant", 40, 4, 0.2)
    assert found[40:] == pytest.approx(0.2 * (1 - np.sqrt(np.linspace(0.1, 1, 10))), abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 5), (3, 3), (7, 20), (9, 8)])
def test_short_trainings_have_rates_too(schedule, steps, warmup_steps):
    assert all(0 <= rate <= 1 for rate in rates(schedule, steps, warmup_steps))


def test_a_step_clips_and_moves():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=99.0)
    scaler = Precision("fp32", CPU).scaler()
    (0.5 * weight.square().sum() * 10).backward()  # gradient (30, 40), norm 50
    assert float(clip_gradients(optimizer, scaler, 1.0)) == pytest.approx(50.0)
    optimizer_step(optimizer, scaler, 0.1)
    expected = torch.tensor([3 - 0.1 * 0.6, 4 - 0.1 * 0.8])
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_precision_on_a_cpu(name, dtype):
    precision = Precision(name, CPU)
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert not precision.scaler().is_enabled()


def test_frozen_weights_are_cast_once_and_nothing_else_changes():
    torch.manual_seed(0)
    model = UNet(2, 8, channels=(16, 32), blocks=1, num_classes=2).requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    before, x, t = copy.deepcopy(model.state_dict()), torch.randn(2, 2, 8, 8), torch.tensor([3, 99])
    assert Precision("fp32", CPU).frozen(model) is model
    precision, casts = Precision("bf16", CPU), []
    frozen = precision.frozen(model)
    with precision.autocast():
        assert torch.equal(frozen(x, t), model(x, t))
        for one in frozen, model:
            with Kernels(torch.ops.aten._to_copy.default) as counter:
                one(x, t)
            casts.append(counter.count)
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    assert casts[1] - casts[0] == 2 * layers  # a weight and a bias of each
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


# The moving average: its closed form, warm-up, buffers and resume.


class Counter(nn.Module):
    """One weight and one buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.register_buffer("seen", torch.zeros(1))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.seen.fill_(10 * value)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.999])
def test_closed_form_with_warm_up(decay):
    model = Counter(2.0)
    ema, expected = EMA(model, decay), 2.0
    for k in range(1, 31):
        model.set(float(k))
        ema.update(model)
        d = min(decay, (1 + k) / (10 + k))
        expected = d * expected + (1 - d) * k
        assert float(ema.model.weight) == pytest.approx(expected, rel=1e-5)


def test_the_decay_is_reached():
    model = Counter(0.0)
    ema = EMA(model, 0.5)
    for _ in range(20):
        ema.update(model)
    model.set(1.0)
    ema.update(model)
    assert float(ema.model.weight) == pytest.approx(0.5)


def test_buffers_are_copied_and_not_averaged():
    model = Counter(1.0)
    ema = EMA(model)
    model.set(7.0)
    ema.update(model)
    assert float(ema.model.seen) == 70.0
    assert float(ema.model.weight) not in (1.0, 7.0)


def test_is_its_own_frozen_model_in_eval_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    ema = EMA(model)
    assert not ema.model.training and model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    before = ema.model[0].weight.clone()
    with torch.no_grad():
        model[0].weight += 1
    assert torch.equal(ema.model[0].weight, before)


def test_state_dict_carries_the_warm_up():
    model, fresh = Counter(1.0), Counter(-5.0)
    ema = EMA(model)
    for k in range(5):
        model.set(float(k))
        ema.update(model)
    other = EMA(fresh)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 5
    assert torch.equal(other.model.weight, ema.model.weight)
    assert torch.equal(other.model.seen, ema.model.seen)
    model.set(9.0)
    ema.update(model)
    other.update(model)
    assert torch.equal(other.model.weight, ema.model.weight)


# Muon: orthogonal updates, one learning rate for all, a state that resumes to the bit.


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 32, 3, padding=1), nn.SiLU(),
        nn.Conv2d(32, 1, 3, padding=1),
    )  # fmt: skip


def train(model: nn.Module, optimizer: Muon, steps: range) -> float:
    for step in steps:
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.roll(1, 3).square()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalize(matrix[None])[0] @ vh.T
    values = found.diagonal()
    assert (values > 0.5).all() and (values < 1.3).all()
    torch.testing.assert_close(found, torch.diag(values), atol=1e-3, rtol=0)
    small, large = orthogonalize(torch.stack([1e-4 * matrix, matrix]))
    torch.testing.assert_close(small, large, atol=1e-2, rtol=0)


def test_orthogonalize_agrees_with_the_plain_iteration_where_singular_values_are_tiny():
    """Its iterations on the Gram matrix save work; they must not lose the small directions."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 24, generator=generator))[0] for n in (24, 90))
    matrix = u @ torch.diag(torch.logspace(0, -4, 24)) @ v.T
    x = (matrix / matrix.norm()).double()
    for _ in range(NEWTON_SCHULZ):
        a, b, c = COEFFICIENTS
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(orthogonalize(matrix[None])[0], x.float(), atol=1e-3, rtol=0)


def test_matrices_take_steps_of_adams_length_whatever_the_gradient():
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = Muon(model, lr=1e-2, weight_decay=0.0)
    for weight in model.parameters():
        weight.grad = 1e-3 * torch.randn_like(weight)
    optimizer.step()
    moved = {
        n: float((w - before[n]).square().mean().sqrt()) for n, w in model.state_dict().items()
    }
    assert moved["2.weight"] == pytest.approx(1e-2 * RMS, rel=0.3)  # the hidden one: Muon
    assert moved["0.weight"] == pytest.approx(1e-2, rel=0.01)  # first and last: AdamW's first step
    assert moved["4.weight"] == pytest.approx(1e-2, rel=0.01)
    assert moved["2.bias"] == pytest.approx(1e-2, rel=0.01)


def test_a_matrix_follows_nesterovs_momentum():
    model = nn.Linear(20, 30, bias=False)
    optimizer = Muon(model, lr=1e-2, weight_decay=0.0)
    momentum = torch.zeros_like(model.weight)
    for step in range(3):
        before = model.weight.detach().clone()
        gradient = torch.randn(30, 20, generator=torch.Generator().manual_seed(step))
        model.weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        (expected,) = orthogonalize((0.05 * gradient + 0.95 * momentum)[None]) * RMS * 30**0.5
        torch.testing.assert_close((before - model.weight) / 1e-2, expected, atol=1e-3, rtol=0)


def layers(count: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(count))).to(
        memory_format=torch.channels_last
    )


def test_weights_of_one_shape_do_not_change_each_other():
    together, alone = layers(3), layers(3)
    optimizers = [Muon(together, lr=1e-2), *(Muon(layer, lr=1e-2) for layer in alone)]
    for step in range(3):
        for model in together, alone:
            generator = torch.Generator().manual_seed(step)
            for number, weight in enumerate(model.parameters()):
                weight.grad = 10.0**number * torch.randn(weight.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_deeper_network_needs_no_more_kernels():
    """A GPU has done each of them before Python asks for the next."""

    def kernels(model: nn.Module) -> int:
        optimizer = Muon(model, lr=1e-2)
        for _ in range(2):
            for weight in model.parameters():
                weight.grad = torch.ones_like(weight)
            with Kernels() as counter:
                optimizer.step()
        return counter.count

    assert kernels(layers(12)) == kernels(layers(3)) < 80


def test_what_is_no_matrix_is_stepped_as_by_adamw():
    """Against PyTorch's, on a model without hidden matrices."""
    torch.manual_seed(0)
    model = nn.Conv2d(1, 4, 3, padding=1)
    other = copy.deepcopy(model)
    ours = Muon(model, lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(other.parameters(), 1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, other.weight)
    torch.testing.assert_close(model.bias, other.bias)


def test_it_resumes_to_the_bit(tmp_path):
    whole = network()
    train(whole, Muon(whole, lr=1e-2), range(6))
    first = network()
    optimizer = Muon(first, lr=1e-2)
    train(first, optimizer, range(3))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s")
    saved = torch.load(tmp_path / "s", weights_only=True)
    names = {frozenset(state) for state in saved["optimizer"]["state"].values()}
    assert names == {frozenset({"momentum"}), frozenset({"mean", "square", "step"})}  # as ever
    second = network()
    optimizer = Muon(second, lr=1e-2)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, range(3, 6))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns():
    model = network()
    first = train(network(), Muon(network(), lr=1e-2), range(1))
    assert train(model, Muon(model, lr=1e-2), range(60)) < 0.5 * first
