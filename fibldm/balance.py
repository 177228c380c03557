"""Batches in which each class of slices has a given share, however few slices it has."""

import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from fibldm.batches import Batches, Plan, item_generator
from fibldm.tables import list_some

UNLABELED = "unlabeled"  # the class of slices without a label


def class_of(label: str) -> str:
    """The class that a slice with this label, "" for none, is drawn with."""
    return label or UNLABELED


def parse_weights(words: Sequence[str]) -> dict[str, float]:
    """The weight of each class, as typed: NAME=WEIGHT; ValueError where they are something else."""
    pairs = [word.rpartition("=") for word in words]
    try:
        weights = {name: float(weight) for name, _, weight in pairs}
    except ValueError:
        raise ValueError(
            f"{' '.join(words)}: a weight is no number, expected NAME=WEIGHT"
        ) from None
    if len(weights) < len(pairs):
        raise ValueError(f"{' '.join(words)}: expected each class once")
    return weights


def parse_shares(words: Sequence[str]) -> dict[str, float]:
    """`parse_weights` of weights above 0 that sum to 1; ValueError where they do not."""
    weights = parse_weights(words)
    total = sum(weights.values())
    if weights and not (min(weights.values()) > 0 and abs(total - 1) <= 1e-6):
        raise ValueError(
            f"{' '.join(words)}: weights that sum to {total:.8g}; expected numbers above 0 that "
            "sum to 1"
        )
    return {name: weight / total for name, weight in weights.items()}


class BalancedBatches(Batches):
    """Batches by --balance_labels: classes by weight, and in a class each slice equally often.

    `labels`: of each of the rows, "" for none. Without weights in the plan all classes are drawn
    equally often. ValueError where there are fewer than two classes, or others than have weights.

    Draw n of a class of weight w is due at (n + u) / w, u random from 0 to 1, and draws come as
    they are due. So of any N draws in a row about N * w are of the class: fewer than twice the
    number of classes more or less. Its rows are shuffled anew each time all of them were drawn.
    An epoch is as many draws as there are rows, as without weights.
    """

    def __init__(
        self,
        rows: Sequence[int],
        plan: Plan,
        start: int = 0,
        left_out: Collection[int] = (),
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__(rows, plan, start, left_out)
        names = np.array([class_of(label) for label in labels])
        assert len(names) == len(self.rows), "a label for each row"
        self.groups = {name: self.rows[names == name] for name in sorted({*names.tolist()})}
        self.weights = read_weights(plan.balance_labels, names.tolist())

    def order(self, epoch: int) -> np.ndarray:
        count, margin = len(self.rows), len(self.groups)  # no draw is as far from when it is due
        start, before, due, rows = epoch * count, 0, [], []
        for name, weight in self.weights.items():
            first = max(0, math.floor((start - margin) * weight))
            end = math.ceil((start + count + margin) * weight) + 1
            times, drawn = self._draws(name, first, end)
            due.append(times / weight)
            rows.append(drawn)
            before += first
        order = np.argsort(np.concatenate(due), kind="stable")
        return np.concatenate(rows)[order[start - before :][:count]]

    def _draws(self, name: str, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """n + u, and the row, of the draws n = first to end - 1 of a class."""
        group, number = self.groups[name], list(self.groups).index(name)
        rounds = range(first // len(group), -(-end // len(group)))
        generators = [item_generator(self.plan.seed, "balance", n, number) for n in rounds]
        rows = np.concatenate([group[one.permutation(len(group))] for one in generators])
        shifts = np.concatenate([one.random(len(group)) for one in generators])
        skipped = rounds[0] * len(group)
        part = slice(first - skipped, end - skipped)
        return np.arange(first, end) + shifts[part], rows[part]

    def alike(self, row: int) -> list[int]:
        return next(group.tolist() for group in self.groups.values() if row in group)

    def leave_out(self, rows: Collection[int]) -> None:
        super().leave_out(rows)
        for name, group in self.groups.items():
            if self.left_out >= {*group.tolist()}:
                raise ValueError(
                    f"--balance_labels: none of the {len(group)} slices of {name} to train on can "
                    "be read; expected at least 1"
                )

    def summary(self) -> str:
        """How many rows each class has, and how often each of them is drawn in all."""
        draws = self.plan.steps * self.plan.batch_size
        parts = [
            f"{name} {self.weights[name]:.3g} from {len(group)}, each "
            f"{draws * self.weights[name] / len(group):.3g} times"
            for name, group in self.groups.items()
        ]
        return f"--balance_labels, shares of {draws} draws: {'; '.join(parts)}"


def read_weights(words: Sequence[str] | None, names: Sequence[str]) -> dict[str, float]:
    """The weight of each class among the slices' `names`, by the words of --balance_labels."""
    weights, found = parse_shares(words or ()), Counter(names)
    listed = list_some([f"{name}: {count} slices" for name, count in sorted(found.items())])
    option = " ".join(["--balance_labels", *(words or ())])
    if len(found) < 2:
        raise ValueError(
            f"{option}: expected at least two classes in the column label of the slices to train "
            f"on, found is:{listed}"
        )
    if not weights:
        return {name: 1 / len(found) for name in sorted(found)}
    if weights.keys() != found.keys():
        raise ValueError(
            f"{option}: expected a weight for each class of the slices to train on and for no "
            f"other, found are:{listed}"
        )
    return {name: weights[name] for name in sorted(found)}
