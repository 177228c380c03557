"""The run's folder: resume, log, skipped steps, stops, full disks, what is kept."""

import errno
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from conftest import training_options as options
from PIL import Image
from torch import nn

from fibldm import journal, optim
from fibldm import run as run_module
from fibldm.batches import Batches, Plan, Progress
from fibldm.checkpoint import save
from fibldm.cli import STOPPED
from fibldm.journal import FREE_OPTIONS, read_log
from fibldm.run import SIGNALS, Run

CPU = torch.device("cpu")
ROWS = range(3, 13)


@pytest.fixture(autouse=True)
def handlers():
    """A run takes over SIGINT and SIGTERM: give them back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def begin(folder, **changed) -> tuple[Run, nn.Module]:
    """A run of a tiny model, resumed if it is there; weights count the steps."""
    settings = options(save_dir=str(folder), **changed)
    run = Run(folder, Plan.of(settings), CPU, settings)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    run.resume("train_x", {"model": model}, {"label_csv": "a" * 64})
    return run, model


def nothing(step: int) -> None:
    """A validation that measures nothing."""


def steps(run: Run, validate: Callable[[int], None] = nothing) -> Iterator[int]:
    """The steps that are left of a run whose batches need not be loaded."""
    run.batches_of(ROWS)
    return (step for step, _ in run.steps(itertools.count, validate))


def take(run: Run, model: nn.Module, loss: float = 0.0, norm: float = 1.0) -> bool:
    """A step that adds 1 to the weight where the run lets it; its loss is by default its number."""
    run.average(loss=torch.tensor(loss or run.progress.step + 1.0))
    taken = run.may_step(torch.tensor(norm))
    if taken:
        with torch.no_grad():
            model.weight += 1
    return taken


def train(run: Run, model: nn.Module, until: int = 10**9, validate=nothing) -> None:
    for step in steps(run, validate):
        if step > until:
            break
        take(run, model)
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
    assert run.progress.step == 3 and model.weight.item() == 3
    assert logged(folder) == [1, 2, 3]
    train(run, model)
    assert logged(folder) == [1, 2, 3, 4, 5, 6]
    assert model.weight.item() == 6


def test_a_finished_run_has_nothing_left_and_can_be_prolonged(tmp_path):
    train(*begin(tmp_path / "run", steps=4))
    run, model = begin(tmp_path / "run", steps=4)
    assert list(steps(run)) == [] and model.weight.item() == 4
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


def test_steps_are_fixed_where_all_learning_rates_follow_from_them(tmp_path):
    train(*begin(tmp_path / "run", steps=4, lr_schedule="cosine"))
    with pytest.raises(ValueError, match=r"--steps was 4, is 6"):
        begin(tmp_path / "run", steps=6, lr_schedule="cosine")
    with pytest.raises(ValueError, match=r"--lr_schedule was cosine, is constant"):
        begin(tmp_path / "run", steps=4)


def follow_rate(run: Run, model: nn.Module, best: dict[int, float] | None = None) -> None:
    """Train so that the weight is the sum of the learning rates; `best`: validation losses."""
    model.kind, model.config = "x", {}

    def validate(step: int) -> None:
        if run.progress.improve((best or {}).get(step, 9.0)):
            run.save_best("x_best.pth", model, step=step)

    for step in steps(run, validate):
        run.average(loss=torch.tensor(1.0))
        assert run.may_step(torch.tensor(1.0))
        with torch.no_grad():
            model.weight += run.plan.learning_rate(step)
    run.close()


def test_a_longer_training_goes_on_from_before_the_cooldown(tmp_path):
    more = {"lr_schedule": "cooldown", "val_interval": 5, "save_interval": 3, "keep_last": 2}
    whole = begin(tmp_path / "whole", steps=20, **more)
    follow_rate(*whole, {5: 3.0, 10: 2.0, 15: 4.0, 20: 1.0})
    run = begin(tmp_path / "run", steps=10, **more)  # it cools down after step 8
    follow_rate(*run, {5: 3.0, 10: 1.5})
    assert run[1].weight.item() < 10 * 0.1 - 0.05
    assert torch.load(run[0].folder.path / "x_best.pth", weights_only=True)["step"] == 10

    run = begin(tmp_path / "run", steps=20, **more)
    assert run[0].progress.step == 8 and run[0].progress.best == 3.0
    assert torch.load(run[0].folder.path / "x_best.pth", weights_only=True)["step"] == 5
    assert max(logged(tmp_path / "run")) == 8
    follow_rate(*run, {10: 2.0, 15: 4.0, 20: 1.0})
    assert torch.equal(run[1].weight, whole[1].weight)
    assert run[0].progress == whole[0].progress
    names = [{path.name for path in (tmp_path / n).iterdir()} for n in ("run", "whole")]
    assert "kept_0000016" in names[0] and names[0] == {*names[1], "x_best_0000010.pth"}


def test_a_training_that_has_cooled_down_cannot_go_on_without_what_was_kept(tmp_path):
    more = {"lr_schedule": "cooldown", "val_interval": 5}
    follow_rate(*begin(tmp_path / "run", steps=10, **more))
    follow_rate(*begin(tmp_path / "run", steps=10, **more))  # nothing is left to do
    shutil.rmtree(tmp_path / "run" / "kept_0000008")
    with pytest.raises(ValueError, match=r"cooled down since step 8.* found is nothing"):
        begin(tmp_path / "run", steps=20, **more)


def test_the_log_of_a_longer_training_has_the_rows_of_one_that_was_never_shorter(tmp_path):
    more = {"lr_schedule": "cooldown", "log_interval": 3, "save_interval": 7}
    follow_rate(*begin(tmp_path / "whole", steps=20, **more))
    follow_rate(*begin(tmp_path / "run", steps=11, **more))  # cools down after 9
    follow_rate(*begin(tmp_path / "run", steps=14, **more))  # after 12
    follow_rate(*begin(tmp_path / "run", steps=20, **more))
    rows = [
        [{n: v for n, v in row.items() if n != "train/images_per_s"} for row in read_log(path)]
        for path in (tmp_path / "run", tmp_path / "whole")
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [
        3,
        6,
        7,
        9,
        12,
        14,
        15,
        18,
        20,
    ]


@pytest.mark.parametrize("steps", [9, 10])
def test_a_refused_length_changes_nothing(tmp_path, steps):
    more = {"lr_schedule": "cooldown", "val_interval": 5}
    follow_rate(*begin(tmp_path / "run", steps=11, **more))
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.pth")}
    with pytest.raises(ValueError, match=r"cooled down since step 9.* kept_0000009"):
        begin(tmp_path / "run", steps=steps, **more)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pth")} == files


def test_steps_can_not_be_lowered_to_where_it_should_have_cooled_down_before(tmp_path):
    run, model = begin(tmp_path / "run", steps=20, lr_schedule="cooldown", save_interval=1)
    train(run, model, until=9)
    with pytest.raises(ValueError, match=r"is at step 9: for --steps 10 .* from step 8 on"):
        begin(tmp_path / "run", steps=10, lr_schedule="cooldown")
    begin(tmp_path / "run", steps=12, lr_schedule="cooldown")[0].close()


def test_a_kill_at_the_start_of_a_cooldown_loses_nothing(tmp_path, monkeypatch):
    more = {"lr_schedule": "cooldown", "val_interval": 5, "steps": 10}

    def die(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(journal.RunFolder, "keep_checkpoints", die)
        run = begin(tmp_path / "run", **more)
        with pytest.raises(InterruptedError):
            follow_rate(*run)
        run[0].close()
    follow_rate(*begin(tmp_path / "run", **more))
    assert (tmp_path / "run" / "kept_0000008" / "last.pth").is_file()


def test_a_run_from_before_there_were_schedules_goes_on(tmp_path):
    train(*begin(tmp_path / "run", steps=2))
    file = tmp_path / "run" / "args.json"
    settings = json.loads(file.read_text())
    del settings["lr_schedule"]
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"--lr_schedule was constant, is cosine"):
        begin(tmp_path / "run", steps=2, lr_schedule="cosine")
    train(*begin(tmp_path / "run", steps=3))
    assert logged(tmp_path / "run") == [1, 2, 3]


def test_a_run_whose_shift_was_in_pixels_goes_on(tmp_path):
    train(*begin(tmp_path / "run", steps=2, max_shift=6, image_size=96))
    with pytest.raises(ValueError, match=r"--max_shift was 0.0625, is 0.125"):
        begin(tmp_path / "run", steps=2, max_shift=0.125, image_size=96)
    train(*begin(tmp_path / "run", steps=3, max_shift=1 / 16, image_size=96))
    assert logged(tmp_path / "run") == [1, 2, 3]


def test_a_run_sends_its_numbers_where_it_is_asked_to(tmp_path, wandb):
    train(*begin(tmp_path / "run", steps=2, wandb="lungs"))
    train(*begin(tmp_path / "run", steps=3, wandb="lungs"))
    first, again = wandb.begun
    assert first == again and first["project"] == "lungs"
    assert first["config"]["lr"] == 0.1 and "save_dir" not in first["config"]
    assert len(wandb.ended) == 2
    train(*begin(tmp_path / "run", steps=4))  # a free option
    assert len(wandb.begun) == 2


def test_pictures_are_not_sent(tmp_path, wandb):
    run, _ = begin(tmp_path / "run", wandb="lungs")
    run.journal.writer.add_image = None
    run.picture(1, lambda path: Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path))
    assert (tmp_path / "run" / "samples" / "step_0000001.png").is_file()
    run.close()


def test_an_absent_package_is_named_before_anything_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        begin(tmp_path / "run", wandb="lungs")
    assert list(tmp_path.iterdir()) == []


def test_auto_is_the_precision_that_a_run_began_with(tmp_path, monkeypatch):
    """On any device; one that does not have it is told what to do. Other names are refused."""
    cards = {"new": True, "old": False}

    def precision(folder: str, asked: str, card: str | None, wrote: bool = True) -> str:
        device = torch.device("cpu" if card is None else "cuda")
        monkeypatch.setattr(optim, "has_bf16", lambda: cards[card])
        monkeypatch.setattr(run_module, "has_bf16", lambda: cards[card])
        settings = options(precision=asked)
        run = Run(tmp_path / folder, Plan.of(settings), device, settings)
        if wrote:
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "args.json").write_text(json.dumps(run.folder.settings))
            (tmp_path / folder / "last.pth").touch()
        return run.precision.name

    assert precision("run", "auto", "old", wrote=False) == "fp16"  # nothing is kept before a save
    assert [precision("run", "auto", card) for card in ("new", "new", None)] == ["bf16"] * 3
    assert precision("run", "bf16", "new") == "bf16"
    with pytest.raises(ValueError, match=r"began in bf16 .*capability 8.0 .*another --save_dir"):
        precision("run", "auto", "old")
    with pytest.raises(ValueError, match="--precision was bf16, is fp16"):
        precision("run", "fp16", "old")
    assert [precision("older", "auto", card) for card in ("old", "new")] == ["fp16"] * 2
    assert [precision("laptop", "auto", card) for card in (None, "new")] == ["fp32"] * 2
    before = json.loads((tmp_path / "laptop" / "args.json").read_text())
    (tmp_path / "laptop" / "args.json").write_text(json.dumps(before | {"precision": "auto"}))
    assert precision("laptop", "auto", "new") == "bf16"  # an older version did not note it


def test_processes_of_one_run_compute_in_the_same_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(journal.distributed, "gather", lambda name: [name, "fp16"])
    monkeypatch.setattr(optim, "has_bf16", lambda: True)
    assert run_module.kept_precision(tmp_path, "auto", torch.device("cuda")) == "fp16"
    assert run_module.kept_precision(tmp_path, "bf16", torch.device("cuda")) == "bf16"


def test_free_options_may_change(tmp_path):
    free = {name: 1 for name in FREE_OPTIONS - {"save_dir", "wandb"}}
    train(*begin(tmp_path / "run", **{**free, "steps": 2}))
    other = {**{name: 2 for name in free}, "steps": 3}
    run, _ = begin(tmp_path / "run", **other)
    assert run.progress.step == 2
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


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_leaves_after_the_step(tmp_path, number, capsys):
    run, model = begin(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        for step in steps(run):
            if step == 4:
                signal.raise_signal(number)
            take(run, model)
    assert stopped.value.code == STOPPED == 75
    assert "stopped after step 4, all saved" in capsys.readouterr().out
    run, model = begin(tmp_path / "run")
    assert run.progress.step == 4 and model.weight.item() == 4
    run.close()


def test_a_run_that_is_closed_gives_the_signals_back(tmp_path):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    run, _ = begin(tmp_path / "run")
    assert all(signal.getsignal(number) == run._on_signal for number in SIGNALS)
    run.close()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_second_signal_ends_at_once_with_its_own_code(tmp_path):
    run, _ = begin(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        for _ in steps(run):
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not run.folder.last.exists()


def test_where_all_is_on_disk_one_signal_ends_at_once(tmp_path):
    run, model = begin(tmp_path / "run", val_interval=1)
    with pytest.raises(SystemExit) as stopped:
        train(run, model, validate=lambda step: signal.raise_signal(signal.SIGTERM))
    assert stopped.value.code == STOPPED
    run.close()


def test_a_time_limit_saves_and_leaves(tmp_path, monkeypatch, capsys):
    run, model = begin(tmp_path / "run", time_limit=3600.0)
    clock, start = run_module.time.monotonic, run_module.time.monotonic()
    later = {"by": 0.0}
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock() + later["by"])
    with pytest.raises(SystemExit) as stopped:
        for step in steps(run):
            later["by"] = 3700.0 if step == 3 else 0.0
            take(run, model)
    assert stopped.value.code == STOPPED and clock() - start < 600
    assert "after step 3 by --time_limit, all saved" in capsys.readouterr().out
    monkeypatch.undo()
    run, model = begin(tmp_path / "run", time_limit=None)
    assert run.progress.step == 3 == model.weight.item()
    run.close()


def test_validation_is_due_at_its_interval_at_the_end_and_after_a_kill(tmp_path):
    due = []

    def killed(step: int) -> None:
        due.append(step)
        if step == 4:
            raise InterruptedError

    run, model = begin(tmp_path / "run", steps=5, val_interval=2)
    with pytest.raises(InterruptedError):
        train(run, model, validate=killed)
    run.close()
    assert due == [2, 4]
    run, model = begin(tmp_path / "run", steps=5, val_interval=2)
    assert run.progress.step == 4 and run.progress.validated == 2
    train(run, model, validate=due.append)
    assert due == [2, 4, 4, 5] and model.weight.item() == 5
    train(*begin(tmp_path / "run", steps=5, val_interval=2), validate=due.append)
    assert due == [2, 4, 4, 5]


def test_log_lines_hold_means_since_the_last(tmp_path):
    run, model = begin(tmp_path / "run", steps=6, log_interval=3)
    train(run, model)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(3, 2.0), (6, 5.0)]


# Numbers that go wrong.


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, capsys):
    run, model = begin(tmp_path / "run", steps=6)
    for step in steps(run):
        loss = float("nan") if step == 2 else 0.0
        norm = float("inf") if step == 3 else 1.0
        assert take(run, model, loss, norm) == (step not in (2, 3))
    run.close()
    assert model.weight.item() == 4 and run.progress.bad_steps == 0
    rows = list(read_log(tmp_path / "run"))
    assert [row.get("train/skipped_steps") for row in rows] == [None, 1, 2, 2, 2, 2]
    assert [row.get("train/loss") for row in rows] == [1, None, None, 4, 5, 6]
    out = capsys.readouterr().out
    assert "step 2: loss not finite; it is skipped" in out
    assert "step 3: grad_norm not finite; it is skipped, as 2 in a row (--max_bad_steps 3)" in out
    run, model = begin(tmp_path / "run", steps=6)
    assert run.progress.skipped == 2
    run.close()


def test_too_many_in_a_row_end_the_run_at_the_last_good_checkpoint(tmp_path):
    run, model = begin(tmp_path / "run", save_interval=1, val_interval=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    run.folder.components["scaler"] = scaler
    with pytest.raises(
        ValueError, match=r"diverged.*step 6: loss not finite.*last\.pth is of step 3"
    ):
        for step in steps(run):
            take(run, model, float("nan") if step > 3 else 0.0)
    run.close()
    found = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert found["step"] == 6 and found["checkpoint_step"] == 3 and found["seed"] == 0
    assert found["rows"] == Batches(ROWS, run.plan).rows_of(6)
    assert found["scaler"]["scale"] == 0.5
    assert found["values_by_rank"] == [{"loss": ["nan"], "grad_norm": ["1.0"]}]
    content = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert content["step"] == 3 and content["states"]["model"]["weight"].item() == 3


def test_a_stop_among_skipped_steps_is_saved_and_goes_on_counting(tmp_path):
    run, model = begin(tmp_path / "run", save_interval=1, max_bad_steps=4)
    with pytest.raises(SystemExit):
        for step in steps(run):
            if step == 5:
                assert run.folder.saved_step == 3  # from before the steps that are skipped
                signal.raise_signal(signal.SIGTERM)
            take(run, model, float("nan") if step > 3 else 0.0)
    run, model = begin(tmp_path / "run", save_interval=1, max_bad_steps=4)
    assert run.progress.step == 5 and run.progress.bad_steps == 2 and model.weight.item() == 3
    with pytest.raises(ValueError, match=r"step 7.*4 steps in a row"):
        for _ in steps(run):
            take(run, model, float("nan"))
    run.close()


def test_a_good_step_between_forgives(tmp_path):
    run, model = begin(tmp_path / "run", steps=9)
    for step in steps(run):
        take(run, model, 0.0 if step % 3 == 0 else float("nan"))
    assert run.progress.skipped == 6 and run.progress.bad_steps == 0
    run.close()


def test_an_overflow_of_fp16_is_no_error_until_the_scale_is_1(tmp_path):
    run, model = begin(tmp_path / "run", steps=40)
    run.folder.components["scaler"] = scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scales = []
    with pytest.raises(ValueError, match="diverged"):
        for _ in steps(run):
            scaler.scale(weight.sum() * float("inf")).backward()
            scaler.unscale_(optimizer)
            assert not take(run, model, norm=float("inf"))
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
    assert scales == [8, 4, 2, 1, 0.5, 0.25]  # 4 overflows, then 3 that count; the third ends
    assert run.progress.bad_steps == 3
    run.close()


# Images that cannot be read.


def test_an_unreadable_image_is_left_out_within_the_limit(tmp_path, capsys):
    run, model = begin(tmp_path / "run", steps=4, max_bad_images=2)
    for step in steps(run):
        if step in (2, 3):
            run.note_unreadable(torch.tensor([[-1, -1], [5, -1]]))
        take(run, model)
    run.close()
    assert run.progress.bad_images == [5] and run.batches.left_out == {5}
    assert "rows [5] of the table (from 0) cannot be read any more: 1 in all" in (
        capsys.readouterr().out
    )
    run, _ = begin(tmp_path / "run", steps=4, max_bad_images=2)
    assert run.batches_of(ROWS).left_out == {5}
    run.close()


def test_more_unreadable_images_than_the_limit_end_the_run(tmp_path):
    run, model = begin(tmp_path / "run", save_interval=1, max_bad_images=1)
    with pytest.raises(ValueError, match=r"rows \[4, 5\].*2 in all.*--max_bad_images 1.*of step 2"):
        for step in steps(run):
            run.note_unreadable(torch.tensor([4, 5] if step == 3 else [-1, -1]))
            take(run, model)
    run.close()


# Disks.


def full_disk(monkeypatch, names: tuple[str, ...] = ("save_training", "save_model")) -> None:
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in names:
        monkeypatch.setattr(journal, name, fail)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run(tmp_path, monkeypatch, capsys):
    run, model = begin(tmp_path / "run", steps=8, save_interval=2)
    for step in steps(run):
        take(run, model)
        if step == 4:
            full_disk(monkeypatch)
        if step == 5:
            monkeypatch.undo()
            said = capsys.readouterr().out
            assert "last.pth of step 4 could not be written: No space left" in said
            assert "GiB are free. Training goes on." in said and "is of step 2, from before" in said
            assert torch.load(run.folder.last, weights_only=True)["step"] == 2
    run.close()
    assert torch.load(run.folder.last, weights_only=True)["step"] == 8


def test_a_full_disk_at_the_end_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    run, model = begin(tmp_path / "run", steps=3, save_interval=2)
    with pytest.raises(ValueError, match=r"last step is taken but cannot be saved.*of step 2"):
        for step in steps(run):
            take(run, model)
            if step == 3:
                full_disk(monkeypatch)
    run.close()


def test_a_best_snapshot_that_cannot_be_written_is_not_the_best(tmp_path, monkeypatch):
    run, model = begin(tmp_path / "run", steps=9, val_interval=3)
    model.kind, model.config = "x", {}
    losses = {3: 1.0, 6: 2.0, 9: 3.0}

    def validate(step: int) -> None:
        if step == 3:
            full_disk(monkeypatch, ("save_model",))
        if run.progress.improve(losses[step]):
            run.save_best("x_best.pth", model, step=step)
        monkeypatch.undo()

    train(run, model, validate=validate)
    assert torch.load(run.folder.path / "x_best.pth", weights_only=True)["step"] == 6


def test_a_log_that_cannot_be_written_waits_and_loses_no_row(tmp_path, monkeypatch, capsys):
    run, model = begin(tmp_path / "run", steps=4)
    real = open

    def full(path, *args):
        file = real(path, *args)
        if str(path).endswith("metrics.jsonl"):
            file.write('{"step": 2, "tor')
            file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    for step in steps(run):
        take(run, model)
        if step == 2:
            monkeypatch.setattr(journal, "open", full, raising=False)
        if step == 3:
            monkeypatch.undo()
    run.close()
    assert [row["step"] for row in read_log(run.folder.path)] == [1, 2, 3, 4]
    assert "metrics.jsonl: No space left on device; its rows wait" in capsys.readouterr().out


def test_the_log_is_cut_into_parts_and_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "PART", 300)
    run, model = begin(tmp_path / "run", steps=40, save_interval=30)
    train(run, model, until=35)
    parts = journal.log_parts(run.folder.path)
    assert len(parts) > 3
    assert max(path.stat().st_size for path in parts) < 600
    run, model = begin(tmp_path / "run", steps=40, save_interval=30)
    assert [row["step"] for row in read_log(run.folder.path)] == list(range(1, 31))
    train(run, model)
    assert [row["step"] for row in read_log(run.folder.path)] == list(range(1, 41))


def test_tensorboard_has_one_file_with_all_rows_however_often_it_was_resumed(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in 2, 4, 6:
        train(*begin(tmp_path / "run", steps=steps))
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_the_last_n_checkpoints_are_kept_and_can_be_gone_back_to(tmp_path):
    more = {"steps": 10, "save_interval": 2, "val_interval": 4, "keep_last": 3}
    run, model = begin(tmp_path / "run", **more)
    train(run, model)
    names = sorted(path.name for path in run.folder.path.glob("*.pth"))
    assert names == ["last.pth", "step_0000006.pth", "step_0000008.pth"]
    shutil.copy(run.folder.path / "step_0000006.pth", run.folder.last)
    run, model = begin(tmp_path / "run", **more)
    assert run.progress.step == 6 == model.weight.item()
    train(run, model)
    assert model.weight.item() == 10


def test_two_processes_cannot_train_in_one_folder(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    hold = f"import fcntl, time; f = open({str(folder / '.lock')!r}, 'w'); "
    hold += "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    folder.mkdir()
    monkeypatch.setattr(journal, "FREED", 0.3)
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"run: another process is training in it"):
            begin(folder)
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "samples"]
        monkeypatch.setattr(journal, "FREED", 30)
        other.kill()  # its lock goes with it
        run, _ = begin(folder)
        run.close()


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its last.pth lacks what was not counted then."""
    run, model = begin(tmp_path / "run", steps=2)
    train(run, model)
    content = torch.load(run.folder.last, weights_only=True)
    older = {name: value for name, value in content.items() if name != "skipped"}
    save(run.folder.last, older)
    run, model = begin(tmp_path / "run", steps=3)
    assert run.progress.step == 2 and run.progress.skipped == 0
    run.close()
    del older["step"]
    save(run.folder.last, older)
    with pytest.raises(ValueError, match=r"last\.pth: step is missing in it"):
        begin(tmp_path / "run", steps=3)


def test_what_is_not_compared_of_the_lineage_stays_as_it_was(tmp_path):
    """Files that became unreadable are not what they were; the rest of the run goes on as such."""
    train(*begin(tmp_path / "run", steps=2))
    for unchecked in [], ["label_csv"]:
        settings = options(save_dir=str(tmp_path / "run"), steps=3)
        run = Run(tmp_path / "run", Plan.of(settings), CPU, settings)
        components = {"model": nn.Linear(1, 1, bias=False)}
        if not unchecked:
            with pytest.raises(ValueError, match="SHA-256 of its label_csv"):
                run.resume("train_x", components, {"label_csv": "b" * 64})
            continue
        run.resume("train_x", components, {"label_csv": "b" * 64}, unchecked)
        train(run, components["model"])
    last = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert last["lineage"] == {"label_csv": "a" * 64} and last["step"] == 3


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    train(*begin(tmp_path / "run", steps=2))
    (tmp_path / "run" / ".tmp_x_best.pth").write_bytes(b"half")
    run, _ = begin(tmp_path / "run", steps=2)
    run.close()
    assert not (tmp_path / "run" / ".tmp_x_best.pth").exists()


# Preflight.


def rehearsed(folder, trouble=None, **changed) -> tuple[Run, nn.Module, list]:
    """A run after its preflight, in which a step or a validation may have trouble."""
    run, model = begin(folder, **{"no_preflight": False, **changed})
    model.kind, model.config, seen = "x", {}, []

    def validate(step: int) -> None:
        seen.append((step, run.rehearsing))
        run.picture(step, lambda path: path.write_bytes(b"drawn"))
        run.log(step, {"loss": 1.0}, "val")
        assert run.progress.improve(1.0)
        run.save_best("x_best.pth", model)
        if isinstance(trouble, Exception):
            raise trouble

    trial = steps(run, validate)
    next(trial)
    take(run, model, loss=float("nan") if trouble == "nan" else 0.0)
    next(trial, None)
    return run, model, seen


@pytest.mark.parametrize("outcome", ["fine", "nan"])
def test_a_preflight_takes_a_step_and_undoes_it(tmp_path, outcome, capsys):
    run, model, seen = rehearsed(tmp_path / "run", outcome, steps=3)
    assert seen == [(1, True)] and not run.rehearsing
    assert "preflight: a step, a validation and a checkpoint of" in capsys.readouterr().out
    assert model.weight.item() == 0 and run.progress == Progress()
    names = {".lock", "args.json", "samples", "tensorboard"}
    assert {path.name for path in run.folder.path.iterdir()} == names
    assert not any((run.folder.path / "samples").iterdir())
    run.close()
    run, model = begin(tmp_path / "run", steps=3)
    train(run, model)
    assert [row["train/loss"] for row in read_log(run.folder.path)] == [1, 2, 3]
    run, model, seen = rehearsed(tmp_path / "run", steps=5)
    assert seen == [(4, True)] and model.weight.item() == 3  # also before a run goes on
    run.close()
    assert rehearsed(tmp_path / "run", steps=5, no_preflight=True)[2] == []


def test_a_preflight_that_fails_leaves_no_run_behind(tmp_path):
    with pytest.raises(ValueError, match="metrics"):
        rehearsed(tmp_path / "run", ValueError("metrics"), steps=3)
    run, _ = begin(tmp_path / "run", steps=3, lr=0.5)  # other settings are free to try
    assert not (run.folder.path / ".preflight").exists() and not list(run.folder.path.glob("*.pth"))
    run.close()


def test_a_disk_that_is_full_in_a_preflight_is_an_error(tmp_path, monkeypatch):
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        rehearsed(tmp_path / "run", steps=3)
    assert not (tmp_path / "run" / ".preflight").exists()


def test_a_dry_run_ends_after_the_preflight(tmp_path, capsys):
    for no_preflight in False, True:
        with pytest.raises(SystemExit) as ended:
            rehearsed(tmp_path / "run", steps=3, dry_run=True, no_preflight=no_preflight)
        assert ended.value.code == 0
        assert "preflight: a step, a validation" in capsys.readouterr().out
        assert not list((tmp_path / "run").glob("*.pth"))
    train(*begin(tmp_path / "run", steps=3))
    with pytest.raises(SystemExit):
        rehearsed(tmp_path / "run", steps=4, dry_run=True)
    assert logged(tmp_path / "run") == [1, 2, 3]


def test_a_warm_up_is_a_step_that_is_not_taken(tmp_path):
    """Nor does it count as one without an overflow, after which fp16 is scaled up."""
    run, model = begin(tmp_path / "run", steps=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    run.folder.components["scaler"] = scaler
    run.batches_of(ROWS)
    for step, _ in run._warm_up(itertools.count):
        scaler.scale(model.weight.sum()).backward()
        scaler.unscale_(optimizer := torch.optim.SGD(model.parameters(), lr=1.0))
        assert step == 1 and not take(run, model)
        scaler.update()
        optimizer.zero_grad()
    assert model.weight.item() == 0 and run.progress == Progress()
    assert scaler.state_dict()["scale"] == 4.0 and take(run, model)
    run.close()


def test_a_preflight_needs_room_for_what_will_be_kept(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(journal.shutil, "disk_usage", lambda _: usage(10**6, 0, 4000))
    with pytest.raises(ValueError, match=r"GiB are free, but checkpoints of .* --keep_last"):
        rehearsed(tmp_path / "run", keep_last=5)
    assert not list((tmp_path / "run").glob("*.pth"))


# Best.


def test_best_is_remembered(tmp_path):
    run, model = begin(tmp_path / "run", steps=2)
    assert [run.progress.improve(loss) for loss in (3.0, 2.0, 2.5, float("nan"), 1.5)] == [
        *(True, True, False, False, True)
    ]
    train(run, model)
    run, _ = begin(tmp_path / "run", steps=2)
    assert not run.progress.improve(1.6) and run.progress.improve(1.4)
    run.close()


def test_a_snapshot_that_copies_gives_way_to_one_that_does_not(tmp_path):
    run, _ = begin(tmp_path / "run")
    found = [
        run.progress.improve(*args)
        for args in ((2.0, True), (3.0, False), (1.0, True), (2.9, False))
    ]
    assert found == [True, True, False, True]
    run.close()


def test_patience_ends_a_run_and_the_same_command_goes_no_further(tmp_path):
    """A worse validation is forgiven by a better one; after that two worse ones follow."""
    for _ in range(2):
        run, model = begin(tmp_path / "run", val_interval=2, patience=2, steps=20)
        losses = {2: 2.0, 4: 2.5, 6: 1.0, 8: 1.5, 10: 1.2, 12: 0.1}
        train(run, model, validate=lambda step: run.progress.improve(losses[step]))
        assert run.progress.step == 10 and run.progress.best == 1.0
        assert model.weight.item() == 10
    for never in 0, -1:
        run, model = begin(tmp_path / "run", val_interval=2, patience=never, steps=20)
        assert next(steps(run)) == 11
        run.close()
