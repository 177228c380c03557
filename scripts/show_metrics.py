"""Print a table of what runs measured at their last validation, from their logs."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm.cli import make_parser, run_script
from fibldm.journal import log_parts, read_log

MISSING = "-"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__, "  python scripts/show_metrics.py vae_run_1 model_runs/ldm_unet_run_1"
    )
    parser.add_argument("runs", nargs="+", help="run folders")
    return parser.parse_args(argv)


def last_validation(run: Path) -> dict[str, float]:
    """The newest row with validation values, {"step": step, name: value, ...}."""
    if not log_parts(run):
        raise ValueError(f"{run}: no metrics.jsonl in it; expected a run's folder")
    rows = [row for row in read_log(run) if any(name.startswith("val/") for name in row)]
    if not rows:
        raise ValueError(f"{run}: no validation in its metrics.jsonl yet")
    return {name.removeprefix("val/"): value for name, value in rows[-1].items()}


def main(args: argparse.Namespace) -> None:
    columns = {run.rstrip("/"): last_validation(Path(run)) for run in args.runs}
    names = [name for values in columns.values() for name in values]
    names = [name for name in [*names, "fid", "kid", "lpips"] if not name.startswith("loss_t")]
    first, width = max(map(len, names)), max(map(len, columns)) + 2
    print(f"{'':{first}}" + "".join(f"{run:>{width}}" for run in columns))
    for name in dict.fromkeys(names):
        cells = [f"{v[name]:.4g}" if name in v else MISSING for v in columns.values()]
        print(f"{name:{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
    print(
        f"\n{MISSING}: not measured. FID and KID belong to the diffusion stages. They and LPIPS "
        "need weights:\n   scripts/fetch_metric_weights.py makes them, once."
    )


if __name__ == "__main__":
    run_script(main, parse_args)
