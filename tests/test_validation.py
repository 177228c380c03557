"""What training is told of: whether contours are followed, and whether samples are copies."""

import argparse
import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fibldm.checkpoint import load_model
from fibldm.encoding import LatentDataset
from fibldm.optim import Precision
from fibldm.scheduler import CosineScheduler
from fibldm.vae import VAE
from fibldm.validation import Validation

pytestmark = pytest.mark.usefixtures("without_weights")
CPU = torch.device("cpu")
SCHEDULER = CosineScheduler()


class FakeRun:
    """Remembers what it was told."""

    def __init__(self, folder) -> None:
        self.folder, self.lines, self.values = folder, [], {}
        self.progress = {"followed": 0, "worse": 0}
        self.asked: list[tuple[float, bool]] = []

    def say(self, text: str) -> None:
        if "is left out" not in text:  # metrics without weights
            self.lines.append(text)

    def warn(self, warnings: list[str]) -> None:
        self.lines += warnings

    def log(self, step: int, values: dict[str, float], prefix: str) -> None:
        self.values = values

    def picture(self, *_: object) -> None:
        pass

    def keep_going(self, path: Path) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def is_best(self, loss: float, copies: bool) -> bool:
        self.asked.append((loss, copies))
        return not copies


@pytest.fixture
def data(stages) -> LatentDataset:
    return LatentDataset(stages / "latents")


@pytest.fixture
def run(tmp_path) -> FakeRun:
    return FakeRun(tmp_path)


@pytest.fixture
def validate(stages, data, run):
    """Validation by these options: a function of them."""

    def make(**options: object) -> Validation:
        values = {"val_samples": 8, "val_sampling_steps": 4, "steps": 10, "batch_size": 2000}
        values |= {"patience": 0}
        args = argparse.Namespace(**{**values, "max_copies": 0.02, **options})
        vae, _ = load_model(stages / "vae" / "vae_best.pth", VAE)
        return Validation(data, vae, SCHEDULER, args, Precision("fp32", CPU), run)

    return make


def knows_x0(data: LatentDataset, rows: list[int], blind: bool = False):
    """Denoisers that know each row's latent by its contour, or, blind, give row 0's to all."""
    keys = {
        data.contours[row].tobytes(): torch.from_numpy(data.latents[row].copy()) for row in rows
    }

    def steer(contours, labels):
        known = [keys[np.asarray(contour).tobytes()] for contour in contours]
        x0 = torch.stack(
            [torch.from_numpy(data.latents[rows[0]].copy())] * len(known) if blind else known
        )
        return lambda x, t: SCHEDULER.v_from_x0(x, x0, t)

    return steer


def test_the_gap_tells_a_model_that_looks_at_contours_from_one_that_does_not(data, validate):
    validation = validate()
    rows = validation.rows
    assert len({data.contours[row].tobytes() for row in rows}) == len(rows) > 3
    assert all(data.rows[row] != data.rows[other] for row, other in validation.other.items())
    blind = validation.loss(knows_x0(data, rows, blind=True))
    assert blind["contour_gap"] == 0 and blind["loss"] > 0.01
    exact = validation.loss(knows_x0(data, rows))
    assert exact["loss"] < 1e-6 and exact["contour_gap"] > 1e3


def test_samples_of_held_out_patients_are_no_copies_and_those_of_training_slices_are(
    data, validate, run
):
    validation = validate()
    best = validation.measure(knows_x0(data, validation.rows), run, 5)
    assert best and run.values["copies"] == 0
    assert run.values["distance_to_training"] == pytest.approx(1, abs=0.5)
    assert not any("memorizes" in line for line in run.lines)

    train = data.indices("train", views=False)
    copied = torch.from_numpy(data.latents[train[0]].copy())

    def copy(contours, labels):
        return lambda x, t: SCHEDULER.v_from_x0(x, copied.expand_as(x), t)

    assert not validation.measure(copy, run, 6)
    assert run.values["copies"] == 1 and run.values["distance_to_training"] < 0.05
    assert "100% of the samples" in run.lines[-1] and "memorizes" in run.lines[-1]
    assert [copies for _, copies in run.asked] == [False, True]


def test_max_copies_is_what_the_user_says(data, validate, run):
    copied = torch.from_numpy(data.latents[data.indices("train")[0]].copy())

    def copy(contours, labels):
        return lambda x, t: SCHEDULER.v_from_x0(x, copied.expand_as(x), t)

    assert validate(max_copies=1.0).measure(copy, run, 1)


def test_the_step_at_which_contours_are_followed_is_said_once(data, validate, run, monkeypatch):
    validation = validate()
    found = iter([0.5, 0.97, 0.98])
    monkeypatch.setattr(
        "fibldm.validation.dice", lambda images, *_: np.full(len(images), next(found))
    )
    validation.real_dice = 1.0
    for step in 1, 2, 3:
        validation.measure(knows_x0(data, validation.rows), run, step)
    said = [line for line in run.lines if "follow their contours" in line]
    assert len(said) == 1 and "at step 2: Dice 0.970, 1.000" in said[0]
    assert run.progress["followed"] == 2


def test_control_that_was_not_learnt_is_warned_of_at_the_end(data, validate, run, monkeypatch):
    validation = validate()
    monkeypatch.setattr("fibldm.validation.dice", lambda images, *_: np.full(len(images), 0.5))
    validation.real_dice = 1.0
    validation.measure(knows_x0(data, validation.rows), run, 9)
    assert not run.lines
    validation.measure(knows_x0(data, validation.rows), run, 10)
    assert "after 10 steps the samples do not follow their contours: Dice 0.500" in run.lines[0]
    run.progress["worse"], validation.args.patience = 3, 3
    validation.measure(knows_x0(data, validation.rows), run, 7)
    assert "after 7 steps" in run.lines[1]


def test_too_few_slices_are_warned_of_before_the_start(validate, run):
    validate()
    assert run.lines == []
    validate(batch_size=10)
    assert "--steps 10 of --batch_size 10 are 100 slices" in run.lines[0]
