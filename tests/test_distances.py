"""Distances of sets of features, and their errors, against other libraries and by simulation."""

import numpy as np
import pytest
import torch
from images import CPU
from scipy import linalg
from torch.utils._python_dispatch import TorchDispatchMode

from fibldm import disk, distances
from fibldm.distances import among, frechet_distance, frechet_estimate, kernel_estimate, on_device


def names(count: int, each: int = 1, kind: str = "p") -> list[str]:
    return [f"{kind}{i // each}" for i in range(count)]


def known_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The closed form by scipy's matrix root."""
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    means = np.square(x.mean(0) - y.mean(0)).sum()
    return means + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)


@pytest.mark.parametrize("counts", [(5, 8), (50, 6), (40, 60)])
def test_distance_of_features_is_that_of_their_gaussians(counts, tmp_path):
    generator = np.random.default_rng(1)
    a, b = (generator.standard_normal((n, 16)) + n / 50 for n in counts)
    found = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert float(found) == pytest.approx(known_frechet(a, b), rel=1e-6)
    assert float(frechet_distance(torch.from_numpy(a), torch.from_numpy(a))) < 1e-9
    stored = disk.create_rows(tmp_path / "a.npy", np.float32, a.shape)
    stored[:] = a
    torch.testing.assert_close(on_device(stored, CPU), torch.from_numpy(a).float())


def test_kid_is_torchmetrics_and_leaves_out_pairs_of_one_patient(monkeypatch):
    from torchmetrics.image.kid import poly_mmd

    monkeypatch.setattr(distances, "BLOCK", 16)
    generator = np.random.default_rng(1)
    x, y = (torch.from_numpy(generator.standard_normal((40, 8))) + i / 2 for i in (0, 1))
    known = float(poly_mmd(x, y))
    assert kernel_estimate(x, y, names(40), names(40)).value == pytest.approx(known, rel=1e-9)
    # Ten equal slices of each patient are the patient: no distance arises from their likeness.
    ten = x.repeat_interleave(10, 0)
    found = kernel_estimate(ten, y, names(400, 10), names(40))
    once = kernel_estimate(x, y, names(40), names(40))
    assert found.value == pytest.approx(once.value) and found.error == pytest.approx(once.error)
    assert kernel_estimate(ten, y, names(400), names(40)).value > known + 0.01
    monkeypatch.setattr(distances, "GROUPS", 10)  # many owners: by groups, unbiased all the same
    assert kernel_estimate(x, y, names(40), names(40)).value == pytest.approx(known, abs=0.15)


class Waits(TorchDispatchMode):
    """Counts what one waits for a GPU for: numbers that are read, shapes that hang on values."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        slow = ("_local_scalar_dense", "nonzero", "masked_select")
        self.count += any(name in str(function) for name in slow)
        return function(*args, **(kwargs or {}))


def test_no_number_is_read_before_all_are_there():
    real, fake = torch.randn(40, 8), torch.randn(30, 8)
    with Waits() as waits:
        kernel_estimate(real, fake, names(40), names(30))
        frechet_estimate(real, fake, names(40), names(30))
        among(real, fake, names(40), names(30))
        assert waits.count == 0
        float(real.sum())
        assert waits.count == 1


@pytest.mark.parametrize("shift", [0.0, 0.6])
@pytest.mark.parametrize("each", [1, 10])
def test_the_interval_of_kid_covers(shift, each):
    """Of other sets in 92 to 97 %; of equal ones at least so."""
    generator, found = np.random.default_rng(0), []
    for _ in range(300):
        sides = []
        for patients, mean in ((20, 0.0), (30, shift)):
            own = generator.normal(mean, 1, (patients, 1, 6))
            slices = own + generator.normal(0, 0.3, (patients, each, 6))
            sides.append(torch.from_numpy(slices.reshape(-1, 6)))
        owners = names(20 * each, each), names(30 * each, each)
        one = kernel_estimate(*sides, *owners)
        found.append((one.value, *one.interval()))
    value, low, high = np.array(found).T
    truth = value.mean() if shift else 0.0
    share = ((low <= truth) & (truth <= high)).mean()
    assert 0.92 <= share <= (0.97 if shift else 1.0)
    assert abs(value.mean()) < 0.1 or shift


def test_the_interval_of_fid_holds_what_as_many_images_have():
    generator, found = np.random.default_rng(0), []
    for _ in range(100):
        sides = [torch.from_numpy(generator.normal(i / 2, 1, (40, 12))) for i in (0, 1)]
        one = frechet_estimate(*sides, names(40), names(40))
        found.append((one.value, *one.interval()))
    value, low, high = np.array(found).T
    assert 0.88 <= ((low <= value.mean()) & (value.mean() <= high)).mean() <= 1
    alone = frechet_estimate(*sides, ["p"] * 40, names(40))
    assert alone.value == value[-1] and np.isnan(alone.error)


def test_balls_are_those_of_torch_fidelity():
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    generator = np.random.default_rng(2)
    real = torch.from_numpy(generator.standard_normal((60, 4)))
    fake = torch.from_numpy(generator.standard_normal((50, 4))) + 1
    known = calculate_precision_recall_full(fake, real)[0]
    inside = distances.within_balls(torch.cat([real, fake]), torch.arange(60))
    assert float(inside[:, 60:].any(0).double().mean()) == pytest.approx(known)


def test_precision_and_recall_tell_modes():
    generator = np.random.default_rng(3)
    real = torch.from_numpy(generator.standard_normal((80, 4)))
    real[:40] += 100  # a mode that samples lack
    fake = real[40:] + 0.01
    precision = among(real, fake, names(80), names(40))
    assert precision.value.value > 0.8 and precision.difference.value > -0.1
    recall = among(fake, real, names(40), names(80))
    assert recall.value.value < 0.55 and recall.difference.value < -0.3
    one = fake[:1] + 0.01 * torch.from_numpy(generator.standard_normal((40, 4)))
    collapsed = among(one, real, names(40), names(80))
    assert collapsed.value.value < 0.1 < 0.6 < collapsed.baseline
    assert np.isnan(among(real[:7], fake, names(7), names(40)).value.value)
    assert np.isnan(among(real, fake, ["p"] * 80, names(40)).difference.value)


@pytest.mark.parametrize("each", [1, 10])
def test_shares_are_in_equal_numbers_and_their_intervals_cover(each):
    """However many samples there are, real against real differs by 0."""
    generator, found = np.random.default_rng(0), []
    for trial in range(200):
        sides = []
        for patients in (20, 60):
            own = generator.normal(0, 1, (patients, 1, 6))
            slices = own + generator.normal(0, 0.5, (patients, each, 6))
            sides.append(torch.from_numpy(slices.reshape(-1, 6)))
        owners = names(20 * each, each), names(60 * each, each)
        gap = among(*sides, *owners, seed=trial).difference
        found.append((gap.value, *gap.interval()))
    value, low, high = np.array(found).T
    assert abs(value.mean()) < 3 * value.std() / 200**0.5
    assert 0.9 <= ((low <= 0) & (high >= 0)).mean() <= 0.99
