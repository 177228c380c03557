"""Make a data set (label.csv, slices in HU, contours) of DICOM, NIfTI, MAT, NPY, PNG or TIFF files.

Patients appear in it under keyed hashes alone. Run again, it does only what is new.
"""

import argparse
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm import ct
from fibldm.cli import (
    add_window_option,
    add_workers_option,
    finite,
    fraction,
    make_parser,
    positive,
    positive_float,
    run_script,
)
from fibldm.files import LeftOut
from fibldm.preparation import Preparation, prepare
from fibldm.series import Options
from fibldm.slices import Settings
from fibldm.tables import read_labels

SHOWN = 8  # files named for each reason, and notes; the report names all


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__.split("\n\n")[0],
        "  python scripts/prepare_data.py /archive/ct --output_dir ./data --labels diagnoses.csv\n"
        "  python scripts/check_data.py ./data",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="folders or files")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the data set")
    slices = parser.add_argument_group("slices")
    slices.add_argument(
        "--image_size", type=positive, default=Settings.image_size, help="height and width, pixels"
    )
    slices.add_argument(
        "--spacing", type=positive_float,
        help="mm of a pixel in all slices (default: each slice is fitted into the square)",
    )  # fmt: skip
    slices.add_argument(
        "--min_lung_area", type=fraction, default=Settings.min_lung_area,
        help="slices with less lung than this fraction of their pixels are left out",
    )  # fmt: skip
    slices.add_argument(
        "--contour_style", choices=ct.STYLES, default=Settings.contour_style,
        help="contours as filled lungs, or as their outline, one pixel wide",
    )  # fmt: skip
    patients = parser.add_argument_group("patients")
    patients.add_argument(
        "--labels",
        type=Path,
        help="CSV table with the columns patient_id (or the first one) and label",
    )
    patients.add_argument(
        "--patient_pattern", type=_pattern, metavar="REGEX",
        help="names the patient by its first group, in a file's path below INPUT (default: the "
        "PatientID of DICOM; label.csv; the name of a volume's file; the folder of single slices)",
    )  # fmt: skip
    patients.add_argument(
        "--key_file", type=Path,
        help="secret key that patients are hashed with; made if absent (default: OUTPUT_DIR.key)",
    )  # fmt: skip
    files = parser.add_argument_group("files without a mask, a scale or axes of their own")
    files.add_argument(
        "--mask_suffix", help="such as _mask: scan_mask.nii.gz holds the lungs of scan.nii.gz"
    )
    files.add_argument(
        "--variable", help="array in MAT and NPZ files (default: the only 2D or 3D one)"
    )
    files.add_argument(
        "--array_axes", type=_axes,
        help="axes of arrays and pictures: z runs from head to feet, y from front to back, x "
        "from the patient's right to left; a capital letter runs the other way (default: zyx, "
        "or yxz if the first two are equal)",
    )  # fmt: skip
    files.add_argument(
        "--rescale", type=finite, nargs=2, metavar=("SLOPE", "INTERCEPT"),
        help="HU = SLOPE * stored + INTERCEPT (default: the nearest dataset.json)",
    )  # fmt: skip
    add_window_option(files, Options.window, "HU of 0 and 255 in 8-bit pictures without a scale")
    files.add_argument(
        "--trust_hu", action="store_true",
        help="also take files whose values do not look like the HU of chest CT",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path,
        help="table of all that is left out, with file names (default: OUTPUT_DIR.left_out.csv)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the data set that is there"
    )
    add_workers_option(parser)
    return parser.parse_args(argv)


def _pattern(text: str) -> str:
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r}: no regular expression: {error}") from None
    if groups < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a group, as patient_([0-9]+)")
    return text


def _axes(text: str) -> str:
    if sorted(text.lower()) not in (["x", "y", "z"], ["x", "y"]):
        raise argparse.ArgumentTypeError(f"{text!r}; expected the letters x, y and z, as zyx")
    return text


def main(args: argparse.Namespace) -> None:
    settings = Settings(args.image_size, args.contour_style, args.min_lung_area, args.spacing)
    options = Options(
        args.patient_pattern,
        args.mask_suffix,
        args.variable,
        args.array_axes,
        None if args.rescale is None else tuple(args.rescale),
        tuple(args.window),
        args.trust_hu,
    )
    labels = {} if args.labels is None else read_labels(args.labels)
    try:
        result = prepare(
            args.inputs, args.output_dir, settings, options, labels,
            args.key_file, args.report, args.overwrite, args.num_workers,
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted: {str(stop) or 'nothing is done yet'}; the same command goes on")
        sys.exit(130)
    lines = table(args.output_dir, result) + summary(result.left_out)
    lines += [f"note: {note}" for note in result.notes[:SHOWN]]
    if len(result.notes) > SHOWN:
        lines.append(f"note: ... and {len(result.notes) - SHOWN} more")
    secret = f"{result.key_file}, {result.report}"
    lines.append(f"secret, keep them outside of what you share: {secret}")
    text = "\n".join(lines)
    print(text.encode("utf-8", "replace").decode())  # names of files may be in another encoding
    if not result.rows:
        raise ValueError(f"{args.output_dir}: no slice is usable; the reasons stand above")


def table(output: Path, result: Preparation) -> list[str]:
    """How many slices there are, and what became of those found in new series."""
    patients = {row["patient_id"] for row in result.rows}
    columns = "{:10}{:>8}{:>8}{:>8}{:>10}{:>8}"
    lines = [
        f"{output / 'label.csv'}: {len(result.rows)} slices of {len(patients)} patients; "
        f"{sum(map(len, result.prepared.values()))} series new or changed, "
        f"{result.unchanged} unchanged",
        "",
        columns.format("slices of", "series", "found", "used", "left out", "masks"),
    ]
    for kind, series in sorted(result.prepared.items()):
        found, used = sum(one.found for one in series), sum(len(one.rows) for one in series)
        masks = sum(one.masks for one in series)
        lines.append(columns.format(kind, len(series), found, used, found - used, masks))
    return lines


def summary(left_out: list[LeftOut]) -> list[str]:
    """What was left out, by reason, with the first files."""
    if not left_out:
        return ["", "nothing was left out"]
    groups: dict[str, list[str]] = defaultdict(list)
    for item in left_out:
        reason, _, detail = item.reason.partition(": ")
        if os.sep in reason and detail:  # another file's: its mask, its dataset.json
            file, (reason, _, detail) = reason, detail.partition(": ")
            detail = f"{file}{': ' if detail else ''}{detail}"
        groups[reason].append(f"{item.where}{': ' if detail else ''}{detail}")
    lines = ["", "left out:"]
    for reason, items in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"{len(items):7}  {reason}")
        lines += [f"         - {item}" for item in items[:SHOWN]]
        lines += [f"         ... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return lines


if __name__ == "__main__":
    run_script(main, parse_args)
