"""DICOM: stored values to HU, and writing a slice that nobody takes for a patient's."""

import datetime
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut, pixel_array
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AIR = -1000.0  # HU
OUTSIDE = -1500.0  # HU: no air is as dark, only marks of what is outside of the field of view


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
    if scale.get("RescaleType", "HU") not in ("HU", "US", "", None):
        raise ValueError(f"RescaleType {scale.RescaleType}, expected HU")

    # Values as stored; bits above BitsStored, where old files keep overlays, are cut off.
    stored = pixel_array(dataset, index=frame)
    if stored.dtype.kind in "iu":
        spare = 8 * stored.dtype.itemsize - int(dataset.get("BitsStored", 8 * stored.itemsize))
        stored = (stored << spare) >> spare
    if lut:
        hu = apply_modality_lut(stored, dataset).astype(np.float32)
    else:
        hu = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    hu[_padding(dataset, stored) | (hu < OUTSIDE)] = AIR
    return hu


def _padding(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Where the stored values are padding (PS3.3 C.7.5.1.1.2), bool (H, W)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit", value)
    # The two may be encoded unsigned though the pixels are signed, or the other way round.
    ends = [int(np.array(int(end)).astype(stored.dtype)) for end in (value, limit)]
    return (stored >= min(ends)) & (stored <= max(ends))


def synthetic_dicom(stored: np.ndarray, window: tuple[float, float], spacing: float, name: str):
    """A CT Image Storage data set of int16 HU (H, W), marked as synthetic in several places."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    now = datetime.datetime.now()
    dataset.StudyDate = dataset.ContentDate = now.strftime("%Y%m%d")
    dataset.StudyTime = dataset.ContentTime = now.strftime("%H%M%S")
    dataset.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    dataset.Modality, dataset.Manufacturer = "CT", "FibLDM"
    dataset.PatientName, dataset.PatientID = "SYNTHETIC^FIBLDM", f"SYNTHETIC-{Path(name).stem}"
    dataset.PatientBirthDate = dataset.PatientSex = ""
    dataset.AccessionNumber = dataset.ReferringPhysicianName = dataset.StudyID = ""
    dataset.SeriesDescription = "SYNTHETIC by FibLDM, not a patient"
    dataset.ImageComments = "Synthetic image made by a generative model. Not for diagnosis."
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = generate_uid(), ""
    dataset.SeriesNumber, dataset.InstanceNumber, dataset.AcquisitionNumber = 1, 1, 1
    dataset.KVP = ""
    dataset.ImagePositionPatient = [0, 0, 0]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.SliceThickness = [spacing, spacing], spacing
    dataset.WindowCenter, dataset.WindowWidth = sum(window) / 2, window[1] - window[0]
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, 0, "HU"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.PixelData = stored.astype("<i2").tobytes()
    return dataset
