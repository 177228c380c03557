"""Make a data set (label.csv, slices in HU, contours) of DICOM, NIfTI, MAT, NPY, PNG or TIFF files.

Patients appear in it under keyed hashes alone. Run again, it does only what is new.
"""

import argparse
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from tqdm import tqdm

from fibldm import ct, dicom, disk
from fibldm.anatomy import hu_problem
from fibldm.cli import (
    add_workers_option,
    fraction,
    make_parser,
    positive,
    positive_float,
    run_script,
)
from fibldm.lungs import lung_mask
from fibldm.series import LeftOut, Options, Series, find_series, read_series
from fibldm.tables import format_csv, read_csv

INTERCEPT = -1024  # HU of a stored 0
COLUMNS = ("image", "contour", "patient_id", "label", "split", "position", "pixel_spacing")
REPORT = ("series", "what", "reason")  # columns
FOLDERS = ("series", "images", "contours")
MAX_HU = 32767
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
        "--patient_pattern", type=_pattern, metavar="REGEX",
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
    add_workers_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="make the data set anew")
    args = parser.parse_args(argv)
    args.output_dir = Path(os.path.abspath(args.output_dir))
    for name, suffix in (("key_file", ".key"), ("report", ".left_out.csv")):
        if getattr(args, name) is None:
            setattr(args, name, args.output_dir.with_name(args.output_dir.name + suffix))
        elif args.output_dir.resolve() in getattr(args, name).resolve().parents:
            parser.error(f"--{name} {getattr(args, name)}: identifies patients; keep it outside of "
                         f"--output_dir {args.output_dir}")  # fmt: skip
    return args


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
    error: str | None = None  # "": all its slices were left out


class CannotWrite(ValueError):
    """The output can't be written: no series after this one will fare better."""


# One series.


def prepare(
    series: Series, options: Options, settings: Settings, output: Path, name: str
) -> Prepared:
    """Write the slices of a series that have enough lung, and their contours, all or none."""
    result = Prepared()
    try:
        slices, images, given, values = [], [], [], []
        for item in read_series(series, options):
            result.found += 1
            if isinstance(item, LeftOut):
                result.left_out.append(item)
                continue
            if settings.pixel_spacing is not None and item.spacing is None:
                raise ValueError("its pixel spacing is unknown, and --spacing needs it")
            fit = (item.spacing or (1.0, 1.0), settings.pixel_spacing)
            hu = ct.fit_square(item.hu, settings.image_size, dicom.AIR, *fit)
            images.append(np.clip(np.round(hu), INTERCEPT, MAX_HU).astype(np.int16))
            given.append((item.mask, fit))
            step = max(1, len(item.hu) // 128)
            values.append(item.hu[::step, ::step])
            slices.append((item.where, item.source, item.height, _pixel(item, settings)))
        if not slices:
            result.error = "" if result.left_out else "no slices in it"
            return result
        volume = np.stack(images)
        alike = len({image.shape for image in values}) == 1
        sample = np.stack(values) if alike else np.concatenate([v.ravel() for v in values])
        problem = None if options.trust_hu else hu_problem(sample)
        if problem:
            raise ValueError(problem)
        masks = _contours(volume, given, series.kind)
        result.given = sum(mask is not None for mask, _ in given)
        rows, left_out = _choose(slices, masks, series, settings)
        result.left_out += left_out
    except (ValueError, OSError, MemoryError) as error:
        result.error = str(error) or type(error).__name__
        return result
    result.rows = _write(rows, volume, masks, settings, output, name)
    return result


def _contours(volume: np.ndarray, given: list[tuple], kind: str) -> list[np.ndarray]:
    """Filled lung masks of the slices (D, H, W): those given, fitted, or else found."""
    found = volume
    if any(mask is None for mask, _ in given):  # slices of a table need not be neighbours
        found = [lung_mask(image) for image in volume] if kind == "table" else lung_mask(volume)
    styles = Counter(ct.contour_style(mask[None]) for mask, _ in given if mask is not None)
    masks = []
    for (mask, fit), own in zip(given, found, strict=True):
        if mask is not None:
            if styles["outline"] > styles["filled"]:  # a small one alone does not tell
                mask = ct.fill_outline(mask[None])[0]
            own = ct.fit_square(mask, volume.shape[-1], 0, *fit) >= 0.5
        masks.append(own)
    return masks


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
        position = source.position
        if ordered:
            position = min(max((max(lungs) - heights[i]) / extent, 0.0), 1.0)
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
                disk.write_atomically(output / file, Image.fromarray(pixels).save)
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
        futures = {}
        with contextlib.suppress(BrokenProcessPool):
            for job in jobs:
                futures[pool.submit(prepare, job[0], options, settings, output, job[1])] = job
        try:
            for future in as_completed(futures):
                with contextlib.suppress(BrokenProcessPool):
                    result = future.result()
                    done.add(futures[future][1])
                    yield *futures[future], result
        except BaseException:  # Ctrl-C, a full disk: what waits is not begun
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
    try:
        with ProcessPoolExecutor(workers) as pool:
            return list(tqdm(pool.map(headers_of, paths, chunksize=64), **bar))
    except BrokenProcessPool:
        raise ValueError(
            "reading DICOM headers ended a process: out of memory, or a damaged file; "
            "--num_workers 1 reads them one by one"
        ) from None


# Who a patient is, and what the user says of them.


@dataclass(frozen=True)
class Pseudonyms:
    """Names for patients and series that only the holder of the key can trace back."""

    key: bytes

    def of(self, what: str, text: str, length: int = 12) -> str:
        digest = hmac.new(
            self.key, f"{what}:{text}".encode("utf-8", "surrogateescape"), hashlib.sha256
        ).hexdigest()
        return digest[:length]


def read_key(path: Path, needed: bool) -> bytes:
    """The key of a file; a new one where there is no file, unless a data set already needs it."""
    try:
        if path.exists():
            key = path.read_text(encoding="utf-8").strip()
            if len(key) < 32:
                raise ValueError(f"{len(key)} characters, expected at least 32")
            return key.encode()
        if needed:
            raise ValueError(
                "no such file, and the data set was made with one; give the key that it was made "
                "with, or --overwrite to make all anew under a new key"
            )
        key = secrets.token_hex(32)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_secret(path, key + "\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"--key_file {path}: {error}") from error
    return key.encode()


def write_secret(path: Path, text: str) -> None:
    """Write what only its owner may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def read_labels(path: Path) -> dict[str, str]:
    """The label of each patient; ValueError where a patient has two."""
    table = read_csv(path)
    if table.empty or table.shape[1] < 2:
        raise ValueError(f"{path}: expected a header and two columns, patient_id and label")
    table.columns = [name.lower() for name in table.columns]
    named = {"patient_id", "label"} <= set(table.columns)
    pairs = table[["patient_id", "label"]] if named else table.iloc[:, :2]
    labels: dict[str, str] = {}
    for patient, label in pairs.itertuples(index=False):
        if labels.setdefault(patient, label) != label:
            raise ValueError(
                f"{path}: patient {patient} is {labels[patient]} and {label}, expected one label a "
                "patient"
            )
    return labels


# The output.


def open_output(args: argparse.Namespace, settings: Settings) -> Pseudonyms:
    """Check the folder against its dataset.json, or make it; return its pseudonyms."""
    output, facts_file = args.output_dir, args.output_dir / "dataset.json"
    for top in args.inputs:
        if top.resolve().is_relative_to(output.resolve()):
            raise ValueError(f"{top}: lies within --output_dir {output}, expected another folder")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {output}: expected a folder, found a file")
    before = None
    if facts_file.is_file():
        before = read_json(facts_file)
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
    for folder in FOLDERS:
        (output / folder).mkdir(exist_ok=True)
        for torn in (output / folder).glob(f"{disk.TEMPORARY}*"):  # of a run that was killed
            torn.unlink()
    if args.overwrite:
        for path in (output / "label.csv", output / "labels.json", *records_of(output)):
            path.unlink(missing_ok=True)
    return names


@contextlib.contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Hold the output's lock: two runs at once would sweep up each other's files."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise CannotWrite(f"{output}: cannot be written: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output_dir {output}: another run is writing to it") from None
        yield
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it, and run again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged, expected a JSON object; remove it, and run again")
    return content


def write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))
    except OSError as error:
        raise CannotWrite(f"{path}: cannot be written: {error.strerror or error}") from error


def records_of(output: Path) -> list[Path]:
    """A record for each series: its lines of label.csv, and what they follow from, hashed."""
    return sorted((output / "series").glob("*.json"))


def write_table(output: Path, labels: dict[str, str]) -> list[dict]:
    """Write label.csv from the records of all series; `labels`, by pseudonym, win; sweep up."""
    state_file, table = output / "labels.json", output / "label.csv"
    state = read_json(state_file) if state_file.is_file() else {"labels": {}, "label_csv": []}
    state["labels"] |= labels
    rows = [row for path in records_of(output) for row in read_json(path)["rows"]]
    for row in rows:
        row["label"] = state["labels"].get(row["patient_id"], row["label"])
    rows.sort(key=lambda row: row["image"])
    text = format_csv(rows, COLUMNS)
    now = hashlib.sha256(table.read_bytes()).hexdigest() if table.is_file() else None
    if now and now not in state["label_csv"]:
        edited = table.with_name("label.edited.csv")
        table.replace(edited)
        print(f"note: label.csv was edited since the last run, and is made anew; see {edited}")
    new = hashlib.sha256(text.encode()).hexdigest()
    for known in ([now, new], [new]):  # a kill between the two leaves no doubt whose table it is
        state["label_csv"] = [one for one in known if one]
        write_text(state_file, json.dumps(state, indent=2) + "\n")
        write_text(table, text)

    # What no row names any more: of series that changed, and of runs that were killed.
    named = {row[column] for row in rows for column in ("image", "contour")}
    for folder in ("images", "contours"):
        for path in (output / folder).glob(NAME):
            if f"{folder}/{path.name}" not in named:
                path.unlink()
    return rows


# What is told.


def read_report(path: Path, series: set[str]) -> list[tuple[str, LeftOut]]:
    """What an earlier run left out of these series, which this one does not look at again."""
    table = read_csv(path) if path.is_file() else None
    if table is None or tuple(table.columns) != REPORT:
        return []
    lines = table.itertuples(index=False)
    return [(name, LeftOut(where, reason)) for name, where, reason in lines if name in series]


def write_report(path: Path, left_out: list[tuple[str, LeftOut]]) -> None:
    rows = [dict(zip(REPORT, (name, *astuple(item)), strict=True)) for name, item in left_out]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_secret(path, printable(format_csv(rows, REPORT)))
    except OSError as error:
        raise CannotWrite(f"--report {path}: cannot be written: {error.strerror}") from error


def printable(text: str) -> str:
    """Text with names of files that are not in UTF-8 made legible."""
    return text.encode("utf-8", "replace").decode()


def main(args: argparse.Namespace) -> None:
    try:
        prepare_data(args)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on")
        sys.exit(130)


def prepare_data(args: argparse.Namespace) -> None:
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
    series, of_files = find_series(
        args.inputs, args.output_dir, options, lambda paths: read_headers(paths, args.num_workers)
    )
    if not series:
        tops = ", ".join(map(str, args.inputs))
        raise ValueError(printable(f"{tops}: no CT found\n{summary(of_files)}"))
    left_out = [("", item) for item in of_files]
    with only_run(args.output_dir):
        names = open_output(args, settings)
        rows, lines, notes = prepare_new(args, series, options, settings, names, given, left_out)
    print("\n".join(printable(line) for line in lines))
    print(printable(summary([item for _, item in left_out])))
    notes += remarks(args, series, given, rows)
    for note in notes[:SHOWN] + ([f"... and {len(notes) - SHOWN} more"] if notes[SHOWN:] else []):
        print(printable(f"note: {note}"))
    print(f"secret, keep them outside of what you share: {args.key_file}, {args.report}")
    if not rows:
        raise ValueError(f"{args.output_dir}: no slice is usable; the reasons stand above")


def prepare_new(
    args: argparse.Namespace,
    series: list[Series],
    options: Options,
    settings: Settings,
    names: Pseudonyms,
    given: dict[str, str],
    left_out: list[tuple[str, LeftOut]],
) -> tuple[list[dict], list[str], list[str]]:
    """Prepare what is new; return label.csv's rows, a summary's lines, and notes.

    Adds to `left_out`. A series takes the place of what was made of the same files before,
    wherever they lay and whosever they were thought to be.
    """
    output = args.output_dir
    records = {path.stem: read_json(path) for path in records_of(output)}
    holders: dict[str, set[str]] = defaultdict(set)  # content -> records that have it
    for name, record in records.items():
        for content in record["contents"]:
            holders[content].add(name)
    jobs, facts, unchanged, notes = [], {}, set(), []
    for one in series:
        place = names.of("place", f"{one.kind} {one.patient} {one.place}", 16)
        name = f"{names.of('patient', one.patient)}_{place}"
        contents = [names.of("content", content, 16) for content in one.contents]
        fingerprint = names.of("fingerprint", f"{options} {settings} {one.fingerprint}")
        others = set().union(*(holders[content] for content in contents)) - {name}
        facts[name] = fingerprint, contents, others
        record = records.get(name)
        gone = set(record["contents"]) - set(contents) if record else set()
        if gone:
            notes.append(
                f"{one.name}: {len(gone)} of the files that an earlier run found are gone or "
                "changed; what was made of them is replaced"
            )
        files = [output / row[c] for row in (record or {"rows": []})["rows"] for c in COLUMNS[:2]]
        if record and record["fingerprint"] == fingerprint and all(p.is_file() for p in files):
            unchanged.add(name)
            for other in others:
                (output / "series" / f"{other}.json").unlink(missing_ok=True)
        else:
            jobs.append((one, f"{name}_{fingerprint[:6]}"))
            notes += one.notes
    left_out += read_report(args.report, unchanged)
    write_report(args.report, left_out)  # not writable: said before hours are spent

    # Make them.
    table: dict[str, Counter] = defaultdict(Counter)
    labels = {names.of("patient", patient): label for patient, label in given.items()}
    done = 0
    try:
        with tqdm(total=len(jobs), desc="preparing", unit="series", disable=None) as bar:
            for one, name, result in prepare_all(jobs, options, settings, output, args.num_workers):
                name = name.rpartition("_")[0]
                keep(output, name, facts[name], result)
                left_out += [(name, item) for item in result.left_out]
                if result.error:
                    kept = "; its earlier slices are kept" if name in records else ""
                    left_out.append(("", LeftOut(one.name, f"{result.error}{kept}")))
                counts = {"series": 1, "found": result.found, "used": len(result.rows)}
                table[one.kind].update({**counts, "masks": result.given})
                done += 1
                bar.update()
        rows = write_table(output, labels)
        write_report(args.report, left_out)
    except CannotWrite as error:
        raise ValueError(
            f"{error}; {done} of {len(jobs)} series are done and kept: make room, and run the same "
            "command again"
        ) from error
    except KeyboardInterrupt:
        write_table(output, labels)
        print(f"\n{done} of {len(jobs)} series are done")
        raise

    patients = {row["patient_id"] for row in rows}
    columns = ("series", "found", "used", "masks")
    lines = [
        f"{output / 'label.csv'}: {len(rows)} slices of {len(patients)} patients; "
        f"{len(jobs)} series new or changed, {len(unchanged)} unchanged",
        "",
        "{:10}{:>8}{:>8}{:>8}{:>10}{:>8}".format("slices of", *columns[:3], "left out", "masks"),
    ]
    for kind, counts in sorted(table.items()):
        number, found, used, masks = (counts[name] for name in columns)
        lines.append(f"{kind:10}{number:8}{found:8}{used:8}{found - used:10}{masks:8}")
    return rows, lines, notes


def keep(output: Path, name: str, facts: tuple, result: Prepared) -> None:
    """Record a series, so that it is not made again; an error leaves an earlier record."""
    fingerprint, contents, others = facts
    if result.error is not None:
        return
    patient = name.partition("_")[0]
    rows = [{**row, "patient_id": patient} for row in result.rows]
    record = {"fingerprint": fingerprint, "contents": contents, "rows": rows}
    write_text(output / "series" / f"{name}.json", json.dumps(record) + "\n")
    for other in others:
        (output / "series" / f"{other}.json").unlink(missing_ok=True)


def summary(left_out: list[LeftOut]) -> str:
    """What was left out, by reason, with the first files."""
    if not left_out:
        return "\nnothing was left out"
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
    return "\n".join(lines)


def remarks(
    args: argparse.Namespace, series: list[Series], labels: dict[str, str], rows: list[dict]
) -> list[str]:
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
    if folders and args.patient_pattern is None:
        notes.append(
            "single slices of a folder are taken as one patient's, in the order of their names "
            f"from head to feet: {', '.join(folders[:SHOWN])}; otherwise give --patient_pattern"
        )
    volumes = [one for one in series if one.kind == "volume"]
    bare = [one for one in volumes if not one.name.lower().endswith((".nii", ".nii.gz"))]
    if bare and args.array_axes is None:
        notes.append(
            f"{len(bare)} volumes carry no orientation, as {bare[0].name}: their axes are taken as "
            "slices, rows, columns (or rows, columns, slices), from the head and upright; if that "
            "is wrong give --array_axes (arrays of nibabel's are often XYZ)"
        )
    if any(one.kind == "table" for one in series):
        notes.append("labels and splits of tables are copied as they are: no names may be in them")
    if volumes and args.patient_pattern is None:
        notes.append(
            "each volume file is taken as a patient of its own, named as the file, or as its "
            "folder where several have that name; if a patient has several, give "
            "--patient_pattern: else they may land on both sides of the split"
        )
    return notes


if __name__ == "__main__":
    run_script(main, parse_args)
