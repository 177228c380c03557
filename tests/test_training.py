"""Data order and noise whatever the number of processes, and the run's folder on resume."""

import argparse
import json
import signal

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fibldm import distributed, training
from fibldm.training import (
    FREE_OPTIONS,
    Batches,
    Precision,
    Run,
    item_noise,
    item_uniform,
    learning_rate,
    optimizer_step,
    seed_dropout,
)

CPU = torch.device("cpu")
ROWS = [3, 5, 7, 11, 13, 17, 19, 23, 29, 31]


def options(**changed) -> argparse.Namespace:
    values = {"batch_size": 8, "grad_accum": 1, "seed": 0, "steps": 10}
    values |= {"save_interval": 100, "val_interval": 100, "log_interval": 1}
    values |= {"lr": 0.1, "warmup_steps": 0, "grad_clip": 1.0, "ema_decay": 0.9, "patience": 0}
    return argparse.Namespace(**{**values, **changed})


# Batches.


def global_batches(monkeypatch, processes: int, start: int = 0, **changed) -> list[list[int]]:
    """Rows of each step over all processes, in the order of their positions in the batch."""
    args = options(**changed)
    steps = [[-1] * args.batch_size for _ in range(args.steps - start)]
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches = Batches(ROWS, args, start)
        parts = list(batches)
        assert len(parts) == len(batches)
        for i, rows in enumerate(parts):
            step, part = divmod(i, args.grad_accum)
            for position, row in zip(batches.positions(part), rows, strict=True):
                assert steps[step][position] == -1
                steps[step][position] = row
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
        Batches(ROWS, options(grad_accum=grad_accum), 0)


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


# A step.


def test_warm_up_is_linear_and_then_constant():
    args = options(lr=0.2, warmup_steps=4)
    rates = [learning_rate(step, args) for step in range(1, 7)]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert learning_rate(1, options(lr=0.2, warmup_steps=0)) == 0.2


def test_a_step_clips_moves_and_clears():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=99.0)
    scaler = Precision("fp32", CPU).scaler()
    (0.5 * weight.square().sum() * 10).backward()  # gradient (30, 40), norm 50
    norm = optimizer_step(optimizer, scaler, 1, options(lr=0.5, warmup_steps=5, grad_clip=1.0))
    assert float(norm) == pytest.approx(50.0)
    expected = torch.tensor([3 - 0.1 * 0.6, 4 - 0.1 * 0.8])
    torch.testing.assert_close(weight.detach(), expected)
    assert weight.grad is None


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_precision_on_a_cpu(name, dtype):
    precision = Precision(name, CPU)
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert not precision.scaler().is_enabled()


# The run's folder.


@pytest.fixture(autouse=True)
def handlers():
    """A run takes over SIGINT and SIGTERM: give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def begin(folder, **changed) -> tuple[Run, nn.Module]:
    """A run of a tiny model, resumed if it is there; weights count the steps."""
    run = Run(options(save_dir=str(folder), **changed), CPU)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    run.resume("train_x", {"model": model}, {"label_csv": "a" * 64})
    return run, model


def train(run: Run, model: nn.Module, until: int = 10**9) -> None:
    for step in run.steps():
        if step > until:
            break
        with torch.no_grad():
            model.weight += 1
        run.average(loss=torch.tensor(float(step)))
        if run.end_step(step):
            run.end_validation(step)
    run.close()


def logged(folder) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_run_writes_its_folder_and_resumes(tmp_path):
    folder = tmp_path / "deep" / "run"
    run, model = begin(folder, steps=6, save_interval=3)
    train(run, model, until=5)
    assert json.loads((folder / "args.json").read_text())["batch_size"] == 8
    assert (folder / "last.pth").is_file() and (folder / "samples").is_dir()
    assert any((folder / "tensorboard").iterdir())
    assert logged(folder) == [1, 2, 3, 4, 5]

    run, model = begin(folder, steps=6, save_interval=3)
    assert run.progress["step"] == 3 and model.weight.item() == 3
    assert logged(folder) == [1, 2, 3]
    train(run, model)
    assert logged(folder) == [1, 2, 3, 4, 5, 6]
    assert model.weight.item() == 6


def test_a_finished_run_has_nothing_left_and_can_be_prolonged(tmp_path):
    train(*begin(tmp_path / "run", steps=4))
    run, model = begin(tmp_path / "run", steps=4)
    assert list(run.steps()) == [] and model.weight.item() == 4
    run.close()
    train(*begin(tmp_path / "run", steps=6))
    assert logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"last\.pth is at step 6, beyond --steps 5"):
        begin(tmp_path / "run", steps=5)


@pytest.mark.parametrize("torn", ['{"step": 4, "train/lo', '{"step"', "null", "\x00\x00", "4"])
def test_a_torn_last_line_of_the_log_is_dropped(tmp_path, torn):
    run, model = begin(tmp_path / "run", save_interval=3)
    train(run, model, until=3)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(torn)
    run, model = begin(tmp_path / "run", save_interval=3)
    train(run, model, until=4)
    assert logged(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "before", "now"), [("lr", 0.1, 0.2), ("batch_size", 8, 16), ("seed", 0, 1)]
)
def test_other_settings_are_refused_with_both_values(tmp_path, name, before, now):
    train(*begin(tmp_path / "run", steps=2))
    kept = (tmp_path / "run" / "args.json").read_text()
    with pytest.raises(ValueError, match=rf"run holds.*--{name} was {before}, is {now}") as error:
        begin(tmp_path / "run", steps=2, **{name: now})
    assert "--steps" not in str(error.value)
    assert (tmp_path / "run" / "args.json").read_text() == kept


def test_all_other_settings_are_named(tmp_path):
    train(*begin(tmp_path / "run", steps=2))
    with pytest.raises(ValueError, match=r"--lr was 0.1, is 0.2; --new was None, is 1"):
        begin(tmp_path / "run", steps=2, lr=0.2, new=1)


def test_free_options_may_change(tmp_path):
    free = {name: 1 for name in FREE_OPTIONS if name != "save_dir"}
    train(*begin(tmp_path / "run", **{**free, "steps": 2}))
    other = {**{name: 2 for name in free}, "steps": 3}
    run, _ = begin(tmp_path / "run", **other)
    assert run.progress["step"] == 2
    run.close()


def test_a_folder_may_be_moved(tmp_path):
    train(*begin(tmp_path / "run", steps=2))
    (tmp_path / "run").rename(tmp_path / "moved")
    run, model = begin(tmp_path / "moved", steps=2)
    assert model.weight.item() == 2
    run.close()


def test_checkpoints_without_args_json_are_refused(tmp_path):
    (tmp_path / "vae_best.pth").write_bytes(b"a year of computing")
    with pytest.raises(ValueError, match=r"holds checkpoints but no args\.json"):
        begin(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["vae_best.pth"]


def test_a_damaged_args_json_or_last_pth_is_refused_by_name(tmp_path):
    train(*begin(tmp_path / "run", steps=2))
    last, args = tmp_path / "run" / "last.pth", tmp_path / "run" / "args.json"
    last.write_bytes(last.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"last\.pth.*truncated"):
        begin(tmp_path / "run", steps=2)
    args.write_text("{")
    with pytest.raises(ValueError, match=r"args\.json: damaged"):
        begin(tmp_path / "run", steps=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_after_the_step(tmp_path, number):
    run, model = begin(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        for step in run.steps():
            with torch.no_grad():
                model.weight += 1
            if step == 4:
                signal.raise_signal(number)
            run.end_step(step)
    assert stopped.value.code == 128 + number
    run, model = begin(tmp_path / "run")
    assert run.progress["step"] == 4 and model.weight.item() == 4
    run.close()


def test_validation_is_due_at_its_interval_at_the_end_and_after_a_kill(tmp_path):
    run, _ = begin(tmp_path / "run", steps=5, val_interval=2)
    due = []
    for step in run.steps():
        if run.end_step(step):
            due.append(step)
            if step == 4:
                break  # killed in its validation
            run.end_validation(step)
    run.close()
    assert due == [2, 4]
    run, _ = begin(tmp_path / "run", steps=5, val_interval=2)
    assert run.progress["step"] == 4 and run.validation_pending()
    run.end_validation(4)
    assert not run.validation_pending()
    assert [step for step in run.steps() if run.end_step(step)] == [5]
    run.close()


def test_log_lines_hold_means_since_the_last(tmp_path):
    run, model = begin(tmp_path / "run", steps=6, log_interval=3)
    train(run, model)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(3, 2.0), (6, 5.0)]


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
    run, _ = begin(tmp_path / "run", save_interval=1)
    with pytest.raises(ValueError, match=r"diverged.*loss.*--lr"):
        for step in run.steps():
            run.average(loss=torch.tensor(1.0 if step < 3 else float("nan")))
            run.end_step(step)
    run.close()
    run, _ = begin(tmp_path / "run", save_interval=1)
    assert run.progress["step"] == 2
    run.close()


def test_best_is_remembered(tmp_path):
    run, model = begin(tmp_path / "run", steps=2)
    assert [run.is_best(loss) for loss in (3.0, 2.0, 2.5, float("nan"), 1.5)] == [
        *(True, True, False, False, True)
    ]
    train(run, model)
    run, _ = begin(tmp_path / "run", steps=2)
    assert not run.is_best(1.6) and run.is_best(1.4)
    run.close()


def test_a_snapshot_that_copies_gives_way_to_one_that_does_not(tmp_path):
    run, _ = begin(tmp_path / "run")
    found = [run.is_best(*args) for args in ((2.0, True), (3.0, False), (1.0, True), (2.9, False))]
    assert found == [True, True, False, True]
    run.close()


def test_patience_ends_a_run_and_the_same_command_goes_no_further(tmp_path):
    """A worse validation is forgiven by a better one; after that two worse ones follow."""
    for _ in range(2):
        run, model = begin(tmp_path / "run", val_interval=2, patience=2, steps=20)
        losses = {2: 2.0, 4: 2.5, 6: 1.0, 8: 1.5, 10: 1.2, 12: 0.1}
        for step in run.steps():
            with torch.no_grad():
                model.weight += 1
            if run.end_step(step):
                run.is_best(losses[step])
                run.end_validation(step)
        run.close()
        assert run.progress["step"] == 10 and run.progress["best"] == 1.0
        assert model.weight.item() == 10
    for never in 0, -1:
        run, model = begin(tmp_path / "run", val_interval=2, patience=never, steps=20)
        assert next(run.steps()) == 11
        run.close()


def test_parts_say_where_each_row_belongs():
    batches = Batches(ROWS, options(batch_size=4, grad_accum=2, steps=3), 1)
    parts = list(batches.parts())
    assert [(step, list(positions)) for step, positions, _ in parts] == [
        *((2, [0, 1]), (2, [2, 3]), (3, [0, 1]), (3, [2, 3]))
    ]
    assert [rows for _, _, rows in parts] == list(batches)


def test_dropout_follows_from_seed_step_and_position():
    def mask(*where: object) -> list[bool]:
        seed_dropout(*where)
        return (nn.functional.dropout(torch.ones(64)) > 0).tolist()

    first = mask(0, 5, range(8))
    torch.rand(3)
    assert mask(0, 5, range(8)) == first
    for other in ((1, 5, range(8)), (0, 6, range(8)), (0, 5, range(8, 16))):
        assert mask(*other) != first


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "args.json"
    training.replace_text(path, "old")

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(training.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        training.replace_text(path, "new")
    assert path.read_text() == "old"
