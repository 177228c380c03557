"""Who is a patient: names that mean one person, and names that several people may share.

In doubt series are one patient's, so that nobody lands on both sides of the split; a note tells it.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from fibldm.series import Series
from fibldm.tables import Row, check_patients, same_name

PLACEHOLDERS = frozenset(  # what programs write for a patient's ID
    [
        *("anon", "anonym", "anonymous", "anonymized", "anonymised", "deidentified", "removed"),
        *("de", "identified", "redacted", "nan", "nn", "patientid", "unbekannt"),
        *("default", "dummy", "id", "na", "name", "no", "none", "null", "patient", "test"),
        *("undefined", "unknown"),
    ]
)
BLANK = frozenset("0x?*.-_ ")
SHOWN = 4  # of a list in a note
PATTERN = "give --patient_pattern"


def is_placeholder(name: str) -> bool:
    """Whether an ID stands for nobody, as ANONYMOUS and 0000 do."""
    parts = name.translate(str.maketrans("^_-", "   ", "/")).casefold().split()
    return BLANK.issuperset(name.casefold()) or PLACEHOLDERS.issuperset(parts)


def unify(series: list[Series], patterned: bool) -> tuple[list[Series], dict[str, str], list[str]]:
    """The series, with one name for each patient; {name found: that name}; notes.

    Names that differ in case and spaces alone are one, and so is all that is in one DICOM study.
    There an absent name, or a placeholder, gives way to another. `patterned`: names follow from
    paths as the user says, and stay. Raises ValueError where a patient is in two splits.
    """
    united, aliases, notes = series, {one.patient: one.patient for one in series}, []
    if not patterned:
        names = _names(series)
        pairs = [(same_name(name), one.study) for one, name in zip(series, names, strict=True)]
        groups = _connected(pairs)
        spellings = defaultdict(set)
        for (key, _), name in zip(pairs, names, strict=True):
            spellings[groups[key]].add(name)
        chosen = [min(spellings[groups[key]]) for key, _ in pairs]
        found = defaultdict(set)
        for one, name in zip(series, chosen, strict=True):
            found[name].add(one.patient)
        for one, name in zip(series, chosen, strict=True):
            if aliases.get(one.patient) == one.patient:  # a placeholder of several keeps its name
                aliases[one.patient] = one.patient if one.patient in found else name
        united = [replace(one, patient=new) for one, new in zip(series, chosen, strict=True)]
        notes = [_of_names(found[name]) for name in sorted(found) if len(found[name]) > 1]
        notes += _doubts(united)
    united = _merged(united)
    rows = [Row("", "", one.patient, "", s.split) for one in united for s in one.sources]
    torn = check_patients("the inputs", [row for row in rows if row.split])
    if torn:
        raise ValueError(torn[0].message)
    return united, aliases, notes


def _merged(series: list[Series]) -> list[Series]:
    """Series of one patient and one place as one: rows of a table, files of a folder."""
    groups = defaultdict(list)
    for one in series:
        groups[one.kind, one.patient, one.place].append(one)
    return [
        group[0]
        if len(group) == 1
        else replace(
            group[0],
            sources=[source for one in group for source in one.sources],
            contents=[content for one in group for content in one.contents],
            fingerprint=" ".join(one.fingerprint for one in group),
            notes=[note for one in group for note in one.notes],
        )
        for group in groups.values()
    ]


def _names(series: list[Series]) -> list[str]:
    """What each patient is called: where that is no name, as others of its study are."""
    of_study = defaultdict(set)
    for one in series:
        if one.study and not one.nameless and not is_placeholder(one.patient):
            of_study[one.study].add(one.patient)
    return [
        min(of_study[one.study])
        if of_study[one.study] and (one.nameless or is_placeholder(one.patient))
        else one.patient
        for one in series
    ]


def _connected(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """{name: one name of all that are connected by a study}."""
    groups: dict[str, set[str]] = {}
    first: dict[str, str] = {}  # of a study
    for name, study in pairs:
        group = groups.setdefault(name, {name})
        other = groups[first.setdefault(study, name) if study else name]
        if group is not other:
            other |= group
            groups |= dict.fromkeys(group, other)
    return {name: min(group) for name, group in groups.items()}


def _some(items: Iterable[str]) -> str:
    items = sorted(items)
    return ", ".join(items[:SHOWN]) + f" and {len(items) - SHOWN} more" * (len(items) > SHOWN)


def _of_names(names: set[str]) -> str:
    return (
        f"one patient for {len(names)} names, which differ in case or spaces alone or are in one "
        f"DICOM study: {_some(map(repr, names))}; if they are several patients, {PATTERN}"
    )


def _doubts(series: list[Series]) -> list[str]:
    """Notes on names that may be of several people, and on people who may have several names."""
    notes = []
    groups = defaultdict(list)
    for one in series:
        groups[one.patient].append(one)
    for name, group in groups.items():
        studies = {one.study for one in group if one.study}
        facts = [
            {same_name(fact) for fact in what if fact}
            for what in zip(*(one.person for one in group), strict=True)
        ]
        people = [fact for what in facts if len(what) > 1 for fact in what]
        tables = {one.place for one in group if one.kind == "table"}
        tops = {one.top for one in group if one.kind in ("images", "volume")}
        for doubtful, why, remedy in (
            (len(studies) > 1 and is_placeholder(name), f"{len(studies)} studies have this ID, "
             "which may stand for anybody", PATTERN),
            (bool(people), f"name, birth date or sex differ: {_some(people)}", PATTERN),
            (len(tables) > 1, f"several tables name it: {_some(tables)}", "name them apart there"),
            (len(tops) > 1, f"it is a name in several inputs: {_some(tops)}",
             "give the folder that holds these as the input"),
        ):  # fmt: skip
            if doubtful:
                notes.append(f"patient {name!r} is taken as one, but {why}; else {remedy}")
    nameless = {one.study: one.name for one in series if one.nameless}
    if len(nameless) > 1:
        notes.append(
            f"{len(nameless)} studies have no PatientID, and each is taken as a patient: "
            f"{_some(nameless.values())}; if a patient has several, {PATTERN}"
        )
    return notes
