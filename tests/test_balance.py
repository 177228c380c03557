"""Classes drawn by weights: the shares, each slice equally often, any start and number of ranks."""

import itertools
from collections import Counter

import numpy as np
import pytest

from fibldm import distributed
from fibldm.balance import BalancedBatches, parse_shares
from fibldm.batches import Batches, Plan, item_generator

LABELS = ["normal"] * 20 + ["fibrosis"] * 3 + ["nodule"] * 7
ROWS = list(range(100, 100 + len(LABELS)))
LABEL = dict(zip(ROWS, LABELS, strict=True))
EVEN = {"normal": 1 / 3, "fibrosis": 1 / 3, "nodule": 1 / 3}
GIVEN = {"normal": 0.25, "fibrosis": 0.7, "nodule": 0.05}


def words(weights: dict[str, float]) -> list[str]:
    return [] if weights is EVEN else [f"{name}={weight}" for name, weight in weights.items()]


def balanced(weights: dict[str, float] = EVEN, start: int = 0, left_out=(), **changed):
    plan = Plan(**{"steps": 60, "batch_size": 16, "balance_labels": words(weights), **changed})
    return BalancedBatches(ROWS, plan, start, left_out, LABELS)


def drawn(batches: Batches) -> list[int]:
    return list(itertools.chain(*batches))


@pytest.mark.parametrize("weights", [EVEN, GIVEN], ids=["even", "given"])
def test_each_class_has_its_share_in_any_stretch(weights):
    """The 960 draws are 32 epochs of these 30 rows, so that epochs are joined without a gap."""
    labels = np.array([LABEL[row] for row in drawn(balanced(weights))])
    for name, weight in weights.items():
        so_far = np.cumsum(np.r_[0, labels == name]) - weight * np.arange(len(labels) + 1)
        assert so_far.max() - so_far.min() < 2 * len(weights)
        assert so_far[-1] == pytest.approx(0, abs=len(weights))


@pytest.mark.parametrize("weights", [EVEN, GIVEN], ids=["even", "given"])
def test_each_slice_of_a_class_is_drawn_equally_often_and_in_ever_new_orders(weights):
    rows = drawn(balanced(weights))
    assert set(rows) == set(ROWS)
    for name in weights:
        group = [row for row in rows if LABEL[row] == name]
        counts = Counter(group)
        assert max(counts.values()) - min(counts.values()) <= 1
        size = len(counts)
        rounds = [group[i : i + size] for i in range(0, len(group) - size + 1, size)]
        assert all(len({*one}) == size for one in rounds)
        assert len({tuple(one) for one in rounds}) > min(4, len(rounds) - 1)


def test_classes_come_at_random_places_of_a_batch():
    """Else what depends on the place, such as a rank's share, would go with the class."""
    batches = balanced(GIVEN)
    places = [[LABEL[row] for row in batches.rows_of(step)] for step in range(1, 61)]
    share = np.mean(np.array(places) == "fibrosis", axis=0)
    assert (abs(share - 0.7) < 0.25).all() and len({tuple(p) for p in places}) > 50


def test_order_depends_on_the_seed_alone():
    assert drawn(balanced()) == drawn(balanced()) != drawn(balanced(seed=1))
    assert drawn(balanced(steps=80))[: 60 * 16] == drawn(balanced())


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("start", [0, 1, 25, 59, 60])
@pytest.mark.parametrize("weights", [EVEN, GIVEN], ids=["even", "given"])
def test_any_start_and_number_of_ranks_takes_the_same(monkeypatch, weights, start, processes):
    whole = [balanced(weights).rows_of(step) for step in range(start + 1, 61)]
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    found = [[-1] * 16 for _ in whole]
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches = balanced(weights, start, grad_accum=2)
        for micro, rows in zip(batches.all_micro_batches(), batches, strict=True):
            found[micro.step - start - 1][micro.positions.start : micro.positions.stop] = rows
    assert found == whole


def test_a_place_far_away_is_that_of_the_stream_without_its_beginning():
    """An epoch is computed alone: the 5,000th goes on where the one before it ends."""
    batches = balanced(GIVEN)
    rows = [batches.row(item) for item in range(5000 * 30 - 300, 5000 * 30 + 300)]
    for name, weight in GIVEN.items():
        group = [row for row in rows if LABEL[row] == name]
        assert len(group) == pytest.approx(600 * weight, abs=6)
        counts = Counter(group)
        assert max(counts.values()) - min(counts.values()) <= 2  # both ends are within a round


@pytest.mark.parametrize("words", [[], ["a=0.001", "b=0.999"], ["a=0.999", "b=0.001"]])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 40), (2, 3)])
def test_classes_of_one_slice_and_small_weights(sizes, words):
    labels = ["a"] * sizes[0] + ["b"] * sizes[1]
    plan = Plan(200, 10, balance_labels=words)
    rows = drawn(BalancedBatches(range(len(labels)), plan, 0, (), labels))
    share = np.mean([labels[row] == "a" for row in rows])
    assert share == pytest.approx(parse_shares(words).get("a", 0.5), abs=0.002)


def test_slices_without_a_label_are_a_class():
    labels = ["fibrosis"] * 2 + [""] * 8
    for given in [], ["fibrosis=0.5", "unlabeled=0.5"]:
        plan = Plan(10, 10, balance_labels=given)
        rows = drawn(BalancedBatches(range(10), plan, 0, (), labels))
        assert 48 <= sum(row < 2 for row in rows) <= 52


def test_a_slice_left_out_is_replaced_by_one_of_its_class():
    whole = drawn(balanced())
    missing = {ROWS[19]: ROWS[0], ROWS[22]: ROWS[20]}  # the last of its class: the first
    expected = [missing.get(row, row) for row in whole]
    assert drawn(balanced(left_out=missing)) == expected
    late = balanced()
    late.leave_out(missing)
    assert drawn(late) == expected
    with pytest.raises(ValueError, match="none of the 3 slices of fibrosis to train on can be"):
        late.leave_out(ROWS[20:22])


def test_without_the_option_the_order_is_as_it_was():
    batches = Batches(ROWS, Plan(60, 16))
    epochs = [
        np.array(ROWS)[item_generator(0, "order", epoch, 0).permutation(30)] for epoch in range(32)
    ]
    assert drawn(batches) == np.concatenate(epochs).tolist()


def test_the_summary_tells_how_often_slices_are_repeated():
    said = balanced().summary()
    assert said.startswith("--balance_labels, shares of 960 draws: fibrosis 0.333 from 3, each 107")
    assert "normal 0.25 from 20, each 12 times" in balanced(GIVEN).summary()


@pytest.mark.parametrize(
    ("given", "labels", "told"),
    [
        ([], ["normal"] * 4, ["at least two classes", "normal: 4 slices"]),
        ([], [""] * 4, ["column label", "unlabeled: 4 slices"]),
        (["a=0.5", "c=0.5"], ["a", "b"], ["a=0.5 c=0.5", "no other", "a: 1 slices", "b: 1"]),
        (["a=1"], ["a", "b"], ["a weight for each class", "b: 1"]),
        (["a=0.5", "b=0.5"], ["a", "b", ""], ["a weight for each class", "unlabeled: 1"]),
    ],
)
def test_classes_that_are_not_those_of_the_data_are_refused(given, labels, told):
    with pytest.raises(ValueError, match="--balance_labels") as error:
        plan = Plan(1, 2, balance_labels=given)
        BalancedBatches(range(len(labels)), plan, 0, (), labels)
    for part in told:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["a=0.5", "a=0.5"], "each class once"),
        (["a", "b"], "expected NAME=WEIGHT"),
        (["a=half", "b=0.5"], "expected NAME=WEIGHT"),
        (["a=0.5", "b=0.6"], "sum to 1.1; expected numbers above 0 that sum to 1"),
        (["a=0.5", "b=0.50001"], "sum to 1.00001"),
        (["a=1", "b=0"], "above 0"),
        (["a=1.5", "b=-0.5"], "above 0"),
        (["a=nan", "b=1"], "above 0"),
        (["a=inf", "b=1"], "above 0"),
    ],
)
def test_weights_that_make_no_sense_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        parse_shares(given)
    assert parse_shares(["a=0.3333333", "b=0.6666666"])["a"] == pytest.approx(1 / 3)
