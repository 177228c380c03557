"""Plots as SVG text that stands inside of an HTML page: two distributions, two families of curves.

Real slices are a filled area, generated ones a dashed line, so that a grey print tells them apart.
Colours and the font come from the page: classes `real`, `fake`, `axis` and `label`.
"""

from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 340, 210  # of a plot, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 40  # margins
BINS = 24


def histograms(real: Sequence[float], fake: Sequence[float], label: str, alt: str) -> str:
    """Shares of values per bin, over bins that both have in common. Values not finite are left out.

    label: what the horizontal axis shows, with its unit; alt: the plot in words. Returns "" where
    one side has no values.
    """
    real, fake = (np.asarray(values, float) for values in (real, fake))
    real, fake = real[np.isfinite(real)], fake[np.isfinite(fake)]
    if not len(real) or not len(fake):
        return ""
    both = np.concatenate([real, fake])
    low, high = float(both.min()), float(both.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(np.sqrt(min(len(real), len(fake))) * 2, 6, BINS))
    edges = np.linspace(low, high, bins + 1)
    shares = [np.histogram(values, edges)[0] / len(values) for values in (real, fake)]
    top = float(max(share.max() for share in shares))
    x = np.repeat(edges, 2)
    steps = [np.concatenate([[0], np.repeat(share, 2), [0]]) for share in shares]
    marks = [
        f'<path class="real area" d="{_path(x, steps[0], (low, high), (0, top))}Z"/>',
        f'<path class="fake line" d="{_path(x, steps[1], (low, high), (0, top))}"/>',
    ]
    return _svg(marks, (low, high), (0, top), label, "share", alt)


def spectra(
    x: Sequence[float], real: np.ndarray, fake: np.ndarray, label: str, unit: str, alt: str
) -> str:
    """Curves (N, len(x)) of real and of generated slices: medians, and the middle 80 % as bands.

    On a logarithmic vertical axis; values that are not above 0 are left out. Returns "" where one
    side has no curve with two such points.
    """
    x = np.asarray(x, float)
    bands = []
    for curves in (real, fake):
        curves = np.asarray(curves, float).reshape(-1, len(x))
        logs = np.log10(np.where(curves > 0, curves, np.nan))
        seen = np.isfinite(logs).any(axis=0)
        if seen.sum() < 2:
            return ""
        bands.append((x[seen], np.nanpercentile(logs[:, seen], [10, 50, 90], axis=0)))
    values = np.concatenate([band.ravel() for _, band in bands])
    xs, ys = (float(x.min()), float(x.max())), (float(values.min()), float(values.max()))
    if ys[0] == ys[1]:
        ys = ys[0] - 0.5, ys[1] + 0.5
    marks = []
    for kind, (at, (low, middle, high)) in zip(("real", "fake"), bands, strict=True):
        around = _path(np.concatenate([at, at[::-1]]), np.concatenate([low, high[::-1]]), xs, ys)
        marks.append(f'<path class="{kind} band" d="{around}Z"/>')
        marks.append(f'<path class="{kind} line" d="{_path(at, middle, xs, ys)}"/>')
    return _svg(marks, xs, ys, label, unit, alt, logarithmic=True)


def _scale(values: np.ndarray, limits: tuple[float, float], start: float, end: float) -> np.ndarray:
    low, high = limits
    return start + (np.asarray(values, float) - low) / (high - low) * (end - start)


def _path(x: np.ndarray, y: np.ndarray, xs: tuple[float, float], ys: tuple[float, float]) -> str:
    across = _scale(x, xs, LEFT, WIDTH - RIGHT)
    up = _scale(y, ys, HEIGHT - BOTTOM, TOP)
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(across, up, strict=True))


def _svg(
    marks: list[str],
    xs: tuple[float, float],
    ys: tuple[float, float],
    label: str,
    unit: str,
    alt: str,
    logarithmic: bool = False,
) -> str:
    """Marks inside of axes with three ticks each."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">',
        *marks,
        f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>',
    ]
    for value in np.linspace(*xs, 3):
        at = _scale(value, xs, LEFT, WIDTH - RIGHT)
        where = {xs[0]: "start", xs[1]: "end"}.get(float(value), "middle")
        text = f'<text class="label" x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{where}">'
        parts.append(f"{text}{value:.3g}</text>")
    for value in np.linspace(*ys, 3):
        at = _scale(value, ys, HEIGHT - BOTTOM, TOP)
        shown = 10**value if logarithmic else value
        text = f'<text class="label" x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">'
        parts.append(f"{text}{float(f'{shown:.2g}'):,.6g}</text>")
    middle = (LEFT + WIDTH - RIGHT) / 2
    text = f'<text class="label" x="{middle:g}" y="{HEIGHT - 6}" text-anchor="middle">'
    parts.append(f"{text}{escape(label)}</text>")
    across = f'transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2:g}) rotate(-90)"'
    parts.append(f'<text class="label" {across} text-anchor="middle">{escape(unit)}</text>')
    return "".join([*parts, "</svg>"])
