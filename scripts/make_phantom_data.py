"""Draw a data set of synthetic lung CT, with and without fibrosis, and its lung contours.

It needs no patient's data, and it is what the quickstart and the tests train on.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm.phantom import write_dataset

EXAMPLE = """example:
  python scripts/make_phantom_data.py --output_dir ./data --patients 40 --slices_per_patient 8
"""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default, and the example as it is written."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=EXAMPLE, formatter_class=_Help
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("data"), help="folder to write")
    add("--patients", type=int, default=40, help="number of patients; every second has fibrosis")
    add("--slices_per_patient", type=int, default=8, help="slices of each patient")
    add("--image_size", type=int, default=256, help="height and width in pixels")
    add("--seed", type=int, default=0, help="another seed draws other patients")
    add(
        "--contour_style",
        choices=("filled", "outline"),
        default="filled",
        help="contours as filled lungs, or as their outline, one pixel wide",
    )
    add("--overwrite", action="store_true", help="replace a data set that is already there")
    args = parser.parse_args(argv)

    for name, least in (
        ("patients", 1),
        ("slices_per_patient", 1),
        ("image_size", 16),
        ("seed", 0),
    ):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: expected at least {least}")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir}: expected a folder, found a file")
    if (args.output_dir / "label.csv").exists() and not args.overwrite:
        parser.error(
            f"--output_dir {args.output_dir}: found a data set there already (label.csv); "
            "give another folder, or --overwrite to replace it"
        )
    return args


def main(args) -> None:
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
    count = args.patients * args.slices_per_patient
    print(f"{args.output_dir / 'label.csv'}: {count} slices of {args.patients} patients")


if __name__ == "__main__":
    main(parse_args())
