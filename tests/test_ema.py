"""The moving average against its closed form, with warm-up, buffers and resume."""

import pytest
import torch
from torch import nn

from fibldm.optim import EMA


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
