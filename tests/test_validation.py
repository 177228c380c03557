"""What training is told of: realism, contours, samples that are copies, a VAE that goes wrong."""

import argparse
import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from images import pixel_networks, slices

from fibldm import features, validation
from fibldm.checkpoint import load_model
from fibldm.encoding import LatentDataset
from fibldm.metrics import set_score
from fibldm.optim import Precision
from fibldm.phantom import phantom_slice
from fibldm.scheduler import CosineScheduler
from fibldm.vae import VAE
from fibldm.validation import (
    Validation,
    heldout_latents,
    input_warnings,
    latent_warnings,
    moments,
    read_privacy,
    reconstruction_warnings,
)

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
    images = data.table["image"]
    assert all(images[row] != images[other] for row, other in validation.other.items())
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


# Each failure of a VAE's training is named with its remedy, and a healthy one is not.


def test_a_collapsed_channel_is_named():
    std, noise = torch.tensor([1.0, 0.01, 2.0]), torch.tensor([0.1, 1.0, 0.5])
    (warning,) = latent_warnings(std, noise)
    assert "[1]" in warning and "collapsed" in warning and "--kl_weight" in warning
    (warning,) = latent_warnings(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.1]))
    assert "[0]" in warning


def test_an_exploding_latent_scale_is_named():
    (warning,) = latent_warnings(torch.tensor([1.0, 500.0]), torch.tensor([0.1, 0.1]))
    assert "500" in warning and "explodes" in warning and "--lr" in warning


def test_nan_is_named_as_divergence_alone():
    nan = float("nan")
    (warning,) = latent_warnings(torch.tensor([nan, 1.0]), torch.tensor([0.1, 0.1]))
    assert "diverged" in warning and "--lr" in warning
    (warning,) = reconstruction_warnings(nan, 1.0)
    assert "diverged" in warning


def test_a_healthy_latent_is_not_named():
    assert latent_warnings(torch.tensor([0.3, 1.0, 4.0]), torch.tensor([0.1, 0.2, 1.0])) == []


@pytest.mark.parametrize(("brightness", "word"), [(-0.1, "darker"), (0.1, "brighter")])
def test_another_brightness_is_named(brightness, word):
    (warning,) = reconstruction_warnings(brightness, 1.0)
    assert word in warning and "5.0%" in warning


def test_flat_reconstructions_are_named():
    (warning,) = reconstruction_warnings(0.0, 0.5)
    assert "flatter" in warning and "0.50" in warning and "--kl_weight" in warning
    assert reconstruction_warnings(0.005, 0.97) == []


def test_inputs_that_are_not_hu_are_named():
    slices = {f"{i}.png": phantom_slice(i, 0.5, 128)[0] for i in range(4)}
    assert input_warnings(slices) == []
    slices["2.png"] = (slices["2.png"] + 1000) / 3000  # normalized: no HU
    (warning,) = input_warnings(slices)
    assert "1 of 4" in warning and "2.png" in warning and "check_data.py" in warning
    assert "rescale_slope" not in warning  # one slice is bad, not the scale of all
    (warning,) = input_warnings({name: (hu + 1000) / 3000 for name, hu in slices.items()})
    assert "4 of 4" in warning and "rescale_slope" in warning


def test_moments_are_those_of_numpy():
    values = np.random.default_rng(0).normal(3, 2, (5, 1000))
    sums = torch.from_numpy(np.stack([values.sum(1), (values**2).sum(1)]))
    mean, std = moments(sums, 1000)
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-5)
    np.testing.assert_allclose(std, values.std(1), rtol=1e-5)


def test_heldout_latents_reports_the_worst_channel():
    train = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])
    assert heldout_latents(train, train) == {"latent_mean": 0.0, "latent_variance": 1.0}
    found = heldout_latents(train, (torch.tensor([0.1, 0.0]), torch.tensor([1.1, 1.0])))
    assert found["latent_mean"] == pytest.approx(-0.5)
    assert found["latent_variance"] == pytest.approx(0.25)


# Realism, with a stand-in for Inception, so that it is tested without weights too.


def realism_of(*real: torch.Tensor) -> validation.Realism:
    realism = validation.Realism(CPU, real)
    realism.networks = pixel_networks()
    realism.networks.lpips = None
    realism.real = validation.everywhere([realism.networks.features(images) for images in real])
    return realism


def test_real_slices_are_seen_once_and_samples_are_forgotten():
    real, fake = slices(6, seed=0, size=64), slices(5, seed=1, size=64)
    realism = realism_of(real[:4], real[4:])
    realism.add(fake[:2], real[:2])
    realism.add(fake[2:])
    first = realism.compute()
    assert set(first) == {"fid", "kid", "ssim", "n_real", "n_fake"}
    assert (first["n_real"], first["n_fake"]) == (6, 5)
    expected = features.reconstruction_metrics(real[:2], fake[:2])["ssim"].mean()
    assert first["ssim"] == pytest.approx(float(expected), abs=1e-6)
    realism.add(fake, real[:5])
    second = realism.compute()
    assert all(second[name] == first[name] for name in ("fid", "kid"))
    assert realism.networks.inception.seen == 6 + 5 + 5


def test_validation_and_the_report_have_the_same_fid_and_kid():
    real, fake = slices(40, seed=0, size=64), slices(30, seed=1, size=64)
    realism = realism_of(real)
    realism.add(fake)
    found, networks = realism.compute(), pixel_networks()
    seen = [networks.features(images) for images in (real, fake)]
    owners = [[str(i) for i in range(len(images))] for images in (real, fake)]
    for name in ("fid", "kid"):
        assert found[name] == set_score(name, *seen, *owners, CPU, "pixels", draws=2).value


def test_too_few_images_give_no_number():
    assert realism_of().compute() == {"n_real": 0, "n_fake": 0}
    realism = realism_of(slices(4, seed=0, size=64))
    realism.add(slices(1, seed=1, size=64))
    assert realism.compute() == {"n_real": 4, "n_fake": 1}


def test_without_weights_there_is_ssim():
    real, fake = slices(3, seed=0, size=64), slices(3, seed=1, size=64)
    realism = validation.Realism(CPU, [real])
    assert set(realism.networks.missing) == {"fid", "kid", "lpips"}
    realism.add(fake[:2], real[:2])
    assert set(realism.compute()) == {"ssim", "n_real", "n_fake"}


def shared_run(rank: int, world: int, folder: str) -> None:
    """One rank of two, with 5 of 7 real slices and 2 of 6 samples, then with none of them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    real, fake, paired = (slices(n, seed=i, size=64) for i, n in enumerate((7, 6, 6)))
    of_real, of_fake = [slice(0, 5), slice(5, 7)][rank], [slice(0, 2), slice(2, 6)][rank]
    realism = realism_of(real[of_real])
    realism.add(fake[of_fake], paired[of_fake])
    first = realism.compute()
    if rank == 0:
        realism.add(fake)
    torch.save([first, realism.compute()], f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # no process leaves while another still talks to it
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    run = torch.multiprocessing.spawn(shared_run, (2, str(tmp_path)), nprocs=2, join=False)
    for process in run.processes:
        process.join()
    files = [tmp_path / f"{rank}.pt" for rank in (0, 1)]
    if not all(file.is_file() for file in files):
        run.join()  # raises what went wrong; one that gloo aborts as it leaves did its work
    found = [torch.load(file, weights_only=True) for file in files]
    assert found[0] == found[1]
    real, fake, paired = (slices(n, seed=i, size=64) for i, n in enumerate((7, 6, 6)))
    realism = realism_of(real)
    realism.add(fake, paired)
    alone = realism.compute()
    assert set(alone) == {"fid", "kid", "ssim", "n_real", "n_fake"}
    assert found[0][0] == pytest.approx(alone, rel=1e-6)
    alone.pop("ssim")
    assert found[0][1] == pytest.approx(alone, rel=1e-6)


def test_copies_are_looked_for_in_a_fixed_sample_of_training_rows(data, validate, monkeypatch):
    """However many there are, so that neither a start nor a validation takes ever longer."""
    train = data.indices("train")
    whole = validate().privacy
    assert len(whole.patients) == len(train) > 6
    monkeypatch.setattr(validation, "TRAINING_ROWS", 6)
    few = validate().privacy
    assert len(few.patients) == 6 and len(few.latents) == 6
    assert len({*few.patients}) == min(6, len({*whole.patients}))
    match = few.nearest(None, few.latents[2:3])[0]
    assert match.flagged and match.row == 2
    assert few.heldout_patients.tolist() == whole.heldout_patients.tolist()
    assert len(read_privacy(data).patients) == len(train)  # complete, for sample.py
