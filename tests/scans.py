"""Scans of synthetic patients in the formats that users have, for the tests of data in and out."""

from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)

from fibldm.phantom import phantom_slice

LEVELS = (0.15, 0.35, 0.55, 0.75, 0.95)
SIZE = 64
SPACING = 5.6  # mm of a pixel
STEP = 40.0  # mm between slices


@cache
def scan(patient: int = 0) -> np.ndarray:
    """HU (5, 64, 64) int16 of a synthetic patient, from head to feet, upright."""
    slices = [phantom_slice(patient, level, SIZE)[0] for level in LEVELS]
    volume = np.round(np.stack(slices)).astype(np.int16)
    volume.setflags(write=False)
    return volume


@cache
def lungs(patient: int = 0) -> np.ndarray:
    """The lungs of `scan`, bool (5, 64, 64)."""
    return np.stack([phantom_slice(patient, level, SIZE)[1] for level in LEVELS])


def ct_dataset(hu: np.ndarray, height: float = 0.0, **elements) -> pydicom.Dataset:
    """A CT slice as a scanner writes it: unsigned 12 bits of 16, HU = stored - 1024."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientID, dataset.PatientName = "MRN-4711", "Muster^Erika"
    dataset.PatientBirthDate, dataset.InstitutionName = "19500101", "St. Elsewhere"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    dataset.AcquisitionNumber, dataset.InstanceNumber = 1, 1
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [-180, -180, height]
    dataset.PixelSpacing = [SPACING, SPACING]
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = hu.shape[-2:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = (np.clip(hu, -1024, 3071) + 1024).astype("<u2").tobytes()
    if "PatientID" in elements:  # no study is of two patients
        dataset.StudyInstanceUID = generate_uid(entropy_srcs=[elements["PatientID"]])
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def ct_datasets(patient: int = 0, **elements) -> list[pydicom.Dataset]:
    """A series, from head to feet."""
    return [
        ct_dataset(hu, 300 - STEP * i, InstanceNumber=i + 1, **elements)
        for i, hu in enumerate(scan(patient))
    ]


def write_dicom(folder: Path, datasets: list[pydicom.Dataset]) -> list[Path]:
    """One file a data set, named so that neither name nor suffix tells the order or the format."""
    folder.mkdir(parents=True, exist_ok=True)
    prime = 11 if len(datasets) <= 11 else 1009
    paths = [folder / f"IM{7 * i % prime:03d}" for i in range(len(datasets))]
    for path, dataset in zip(paths, datasets, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    return paths


def enhanced(patient: int = 0) -> pydicom.Dataset:
    """The series as one enhanced multi-frame data set, its frames from feet to head."""
    volume = scan(patient)[::-1]
    dataset = ct_dataset(volume)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = EnhancedCTImageStorage
    dataset.NumberOfFrames = len(volume)
    for name in ("RescaleSlope", "RescaleIntercept", "RescaleType", "PixelSpacing"):
        delattr(dataset, name)
    del dataset.ImageOrientationPatient, dataset.ImagePositionPatient

    def item(**elements) -> pydicom.Dataset:
        part = pydicom.Dataset()
        for name, value in elements.items():
            setattr(part, name, value)
        return part

    dataset.SharedFunctionalGroupsSequence = [
        item(
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
            PixelMeasuresSequence=[item(PixelSpacing=[SPACING, SPACING])],
            PixelValueTransformationSequence=[
                item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
            ],
        )
    ]
    dataset.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[-180, -180, STEP * i])])
        for i in range(len(volume))
    ]
    return dataset


def nifti(
    volume: np.ndarray, codes: str = "LPS", spacing: tuple[float, float] = (SPACING, SPACING)
) -> nibabel.Nifti1Image:
    """A volume (D, H, W), head to feet and upright, as NIfTI with axes of another orientation."""
    image = nibabel.Nifti1Image(
        np.ascontiguousarray(volume.T[:, :, ::-1]),  # to the left, back, head
        np.diag([-spacing[1], -spacing[0], STEP, 1.0]),
    )
    start = nibabel.io_orientation(image.affine)
    turn = nibabel.orientations.ornt_transform(start, nibabel.orientations.axcodes2ornt(codes))
    return image.as_reoriented(turn)
