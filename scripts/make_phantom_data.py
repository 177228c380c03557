"""Draw a data set of synthetic lung CT, with and without fibrosis, and its lung contours.

It needs no patient's data. The quickstart and the tests train on it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm.cli import count, make_parser, number, positive, run_script
from fibldm.ct import STYLES
from fibldm.phantom import write_dataset


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__.split("\n\n")[0],
        "  python scripts/make_phantom_data.py --output_dir ./data --patients 40",
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("data"), help="folder to write")
    add(
        "--patients", type=positive, default=40,
        help="number of patients; every second one has fibrosis",
    )  # fmt: skip
    add("--slices_per_patient", type=positive, default=8, metavar="N", help="slices of each")
    add(
        "--image_size", type=number(int, lambda n: n >= 16, "a whole number of at least 16"),
        default=256, help="height and width in pixels",
    )  # fmt: skip
    add("--seed", type=count, default=0, help="another seed draws other patients")
    add(
        "--contour_style", choices=STYLES, default="filled",
        help="contours as filled lungs, or as their outline, one pixel wide",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace a data set that is already there")
    args = parser.parse_args(argv)
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir}: expected a folder, found a file")
    if (args.output_dir / "label.csv").exists() and not args.overwrite:
        parser.error(
            f"--output_dir {args.output_dir}: found a data set there already (label.csv); "
            "give another folder, or --overwrite to replace it"
        )
    return args


def main(args: argparse.Namespace) -> None:
    # label.csv goes first: until the new one is there, the folder is no data set.
    (args.output_dir / "label.csv").unlink(missing_ok=True)
    # Only files named as this script names them go: the folder may hold other things.
    for name in ("images", "contours"):
        for old in (args.output_dir / name).glob("P[0-9]*_S[0-9]*.png"):
            old.unlink()
    write_dataset(
        args.output_dir,
        args.patients,
        args.slices_per_patient,
        args.image_size,
        args.seed,
        contour_style=args.contour_style,
    )
    slices = args.patients * args.slices_per_patient
    print(f"{args.output_dir / 'label.csv'}: {slices} slices of {args.patients} patients")


if __name__ == "__main__":
    run_script(main, parse_args)
