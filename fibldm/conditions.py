"""What samples are asked to show: contours and labels, from arrays, files and latent data sets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fibldm import ct
from fibldm.balance import parse_weights
from fibldm.encoding import LatentDataset
from fibldm.tables import list_some
from fibldm.unet import NO_LABEL

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".npy", ".nii", ".nii.gz", ".dcm")  # of slices
PICTURES = (".gif", ".jpg", ".jpeg")  # of contours too; HU would be lost in them
PAIRED = "contour of "  # before an image of label.csv, in the column `contour` of samples.csv

Label = str | Mapping[str, float] | None


class ContourForm(NamedTuple):
    """How a U-Net knows contours: channels K, side S in pixels, "filled", "outline" or None."""

    channels: int
    size: int
    style: str | None


@dataclass(frozen=True)
class RealSlices:
    """The slices that contours were taken from: these rows of a latent data set."""

    data: LatentDataset
    rows: list[int]

    def hu(self, places: Sequence[int]) -> np.ndarray:
        """HU (N, S, S) of the slices of the contours at these places."""
        images = self.data.heldout_images([self.rows[k] for k in places], "cpu")[:, 0]
        return ct.unit_to_hu(images.numpy(), self.data.window)


@dataclass(frozen=True)
class Conditions:
    """Contours (M, K, S, S), or None; and a name and a label for each of them.

    compared: labels that take the place of a contour's own; it is drawn with each of them, from the
    same noise. Of L such labels samples n * L to n * L + L - 1 have noise n, by which the
    `Synthesizer` numbers samples. Without them L is 1. real: what the contours were taken from.
    """

    contours: np.ndarray | None
    names: list[str]
    labels: list[Label]
    compared: Sequence[Label] = ()
    real: RealSlices | None = None

    @property
    def per_noise(self) -> int:
        """L, how many samples there are of each noise."""
        return len(self.compared) or 1

    def place(self, sample: int) -> int:
        """Where a sample's contour and name are: noise n has contour n modulo M."""
        return sample // self.per_noise % len(self.names)

    def label(self, sample: int) -> Label:
        if self.compared:
            return self.compared[sample % self.per_noise]
        return self.labels[self.place(sample)]

    def of(self, samples: Sequence[int]) -> np.ndarray | None:
        """The contours of samples, (N, K, S, S)."""
        if self.contours is None:
            return None
        return self.contours[[self.place(sample) for sample in samples]]


# Contours.


def fit_contours(contours: np.ndarray | Sequence[np.ndarray], form: ContourForm) -> np.ndarray:
    """Contours of any size and style -> uint8 (M, K, S, S), 0 or 1, as the U-Net knows them.

    contours: an array (H, W), (M, H, W) or (M, K, H, W), or a list of (H, W) or (K, H, W). With K
    above 1 an array (H, W) is a label map, 0 to K. Raises ValueError for no contours, a picture,
    or another number of channels.
    """
    if torch.is_tensor(contours):
        raise ValueError("contours: found a tensor, expected NumPy arrays: use .numpy()")
    if isinstance(contours, np.ndarray) and contours.ndim == 2:
        contours = contours[None]
    fitted = []
    for i, contour in enumerate(contours):
        try:
            masks = ct.as_contour(np.asarray(contour), form.channels)
        except ValueError as error:
            raise ValueError(f"contour {i}: {error}") from None
        fitted.append(ct.fit_contour(masks, form.size, form.style))
    if not fitted:
        raise ValueError("contours: none given, expected (H, W), (M, H, W) or (M, K, H, W)")
    return np.stack(fitted)


def style_notes(contours: Sequence[np.ndarray], style: str | None) -> list[str]:
    """That contours of another style than the U-Net's are converted, and how many."""
    if style is None:
        return []
    converted = sum(ct.contour_style(contour) not in (None, style) for contour in contours)
    done = "masks: their outlines are taken" if style == "outline" else "outlines: they are filled"
    note = f"{converted} of {len(contours)} contours are {done}, as the U-Net was trained on"
    return [f"{note} {style} contours"] if converted else []


def read_contours(path: Path, form: ContourForm) -> tuple[Conditions, list[str]]:
    """The contour in a file, or those in a folder's images, and notes: what is left out of it.

    Hidden files are no contours. Raises ValueError where there is none, or one is damaged.
    """
    notes, suffixes = [], (*SUFFIXES, *PICTURES)
    if path.is_dir():
        there = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        files = [p for p in there if p.name.lower().endswith(suffixes)]
        others = [p.name for p in there if p not in files]
        if others:
            what = f"--contours {path}: {len(others)} files are no images"
            notes.append(f"{what}:{list_some(others)}")
    else:
        files = [path] if path.is_file() else []
    if not files:
        found = "no images in it" if path.is_dir() else "no such file or folder"
        raise ValueError(f"--contours {path}: {found} ({', '.join(suffixes)})")
    contours = [ct.read_contour(file, form.channels) for file in files]
    fitted = fit_contours(contours, form)
    asked = Conditions(fitted, [str(file) for file in files], [""] * len(files))
    return asked, notes + style_notes(contours, form.style)


def conditions_of(
    data: LatentDataset, split: str, form: ContourForm, classes: Sequence[str]
) -> tuple[Conditions, list[str]]:
    """Contours and labels of a latent data set's split, and notes. ValueError where none fit."""
    rows = data.indices(split, views=False)
    if not rows:
        raise ValueError(f"{data.folder}: its {split} split is empty")
    found, expected = (data.contour_channels, data.image_size), (form.channels, form.size)
    if found != expected:
        raise ValueError(
            f"{data.folder}: contour channels and size: found {found}, expected {expected}; "
            "another data set than the models'"
        )
    contours, table = data.contours[rows], data.table.iloc[rows]
    asked = Conditions(
        fit_contours(contours, form),
        [f"{PAIRED}{image}" for image in table["image"]],
        [name if name in classes else "" for name in table["label"]],
        real=None if split == "train" else RealSlices(data, rows),  # it has none of train
    )
    return asked, style_notes(contours, form.style)


# Labels.


def label_name(label: Label) -> str:
    """A label in words: a class name, "normal=0.4 fibrosis=0.6", or "" for none."""
    if not isinstance(label, Mapping):
        return label or ""
    short = {name: f"{weight:g}" for name, weight in label.items()}
    exact = {n: text if float(text) == label[n] else label[n] for n, text in short.items()}
    return " ".join(f"{name}={text}" for name, text in exact.items())


def label_caption(label: Label) -> str:
    """A label below a picture: a class name, "40 % normal, 60 % fibrosis", or "no label"."""
    if not isinstance(label, Mapping):
        return label or "no label"
    return ", ".join(f"{100 * weight:g} % {name}" for name, weight in label.items())


def parse_label(words: Sequence[str], classes: Sequence[str], option: str = "--label") -> Label:
    """A label as typed, NAME or NAME=WEIGHT of several classes; ValueError where it is neither."""
    text = " ".join(words)
    if text in classes or not any("=" in word for word in words):
        return text
    try:
        return parse_weights(words)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None


def parse_compared(texts: Sequence[str], classes: Sequence[str]) -> list[Label]:
    """Two labels or more as typed for --compare_labels, each a text; all classes for no texts.

    ValueError where the U-Net does not know them, or one comes twice.
    """
    option = "--compare_labels"
    split = [[text] if text in classes else text.split() for text in texts]
    labels = [parse_label(words, classes, option) for words in split] or list(classes)
    names = [label_name(label) for label in labels]
    if len({*names}) < max(2, len(names)):
        found = f"{names}; the U-Net knows the classes {list(classes) or '(none)'}"
        raise ValueError(f"{option}: expected two labels or more, each once; found {found}")
    for label in labels:
        read_label(label, classes)
    return labels


def read_label(label: Label, classes: Sequence[str]) -> int | list[float]:
    """The class's number, NO_LABEL, or a weight for each class; ValueError if unknown."""
    if label is None or label == "":
        return NO_LABEL
    if not isinstance(label, str | Mapping):
        raise ValueError(f"label {label!r}: expected a class name, or {{name: weight}}")
    weights = {label: 1.0} if isinstance(label, str) else dict(label)
    words = [weight for weight in weights.values() if not isinstance(weight, Real)]
    if words:
        raise ValueError(f"label: weight {words[0]!r}, expected a number")
    unknown = [str(name) for name in weights if name not in classes]
    if unknown:
        raise ValueError(
            f"label {', '.join(unknown)}: the U-Net knows the classes {list(classes) or '(none)'}; "
            "expected one of them, or weights of several"
        )
    if isinstance(label, str):
        return list(classes).index(label)
    total = sum(weights.values())
    if not (min(weights.values(), default=-1) >= 0 and abs(total - 1) < 1e-6):
        raise ValueError(
            f"label {label_name(label)}: weights that sum to {total:g}; expected numbers of at "
            "least 0 that sum to 1"
        )
    return [float(weights.get(name, 0.0)) for name in classes]


def read_labels(
    labels: Label | Sequence[Label], classes: Sequence[str], contours: int | None
) -> tuple[list[str], list[int] | list[list[float]]]:
    """Labels of `contours` contours, or of none: their names, and what the U-Net takes.

    A single label is that of all. Where one is a mixture, classes become weights too.
    """
    several = isinstance(labels, Iterable) and not isinstance(labels, str | Mapping)
    labels = list(labels) if several else [labels]
    if len(labels) == 1:
        labels *= contours or 1
    if not labels or len(labels) != (contours or len(labels)):
        expected = "one" if contours is None else f"1 or {contours}, as there are contours"
        raise ValueError(f"labels: {len(labels)} given, expected {expected}")
    numbers = [read_label(label, classes) for label in labels]
    if any(isinstance(number, list) for number in numbers):
        if NO_LABEL in numbers:
            raise ValueError("labels: None beside mixtures; expected a class or weights for each")
        one_hot = np.eye(len(classes)).tolist()
        numbers = [n if isinstance(n, list) else one_hot[n] for n in numbers]
    return [label_name(label) for label in labels], numbers
