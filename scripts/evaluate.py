"""Evaluate samples: realism, control, disease and privacy, as a page to look at and as numbers.

Writes index.html and metrics.json; both hold what real slices show, the page shows slices too.
"""

import argparse
import contextlib
import json
import platform
import sys
import tempfile
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm import ct, disease, distributed
from fibldm.chapters import (
    control_section,
    disease_sections,
    draw,
    left_out,
    no_privacy,
    picture_section,
    privacy_section,
    realism_section,
)
from fibldm.checkpoint import load_model, require_equal
from fibldm.cli import add_workers_option, fraction, make_parser, positive, run_script
from fibldm.datasets import CTDataset
from fibldm.disk import file_hash, replace_text
from fibldm.evaluation import Copies, Measured, Reader, Workers, batches, spread, stack
from fibldm.features import use_weights
from fibldm.metrics import Realism, Score, control_scores
from fibldm.report import Picture, Section, png_bytes, write_report
from fibldm.samples import describe_file, read_samples
from fibldm.tables import SPLITS, Row, Split, parse_table
from fibldm.vae import VAE

SHOWN = 12  # samples in the report

KEEP = (
    "This page shows real slices: keep it as you keep the patients' data. It compares samples with "
    "data; it is no medical device and judges no patient."
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__.split("\n\n")[0],
        "  python scripts/evaluate.py --real data --split test --samples samples --train data \\\n"
        "      --vae_checkpoint vae_run_1/vae_best.pth --output_dir report",
    )
    add = parser.add_argument
    add("--real", type=Path, required=True, help="folder of real slices, with label.csv")
    add("--split", choices=(*SPLITS, "all"), default="test", help="which of them to compare with")
    add("--samples", type=Path, required=True, help="folder that sample.py wrote, or of images")
    add(
        "--train", type=Path,
        help="folder with the label.csv that the models were trained on; without: no privacy part",
    )  # fmt: skip
    add("--output_dir", type=Path, default=Path("report"), help="gets index.html, metrics.json")
    add("--vae_checkpoint", type=Path, help="vae_best.pth: copies are looked for in latents too")
    for name in ("val", "test"):
        add(
            f"--{name}_fraction", type=fraction,
            help="of patients, as train_vae.py had it (unset: the VAE's, else 0.1)",
        )  # fmt: skip
    add("--split_seed", type=int, help="as train_vae.py had it (unset: the VAE's, else 0)")
    add(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="HU of the data's window (unset: the VAE's, else -1000 400)",
    )  # fmt: skip
    add("--draws", type=positive, default=200, help="bootstrap resamples of each interval")
    add("--seed", type=int, default=0, help="of resamples and halves")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--weights_dir", type=Path,
        help="folder of the metrics' networks, as fetch_metric_weights.py wrote it (unset: "
        "TORCH_HOME)",
    )  # fmt: skip
    add_workers_option(parser)
    add("--date", default=date.today().isoformat(), help="that the report shows")
    args = parser.parse_args(argv)
    if args.window is not None and args.window[0] >= args.window[1]:
        parser.error(f"--window {args.window[0]:g} {args.window[1]:g}: expected LOW below HIGH")
    return args


def read_rows(folder: Path, split: Split, option: str) -> list[Row]:
    """The rows of a folder's label.csv; no split of it needs to have patients."""
    if not folder.is_dir():
        raise ValueError(f"{option} {folder}: no such folder; expected one with label.csv")
    rows, _, problems = parse_table(folder / "label.csv", folder, split)
    for problem in problems:
        if problem.kind != "empty split":
            raise ValueError(f"{option}: {problem.message}")
    return rows


# Setup of a run.


def read_vae(args: argparse.Namespace) -> tuple[VAE | None, ct.Window, Split, str]:
    """The VAE, the window and the split: the checkpoint's where there is one, else the options'."""
    options = {
        "split_seed": args.split_seed,
        "val_fraction": args.val_fraction,
        "test_fraction": args.test_fraction,
    }
    window = None if args.window is None else tuple(args.window)
    if args.vae_checkpoint is None:
        given = {
            name.removeprefix("split_"): value
            for name, value in options.items()
            if value is not None
        }
        return None, window or ct.DEFAULT_WINDOW, Split(**given), ""
    vae, content = load_model(args.vae_checkpoint, VAE)
    split = Split(**content["split"])
    known = (split.seed, split.val_fraction, split.test_fraction)
    for (name, value), of_vae in zip(options.items(), known, strict=True):
        if value is not None:
            require_equal(f"--{name}", value, of_vae, f"as {args.vae_checkpoint} has it; leave out")
    of_vae = tuple(content["window"])
    if window is not None:
        require_equal("--window", window, of_vae, f"that of {args.vae_checkpoint}; leave it out")
    return vae, of_vae, split, content["lineage"].get("label_csv", "")


def versions() -> str:
    """Of what computed the numbers."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "torchmetrics", "lpips", "scikit-image", "scipy", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def find_train(
    args: argparse.Namespace, split: Split, real: list[Row]
) -> tuple[list[Row], tuple[list[Row], Path | None], str]:
    """The training rows; held-out rows with their folder; and why copies can't be looked for.

    Held out are all of --train's rows that are not in its train split, or else the real ones.
    """
    if args.train is None:
        return [], ([], None), "Copies were not looked for: --train was not given."
    table = read_rows(args.train, split, "--train")
    train = [row for row in table if row.split == "train"]
    if not train:
        raise ValueError(
            f"--train {args.train}: none of its {len(table)} rows is in the train split"
        )
    held_out, folder = [row for row in table if row.split != "train"], args.train
    patients = {row.patient_id for row in train}
    if not held_out:
        held_out, folder = [row for row in real if row.patient_id not in patients], args.real
    if len(held_out) < 2:
        return train, ([], None), (
            f"Copies were not looked for: {len(held_out)} slices of patients who are not trained "
            "on, expected 2 at least (100 for a percentile), to tell how near is too near."
        )  # fmt: skip
    return train, (held_out, folder), ""


def main(args: argparse.Namespace) -> None:
    # Setup: all that can be refused is refused before anything is computed.
    device = distributed.setup(args.device)
    if distributed.world_size() > 1:
        raise ValueError("evaluate.py is one process: run it without torchrun")
    output = args.output_dir
    if (output / "index.html").exists() and not (output / "metrics.json").exists():
        raise ValueError(f"{output} holds another index.html; use another --output_dir")
    use_weights(args.weights_dir)
    vae, window, split, trained_on = read_vae(args)
    table = read_rows(args.real, split, "--real")
    rows = [i for i, row in enumerate(table) if args.split in (row.split, "all")]
    if not rows:
        raise ValueError(
            f"--real {args.real}: none of its {len(table)} rows is in --split {args.split}"
        )
    samples, notes = read_samples(args.samples, table, window)
    if vae is not None:
        require_equal(
            f"--samples {args.samples}: their size", samples.size, vae.config["image_size"],
            f"the size of {args.vae_checkpoint}",
        )  # fmt: skip
    real_data = CTDataset(table, args.real, args.real, samples.size, window)
    notes += real_data.notes()
    reader = Reader(real_data, samples, window)
    names = [item.path.name for item in samples.items]
    train, held_out, no_copies = find_train(args, split, [table[row] for row in rows])
    if args.train and trained_on not in ("", file_hash(args.train / "label.csv")):
        notes.append(
            "WARNING: --train has another label.csv than the one the VAE was trained on: copies of "
            "slices that are not in it cannot be found."
        )
    if args.split in ("train", "all"):
        notes.append("WARNING: the real slices include training slices (--split).")
    sides = [
        CTDataset(some, folder, folder, samples.size, window)
        for some, folder in ((train, args.train), held_out)
        if folder is not None
    ]
    output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(dir=output, prefix=".evaluate_") as temporary:
        folder, workers = Path(temporary), Workers(args.num_workers)
        realism = Realism(device, folder / "realism")
        print("\n".join([*notes, *left_out(realism.networks)]))

        # Real slices.
        patients = [table[row].patient_id for row in rows]
        labels = [table[row].label for row in rows]
        real = Measured(patients)
        real_slices = workers.map(reader.real_slice, rows, "real slices")
        for batch in batches(real_slices):
            start = len(real.measures)
            realism.add_real(
                stack([one.image for one in batch]), patients[start : start + len(batch)]
            )
            for one in batch:
                real.add(one)
        limits = disease.limits_of(real.measures, real.lungs)

        # What the samples may be copies of.
        copies = None
        if not no_copies:
            copies = Copies(*sides, vae, device, folder, workers)

        # Samples.
        fake = Measured(names)
        shown, pictures = set(spread(len(names), SHOWN)), []
        looked_at = workers.map(partial(reader.sample, limits=limits), range(len(names)), "samples")
        for batch in batches(looked_at):
            start = len(fake.measures)
            of_batch = names[start : start + len(batch)]
            for paired in (True, False):
                some = [k for k, one in enumerate(batch) if (one.pair is not None) == paired]
                if some:
                    realism.add_fake(
                        stack([batch[k].image for k in some]),
                        [of_batch[k] for k in some],
                        stack([batch[k].pair for k in some]) if paired else None,
                    )
            if copies is not None:
                copies.add(np.stack([one.image for one in batch]))
            for i, one in enumerate(batch, start):
                fake.add(one)
                if i in shown:
                    label = samples.items[i].label
                    title = f"{names[i]}, {label}" if label else names[i]
                    pictures.append(Picture(title, png_bytes(draw(one)), f"Sample {names[i]}"))

        if copies is not None:
            copies.finish()

        # Numbers.
        scores = realism.scores(args.draws, args.seed)
        control: list[Score] = []
        if any(fake.asked):
            control = control_scores(fake.following(), real.following(), args.draws, args.seed)
        paired = any(item.row is not None for item in samples.items)
        if not paired:
            some = spread(len(rows), SHOWN)
            own = [
                Picture(f"real slice {k + 1}", png_bytes(draw(reader.real_slice(rows[i]))), "Real")
                for k, i in enumerate(some)
            ]
            pictures = [
                picture for both in zip_longest(own, pictures) for picture in both if picture
            ]
        lost = fake.asked.count(False)
        control_notes = (
            [f"{lost} of {len(names)} samples have no contour that is known."] if lost else []
        )
        fake_labels = [item.label for item in samples.items]
        if copies is None:
            private = no_privacy(no_copies)
        else:
            private = privacy_section(copies, names, args.draws, args.seed)
        sections = [
            picture_section(pictures, paired, window),
            realism_section(realism.networks, scores),
            control_section(control, control_notes),
            *disease_sections(
                real, patients, labels, fake, names, fake_labels, args.draws, args.seed
            ),
            private,
        ]

    # The report: both files are made before either is written.
    what = "all" if args.split == "all" else f"the {args.split} split"
    facts = {
        "Samples": f"{len(names)} slices of {samples.size}x{samples.size} pixels",
        "Real slices": f"{len(rows)} of {len(set(patients))} patients, {what} of label.csv "
        f"(SHA-256 {file_hash(args.real / 'label.csv')[:12]})",
        "Training slices": f"{len(train)} of {len({row.patient_id for row in train})} patients"
        if train
        else "not given",
        "Window": f"{window[0]:g} to {window[1]:g} HU",
        **{f"Samples' {kind}": text for kind, text in samples.models.items()},
    }
    if args.vae_checkpoint:
        facts["VAE of the privacy part"] = describe_file(args.vae_checkpoint)
    facts |= {
        "Intervals": f"{args.draws} bootstrap resamples, seed {args.seed}",
        "Computed by": versions(),
        "Date": args.date,
    }
    sections.append(Section("Notes", KEEP, notes=notes))
    numbers = as_json(sections, facts, names, fake, copies)
    write_report(output / "index.html", "Samples against real slices", sections, facts)
    replace_text(output / "metrics.json", numbers)
    for section in sections:
        if section.verdict is not None:
            print(f"{section.title}: {section.verdict.word}. {section.verdict.sentence}")
    print(f"{output}: index.html, metrics.json")


def as_json(
    sections: list[Section], facts: dict[str, str], names: list[str], fake: Measured,
    copies: Copies | None,
) -> str:  # fmt: skip
    """Every number of the report, and what was found of each sample, as JSON without NaN."""
    samples = []
    for i, name in enumerate(names):
        measures = {key: value for key, value in fake.measures[i].items() if np.isfinite(value)}
        sample: dict = {"file": name, "implausible": fake.implausible.get(i), "measures": measures}
        if copies is not None:
            match = copies.matches[i]
            sample["nearest"] = {
                "flagged": match.flagged, "ratio": match.ratio, "training_slice": match.row,
                "distances": match.distances,
            }  # fmt: skip
        samples.append(sample)
    content = {
        "facts": facts,
        "groups": {
            section.title: {
                "verdict": section.verdict and section.verdict.word,
                "summary": section.verdict and section.verdict.sentence,
                "notes": list(section.notes),
                "scores": [score.as_dict() for score in section.scores],
            }
            for section in sections
            if section.scores or section.verdict or section.notes
        },
        "samples": samples,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


if __name__ == "__main__":
    run_script(main, parse_args)
