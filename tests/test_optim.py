"""A step of training: learning rates, clipped gradients."""

import numpy as np
import pytest
import torch
from torch import nn

from fibldm.optim import (
    SCHEDULES,
    Precision,
    clip_gradients,
    cooldown_start,
    learning_rate,
    optimizer_step,
)

CPU = torch.device("cpu")


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
