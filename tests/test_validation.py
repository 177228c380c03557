"""What the diffusion stages are told of: realism, contours that are followed, copied patients."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from images import pixel_networks, slices
from torch import Tensor

from fibldm import features, synthesis, validation
from fibldm.batches import Plan, Progress
from fibldm.checkpoint import load_model
from fibldm.encoding import LatentDataset
from fibldm.metrics import set_score
from fibldm.privacy import read_privacy
from fibldm.scheduler import CosineScheduler
from fibldm.synthesis import Synthesizer
from fibldm.unet import UNet
from fibldm.vae import VAE
from fibldm.validation import Validation

pytestmark = pytest.mark.usefixtures("without_weights")
CPU = torch.device("cpu")
SCHEDULER = CosineScheduler()


class FakeRun:
    """Remembers what it was told."""

    device, rehearsing = CPU, False

    def __init__(self, folder: Path, **planned: int) -> None:
        self.folder, self.values, self.progress = folder, {}, Progress()
        self.plan = Plan(**{"steps": 10, "batch_size": 2000, **planned})

    def log(self, step: int, values: dict[str, float], prefix: str) -> None:
        self.values = values

    def picture(self, step: int, write: Callable[[Path], None]) -> None:
        write(self.folder / f"{step}.png")


@pytest.fixture
def data(stages) -> LatentDataset:
    return LatentDataset(stages / "latents")


@pytest.fixture
def said(capsys) -> Callable[[], list[str]]:
    """What was printed since the last call, but of metrics without weights."""
    return lambda: [x for x in capsys.readouterr().out.splitlines() if "is left out" not in x]


@pytest.fixture
def validate(stages, data, tmp_path):
    """Validation of a run by such a plan: a function of it."""

    def make(max_copies: float = 0.02, **planned: int) -> Validation:
        vae, _ = load_model(stages / "vae" / "vae_best.pth", VAE)
        unet, _ = load_model(stages / "unet" / "unet_best.pth", UNet)
        model = Synthesizer(vae, unet, classes=data.classes, window=data.window)
        return Validation(data, model, FakeRun(tmp_path, **planned), 8, 4, max_copies)

    return make


@pytest.fixture
def denoise(monkeypatch):
    """Let all be denoised by an oracle, a function of contours and x; a function of it."""

    def use(oracle: Callable[[Tensor, Tensor], Tensor]) -> None:
        asked = []

        def make_denoiser(unet, controlnet=None, contour=None, label=None):
            if contour is not None:
                asked.append(contour)  # guidance has no other way to go than these
            contour = asked[-1]
            return lambda x, t: SCHEDULER.v_from_x0(x, oracle(contour, x), t)

        def make_pair(*asked):
            denoiser = make_denoiser(*asked)
            return lambda x, t: (denoiser(x, t), denoiser(x, t))

        for module in validation, synthesis:
            monkeypatch.setattr(module, "make_denoiser", make_denoiser)
        monkeypatch.setattr(synthesis, "make_pair", make_pair)

    return use


def knows_x0(data: LatentDataset, rows: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """An oracle that knows each row's latent by its contour."""
    known = {data.contours[row].tobytes(): torch.from_numpy(data.latents[row]) for row in rows}
    return lambda contours, x: torch.stack([known[np.asarray(c).tobytes()] for c in contours])


def gives(latent: np.ndarray) -> Callable[[Tensor, Tensor], Tensor]:
    """An oracle that gives one latent to all contours."""
    return lambda contours, x: torch.from_numpy(latent).expand_as(x)


def test_the_gap_tells_a_model_that_looks_at_contours_from_one_that_does_not(
    data, validate, denoise
):
    measured = validate()
    rows = measured.rows
    assert len({data.contours[row].tobytes() for row in rows}) == len(rows) > 3
    images = data.table["image"]
    pairs = zip(rows, measured.others, strict=True)
    assert all(images[row] != images[other] for row, other in pairs)
    denoise(gives(data.latents[rows[0]]))
    blind = measured.loss(measured.own)
    assert blind["contour_gap"] == 0 and blind["loss"] > 0.01
    denoise(knows_x0(data, rows))
    exact = measured.loss(measured.own)
    assert exact["loss"] < 1e-6 and exact["contour_gap"] > 1e3


def test_the_loss_is_of_timesteps_for_equal_shares_of_those_of_training(validate):
    measured = validate()
    found = measured.loss(measured.own)
    levels = [int(name.removeprefix("loss_t")) for name in found if name.startswith("loss_t")]
    assert found["loss"] == pytest.approx(np.mean([found[f"loss_t{t}"] for t in levels]))
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = SCHEDULER.training_timesteps(uniform)
    below = [float((drawn < level).double().mean()) for level in levels]
    np.testing.assert_allclose(below, (np.arange(8) + 0.5) / 8, atol=0.015)


def test_samples_are_those_of_the_synthesizer_with_guidance(data, validate):
    """Sample i of validation is sample i of the library, for the same contours and seed."""
    measured, pictures = validate(), []
    measured.realism.add = lambda images, real: pictures.append(images[:, 0].numpy())
    measured.samples(measured.own, 3)
    labels = [data.table["label"][row] for row in measured.rows]
    expected = list(measured.synthesizer.sample(data.contours[measured.rows], labels, steps=4))
    assert len(expected) == len(measured.rows) == len(pictures[0])
    for found, sample in zip(pictures[0], expected, strict=True):
        np.testing.assert_allclose(found, sample.image, atol=1e-4)


def test_samples_of_held_out_patients_are_no_copies_and_those_of_training_slices_are(
    data, validate, said, denoise
):
    measured = validate()
    run = measured.run
    denoise(knows_x0(data, measured.rows))
    assert measured.measure(5)
    assert run.values["copies"] == 0 and not run.progress.copies
    assert run.values["distance_to_training"] == pytest.approx(1, abs=0.5)
    assert not any("memorizes" in line for line in said())
    assert (run.folder / "5.png").is_file()

    denoise(gives(data.latents[data.indices("train")[0]]))
    assert not measured.measure(6)
    assert run.values["copies"] == 1 and run.values["distance_to_training"] < 0.05
    (warning,) = [line for line in said() if "memorizes" in line]
    assert "100% of the samples" in warning
    assert run.progress.worse == 1 and not run.progress.copies


def test_copies_are_counted_by_the_class_that_was_asked_for(data, validate, said, denoise):
    """All of one class: those samples copy a training slice, the others are held-out slices."""
    measured = validate()
    labels = [data.table["label"][row] for row in measured.rows]
    assert set(labels) == {"fibrosis", "normal"}
    known = {
        data.contours[row].tobytes(): torch.from_numpy(data.latents[row]) for row in measured.rows
    }
    for row, label in zip(measured.rows, labels, strict=True):
        if label == "fibrosis":
            copied = data.latents[data.indices("train")[0]]
            known[data.contours[row].tobytes()] = torch.from_numpy(copied)
    denoise(lambda contours, x: torch.stack([known[np.asarray(c).tobytes()] for c in contours]))
    measured.measure(3)
    values = measured.run.values
    assert (values["copies_fibrosis"], values["copies_normal"]) == (1, 0)
    assert values["copies"] == pytest.approx(labels.count("fibrosis") / len(labels))
    assert "(fibrosis 100%, normal 0%)" in next(line for line in said() if "memorizes" in line)


def test_max_copies_is_what_the_user_says(data, validate, denoise):
    denoise(gives(data.latents[data.indices("train")[0]]))
    assert validate(max_copies=1.0).measure(1)


def test_a_rehearsal_measures_a_few_and_says_and_remembers_nothing(data, validate, said, denoise):
    measured = validate()
    measured.run.rehearsing = True
    said()
    denoise(gives(data.latents[data.indices("train")[0]]))
    assert measured.measure(1)
    assert said() == [] and measured.run.values == {}
    assert measured.run.progress == Progress()


def test_the_step_at_which_contours_are_followed_is_said_once(
    data, validate, said, denoise, monkeypatch
):
    measured = validate()
    denoise(knows_x0(data, measured.rows))
    found = iter([0.5, 0.97, 0.98])
    monkeypatch.setattr(validation, "dice", lambda images, *_: np.full(len(images), next(found)))
    measured.real_dice = 1.0
    for step in 1, 2, 3:
        measured.measure(step)
    lines = [line for line in said() if "follow their contours" in line]
    assert len(lines) == 1 and "at step 2: Dice 0.970, 1.000" in lines[0]
    assert measured.run.progress.followed == 2


def test_control_that_was_not_learnt_is_warned_of_at_the_end(
    data, validate, said, denoise, monkeypatch
):
    measured = validate(patience=3)
    denoise(knows_x0(data, measured.rows))
    monkeypatch.setattr(validation, "dice", lambda images, *_: np.full(len(images), 0.5))
    measured.real_dice = 1.0
    measured.measure(9)
    assert not said()
    measured.measure(10)
    assert "after 10 steps the samples do not follow their contours: Dice 0.500" in said()[0]
    measured.run.progress.best, measured.run.progress.worse = 0.0, 2
    measured.measure(7)
    assert "after 7 steps" in said()[0]


def test_too_few_slices_are_warned_of_before_the_start(validate, said):
    validate()
    assert said() == []
    validate(batch_size=10)
    assert "--steps 10 of --batch_size 10 are 100 slices" in said()[0]


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
        assert found[name] == set_score(name, *seen, *owners, CPU, "pixels").value


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
