"""How far apart two sets of images are by features of a frozen network, and how sure that is.

A set is an array (N, D), in memory or on disk; it is read once. The slices of an owner (a patient)
are one observation: standard errors come from leaving owners out, in turn, with all their slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fibldm.disk import StoredRows
from fibldm.verdicts import Estimate, combined, difference, mean_estimate

Features = Tensor | np.ndarray | StoredRows
BLOCK = 1024  # rows at a time
GROUPS = 512  # of owners at most, for KID: so large is the matrix that is kept
FID_GROUPS = 10  # of owners left out in turn: each time eigenvalues are computed anew
HALVINGS = 50  # of the owners, for precision and recall
CENTRES = 512  # rows at most of a half that balls are drawn around
NEIGHBOUR = 3  # to which such a ball reaches


def on_device(features: Features, device: torch.device) -> Tensor:
    """All rows, in their own precision: 8 KB an image."""
    rows = features if isinstance(features, Tensor) else torch.from_numpy(features[:])
    return rows.to(device)


def numbered(owners: Sequence[str], most: int) -> np.ndarray:
    """(N,): the number of each row's group; groups hold whole owners, and there are `most` of them
    or fewer."""
    return np.unique(np.asarray(owners, str), return_inverse=True)[1] % most


def left_out_variance(values: np.ndarray) -> float:
    """The jackknife's variance (Efron & Stein 1981) from what is found without each group."""
    count = len(values)
    return float((count - 1) / count * np.square(values - values.mean()).sum())


# FID.


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of the Gaussians fitted to features x (N, D), y (M, D).

    |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) (Dowson & Landau 1982); N and M >= 2.
    With cov1 = A^T A of the smaller set, tr (cov1 cov2)^(1/2) is the sum of the square roots of
    the eigenvalues of A cov2 A^T: N x N instead of D x D, and exact where covariances are singular.
    """
    x, y = sorted((x.double(), y.double()), key=len)
    means = [rows.mean(0) for rows in (x, y)]
    x, y = ((rows - m) / (len(rows) - 1) ** 0.5 for rows, m in zip((x, y), means, strict=True))
    traces = x.square().sum() + y.square().sum()
    if len(x) > x.shape[1]:
        values, vectors = torch.linalg.eigh(x.T @ x)
        x = (vectors * values.clamp(min=0).sqrt()).T
    cross = x @ y.T
    roots = torch.linalg.eigvalsh(cross @ cross.T).clamp(min=0).sqrt().sum()
    return ((means[0] - means[1]).square().sum() + traces - 2 * roots).clamp(min=0)


def frechet_estimate(
    real: Tensor, fake: Tensor, patients: Sequence[str], names: Sequence[str]
) -> Estimate:
    """FID, whose error is the jackknife's over at most FID_GROUPS groups of owners a side."""
    found, counts, groups = [frechet_distance(real, fake)], [], []
    for owners in (patients, names):
        groups.append(numbered(owners, FID_GROUPS))
        counts.append(np.bincount(groups[-1]))
    if all(size.sum() - size.max() >= 2 for size in counts):
        for side, some in enumerate(groups):
            for left_out in range(len(counts[side])):
                sets, kept = [real, fake], torch.from_numpy(np.flatnonzero(some != left_out))
                sets[side] = sets[side][kept.to(real.device)]
                found.append(frechet_distance(*sets))
    value, *without = torch.stack(found).tolist()  # the only wait for a GPU
    if not without:
        return Estimate(value)
    first, second = len(counts[0]), len(counts[1])
    parts = np.array(without[:first]), np.array(without[first:])
    return Estimate(value, *combined([left_out_variance(part) for part in parts], (first, second)))


# KID.


def kernel_sums(x: Tensor, y: Tensor, x_groups: np.ndarray, y_groups: np.ndarray) -> Tensor:
    """Sums (G, H) of KID's cubic kernel over pairs of rows, by the groups that these are of."""
    numbers = [torch.from_numpy(groups).to(x.device) for groups in (x_groups, y_groups)]
    counts = int(x_groups.max()) + 1, int(y_groups.max()) + 1
    members = [
        (some[:, None] == torch.arange(count, device=x.device)).double()
        for some, count in zip(numbers, counts, strict=True)
    ]
    sums = torch.zeros(counts, dtype=torch.float64, device=x.device)
    for i in range(0, len(x), BLOCK):
        rows = np.s_[i : i + BLOCK]
        for j in range(0, len(y), BLOCK):
            columns = np.s_[j : j + BLOCK]
            kernel = (x[rows].double() @ y[columns].double().T / x.shape[1] + 1) ** 3
            sums += members[0][rows].T @ (kernel @ members[1][columns])
    return sums


def kernel_estimate(
    real: Tensor, fake: Tensor, patients: Sequence[str], names: Sequence[str]
) -> Estimate:
    """KID (Binkowski et al., arXiv 1801.01401): unbiased, over all pairs of different owners.

    Its error is the jackknife's over owners, less what that counts twice: what belongs to pairs and
    to neither owner of them (Efron & Stein 1981). Between sets of one distribution there is nothing
    else: the jackknife alone would be 1.4 times too wide, and this part is the least that there is.
    """
    groups = numbered(patients, GROUPS), numbered(names, GROUPS)
    size, other = (np.bincount(some).astype(float) for some in groups)
    if min(len(size), len(other)) < 2:
        return Estimate(float("nan"))
    sums = [
        kernel_sums(real, real, groups[0], groups[0]),
        kernel_sums(fake, fake, groups[1], groups[1]),
        kernel_sums(real, fake, *groups),
    ]
    flat = torch.cat([matrix.flatten() for matrix in sums]).cpu().numpy()  # the only wait for a GPU
    places = np.cumsum([matrix.numel() for matrix in sums])[:-1]
    within, within_other, across = (
        some.reshape(matrix.shape)
        for some, matrix in zip(np.split(flat, places), sums, strict=True)
    )
    np.fill_diagonal(within, 0)
    np.fill_diagonal(within_other, 0)
    value = within.sum() / pairs(size) + within_other.sum() / pairs(other)
    value -= 2 * across.sum() / (size.sum() * other.sum())
    variances = [
        left_out_variance(without_each(within, across, size, other)),
        left_out_variance(without_each(within_other, across.T, other, size)),
    ]
    of_pairs = pair_variance(within, size) + pair_variance(within_other, other)
    of_pairs += cross_variance(across, size, other)
    total = sum(variances)
    share = max(total - of_pairs, of_pairs) / total if total else 1.0
    return Estimate(float(value), *combined([share * v for v in variances], across.shape))


def pairs(size: np.ndarray) -> float:
    """How many ordered pairs of rows of different groups there are."""
    return float(size.sum() ** 2 - np.square(size).sum())


def without_each(
    within: np.ndarray, across: np.ndarray, size: np.ndarray, other: np.ndarray
) -> np.ndarray:
    """What KID has of each group of one side, found by leaving it out, (G,)."""
    left = np.maximum(pairs(size) - 2 * size * (size.sum() - size), 1)  # of 2 groups none is left
    alone = (within.sum() - 2 * within.sum(1)) / left
    return alone - 2 * (across.sum() - across.sum(1)) / ((size.sum() - size) * other.sum())


def pair_variance(within: np.ndarray, size: np.ndarray) -> float:
    """The variance, of the mean within one side, that belongs to pairs alone: what is left of the
    sums when additive effects of both groups are taken away; 0 for too few groups."""
    count, total = len(size), pairs(size)
    if count < 4:
        return 0.0
    others = ~np.eye(count, dtype=bool)
    rest = np.where(others, within - within.sum() / total * np.outer(size, size), 0)
    effect = rest.sum(1) / (count - 2)
    rest = np.where(others, rest - effect - effect[:, None], 0)
    return float(2 * np.square(rest).sum() * (count - 1) / (count - 3)) / total**2


def cross_variance(across: np.ndarray, size: np.ndarray, other: np.ndarray) -> float:
    """The same of twice the mean between both sides."""
    g, h = across.shape
    total = size.sum() * other.sum()
    rest = across - across.sum() / total * np.outer(size, other)
    rest = rest - rest.mean(0) - rest.mean(1)[:, None] + rest.mean()
    return float(4 * np.square(rest).sum() * g * h / ((g - 1) * (h - 1))) / total**2


# Precision and recall.


@dataclass(frozen=True)
class Share:
    """The share of other rows that lie among own ones; the baseline is that of own ones."""

    value: Estimate
    baseline: float
    difference: Estimate


def among(
    own: Tensor, other: Tensor, owners: Sequence[str], others: Sequence[str], seed: int = 0
) -> Share:
    """The share of other rows in balls around half of the own, and that of the other half of these.

    Balls reach to the 3rd neighbour, as in improved precision and recall (Kynkaanniemi et al.,
    arXiv 1904.06991). They are the same for value and baseline: both in equal numbers. Means over
    HALVINGS of the owners. own real, other samples: precision; exchanged: recall. NaN for fewer
    than 8 own rows, or one owner.
    """
    number, names = numbered(owners, len(own)), numbered(others, len(other))
    count = int(number.max()) + 1 if len(own) else 0
    if len(own) < 2 * NEIGHBOUR + 2 or count < 2 or not len(other):
        return Share(Estimate(float("nan")), float("nan"), Estimate(float("nan")))
    generator, points = np.random.default_rng(seed), torch.cat([own, other]).double()
    odd = np.concatenate([generator.permutation(k.max() + 1)[k] % 2 for k in (number, names)]) == 1
    is_own = np.arange(len(points)) < len(own)
    hits, tries = torch.zeros(len(points), dtype=torch.float64, device=own.device), 0
    alone = torch.zeros(len(own), 4, dtype=torch.float64, device=own.device)
    for _ in range(HALVINGS):
        first = generator.permutation(count)[number] < count // 2
        if first.sum() <= NEIGHBOUR:
            continue
        centres = np.sort(generator.permutation(np.flatnonzero(first))[:CENTRES])
        rest = np.concatenate([~first, np.ones(len(other), bool)])
        parts = [rest & (is_own == of_own) & (odd == side) for of_own in (0, 1) for side in (0, 1)]
        weights = np.stack([part / max(part.sum(), 1) for part in parts], axis=1)
        rows, weights, kept = (torch.from_numpy(a).to(own.device) for a in (centres, weights, rest))
        inside = within_balls(points, rows)
        hits += inside.any(0) & kept
        alone[rows] += (inside & (inside.sum(0) == 1)).double() @ weights
        tries = tries + rest
    shares = hits.cpu().numpy() / np.maximum(tries, 1)
    return _share(shares, is_own, owners, others, alone.cpu().numpy() / HALVINGS)


def within_balls(points: Tensor, centres: Tensor) -> Tensor:
    """(K, N): is a point (N, D) in the ball of a centre, which reaches to its 3rd neighbour among
    the centres; these are rows (K,) of the points."""
    around = points[centres]
    squares = around.square().sum(1)[:, None] + points.square().sum(1) - 2 * around @ points.T
    near = squares[:, centres].fill_diagonal_(torch.inf)
    return squares <= near.kthvalue(NEIGHBOUR, dim=1).values[:, None]


def _share(
    shares: np.ndarray, is_own: np.ndarray, owners: Sequence[str], others: Sequence[str],
    alone: np.ndarray,
) -> Share:  # fmt: skip
    """Of how often each point lay in the balls, and of what each centre alone (N, 4) added to it.

    Errors: that of the points, and that of the choice of centres. The latter from the two halves of
    the points, whose product has no noise of the points in it.
    """
    number, count = numbered(owners, len(owners)), len(set(owners))
    added = np.stack([np.bincount(number, column) for column in alone.T])
    added = added - added.mean(1, keepdims=True)
    value, baseline = mean_estimate(shares[~is_own], others), mean_estimate(shares[is_own], owners)
    apart = difference(value, baseline)
    found = []
    for estimate, (one, two) in ((value, added[:2]), (apart, added[:2] - added[2:])):
        parts = [estimate.error**2, max(float(one @ two), 0.0)]
        found.append(Estimate(estimate.value, *combined(parts, (estimate.freedom + 1, count))))
    return Share(found[0], baseline.value, found[1])
