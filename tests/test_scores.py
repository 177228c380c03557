"""Scores, halves of patients and the bootstrap over them."""

import json

import numpy as np

from fibldm.metrics import Score, halves, interval, resamples

PATIENTS = [f"p{i // 3}" for i in range(60)]  # 20 patients of 3 slices


def test_halves_split_patients_and_not_slices():
    first, second = halves(PATIENTS, seed=1)
    assert sorted([*first, *second]) == list(range(60))
    names = np.array(PATIENTS)
    assert not set(names[first]) & set(names[second])
    assert len(set(names[first])) == len(set(names[second])) == 10
    assert not np.array_equal(first, halves(PATIENTS, seed=2)[0])


def test_resamples_draw_whole_patients():
    for rows in resamples(PATIENTS, draws=5):
        assert len(rows) == 60
        counts = np.bincount(rows, minlength=60).reshape(20, 3)
        assert (counts == counts[:, :1]).all()


def test_the_interval_covers_a_mean_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    for trial in range(200):
        patients = generator.normal(size=20)
        values = np.repeat(patients, 3)  # slices of a patient are copies: 20 values, not 60
        means = [values[rows].mean() for rows in resamples(PATIENTS, 200, seed=trial)]
        low, high = interval(means)
        covered += low <= 0 <= high
    assert 0.85 < covered / 200 < 0.98  # slices as if independent would give 0.74


def test_too_little_for_an_interval_is_nan_and_none_in_json():
    assert np.isnan(interval([1.0])).all() and np.isnan(interval([np.nan, 1.0])).all()
    score = Score("fid", 1.0, *interval([]), float("nan"), 2, 3, "Inception", "few")
    content = json.loads(json.dumps(score.as_dict(), allow_nan=False))
    assert content["low"] is None and content["value"] == 1.0
