"""The chapters of an evaluation's report: tables, verdicts, plots, pictures, and what they mean."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fibldm import ct, disease, panels, plots
from fibldm.evaluation import Copies, Looked, Measured
from fibldm.features import Networks
from fibldm.metrics import Score
from fibldm.privacy import FALSE, FOUND, Match
from fibldm.report import Picture, Plot, Section, Verdict, judge, number, png_bytes, worst

IMPLAUSIBLE = 0.05  # share of samples with implausible lungs: more is bad
NEAR = 0.5  # of the threshold: a sample as near as that is looked at, however few there are
LISTED = 30  # lines of a list in the report; metrics.json has all

# What each number means and when not to trust it, for the page.
MEANINGS = {
    "fid": "Frechet distance of Inception's features of samples and of real slices; 0 is best. It "
    "sees texture and anatomy at once, but its network learned from photographs, not from CT. It "
    "falls as the number of images grows: compare it only between equal numbers, and hardly at "
    "all under 2,048.",
    "kid": "Kernel distance of the same features; 0 is best, and values a little below 0 are "
    "chance. Its mean does not depend on the number of images, so it is the one to read with few. "
    "Don't trust differences that are smaller than the interval.",
    "precision": "Share of samples that lie among real slices, by their nearest neighbours in "
    "features: do single samples look real? A model that draws one good slice again and again has "
    "a high precision: read it with recall.",
    "recall": "Share of real slices that lie among samples: is the variety of patients there? It "
    "is low for few samples, whatever the model.",
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
    "noise_power": "How far the noise spectra inside of the lungs differ, at all frequencies: a "
    "VAE smooths, and shows as missing power at high frequencies. A detector of synthetic slices "
    "sees it first. Reconstruction kernels of scanners differ as well: compare like with like.",
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
    "attenuation (below -950 HU, emphysema), and the lungs' area. Each value is the distance by "
    "which a slice would have to move on average, in the quantity's unit. Depth of breath moves "
    "all of them: compare groups that were scanned alike.",
}  # fmt: skip


def realism_section(networks: Networks, scores: list[Score]) -> Section:
    by_name = {score.name: score for score in scores}
    verdicts = [
        judge(by_name[name], higher, squared)
        for name, higher, squared in (
            ("kid", False, True), ("precision", True, False), ("recall", True, False),
        )
        if name in by_name
    ]  # fmt: skip
    if verdicts:
        verdict = worst(verdicts)
    else:
        verdict = Verdict(
            "not judged", "the weights of Inception are missing (fetch_metric_weights.py)"
        )
    text = (
        "Do the samples look like slices of patients whom the models have not seen? All slices "
        "are compared at the same size and window."
    )
    notes = left_out(networks)
    meanings = {score.name: MEANINGS[score.name] for score in scores}
    return Section("Realism", text, scores, (), notes, (), meanings, verdict)


def left_out(networks: Networks) -> list[str]:
    """A sentence for each missing file of weights: the metrics that it costs."""
    names: dict[str, list[str]] = {}
    for reason in networks.missing.values():
        name, _, rest = reason.partition(" is left out: ")
        names.setdefault(rest, []).append(name)
    return [f"Left out: {', '.join(some)}. {rest}" for rest, some in names.items()]


def control_section(scores: list[Score], notes: list[str]) -> Section:
    text = (
        "Are the lungs where the contour asked for them? Lungs are segmented in samples and in "
        "real slices by the same method, without a network (fibldm.lungs)."
    )
    verdict = Verdict("not judged", "no contours are known")
    for score in scores:
        if score.name == "dice":
            verdict = judge(score, higher_is_better=True)
    meanings = {score.name: MEANINGS[score.name] for score in scores}
    return Section("Control", text, scores, (), notes, (), meanings, verdict)


def disease_sections(
    real: Measured, patients: list[str], labels: list[str],
    fake: Measured, names: list[str], fake_labels: list[str], draws: int, seed: int,
) -> list[Section]:  # fmt: skip
    """All slices, then each label that both have."""
    of_all = disease.compare(real.measures, patients, fake.measures, names, draws, seed)
    by_label, notes = disease.compare_by_label(
        real.measures, patients, labels, fake.measures, names, fake_labels, draws, seed
    )
    share = len(fake.implausible) / len(names)
    strange = f"{len(fake.implausible)} of {len(names)} samples have implausible lungs"
    verdicts = [judge(score) for score in of_all]
    known = [verdict for verdict in verdicts if verdict.word != "not judged"]
    words = Counter(verdict.word for verdict in known)
    counts = ", ".join(f"{words[word]} {word}" for word in ("good", "doubtful", "bad"))
    verdict = Verdict("not judged", strange)
    if known:
        judged = [score for score in of_all if judge(score).word != "not judged"]
        far = max(judged, key=lambda score: score.value / score.baseline)
        word = worst(known).word if share <= IMPLAUSIBLE else "bad"
        verdict = Verdict(
            word,
            f"of {len(known)} quantities {counts}; farthest: {far.name} {number(far.value)}, "
            f"baseline {number(far.baseline)}; {strange}",
        )
    listed = [f"{names[i]}: {reason}" for i, reason in fake.implausible.items()]
    strange += ":" if listed else "."
    rest = [f"... and {len(listed) - LISTED} more (metrics.json)"] if len(listed) > LISTED else []
    text = (
        "Is the tissue inside of the lungs as dense, as textured and as noisy as in real slices? "
        "Each value is a distance between two distributions, in the unit of its quantity: 0 is "
        "best, and the baseline is what two groups of real patients differ by."
    )
    meanings = {key: MEANINGS[key] for key in ("density", "glcm", "noise_power")}
    sections = [
        Section(
            "Disease", text, of_all, (), [strange, *listed[:LISTED], *rest],
            disease_plots(real.measures, fake.measures, ""), meanings, verdict,
        )
    ]  # fmt: skip
    for label, scores in by_label.items():
        some = [
            [row for row, found in zip(rows, of, strict=True) if found == label]
            for rows, of in ((real.measures, labels), (fake.measures, fake_labels))
        ]
        drawn = disease_plots(*some, label)
        sections.append(Section(f"Disease: {label}", "", scores, (), (), drawn))
    if notes and by_label:
        sections[0] = replace(sections[0], notes=[*sections[0].notes, *notes])
    return sections


def disease_plots(
    real: list[disease.Measures], fake: list[disease.Measures], label: str
) -> list[Plot]:
    """Histograms of all quantities and the noise spectra, of slices of a label ("": all)."""
    whose = f"real slices and samples{', ' * bool(label)}{label}"
    drawn = []
    for name, meaning in disease.QUANTITIES.items():
        values = [[row[name] for row in rows] for rows in (real, fake)]
        svg = plots.histograms(*values, meaning, f"Histograms of {meaning}: {whose}")
        drawn.append(Plot("", svg))
    curves = [np.array([[row[n] for n in disease.NOISE] for row in rows]) for rows in (real, fake)]
    svg = plots.spectra(
        disease.FREQUENCIES, *curves, "noise power spectrum: cycles per pixel", "HU² px²",
        f"Noise power spectra: {whose}",
    )  # fmt: skip
    drawn.append(Plot("Median, and the middle 80 % of slices as bands", svg))
    return [plot for plot in drawn if plot.svg]


def picture_section(pictures: list[Picture], paired: bool, window: ct.Window) -> Section:
    text = (
        f"All at the same window, {window[0]:g} to {window[1]:g} HU. Samples are taken at even "
        "distances from the list: none is chosen. "
    )
    if paired:
        text += (
            "Each row: the real slice whose contour was asked for, with that contour; the sample; "
            "the sample with the contour. Another patient with such lungs was asked for, not a "
            "copy: the tissue should differ."
        )
    return Section("Samples beside real slices", text, pictures=pictures)


def draw(looked: Looked) -> np.ndarray:
    """[real with contour |] sample [| sample with contour], RGB side by side."""
    columns = [panels.grey(looked.image[None])[0]]
    if looked.asked is not None:
        drawn = panels.overlay(looked.image[None], looked.asked[None, None])[0]
        columns.append(drawn)
        if looked.pair is not None:
            columns.insert(0, panels.overlay(looked.pair[None], looked.asked[None, None])[0])
    return beside(columns)


def beside(columns: Sequence[np.ndarray]) -> np.ndarray:
    """RGB pictures of one size in a row, with white lines between."""
    line = np.full((len(columns[0]), max(1, len(columns[0]) // 64), 3), 255, np.uint8)
    parts = [part for column in columns for part in (line, column)]
    return np.concatenate(parts[1:], axis=1)


def privacy_section(copies: Copies, names: list[str], draws: int, seed: int) -> Section:
    """Shares, controls and the closest pairs."""
    privacy = copies.privacy
    shares = privacy.scores(copies.matches, names, draws, seed)
    negative = privacy.negative_control(draws, seed)
    positive = privacy.positive_control(copies.encode, copies.decode, draws=draws, seed=seed)
    pictures = []
    for ratio, i, image in copies.closest:
        match = copies.matches[i]
        pair = panels.grey(np.stack([image, copies.train[match.row]]))
        said = ", ".join(f"{space} {d:.3f}" for space, d in match.distances.items())
        mark = "flagged, " if match.flagged else ""
        title = f"{names[i]} and training slice {match.row}: {mark}{ratio:.2f} of the threshold"
        alt = f"Sample {names[i]} beside the training slice that it is nearest to"
        pictures.append(Picture(f"{title} ({said})", png_bytes(beside(pair)), alt))
    notes = [
        "These pictures show training patients. Training slices are numbered from 0 as the "
        "train rows of label.csv stand; they are not named."
    ]
    if copies.encode is None:
        notes.append("Without --vae_checkpoint copies are looked for in pixels alone.")
    return Section(
        "Privacy",
        "Are samples copies of the patients that the models were trained on? Below the table, "
        "the closest pairs: sample on the left, training slice on the right, closest first.",
        [*shares, negative, *positive], pictures, notes,
        meanings={"flagged as copies": MEANINGS["copies"], "controls": MEANINGS["controls"]},
        verdict=judge_privacy(copies.matches, negative, positive, privacy.caution()),
    )  # fmt: skip


def judge_privacy(
    matches: list[Match], negative: Score, positive: list[Score], caution: str
) -> Verdict:
    """Bad where more samples are flagged than chance flags, doubtful where a control fails."""
    flagged = sum(match.flagged for match in matches)
    share, nearest = flagged / len(matches), min(match.ratio for match in matches)
    missed = [score.name for score in positive if not score.value >= FOUND]
    said = (
        f"{flagged} of {len(matches)} samples flagged as copies ({share:.1%}), of held-out slices "
        f"{number(100 * negative.value)} %"
    )
    word = "good"
    if missed or not negative.value <= FALSE or caution or nearest < NEAR:
        word = "doubtful"
    if share > FALSE:
        word = "bad"
    if nearest < NEAR:
        said += f"; the nearest is at {nearest:.2f} of the threshold: look at the closest pairs"
    if missed:
        said += f"; the search misses copies here ({', '.join(missed)})"
    if not negative.value <= FALSE:
        said += "; too many held-out slices are flagged"
    if caution:
        said += f"; {caution.partition(';')[0]}"
    return Verdict(word, said)


def no_privacy(reason: str) -> Section:
    return Section("Privacy", notes=[reason], verdict=Verdict("not judged", reason))
