"""Do evaluate.py's numbers order what they should? Other patients, the same with noise, phantoms.

    python benchmarks/evaluate.py ../shared/ct/lungs

Of the data set's patients 40 % are the real ones, 30 % were "trained on", and 30 % stand for
samples: as they are, blurred, with noise; and training slices copied. Prints a Markdown table.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage as ndi

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm import ct, export
from fibldm.evaluation import evaluate
from fibldm.phantom import phantom_slice
from fibldm.report import write_report
from fibldm.synthesis import Synthesizer
from fibldm.tables import Row, Split, parse_table, write_csv
from fibldm.verdicts import Score

PARTS = (("test", 0.4), ("train", 0.3), ("val", 0.3))  # "val" stand for samples
SHOWN = (
    *("fid", "kid", "precision", "recall", "diversity", "dice", "hd95_px", "mean", "sd"),
    *("high_attenuation", "glcm_contrast", "noise_power", "flagged"),
)
JUDGED = ("Realism", "Control", "Disease", "Privacy")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path, help="folder with label.csv, one slice a patient")
    parser.add_argument("--vae_checkpoint", help="for copies in latents, too")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--num_workers", type=int, default=2)
    return parser.parse_args()


def link(data: Path, folder: Path) -> list[Row]:
    """The data set with a split column of our own, its images linked; return its rows."""
    rows = parse_table(data / "label.csv", data, Split())[0]
    order = np.random.default_rng(0).permutation(len(rows))
    ends = np.cumsum([round(share * len(rows)) for _, share in PARTS])
    part = {int(k): PARTS[int(np.searchsorted(ends, i, "right"))][0] for i, k in enumerate(order)}
    folder.mkdir()
    for name in ("images", "contours", "dataset.json"):
        (folder / name).symlink_to((data / name).resolve())
    lines = pd.DataFrame([replace(row, split=part[i]) for i, row in enumerate(rows)])
    write_csv(folder / "label.csv", lines, ["image", "contour", "patient_id", "split"])
    return parse_table(folder / "label.csv", folder, Split())[0]


def write_samples(folder: Path, slices: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """HU and contour (H, W) of each, as sample.py writes them."""
    folder.mkdir()
    lines = []
    for i, (hu, contour) in enumerate(slices):
        path = folder / f"sample_{i:05d}.png"
        export.write_slice(path, ct.hu_to_unit(hu), ct.DEFAULT_WINDOW, "png")
        Image.fromarray(contour.astype(np.uint8) * 255).save(folder / f"contour_{i:05d}.bmp")
        lines.append({"file": path.name, "contour": f"contour_{i:05d}.bmp"})
    ct.write_dataset_info(folder, export.png_info(ct.DEFAULT_WINDOW))
    write_csv(folder / "samples.csv", lines, ["file", "contour", "label"])


def main(args: argparse.Namespace) -> None:
    generator = np.random.default_rng(1)
    found, words, seconds = {}, {}, {}
    model = args.vae_checkpoint and Synthesizer.from_checkpoints(args.vae_checkpoint)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        rows = link(args.data, work / "data")
        rescale = ct.read_rescale(work / "data")

        def read(part: str) -> list[tuple[np.ndarray, np.ndarray]]:
            return [
                (
                    ct.read_hu(work / "data" / row.image, rescale),
                    ct.read_contour(work / "data" / row.contour)[0],
                )
                for row in rows
                if row.split == part
            ]

        others, trained = read("val"), read("train")
        size, levels = len(others[0][0]), np.linspace(0.15, 0.9, len(others))
        kinds = {
            "other patients": others,
            "the same, noise of 50 HU": [
                (hu + generator.normal(0, 50, hu.shape), contour) for hu, contour in others
            ],
            "the same, blurred (1 px)": [
                (ndi.gaussian_filter(hu, 1.0), contour) for hu, contour in others
            ],
            "phantoms": [phantom_slice(i, level, size) for i, level in enumerate(levels)],
            "copies of training slices": [
                (np.roll(hu, 1, 0) + generator.normal(0, 20, hu.shape), np.roll(contour, 1, 0))
                for hu, contour in trained
            ],
        }
        for i, (kind, slices) in enumerate(kinds.items()):
            write_samples(work / f"samples_{i}", slices)
            start = time.perf_counter()
            evaluation = evaluate(
                work / "data", work / f"samples_{i}", train=work / "data", model=model,
                draws=args.draws, workers=args.num_workers, say=print,
            )  # fmt: skip
            write_report(evaluation, work / f"report_{i}")
            seconds[kind] = time.perf_counter() - start
            groups = evaluation.groups
            found[kind] = {one.name: one for group in groups.values() for one in group.scores}
            words[kind] = {name: groups[name].verdict.word for name in JUDGED}

    def cell(score: Score | None, key: str) -> str:
        value = float("nan") if score is None else getattr(score, key)
        return f"{value:.3g}" if np.isfinite(value) else ""

    first = found["other patients"]
    names = [name for name in first if any(part in name for part in SHOWN)]
    print(f"\n| metric | baseline | {' | '.join(found)} |\n|---|---|{'---|' * len(found)}")
    for metric in names:
        cells = [cell(scores.get(metric), "value") for scores in found.values()]
        print(f"| {metric} | {cell(first[metric], 'baseline')} | {' | '.join(cells)} |")
    for name in JUDGED:
        print(f"| {name} | | {' | '.join(words[kind][name] for kind in found)} |")
    print("\nseconds: " + ", ".join(f"{kind} {value:.0f}" for kind, value in seconds.items()))


if __name__ == "__main__":
    main(parse_args())
