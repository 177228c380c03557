"""What was prepared before: a record of each series, hashed; what of the inputs is new to it."""

import hashlib
import hmac
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fibldm import disk
from fibldm.series import Series
from fibldm.tables import same_name


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


def plan(
    series: list[Series], output: Path, settings: str, names: Pseudonyms
) -> tuple[dict[str, Job], set[str], list[str]]:
    """What is to be made, by what its files' names start with; the records of what is not; notes.

    A series takes the place of what was made before of exactly its files, wherever they lay and
    whosever they were thought to be, or of some of them and the same patient. It is said.
    """
    records = {path.stem: read_json(path) for path in record_files(output)}
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
                write_record(output, name, {**record, **facts})
            remove_records(output, others)
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
        remove_records(output, left)
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


def write_record(output: Path, name: str, record: dict) -> None:
    disk.replace_text(output / "series" / f"{name}.json", json.dumps(record) + "\n")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it, and run again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged, expected a JSON object; remove it, and run again")
    return content


def record_files(output: Path) -> list[Path]:
    """A record for each series: its lines of label.csv, and what they follow from, hashed."""
    return sorted((output / "series").glob("*.json"))


def remove_records(output: Path, names: Iterable[str]) -> None:
    for name in names:
        (output / "series" / f"{name}.json").unlink(missing_ok=True)
