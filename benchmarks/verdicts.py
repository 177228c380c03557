"""What the report says of real patients in the place of samples, and of slices that are not right.

    python benchmarks/verdicts.py ../shared/ct/lungs --cache /tmp/verdicts --half second
    python benchmarks/verdicts.py ../shared/ct/lungs --cache /tmp/verdicts --coverage

Each draw takes two groups of patients without a common one: one is real, the other, as it is or
changed, stands for samples. Prints the shares of draws with each verdict, and with --coverage how
often the 95 % intervals of differences hold what they should. The slices are measured once.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage as ndi
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm import ct, disease
from fibldm.features import Networks
from fibldm.lungs import lung_mask
from fibldm.metrics import ContourAgreement, contour_dice, control_scores, hausdorff95, set_score
from fibldm.phantom import phantom_slice
from fibldm.tables import Split, parse_table
from fibldm.verdicts import Score, judge

CPU = torch.device("cpu")
JUDGED = ("kid", "precision", "recall")
VIEWS = tuple(f"view {i}" for i in range(1, 10))  # with the slice itself ten of each patient
KINDS = ("real", "noise of 50 HU", "blur of 0.7 px", "phantoms", "copies")
Slice = tuple[np.ndarray, np.ndarray]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path, help="folder with label.csv, one slice a patient")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is measured")
    parser.add_argument("--half", choices=("first", "second"), help="of the patients; else all")
    parser.add_argument("--draws", type=int, default=200, help="of real slices; a third of others")
    parser.add_argument("--coverage", action="store_true")
    return parser.parse_args()


def changed(kind: str, hu: np.ndarray, contour: np.ndarray, i: int) -> Slice:
    """A slice (H, W) and its contour as samples of a kind have them."""
    generator = np.random.default_rng([i, len(kind)])
    if kind == "noise of 50 HU":
        return hu + generator.normal(0, 50, hu.shape), contour
    if kind == "blur of 0.7 px":
        return ndi.gaussian_filter(np.clip(hu, *ct.DEFAULT_WINDOW), 0.7), contour
    if kind == "phantoms":
        return phantom_slice(i, 0.15 + 0.75 * (i % 200) / 200, len(hu))
    if kind == "copies":  # of other patients than the real ones: as memorized training slices are
        return np.roll(hu, 1, 0) + generator.normal(0, 20, hu.shape), np.roll(contour, 1, 0)
    if kind in VIEWS:  # moved, turned and scaled a little
        generator = np.random.default_rng([i, VIEWS.index(kind)])
        angle, middle = np.deg2rad(generator.uniform(-4, 4)), (np.array(hu.shape) - 1) / 2
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        turn /= generator.uniform(0.94, 1.06)
        offset = middle - turn @ (middle + generator.uniform(-6, 6, 2))
        moved = ndi.affine_transform(hu, turn, offset, order=1, cval=ct.AIR)
        return moved, ndi.affine_transform(contour.astype(float), turn, offset, order=0) > 0.5
    return hu, contour


def measured(data: Path, cache: Path, kind: str) -> dict[str, np.ndarray]:
    """Features, tissue and agreement with the contour of all slices, changed."""
    path = cache / f"{kind}.npz"
    if not path.is_file():
        rows, rescale = parse_table(data / "label.csv", data, Split())[0], ct.read_rescale(data)
        networks, found = Networks(CPU), []
        for i, row in enumerate(tqdm(rows, kind, disable=None)):
            hu = ct.read_hu(data / row.image, rescale)
            hu, contour = changed(kind, hu, ct.read_contour(data / row.contour)[0] > 0, i)
            image = ct.hu_to_unit(hu).astype(np.float32)
            hu, (mask, asked) = ct.unit_to_hu(image), (None, contour[None])
            mask = lung_mask(hu)[None]
            found.append({
                "features": networks.features(torch.from_numpy(image)[None, None])[0].numpy(),
                "tissue": [disease.measure(hu, mask[0])[name] for name in NAMES],
                "follows": [contour_dice(mask, asked)[0], hausdorff95(mask, asked)[0]],
            })  # fmt: skip
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{key: np.array([one[key] for one in found]) for key in found[0]})
    with np.load(path) as content:
        return dict(content)


NAMES = (*disease.QUANTITIES, *disease.NOISE)


class Side:
    """Some patients' slices of one or more kinds: the real ones, or those in place of samples."""

    def __init__(self, kinds: list[dict[str, np.ndarray]], patients: np.ndarray) -> None:
        all_of = {key: np.concatenate([one[key][patients] for one in kinds]) for key in kinds[0]}
        self.owners = [str(i) for i in patients] * len(kinds)
        self.features = torch.from_numpy(all_of["features"])
        self.tissue = [dict(zip(NAMES, row, strict=True)) for row in all_of["tissue"]]
        unknown = np.full(len(self.owners), np.nan)
        self.agreement = ContourAgreement(*all_of["follows"].T, unknown, self.owners)


def scores_of(real: Side, fake: Side) -> dict[str, list[Score]]:
    """What the report judges, by its own functions."""
    sets = real.features, fake.features, real.owners, fake.owners, CPU, ""
    control = control_scores(fake.agreement, real.agreement)
    return {
        "Realism": [set_score(name, *sets) for name in JUDGED],
        "Disease": disease.compare(real.tissue, real.owners, fake.tissue, fake.owners),
        "Control": [score for score in control if score.margin],
    }


def drawn(
    real: list[dict], fake: list[dict], pool: np.ndarray, patients: int, draws: int, what: str
) -> Iterator[dict[str, list[Score]]]:
    """The scores of each draw of two groups of patients out of a pool."""
    for seed in tqdm(range(draws), what, disable=None):
        order = np.random.default_rng(seed).permutation(pool)
        yield scores_of(Side(real, order[:patients]), Side(fake, order[patients : 2 * patients]))


def print_verdicts(args: argparse.Namespace, pool: np.ndarray) -> None:
    real, view = (measured(args.data, args.cache, kind) for kind in ("real", VIEWS[0]))
    print("| samples | slices | realism | disease | control |\n|---|---|---|---|---|")
    for kind in KINDS:
        fake = measured(args.data, args.cache, kind)
        cells = [(20, 20, [real], [fake]), (40, 40, [real], [fake]), (100, 100, [real], [fake])]
        if kind == "real":  # 200 slices are two of each of 100 patients
            cells.append((200, 100, [real, view], [real, view]))
        for slices, patients, ours, theirs in cells:
            if 2 * patients > len(pool):
                continue
            draws = args.draws if kind == "real" else max(args.draws // 3, 1)
            words: dict[str, list[str]] = {}
            for scores in drawn(ours, theirs, pool, patients, draws, f"{kind}, {slices}"):
                for group, some in scores.items():
                    words.setdefault(group, []).append(judge(some).word)
            texts = [
                ", ".join(
                    f"{found.count(word) / draws:.1%} {word}"
                    for word in ("good", "doubtful", "bad")
                    if word in found
                )
                for found in words.values()
            ]
            print(f"| {kind} | {slices} | {' | '.join(texts)} |", flush=True)


def print_coverage(args: argparse.Namespace, pool: np.ndarray) -> None:
    """Of real slices the difference is 0; of blurred ones it is the mean over all draws."""
    names = ("real", "blur of 0.7 px", *VIEWS)
    real, blurred, *views = (measured(args.data, args.cache, kind) for kind in names)
    print("| samples | patients | slices of each | kid | precision | recall | dice | tissue: mean "
          "| tissue: spread |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    ten = [real, *views]
    for kind, ours, theirs in (
        ("real", [real], [real]), ("real", ten, ten), ("blurred", [real], [blurred]),
    ):  # fmt: skip
        for patients in (20, 50):
            rows: dict[str, list] = {}
            for scores in drawn(ours, theirs, pool, patients, args.draws, f"{kind}, {patients}"):
                for score in (score for some in scores.values() for score in some if score.judged):
                    known = score.difference.value, *score.difference.interval()
                    rows.setdefault(score.name, []).append(known)
            covered = {}
            for name, found in rows.items():
                value, low, high = np.array(found).T
                truth = 0.0 if kind == "real" else value.mean()
                covered[name] = float(((low <= truth) & (truth <= high)).mean())
            tissue = [name for name in covered if name not in (*JUDGED, "dice")]
            spreads = [name for name in tissue if name.endswith("spread")]
            means = [name for name in tissue if name not in spreads]
            cells = [f"{covered[name]:.1%}" for name in (*JUDGED, "dice")]
            for some in (means, spreads):
                found = [covered[name] for name in some]
                cells.append(f"{np.mean(found):.1%} ({min(found):.1%} to {max(found):.1%})")
            print(f"| {kind} | {patients} | {len(ours)} | {' | '.join(cells)} |", flush=True)


def main(args: argparse.Namespace) -> None:
    count = len(parse_table(args.data / "label.csv", args.data, Split())[0])
    order = np.random.default_rng(0).permutation(count)
    pool = {"first": order[: count // 2], "second": order[count // 2 :], None: order}[args.half]
    (print_coverage if args.coverage else print_verdicts)(args, np.sort(pool))


if __name__ == "__main__":
    main(parse_args())
