"""Data order and noise: the same whatever the number of processes, and after any interruption."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fibldm import distributed
from fibldm.batches import (
    Batches,
    Plan,
    item_generator,
    item_noise,
    item_uniform,
    seed_dropout,
)

ROWS = [3, 5, 7, 11, 13, 17, 19, 23, 29, 31]


def planned(**changed: int) -> Plan:
    return Plan(**{"steps": 10, "batch_size": 8, **changed})


def global_batches(monkeypatch, processes: int, start: int = 0, **changed) -> list[list[int]]:
    """Rows of each step over all processes, in the order of their positions in the batch."""
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    plan = planned(**changed)
    steps = [[-1] * plan.batch_size for _ in range(plan.steps - start)]
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches = Batches(ROWS, plan, start)
        assert len(list(batches)) == len(batches)
        for micro, rows in zip(batches.all_micro_batches(), batches, strict=True):
            for position, row in zip(micro.positions, rows, strict=True):
                assert steps[micro.step - start - 1][position] == -1
                steps[micro.step - start - 1][position] = row
    return steps


@pytest.mark.parametrize(("processes", "grad_accum"), [(2, 1), (4, 1), (8, 1), (1, 4), (2, 2)])
def test_the_same_batches_for_any_number_of_processes(monkeypatch, processes, grad_accum):
    expected = global_batches(monkeypatch, 1)
    assert global_batches(monkeypatch, processes, grad_accum=grad_accum) == expected


def test_each_row_once_an_epoch_in_another_order(monkeypatch):
    stream = np.concatenate(global_batches(monkeypatch, 1)).tolist()  # 80 rows: 8 epochs
    epochs = [stream[i : i + len(ROWS)] for i in range(0, len(stream), len(ROWS))]
    assert all(sorted(epoch) == ROWS for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_order_depends_on_the_seed(monkeypatch):
    first, second = (global_batches(monkeypatch, 1, seed=seed) for seed in (0, 1))
    assert first != second
    assert global_batches(monkeypatch, 1, seed=0) == first


@pytest.mark.parametrize("start", [1, 4, 9, 10])
@pytest.mark.parametrize("processes", [1, 2])
def test_starting_later_continues(monkeypatch, start, processes):
    whole = global_batches(monkeypatch, 1)
    assert global_batches(monkeypatch, processes, start) == whole[start:]


def test_more_steps_do_not_change_the_first(monkeypatch):
    assert global_batches(monkeypatch, 1, steps=15)[:10] == global_batches(monkeypatch, 1)


def test_fewer_rows_than_a_batch_repeat(monkeypatch):
    (first, *_) = global_batches(monkeypatch, 1, batch_size=16)
    assert len(first) == 16 and sorted(first[:10]) == ROWS


@pytest.mark.parametrize(("processes", "grad_accum"), [(3, 1), (1, 3), (4, 4)])
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, processes, grad_accum):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    match = rf"--batch_size 8.*{processes} processes x --grad_accum {grad_accum}"
    with pytest.raises(ValueError, match=match):
        planned(grad_accum=grad_accum)


def test_micro_batches_say_where_each_row_belongs():
    batches = Batches(ROWS, planned(batch_size=4, grad_accum=2, steps=3), 1)
    found = list(batches.all_micro_batches())
    assert [(step, list(positions), last) for step, positions, last in found] == [
        *((2, [0, 1], False), (2, [2, 3], True), (3, [0, 1], False), (3, [2, 3], True))
    ]
    assert [batches.rows_of(micro.step, micro.positions) for micro in found] == list(batches)
    assert found[2:] == list(batches.micro_batches(3))


def test_a_plan_is_among_the_options_of_a_script():
    options = {"steps": 3, "batch_size": 2, "patience": 4, "save_dir": "run"}
    assert Plan.of(options) == Plan(steps=3, batch_size=2, patience=4)


# Images that cannot be read.


def test_a_row_left_out_is_replaced_by_the_next_whenever_it_is_found(monkeypatch):
    whole = [rows for rows in Batches(ROWS, planned())]
    expected = [[{7: 11, 31: 3}.get(row, row) for row in rows] for rows in whole]
    batches = Batches(ROWS, planned(), 0, [7, 31])
    assert [list(rows) for rows in batches] == expected
    late = Batches(ROWS, planned())
    rows = iter(late)
    first = [next(rows) for _ in range(3)]
    late.leave_out([31, 7])
    assert first + list(rows) == whole[:3] + expected[3:]
    with pytest.raises(ValueError, match="none of the slices"):
        late.leave_out(ROWS)


def test_the_rows_of_a_step_over_all_ranks(monkeypatch):
    expected = global_batches(monkeypatch, 2, grad_accum=2)
    batches = Batches(ROWS, planned())
    assert [batches.rows_of(step) for step in range(1, 11)] == expected


# Noise.


def test_noise_of_an_item_is_its_own():
    shape = (2, 3, 3)
    batch = item_noise(0, "unet", 5, range(8), shape)
    for items in ([3], [7, 3, 0], range(4, 8)):
        drawn = item_noise(0, "unet", 5, items, shape)
        assert torch.equal(drawn, batch[list(items)])
    everything = [
        item_noise(seed, stream, step, [item], shape)
        for seed in (0, 1)
        for stream in ("unet", "control")
        for step in (5, 6)
        for item in (0, 1)
    ]
    for i, a in enumerate(everything):
        assert not any(torch.equal(a, b) for b in everything[:i])


def test_any_seed_of_64_bits_has_noise_of_its_own():
    """Also those that are beyond the whole numbers that a float holds."""
    seeds = [0, 1, -1, -2, 2**63 - 1, 2**63 - 2, -(2**63)]
    found = {item_noise(seed, "train", 0, [0], (2,)).numpy().tobytes() for seed in seeds}
    assert len(found) == len(seeds)


def test_noise_is_independent_of_global_random_state():
    first = item_noise(0, "unet", 1, [0], (4,))
    torch.manual_seed(99)
    np.random.seed(99)
    torch.randn(10)
    assert torch.equal(item_noise(0, "unet", 1, [0], (4,)), first)


def test_noise_is_standard_normal_and_uncorrelated():
    noise = item_noise(0, "unet", 1, range(400), (2, 8, 8))
    assert noise.dtype == torch.float32
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    for neighbour in (
        item_noise(0, "unet", 1, range(1, 401), (2, 8, 8)),
        item_noise(0, "unet", 2, range(400), (2, 8, 8)),
        item_noise(1, "unet", 1, range(400), (2, 8, 8)),
        item_noise(0, "vae", 1, range(400), (2, 8, 8)),
    ):
        correlation = float((noise * neighbour).mean())
        assert abs(correlation) < 4 / noise.numel() ** 0.5


def test_streams_do_not_overlap_shifted():
    """Neighbouring items or steps must not be windows into one sequence of random numbers."""
    first, *others = (
        set(item_noise(0, "unet", step, [item], (2000,)).flatten().tolist())
        for step, item in ((1, 1), (1, 2), (2, 1), (1, 0), (0, 1), (2, 2))
    )
    assert all(len(first & other) < 20 for other in others)


def test_uniform_numbers_are_uniform_and_an_items_own():
    draws = item_uniform(0, "draws", 3, range(5000), 3)
    assert draws.min() >= 0 and draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(item_uniform(0, "draws", 3, [41, 7], 3), draws[[41, 7]])


def test_dropout_follows_from_seed_step_and_position():
    def mask(*where: object) -> list[bool]:
        seed_dropout(*where)
        return (nn.functional.dropout(torch.ones(64)) > 0).tolist()

    first = mask(0, 5, range(8))
    torch.rand(3)
    assert mask(0, 5, range(8)) == first
    for other in ((1, 5, range(8)), (0, 6, range(8)), (0, 5, range(8, 16))):
        assert mask(*other) != first


def test_numbers_of_many_items_are_those_of_each_items_generator():
    for seed, step, items in (0, 3, range(4)), (-1, 0, [7, 2**40, 7]), (2**63, 10**9, [5]):
        noise = item_noise(seed, "unet", step, items, (3, 5))  # odd: buffers are not empty
        uniform = item_uniform(seed, "draws", step, items, 3)
        for drawn, uniform_drawn, item in zip(noise, uniform, items, strict=True):
            expected = item_generator(seed, "unet", step, item).standard_normal((3, 5), np.float32)
            assert np.array_equal(drawn, expected)
            expected = item_generator(seed, "draws", step, item).random(3, np.float32)
            assert np.array_equal(uniform_drawn, expected)
