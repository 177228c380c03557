"""Numbers with their uncertainty, and what they say: good, doubtful or bad.

A number is judged by its difference from what other real patients have, the interval of that, and a
margin within which differences do not matter (an equivalence margin).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import special

WORDS = ("good", "doubtful", "bad", "not judged")  # of verdicts
DASH = "\N{EN DASH}"  # for a number that is not there
LEVEL = 0.95  # of an interval in a table
FALSE_ALARMS = 0.01  # of a verdict, in real slices of other patients: all its numbers together
RARE = 0.02  # so seldom chance may give a count that is called more than usual
OWN_LEVELS = {  # of numbers that do not share the false alarms of their group
    "kid": 0.95,  # cautious where nothing differs: in 1,000 draws of real patients it alarmed once
    "high_attenuation, spread": 0.998,  # mild and severe fibrosis: what samples are made for
}
NAMED = 3  # numbers that a verdict's sentence names

# The margins: differences within them do not matter. One side is open where it is no fault. They
# were chosen by what is said below, in a public CT set; docs/evaluation.md has how often they err.
KID_MARGIN = (-math.inf, 0.005)  # a blur of 0.7 px or noise of 50 HU costs 0.02
SHARE_MARGIN = (-0.1, math.inf)  # of precision and recall; the same cost 0.2 to 0.4
DICE_MARGIN = (-0.05, math.inf)  # contours two pixels too wide cost 0.04, four pixels off 0.06
SHIFT_MARGIN = 0.5  # of a tissue's mean, in standard deviations of real slices: a medium effect
SPREAD_MARGIN = 0.2  # of a tissue's spread, as a share of that of real slices


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error, and the degrees of freedom of that; NaN what can't be had."""

    value: float
    error: float = math.nan
    freedom: float = math.nan

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The central interval of Student's t; NaN without an error."""
        if not math.isfinite(self.error):
            return math.nan, math.nan
        half = float(special.stdtrit(self.freedom, (1 + level) / 2)) * self.error
        return self.value - half, self.value + half


def combined(variances: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """The standard error of independent parts together, and its degrees of freedom: those of the
    part with the fewest owners. NaN where one is of one owner."""
    total = float(sum(variances))
    if not math.isfinite(total) or min(counts) < 2:
        return math.nan, math.nan
    return total**0.5, min(counts) - 1.0


def mean_estimate(values: np.ndarray, owners: Sequence[str]) -> Estimate:
    """The mean of values (N,); the slices of an owner (a patient) are one observation.

    The error of a ratio estimator over owners (Cochran 1977): that of N values if each has its own.
    """
    if not len(values):
        return Estimate(math.nan)
    owner = np.unique(np.asarray(owners, str), return_inverse=True)[1]
    count, mean = int(owner.max()) + 1, float(np.mean(values))
    off = np.square(np.bincount(owner, values - mean)).sum() / len(values) ** 2
    return Estimate(mean, *combined([off * count / max(count - 1, 1)], [count]))


def share_interval(flags: np.ndarray, owners: Sequence[str]) -> tuple[float, float]:
    """95 % interval of a share of slices (N,), which none or all of them leave open, too.

    Wilson's, with as many independent slices as their owners' scatter amounts to, or as owners.
    """
    found = mean_estimate(np.asarray(flags, float), owners)
    if not math.isfinite(found.error):
        return math.nan, math.nan
    share, count = found.value, found.freedom + 1
    if found.error > 0:
        count = min(share * (1 - share) / found.error**2, len(flags))
    square = special.ndtri((1 + LEVEL) / 2) ** 2 / count
    middle, half = share + square / 2, (square * share * (1 - share) + square**2 / 4) ** 0.5
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    return max(float(low), 0.0), min(float(high), 1.0)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """Of two independent estimates."""
    counts = one.freedom + 1, other.freedom + 1
    variances = one.error**2, other.error**2
    return Estimate(one.value - other.value, *combined(variances, counts))


@dataclass(frozen=True)
class Score:
    """One row of a table of metrics.

    `low` and `high` are the 95 % interval of the value. `baseline` is the real-vs-real baseline:
    the same metric between real patients. `difference` from it and `margin` judge the value, where
    it is judged; the difference is NaN and the margin () where not. NaN what can't be had.
    `source` names what measured it (a network and its weights' hash, an operator); `warning` says
    why not to trust the number, "" where there is nothing to say.
    """

    name: str
    value: float
    low: float
    high: float
    baseline: float
    n_real: int
    n_fake: int
    source: str
    warning: str = ""
    difference: Estimate = Estimate(math.nan)
    margin: tuple[float, float] | tuple[()] = ()

    @property
    def has_margin(self) -> bool:
        """Real values that do not vary, but for rounding, leave none."""
        least = 1e-9 * abs(self.baseline) if math.isfinite(self.baseline) else 0.0
        return bool(self.margin) and self.margin[1] - self.margin[0] > least

    @property
    def judged(self) -> bool:
        """Whether the difference can be judged."""
        known = math.isfinite(self.difference.value + self.difference.error)
        return known and self.has_margin

    def as_dict(self) -> dict:
        """Plain values for JSON: NaN and infinity, which JSON lacks, as None."""
        found = asdict(self)
        low, high = self.difference.interval()
        found["difference"] = {"value": self.difference.value, "low": low, "high": high}
        found["margin"] = list(self.margin)
        return _plain(found)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(some) for key, some in value.items()}
    if isinstance(value, list):
        return [_plain(some) for some in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float) -> str:
    """Four digits, or a dash for a value that is not there."""
    return f"{value:.4g}" if math.isfinite(value) else DASH


@dataclass(frozen=True)
class Verdict:
    """One of WORDS for a group of metrics, and the sentence that says why."""

    word: str
    sentence: str


def word_of(score: Score, level: float) -> str:
    """Of one number that is judged, whose interval is of this level.

    Good: the interval reaches 0, or lies within the margin. Bad: it does not reach 0, and the value
    lies beyond the margin. Doubtful: it does not reach 0, and the value lies within the margin.
    """
    (low, high), (least, most) = score.difference.interval(level), score.margin
    if low <= 0 <= high or (least <= low and high <= most):
        return "good"
    return "doubtful" if least <= score.difference.value <= most else "bad"


def judge(scores: Sequence[Score]) -> Verdict:
    """One verdict of several numbers: the worst of their words.

    The more numbers, the wider each interval: of two groups of real patients 1 % differ in any
    number on a side that counts (Bonferroni). Those of OWN_LEVELS keep theirs.
    """
    some = [score for score in scores if score.judged]
    if not some:
        names = ", ".join(score.name for score in scores)
        return Verdict("not judged", f"{names}: no real-vs-real baseline to compare with")
    sides = sum(math.isfinite(side) for score in some for side in score.margin)
    level = 1 - 2 * FALSE_ALARMS / sides
    levels = [OWN_LEVELS.get(score.name, level) for score in some]
    words = [word_of(*pair) for pair in zip(some, levels, strict=True)]
    word = next(word for word in ("bad", "doubtful", "good") if word in words)
    order = sorted(range(len(some)), key=lambda i: (-WORDS.index(words[i]), -abs(excess(some[i]))))
    shown = NAMED if len(some) <= NAMED else min(max(len(some) - words.count("good"), 1), NAMED)
    sentence = "; ".join(described(some[i], levels[i]) for i in order[:shown])
    if len(some) > NAMED:
        counts = ", ".join(f"{words.count(word)} {word}" for word in WORDS[:3])
        sentence = f"of {len(some)} numbers {counts}; farthest: {sentence}"
    if word == "good" and (patients := needed(some, levels)):
        sentence += f". Too few to exclude differences beyond the margins: that takes {patients}"
    return Verdict(word, sentence)


def excess(score: Score) -> float:
    """The difference as a share of the margin on its side; 0 where that is open."""
    least, most = score.margin
    return score.difference.value / (most if score.difference.value > 0 else least)


def described(score: Score, level: float) -> str:
    low, high = map(number, score.difference.interval(level))
    return (
        f"{score.name} {number(score.value)}, baseline {number(score.baseline)}: differs by "
        f"{number(score.difference.value)} ({low} to {high}), margin {margin_text(score)}"
    )


def margin_text(score: Score) -> str:
    """A score's margin in words, a dash where it has none."""
    if not score.has_margin:
        return DASH
    least, most = score.margin
    if math.isfinite(least + most):
        return f"{number(least)} to {number(most)}"
    return f"at most {number(most)}" if math.isfinite(most) else f"at least {number(least)}"


def needed(scores: Sequence[Score], levels: Sequence[float]) -> str:
    """About how many patients would bring all intervals within their margins; "" where they are."""
    most = 0.0
    for score, level in zip(scores, levels, strict=True):
        low, high = score.difference.interval(level)
        ratio = (high - low) / 2 / min(abs(side) for side in score.margin)
        most = max(most, (score.difference.freedom + 1) * ratio**2 if ratio > 1 else 0)
    return f"about {int(float(f'{most:.1g}')):,} patients" if most else ""


def more_than(usual: float, count: int, total: int) -> bool:
    """Whether so many of a total are more than a usual share gives by chance (binomial)."""
    return float(special.bdtrc(count - 1, total, usual)) <= RARE


# Groups of slices: patients.


def halves(groups: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two disjoint halves of the groups (patients), drawn by `seed`."""
    names, owner = np.unique(np.asarray(groups, str), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    first = np.isin(owner, order[: len(names) // 2])
    return np.flatnonzero(first), np.flatnonzero(~first)


def resamples(groups: Sequence[str], draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Rows of bootstrap resamples: whole groups with replacement.

    Slices of one patient are no independent evidence.
    """
    owner = np.unique(np.asarray(groups, str), return_inverse=True)[1]
    rows = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1])
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.concatenate([rows[i] for i in generator.integers(len(rows), size=len(rows))])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The central 95 % of resampled values, low and high; NaN for fewer than 2 finite ones."""
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)
