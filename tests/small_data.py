"""Small data sets for tests: slices, contours, a table, and the latents of a tiny VAE."""

from pathlib import Path

import numpy as np
from PIL import Image

from fibldm.datasets import CTDataset
from fibldm.tables import Split, read_table

SIZE = 16
HEADER = "image,contour,patient_id,label,split"
SPLIT = Split(0, 0.2, 0.1)


def write_pair(root: Path, name: str, size: tuple[int, int] = (SIZE, SIZE), seed: int = 0) -> None:
    """An 8-bit image and its contour, a rectangle of 255."""
    pixels = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    contour = np.zeros(size, np.uint8)
    contour[2 : size[0] // 2, 3:-2] = 255
    Image.fromarray(pixels).save(root / f"{name}.png")
    Image.fromarray(contour).save(root / f"{name}_c.png")


def make_data(root: Path, splits: str = "ttttvvs", slices: int = 2) -> Path:
    """A folder with a label.csv; a letter of `splits` is a patient: train, val or test."""
    root.mkdir(parents=True, exist_ok=True)
    names, lines = {"t": "train", "v": "val", "s": "test"}, [HEADER]
    for patient, letter in enumerate(splits):
        for k in range(slices):
            name = f"p{patient}_{k}"
            write_pair(root, name, seed=10 * patient + k)
            label = ("healthy", "fibrosis")[patient % 2]
            lines.append(f"{name}.png,{name}_c.png,p{patient},{label},{names[letter]}")
    (root / "label.csv").write_text("\n".join(lines) + "\n")
    return root / "label.csv"


def dataset_of(csv_file: Path, size: int = SIZE, **options) -> CTDataset:
    rows, _ = read_table(csv_file, csv_file.parent, SPLIT)
    return CTDataset(rows, csv_file.parent, csv_file.parent, size, **options)
