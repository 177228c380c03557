"""Make a data set (label.csv, slices in HU, contours) of scans in any format.

Patients appear as keyed hashes only. A second run prepares only what is new or has changed.
"""

import contextlib
import hashlib
import hmac
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
    if labels and not labels.keys() & set(found) and not _records(output):
        raise ValueError(
            f"--labels: none of its {len(labels)} patients ({', '.join(list(labels)[:SHOWN])}) is "
            f"in the inputs, whose patients are named {', '.join(found[:SHOWN])}"
        )
    with disk.locked(output):
        names = _open_output(output, settings, key_file, overwrite)
        jobs, unchanged, notes = _plan(series, output, f"{options} {settings}", names)
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


# What is new, and who is who.


@dataclass(frozen=True)
class Pseudonyms:
    """Names for patients and series that only the holder of the key can trace back."""

    key: bytes

    def of(self, what: str, text: str, length: int = 12) -> str:
        message = f"{what}:{text}".encode("utf-8", "surrogateescape")
        return hmac.new(self.key, message, hashlib.sha256).hexdigest()[:length]


@dataclass(frozen=True)
class Job:
    """A series to be made, the name of its record, and what the record will hold.

    fingerprint: a hash of all that its slices follow from. facts: what else its record keeps,
    hashed: contents of its files, its patient's name in any spelling, its study or its table.
    replaced: records of the same files under other names.
    """

    series: Series
    name: str
    fingerprint: str
    facts: dict[str, list[str] | str]
    replaced: set[str]


def _plan(
    series: list[Series], output: Path, settings: str, names: Pseudonyms
) -> tuple[dict[str, Job], set[str], list[str]]:
    """What is to be made, by what its files' names start with; the records of what is not; notes.

    A series takes the place of what was made before of exactly its files, wherever they lay and
    whosever they were thought to be, or of some of them and the same patient. It is said.
    """
    records = {path.stem: _read_json(path) for path in _records(output)}
    own = {}
    for one in series:
        place = names.of("place", f"{one.kind} {one.patient} {one.place}", 16)
        own[f"{names.of('patient', one.patient)}_{place}"] = one
    assert len(own) == len(series)
    notes = _of_earlier_runs(records, own, output, names)
    holders: dict[str, set[str]] = defaultdict(set)  # content -> records that have it
    for name, record in records.items():
        for content in record["contents"]:
            holders[content].add(name)
    jobs, unchanged = {}, set()
    for name, one in own.items():
        contents = [names.of("content", content, 16) for content in one.contents]
        facts = {"contents": contents, **_marks(one, names)}
        fingerprint = names.of("fingerprint", f"{settings} {one.fingerprint}")
        sharing = set().union(*(holders[content] for content in contents)) - own.keys()
        others = {n for n in sharing if _is_same(n, records[n], name, contents, one.kind)}
        notes += _shared(one.name, sorted(others), sorted(sharing - others))
        record = records.get(name, {"fingerprint": None, "contents": [], "rows": []})
        gone = set(record["contents"]) - set(contents)
        if gone and record["fingerprint"] != fingerprint:
            notes.append(
                f"{one.name}: {len(gone)} of the files that an earlier run found are gone or "
                "changed; what was made of them is replaced"
            )
        files = [output / row[column] for row in record["rows"] for column in ("image", "contour")]
        if record["fingerprint"] == fingerprint and all(file.is_file() for file in files):
            unchanged.add(name)
            if {**record, **facts} != record:  # as earlier versions identified files
                _write_record(output, name, {**record, **facts})
            _remove_records(output, others)
        else:
            jobs[f"{name}_{fingerprint[:6]}"] = Job(one, name, fingerprint, facts, others)
            notes += one.notes
    return jobs, unchanged, notes


def _marks(one: Series, names: Pseudonyms) -> dict[str, str]:
    """What tells in a later run that a series is of this person, study or table."""
    marks = {"person": names.of("person", same_name(one.patient), 16)}
    if one.study:
        marks["study"] = names.of("study", one.study, 16)
    if one.kind == "table":
        marks["table"] = names.of("table", one.place, 16)
    return marks


def _of_earlier_runs(
    records: dict[str, dict], own: dict[str, Series], output: Path, names: Pseudonyms
) -> list[str]:
    """Notes on records that no input makes now; those of tables that are given again go."""
    notes = []
    marks = {name: _marks(one, names) for name, one in own.items()}
    tables = {mark["table"]: own[name].place for name, mark in marks.items() if "table" in mark}
    others = {name: record for name, record in records.items() if name not in own}
    gone = {name: r["table"] for name, r in others.items() if r.get("table") in tables}
    for table in sorted(set(gone.values())):
        left = sorted(name for name in gone if gone[name] == table)
        notes.append(
            f"{tables[table]}: {len(left)} patients of an earlier run are in no line any more, and "
            f"their slices are removed: {', '.join(name.partition('_')[0] for name in left)}"
        )
        _remove_records(output, left)
        for name in left:
            del records[name], others[name]
    for what in "study", "person":
        before = {r[what]: name for name, r in others.items() if r.get(what)}
        for name, mark in marks.items():
            other = before.get(mark.get(what))
            if other and other.partition("_")[0] != name.partition("_")[0]:
                notes.append(
                    f"{own[name].name}: an earlier run has the same {what} as another patient "
                    f"({other.partition('_')[0]}); give all folders at once, with --overwrite"
                )
    if others:
        notes.append(
            f"{len(others)} series of earlier runs are in none of these inputs; their slices stay"
        )
    return notes


def _is_same(other: str, record: dict, name: str, contents: list[str], kind: str) -> bool:
    """Whether a series `name` of these contents is what the record `other` was made of.

    DICOM's UIDs alone do not tell: some software gives the same ones to several patients.
    """
    before, now = set(record["contents"]), set(contents)
    of_patient = other.partition("_")[0] == name.partition("_")[0]
    return (before == now and kind != "dicom") or (of_patient and before <= now)


def _shared(where: str, replaced: list[str], kept: list[str]) -> list[str]:
    """Notes on what was made before of files that a series has, too."""
    notes = []
    if replaced:
        notes.append(
            f"{where}: the same files were prepared before under another name or place; "
            f"{', '.join(replaced)} is replaced"
        )
    if kept:
        notes.append(
            f"{where}: some of its files were prepared before as a part of {', '.join(kept)}, and "
            "both are kept; if they are of one patient, give --patient_pattern and --overwrite"
        )
    return notes


def _write_record(output: Path, name: str, record: dict) -> None:
    disk.replace_text(output / "series" / f"{name}.json", json.dumps(record) + "\n")


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
        before = _read_json(info_file)
        if "key_check" not in before:
            raise ValueError(
                f"--output_dir {output}: holds a data set of another origin; give another folder"
            )
    elif any(output.iterdir()):
        raise ValueError(f"--output_dir {output}: not empty, and no data set; give another folder")
    if overwrite or not _records(output):
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
        for path in (output / "label.csv", output / "labels.json", *_records(output)):
            path.unlink(missing_ok=True)
    return names


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it, and run again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged, expected a JSON object; remove it, and run again")
    return content


def _records(output: Path) -> list[Path]:
    """A record for each series: its lines of label.csv, and what they follow from, hashed."""
    return sorted((output / "series").glob("*.json"))


def _remove_records(output: Path, names: Iterable[str]) -> None:
    for name in names:
        (output / "series" / f"{name}.json").unlink(missing_ok=True)


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
        _write_record(output, job.name, record)
        _remove_records(output, job.replaced)
    elif result.error:
        kept = "; its earlier slices are kept" if file.is_file() else ""
        left_out.append(("", LeftOut(job.series.name, f"{result.error}{kept}")))
    return left_out


def _write_table(output: Path, labels: dict[str, str]) -> tuple[list[dict[str, str]], list[str]]:
    """Write label.csv from the records of all series; `labels`, by pseudonym, win; sweep up.

    Returns its rows, and notes.
    """
    state_file, table, notes = output / "labels.json", output / "label.csv", []
    state = _read_json(state_file) if state_file.is_file() else {"labels": {}, "label_csv": []}
    state["labels"] |= labels
    rows = [row for path in _records(output) for row in _read_json(path)["rows"]]
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
