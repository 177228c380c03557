"""How good samples are: realism, control, disease and privacy, each beside real slices.

evaluation = evaluate("data", "samples", train="data")
print(evaluation.table())
report.write_report(evaluation, "report")
"""

import contextlib
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fibldm import ct, disease
from fibldm.datasets import CTDataset, chunks
from fibldm.disk import StoredRows, create_rows
from fibldm.features import Networks
from fibldm.measurement import (
    BATCH,
    Inputs,
    MeasuredSlice,
    Measurement,
    SliceReader,
    SliceSet,
    image_of,
    in_batches,
    read_inputs,
    spread,
)
from fibldm.metrics import control_scores, realism_scores
from fibldm.panels import beside, grey, overlay
from fibldm.privacy import FALSE, FOUND, HELDOUT_SHARE, Match, Privacy
from fibldm.synthesis import Synthesizer
from fibldm.tables import Split
from fibldm.verdicts import Score, Verdict, judge, more_than, number

SHOWN = 12  # samples, and closest pairs, whose pictures are kept
SEARCHED = 4 * BATCH  # samples at a time whose nearest training slices are looked for
IMPLAUSIBLE = 0.05  # share of samples with implausible lungs: clearly more is bad
LISTED = 30  # implausible samples in the notes; metrics.json has all
NEAR = 0.5  # of the threshold: a sample as near as that is looked at, however few there are


@dataclass(frozen=True)
class Group:
    """Scores that answer one question, what they say together, and notes on them."""

    scores: Sequence[Score] = ()
    verdict: Verdict | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """RGB uint8 (H, W, 3) with its caption; `alt` says in words what is seen."""

    title: str
    pixels: np.ndarray
    alt: str


@dataclass(frozen=True)
class SampleResult:
    """What was found of one sample; `nearest` where copies were looked for."""

    file: str
    label: str
    numbers: Measurement
    nearest: Match | None = None


@dataclass(frozen=True)
class Evaluation:
    """Samples against real slices.

    groups: "Realism", "Control", "Disease", "Disease: LABEL" for each label that both have,
    "Privacy"; samples: one by one; real: measures of real slices, and their labels; facts: what was
    compared, by which versions; notes: what a reader has to know. pictures: of samples, each beside
    the real slice whose contour was asked for (`paired`); closest: samples and training slices.
    """

    groups: dict[str, Group]
    samples: list[SampleResult]
    real: list[disease.Measures]
    real_labels: list[str]
    facts: dict[str, str]
    notes: list[str]
    window: ct.Window
    pictures: list[Picture] = field(default_factory=list)
    paired: bool = False
    closest: list[Picture] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """All scores, a row each."""
        rows = [
            {"group": title, **score.as_dict()}
            for title, group in self.groups.items()
            for score in group.scores
        ]
        return pd.DataFrame(rows)


def evaluate(
    real: str | Path,
    samples: str | Path,
    *,
    split: str = "test",
    train: str | Path | None = None,
    model: Synthesizer | None = None,
    window: ct.Window | None = None,
    patient_split: Split | None = None,
    draws: int = 200,
    seed: int = 0,
    workers: int = 2,
    device: str | torch.device = "auto",
    scratch: str | Path | None = None,
    say: Callable[[str], object] | None = None,
) -> Evaluation:
    """Compare a folder of samples with real slices of patients whom no model has seen.

    real: the data set with label.csv whose contours the samples were drawn for; samples: what
    sample.py wrote, or images; split: "train", "val", "test" or "all" of the real slices; train:
    the data set that the models were trained on, without which copies are not looked for; model: a
    Synthesizer, whose VAE also looks for copies in latents; window: HU, the model's or -1000 to 400
    by default; patient_split: of patients whom label.csv gives no split, the model's by default;
    draws: bootstrap resamples for privacy; seed: of resamples and halves; workers: processes
    that read slices, 0: this one; device: of the metrics' networks; scratch: a folder on a disk
    with room, for about 270 KB a slice of 256x256; say: is told each note before the long part.

    Raises ValueError, before anything is computed, for input that can't be compared.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if model is not None and window not in (None, model.window):
        raise ValueError(f"window {window}: expected {model.window}, that of the model")
    window = window or (ct.DEFAULT_WINDOW if model is None else model.window)
    size = None if model is None else model.image_size
    patient_split = patient_split or (model and model.split) or Split()
    data = Path(real), Path(samples), split, train, window, patient_split
    inputs = read_inputs(*data, size)
    networks = Networks(torch.device(device))
    for note in [*inputs.notes, *left_out(networks)] if say else ():
        say(note)
    if scratch is not None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".evaluate_") as folder:
        measure = partial(SliceSet, size=inputs.samples.size, networks=networks)
        real_set = measure(inputs.patients, inputs.real_labels, folder=Path(folder, "real"))
        fake_set = measure(inputs.asked_of, inputs.labels, folder=Path(folder, "samples"))
        pictures = measure_slices(inputs, real_set, fake_set, workers)
        groups = {"Realism": realism_group(real_set, fake_set, seed)}
        groups["Control"] = control_group(real_set, fake_set)
        groups |= disease_groups(real_set, fake_set, inputs.names)
        if inputs.no_copies:
            reason, matches, closest = inputs.no_copies, [None] * len(inputs.names), []
            groups["Privacy"] = Group(verdict=Verdict("not judged", reason), notes=[reason])
        else:
            search = CopySearch(inputs, model, Path(folder), workers)
            matches = search.nearest(fake_set.images, workers)
            groups["Privacy"] = privacy_group(search, matches, inputs.names, draws, seed)
            closest = search.closest(fake_set.images, matches, inputs.names)
    results = zip(inputs.names, inputs.labels, fake_set.numbers, matches, strict=True)
    facts = {
        **inputs.facts, "Intervals": f"by patients; privacy: {draws} resamples, seed {seed}",
        "Computed by": versions(), "Date": date.today().isoformat(),
    }  # fmt: skip
    return Evaluation(
        groups, [SampleResult(*result) for result in results], real_set.measures,
        real_set.labels, facts, inputs.notes, window, pictures, inputs.paired, closest,
    )  # fmt: skip


def versions() -> str:
    """Of what computed the numbers."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "torchmetrics", "lpips", "scikit-image", "scipy", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def left_out(networks: Networks) -> list[str]:
    """A sentence for each missing file of weights: the metrics that it costs."""
    names: dict[str, list[str]] = {}
    for reason in networks.missing.values():
        name, _, rest = reason.partition(" is left out: ")
        names.setdefault(rest, []).append(name)
    return [f"Left out: {', '.join(some)}. {rest}" for rest, some in names.items()]


# What is found.


def measure_slices(
    inputs: Inputs, real_set: SliceSet, fake_set: SliceSet, workers: int
) -> list[Picture]:
    """Measure all slices, in two passes; return pictures of some samples.

    Where no sample has a pair, they alternate with pictures of real slices.
    """
    reader, names = SliceReader(inputs.real, inputs.samples, inputs.window), inputs.names
    for batch in in_batches(reader.real_slice, inputs.rows, workers, "real slices"):
        real_set.add(batch)
    counts = [numbers.lung_count for numbers in real_set.numbers]
    look = partial(reader.sample, limits=disease.limits_of(real_set.measures, counts))
    pictures, shown, start = [], set(spread(len(names), SHOWN)), 0
    for batch in in_batches(look, range(len(names)), workers, "samples"):
        fake_set.add(batch)
        for i, one in enumerate(batch, start):
            if i in shown:
                title = ", ".join(filter(None, (names[i], inputs.labels[i])))
                pictures.append(Picture(title, draw(one), f"Sample {names[i]}"))
        start += len(batch)
    if inputs.paired:
        return pictures
    real = [reader.real_slice(inputs.rows[i]) for i in spread(len(inputs.rows), SHOWN)]
    own = [Picture(f"real slice {k}", draw(one), "Real") for k, one in enumerate(real, 1)]
    return [picture for both in zip_longest(own, pictures) for picture in both if picture]


def draw(one: MeasuredSlice) -> np.ndarray:
    """[real with contour |] sample [| sample with contour], RGB side by side."""
    columns = [grey(one.image[None])[0]]
    if one.contour is not None:
        contour = one.contour[None, None]
        columns.append(overlay(one.image[None], contour)[0])
        if one.pair is not None:
            columns.insert(0, overlay(one.pair[None], contour)[0])
    return beside(columns)


def realism_group(real: SliceSet, fake: SliceSet, seed: int) -> Group:
    """KID, precision and recall judge; the others are shown."""
    networks = real.networks
    scores = realism_scores(real.image_set, fake.image_set, fake.pairs, networks, seed)
    missing = "the weights of Inception are missing (fetch_metric_weights.py)"
    judged = [score for score in scores if score.margin]
    verdict = Verdict("not judged", missing) if networks.inception is None else judge(judged)
    return Group(scores, verdict, left_out(networks))


def control_group(real: SliceSet, fake: SliceSet) -> Group:
    """The Dice of the lungs and the contour asked for judges."""
    known, count = len(fake.agreement.owners), len(fake.owners)
    notes = [f"{count - known} of {count} samples have no contour that is known."]
    if not known:
        return Group((), Verdict("not judged", "no contours are known"), notes)
    scores = control_scores(fake.agreement, real.agreement)
    judged = [score for score in scores if score.margin]
    return Group(scores, judge(judged), notes if known < count else ())


def disease_groups(real: SliceSet, fake: SliceSet, names: Sequence[str]) -> dict[str, Group]:
    """All slices, then each label that both have; the notes list samples with implausible lungs."""
    scores = disease.compare(real.measures, real.owners, fake.measures, fake.owners)
    by_label, notes = disease.compare_by_label(
        *(real.measures, real.owners, real.labels, fake.measures, fake.owners, fake.labels)
    )
    whose = zip(names, fake.numbers, strict=True)
    listed = [f"{name}: {found.implausible}" for name, found in whose if found.implausible]
    strange = f"{len(listed)} of {len(names)} samples have implausible lungs"
    lines = [f"{strange}{':' if listed else '.'}", *listed[:LISTED]]
    lines += [f"... and {len(listed) - LISTED} more (metrics.json)"] * (len(listed) > LISTED)
    verdict = judge(scores)
    many = more_than(IMPLAUSIBLE, len(listed), len(names))
    verdict = Verdict("bad" if many else verdict.word, f"{verdict.sentence}; {strange}")
    groups = {"Disease": Group(scores, verdict, [*lines, *(notes if by_label else ())])}
    return groups | {f"Disease: {label}": Group(found) for label, found in by_label.items()}


class CopySearch:
    """Looks for copies of training slices among samples; arrays of all slices stay on disk."""

    def __init__(
        self, inputs: Inputs, model: Synthesizer | None, folder: Path, workers: int
    ) -> None:
        self.model, self.folder = model, folder
        train, held_out = inputs.train, inputs.held_out
        self.train = self._store(train, "training slices", workers)
        held = self._store(held_out, "held-out slices", workers)
        patients = [[row.patient_id for row in data.rows] for data in (train, held_out)]
        self.privacy = Privacy(self.train, patients[0], self._encode(self.train))
        self.privacy.calibrate(held, self._encode(held), patients[1])

    def _store(self, data: CTDataset, what: str, workers: int) -> StoredRows:
        """All slices (N, S, S) of a data set, in a file."""
        shape = len(data), data.image_size, data.image_size
        images, start = create_rows(self.folder / f"{what}.npy", np.float32, shape), 0
        for batch in in_batches(partial(image_of, data), range(len(data)), workers, what):
            images[start : start + len(batch)] = np.stack(batch)
            start += len(batch)
        return images

    def _encode(self, images: StoredRows) -> StoredRows | None:
        """Latents (N, C, h, w) of all slices, in a file; None without a model."""
        if self.model is None:
            return None
        latents = None
        for rows in chunks(range(len(images)), BATCH):
            some = self.model.encode(images[rows])
            if latents is None:
                file = images.path.with_suffix(".latents.npy")
                latents = create_rows(file, some.dtype, (len(images), *some.shape[1:]))
            latents[rows] = some
        return latents

    def nearest(self, images: StoredRows, workers: int) -> list[Match]:
        """The nearest training slice of each sample (M, S, S)."""
        look = partial(nearest_of, self.privacy, images, self._encode(images))
        parts = in_batches(look, chunks(range(len(images)), SEARCHED), workers, "copies", 1)
        return [match for (part,) in parts for match in part]

    def closest(self, images: StoredRows, matches: list[Match], names: list[str]) -> list[Picture]:
        """Pictures of the samples that are nearest to training slices, beside those."""
        pictures = []
        for i in sorted(range(len(matches)), key=lambda i: (matches[i].ratio, i))[:SHOWN]:
            match = matches[i]
            pair = grey(np.stack([images[i], self.train[match.row]]))
            said = ", ".join(f"{space} {d:.3f}" for space, d in match.distances.items())
            mark = "flagged, " if match.flagged else ""
            title = f"{names[i]} and training slice {match.row}: {mark}"
            title += f"{match.ratio:.2f} of the threshold ({said})"
            alt = f"Sample {names[i]} beside the training slice that it is nearest to"
            pictures.append(Picture(title, beside(pair), alt))
        return pictures


def nearest_of(
    privacy: Privacy, images: StoredRows, latents: StoredRows | None, rows: list[int]
) -> list[Match]:
    return privacy.nearest(images[rows], None if latents is None else latents[rows])


def privacy_group(
    search: CopySearch, matches: list[Match], names: list[str], draws: int, seed: int
) -> Group:
    """Shares of copies, and the controls: bad where clearly more are flagged than chance flags."""
    privacy, model = search.privacy, search.model
    coders = (None, None) if model is None else (model.encode, model.decode)
    shares = privacy.scores(matches, names, draws, seed)
    negative = privacy.negative_control()
    positive = privacy.positive_control(*coders, seed=seed)
    flagged = sum(match.flagged for match in matches)
    share, nearest = flagged / len(matches), min(match.ratio for match in matches)
    missed = [score.name for score in positive if not score.value >= FOUND]
    said = [
        f"{flagged} of {len(matches)} samples flagged as copies ({share:.1%}), of held-out slices "
        f"{number(100 * negative.value)} %"
    ]
    if nearest < NEAR:
        said.append(f"the nearest is at {nearest:.2f} of the threshold: look at the closest pairs")
    if missed:
        said.append(f"the search misses copies here ({', '.join(missed)})")
    if not negative.value <= FALSE:
        said.append("too many held-out slices are flagged")
    if caution := privacy.caution():
        said.append(caution.partition(";")[0])
    many = more_than(HELDOUT_SHARE, flagged, len(matches))
    doubt = share > FALSE or len(said) > 1
    word = "bad" if many else "doubtful" if doubt else "good"
    notes = [
        "The pictures of closest pairs show training patients. Training slices are numbered from 0 "
        "as the train rows of label.csv stand; they are not named."
    ]
    if model is None:
        notes.append("Without --vae_checkpoint copies are looked for in pixels alone.")
    return Group([*shares, negative, *positive], Verdict(word, "; ".join(said)), notes)
