"""The report of an evaluation: index.html, a page that needs no other file, and metrics.json.

The page is made by report.html.jinja, which escapes all text: file names above all.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from fibldm import disease
from fibldm.disk import replace_text, write_atomically
from fibldm.evaluation import Evaluation, Group, Picture
from fibldm.verdicts import DASH, WORDS, Score, Verdict, margin_text, number

TITLE = "Samples against real slices"
KEEP = (
    "This page shows real slices: keep it as you keep the patients' data. It compares samples with "
    "data; it is no medical device and judges no patient."
)
JUDGEMENT = (
    "A number is judged by its difference from other real patients. Within the margin differences "
    "do not matter. Good: the interval of the difference reaches 0 or lies within the margin. "
    "Doubtful: it does not reach 0, but the difference is within the margin. Bad: it does not "
    "reach 0, and the difference is beyond the margin. A group is as good as its worst number. The "
    "more numbers a group has, the wider the intervals of its verdict are: 1 % of groups of real "
    "patients are bad by chance. With few slices good only means that nothing bad was shown; the "
    "sentence then says how many more it takes. No verdict approves a use."
)
GLOSSARY = (
    "Interval: 95 %, by patients. All slices of a patient, and all samples that follow contours of "
    "one patient, are one observation. Baseline: what other real patients have. KID has 0; for "
    "precision and recall it is found in equal numbers over 50 halvings; for control it is the "
    "result of the same segmenter on real slices. No sample can be expected to do better. "
    "Difference: of value and baseline, with its interval. N: the number of real slices / samples."
)

# The question that each group of metrics answers.
QUESTIONS = {
    "Realism": "Do the samples look like slices of patients whom the models have not seen? All "
    "slices are compared at the same size and window.",
    "Control": "Are the lungs where the contour asked for them? Lungs are segmented in samples and "
    "in real slices by the same method, without a network (fibldm.lungs).",
    "Disease": "Is the tissue inside of the lungs as dense, as textured and as noisy as in real "
    "slices, and does it vary as much from patient to patient? Values are of samples, baselines of "
    "real slices, in the unit of the quantity.",
    "Privacy": "Are samples copies of the patients that the models were trained on? Below the "
    "table, the closest pairs: sample on the left, training slice on the right, closest first.",
}  # fmt: skip

# What each number means and when not to trust it, for the page.
MEANINGS = {
    "fid": "Frechet distance of Inception's features of samples and of real slices; 0 is best. It "
    "sees texture and anatomy at once, but its network learned from photographs, not from CT. It "
    "falls as the number of images grows: compare it only between equal numbers, and hardly at "
    "all under 2,048.",
    "kid": "Kernel distance of the same features; 0 is best, and values a little below 0 are "
    "chance. It does not depend on the number of images, so it is the one to read with few. "
    "Between other patients of the same scanners it is 0 in the mean: that is its baseline.",
    "precision": "Share of samples that lie among one half of the real slices, by their nearest "
    "neighbours in features: do single samples look real? The baseline is the share of the other "
    "half of real slices. A model that draws one good slice again and again has a high precision: "
    "read it with recall.",
    "recall": "Share of real slices that lie among one half of the samples: is the variety of "
    "patients there? The baseline is the share of the other half of the samples.",
    "lpips": "Perceptual distance between a sample and the real slice whose contour it was asked "
    "to follow; the baseline is that of two unrelated patients. It is no error: another patient "
    "with the same lungs is a right answer. Values far below the baseline mean that samples "
    "resemble their own patient, which is a matter for privacy.",
    "ssim": "Structural similarity of the same pairs; 1 is equality. As with LPIPS a high value is "
    "no merit by itself. Between unrelated slices it means nothing, so that only pairs are used.",
    "diversity": "Mean perceptual distance between two samples; the baseline is the same between "
    "slices of different real patients. Far below it the samples are alike (collapse); far above "
    "it they may be noise.",
    "dice": "Overlap of the contour asked for with the lungs found in the sample; 1 is best. The "
    "baseline is what the same segmenter finds on real slices against their own contours. Where it "
    "errs (consolidation, little lung), a low value may be its fault.",
    "hd95_px": "Distance between the borders of both, in pixels, below which 95 % of border points "
    "lie; 0 is best. It shows local errors that overlap hides.",
    "hd95_mm": "The same in millimetres, for slices whose pixel spacing is known.",
    "noise_power": "Power of the noise inside of the lungs, in the upper half of frequencies: a "
    "VAE smooths, and shows as missing power there. A detector of synthetic slices sees it first. "
    "Reconstruction kernels of scanners differ as well: compare like with like.",
    "spread": "How far slices of two patients, or two samples, differ on average (Gini's mean "
    "difference, 1.13 standard deviations of a normal distribution). For high and low attenuation "
    "in doublings (log2): 1 is a factor of 2. Guidance narrows it: samples then look alike, and "
    "mild and severe disease are missing.",
    "copies": "A sample is flagged if it is nearer to a training slice than 99 % of slices of "
    "held-out patients, whom no model has seen: by correlation of latents, or of fine structure "
    "in pixels after alignment. About 1 % is flagged by chance, which is the baseline. Look at the "
    "closest pairs: the same vessels at the same places are a copy, the same lungs' outline alone "
    "is what was asked for. Not being flagged proves no anonymity.",
    "controls": "The controls tell whether the search can be trusted here: training slices with "
    "noise, moved, of other contrast and through the VAE are to be found (95 % at least), held-out "
    "slices are not to be flagged (2 % at most). Where they fail, the shares above say little.",
    "glcm": "Texture by co-occurrence of grey levels in neighbouring pixels of the lungs: "
    "contrast, homogeneity, energy, correlation. They depend on pixel spacing, on resizing and on "
    "the scanner's kernel.",
    "density": "Attenuation inside of the lungs as histograms (mean, median, standard deviation, "
    "skewness, kurtosis), the shares of high (-600 to -250 HU, rises with fibrosis) and low "
    "attenuation (below -950 HU, emphysema), and the lungs' area. Means over slices. Depth of "
    "breath moves all of them: compare groups that were scanned alike.",
}  # fmt: skip
ABOUT = {  # what of MEANINGS a group shows under which name, where that is not each score's own
    "Disease": {name: name for name in ("density", "glcm", "noise_power", "spread")},
    "Privacy": {"flagged as copies": "copies", "controls": "controls"},
}


# Plots: real slices are a filled area, samples a dashed line: a grey print tells them apart.

BINS = 24


@dataclass(frozen=True)
class Plot:
    """A plot in words (`alt`) and in its own units, which the page scales.

    shapes: classes and path of each; ticks: where, what, and how it is aligned; label and unit: of
    the horizontal and of the vertical axis.
    """

    shapes: Sequence[tuple[str, str]]
    x_ticks: Sequence[tuple[str, str, str]]
    y_ticks: Sequence[tuple[str, str]]
    label: str
    unit: str
    alt: str
    title: str = ""
    width: int = 340
    height: int = 210
    left: int = 64  # margins
    right: int = 12
    top: int = 12
    bottom: int = 40


def histograms(real: Sequence[float], fake: Sequence[float], label: str, alt: str) -> Plot | None:
    """Shares of values per bin, over bins that both have in common. Values not finite are left out.

    label: what the horizontal axis shows, with its unit; alt: the plot in words. None where one
    side has no values.
    """
    real, fake = (np.asarray(values, float) for values in (real, fake))
    real, fake = real[np.isfinite(real)], fake[np.isfinite(fake)]
    if not len(real) or not len(fake):
        return None
    both = np.concatenate([real, fake])
    low, high = float(both.min()), float(both.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(np.sqrt(min(len(real), len(fake))) * 2, 6, BINS))
    edges = np.linspace(low, high, bins + 1)
    shares = [np.histogram(values, edges)[0] / len(values) for values in (real, fake)]
    steps = [np.concatenate([[0], np.repeat(share, 2), [0]]) for share in shares]
    x, top = np.repeat(edges, 2), float(max(share.max() for share in shares))
    shapes = [("real area", x, steps[0]), ("fake line", x, steps[1])]
    return plot_of(shapes, (low, high), (0, top), label=label, unit="share", alt=alt)


def spectra(
    x: Sequence[float], real: np.ndarray, fake: np.ndarray, label: str, unit: str, alt: str
) -> Plot | None:
    """Curves (N, len(x)) of real and of generated slices: medians, and the middle 80 % as bands.

    On a logarithmic vertical axis; values that are not above 0 are left out. None where one side
    has no curve with two such points.
    """
    x, bands = np.asarray(x, float), []
    for curves in (real, fake):
        curves = np.asarray(curves, float).reshape(-1, len(x))
        logs = np.log10(np.where(curves > 0, curves, np.nan))
        seen = np.isfinite(logs).any(axis=0)
        if seen.sum() < 2:
            return None
        bands.append((x[seen], np.nanpercentile(logs[:, seen], [10, 50, 90], axis=0)))
    values = np.concatenate([band.ravel() for _, band in bands])
    ys = float(values.min()), float(values.max())
    if ys[0] == ys[1]:
        ys = ys[0] - 0.5, ys[1] + 0.5
    shapes = []
    for kind, (at, (low, middle, high)) in zip(("real", "fake"), bands, strict=True):
        around = np.concatenate([at, at[::-1]]), np.concatenate([low, high[::-1]])
        shapes += [(f"{kind} band", *around), (f"{kind} line", at, middle)]
    words = {"label": label, "unit": unit, "alt": alt}
    title = "Median, and the middle 80 % of slices as bands"
    xs = float(x.min()), float(x.max())
    return plot_of(shapes, xs, ys, logarithmic=True, title=title, **words)


def plot_of(
    shapes: Sequence[tuple[str, np.ndarray, np.ndarray]],
    xs: tuple[float, float],
    ys: tuple[float, float],
    logarithmic: bool = False,
    **words: str,
) -> Plot:
    """Shapes (class, x, y) within axes of these limits, with three ticks each."""

    def across(x: np.ndarray) -> np.ndarray:
        return Plot.left + (x - xs[0]) / (xs[1] - xs[0]) * (Plot.width - Plot.right - Plot.left)

    def up(y: np.ndarray) -> np.ndarray:
        foot = Plot.height - Plot.bottom
        return foot + (y - ys[0]) / (ys[1] - ys[0]) * (Plot.top - foot)

    paths = []
    for kind, x, y in shapes:
        points = zip(across(x), up(np.asarray(y, float)), strict=True)
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        paths.append((kind, path if kind.endswith("line") else path + "Z"))
    anchors = zip(np.linspace(*xs, 3), ("start", "middle", "end"), strict=True)
    x_ticks = [(f"{across(x):.1f}", f"{x:.3g}", anchor) for x, anchor in anchors]
    y_ticks = []
    for y in np.linspace(*ys, 3):
        shown = 10**y if logarithmic else y
        y_ticks.append((f"{up(y) + 4:.1f}", f"{float(f'{shown:.2g}'):,.6g}"))
    return Plot(paths, x_ticks, y_ticks, **words)


def disease_plots(
    real: Sequence[disease.Measures], fake: Sequence[disease.Measures], label: str
) -> list[Plot]:
    """Histograms of all quantities and the noise spectra, of slices of a label ("": all)."""
    whose = f"real slices and samples{', ' * bool(label)}{label}"
    plots = []
    for name, meaning in disease.QUANTITIES.items():
        values = [[row[name] for row in rows] for rows in (real, fake)]
        plots.append(histograms(*values, meaning, f"Histograms of {meaning}: {whose}"))
    curves = [np.array([[row[n] for n in disease.NOISE] for row in rows]) for rows in (real, fake)]
    axes = "noise power spectrum: cycles per pixel", "HU² px²"
    plots.append(spectra(disease.FREQUENCIES, *curves, *axes, f"Noise power spectra: {whose}"))
    return [plot for plot in plots if plot is not None]


# The page.


@dataclass(frozen=True)
class Section:
    """A part of the page: text (paragraphs parted by an empty line), its table, what is seen.

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


def sections_of(evaluation: Evaluation) -> list[Section]:
    """Pictures first, then each group of metrics, then the notes."""
    low, high = evaluation.window
    text = (
        f"All slices are shown in the same window, {low:g} to {high:g} HU. Samples are taken at "
        "even distances from the list. None is chosen."
    )
    if evaluation.paired:
        text += (
            " Each row: the real slice with the contour that was asked for; the sample; the sample "
            "with the contour. A sample should be another patient with the same lungs, so its "
            "tissue should differ."
        )
    sections = [Section("Samples beside real slices", text, pictures=evaluation.pictures)]
    for title, group in evaluation.groups.items():
        about = ABOUT.get(title, {score.name: score.name for score in group.scores})
        if not group.scores or title not in QUESTIONS:
            about = {}
        plots, (kind, _, label) = [], title.partition(": ")
        if kind == "Disease":
            real = zip(evaluation.real, evaluation.real_labels, strict=True)
            fake = ((one.numbers.measures, one.label) for one in evaluation.samples)
            sides = [[m for m, found in some if label in ("", found)] for some in (real, fake)]
            plots = disease_plots(*sides, label)
        sections.append(
            Section(
                title, QUESTIONS.get(title, "") if group.scores else "", group.scores,
                evaluation.closest if title == "Privacy" else (), group.notes, plots,
                {name: MEANINGS[key] for name, key in about.items()}, group.verdict,
            )
        )  # fmt: skip
    return [*sections, Section("Notes", KEEP, notes=evaluation.notes)]


def render(title: str, sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """The page as HTML text; `facts` says what was compared, by which versions."""
    for section in sections:
        if section.verdict and section.verdict.word not in WORDS:
            word = section.verdict.word
            raise ValueError(f"verdict {word!r}; expected one of {', '.join(WORDS)}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "interval": interval, "base64_png": base64_png}
    environment.filters |= {"difference": difference, "margin": margin_text}
    page = environment.get_template("report.html.jinja").render(
        title=title, sections=sections, facts=facts, judgement=JUDGEMENT, glossary=GLOSSARY
    )
    return page.lstrip()


def interval(score: Score) -> str:
    """A score's interval in words, a dash where there is none."""
    if not math.isfinite(score.low + score.high):
        return DASH
    return f"{number(score.low)} to {number(score.high)}"


def difference(score: Score) -> str:
    """A score's difference from its baseline with its interval, a dash where it is not judged."""
    if not score.judged:
        return DASH
    low, high = map(number, score.difference.interval())
    return f"{number(score.difference.value)} ({low} to {high})"


def base64_png(pixels: np.ndarray) -> str:
    """RGB or grey uint8 (H, W, 3) or (H, W) as a PNG; slices under 128 pixels are enlarged."""
    image = Image.fromarray(pixels)
    factor = -(-128 // image.height)
    if factor > 1:
        size = factor * image.width, factor * image.height
        image = image.resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


# Files.


def require_own(folder: str | Path) -> None:
    """ValueError where a folder holds another index.html than a report's."""
    if Path(folder, "index.html").exists() and not Path(folder, "metrics.json").exists():
        raise ValueError(f"{folder} holds another index.html; write the report to another folder")


def write_report(evaluation: Evaluation, folder: str | Path) -> None:
    """Write index.html and metrics.json; both are made before either is written.

    ValueError where the folder holds another index.html.
    """
    require_own(folder)
    page = render(TITLE, sections_of(evaluation), evaluation.facts)
    numbers = json.dumps(as_dict(evaluation), indent=1, allow_nan=False) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoded = page.encode(errors="replace")  # a file name may be no text
    write_atomically(folder / "index.html", lambda temporary: temporary.write_bytes(encoded))
    replace_text(folder / "metrics.json", numbers)


def as_dict(evaluation: Evaluation) -> dict:
    """Every number of the report, and what was found of each sample; None for NaN."""
    samples = []
    for one in evaluation.samples:
        measures = {k: value for k, value in one.numbers.measures.items() if np.isfinite(value)}
        sample: dict = {"file": one.file, "implausible": one.numbers.implausible}
        sample["measures"] = measures
        if one.nearest is not None:
            match = one.nearest
            sample["nearest"] = {
                "flagged": match.flagged, "ratio": match.ratio, "training_slice": match.row,
                "distances": match.distances,
            }  # fmt: skip
        samples.append(sample)
    notes = {"Notes": Group(notes=evaluation.notes)} if evaluation.notes else {}
    groups = {
        title: {
            "verdict": group.verdict and group.verdict.word,
            "summary": group.verdict and group.verdict.sentence,
            "notes": list(group.notes),
            "scores": [score.as_dict() for score in group.scores],
        }
        for title, group in (evaluation.groups | notes).items()
    }
    return {"facts": evaluation.facts, "groups": groups, "samples": samples}
