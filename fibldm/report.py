"""The report of an evaluation: one HTML page that needs no other file, no network and no script.

All text that comes from outside, file names above all, is escaped where it enters the page.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from fibldm.disk import write_atomically
from fibldm.metrics import Score

WORDS = ("good", "doubtful", "bad", "not judged")
JUDGEMENT = (
    "Good: the interval reaches the baseline, so that this metric cannot tell the samples from "
    "other real patients. Doubtful: farther than that, but at most twice as far as the baseline. "
    "Bad: farther still. A group is as good as its worst number. With few images the intervals are "
    "wide, and good then only means not shown to be bad. The words approve of no use."
)
DASH = "\N{EN DASH}"  # for a number that is not there
GLOSSARY = (
    "Interval: 95 % of bootstrap resamples, of patients for real slices and of single samples for "
    "generated ones. Baseline (real against real): the same metric between two disjoint halves of "
    "the real patients (for control: of the same segmenter on real slices); nothing generated can "
    "be expected to do better. N: real slices / samples that the number is of."
)


@dataclass(frozen=True)
class Picture:
    """A picture with its caption; `alt` says in words what is seen."""

    title: str
    png: bytes
    alt: str


@dataclass(frozen=True)
class Plot:
    """A plot of fibldm.plots with its caption; the SVG goes into the page as it is."""

    title: str
    svg: str


@dataclass(frozen=True)
class Verdict:
    """One of WORDS for a group of metrics, and the sentence that says why."""

    word: str
    sentence: str


@dataclass(frozen=True)
class Section:
    """A group of metrics: text (paragraphs parted by an empty line), its table, what is seen.

    `meanings` maps a metric to what it means and when not to trust it.
    """

    title: str
    text: str = ""
    scores: Sequence[Score] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    meanings: Mapping[str, str] = field(default_factory=dict)
    verdict: Verdict | None = None


def judge(score: Score, higher_is_better: bool = False, squared: bool = False) -> Verdict:
    """A score against its baseline, by the rule that JUDGEMENT tells the reader.

    How far a score is counts from 0, or from 1 where higher is better (Dice); of a squared distance
    (FID, KID) its root counts.
    """
    shown = f"{score.name} {number(score.value)}"
    value, baseline, best = score.value, score.baseline, score.low
    if squared:
        baseline = max(baseline, 0.0)  # an estimate of 0 may lie below it by chance
    if not math.isfinite(value) or not math.isfinite(baseline) or (baseline == 0 and not squared):
        return Verdict("not judged", f"{shown}, no baseline to compare it with")
    if higher_is_better:
        value, baseline, best = 1 - score.value, 1 - score.baseline, 1 - score.high
    if math.isnan(best):
        best = value
    near = value <= (4 if squared else 2) * baseline
    word = "good" if best <= baseline else "doubtful" if near else "bad"
    interval = ""
    if math.isfinite(score.low):
        interval = f" (interval {number(score.low)} to {number(score.high)})"
    return Verdict(word, f"{shown}{interval}, baseline {number(score.baseline)}")


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst word of several verdicts, and all their sentences."""
    words = [verdict.word for verdict in verdicts]
    word = next(w for w in ("bad", "doubtful", "good", "not judged") if w in words)
    return Verdict(word, "; ".join(verdict.sentence for verdict in verdicts))


def number(value: float | None) -> str:
    """Four digits, or a dash for a value that is not there."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.4g}"


def png_bytes(picture: np.ndarray) -> bytes:
    """RGB or grey uint8 (H, W, 3) or (H, W) as a PNG file; slices under 128 pixels are enlarged."""
    image = Image.fromarray(picture)
    factor = -(-128 // image.height)
    if factor > 1:
        size = factor * image.width, factor * image.height
        image = image.resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def write_report(
    path: Path, title: str, sections: Sequence[Section], facts: Mapping[str, str]
) -> None:
    """Write the page, whole or not at all; `facts` says what was compared, by which versions."""
    text = render(title, sections, facts).encode(
        "utf-8", "replace"
    )  # names of files may be no text
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(text))


def render(title: str, sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """The page as HTML text."""
    body = [f"<header><h1>{escape(title)}</h1>", _summary(sections), "</header>", "<main>"]
    body += [_section(section, f"s{i}") for i, section in enumerate(sections)]
    body += [_facts(facts), "</main>"]
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))


def _summary(sections: Sequence[Section]) -> str:
    """A line a group that has a verdict, and what the words mean."""
    lines = []
    for i, section in enumerate(sections):
        verdict = section.verdict
        if verdict is None:
            continue
        if verdict.word not in WORDS:
            raise ValueError(f"verdict {verdict.word!r}; expected one of {', '.join(WORDS)}")
        badge = f'<b class="badge {verdict.word.split()[0]}">{verdict.word}</b>'
        name = f'<a href="#s{i}">{escape(section.title)}</a>'
        lines.append(f"<li>{badge} <span>{name}: {escape(verdict.sentence)}</span></li>")
    if not lines:
        return ""
    said = "".join(f'<p class="small">{escape(text)}</p>' for text in (JUDGEMENT, GLOSSARY))
    return f'<ul class="summary">{"".join(lines)}</ul>\n{said}'


def _section(section: Section, anchor: str) -> str:
    parts = [f'<section id="{anchor}"><h2>{escape(section.title)}</h2>']
    parts += [f"<p>{escape(text)}</p>" for text in section.text.split("\n\n") if text]
    if section.scores:
        # What is said of all rows is said once.
        scores, said = section.scores, {score.warning for score in section.scores}
        if len(scores) > 1 and len(said) == 1 and said != {""}:
            scores = [replace(score, warning="") for score in scores]
            parts.append(f'<p class="caution">All rows: {escape(*said)}.</p>')
        parts.append(_table(scores))
    if section.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in section.notes)
        parts.append(f'<ul class="notes">{notes}</ul>')
    if section.plots:
        plots = "".join(
            f"<figure>{plot.svg}{_caption(plot.title)}</figure>" for plot in section.plots
        )
        legend = (
            '<p class="legend"><span class="key real"></span> real '
            '<span class="key fake"></span> samples</p>'
        )
        parts.append(f'{legend}<div class="plots">{plots}</div>')
    if section.pictures:
        pictures = "".join(_picture(picture) for picture in section.pictures)
        parts.append(f'<div class="pictures">{pictures}</div>')
    if section.meanings:
        terms = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
            for name, text in section.meanings.items()
        )
        parts.append(f"<h3>What the numbers mean</h3><dl>{terms}</dl>")
    return "\n".join([*parts, "</section>"])


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">'
    return f"<figure>{image}{_caption(picture.title)}</figure>"


def _caption(title: str) -> str:
    return f"<figcaption>{escape(title)}</figcaption>" if title else ""


def _table(scores: Sequence[Score]) -> str:
    """A row a score; on a phone each row is a card, whose cells name their column themselves."""
    columns = ["metric", "value", "95 % interval", "baseline", "N real / fake", "source"]
    columns += ["warning"] * any(score.warning for score in scores)
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    rows = []
    for score in scores:
        interval = DASH
        if math.isfinite(score.low) and math.isfinite(score.high):
            interval = f"{number(score.low)} to {number(score.high)}"
        cells = (
            score.name, number(score.value), interval, number(score.baseline),
            f"{score.n_real} / {score.n_fake}", score.source, score.warning,
        )  # fmt: skip
        row = f'<th scope="row">{escape(score.name)}</th>'
        for column, cell in list(zip(columns, cells, strict=False))[1:]:
            kind = column if column in ("source", "warning") else "figure"
            row += f'<td class="{kind}" data-column="{column}">{escape(cell)}</td>'
        rows.append(f"<tr>{row}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(text))}</dd>" for name, text in facts.items()
    )
    return f'<section id="facts"><h2>What was compared</h2><dl class="facts">{rows}</dl></section>'


# The policy forbids the page what it does not need, should a text get through that acts as markup.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

STYLE = """
:root { --ink: #1b1f24; --soft: #4d5661; --page: #ffffff; --card: #f3f5f7; --rule: #c9d0d8;
  --real: #2f6fae; --fake: #b4400a; --good: #1a6b37; --doubtful: #7a5200; --bad: #a3161f;
  --plain: #4d5661; --badge: #ffffff; --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebef; --soft: #b3bcc7; --page: #14171b; --card: #1f242a; --rule: #434b55;
    --real: #7db5ee; --fake: #ff9a5c; --good: #7fd69a; --doubtful: #f0c25a; --bad: #ff9a9a;
    --plain: #b3bcc7; --badge: #14171b; --link: #8cc2ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--rule);
  padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, dd { max-width: 46rem; margin: .5rem 0; }
a { color: var(--link); }
.small { color: var(--soft); font-size: .875rem; }
.summary { list-style: none; margin: 0; padding: 0; }
.summary li { display: flex; gap: .75rem; align-items: baseline; padding: .5rem 0;
  border-bottom: 1px solid var(--rule); }
.summary li span { min-width: 0; }
.badge { flex: 0 0 6.2rem; text-align: center; border-radius: .25rem; font-size: .875rem;
  color: var(--badge); background: var(--plain); padding: .1rem .4rem; }
.badge.good { background: var(--good); }
.badge.doubtful { background: var(--doubtful); }
.badge.bad { background: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0;
  border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; }
td.figure { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.source { color: var(--soft); overflow-wrap: anywhere; min-width: 10rem; }
td.warning, .caution { color: var(--doubtful); }
td.warning { min-width: 12rem; }
.notes { padding-left: 1.2rem; }
.pictures { --least: 28rem; }
.plots { --least: 20rem; }
.plots, .pictures { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }
figure { margin: 0; background: var(--card); padding: .5rem; border-radius: .4rem; }
figure img { display: block; width: 100%; max-width: 100%; height: auto; background: #000; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .875rem; color: var(--soft); padding-top: .35rem; overflow-wrap: anywhere; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg path { fill: none; }
svg .axis { stroke: var(--soft); }
svg .area.real { fill: var(--real); fill-opacity: .35; stroke: var(--real); }
svg .band.real { fill: var(--real); fill-opacity: .25; }
svg .band.fake { fill: var(--fake); fill-opacity: .2; }
svg .line.real { stroke: var(--real); stroke-width: 2; }
svg .line.fake { stroke: var(--fake); stroke-width: 2; stroke-dasharray: 5 3; }
.legend { color: var(--soft); font-size: .875rem; }
.key { display: inline-block; width: 1.6rem; height: .6rem; margin-left: .8rem;
  vertical-align: middle; }
.key.real { background: var(--real); margin-left: 0; }
.key.fake { height: 0; border-top: 3px dashed var(--fake); }
dl { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: .5rem 1rem; max-width: 56rem; }
dt { font-weight: 600; overflow-wrap: anywhere; }
dd { margin: 0; max-width: none; }
.facts { font-size: .875rem; }
.facts dd { color: var(--soft); overflow-wrap: anywhere; }
@media (max-width: 46rem) {
  thead { display: none; }
  table, tbody, tr, th, td { display: block; width: 100%; }
  tbody tr { background: var(--card); border-radius: .4rem; padding: .6rem .75rem;
    margin-bottom: .75rem; }
  tbody th { font-size: 1rem; border: 0; padding: 0 0 .25rem; }
  td { display: grid; grid-template-columns: 6.5rem minmax(0, 1fr); gap: .5rem; border: 0;
    padding: .1rem 0; }
  td.figure { white-space: normal; }
  td::before { content: attr(data-column); color: var(--soft); }
  td:empty { display: none; }
  .badge { flex-basis: 5.6rem; }
  dl { display: block; }
  dt { margin-top: .75rem; }
}
@media print {
  :root { --ink: #000; --soft: #333; --page: #fff; --card: #fff; --rule: #999; --real: #2f6fae;
    --fake: #b4400a; --good: #1a6b37; --doubtful: #7a5200; --bad: #a3161f; --plain: #4d5661;
    --badge: #fff; --link: #000; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  .badge, figure img, .key { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr, .summary li, dt { break-inside: avoid; }
  h2, h3, dt, thead { break-after: avoid; }
  .pictures, .plots { grid-template-columns: repeat(2, 1fr); }
  .wide { overflow: visible; }
  table { font-size: 8.5pt; }
}
"""
