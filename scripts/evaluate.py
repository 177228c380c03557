"""Evaluate samples: realism, control, disease and privacy, as a page to look at and as numbers.

Writes index.html and metrics.json; both hold what real slices show, the page shows slices too.
"""

import argparse
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm import ct, distributed
from fibldm.checkpoint import load, require_equal
from fibldm.cli import (
    add_window_option,
    add_workers_option,
    fraction,
    integer,
    make_parser,
    positive,
    run_script,
)
from fibldm.disk import file_hash
from fibldm.evaluation import evaluate
from fibldm.features import use_weights
from fibldm.report import require_own, write_report
from fibldm.samples import describe_file
from fibldm.synthesis import Synthesizer
from fibldm.tables import SPLITS, Split
from fibldm.vae import VAE


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
    add("--split_seed", type=integer, help="as train_vae.py had it (unset: the VAE's, else 0)")
    add_window_option(parser, None, "HU of the data's window (unset: the VAE's, else -1000 400)")
    add("--draws", type=positive, default=200, help="bootstrap resamples of the privacy part")
    add("--seed", type=integer, default=0, help="of resamples and halvings")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--weights_dir", type=Path,
        help="folder of the metrics' networks, as fetch_metric_weights.py wrote it (unset: "
        "TORCH_HOME)",
    )  # fmt: skip
    add_workers_option(parser)
    add("--date", default=date.today().isoformat(), help="that the report shows")
    return parser.parse_args(argv)


def read_split(args: argparse.Namespace, content: dict) -> Split:
    """How patients are divided: as the VAE's checkpoint says where there is one, else options."""
    options = {
        "seed": args.split_seed,
        "val_fraction": args.val_fraction,
        "test_fraction": args.test_fraction,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if not content:
        return Split(**given)
    split = Split(**content["split"])
    for name, value in given.items():
        option = "--split_seed" if name == "seed" else f"--{name}"
        remedy = f"as {args.vae_checkpoint} has it; leave out"
        require_equal(option, value, getattr(split, name), remedy)
    return split


def read_window(args: argparse.Namespace, content: dict) -> ct.Window:
    """HU of the data's window: the VAE's where there is one, else the option's."""
    window = None if args.window is None else tuple(args.window)
    if not content:
        return window or ct.DEFAULT_WINDOW
    of_vae = tuple(content["window"])
    if window is not None:
        require_equal("--window", window, of_vae, f"that of {args.vae_checkpoint}; leave it out")
    return of_vae


def training_notes(args: argparse.Namespace, content: dict) -> list[str]:
    """A warning where --train is not what the VAE was trained on."""
    trained_on = content["lineage"].get("label_csv", "") if content else ""
    table = args.train and args.train / "label.csv"
    if not trained_on or not table or not table.is_file() or trained_on == file_hash(table):
        return []
    return [
        "WARNING: --train has another label.csv than the one the VAE was trained on: copies of "
        "slices that are not in it cannot be found."
    ]


def main(args: argparse.Namespace) -> None:
    # Setup: all that can be refused is refused before anything is computed.
    device = distributed.setup(args.device)
    if distributed.world_size() > 1:
        raise ValueError("evaluate.py is one process: run it without torchrun")
    require_own(args.output_dir)
    use_weights(args.weights_dir)
    content, model, facts = {}, None, {}
    if args.vae_checkpoint is not None:
        content = load(args.vae_checkpoint, VAE.kind)
        model = Synthesizer.from_checkpoints(args.vae_checkpoint, device=device, precision="fp32")
        facts = {"VAE of the privacy part": describe_file(args.vae_checkpoint)}
    split, window = read_split(args, content), read_window(args, content)
    notes = training_notes(args, content)
    for note in notes:
        print(note)

    # Evaluate.
    evaluation = evaluate(
        args.real,
        args.samples,
        split=args.split,
        train=args.train,
        model=model,
        window=window,
        patient_split=split,
        draws=args.draws,
        seed=args.seed,
        workers=args.num_workers,
        device=device,
        scratch=args.output_dir,
        say=print,
    )

    # The report.
    facts = {**evaluation.facts, **facts, "Date": args.date}
    evaluation = replace(evaluation, facts=facts, notes=[*evaluation.notes, *notes])
    write_report(evaluation, args.output_dir)
    for title, group in evaluation.groups.items():
        if group.verdict is not None:
            print(f"{title}: {group.verdict.word}. {group.verdict.sentence}")
    print(f"{args.output_dir}: index.html, metrics.json")


if __name__ == "__main__":
    run_script(main, parse_args)
