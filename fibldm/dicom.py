"""DICOM: what a file holds, in HU, which files make a series, and decoders of compressed pixels."""

import struct
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from pydicom import uid
from pydicom.pixels import apply_modality_lut, get_decoder, pixel_array
from pydicom.pixels.decoders.base import DecodeRunner
from tqdm import tqdm

from fibldm import limits

AIR = -1000.0  # HU
AXIAL = 0.94  # cosine: slices may be tilted by 20 degrees
SAME_PLACE = 0.01  # mm
OUTSIDE = -1500.0  # HU: no air is as dark, only marks of what is outside of the field of view


class _Deflatable(limits.Bounded):
    """A file of which pydicom reads all the rest at once only to inflate it, without a limit."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if size is None or size < 0:
            limits.require_inflatable(content, limits.DEFLATED)
        return content


def read_file(path: Path, **options: Any) -> pydicom.Dataset:
    """`pydicom.dcmread`, of files that lack a header, too; ValueError where a deflated one would
    fill the memory.
    """
    with _Deflatable(path) as file:
        dataset = pydicom.dcmread(file, force=True, **options)
    if "TransferSyntaxUID" not in dataset.file_meta:  # DICOM's default
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    return dataset


def group(dataset: pydicom.Dataset, name: str, frame: int) -> pydicom.Dataset:
    """The functional group `name` of a frame of an enhanced multi-frame data set (PS3.3 C.7.6.16).

    The frame's own, else the shared one; the data set itself where it has neither, as a
    single-frame image keeps the same attributes at its top.
    """
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for groups in [*per_frame[frame : frame + 1], *shared[:1]]:
        if groups.get(name):
            return groups[name][0]
    return dataset


def read_frame(dataset: pydicom.Dataset, frame: int = 0) -> np.ndarray:
    """HU, float32 (H, W), of one frame; what is outside of the field of view as AIR.

    MONOCHROME1 says how to display, not what is stored, and changes nothing. Raises ValueError
    where HU cannot be told: no pixel data, colour, no rescale slope and intercept, slope 0.
    """
    if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ValueError("no pixel data")
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise ValueError(f"{dataset.SamplesPerPixel} values a pixel (colour), expected 1")
    scale = group(dataset, "PixelValueTransformationSequence", frame)
    slope, intercept = scale.get("RescaleSlope"), scale.get("RescaleIntercept")
    lut = dataset.get("ModalityLUTSequence")
    if not lut and (slope is None or intercept is None):
        raise ValueError("no RescaleSlope and RescaleIntercept, expected both: its HU are unknown")
    if not lut and (slope == 0 or not np.isfinite([float(slope), float(intercept)]).all()):
        raise ValueError(f"RescaleSlope {slope} and RescaleIntercept {intercept}: no HU follow")
    if str(scale.get("RescaleType") or "HU").upper() not in ("HU", "HOUNSFIELD", "US"):
        raise ValueError(f"RescaleType {scale.RescaleType}, expected HU")

    # Values as stored; bits above BitsStored, where old files keep overlays, are cut off, also of
    # the padding's value.
    sides = [int(dataset.get(name) or 0) for name in ("Rows", "Columns")]
    if min(sides) < 1 or sides[0] * sides[1] > limits.SLICE:
        raise ValueError(f"{sides[0]}x{sides[1]} pixels, expected at most {limits.SLICE:,}")
    plugin = plugin_for(dataset.file_meta.get("TransferSyntaxUID"))
    stored = pixel_array(dataset, index=frame, decoding_plugin=plugin)
    spare = 0
    if stored.dtype.kind in "iu":
        spare = 8 * stored.dtype.itemsize - int(dataset.get("BitsStored", 8 * stored.itemsize))
        stored = (stored << spare) >> spare
    if lut:
        hu = apply_modality_lut(stored, dataset).astype(np.float32)
    else:
        hu = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    hu[_padding(dataset, stored, spare) | (hu < OUTSIDE)] = AIR
    if not np.isfinite(hu).all():
        raise ValueError(f"{int((~np.isfinite(hu)).sum())} values are not finite")
    return hu


def _padding(dataset: pydicom.Dataset, stored: np.ndarray, spare: int) -> np.ndarray:
    """Where the stored values are padding (PS3.3 C.7.5.1.1.2), bool (H, W)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    ends = [value, dataset.get("PixelPaddingRangeLimit", value)]
    if stored.dtype.kind in "iu":
        # They may be encoded unsigned though the pixels are signed, or the other way round.
        ends = (np.array([int(end) for end in ends]).astype(stored.dtype) << spare) >> spare
    return (stored >= min(ends)) & (stored <= max(ends))


@dataclass(frozen=True)
class Header:
    """What places one slice, a file or a frame of a multi-frame file, among the others.

    `orientation` holds the direction cosines of a row and of a column, `corner` the first pixel's
    position in mm (x to the patient's left, y to the back, z to the head); `spacing` is mm between
    rows and between columns. `patient` is "" without a PatientID and a name, `person` birth date
    and sex, each "" where unknown. `problem` says why it can't be used, where it can't.
    """

    path: Path
    frame: int
    frames: int
    series: str
    study: str
    patient: str
    person: tuple[str, str]
    uid: str
    number: tuple[int, int]
    orientation: tuple[float, ...]
    corner: tuple[float, ...]
    spacing: tuple[float, ...] | None
    shape: tuple[int, int]
    inverted: bool
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
    *("Manufacturer", "SeriesDescription", "PatientBirthDate", "PatientSex"),
    *_PLACE,
    *_SEQUENCES,
)


def read_headers(path: Path) -> list[Header]:
    """The slices of a DICOM file; ValueError where it is none or can't be read."""
    try:
        dataset = read_file(path, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS))
        if "SOPClassUID" not in dataset and "Modality" not in dataset:
            if "DirectoryRecordSequence" in dataset:
                raise ValueError("a DICOMDIR, the index of a folder")
            raise ValueError("not a DICOM image, or one cut short within its header")
        frames = int(dataset.get("NumberOfFrames") or 1)
        described = len(dataset.get("PerFrameFunctionalGroupsSequence") or [])
        if frames != max(1, described):
            raise ValueError(f"NumberOfFrames {frames}, but {described} frames are described")
        return [_header(path, dataset, frame, frames) for frame in range(frames)]
    except Exception as error:  # pydicom raises anything on damaged files
        raise ValueError(f"{path}: {error}") from error


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


def _header(path: Path, dataset: pydicom.Dataset, frame: int, frames: int) -> Header:
    orientation, corner, spacing = (
        tuple(float(number) for number in group(dataset, name, frame).get(attribute) or ())
        for name, attribute in zip(
            ("PlaneOrientationSequence", "PlanePositionSequence", "PixelMeasuresSequence"),
            _PLACE,
            strict=True,
        )
    )
    kind = group(dataset, "CTImageFrameTypeSequence", frame)
    image_type = kind.get("FrameType") or dataset.get("ImageType") or []
    image_type = [image_type] if isinstance(image_type, str) else image_type
    image_type = {str(part).upper() for part in image_type}
    patient = str(dataset.get("PatientID") or dataset.get("PatientName") or "").strip()
    problem = None
    if dataset.get("Modality") != "CT":
        problem = f"not CT: modality {dataset.get('Modality') or 'unknown'}"
    elif str(dataset.get("Manufacturer")) == "FibLDM":
        problem = f"synthetic: {dataset.get('SeriesDescription') or 'made by FibLDM'}"
    elif image_type & {"LOCALIZER", "SCOUT"}:
        problem = "a localizer"
    elif not dataset.get("Rows") or not dataset.get("Columns"):
        problem = "no image in it"
    elif len(orientation) != 6 or len(corner) != 3:
        problem = "no ImageOrientationPatient or ImagePositionPatient: its place is unknown"
    elif spacing and (len(spacing) != 2 or min(spacing) <= 0):
        problem = f"PixelSpacing {list(spacing)}, expected two lengths in mm"
    elif abs(np.cross(orientation[:3], orientation[3:])[2]) < AXIAL:
        problem = "not axial"
    elif max(abs(orientation[0]), abs(orientation[1])) < AXIAL:
        problem = "turned within its plane, expected rows along one of the patient's axes"
    return Header(
        path,
        frame,
        frames,
        str(dataset.get("SeriesInstanceUID") or f"without UID in {path.parent}"),
        str(dataset.get("StudyInstanceUID") or f"without UID in {path.parent}"),
        patient,
        tuple(str(dataset.get(key) or "") for key in ("PatientBirthDate", "PatientSex")),
        f"{dataset.get('SOPInstanceUID') or path} {frame}",
        tuple(int(dataset.get(key) or 0) for key in ("AcquisitionNumber", "InstanceNumber")),
        orientation,
        corner,
        spacing or None,
        (int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)),
        dataset.get("PhotometricInterpretation") == "MONOCHROME1",
        problem,
    )


def arrange(headers: list[Header]) -> tuple[list[Header], list[tuple[str, str]], list[str]]:
    """One series from head to feet; what is left out of it, as (file, reason); notes.

    Slices that differ from most others in orientation, matrix or pixel spacing are left out, and
    so are copies and slices at the same position. Raises ValueError for two patients in a series.
    """
    named = [header for header in headers if header.patient]
    patients = {" ".join(h.patient.split()).casefold(): h for h in named}
    if len(patients) > 1:
        found = ", ".join(f"{header.patient} ({header.path})" for header in patients.values())
        raise ValueError(f"{len(patients)} patients in one series, expected one: {found}")
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

    return kept, left_out, _notes(kept)


def _notes(kept: list[Header]) -> list[str]:
    """What is odd about a series in order: how it is displayed, gaps, slices close together."""
    notes = [
        f"{header.where}: MONOCHROME1 says how to display, not what is stored; taken as HU"
        for header in kept
        if header.inverted
    ]
    steps = -np.diff([header.height for header in kept])
    usual = float(np.median(steps)) if len(steps) else 0.0
    notes += [
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


def upright(array: np.ndarray, orientation: tuple[float, ...]) -> np.ndarray:
    """An axial slice (H, W) turned: the patient's front at the top, the right side at the left."""
    row, column = orientation[:3], orientation[3:]
    if abs(row[0]) < abs(row[1]):
        array, row, column = array.T, column, row
    return array[:: 1 if column[1] > 0 else -1, :: 1 if row[0] > 0 else -1]


PLUGIN = "imagecodecs"
DECODERS = {
    uid.JPEGBaseline8Bit: imagecodecs.jpeg8_decode,
    uid.JPEGExtended12Bit: imagecodecs.jpeg8_decode,
    uid.JPEGLossless: imagecodecs.jpeg8_decode,
    uid.JPEGLosslessSV1: imagecodecs.jpeg8_decode,
    uid.JPEGLSLossless: imagecodecs.jpegls_decode,
    uid.JPEGLSNearLossless: imagecodecs.jpegls_decode,
    uid.JPEG2000Lossless: imagecodecs.jpeg2k_decode,
    uid.JPEG2000: imagecodecs.jpeg2k_decode,
}
DECODER_DEPENDENCIES = dict.fromkeys(DECODERS, ("imagecodecs",))  # pydicom asks for it
FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers that size follows


def plugin_for(syntax: str) -> str:
    """Which decoder pydicom is to take, "" where nothing is compressed."""
    if syntax in DECODERS:
        return PLUGIN
    return "pydicom" if syntax == uid.RLELossless else ""


def coded_shape(stream: bytes) -> tuple[int, ...]:
    """Rows and columns by the header of a compressed slice, and its channels where not 1."""
    if stream[:4] == b"\xff\x4f\xff\x51" and len(stream) >= 42:  # JPEG 2000
        right, bottom, left, top = struct.unpack(">4I", stream[8:24])
        shape, channels = (bottom - top, right - left), int.from_bytes(stream[40:42], "big")
        return shape if channels == 1 else (*shape, channels)
    at = 2
    while stream[:2] == b"\xff\xd8" and stream[at : at + 1] == b"\xff" and at + 10 <= len(stream):
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at + 1] in FRAMES:
            rows, columns, channels = struct.unpack(">HHB", stream[at + 5 : at + 10])
            return (rows, columns) if channels == 1 else (rows, columns, channels)
        if length < 2 or 0xD0 <= stream[at + 1] <= 0xD9:
            break
        at += 2 + length
    raise ValueError("compressed pixels without a header: damaged")


def is_available(syntax: str) -> bool:
    """What pydicom asks of a module that decodes."""
    return syntax in DECODERS


def decode_frame(stream: bytes, runner: DecodeRunner) -> bytes:
    """A compressed slice -> its values as stored, for pydicom."""
    expected = runner.rows, runner.columns
    found = coded_shape(stream)  # before the decoder takes memory by it
    if found == expected:
        frame = DECODERS[runner.transfer_syntax](stream)
        found = frame.shape
    if found != expected:
        raise ValueError(f"compressed pixels of shape {found}, expected {expected}")
    runner.set_option("bits_allocated", 8 * frame.itemsize)
    return frame.tobytes()


for syntax in DECODERS:
    get_decoder(syntax).add_plugin(PLUGIN, (__name__, "decode_frame"))
