"""Check a data set (label.csv, images, contours): what training would refuse or learn wrongly.

Prints a table of problems and writes a contact sheet; exit code 1 where there are errors.
"""

import argparse
import hashlib
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm import ct, inspection, panels
from fibldm.cli import add_workers_option, fraction, make_parser, positive, run_script
from fibldm.tables import SPLITS, Row, Split, TableProblem, parse_table

SHOWN, CELLS = 5, 64  # problems of a kind that are printed; slices on the contact sheet
WIDTH = 100  # columns of the table
FEW_PATIENTS = 5  # in a split: less than these say little
MANY = 0.05  # of all slices: so many turned ones are no patients who lay otherwise
GUESS = (1.0, -1024.0)  # the scale that 16-bit images without one are looked at by


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__.split("\n\n")[0], "  python scripts/check_data.py ./data")
    add = parser.add_argument
    add("data", type=Path, help="folder with label.csv, dataset.json and what they name")
    add("--csv_file", type=Path, help="the table, where it is not label.csv in the folder")
    add("--img_dir", type=Path, help="folder its paths are relative to, where it is another")
    add(
        "--window", type=float, nargs=2, default=ct.DEFAULT_WINDOW, metavar=("LOW", "HIGH"),
        help="HU that training makes -1 and 1",
    )  # fmt: skip
    add("--contour_channels", type=positive, default=1, help="as train_controlnet.py has it")
    add("--val_fraction", type=fraction, default=0.1, help="of patients, as train_vae.py has it")
    add("--test_fraction", type=fraction, default=0.1, help="of patients, as train_vae.py has it")
    add("--split_seed", type=int, default=0, help="as train_vae.py has it")
    add("--contact_sheet", type=Path, help="PNG to write; contact_sheet.png in the folder if unset")
    add_workers_option(parser)
    add("--all", action="store_true", help=f"list all rows of each problem, not the first {SHOWN}")
    args = parser.parse_args(argv)
    if args.window[0] >= args.window[1]:
        parser.error(f"--window {args.window[0]:g} {args.window[1]:g}: expected LOW below HIGH")
    args.window = tuple(args.window)
    args.csv_file = args.csv_file or args.data / "label.csv"
    args.img_dir = args.img_dir or args.data
    args.contact_sheet = args.contact_sheet or args.data / "contact_sheet.png"
    return args


@dataclass
class Finding:
    """One kind of problem: what it means and what to do, and where it is."""

    check: str
    severity: str  # error or warning
    meaning: str
    lines: list[str] = field(default_factory=list)  # where, and what is peculiar to it
    rows: dict[int, str] = field(default_factory=dict)  # reasons for the contact sheet

    def add(self, row: int, name: str, reason: str) -> None:
        self.lines.append(f"{name}: {reason}" if reason else name)
        self.rows.setdefault(row, reason or self.check)


@dataclass(frozen=True)
class Seen:
    """What reading a row gave."""

    errors: dict[str, str]  # by check
    look: inspection.Look | None = None
    shape: tuple[int, ...] = ()
    digest: bytes = b""
    is_8bit: bool = False


class Reader:
    """Reads the slices of a table, as training does; what has no scale is read by a guess."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.root, self.window, self.channels = args.img_dir, args.window, args.contour_channels
        self.rescale = ct.read_rescale(args.csv_file.parent) or ct.read_rescale(self.root)

    def image(self, row: Row) -> tuple[np.ndarray, bool]:
        """HU (H, W), and whether its scale was guessed."""
        try:
            return ct.read_hu(self.root / row.image, self.rescale, self.window), False
        except ValueError as error:
            if ct.SCALE_REMEDY not in str(error):
                raise
            return ct.read_hu(self.root / row.image, GUESS, self.window), True

    def contour(self, row: Row) -> np.ndarray:
        return ct.read_contour(self.root / row.contour, self.channels)

    def brief(self, error: ValueError) -> str:
        """An error of the readers without the file's path, with which it begins."""
        return str(error).split(": ", 1)[-1].replace(f"{self.root}/", "")

    def see(self, row: Row) -> Seen:
        """Read and inspect one row."""
        if not (self.root / row.image).is_file() or not (self.root / row.contour).is_file():
            return Seen({})  # the table's problem
        errors: dict[str, str] = {}
        try:
            hu, guessed = self.image(row)
        except ValueError as error:
            return Seen({"image unreadable": self.brief(error)})
        if guessed:
            errors["no scale"] = ""
        try:
            contour = self.contour(row)
        except ValueError as error:
            errors["contour unreadable"] = self.brief(error)
            contour = np.zeros((self.channels, *hu.shape), bool)
        if contour.shape[1:] != hu.shape:
            errors["sizes differ"] = f"{hu.shape}, but its contour has {contour.shape[1:]} pixels"
            contour = np.zeros((self.channels, *hu.shape), bool)
        is_8bit = self.rescale is None and not guessed and _is_8bit(self.root / row.image)
        look = inspection.look(hu, contour, self.window)
        digest = hashlib.sha256(np.ascontiguousarray(hu).tobytes()).digest()
        return Seen(errors, look, hu.shape, digest, is_8bit)


def _is_8bit(path: Path) -> bool:
    array, is_hu = ct.decode(path)
    return not is_hu and array.dtype == np.uint8


def read_rows(rows: list[Row], reader: Reader, workers: int) -> list[Seen]:
    """Read and inspect all rows, with a progress bar, in several processes."""

    def watch(results: Iterable[Seen]) -> list[Seen]:
        return list(tqdm(results, "reading slices", len(rows), disable=None))

    if workers == 0 or len(rows) < 2 * workers:
        return watch(map(reader.see, rows))
    with ProcessPoolExecutor(workers) as pool:
        return watch(pool.map(reader.see, rows, chunksize=8))


# The table.


def check_table(rows: list[Row], problems: list[TableProblem]) -> list[Finding]:
    """What label.csv itself tells: all that training refuses, and what is likely a mistake."""
    found = []
    meanings = {
        "short lines": "lines of label.csv lack cells: training refuses the table; complete them",
        "long lines": "lines of label.csv have more cells than its header: training refuses the "
        "table; quote cells that hold a comma",
        "paths that leave the folder": "paths are relative to the folder and stay in it, without "
        "..: training refuses the table",
        "unknown split": f"expected one of {', '.join(SPLITS)} in the split column",
        "missing files": "files that label.csv names are not there (paths are relative to the "
        "folder): training refuses the table",
        "patient in two splits": "held-out numbers would be of patients that were trained on; "
        "give all slices of a patient one split",
        "empty split": "training needs patients in train and in val: change --val_fraction or "
        "--split_seed of train_vae.py, or add a split column",
    }  # fmt: skip
    for problem in problems:
        finding = Finding(problem.kind, "error", meanings[problem.kind], list(problem.names))
        lost = set(problem.names)
        for i, row in enumerate(rows):
            if lost & {row.patient_id} and problem.kind == "patient in two splits":
                finding.rows[i] = "this patient is in two splits"
        found.append(finding)

    twice = Finding(
        "rows listed twice", "warning",
        "the same image and contour in several rows count double; remove all but one",
    )  # fmt: skip
    reused = Finding(
        "files used twice", "error",
        "a file belongs to one row, in one column; correct the table",
    )  # fmt: skip
    users: dict[str, list[int]] = defaultdict(list)
    pairs = Counter((row.image, row.contour) for row in rows)
    seen_pairs: set[tuple[str, str]] = set()
    for i, row in enumerate(rows):
        pair = row.image, row.contour
        if pair in seen_pairs:
            twice.add(i, row.image, f"listed {pairs[pair]} times")
            continue
        seen_pairs.add(pair)
        for name in pair:
            if name:
                users[name].append(i)
    for name, where in users.items():
        if len(where) > 1:
            reused.add(where[1], name, f"in {len(where)} rows")
    found += [twice, reused]

    unknown = Finding(
        "no patient_id", "warning",
        "each such row counts as its own patient; if a patient has several slices, some land in "
        "training and some in validation: fill the column patient_id",
    )  # fmt: skip
    for i, row in enumerate(rows):
        if row.patient_id == row.image:
            unknown.add(i, row.image, "")
    unknown.rows.clear()
    found.append(unknown)
    return found + check_labels(rows) + check_patients(rows)


def check_labels(rows: list[Row]) -> list[Finding]:
    labels = {row.label for row in rows if row.label}
    none = Finding(
        "no label", "warning", "other rows have a label; training takes these as of no class"
    )
    if labels:
        none.lines = [row.image for row in rows if not row.label]
    alike = Finding(
        "labels alike", "warning", "labels that differ in case or blanks alone are two classes"
    )
    by_name: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        by_name["".join(label.lower().split())].add(label)
    alike.lines = [" and ".join(sorted(names)) for names in by_name.values() if len(names) > 1]
    unseen = Finding(
        "label not in train", "warning", "no training slice has this label: it is not learned"
    )
    trained = {row.label for row in rows if row.split == "train"}
    unseen.lines = sorted(labels - trained)
    return [none, alike, unseen]


def check_patients(rows: list[Row]) -> list[Finding]:
    few = Finding(
        "few patients", "warning",
        f"less than {FEW_PATIENTS} patients in a split: its numbers will say little",
    )  # fmt: skip
    for part in SPLITS:
        count = len({row.patient_id for row in rows if row.split == part})
        if 0 < count < FEW_PATIENTS:
            few.lines.append(f"{part}: {count} patients")
    return [few]


# Files and values.


def check_files(rows: list[Row], seen: list[Seen], rescale) -> list[Finding]:
    """Files that can't be used, values that are no HU, contours that are not of their image."""
    kinds = {
        "image unreadable": "training refuses the data set; replace the file, or remove its row",
        "contour unreadable": "expected a mask, an outline or a label map; are the columns image "
        "and contour swapped? else replace the file, or remove its row",
        "sizes differ": "an image and its contour must have the same size",
        "no scale": f"16-bit images without a scale; {ct.SCALE_REMEDY}",
    }
    found = {kind: Finding(kind, "error", meaning) for kind, meaning in kinds.items()}
    fitting = 0
    for i, (row, one) in enumerate(zip(rows, seen, strict=True)):
        for kind, reason in one.errors.items():
            found[kind].add(i, row.contour if "contour" in kind else row.image, reason)
        if "no scale" in one.errors and one.look:
            fitting += one.look.problem is None
    unscaled = found["no scale"]
    unscaled.rows.clear()  # the pictures show nothing of it
    if unscaled.lines:
        unscaled.meaning += f" ({fitting} of {len(unscaled.lines)} look like chest CT so)"
    return [*found.values(), *check_sizes(rows, seen), *check_values(rows, seen, rescale)]


def check_sizes(rows: list[Row], seen: list[Seen]) -> list[Finding]:
    sizes = Counter(one.shape for one in seen if one.shape)
    mixed = Finding("sizes", "warning", "")
    square = Finding("not square", "warning", "images are padded with air to a square in training")
    if not sizes:
        return []
    usual = sizes.most_common(1)[0][0]
    mixed.meaning = (
        f"images of several sizes, most of {usual[0]}x{usual[1]}, are resized to one: a pixel is "
        "not the same length in all of them; scripts/prepare_data.py --spacing makes it so"
    )
    for i, (row, one) in enumerate(zip(rows, seen, strict=True)):
        if one.shape and one.shape != usual:
            mixed.add(i, row.image, f"{one.shape[0]}x{one.shape[1]}")
        if one.shape and one.shape[0] != one.shape[1]:
            square.add(i, row.image, f"{one.shape[0]}x{one.shape[1]}")
    mixed.rows.clear()
    square.rows.clear()
    return [mixed, square]


def check_values(rows: list[Row], seen: list[Seen], rescale) -> list[Finding]:
    """Values that are not those of chest CT in HU, by kind."""
    found: dict[str, Finding] = {}
    for i, (row, one) in enumerate(zip(rows, seen, strict=True)):
        if one.look is None or one.look.problem is None:
            continue
        reason, kind = one.look.problem, "values"
        remedy = "values are not HU of a chest CT: prepare it again from the originals"
        if "off by" in reason:
            too_high = 1024 if "off by 1024" in reason else -1024
            kind = f"off by {too_high}"
            remedy = f"HU are {abs(too_high)} too {'high' if too_high > 0 else 'low'}"
        for word in ("inverted", "a mask", "windowed", "normalized", "air alone", "constant"):
            kind = word if word in reason else kind
        finding = found.setdefault(kind, Finding(f"HU: {kind}", "error", remedy))
        finding.add(i, row.image, reason.split(" (peaks")[0])

    # A wrong intercept of most images is that of dataset.json.
    for too_high in (1024, -1024):
        finding = found.get(f"off by {too_high}")
        if finding and rescale and len(finding.lines) > len(rows) / 2:
            slope, intercept = rescale[0], rescale[1] - too_high
            finding.meaning += (
                f'; dataset.json should be {{"rescale_slope": {slope:g}, '
                f'"rescale_intercept": {intercept:g}}}'
            )
        elif finding:
            finding.meaning += ", in these images alone: prepare them again with their own scale"

    # What only many images tell together.
    looks = [one.look for one in seen if one.look is not None]
    tops = np.array([look.top for look in looks])
    counts = np.array([look.top_count for look in looks])
    if inspection.is_normalized_by_image(tops, counts):
        found["by image"] = Finding(
            "HU: by image", "error",
            "each image is stretched to its own minimum and maximum, so that the same tissue has "
            "another value in each: prepare them again with one window",
            [f"all images reach {tops.max():g}, in {np.median(counts):.0f} pixels"],
        )  # fmt: skip
    elif len(tops) > 8 and (tops == tops.max()).mean() > 0.9 and 100 < tops.max() < 300:
        found["bone"] = Finding(
            "HU: bone cut off", "warning",
            "bone and contrast agent were cut off by a narrow window and are lost",
            [f"no image exceeds {tops.max():g} HU"],
        )  # fmt: skip
    return list(found.values())


def check_contours(rows: list[Row], seen: list[Seen]) -> list[Finding]:
    """Contours that are empty, open, or not of their image, and styles that are mixed."""
    meanings = {
        "contour empty": "such a slice teaches that no contour means lungs: remove it or draw one",
        "contour open": "outlines must be closed lines; close them, or use filled masks",
        "contour misplaced": "the contour is not of this image as it lies: lungs will not follow "
        "contours; export both with the same orientation, slice order and size",
        "contour fits badly": "the lungs found in the image are others: look at the contact sheet, "
        "and redraw the contour where it is wrong",
        "no lungs": "slices above or below the lungs, with nothing to learn: leave them out",
    }  # fmt: skip
    warnings = ("contour fits badly", "no lungs")
    found = {
        kind: Finding(kind, "warning" if kind in warnings else "error", meaning)
        for kind, meaning in meanings.items()
    }
    usable = [
        i
        for i, one in enumerate(seen)
        if one.look and not one.look.problem and not one.errors.keys() - {"no scale"}
    ]
    if not usable:
        return []
    contours = np.stack([seen[i].look.contour for i in usable])
    lungs = np.stack([seen[i].look.lungs for i in usable])
    doubtful = [k for k, i in enumerate(usable) if seen[i].look.fit < inspection.FITS]
    swapped = inspection.find_swapped(contours, lungs, doubtful)
    for k, i in enumerate(usable):
        problem = seen[i].look.contour_problem
        if k in swapped and (problem is None or problem.check != "contour empty"):
            other = rows[usable[swapped[k]]].image
            found["contour misplaced"].add(i, rows[i].image, f"its contour fits {other} instead")
        elif problem:
            found[problem.check].add(i, rows[i].image, problem.reason)
    for i, one in enumerate(seen):  # what needs no HU
        problem = one.look.contour_problem if one.look else None
        if problem and i not in set(usable) and not one.errors.keys() - {"no scale"}:
            found[problem.check].add(i, rows[i].image, problem.reason)

    styles = Counter(seen[i].look.style for i in usable if seen[i].look.style)
    if len(styles) > 1:
        usual = styles.most_common(1)[0][0]
        mixed = Finding(
            "contour styles mixed", "error",
            f"most contours are {usual}, these are not: a model takes them for other lungs; "
            "bring all to one style",
        )  # fmt: skip
        for i in usable:
            if seen[i].look.style and seen[i].look.style != usual:
                mixed.add(i, rows[i].image, seen[i].look.style)
        found["mixed"] = mixed
    return list(found.values())


# Slices among others.


def check_turned(rows: list[Row], seen: list[Seen]) -> tuple[list[Finding], list[str]]:
    """Patients that lie otherwise than the rest."""
    usable = [i for i, one in enumerate(seen) if one.look and one.look.view is not None]
    patients = [rows[i].patient_id for i in usable]
    turned = None
    if usable:
        turned = inspection.find_turned(np.stack([seen[i].look.view for i in usable]), patients)
    count = len(set(patients))
    if turned is None and count < inspection.TURNED_PATIENTS:
        return [], [
            f"not checked: flips and rotations ({count} patients with lungs, at least "
            f"{inspection.TURNED_PATIENTS} are needed)"
        ]
    if turned is None:
        meaning = (
            "slices lie in no one way: are a third or more mirrored or turned? Look at the contact "
            "sheet, and bring all to one orientation"
        )
        return [Finding("orientations mixed", "error", meaning, [f"{count} patients"])], []
    sure = Finding(
        "turned", "error",
        "slices lie otherwise than the rest: turn them back, or leave a patient out who lay prone",
    )  # fmt: skip
    maybe = Finding(
        "turned?", "warning",
        "perhaps mirrored or turned against the rest: look at the contact sheet (heart on the "
        "image's right, spine below); a patient may have lain prone",
    )  # fmt: skip
    where = defaultdict(list)
    for i, patient in zip(usable, patients, strict=True):
        where[patient].append(i)
    slices = sum(one.slices for one in turned)
    many = slices >= 5 and slices > MANY * len(usable)
    for one in turned:
        clear = one.slices >= 3 and one.agreeing >= 0.75 and one.margin > 0.6
        finding = sure if clear or many else maybe
        for i in where[one.patient]:
            finding.add(i, rows[i].image, f"patient {one.patient}: {one.how}")
    return [sure, maybe], []


def check_copies(rows: list[Row], seen: list[Seen]) -> list[Finding]:
    """Slices that are in the data set more than once."""
    leak = Finding(
        "copies across splits", "error",
        "the same slice in training and in another split makes held-out numbers too good; are two "
        "patient ids one patient? Remove one, or give both the same patient_id",
    )  # fmt: skip
    double = Finding(
        "copies", "warning",
        "the same slice under two patient ids counts double: are they one patient?",
    )  # fmt: skip
    own = Finding(
        "copies in a patient", "warning", "the same slice twice counts double: remove one"
    )

    def add(a: int, b: int, how: str) -> None:
        finding = double if rows[a].split == rows[b].split else leak
        if rows[a].patient_id == rows[b].patient_id:
            finding = own
        finding.add(b, rows[b].image, f"{how} of {rows[a].image} ({rows[a].split})")
        finding.rows.setdefault(a, f"{how} of {rows[b].image}")

    first: dict[bytes, int] = {}
    exact = set()
    for i, one in enumerate(seen):
        if not one.digest:
            continue
        k = first.setdefault(one.digest, i)
        if k != i and rows[k].image != rows[i].image:
            add(k, i, "exact copy")
            exact.add(i)
    usable = [
        i for i, one in enumerate(seen) if one.look and not one.look.problem and i not in exact
    ]
    if len(usable) > 1:
        thumbnails = np.stack([seen[i].look.thumbnail for i in usable])
        for copy in inspection.find_copies(thumbnails, [rows[i].patient_id for i in usable]):
            add(usable[copy.first], usable[copy.second], f"near copy ({copy.likeness:.2f})")
    return [leak, double, own]


def check_slices(
    rows: list[Row], seen: list[Seen], rescale: tuple[float, float] | None
) -> tuple[list[Finding], list[str]]:
    """All that the slices tell, and what could not be checked."""
    turned, unchecked = check_turned(rows, seen)
    files, contours = check_files(rows, seen, rescale), check_contours(rows, seen)
    return [*files, *contours, *turned, *check_copies(rows, seen)], unchecked


# What is printed and drawn.


def summarize(rows: list[Row], seen: list[Seen], window: ct.Window) -> list[str]:
    """Counts of rows and patients, per split and label, and what is assumed of the files."""
    patients = Counter(row.patient_id for row in rows)
    single = sum(count == 1 for count in patients.values())
    lines = [f"{len(rows)} slices of {len(patients)} patients, {single} of them with one slice"]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.split, row.label].append(row)
    lines.append(f"  {'split':<8}{'label':<20}{'patients':>9}{'slices':>9}")
    order = {part: i for i, part in enumerate(SPLITS)}
    for split, label in sorted(groups, key=lambda key: (order.get(key[0], 9), key)):
        group = groups[split, label]
        count = len({row.patient_id for row in group})
        lines.append(f"  {split:<8}{label or '-':<20}{count:>9}{len(group):>9}")
    eight = sum(one.is_8bit for one in seen)
    if eight:
        lines.append(
            f"{eight} images have 8 bits and no dataset.json: 0 is taken as {window[0]:g} HU, 255 "
            f"as {window[1]:g} HU (--window)"
        )
    return lines


def print_findings(findings: list[Finding], shown: int | None) -> None:
    """A table: each kind of problem with its meaning, and below it where it is."""
    print(f"\n{'severity':<9} {'check':<23} {'rows':>5}  meaning")
    for finding in findings:
        count = len(finding.lines)
        first, *more = textwrap.wrap(finding.meaning, WIDTH - 41, break_on_hyphens=False)
        print(f"{finding.severity:<9} {finding.check:<23} {count:>5}  {first}")
        for line in more:
            print(f"{'':<41}{line}")
        for line in finding.lines[:shown]:
            print(f"{'':<10}{line}")
        if shown is not None and count > shown:
            print(f"{'':<10}... and {count - shown} more (--all lists them)")


def draw(row: Row, reader: Reader) -> np.ndarray:
    """A slice with its contour drawn on, RGB uint8; what can't be read is black."""
    try:
        hu = reader.image(row)[0]
    except ValueError:
        return np.zeros((64, 64, 3), np.uint8)
    side = min(max(hu.shape), panels.SHEET_CELL)
    picture = ct.hu_to_unit(ct.fit_square(hu, side, ct.AIR), reader.window)[None]
    try:
        contour = reader.contour(row)
    except ValueError:
        return panels.grey(picture)[0]
    if contour.shape[1:] != hu.shape:
        return panels.grey(picture)[0]
    return panels.overlay(picture, ct.fit_contour(contour, side)[None])[0]


def write_contact_sheet(
    path: Path, rows: list[Row], findings: list[Finding], paint: Callable[[Row], np.ndarray]
) -> None:
    """Flagged slices first, some of each kind, then a sample spread over patients."""
    reasons: dict[int, str] = {}
    flagged = [finding for finding in findings if finding.rows]
    share = max(2, (CELLS - 16) // max(1, len(flagged)))
    for finding in flagged:
        for i, reason in list(finding.rows.items())[:share]:
            text = f"{finding.check}: {reason}" if reason != finding.check else reason
            reasons[i] = f"{reasons[i]}; {text}" if i in reasons else text
    chosen = list(reasons)[:CELLS]
    first_of: dict[str, int] = {}
    for i, row in enumerate(rows):
        if i not in reasons:
            first_of.setdefault(row.patient_id, i)
    rest = list(first_of.values())
    room = CELLS - len(chosen)
    chosen += rest[:: max(1, -(-len(rest) // room))] if room else []
    cells = []
    for i in chosen:
        name = Path(rows[i].image).name
        marked = f"! {name}: {reasons[i]}" if i in reasons else f"{name} ({rows[i].split})"
        cells.append((paint(rows[i]), marked))
    panels.write_sheet(path, cells)


def main(args: argparse.Namespace) -> None:
    if not args.data.is_dir():
        raise ValueError(f"{args.data}: no such folder; expected one with label.csv")
    split = Split(args.split_seed, args.val_fraction, args.test_fraction)
    rows, notes, problems = parse_table(args.csv_file, args.img_dir, split)
    reader = Reader(args)
    seen = read_rows(rows, reader, args.num_workers)

    of_table = check_table(rows, problems)
    of_slices, unchecked = check_slices(rows, seen, reader.rescale)
    findings = [finding for finding in [*of_table, *of_slices] if finding.lines]
    findings.sort(key=lambda finding: finding.severity)  # errors first
    errors = [finding for finding in findings if finding.severity == "error"]

    notes = [note for note in notes if not note.startswith("WARNING")]
    print("\n".join([*summarize(rows, seen, args.window), *notes, *unchecked]))
    if findings:
        print_findings(findings, None if args.all else SHOWN)
    write_contact_sheet(args.contact_sheet, rows, findings, partial(draw, reader=reader))
    print(
        f"\n{len(errors)} kinds of errors, {len(findings) - len(errors)} of warnings; "
        f"contact sheet: {args.contact_sheet}"
    )
    if errors:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, parse_args)
