"""Density, texture and noise in the lungs, and how far real and generated slices lie apart."""

import csv

import numpy as np
import pytest
from scipy import ndimage

from fibldm import ct, disease
from fibldm.phantom import phantom_slice
from fibldm.verdicts import judge

SIDE = 128
WHOLE = np.ones((SIDE, SIDE), bool)


def field(seed: int, mean: float = -500.0, sd: float = 60.0) -> np.ndarray:
    """White normal noise, far enough from the window's ends."""
    return np.random.default_rng(seed).normal(mean, sd, (SIDE, SIDE))


def two_lungs(side: int = SIDE) -> np.ndarray:
    """Two ovals, 30 % of the slice together."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    return ((np.abs(x) - 0.23) / 0.17) ** 2 + (y / 0.28) ** 2 < 1


def some_slices(count: int, shift: float = 0.0, seed: int = 0) -> list[disease.Measures]:
    """Measures that differ between slices, as `measure` gives them."""
    rng = np.random.default_rng(seed)
    names = [*disease.QUANTITIES, *disease.NOISE]
    return [{name: rng.normal(100, 5) + shift for name in names} for _ in range(count)]


def named(scores):
    return {score.name: score for score in scores}


# One slice.


def test_density_of_known_distributions():
    found = disease.measure(field(0), WHOLE)
    assert found["mean"] == pytest.approx(-500, abs=2) and found["sd"] == pytest.approx(
        60, rel=0.02
    )
    assert found["skewness"] == pytest.approx(0, abs=0.05)
    assert found["kurtosis"] == pytest.approx(0, abs=0.1)

    flat = np.random.default_rng(1).uniform(-1000, 0, WHOLE.shape)
    found = disease.measure(flat, WHOLE)
    assert found["kurtosis"] == pytest.approx(-1.2, abs=0.03)
    assert found["high_attenuation"] == pytest.approx(0.35, abs=0.01)
    assert found["low_attenuation"] == pytest.approx(0.05, abs=0.005)

    skewed = -900 + np.random.default_rng(2).gamma(4, 40, WHOLE.shape)
    assert disease.measure(skewed, WHOLE)["skewness"] == pytest.approx(1, abs=0.1)  # 2 / sqrt(4)


def test_ends_of_the_attenuation_areas():
    hu = np.array([[-951, -950, -601, -600], [-400, -250, -249, 0]], float)
    found = disease.measure(hu, np.ones_like(hu))
    assert found["high_attenuation"] == 3 / 8 and found["low_attenuation"] == 1 / 8


def test_shift_and_scale():
    a = disease.measure(field(3), WHOLE)
    b = disease.measure(2 * (field(3) + 500) - 400, WHOLE)  # in levels of 50 HU: shifted by 2
    assert b["mean"] - -400 == pytest.approx(2 * (a["mean"] + 500))
    assert b["sd"] == pytest.approx(2 * a["sd"])
    for name in ("skewness", "kurtosis"):
        assert b[name] == pytest.approx(a[name])
    for name in disease.NOISE:
        assert b[name] == pytest.approx(4 * a[name])
    shifted = disease.measure(field(3) + 100, WHOLE)
    for name in ("glcm_contrast", "glcm_energy", "glcm_correlation", "glcm_homogeneity"):
        assert shifted[name] == pytest.approx(a[name])
    assert b["glcm_contrast"] > 3 * a["glcm_contrast"]


def test_pixels_outside_the_mask_count_for_nothing():
    mask, hu = two_lungs(), field(4)
    other = np.where(mask, hu, np.random.default_rng(5).normal(0, 900, hu.shape))
    other[0, 0] = np.nan
    assert disease.measure(hu, mask) == disease.measure(other, mask)
    assert disease.implausible(hu, mask) == disease.implausible(other, mask)


def test_real_slices_are_clipped_to_the_window_of_the_samples():
    hu, mask = field(6, mean=-900, sd=300), two_lungs()
    for window in (ct.DEFAULT_WINDOW, (-950.0, 100.0)):
        sample = ct.unit_to_hu(ct.hu_to_unit(hu, window), window)
        found = disease.measure(hu, mask, window)
        assert disease.measure(sample, mask, window) == pytest.approx(found, rel=1e-3)
    assert disease.measure(hu, mask)["mean"] > hu[mask].mean() + 50


def test_texture_agrees_with_a_matrix_counted_by_hand():
    hu = np.array([[-1000, -925, -1000], [-925, -1000, -500]], float)  # levels 0, 1, 0 / 1, 0, 9
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    # Neighbours in the mask: 01, 10, 10 in the rows; 01, 10 in the columns; 00, 11, 00 diagonally.
    found = disease.measure(hu, mask)
    assert found["glcm_contrast"] == pytest.approx(5 / 8)
    assert found["glcm_homogeneity"] == pytest.approx((5 / 2 + 3) / 8)
    parts = np.array([4, 2, 5, 5]) / 16  # 00, 11, 01 and 10
    assert found["glcm_energy"] == pytest.approx(np.linalg.norm(parts))


def test_smooth_texture_is_correlated_and_noise_is_not():
    rough, smooth = field(7), ndimage.gaussian_filter(field(7), 2)
    smooth = -500 + (smooth + 500) * 60 / smooth.std()
    rough, smooth = disease.measure(rough, WHOLE), disease.measure(smooth, WHOLE)
    assert abs(rough["glcm_correlation"]) < 0.03 and smooth["glcm_correlation"] > 0.8
    assert smooth["glcm_contrast"] < rough["glcm_contrast"] / 3
    assert smooth["glcm_homogeneity"] > rough["glcm_homogeneity"]


@pytest.mark.parametrize("mask", [WHOLE, two_lungs()], ids=["whole", "lungs"])
def test_noise_power_of_white_noise_is_its_variance(mask):
    power = np.mean([disease.noise_power(field(i, sd=50), mask) for i in range(12)], axis=0)
    assert power == pytest.approx(np.full(8, 2500.0), rel=0.08)


def test_noise_power_of_filtered_noise_is_its_spectrum():
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    gain = np.exp(-((frequency / 0.5) ** 2))
    fields = [np.fft.ifft2(np.fft.fft2(field(i, 0)) * gain).real - 500 for i in range(12)]
    power = np.mean([disease.noise_power(hu, WHOLE) for hu in fields], axis=0)
    for found, middle in zip(power, disease.FREQUENCIES, strict=True):
        ring = np.abs(frequency - middle) < 1 / 32
        assert found == pytest.approx(60**2 * (gain[ring] ** 2).mean(), rel=0.1)


def test_a_slope_is_no_noise():
    slope = np.add.outer(np.arange(SIDE), 2.0 * np.arange(SIDE)) - 500
    assert disease.noise_power(slope, WHOLE).max() < 1e-12


def test_what_can_not_be_had_is_nan():
    empty = disease.measure(field(0), np.zeros_like(WHOLE))
    assert (
        empty.keys() == {*disease.QUANTITIES, *disease.NOISE} and np.isnan([*empty.values()]).all()
    )
    narrow = disease.measure(field(0), np.arange(SIDE) % 20 < 10 * np.ones((SIDE, 1)))
    assert np.isnan(narrow["noise_0.2500"]) and np.isfinite(narrow["glcm_contrast"])
    dot = np.zeros_like(WHOLE)
    dot[5, 5] = True
    assert np.isnan(disease.measure(field(0), dot)["glcm_contrast"])
    with pytest.raises(ValueError, match=r"\(128, 128\) and mask \(2, 2\)"):
        disease.measure(field(0), np.ones((2, 2)))
    with pytest.raises(ValueError, match="NaN"):
        disease.measure(np.full((20, 20), np.nan), np.ones((20, 20)))


def test_measures_follow_fibrosis_on_phantoms():
    grades = [disease.measure(*phantom_slice(3, 0.7, fibrosis=f)) for f in (0.0, 0.4, 1.0)]
    mild, some, worst = ({name: g[name] for name in grades[0]} for g in grades)
    for rises in ("mean", "high_attenuation", "sd"):
        assert mild[rises] < some[rises] < worst[rises]
    for falls in ("skewness", "kurtosis"):  # Best et al. 2003
        assert mild[falls] > some[falls] > worst[falls]


# Many slices.


def owners(count: int, each: int = 1) -> list[str]:
    return [f"p{i // each}" for i in range(count)]


def test_shifted_slices_differ_by_the_shift_and_not_in_spread():
    real = some_slices(40)
    fake = [{name: value + 7 for name, value in row.items()} for row in real]
    scores = named(disease.compare(real, owners(40), fake, owners(40)))
    assert list(scores) == [f"{n}{s}" for s in ("", ", spread") for n in disease.COMPARED]
    for name in disease.QUANTITIES:
        score, spread = scores[name], scores[f"{name}, spread"]
        assert score.baseline == pytest.approx(np.mean([row[name] for row in real]))
        assert score.value == pytest.approx(score.baseline + 7)
        assert score.low < score.value < score.high
        assert score.difference.value == pytest.approx(7) and judge([score]).word == "bad"
        assert judge([spread]).word == "good"
        if name not in disease.SHARES:
            assert spread.difference.value == pytest.approx(0)
        assert (score.n_real, score.n_fake, score.warning) == (40, 40, "")


def test_narrowed_samples_have_the_mean_and_are_bad():
    """As guidance narrows high attenuation to 0.6 of what real patients have."""
    real, others = some_slices(150), some_slices(150, seed=1)
    fake = [{name: 100 + 0.6 * (value - 100) for name, value in row.items()} for row in others]
    scores = named(disease.compare(real, owners(150), fake, owners(150)))
    mean, spread = scores["high_attenuation"], scores["high_attenuation, spread"]
    assert judge([mean]).word == "good" and judge([spread]).word == "bad"
    assert spread.value / spread.baseline == pytest.approx(0.6, abs=0.1)
    verdict = judge(list(scores.values()))
    assert verdict.word == "bad" and ", spread" in verdict.sentence


def test_spread_of_shares_is_in_doublings():
    real, fake = some_slices(40), some_slices(40)
    for i, row in enumerate(real):
        row["high_attenuation"] = 0.05 * 2.0 ** (i % 2)
        row["low_attenuation"] = 0.0
    scores = named(disease.compare(real, owners(40), fake, owners(40)))
    assert scores["high_attenuation, spread"].baseline == pytest.approx(20 / 39)
    assert scores["high_attenuation"].baseline == pytest.approx(0.075)
    assert scores["low_attenuation, spread"].baseline == 0  # and no logarithm of 0


def test_spread_is_ginis_mean_difference_between_patients():
    values, patients = np.array([1.0, 4.0, 2.0, 9.0, 5.0]), ["a", "a", "b", "b", "c"]
    pairs = [abs(values[i] - values[j]) for i in range(5) for j in range(5)
             if patients[i] != patients[j]]  # fmt: skip
    per_slice = [np.mean([abs(values[i] - values[j]) for j in range(5)
                          if patients[i] != patients[j]]) for i in range(5)]  # fmt: skip
    assert disease.spread(values, patients).value == pytest.approx(np.mean(per_slice))
    assert np.mean(per_slice) == pytest.approx(np.mean(pairs), rel=0.1)
    normal = np.random.default_rng(0).normal(size=2000)
    assert disease.spread(normal, owners(2000)).value == pytest.approx(2 / np.pi**0.5, rel=0.04)
    few = [disease.spread(normal[i : i + 10], owners(10)).value for i in range(0, 2000, 10)]
    assert np.mean(few) == pytest.approx(2 / np.pi**0.5, rel=0.04)  # few patients are no narrower
    assert np.isnan(disease.spread(values, ["a"] * 5).value)


@pytest.mark.parametrize("each", [1, 10])
def test_the_interval_of_spread_covers(each):
    generator, found = np.random.default_rng(0), []
    for _ in range(500):
        own = generator.gamma(4, 1, 30).repeat(each)
        values = own + generator.normal(0, 0.2, 30 * each)
        one = disease.spread(values, owners(30 * each, each))
        found.append((one.value, *one.interval()))
    value, low, high = np.array(found).T
    assert 0.92 <= ((low <= value.mean()) & (value.mean() <= high)).mean() <= 0.97


def test_noise_power_is_that_of_the_upper_half_of_frequencies():
    real, upper = some_slices(30), set(disease.NOISE[4:])
    fake = [{n: v * 10**0.5 if n in upper else 0 * v for n, v in row.items()} for row in real]
    score = named(disease.compare(real, owners(30), fake, owners(30)))["noise_power"]
    assert score.difference.value == pytest.approx(0.5) and judge([score]).word == "bad"


def test_slices_of_one_patient_are_one_observation():
    rows = [row for row in some_slices(8) for _ in range(10)]
    fake = some_slices(40, seed=1)
    right = named(disease.compare(rows, owners(80, 10), fake, owners(40)))
    wrong = named(disease.compare(rows, owners(80), fake, owners(40)))
    for name in ("mean", "mean, spread"):
        assert right[name].difference.error > 1.5 * wrong[name].difference.error
    assert right["mean, spread"].baseline > 1.05 * wrong["mean, spread"].baseline
    assert "few patients: 8" in right["mean"].warning and right["mean"].n_real == 80


def test_slices_without_a_value_are_left_out_and_counted():
    real, fake = some_slices(40), some_slices(40, seed=1)
    whole = named(disease.compare(real, owners(40), fake[3:], owners(40)[3:]))
    for row in fake[:3]:
        row.update(dict.fromkeys(row, float("nan")))
    scores = named(disease.compare(real, owners(40), fake, owners(40)))
    for name, score in scores.items():
        assert score.value == whole[name].value and score.n_fake == 37
        assert "3 of 40 samples have no value" in score.warning
    nothing = [dict.fromkeys(real[0], float("nan"))] * 40
    for score in disease.compare(real, owners(40), nothing, owners(40)):
        assert np.isnan([score.value, score.low, score.high]).all() and score.n_fake == 0
        assert np.isfinite(score.baseline) and not score.judged


def test_what_does_not_vary_or_is_of_one_patient_is_not_judged():
    real, fake = some_slices(20), some_slices(20, seed=1)
    for row in real:
        row["low_attenuation"] = 0.1  # whose mean and SD are not exact
    scores = named(disease.compare(real, owners(20), fake, owners(20)))
    assert not scores["low_attenuation"].judged and scores["mean"].judged
    alone = disease.compare(real, ["a"] * 20, fake, owners(20))
    assert judge(alone).word == "not judged" and "few patients: 1" in alone[0].warning


def test_bad_input_of_compare():
    one = some_slices(1)
    with pytest.raises(ValueError, match="1 real slices and 2 names"):
        disease.compare(one, ["a", "b"], one, ["s"])
    with pytest.raises(ValueError, match="no fake slices"):
        disease.compare(one, ["a"], [], [])
    with pytest.raises(ValueError, match="'mean'"):
        disease.compare([{"median": 1.0}], ["a"], one, ["s"])


def test_labels_are_compared_each_with_its_own():
    real = some_slices(20) + some_slices(20, shift=50) + some_slices(2)
    real_labels = ["normal"] * 20 + ["fibrosis"] * 20 + [""] * 2
    fake = some_slices(20, seed=1) + some_slices(20, shift=60, seed=1) + some_slices(3)
    fake_labels = ["normal"] * 20 + ["fibrosis"] * 20 + ["covid"] * 3
    patients, names = [str(i) for i in range(42)], [str(i) for i in range(43)]
    scores, notes = disease.compare_by_label(
        *(real, patients, real_labels, fake, names, fake_labels)
    )
    assert list(scores) == ["fibrosis", "normal"]
    assert abs(named(scores["normal"])["mean"].difference.value) < 5
    assert named(scores["fibrosis"])["mean"].difference.value == pytest.approx(10, abs=4)
    assert notes == ["covid: no real slice has this label", "2 of 42 real slices have no label"]


# Slices that can't be lungs.


def lungs_of(mean: float, sd: float = 60.0) -> np.ndarray:
    return np.where(two_lungs(), field(0, mean, sd), 40.0)


def test_plausible_lungs_and_each_way_not_to_be():
    mask, good, lung_everywhere = two_lungs(), lungs_of(-800), field(0, -800)
    left = mask & (np.arange(SIDE) < SIDE / 2)
    third = mask.copy()
    third[2:20, 50:78] = True  # in front of the two, 11 % of their area
    speck = mask.copy()
    speck[2:5, 2:5] = True
    assert disease.implausible(good, mask) is None
    assert disease.implausible(good, speck) is None
    assert disease.implausible(good, np.zeros_like(mask)) == "no lung found"
    assert disease.implausible(good, left) == "lungs: 1, expected 2"
    assert disease.implausible(lung_everywhere, third) == "lungs: 3, expected 2"
    assert disease.implausible(lungs_of(-300), mask) == (
        "median of the lungs: -299 HU, expected -970 to -500 HU"
    )
    assert "median" in disease.implausible(lungs_of(-990), mask)
    assert "deviation" in disease.implausible(lungs_of(-800, sd=1), mask)
    tiny = ndimage.binary_erosion(mask, iterations=20)
    assert disease.implausible(good, tiny).startswith("area")
    assert disease.implausible(lungs_of(-300), left).count(";") == 1


def test_limits_come_from_real_slices():
    rng = np.random.default_rng(0)
    mask, real = two_lungs(), []
    for i in range(60):
        real.append(disease.measure(lungs_of(rng.uniform(-900, -800), sd=60 + i % 9), mask))
    limits = disease.limits_of(real, [2] * 57 + [3] * 3)
    assert limits.lungs == (2, 3)
    assert -935 < limits.median[0] < -900 < -800 < limits.median[1] < -765
    assert disease.implausible(lungs_of(-850), mask, limits) is None
    assert "median" in disease.implausible(lungs_of(-700), mask, limits)
    assert disease.implausible(lungs_of(-700), mask) is None  # literature's are wider
    assert disease.limits_of(real[:5], [2] * 5) == disease.Limits()


# Real CT.


def test_real_slices_are_nearest_to_other_patients(ct_folder):
    folder = ct_folder / "lungs"
    with open(folder / "label.csv", newline="") as file:
        rows = list(csv.DictReader(file))[:120]
    rng = np.random.default_rng(0)
    real, fakes = [], {"other": [], "noise": [], "blur": [], "phantom": []}
    for i, row in enumerate(rows):
        hu = ct.read_hu(folder / row["image"], ct.read_rescale(folder))
        mask = ct.read_contour(folder / row["contour"])[0]
        if i % 2:
            real.append(disease.measure(hu, mask))
            continue
        blurred = ndimage.gaussian_filter(np.clip(hu, *ct.DEFAULT_WINDOW), 1)
        fakes["other"].append(disease.measure(hu, mask))
        fakes["noise"].append(disease.measure(hu + rng.normal(0, 50, hu.shape), mask))
        fakes["blur"].append(disease.measure(blurred, mask))
    for i in range(30):
        drawn = phantom_slice(2 * i, 0.3 + 0.5 * i / 30, fibrosis=0.7)
        fakes["phantom"].append(disease.measure(*drawn))
    patients = [row["patient_id"] for row in rows[1::2]]
    found = {
        kind: disease.compare(real, patients, fake, owners(len(fake)))
        for kind, fake in fakes.items()
    }
    words = {kind: judge(scores).word for kind, scores in found.items()}
    assert words == {"other": "good", "noise": "bad", "blur": "bad", "phantom": "bad"}
    for name in ("glcm_contrast", "glcm_homogeneity", "glcm_energy", "noise_power"):
        for kind in ("noise", "blur"):
            assert judge([named(found[kind])[name]]).word == "bad"
