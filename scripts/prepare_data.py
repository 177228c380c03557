"""Make a data set (label.csv, slices in HU, contours) of DICOM, NIfTI, MAT, NPY, PNG or TIFF files.

Patients appear in it under keyed hashes alone. Run again, it does only what is new.
"""

import argparse
import contextlib
import csv
import hashlib
import hmac
import io
import json
import os
import secrets
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from tqdm import tqdm

from fibldm import ct, dicom
from fibldm.datasets import read_lines
from fibldm.inspection import hu_problem
from fibldm.lungs import lung_mask
from fibldm.series import LeftOut, Options, Series, find_series, read_series
from fibldm.training import fraction, make_parser, positive, positive_float, run_script

INTERCEPT = -1024  # HU of a stored 0
COLUMNS = ("image", "contour", "patient_id", "label", "split", "position", "pixel_spacing")
FOLDERS = ("series", "images", "contours")
NAME = "[0-9a-f]" * 12 + "_*.png"  # of the images and contours that are written here
SHOWN = 8  # files named for each reason; the report names all


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__.split("\n\n")[0],
        "  python scripts/prepare_data.py /archive/ct --output_dir ./data --labels diagnoses.csv\n"
        "  python scripts/check_data.py ./data",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="folders or files")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets the data set")
    slices = parser.add_argument_group("slices")
    slices.add_argument("--image_size", type=positive, default=256, help="height and width, pixels")
    slices.add_argument(
        "--spacing", type=positive_float,
        help="mm of a pixel in all slices (default: each slice is fitted into the square)",
    )  # fmt: skip
    slices.add_argument(
        "--min_lung_area", type=fraction, default=0.03,
        help="slices with less lung than this fraction of their pixels are left out",
    )  # fmt: skip
    slices.add_argument(
        "--contour_style", choices=("filled", "outline"), default="filled",
        help="contours as filled lungs, or as their outline, one pixel wide",
    )  # fmt: skip
    patients = parser.add_argument_group("patients")
    patients.add_argument(
        "--labels", type=Path, help="CSV: patient_id and label (or in this order)"
    )
    patients.add_argument(
        "--patient_pattern", metavar="REGEX",
        help="its first group, found in a file's path below INPUT, is the patient (default: the "
        "PatientID of DICOM; label.csv; the name of a volume's file; the folder of single slices)",
    )  # fmt: skip
    patients.add_argument(
        "--key_file", type=Path,
        help="secret that patients are hashed with, made if absent (default: OUTPUT_DIR.key)",
    )  # fmt: skip
    files = parser.add_argument_group("files that do not say it themselves")
    files.add_argument(
        "--mask_suffix", help="as _mask: scan_mask.nii.gz holds the lungs of scan.nii.gz"
    )
    files.add_argument("--variable", help="in MAT and NPZ files (default: the only 2D or 3D one)")
    files.add_argument(
        "--array_axes", type=_axes,
        help="of arrays and pictures: z counts slices from head to feet, y from front to back, x "
        "from the patient's right to left; a capital letter: the other way (default: zyx, or "
        "yxz where the first two are equal)",
    )  # fmt: skip
    files.add_argument(
        "--rescale", type=float, nargs=2, metavar=("SLOPE", "INTERCEPT"),
        help="HU = SLOPE * stored + INTERCEPT (default: the nearest dataset.json)",
    )  # fmt: skip
    files.add_argument(
        "--window", type=float, nargs=2, default=list(ct.DEFAULT_WINDOW), metavar=("LOW", "HIGH"),
        help="HU of 0 and 255 in 8-bit pictures without a scale",
    )  # fmt: skip
    files.add_argument(
        "--trust_hu", action="store_true",
        help="take files whose values do not look like the HU of chest CT, too",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path,
        help="table of all that is left out, with file names (default: OUTPUT_DIR.left_out.csv)",
    )  # fmt: skip
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--overwrite", action="store_true", help="make the data set anew")
    args = parser.parse_args(argv)
    args.output_dir = Path(os.path.abspath(args.output_dir))
    for name, suffix in (("key_file", ".key"), ("report", ".left_out.csv")):
        if getattr(args, name) is None:
            setattr(args, name, args.output_dir.with_name(args.output_dir.name + suffix))
        elif args.output_dir in Path(os.path.abspath(getattr(args, name))).parents:
            parser.error(f"--{name} {getattr(args, name)}: identifies patients; keep it outside of "
                         f"--output_dir {args.output_dir}")  # fmt: skip
    return args


def _axes(text: str) -> str:
    if sorted(text.lower()) not in (["x", "y", "z"], ["x", "y"]):
        raise argparse.ArgumentTypeError(f"{text!r}; expected the letters x, y and z, as zyx")
    return text


@dataclass(frozen=True)
class Settings:
    """What all slices of a data set share; kept in its dataset.json."""

    image_size: int
    contour_style: str
    min_lung_area: float
    pixel_spacing: float | None


@dataclass
class Prepared:
    """What became of one series. `rows` are lines of label.csv; `error` says why there are none."""

    rows: list[dict] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    found: int = 0
    given: int = 0  # contours that came from masks
    error: str | None = None


class CannotWrite(ValueError):
    """The output can't be written: no series after this one will fare better."""


# One series.


def prepare(
    series: Series, options: Options, settings: Settings, output: Path, name: str
) -> Prepared:
    """Write the slices of a series that have enough lung, and their contours, all or none."""
    result = Prepared()
    try:
        slices, images, masks, values = [], [], [], []
        for item in read_series(series, options):
            result.found += 1
            if isinstance(item, LeftOut):
                result.left_out.append(item)
                continue
            spacing = item.spacing or (1.0, 1.0)
            if settings.pixel_spacing is not None and item.spacing is None:
                raise ValueError("its pixel spacing is unknown, and --spacing needs it")
            fit = (settings.image_size, dicom.AIR, spacing, settings.pixel_spacing)
            images.append(np.round(ct.fit_square(item.hu, *fit)).astype(np.int16))
            masks.append(_fit_mask(item.mask, settings.image_size, spacing, settings.pixel_spacing))
            step = max(1, len(item.hu) // 128)
            values.append(item.hu[::step, ::step])
            slices.append((item.where, item.source, item.height, _pixel(item, settings)))
        if not slices:
            reasons = Counter(item.reason for item in result.left_out)
            raise ValueError("; ".join(reasons) or "no slices in it")
        volume = np.stack(images)
        alike = len({image.shape for image in values}) == 1
        sample = np.stack(values) if alike else np.concatenate([v.ravel() for v in values])
        problem = None if options.trust_hu else hu_problem(sample)
        if problem:
            raise ValueError(problem)
        found = masks
        if any(mask is None for mask in masks):  # slices of a table need not be neighbours
            apart = series.kind == "table"
            found = [lung_mask(image) for image in volume] if apart else lung_mask(volume)
        result.given = sum(mask is not None for mask in masks)
        masks = [
            given if given is not None else own for given, own in zip(masks, found, strict=True)
        ]
        rows, left_out = _choose(slices, masks, series, settings)
        result.left_out += left_out
    except ValueError as error:
        result.error = str(error)
        return result
    result.rows = _write(rows, volume, masks, settings, output, name)
    return result


def _fit_mask(
    mask: np.ndarray | None, size: int, spacing: tuple[float, float], pixel: float | None
) -> np.ndarray | None:
    """A mask as (size, size), outlines filled."""
    if mask is None:
        return None
    if ct.contour_style(mask[None]) == "outline":
        mask = ct.fill_outline(mask[None])[0]
    return ct.fit_square(mask, size, 0, spacing, pixel) >= 0.5


def _pixel(item, settings: Settings) -> float | None:
    """mm of a pixel of the prepared slice, None where unknown."""
    if settings.pixel_spacing is not None or item.spacing is None:
        return settings.pixel_spacing
    lengths = [n * mm for n, mm in zip(item.hu.shape, item.spacing, strict=True)]
    return max(lengths) / settings.image_size


def _choose(
    slices: list[tuple], masks: list[np.ndarray], series: Series, settings: Settings
) -> tuple[list[tuple[int, dict]], list[LeftOut]]:
    """The slices with enough lung, as (index, cells of label.csv), and the others."""
    areas = np.array([mask.mean() for mask in masks])
    heights = [height for _, _, height, _ in slices]
    if None in heights:  # no positions in mm: from their order, one apart
        heights = [-float(i) for i in range(len(slices))]
    lungs = [height for height, area in zip(heights, areas, strict=True) if area > 0]
    extent = max(lungs) - min(lungs) if lungs else 0
    ordered = series.kind != "table" and extent > 0
    rows, left_out = [], []
    for i, (where, source, _, pixel) in enumerate(slices):
        if areas[i] < settings.min_lung_area:
            reason = f"less lung than {settings.min_lung_area:g} of its pixels (--min_lung_area)"
            left_out.append(LeftOut(where, reason))
            continue
        mask = masks[i]
        if settings.pixel_spacing and (mask[[0, -1]].any() or mask[:, [0, -1]].any()):
            reason = "lungs reach beyond the image (--spacing times --image_size)"
            left_out.append(LeftOut(where, reason))
            continue
        position = (max(lungs) - heights[i]) / extent if ordered else source.position
        cells = {
            "label": source.label,
            "split": source.split,
            "position": "" if position is None else f"{position:.4f}",
            "pixel_spacing": "" if pixel is None else f"{pixel:.6g}",
        }
        rows.append((i, cells))
    return rows, left_out


def _write(
    rows: list[tuple[int, dict]],
    volume: np.ndarray,
    masks: list[np.ndarray],
    settings: Settings,
    output: Path,
    name: str,
) -> list[dict]:
    """Write images and contours of a series, all or none; return its lines of label.csv."""
    written: list[Path] = []
    lines = []
    stored = np.clip(volume.astype(np.int32) - INTERCEPT, 0, 65535).astype(np.uint16)
    try:
        for i, cells in rows:
            contour = masks[i]
            if settings.contour_style == "outline":
                contour = ct.outline_mask(contour[None])[0]
            files = [Path(folder) / f"{name}_{i:04d}.png" for folder in ("images", "contours")]
            for file, pixels in zip(
                files, (stored[i], contour.astype(np.uint8) * 255), strict=True
            ):
                written.append(output / file)
                ct.write_atomically(output / file, Image.fromarray(pixels).save)
            lines.append({"image": files[0].as_posix(), "contour": files[1].as_posix(), **cells})
    except OSError as error:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise CannotWrite(f"{output}: cannot be written: {error.strerror or error}") from error
    return lines


# All series.


def prepare_all(
    jobs: list[tuple[Series, str]], options: Options, settings: Settings, output: Path, workers: int
) -> Iterator[tuple[Series, str, Prepared]]:
    """Prepare series, by several processes; one that kills its process is reported as broken."""
    if workers <= 1 or len(jobs) <= 1:
        for series, name in jobs:
            yield series, name, prepare(series, options, settings, output, name)
        return
    done: set[str] = set()
    with ProcessPoolExecutor(min(workers, len(jobs))) as pool:
        futures = {
            pool.submit(prepare, series, options, settings, output, name): (series, name)
            for series, name in jobs
        }
        try:
            for future in as_completed(futures):
                with contextlib.suppress(BrokenProcessPool):
                    result = future.result()
                    done.add(futures[future][1])
                    yield *futures[future], result
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for series, name in jobs:  # what a death took with it: each in a process of its own
        if name not in done:
            try:
                with ProcessPoolExecutor(1) as pool:
                    result = pool.submit(prepare, series, options, settings, output, name).result()
            except BrokenProcessPool:
                result = Prepared(error="reading it ended its process: out of memory, or damaged")
            yield series, name, result


def headers_of(path: Path) -> list[dicom.Header] | str:
    """A DICOM file's headers, or what is wrong with it."""
    try:
        return dicom.read_headers(path)
    except ValueError as error:
        return str(error)


def read_headers(paths: list[Path], workers: int) -> Iterable[list[dicom.Header] | str]:
    """Headers of many DICOM files, in their order."""
    bar = {"desc": "reading headers", "total": len(paths), "unit": "file", "disable": None}
    if workers <= 1 or len(paths) < 256:
        return list(tqdm(map(headers_of, paths), **bar))
    with ProcessPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(headers_of, paths, chunksize=64), **bar))


# Who a patient is, and what the user says of them.


@dataclass(frozen=True)
class Pseudonyms:
    """Names for patients and series that only the holder of the key can trace back."""

    key: bytes

    def of(self, what: str, text: str, length: int = 12) -> str:
        digest = hmac.new(self.key, f"{what}:{text}".encode(), hashlib.sha256).hexdigest()
        return digest[:length]


def read_key(path: Path, needed: bool) -> bytes:
    """The key of a file; a new one where there is no file, unless a data set already needs it."""
    if path.is_file():
        key = path.read_text().strip()
        if len(key) < 32:
            raise ValueError(f"--key_file {path}: {len(key)} characters, expected at least 32")
        return key.encode()
    if needed:
        raise ValueError(
            f"--key_file {path}: no such file, and the data set was made with one; give the key "
            "that it was made with, or --overwrite to make all anew under a new key"
        )
    key = secrets.token_hex(32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key + "\n")
    return key.encode()


def read_labels(path: Path) -> dict[str, str]:
    """The label of each patient; ValueError where a patient has two."""
    lines = [line for _, line in read_lines(path)]
    if len(lines) < 2 or min(len(line) for line in lines) < 2:
        raise ValueError(f"{path}: expected a header and two columns, patient_id and label")
    header = [name.lower() for name in lines[0]]
    named = {"patient_id", "label"} <= set(header)
    who, what = (header.index("patient_id"), header.index("label")) if named else (0, 1)
    labels: dict[str, str] = {}
    for line in lines[1:]:
        if labels.setdefault(line[who], line[what]) != line[what]:
            raise ValueError(
                f"{path}: patient {line[who]} is {labels[line[who]]} and {line[what]}, "
                "expected one label a patient"
            )
    return labels


# The output.


def open_output(args: argparse.Namespace, settings: Settings) -> Pseudonyms:
    """Check the folder against its dataset.json, or make it; return its pseudonyms."""
    output, facts_file = args.output_dir, args.output_dir / "dataset.json"
    for top in args.inputs:
        if Path(os.path.abspath(top)).is_relative_to(output):
            raise ValueError(f"{top}: lies within --output_dir {output}, expected another folder")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {output}: expected a folder, found a file")
    before = None
    if facts_file.is_file():
        before = json.loads(facts_file.read_text())
        if "key_check" not in before:
            raise ValueError(
                f"--output_dir {output}: holds a data set of another origin; give another folder"
            )
    elif output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--output_dir {output}: not empty, and no data set; give another folder")
    anew = args.overwrite or not any((output / "series").glob("*.json"))
    names = Pseudonyms(read_key(args.key_file, needed=before is not None and not anew))
    facts = {"rescale_slope": 1.0, "rescale_intercept": float(INTERCEPT), **asdict(settings)}
    facts["key_check"] = names.of("key", "")
    if before is not None and not anew:
        for name, value in facts.items():
            if before.get(name) != value:
                raise ValueError(
                    f"--output_dir {output}: its {name} is {before.get(name)}, asked for is "
                    f"{value}; give the same, another folder, or --overwrite to make all anew"
                )
    write_text(facts_file, json.dumps(facts, indent=2) + "\n")
    if before is not None and args.overwrite:
        (output / "label.csv").unlink(missing_ok=True)
        for path in (output / "series").glob("*.json"):
            path.unlink()
    for folder in FOLDERS:
        (output / folder).mkdir(exist_ok=True)
        for torn in (output / folder).glob(".tmp_*"):  # of a run that was killed
            torn.unlink()
    return names


def write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ct.write_atomically(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise CannotWrite(f"{path}: cannot be written: {error.strerror or error}") from error


def write_table(output: Path, labels: dict[str, str]) -> list[dict]:
    """Write label.csv from the records of all series; `labels`, by pseudonym, win; sweep up."""
    before = {}
    if (output / "label.csv").is_file():
        with open(output / "label.csv", newline="") as file:
            before = {row["image"]: row["label"] for row in csv.DictReader(file)}
    records = [json.loads(path.read_text()) for path in sorted((output / "series").glob("*.json"))]
    rows = [row for record in records for row in record["rows"]]
    for row in rows:
        known = row["label"] or before.get(row["image"], "")
        row["label"] = labels.get(row["patient_id"], known)
    rows.sort(key=lambda row: row["image"])
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(output / "label.csv", text.getvalue())

    # What no row names any more: of series that changed, and of runs that were killed.
    named = {row[column] for row in rows for column in ("image", "contour")}
    for folder in ("images", "contours"):
        for path in (output / folder).glob(NAME):
            if f"{folder}/{path.name}" not in named:
                path.unlink()
    return rows


def write_report(path: Path, left_out: list[LeftOut]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["what", "reason"])
    writer.writerows([item.where, item.reason] for item in left_out)
    write_text(path, text.getvalue())


def main(args: argparse.Namespace) -> None:
    # What there is, and what is asked for: both checked before anything is written.
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
    given = {} if args.labels is None else read_labels(args.labels)
    series, left_out = find_series(
        args.inputs, args.output_dir, options, lambda paths: read_headers(paths, args.num_workers)
    )
    if not series:
        tops = ", ".join(map(str, args.inputs))
        raise ValueError(f"{tops}: no CT found\n{summary(left_out)}")
    names = open_output(args, settings)
    output, records = args.output_dir, args.output_dir / "series"
    labels = {names.of("patient", patient): label for patient, label in given.items()}

    # Which series are new, or changed.
    jobs, fingerprints, unchanged = [], {}, 0  # files' names hold it: none replaces another
    for one in series:
        key = names.of("series", one.key, 8)
        name = f"{names.of('patient', one.patient)}_{key}"
        facts = f"{options} {settings} {one.fingerprint}"
        fingerprints[name] = names.of("fingerprint", facts)
        for path in records.glob(f"*_{key}.json"):
            record = json.loads(path.read_text())
            if path.stem == name and record["fingerprint"] == fingerprints[name]:
                unchanged += 1
                break
            if path.stem != name:  # it was another patient's
                path.unlink()
        else:
            jobs.append((one, f"{name}_{fingerprints[name][:6]}"))

    # Make them.
    table: dict[str, Counter] = defaultdict(Counter)
    notes = [note for one, _ in jobs for note in one.notes]
    done = 0
    try:
        bar = tqdm(total=len(jobs), desc="preparing", unit="series", disable=None)
        for one, name, result in prepare_all(jobs, options, settings, output, args.num_workers):
            name = name.rpartition("_")[0]
            keep(output, name, fingerprints[name], result)
            left_out += result.left_out
            if result.error is not None:
                left_out.append(LeftOut(one.name, result.error))
            counts = {"series": 1, "found": result.found, "used": len(result.rows)}
            table[one.kind].update({**counts, "masks": result.given})
            done += 1
            bar.update()
        bar.close()
        rows = write_table(output, labels)
    except CannotWrite as error:
        raise ValueError(
            f"{error}; {done} of {len(jobs)} series are done and kept: make room, and run the same "
            "command again"
        ) from error
    except KeyboardInterrupt:
        write_table(output, labels)
        print(f"\ninterrupted: {done} of {len(jobs)} series are done; run the same command again")
        sys.exit(130)
    write_report(args.report, left_out)

    # What was found, used and left out.
    patients = {row["patient_id"] for row in rows}
    print(f"{output / 'label.csv'}: {len(rows)} slices of {len(patients)} patients; "
          f"{len(jobs)} series new or changed, {unchanged} unchanged")  # fmt: skip
    columns = ("series", "found", "used", "masks")
    print(
        "\n{:10}{:>8}{:>8}{:>8}{:>10}{:>8}".format("slices of", *columns[:3], "left out", "masks")
    )
    for kind, counts in sorted(table.items()):
        series_, found, used, masks = (counts[name] for name in columns)
        print(f"{kind:10}{series_:8}{found:8}{used:8}{found - used:10}{masks:8}")
    print(summary(left_out))
    notes += remarks(series, given, rows)
    for note in notes[:SHOWN] + ([f"... and {len(notes) - SHOWN} more"] if notes[SHOWN:] else []):
        print(f"note: {note}")
    print(f"secret, keep them outside of what you share: {args.key_file}, {args.report}")
    if not rows:
        raise ValueError(f"{output}: no slice is usable; the reasons stand above")


def keep(output: Path, name: str, fingerprint: str, result: Prepared) -> None:
    """Record what became of a series, so that it is not made again; an error leaves the old one."""
    if result.error is None:
        patient = name.partition("_")[0]
        rows = [{**row, "patient_id": patient} for row in result.rows]
        text = json.dumps({"fingerprint": fingerprint, "rows": rows}) + "\n"
        write_text(output / "series" / f"{name}.json", text)


def summary(left_out: list[LeftOut]) -> str:
    """What was left out, by reason, with the first files."""
    if not left_out:
        return "\nnothing was left out"
    groups: dict[str, list[str]] = defaultdict(list)
    for item in left_out:
        reason, _, detail = item.reason.partition(": ")
        groups[reason].append(f"{item.where}{': ' if detail else ''}{detail}")
    lines = ["", f"left out: {len(left_out)}"]
    for reason, items in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"{len(items):7}  {reason}")
        lines += [f"         - {item}" for item in items[:SHOWN]]
        lines += [f"         ... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return "\n".join(lines)


def remarks(series: list[Series], labels: dict[str, str], rows: list[dict]) -> list[str]:
    """What the user should know of how patients and labels were taken."""
    notes = []
    known = {one.patient for one in series}
    unknown = sorted(set(labels) - known)
    if unknown:
        some = ", ".join(unknown[:SHOWN])
        notes.append(f"{len(unknown)} patients of --labels are in no input: {some}")
    bare = len({row["patient_id"] for row in rows if not row["label"]})
    if labels and bare:
        notes.append(f"{bare} patients have no label")
    counts = Counter(one.patient for one in series if one.kind != "table")
    several = sum(count > 1 for count in counts.values())
    if several:
        notes.append(
            f"{several} patients have several series, and all are used: give the folders of one "
            "reconstruction as inputs if these are of the same scan"
        )
    folders = sorted({one.name for one in series if one.kind == "images"})
    if folders:
        notes.append(
            "single slices of a folder are taken as one patient's, in the order of their names "
            f"from head to feet: {', '.join(folders[:SHOWN])}; otherwise give --patient_pattern"
        )
    if any(one.kind == "volume" for one in series):
        notes.append(
            "each volume file is taken as a patient of its own, named as the file; if a patient "
            "has several, give --patient_pattern: else they may land on both sides of the split"
        )
    return notes


if __name__ == "__main__":
    run_script(main, parse_args)
