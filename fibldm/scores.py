"""A number with what it takes to believe it: interval, floor, counts, source; and resampling."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Score:
    """One row of a table of metrics.

    `low` and `high` are the 95 % bootstrap interval, `floor` the same metric between two disjoint
    halves of the real patients: what no model can be told from. NaN where it can't be had.
    `source` names what measured it (a network and its weights' hash, an operator); `warning` says
    why not to trust the number, "" where there is nothing to say.
    """

    name: str
    value: float
    low: float
    high: float
    floor: float
    n_real: int
    n_fake: int
    source: str
    warning: str = ""

    def as_dict(self) -> dict:
        """Plain values for JSON: NaN, which JSON lacks, as None."""
        return {
            key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def halves(groups: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two disjoint halves of the groups (patients), drawn by `seed`."""
    names, owner = np.unique(np.asarray(groups, str), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    first = np.isin(owner, order[: len(names) // 2])
    return np.flatnonzero(first), np.flatnonzero(~first)


def resamples(groups: Sequence[str], draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Rows of bootstrap resamples: whole groups with replacement, since slices of one patient
    are no independent evidence."""
    owner = np.unique(np.asarray(groups, str), return_inverse=True)[1]
    rows = [np.flatnonzero(owner == i) for i in range(owner.max(initial=-1) + 1)]
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.concatenate([rows[i] for i in generator.integers(len(rows), size=len(rows))])


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The central percentile interval of resampled values; NaN for fewer than 2 finite ones."""
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
