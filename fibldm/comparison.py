"""The same lungs with each of several labels: a picture of them, and how diseased they are."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fibldm import ct
from fibldm.conditions import Conditions, label_caption
from fibldm.datasets import spread
from fibldm.disease import HIGH_ATTENUATION, high_attenuation
from fibldm.lungs import lung_mask
from fibldm.panels import REAL, write_comparison

ROWS = 5  # of the picture
MOST_REAL = 200  # real slices of a label that are measured
SHOWN = (-1350.0, 150.0)  # HU: the lung window of radiologists


def write_rows(
    path: Path,
    attempts: Mapping[int, int],
    asked: Conditions,
    read: Callable[[int], np.ndarray],
) -> None:
    """Write a PNG with a row for each of some noises, evenly chosen, in the lung window.

    Contour and real slice, where there are any; the samples of all labels; the contour on the last
    of them. attempts: of the samples that are there; read: HU (S, S) of one.
    """
    each = asked.per_noise
    rows = [noise * each for noise in spread(sorted({i // each for i in attempts}), ROWS)]
    shown = [i + k for i in rows for k in range(each) if i + k in attempts]
    images = {i: ct.hu_to_unit(read(i), SHOWN) for i in shown}
    blank = np.full_like(images[shown[0]], -1)
    samples, captions = {}, {}
    for k, label in enumerate(asked.compared):
        title = f"sample: {label_caption(label)}".replace(", ", ",\n")
        samples[title] = np.stack([images.get(i + k, blank) for i in rows])
        done = [attempts.get(i + k) for i in rows]
        captions[title] = ["left out" if n is None else "drawn again" * (n > 0) for n in done]
    places, real = [asked.place(i) for i in rows], None
    if asked.real is not None:
        real = ct.hu_to_unit(asked.real.hu(places), SHOWN)
        captions[REAL] = [label_caption(asked.labels[place]) for place in places]
    write_comparison(path, samples, asked.of(rows), real, captions)


def describe_high_attenuation(shares: Mapping[int, float], asked: Conditions) -> list[str]:
    """Lines: for each label the mean share of the lungs with high attenuation.

    shares: of each sample. Beside a label that is no mixture stands the share of at most MOST_REAL
    real slices with it, evenly chosen, where there are any.
    """
    low, high = HIGH_ATTENUATION
    lines = [f"high-attenuation area ({low:g} to {high:g} HU), mean share of the lungs:"]
    for k, label in enumerate(asked.compared):
        own = [share for i, share in shares.items() if i % asked.per_noise == k]
        line = f"  {label_caption(label)}: {_mean_share(own, 'samples')}"
        if asked.real is not None and isinstance(label, str):  # no mixture
            places = [place for place, name in enumerate(asked.labels) if name == label]
            hus = (asked.real.hu([place])[0] for place in spread(places, MOST_REAL))
            own = [high_attenuation(hu, lung_mask(hu)) for hu in hus]
            line += f"; {_mean_share(own, 'real slices')}"
        lines.append(line)
    return lines


def _mean_share(shares: Sequence[float], what: str) -> str:
    """Of those that are known: a slice without lungs has none."""
    known = [share for share in shares if not np.isnan(share)]
    if not known:
        return f"no {what} with lungs" if shares else f"no {what}"
    count = f"{len(known)} of {len(shares)}" if len(known) < len(shares) else len(known)
    return f"{100 * np.mean(known):.1f} % in {count} {what}"
