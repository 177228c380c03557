"""Check a data set (label.csv, images, contours): what training would refuse or learn wrongly.

Prints a table of problems and writes a contact sheet; exit code 1 where there are errors.
"""

import argparse
import sys
import textwrap
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm.cli import (
    add_window_option,
    add_workers_option,
    fraction,
    integer,
    make_parser,
    positive,
    run_script,
)
from fibldm.ct import DEFAULT_WINDOW
from fibldm.findings import Finding
from fibldm.inspection import Inspection, inspect
from fibldm.tables import Split

SHOWN = 5  # problems of a kind that are printed
WIDTH = 100  # columns of the table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__.split("\n\n")[0], "  python scripts/check_data.py ./data")
    add = parser.add_argument
    add("data", type=Path, help="folder with label.csv, dataset.json and what they name")
    add("--csv_file", type=Path, help="the table, if it is not label.csv in the folder")
    add("--img_dir", type=Path, help="folder its paths are relative to, if it is another")
    add_window_option(parser, DEFAULT_WINDOW, "HU that training makes -1 and 1")
    add("--contour_channels", type=positive, default=1, help="as train_controlnet.py has it")
    add("--val_fraction", type=fraction, default=0.1, help="of patients, as train_vae.py has it")
    add("--test_fraction", type=fraction, default=0.1, help="of patients, as train_vae.py has it")
    add("--split_seed", type=integer, default=0, help="as train_vae.py has it")
    add("--contact_sheet", type=Path, help="PNG to write; contact_sheet.png in the folder if unset")
    add_workers_option(parser)
    add("--all", action="store_true", help=f"list all rows of each problem, not the first {SHOWN}")
    args = parser.parse_args(argv)
    args.contact_sheet = args.contact_sheet or args.data / "contact_sheet.png"
    return args


def print_counts(inspection: Inspection) -> None:
    """How many slices and patients there are, in all and in each split and label."""
    patients = Counter(row.patient_id for row in inspection.rows)
    single = sum(slices == 1 for slices in patients.values())
    slices = len(inspection.rows)
    print(f"{slices} slices of {len(patients)} patients, {single} of them with one slice")
    print(f"  {'split':<8}{'label':<20}{'patients':>9}{'slices':>9}")
    for group in inspection.counts:
        cells = f"  {group.split:<8}{group.label or '-':<20}"
        print(f"{cells}{group.patients:>9}{group.slices:>9}")


def print_findings(findings: list[Finding], shown: int | None) -> None:
    """A table: each kind of problem with its meaning, and below it where it is."""
    print(f"\n{'severity':<9} {'check':<23} {'found':>5}  meaning")
    for finding in findings:
        rows = len(finding.lines)
        first, *more = textwrap.wrap(finding.meaning, WIDTH - 41, break_on_hyphens=False)
        print(f"{finding.severity:<9} {finding.check:<23} {rows:>5}  {first}")
        for line in more:
            print(f"{'':<41}{line}")
        for line in finding.lines[:shown]:
            print(f"{'':<10}{line}")
        if shown is not None and rows > shown:
            print(f"{'':<10}... and {rows - shown} more (--all lists them)")


def main(args: argparse.Namespace) -> None:
    inspection = inspect(
        args.data,
        args.csv_file,
        args.img_dir,
        window=tuple(args.window),
        contour_channels=args.contour_channels,
        split=Split(args.split_seed, args.val_fraction, args.test_fraction),
        workers=args.num_workers,
    )
    print_counts(inspection)
    for note in inspection.notes:
        print(note)
    if inspection.findings:
        print_findings(inspection.findings, None if args.all else SHOWN)
    inspection.write_contact_sheet(args.contact_sheet)
    errors = len(inspection.errors)
    print(
        f"\nkinds of errors: {errors}, of warnings: {len(inspection.findings) - errors}; "
        f"contact sheet: {args.contact_sheet}"
    )
    if errors:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, parse_args)
