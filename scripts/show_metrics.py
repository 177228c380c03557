"""Print a table of what runs measured at their last validation, from their metrics.jsonl."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm.cli import make_parser, run_script

MISSING = "-"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        "  python scripts/show_metrics.py vae_run_1 model_runs/ldm_unet_run_1",
    )
    parser.add_argument("runs", nargs="+", help="run folders")
    return parser.parse_args(argv)


def last_validation(run: Path) -> dict[str, float]:
    """The newest row with validation values, with their names' prefix removed."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a run's folder")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if any(name.startswith("val/") for name in row)]
    if not rows:
        raise ValueError(f"{path}: no validation in it yet")
    return {name.removeprefix("val/"): value for name, value in rows[-1].items()}


def main(args: argparse.Namespace) -> None:
    columns = {run.rstrip("/"): last_validation(Path(run)) for run in args.runs}
    names = dict.fromkeys(
        name for values in columns.values() for name in values if not name.startswith("loss_t")
    )
    for metric in ("fid", "kid", "lpips"):
        names.setdefault(metric)
    width = max(len(run) for run in columns) + 2
    print(f"{'':14}" + "".join(f"{run:>{width}}" for run in columns))
    for name in names:
        cells = [f"{v[name]:.4g}" if name in v else MISSING for v in columns.values()]
        print(f"{name:14}" + "".join(f"{cell:>{width}}" for cell in cells))
    print(
        f"\n{MISSING}: not measured. FID and KID belong to the diffusion stages; they and LPIPS "
        "need weights,\n   which scripts/fetch_metric_weights.py makes once."
    )


if __name__ == "__main__":
    run_script(main, parse_args)
