"""Make a data set (label.csv, slices in HU, contours) of scans in any format.

Patients appear as keyed hashes only. A second run prepares only what is new or has changed.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from tqdm import tqdm

from fibldm import disk, headers, volumes
from fibldm.files import LeftOut
from fibldm.patients import unify
from fibldm.records import (
    Job,
    Pseudonyms,
    plan,
    read_json,
    record_files,
    remove_records,
    write_record,
)
from fibldm.series import Options, Series, find_series
from fibldm.slices import INTERCEPT, Prepared, Settings, prepare_all
from fibldm.tables import format_csv, list_some, read_csv, same_name

COLUMNS = ("image", "contour", "patient_id", "label", "split", "position", "pixel_spacing")
REPORT = ("series", "what", "reason")  # columns of the table of all that is left out
FOLDERS = ("series", "images", "contours")
NAME = "[0-9a-f]" * 12 + "_*.png"  # of the images and contours that are written here
SHOWN = 8  # names in a note
DEFAULT_SETTINGS, DEFAULT_OPTIONS = Settings(), Options()


@dataclass
class Preparation:
    """What `prepare` did.

    rows: the lines of label.csv. prepared: what became of series that are new or changed, by kind.
    unchanged: how many were made before. left_out: files, slices and series that are not used.
    notes: what the user should know. left_out and notes name files, and so patients.
    """

    rows: list[dict[str, str]]
    prepared: dict[str, list[Prepared]]
    unchanged: int
    left_out: list[LeftOut]
    notes: list[str]
    key_file: Path
    report: Path


def prepare(
    inputs: Sequence[Path],
    output: Path,
    settings: Settings = DEFAULT_SETTINGS,
    options: Options = DEFAULT_OPTIONS,
    labels: Mapping[str, str] | None = None,
    key_file: Path | None = None,
    report: Path | None = None,
    overwrite: bool = False,
    workers: int = 1,
) -> Preparation:
    """Make, or add to, the data set in the folder `output` from all chest CT below `inputs`.

    labels: {patient as named in the inputs: label}. key_file: the secret that patients are hashed
    with; it is made if it is absent. report: the table of all that is left out. Both identify
    people; by default they lie beside `output`. workers: processes. Raises ValueError if there is
    no CT, or if the folder holds something else, was made with other settings or by another key,
    or cannot be written. What was done until then is kept.
    """
    output, labels = Path(os.path.abspath(output)), labels or {}
    key_file = key_file or output.with_name(f"{output.name}.key")
    report = report or output.with_name(f"{output.name}.left_out.csv")
    _require_apart(inputs, output, key_file, report)
    series, of_files = find_series(inputs, output, options, workers)
    if not series:
        tops = ", ".join(map(str, inputs))
        reasons = list_some([f"{item.where}: {item.reason}" for item in of_files])
        raise ValueError(f"{tops}: no CT found; {len(of_files)} files are left out:{reasons}")

    series, aliases, of_names = unify(series, options.patient_pattern is not None)
    labels = _named(labels, aliases)
    found = sorted({one.patient for one in series})
    if labels and not labels.keys() & set(found) and not record_files(output):
        raise ValueError(
            f"--labels: none of its {len(labels)} patients ({', '.join(list(labels)[:SHOWN])}) is "
            f"in the inputs, whose patients are named {', '.join(found[:SHOWN])}"
        )
    with disk.locked(output):
        names = _open_output(output, settings, key_file, overwrite)
        jobs, unchanged, notes = plan(series, output, f"{options} {settings}", names)
        left_out = [("", item) for item in of_files] + _read_report(report, unchanged)
        _write_report(report, left_out)  # not writable: said before hours are spent
        of_patients = {names.of("patient", patient): label for patient, label in labels.items()}
        work = prepare_all(
            {name: job.series for name, job in jobs.items()}, options, settings, output, workers
        )
        with contextlib.closing(work):  # no process goes on after an error
            prepared, rows, of_table = _keep_all(work, jobs, output, of_patients, left_out)
        _write_report(report, left_out)
    made = [note for group in prepared.values() for result in group for note in result.notes]
    notes = of_table + of_names + made + notes + _remarks(series, labels, rows, options)
    unused = [item for _, item in left_out]
    return Preparation(rows, prepared, len(unchanged), unused, notes, key_file, report)


def _named(labels: Mapping[str, str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Labels by the names that patients have here; ValueError where two names of one disagree."""
    named: dict[str, str] = {}
    of_spelling = {same_name(alias): name for alias, name in aliases.items()}
    for patient, label in labels.items():
        name = aliases.get(patient) or of_spelling.get(same_name(patient), patient)
        if named.setdefault(name, label) != label:
            raise ValueError(
                f"--labels: {patient} is {label}, but the same patient is {named[name]}"
            )
    return named


def _require_apart(inputs: Sequence[Path], output: Path, key_file: Path, report: Path) -> None:
    """ValueError where an input, or what identifies patients, lies in the output."""
    for option, path in ("--key_file", key_file), ("--report", report):
        if path.resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"{option} {path}: identifies patients; keep it outside of --output_dir {output}"
            )
    for top in inputs:
        if top.resolve().is_relative_to(output.resolve()):
            raise ValueError(f"{top}: lies within --output_dir {output}, expected another folder")


def _read_key(path: Path, needed: bool) -> bytes:
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
        disk.write_secret(path, key + "\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"--key_file {path}: {error}") from error
    return key.encode()


# The output.


def _open_output(output: Path, settings: Settings, key_file: Path, overwrite: bool) -> Pseudonyms:
    """Check the folder against its dataset.json, or make it; return its pseudonyms."""
    info_file, before = output / "dataset.json", None
    if info_file.is_file():
        before = read_json(info_file)
        if "key_check" not in before:
            raise ValueError(
                f"--output_dir {output}: holds a data set of another origin; give another folder"
            )
    elif any(output.iterdir()):
        raise ValueError(f"--output_dir {output}: not empty, and no data set; give another folder")
    if overwrite or not record_files(output):
        before = None
    names = Pseudonyms(_read_key(key_file, needed=before is not None))
    info = {"rescale_slope": 1.0, "rescale_intercept": float(INTERCEPT), **asdict(settings)}
    info["key_check"] = names.of("key", "")
    for name, value in info.items() if before is not None else ():
        if before.get(name) != value:
            raise ValueError(
                f"--output_dir {output}: its {name} is {before.get(name)}, asked for is {value}; "
                "give the same, another folder, or --overwrite to make all anew"
            )
    disk.replace_text(info_file, json.dumps(info, indent=2) + "\n")
    for folder in FOLDERS:
        (output / folder).mkdir(exist_ok=True)
        for torn in (output / folder).glob(f"{disk.TEMPORARY}*"):  # of a run that was killed
            torn.unlink()
    if overwrite:
        for path in (output / "label.csv", output / "labels.json", *record_files(output)):
            path.unlink(missing_ok=True)
    return names


def _keep_all(
    work: Iterable[tuple[str, Prepared]],
    jobs: dict[str, Job],
    output: Path,
    labels: dict[str, str],
    left_out: list[tuple[str, LeftOut]],
) -> tuple[dict[str, list[Prepared]], list[dict[str, str]], list[str]]:
    """Record series as they are done, then write label.csv; also where the user interrupts it.

    Adds to `left_out`; returns what was prepared by kind, the rows of label.csv, and notes.
    """
    prepared: dict[str, list[Prepared]] = defaultdict(list)
    done = 0
    try:
        for name, result in tqdm(work, "preparing", len(jobs), unit="series", disable=None):
            left_out += _keep(output, jobs[name], result)
            prepared[jobs[name].series.kind].append(result)
            done += 1
        rows, notes = _write_table(output, labels)
    except OSError as error:
        raise ValueError(
            f"{error.filename or output}: cannot be written: {error.strerror or error}; {done} of "
            f"{len(jobs)} series are done and kept: make room, and run the same command again"
        ) from error
    except KeyboardInterrupt:
        _, notes = _write_table(output, labels)
        count = f"{done} of {len(jobs)} series are done"
        raise KeyboardInterrupt("; ".join([count, *notes])) from None
    return dict(prepared), rows, notes


def _keep(output: Path, job: Job, result: Prepared) -> list[tuple[str, LeftOut]]:
    """Record a series, so that it is not made again; return what is left out of it.

    After an error an earlier record stays as it is.
    """
    left_out = [(job.name, item) for item in result.left_out]
    file = output / "series" / f"{job.name}.json"
    if result.error is None:
        rows = [{**row, "patient_id": job.name.partition("_")[0]} for row in result.rows]
        record = {"fingerprint": job.fingerprint, "rows": rows, **job.facts}
        write_record(output, job.name, record)
        remove_records(output, job.replaced)
    elif result.error:
        kept = "; its earlier slices are kept" if file.is_file() else ""
        left_out.append(("", LeftOut(job.series.name, f"{result.error}{kept}")))
    return left_out


def _write_table(output: Path, labels: dict[str, str]) -> tuple[list[dict[str, str]], list[str]]:
    """Write label.csv from the records of all series; `labels`, by pseudonym, win; sweep up.

    Returns its rows, and notes.
    """
    state_file, table, notes = output / "labels.json", output / "label.csv", []
    state = read_json(state_file) if state_file.is_file() else {"labels": {}, "label_csv": []}
    state["labels"] |= labels
    rows = [row for path in record_files(output) for row in read_json(path)["rows"]]
    for row in rows:
        row["label"] = state["labels"].get(row["patient_id"], row["label"])
    rows.sort(key=lambda row: row["image"])
    text = format_csv(rows, COLUMNS)
    now = disk.file_hash(table) if table.is_file() else None
    if now and now not in state["label_csv"]:
        edited = table.with_name("label.edited.csv")
        table.replace(edited)
        notes = [f"label.csv was edited since the last run, and is made anew; see {edited}"]
    new = hashlib.sha256(text.encode()).hexdigest()
    for known in ([now, new], [new]):  # a kill between the two leaves no doubt whose table it is
        state["label_csv"] = [one for one in known if one]
        disk.replace_text(state_file, json.dumps(state, indent=2) + "\n")
        disk.replace_text(table, text)

    # What no row names any more: of series that changed, and of runs that were killed.
    named = {row[column] for row in rows for column in ("image", "contour")}
    for folder in ("images", "contours"):
        for path in (output / folder).glob(NAME):
            if f"{folder}/{path.name}" not in named:
                path.unlink()
    return rows, notes


# What is told.


def _read_report(path: Path, series: set[str]) -> list[tuple[str, LeftOut]]:
    """What an earlier run left out of these series, which this one does not look at again."""
    table = read_csv(path) if path.is_file() else None
    if table is None or tuple(table.columns) != REPORT:
        return []
    lines = table.itertuples(index=False)
    return [(name, LeftOut(where, reason)) for name, where, reason in lines if name in series]


def _write_report(path: Path, left_out: list[tuple[str, LeftOut]]) -> None:
    rows = [dict(zip(REPORT, (name, *astuple(item)), strict=True)) for name, item in left_out]
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_secret(path, format_csv(rows, REPORT).encode("utf-8", "replace").decode())


def _remarks(
    series: list[Series], labels: Mapping[str, str], rows: list[dict[str, str]], options: Options
) -> list[str]:
    """What the user should know of how patients and labels were taken."""
    notes = []
    unknown = sorted(set(labels) - {one.patient for one in series})
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
    if folders and options.patient_pattern is None:
        notes.append(
            "single slices of a folder are taken as one patient's, in the order of their names "
            f"from head to feet: {', '.join(folders[:SHOWN])}; otherwise give --patient_pattern"
        )
    pictures = [source.path for one in series for source in one.sources if source.rescale is None]
    pictures = [path for path in pictures if volumes.kind_of(path) in ("png", "tiff")]
    if pictures:
        low, high = options.window
        notes.append(
            f"{len(pictures)} pictures come without a scale, as {pictures[0]}: those of 8 bits are "
            f"taken as {low:g} to {high:g} HU; if that is wrong give --window or --rescale"
        )
    notes += headers.remarks([s.header for one in series for s in one.sources if s.header])
    deep = [one.name for one in series if one.kind == "volume"]
    plain = [name for name in deep if not name.lower().endswith((".nii", ".nii.gz"))]
    if plain and options.array_axes is None:
        notes.append(
            f"{len(plain)} volumes carry no orientation, as {plain[0]}: their axes are taken as "
            "slices, rows, columns (or rows, columns, slices), from the head and upright; if that "
            "is wrong give --array_axes (arrays of nibabel's are often XYZ)"
        )
    if any(one.kind == "table" for one in series):
        notes.append("labels and splits of tables are copied as they are: no names may be in them")
    if deep and options.patient_pattern is None:
        notes.append(
            "each volume file is taken as a patient of its own, named as the file, or as its "
            "folder where several have that name; if a patient has several, give "
            "--patient_pattern: else they may land on both sides of the split"
        )
    return notes
