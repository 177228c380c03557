"""Intervals by patients, margins, and what several numbers say together."""

import json
import math

import numpy as np
import pytest

from fibldm.verdicts import (
    Estimate,
    Score,
    difference,
    halves,
    interval,
    judge,
    mean_estimate,
    more_than,
    resamples,
    share_interval,
)

NAN = float("nan")
PATIENTS = [f"p{i // 3}" for i in range(60)]  # 20 patients of 3 slices


def score(gap=0.0, error=1.0, margin=(-math.inf, 3.0), name="m", freedom=1000.0, **options):
    values = 5.0 + gap, NAN, NAN, 5.0, 40, 41, "net"
    return Score(name, *values, difference=Estimate(gap, error, freedom), margin=margin, **options)


# Groups of slices.


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


# Intervals.


@pytest.mark.parametrize("each", [1, 10])
def test_intervals_of_differences_hold_them_as_often_as_they_say(each):
    """Of 15 and 25 patients, whose slices are alike: in 1,000 draws 92 to 97 %."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        sides = []
        for patients, mean in ((15, 0.3), (25, 0.0)):
            own = generator.normal(mean, 1, patients).repeat(each)
            values = own + generator.normal(0, 0.5, patients * each)
            sides.append(mean_estimate(values, np.arange(patients).repeat(each).astype(str)))
        low, high = difference(*sides).interval()
        covered += low <= 0.3 <= high
    assert 0.92 <= covered / 1000 <= 0.97


@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("each", [1, 10])
def test_intervals_of_shares_hold_them(share, each):
    """Also of none: that 0 of 60 are copies does not show that there are none."""
    generator, covered = np.random.default_rng(0), 0
    owners = np.arange(60).repeat(each).astype(str)
    for _ in range(500):
        flags = (generator.random(60) < share).repeat(each)
        low, high = share_interval(flags, owners)
        covered += low <= share <= high
    assert 0.92 <= covered / 500 <= 0.99
    low, high = share_interval(np.zeros(60 * each, bool), owners)
    assert low == 0 and high == pytest.approx(0.06, abs=0.005)
    assert np.isnan(share_interval(np.zeros(3, bool), ["p"] * 3)).all()


def test_slices_of_one_patient_are_one_observation():
    values = np.random.default_rng(0).normal(size=20)
    one = mean_estimate(values, [str(i) for i in range(20)])
    assert one.error == pytest.approx(values.std(ddof=1) / 20**0.5) and one.freedom == 19
    three = mean_estimate(values.repeat(3), PATIENTS)
    assert (three.value, three.error, three.freedom) == pytest.approx((one.value, one.error, 19))


def test_too_little_for_an_interval_is_nan_and_none_in_json():
    assert np.isnan(interval([1.0])).all() and np.isnan(interval([np.nan, 1.0])).all()
    assert math.isnan(mean_estimate(np.array([]), []).value)
    lone = mean_estimate(np.array([1.0, 2.0]), ["p", "p"])
    assert lone.value == 1.5 and np.isnan(lone.interval()).all()
    assert np.isnan(difference(lone, mean_estimate(np.arange(3.0), list("abc"))).interval()).all()
    found = Score("fid", 1.0, *interval([]), NAN, 2, 3, "Inception", "few").as_dict()
    assert json.loads(json.dumps(found, allow_nan=False))["low"] is None
    found = score(2.0).as_dict()
    assert found["margin"] == [None, 3.0] and found["difference"]["value"] == 2.0
    assert found["difference"]["low"] == pytest.approx(0.04, abs=0.01)


# Verdicts.

BOTH, BELOW, ABOVE = (-3.0, 3.0), (-3.0, math.inf), (-math.inf, 3.0)


@pytest.mark.parametrize(
    ("gap", "error", "margin", "word"),
    [
        (1.5, 1.0, ABOVE, "good"),  # the interval reaches 0
        (1.5, 0.5, ABOVE, "good"),  # it does not, and lies within the margin
        (2.5, 0.5, ABOVE, "doubtful"),  # it does not, and reaches beyond
        (3.5, 1.0, ABOVE, "bad"),
        (3.5, 9.0, ABOVE, "good"),  # beyond the margin, as real patients may be with such an error
        (-9.0, 1.0, ABOVE, "good"),  # better than real patients: no fault on that side
        (-9.0, 1.0, BELOW, "bad"),
        (9.0, 1.0, BELOW, "good"),
        (9.0, 1.0, BOTH, "bad"),
        (-9.0, 1.0, BOTH, "bad"),
        (NAN, 1.0, BOTH, "not judged"),
        (9.0, NAN, BOTH, "not judged"),
        (9.0, 1.0, (), "not judged"),
        (9.0, 1.0, (0.0, 0.0), "not judged"),  # real slices that do not vary: no margin
    ],
)
def test_a_number_is_judged_by_its_difference_and_margin(gap, error, margin, word):
    verdict = judge([score(gap, error, margin)])
    assert verdict.word == word and verdict.sentence.startswith("m")


def test_more_numbers_have_wider_intervals_and_the_worst_word_wins():
    assert judge([score(4.0, 1.6)]).word == "bad"
    many = [score(4.0, 1.6), *[score(0.0, 1.0)] * 20]
    assert judge(many).word == "good"
    verdict = judge([*many, score(8.0, 1.0, name="far"), score(NAN)])
    assert verdict.word == "bad" and "of 22 numbers 21 good, 0 doubtful, 1 bad" in verdict.sentence
    assert "farthest: far 13, baseline 5: differs by 8 (" in verdict.sentence
    assert judge([]).word == "not judged"


def test_kid_keeps_its_interval_among_others():
    others = [score(0.0)] * 20
    assert judge([score(4.0, 1.9, name="kid"), *others]).word == "bad"
    assert judge([score(4.0, 1.9, name="mean"), *others]).word == "good"


def test_few_slices_are_said_where_nothing_bad_is_shown():
    verdict = judge([score(1.0, 10.0, freedom=19.0)])
    assert verdict.word == "good" and "that takes about 1,000 patients" in verdict.sentence
    assert "takes" not in judge([score(0.1, 0.5)]).sentence
    assert "takes" not in judge([score(9.0, 1.0)]).sentence


def test_real_patients_are_bad_in_two_of_a_hundred_draws_at_most():
    """Twenty numbers of 20 and 30 patients, skewed as attenuation areas are."""
    generator, words = np.random.default_rng(0), []
    for _ in range(300):
        scores = []
        for _ in range(20):
            sides = [generator.gamma(2, 1, patients) for patients in (20, 30)]
            found = [mean_estimate(side, np.arange(len(side)).astype(str)) for side in sides]
            margin = 0.5 * float(sides[0].std())
            apart = difference(*found)
            scores.append(score(apart.value, apart.error, (-margin, margin), freedom=apart.freedom))
        words.append(judge(scores).word)
    assert words.count("bad") <= 6 and words.count("good") >= 270


def test_a_share_is_more_than_usual_only_beyond_chance():
    assert not more_than(0.05, 3, 20) and more_than(0.05, 4, 20)
    assert not more_than(0.01, 1, 20) and more_than(0.01, 2, 20)
    assert not more_than(0.01, 0, 5) and more_than(0.01, 64, 64)
