"""What is wrong with a data set: its table, its files, their values, its contours, its patients."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fibldm import anatomy, ct, likeness, spine
from fibldm.tables import SPLITS, Row, TableProblem

FEW_PATIENTS = 5  # in a split: less than these say little
MANY = 0.05  # of all slices: so many turned ones are no patients who lay otherwise

# Each check: what it means and what to do, in the order in which findings are listed.
ERRORS = {
    "short lines": "lines of label.csv lack cells: training refuses the table; complete them",
    "long lines": "lines of label.csv have more cells than its header: training refuses the "
    "table; quote cells that hold a comma",
    "paths that leave the folder": "paths are relative to the folder and stay in it, without ..: "
    "training refuses the table",
    "unknown split": f"expected one of {', '.join(SPLITS)} in the split column",
    "missing files": "files that label.csv names are not there (paths are relative to the "
    "folder): training refuses the table",
    "patient in two splits": "held-out numbers would be of patients that were trained on; "
    "give all slices of a patient one split",
    "empty split": "training needs patients in train and in val: change --val_fraction or "
    "--split_seed of train_vae.py, or add a split column",
    "files used twice": "a file belongs to one row, in one column; correct the table",
    "image unreadable": "training refuses the data set; replace the file, or remove its row",
    "contour unreadable": "expected a mask, an outline or a label map; are the columns image "
    "and contour swapped? else replace the file, or remove its row",
    "sizes differ": "an image and its contour must have the same size",
    "no scale": f"16-bit images without a scale; {ct.SCALE_REMEDY}",
    "HU: values": "values are not HU of a chest CT: prepare it again from the originals",
    "HU: by image": "each image is stretched to its own minimum and maximum, so that the same "
    "tissue has another value in each: prepare them again with one window",
    "framed": "the picture is larger than the field of view, and what is around it passes for "
    "tissue: the chest is shrunk. Run scripts/prepare_data.py on the scans, or on this folder: it "
    "cuts the surround off",
    "contour empty": "such a slice teaches that no contour means lungs: remove it or draw one",
    "contour open": "outlines must be closed lines; close them, or use filled masks",
    "contour misplaced": "the contour is not of this image as it lies: lungs will not follow "
    "contours; export both with the same orientation, slice order and size",
    "contour styles mixed": "most contours are {usual}, these are not: a model takes them for "
    "other lungs; bring all to one style",
    "orientations mixed": "slices lie in no one way: are a third or more mirrored or turned? Look "
    "at the contact sheet, and bring all to one orientation",
    "upside down": "the spine is above, whatever a header said. Run scripts/prepare_data.py on the "
    "scans, or on this folder: it turns such slices by 180 degrees. Flip them yourself where they "
    "are mirrored top-bottom",
    "turned": "slices lie otherwise than the rest: turn them back",
    "copies across splits": "the same slice in training and in another split makes held-out "
    "numbers too good; are two patient ids one patient? Remove one, or give both the same "
    "patient_id",
}  # fmt: skip
WARNINGS = {
    "rows listed twice": "the same image and contour in several rows count double; remove all but "
    "one",
    "no patient_id": "each such row counts as its own patient; if a patient has several slices, "
    "some land in training and some in validation: fill the column patient_id",
    "no label": "other rows have a label; training takes these as of no class",
    "labels alike": "labels that differ in case or blanks alone are two classes",
    "label not in train": "no training slice has this label: it is not learned",
    "few patients": f"less than {FEW_PATIENTS} patients in a split: its numbers will say little",
    "sizes": "images of several sizes, most of {usual}, are resized to one: a pixel is not the "
    "same length in all of them; scripts/prepare_data.py --spacing makes it so",
    "not square": "images are padded with air to a square in training",
    "HU: bone cut off": "bone and contrast agent were cut off by a narrow window and are lost",
    "contour fits badly": "the lungs found in the image are others: look at the contact sheet, "
    "and redraw the contour where it is wrong",
    "no lungs": "slices above or below the lungs, with nothing to learn: leave them out",
    "turned?": "perhaps mirrored or turned against the rest: look at the contact sheet (heart on "
    "the image's right, spine below)",
    "copies": "the same slice under two patient ids counts double: are they one patient?",
    "copies in a patient": "the same slice twice counts double: remove one",
}  # fmt: skip
CHECKS = {**ERRORS, **WARNINGS}


@dataclass
class Finding:
    """What one check found: how bad it is, what it means and what to do, and where it is.

    `lines` name each place and what is peculiar to it; `rows` {row of the table: what is wrong
    there} where a picture shows it.
    """

    check: str
    severity: str  # error or warning
    meaning: str
    lines: list[str] = field(default_factory=list)
    rows: dict[int, str] = field(default_factory=dict)

    def add(self, name: str, reason: str = "", row: int | None = None) -> None:
        self.lines.append(f"{name}: {reason}" if reason else name)
        if row is not None:
            self.rows.setdefault(row, reason or self.check)

    def add_by_patient(self, rows: Sequence[Row], reasons: dict[int, str]) -> None:
        """Add {row: what is wrong there}, a line for all slices of a patient that are alike."""
        alike: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i, reason in reasons.items():
            alike[rows[i].patient_id, reason].append(i)
        for (patient, reason), members in alike.items():
            first, more = rows[members[0]].image, len(members) - 1
            files = f"{first} and {more} more" if more else first
            self.lines.append(f"patient {patient}: {reason} ({files})")
            for i in members:
                self.rows.setdefault(i, f"patient {patient}: {reason}")


class Findings(dict[str, Finding]):
    """Findings by check; one begins when it is first asked for."""

    def __missing__(self, check: str) -> Finding:
        severity = "warning" if check in WARNINGS else "error"
        return self.setdefault(check, Finding(check, severity, CHECKS[self._kind(check)]))

    @staticmethod
    def _kind(check: str) -> str:
        """The check of CHECKS: values may be no HU in other ways than those of these names."""
        return "HU: values" if check.startswith("HU: ") and check not in CHECKS else check

    def in_order(self) -> list[Finding]:
        """Errors first, then warnings, each in the order of CHECKS."""
        order = list(CHECKS)
        return sorted(self.values(), key=lambda finding: order.index(self._kind(finding.check)))


@dataclass(frozen=True)
class SliceReading:
    """What is kept of a slice: its problems, and small arrays to compare it with others by.

    `errors` {check: what was found} of its files. All else is of an image that could be read: such
    a one has a `shape`. `frame` says what was seen where a surround passes for tissue; all else is
    judged without it. `thumbnail` (64, 64) float16 in [-1, 1] over the window; `view` (16, 16)
    float32, the box around the lungs; `uprightness` by the spine; `contour` and `lungs` (32, 32)
    bool; `fit` the Dice of these two; `style` filled, outline or None; `top` the highest HU, which
    `top_count` pixels have.
    """

    errors: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    digest: bytes = b""
    is_8bit: bool = False
    hu_problem: str | None = None
    frame: str | None = None
    contour_problem: anatomy.Problem | None = None
    style: str | None = None
    thumbnail: np.ndarray | None = None
    view: np.ndarray | None = None
    uprightness: float | None = None
    contour: np.ndarray | None = None
    lungs: np.ndarray | None = None
    fit: float = 0.0
    top: float = 0.0
    top_count: int = 0

    @property
    def is_ct(self) -> bool:
        """Whether the image could be read and its values are HU."""
        return bool(self.shape) and self.hu_problem is None

    @property
    def has_contour(self) -> bool:
        """Whether the image, and a contour of its size, could be read."""
        return bool(self.shape) and not self.errors.keys() - {"no scale"}


def check_table(found: Findings, rows: Sequence[Row], problems: Sequence[TableProblem]) -> None:
    """What label.csv itself tells: all that training refuses, and what is likely a mistake."""
    for problem in problems:
        found[problem.kind].lines += problem.names
        if problem.kind == "patient in two splits":
            torn = [i for i, row in enumerate(rows) if row.patient_id in problem.names]
            found[problem.kind].rows = dict.fromkeys(torn, "this patient is in two splits")

    # Rows and files that are listed twice.
    times = Counter((row.image, row.contour) for row in rows)
    first: dict[tuple[str, str], int] = {}
    users: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        pair = row.image, row.contour
        if first.setdefault(pair, i) != i:
            found["rows listed twice"].add(row.image, f"listed {times[pair]} times", i)
            continue
        for name in filter(None, pair):
            users[name].append(i)
    for name, where in users.items():
        if len(where) > 1:
            found["files used twice"].add(name, f"in {len(where)} rows", where[1])

    # Patients and labels.
    labels = {row.label for row in rows} - {""}
    for row in rows:
        if row.patient_id == row.image:
            found["no patient_id"].add(row.image)
        if labels and not row.label:
            found["no label"].add(row.image)
    spellings: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        spellings["".join(label.lower().split())].add(label)
    for alike in spellings.values():
        if len(alike) > 1:
            found["labels alike"].add(" and ".join(sorted(alike)))
    for label in sorted(labels - {row.label for row in rows if row.split == "train"}):
        found["label not in train"].add(label)
    for split in SPLITS:
        count = len({row.patient_id for row in rows if row.split == split})
        if 0 < count < FEW_PATIENTS:
            found["few patients"].add(f"{split}: {count} patients")


def check_files(found: Findings, rows: Sequence[Row], readings: Sequence[SliceReading]) -> None:
    """Files that can't be read, that have no scale, or that differ in size."""
    unscaled = [reading for reading in readings if "no scale" in reading.errors]
    sizes = Counter(reading.shape for reading in readings if reading.shape)
    usual = sizes.most_common(1)[0][0] if sizes else ()
    for i, (row, reading) in enumerate(zip(rows, readings, strict=True)):
        for check, reason in reading.errors.items():
            name = row.contour if check == "contour unreadable" else row.image
            found[check].add(name, reason, None if check == "no scale" else i)
        size = "x".join(map(str, reading.shape))
        if reading.shape and reading.shape != usual:
            found["sizes"].add(row.image, size)
        if reading.shape and len(set(reading.shape)) > 1:
            found["not square"].add(row.image, size)
    if "sizes" in found:
        found["sizes"].meaning = WARNINGS["sizes"].format(usual="x".join(map(str, usual)))
    framed = {i: reading.frame for i, reading in enumerate(readings) if reading.frame}
    if framed:
        found["framed"].add_by_patient(rows, framed)
    if unscaled:
        fitting = sum(reading.is_ct for reading in unscaled)
        found["no scale"].meaning += f" ({fitting} of {len(unscaled)} look like chest CT so)"


def check_values(
    found: Findings,
    rows: Sequence[Row],
    readings: Sequence[SliceReading],
    rescale: tuple[float, float] | None,
) -> None:
    """Values that are not those of chest CT in HU, by kind; `rescale` is that of dataset.json."""
    kinds = ("off by 1024", "off by -1024", "inverted", "a mask", "windowed", "normalized")
    for i, (row, reading) in enumerate(zip(rows, readings, strict=True)):
        if problem := reading.hu_problem:
            named = [kind for kind in (*kinds, "air alone", "constant") if kind in problem]
            kind = named[-1] if named else "values"
            found[f"HU: {kind}"].add(row.image, problem.split(" (peaks")[0], i)

    # A wrong intercept of most images is that of dataset.json.
    for too_high in (1024, -1024):
        if f"HU: off by {too_high}" not in found:
            continue
        finding = found[f"HU: off by {too_high}"]
        finding.meaning = f"HU are {abs(too_high)} too {'high' if too_high > 0 else 'low'}"
        if rescale and len(finding.lines) > len(rows) / 2:
            slope, intercept = rescale[0], rescale[1] - too_high
            finding.meaning += (
                f'; dataset.json should be {{"rescale_slope": {slope:g}, '
                f'"rescale_intercept": {intercept:g}}}'
            )
        else:
            finding.meaning += ", in these images alone: prepare them again with their own scale"

    # What only many images tell together.
    tops = np.array([reading.top for reading in readings if reading.shape])
    counts = np.array([reading.top_count for reading in readings if reading.shape])
    if anatomy.is_normalized_by_image(tops, counts):
        line = f"all images reach {tops.max():g}, in {np.median(counts):.0f} pixels"
        found["HU: by image"].add(line)
    elif len(tops) > 8 and (tops == tops.max()).mean() > 0.9 and 100 < tops.max() < 300:
        found["HU: bone cut off"].add(f"no image exceeds {tops.max():g} HU")


def check_contours(found: Findings, rows: Sequence[Row], readings: Sequence[SliceReading]) -> None:
    """Contours that are empty, open, or not of their image, and styles that are mixed."""
    numbered = [(i, reading) for i, reading in enumerate(readings) if reading.has_contour]
    usable = [(i, reading) for i, reading in numbered if reading.is_ct]
    if not usable:
        return
    swapped = anatomy.find_swapped(
        np.stack([reading.contour for _, reading in usable]),
        np.stack([reading.lungs for _, reading in usable]),
        [k for k, (_, reading) in enumerate(usable) if reading.fit < anatomy.FITS],
    )
    for k, (i, reading) in enumerate(usable):
        problem = reading.contour_problem
        if k in swapped and (problem is None or problem.check != "contour empty"):
            other = rows[usable[swapped[k]][0]].image
            found["contour misplaced"].add(rows[i].image, f"its contour fits {other} instead", i)
        elif problem:
            found[problem.check].add(rows[i].image, problem.reason, i)
    for i, reading in numbered:  # what needs no HU
        if reading.contour_problem and not reading.is_ct:
            found[reading.contour_problem.check].add(
                rows[i].image, reading.contour_problem.reason, i
            )

    styles = Counter(reading.style for _, reading in usable if reading.style)
    if len(styles) > 1:
        usual = styles.most_common(1)[0][0]
        mixed = found["contour styles mixed"]
        mixed.meaning = mixed.meaning.format(usual=usual)
        for i, reading in usable:
            if reading.style not in (usual, None):
                mixed.add(rows[i].image, reading.style, i)


def check_orientations(
    found: Findings, rows: Sequence[Row], readings: Sequence[SliceReading]
) -> str | None:
    """Patients that lie upside down, or otherwise than the rest.

    Returns why the latter could not be checked. The spine tells in each patient alone what is
    upside down; it is turned by 180 degrees before it is compared with the rest.
    """
    where: dict[str, list[int]] = defaultdict(list)
    for i, reading in enumerate(readings):
        if reading.view is not None:
            where[rows[i].patient_id].append(i)
    upside_down = [one for one in where if _are_upside_down(readings, where[one])]
    for patient in upside_down:
        reasons = dict.fromkeys(where[patient], "the spine is above")
        found["upside down"].add_by_patient(rows, reasons)

    if len(where) < anatomy.TURNED_PATIENTS:
        return (
            f"not checked: slices that are mirrored left-right or lie on their side ({len(where)} "
            f"patients with lungs, at least {anatomy.TURNED_PATIENTS} are needed)"
        )
    turned = _find_turned(readings, where, upside_down)
    if turned is None:
        found["orientations mixed"].add(f"{len(where)} patients")
        return None
    slices = sum(patient.slices for patient in turned)
    many = slices >= 5 and slices > MANY * sum(map(len, where.values()))
    for patient, how, margin, count, agreeing in turned:
        clear = many or (count >= 3 and agreeing >= 0.75 and margin > 0.6)
        after = " once its spine is below" if patient in upside_down else ""
        reasons = dict.fromkeys(where[patient], how + after)
        found["turned" if clear else "turned?"].add_by_patient(rows, reasons)
    return None


def _are_upside_down(readings: Sequence[SliceReading], rows: Sequence[int]) -> bool:
    """Whether a patient's slices are upside down for certain."""
    asked = spine.telling(np.array([readings[i].lungs.mean() for i in rows]))
    scores = [readings[rows[k]].uprightness for k in asked]
    return spine.are_upside_down([score for score in scores if score is not None])


def _find_turned(
    readings: Sequence[SliceReading], where: dict[str, list[int]], upside_down: Sequence[str]
) -> list[anatomy.TurnedPatient] | None:
    """`anatomy.find_turned`, once what is upside down is turned by 180 degrees."""
    views, patients = [], []
    for patient, members in where.items():
        step = -1 if patient in upside_down else 1
        views += [readings[i].view[::step, ::step] for i in members]
        patients += [patient] * len(members)
    return anatomy.find_turned(np.stack(views), patients)


def check_copies(found: Findings, rows: Sequence[Row], readings: Sequence[SliceReading]) -> None:
    """Slices that are in the data set more than once."""

    def add(a: int, b: int, how: str) -> None:
        check = "copies" if rows[a].split == rows[b].split else "copies across splits"
        if rows[a].patient_id == rows[b].patient_id:
            check = "copies in a patient"
        found[check].add(rows[b].image, f"{how} of {rows[a].image} ({rows[a].split})", b)
        found[check].rows.setdefault(a, f"{how} of {rows[b].image}")

    first: dict[bytes, int] = {}
    exact = set()
    for i, reading in enumerate(readings):
        k = first.setdefault(reading.digest, i) if reading.digest else i
        if k != i and rows[k].image != rows[i].image:
            add(k, i, "exact copy")
            exact.add(i)
    usable = [i for i, reading in enumerate(readings) if reading.is_ct and i not in exact]
    if len(usable) > 1:
        small = np.stack([readings[i].thumbnail for i in usable])
        for copy in likeness.find_copies(small, [rows[i].patient_id for i in usable]):
            add(usable[copy.first], usable[copy.second], f"near copy ({copy.likeness:.2f})")
