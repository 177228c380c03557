"""Headers of DICOM files: which slices make a series, in which order, and which are left out."""

import re
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pydicom
from pydicom.multival import MultiValue
from tqdm import tqdm

from fibldm import dicom

AXIAL = 0.94  # cosine: slices may be tilted by 20 degrees
SAME_PLACE = 0.01  # mm
NO_PLACE = "no ImagePositionPatient: its place is unknown"
UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # orientation
# What is computed of many slices, or is no HU, by words of ImageType, FrameType and descriptions,
# and by those of ImageType alone.
PROJECTIONS = re.compile(
    r"\b(\w*M(AX|IN)?IPS?\d*|M(AX|IN)(IMUM)? ?I(NT|NTENSITY)?[ _]?P\w*|AIP|(AVERAGE|AVG|AV) IP"
    r"|RAY ?SUM|VRT?|SSD|(VOLUME|SURFACE)[ _]RENDER\w*|SUBTRACT\w*|IODINE|PERFUSION)\b"
)
PROJECTED = re.compile(r"\b(MINIMUM|MAXIMUM|MEAN|SUBTRACTION|PROJECTION|PROJECTED)\b")


@dataclass(frozen=True)
class Header:
    """What places one slice, a file or a frame of a multi-frame file, among the others.

    `orientation` holds the direction cosines of a row and of a column, `corner` the first pixel's
    position in mm (x to the patient's left, y to the back, z to the head); `spacing` is mm between
    rows and between columns. `patient` is the PatientID, `name` PatientName, `person` birth date
    and sex, each "" where unknown. `warned` is what pydicom said of the file. `problem` says why it
    can't be used, where it can't.
    """

    path: Path
    frame: int
    frames: int
    series: str
    study: str
    patient: str
    name: str
    person: tuple[str, str]
    uid: str
    number: tuple[int, int]
    location: float
    orientation: tuple[float, ...]
    corner: tuple[float, ...]
    spacing: tuple[float, ...] | None
    shape: tuple[int, int]
    inverted: bool
    derived: bool
    warned: tuple[str, ...]
    problem: str | None

    @property
    def where(self) -> str:
        """The file, and the frame where it holds several."""
        return f"{self.path} frame {self.frame + 1}" if self.frames > 1 else str(self.path)

    @property
    def corner_upright(self) -> np.ndarray:
        """Position (x, y) in mm of the first pixel of the `upright` slice."""
        down, right = self.spacing or (1.0, 1.0)
        steps = np.array([self.orientation[:2], self.orientation[3:5]])
        ends = np.array([[right * (self.shape[1] - 1)], [down * (self.shape[0] - 1)]]) * steps
        return np.array(self.corner[:2]) + np.minimum(ends, 0).sum(0)

    @property
    def height(self) -> float:
        """mm towards the head along the slices' normal."""
        normal = np.cross(self.orientation[:3], self.orientation[3:])
        return float(np.dot(normal, self.corner) * np.sign(normal[2]))


# What `read_headers` reads of a file: all else, pixels above all, stays on the disk.
_SEQUENCES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_PLACE = ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")
_HEADER_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality"),
    *("PatientID", "PatientName", "ImageType", "AcquisitionNumber", "InstanceNumber", "Rows"),
    *("Columns", "NumberOfFrames", "PhotometricInterpretation", "DirectoryRecordSequence"),
    *("Manufacturer", "SeriesDescription", "DerivationDescription", "PatientBirthDate"),
    "PatientSex",
    *("VolumeBasedCalculationTechnique", "SliceLocation"),
    *_PLACE,
    *_SEQUENCES,
)


def read_headers(path: Path) -> list[Header]:
    """The slices of a DICOM file; ValueError where it is none or can't be read."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            headers = _headers(path)
    except Exception as error:  # pydicom raises anything on damaged files
        raise ValueError(f"{path}: {error}") from error
    warned = tuple(str(one.message).partition(". Please see")[0] for one in caught)
    return [replace(header, warned=warned) for header in headers] if warned else headers


def _headers(path: Path) -> list[Header]:
    dataset = dicom.read_file(path, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS))
    if "SOPClassUID" not in dataset and "Modality" not in dataset:
        if "DirectoryRecordSequence" in dataset:
            raise ValueError("a DICOMDIR, the index of a folder")
        raise ValueError("not a DICOM image, or one cut short within its header")
    frames = int(dataset.get("NumberOfFrames") or 1)
    described = len(dataset.get("PerFrameFunctionalGroupsSequence") or [])
    if frames != max(1, described):
        raise ValueError(f"NumberOfFrames {frames}, but {described} frames are described")
    return [_header(path, dataset, frame, frames) for frame in range(frames)]


def read_all_headers(paths: list[Path], workers: int) -> list[list[Header] | str]:
    """The slices of many DICOM files, in their order, or what is wrong with a file."""
    bar = {"desc": "reading headers", "total": len(paths), "unit": "file", "disable": None}
    if workers <= 1 or len(paths) < 256:
        return list(tqdm(map(_headers_or_problem, paths), **bar))
    try:
        with ProcessPoolExecutor(workers) as pool:
            return list(tqdm(pool.map(_headers_or_problem, paths, chunksize=64), **bar))
    except BrokenProcessPool:
        raise ValueError(
            "reading DICOM headers ended a process: out of memory, or a damaged file; "
            "--num_workers 1 reads them one by one"
        ) from None


def _headers_or_problem(path: Path) -> list[Header] | str:
    try:
        return read_headers(path)
    except ValueError as error:
        return str(error)


def _text(dataset: pydicom.Dataset, *names: str) -> list[str]:
    """All values of elements as text; none of an element that is absent or can't be read."""
    found = []
    for name in names:
        try:
            value = dataset.get(name)
        except (ValueError, TypeError, OverflowError):  # not what its type allows
            value = dataset.get_item(name).value
            value = value.decode("latin-1") if isinstance(value, bytes) else value
        several = value if isinstance(value, (list, MultiValue)) else [value]
        found += [str(one).strip() for one in several if one is not None]
    return found


def _number(dataset: pydicom.Dataset, name: str) -> int:
    """A whole number, the first where there is more, as in 1A; 0 without one."""
    digits = re.search(r"-?\d+", " ".join(_text(dataset, name)))
    return int(digits.group()) if digits else 0


def _location(dataset: pydicom.Dataset) -> float:
    """SliceLocation, 0 without one."""
    try:
        return float((_text(dataset, "SliceLocation") or ["0"])[0])
    except ValueError:
        return 0.0


def _header(path: Path, dataset: pydicom.Dataset, frame: int, frames: int) -> Header:
    orientation, corner, spacing = (
        tuple(float(number) for number in dicom.group(dataset, name, frame).get(attribute) or ())
        for name, attribute in zip(
            ("PlaneOrientationSequence", "PlanePositionSequence", "PixelMeasuresSequence"),
            _PLACE,
            strict=True,
        )
    )
    kind = dicom.group(dataset, "CTImageFrameTypeSequence", frame)
    image_type = _text(kind, "FrameType") or _text(dataset, "ImageType")
    image_type += _text(kind, "VolumeBasedCalculationTechnique")
    described = _text(dataset, "SeriesDescription", "DerivationDescription")
    image_type, described = (
        re.sub(r"[^A-Z0-9]+", " ", " ".join(part).upper()) for part in (image_type, described)
    )
    projection = PROJECTIONS.search(f"{image_type} | {described}") or PROJECTED.search(image_type)
    problem = None
    if dataset.get("Modality") != "CT":
        problem = f"not CT: modality {dataset.get('Modality') or 'unknown'}"
    elif str(dataset.get("Manufacturer")) == "FibLDM":
        problem = f"synthetic: {dataset.get('SeriesDescription') or 'made by FibLDM'}"
    elif {"LOCALIZER", "SCOUT"} & set(image_type.split()):
        problem = "a localizer"
    elif projection:
        problem = f"computed of several slices: {projection.group()}"
    elif not dataset.get("Rows") or not dataset.get("Columns"):
        problem = "no image in it"
    elif len(orientation) not in (0, 6) or len(corner) not in (0, 3):
        problem = f"ImageOrientationPatient {orientation} or ImagePositionPatient {corner}: damaged"
    elif spacing and (len(spacing) != 2 or min(spacing) <= 0):
        problem = f"PixelSpacing {list(spacing)}, expected two lengths in mm"
    orientation = orientation if len(orientation) == 6 else UPRIGHT
    if problem is None and abs(np.cross(orientation[:3], orientation[3:])[2]) < AXIAL:
        problem = "not axial"
    elif problem is None and max(abs(orientation[0]), abs(orientation[1])) < AXIAL:
        problem = "turned within its plane, expected rows along one of the patient's axes"
    elif problem is None and len(corner) != 3:
        problem = NO_PLACE
    return Header(
        path,
        frame,
        frames,
        str(dataset.get("SeriesInstanceUID") or f"without UID in {path.parent}"),
        str(dataset.get("StudyInstanceUID") or f"without UID in {path.parent}"),
        " ".join(_text(dataset, "PatientID")),
        " ".join(_text(dataset, "PatientName")),
        tuple(" ".join(_text(dataset, n)) for n in ("PatientBirthDate", "PatientSex")),
        f"{dataset.get('SOPInstanceUID') or path} {frame}",
        tuple(_number(dataset, name) for name in ("AcquisitionNumber", "InstanceNumber")),
        _location(dataset),
        orientation,
        corner,
        spacing or None,
        (int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)),
        dataset.get("PhotometricInterpretation") == "MONOCHROME1",
        "DERIVED" in image_type.split(),
        (),
        problem,
    )


def arrange(headers: list[Header]) -> tuple[list[Header], list[tuple[str, str]], list[str]]:
    """One series from head to feet; what is left out of it, as (file, reason); notes.

    Slices that differ from most others in orientation, matrix or pixel spacing are left out, and
    so are copies and slices at the same position. Raises ValueError for two patients in a series.
    """
    of = "patient" if any(header.patient for header in headers) else "name"
    named = {getattr(header, of): header for header in headers if getattr(header, of)}
    patients = {" ".join(name.split()).casefold(): header for name, header in named.items()}
    if len(patients) > 1:
        found = ", ".join(f"{getattr(h, of)} ({h.path})" for h in patients.values())
        raise ValueError(f"{len(patients)} patients in one series, expected one: {found}")
    headers, notes = _placed(headers)
    left_out = [(header.where, header.problem) for header in headers if header.problem]
    usable = [header for header in headers if not header.problem]
    for what, of, tolerance in (
        ("orientation", lambda header: header.orientation, 0.01),
        ("matrix (rows, columns)", lambda header: header.shape, 0),
        ("pixel spacing in mm", lambda header: header.spacing or (0, 0), 0.002),
    ):
        counts = Counter(tuple(round(number, 2) for number in of(header)) for header in usable)
        most = max(counts, key=counts.get, default=())
        alike = [np.allclose(of(header), most, 0, tolerance + 0.005) for header in usable]
        for header, same in zip(usable, alike, strict=True):
            if not same:
                found = f"{list(of(header))}, not {list(most)}"
                left_out.append((header.where, f"another {what} than most of its series: {found}"))
        usable = [header for header, same in zip(usable, alike, strict=True) if same]

    # From head to feet, each position once.
    usable.sort(key=lambda header: (-header.height, header.number, str(header.path)))
    kept: list[Header] = []
    for header in usable:
        if not kept or kept[-1].height - header.height >= SAME_PLACE:
            kept.append(header)
        elif kept[-1].uid == header.uid:
            left_out.append((header.where, f"a copy: of {kept[-1].where}"))
        else:
            left_out.append((header.where, f"a duplicate: at the position of {kept[-1].where}"))

    return kept, left_out, notes + _notes(kept)


def _placed(headers: list[Header]) -> tuple[list[Header], list[str]]:
    """Slices that all lack a position, one behind the other by their InstanceNumber; a note.

    By SliceLocation where the numbers do not tell. Positions that are all 0 are none.
    """
    usable = [h for h in headers if h.problem in (None, NO_PLACE)]
    if len(usable) < 2 or any(header.problem is None and any(header.corner) for header in usable):
        return headers, []
    orders = {
        "InstanceNumber": [(header.number[1], header.frame) for header in usable],
        "SliceLocation": [(-header.location, header.frame) for header in usable],
    }
    what = next((name for name, order in orders.items() if len({*order}) == len(usable)), None)
    if what is None:
        return headers, []
    places = dict(zip(map(id, usable), orders[what], strict=True))
    ranks = {place: rank for rank, place in enumerate(sorted(orders[what]))}
    placed = [
        replace(header, corner=(0.0, 0.0, -float(ranks[places[id(header)]])), problem=None)
        if id(header) in places
        else header
        for header in headers
    ]
    return placed, [
        f"{usable[0].where}: {len(usable)} slices without ImagePositionPatient are taken in the "
        f"order of {what}, from head to feet, and upright as their ImageOrientationPatient says, "
        "where they have one; look at them"
    ]


def _notes(kept: list[Header]) -> list[str]:
    """What is odd about a series in order: gaps, slices close together."""
    steps = -np.diff([header.height for header in kept])
    usual = float(np.median(steps)) if len(steps) else 0.0
    notes = [
        f"{kept[i].where}: a gap of {steps[i]:.1f} mm to the next slice, {usual:.1f} mm is usual "
        "here: slices are missing"
        for i in np.flatnonzero(steps > 1.5 * usual)
    ]
    if len(steps) and steps.min() < 0.5 * usual:
        i = int(steps.argmin())
        notes.append(
            f"{kept[i].where}: {steps[i]:.1f} mm to the next slice, {usual:.1f} mm is usual here: "
            "are these two acquisitions in one series?"
        )
    return notes


def remarks(headers: list[Header]) -> list[str]:
    """Notes on slices of many series: what their headers say, and what is made of it."""
    notes = []
    for found, what in (
        ([h for h in headers if h.inverted], "say MONOCHROME1: how to display, not what is stored; "
         "they are taken as HU"),
        ([h for h in headers if h.derived], "say DERIVED: their HU may have been computed of "
         "others; look at them"),
        ([h for h in headers if h.warned], "have elements that DICOM does not allow"),
    ):  # fmt: skip
        if found:
            first = found[0]
            detail = f": {first.warned[0]}" if what.startswith("have") else ""
            notes.append(f"{len(found)} DICOM slices, as {first.where}, {what}{detail}")
    return notes
