"""Synthetic slices as PNG, NPY, NIfTI and DICOM files, all in HU."""

import hashlib
import io
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from fibldm import __version__, disk
from fibldm.ct import (
    PNG_LEVELS,
    DatasetInfo,
    Window,
    read_dataset_info,
    unit_to_hu,
    write_dataset_info,
)

FORMATS = ("png", "npy", "nifti", "dicom")
SUFFIXES = {"png": ".png", "npy": ".npy", "nifti": ".nii.gz", "dicom": ".dcm"}


def synthetic_dicom(
    stored: np.ndarray,
    window: tuple[float, float],
    spacing: float,
    name: str,
    run: str = "",
    number: int = 0,
    comment: str = "",
) -> pydicom.Dataset:
    """A CT Image Storage data set of int16 HU (H, W), marked as synthetic in many places.

    Pixels are squares of `spacing` mm. What has the same `run` is one study; each data set is a
    series of its own, series number `number` + 1, so that no viewer stacks slices that have
    nothing to do with each other. The UIDs follow from all that is given and no date is written,
    so the same call gives the same bytes.
    """
    dataset, meta = pydicom.Dataset(), pydicom.dataset.FileMetaDataset()
    content = [name, repr((window, spacing, stored.shape)), comment, stored.tobytes().hex()]
    study = generate_uid(entropy_srcs=["study", run])
    series, instance, frame = (
        generate_uid(entropy_srcs=[what, run, *content]) for what in ("series", "image", "frame")
    )
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    dataset.SpecificCharacterSet = "ISO_IR 192"

    # Synthetic beyond doubt. A study has one patient, so the id is the run's. The attribute
    # SyntheticData (0008,001C) is too new: dciodvfy of dicom3tools takes it for an error.
    program = {"Manufacturer": "FibLDM", "ManufacturerModelName": "FibLDM"}
    program["SoftwareVersions"] = __version__
    not_real = "SYNTHETIC image made by a generative model, of no patient. Not for diagnosis."
    dataset.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    dataset.PatientName = "SYNTHETIC^FIBLDM"
    dataset.PatientID = "SYNTHETIC-" + hashlib.sha256(run.encode()).hexdigest()[:12]
    dataset.PatientComments = not_real
    dataset.StudyID = "SYNTHETIC"
    dataset.StudyDescription = "SYNTHETIC chest CT by FibLDM, no patient"
    dataset.SeriesDescription = f"SYNTHETIC by FibLDM, no patient: {Path(name).stem}"[:64]
    dataset.ImageComments = f"{not_real} {comment}".strip()
    dataset.DerivationDescription = (
        f"Synthesized by the latent diffusion model FibLDM {__version__}; derived from no image."
    )
    equipment = pydicom.Dataset()
    equipment.update(program)
    equipment.ContributionDescription = "Synthesized this image; no scanner was involved."
    purpose = pydicom.Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "109102", "DCM"
    purpose.CodeMeaning = "Processing Equipment"
    equipment.PurposeOfReferenceCodeSequence = [purpose]
    dataset.ContributingEquipmentSequence = [equipment]
    dataset.update(program)

    # What the standard wants to be there, known or not.
    unknown = "PatientBirthDate PatientSex AccessionNumber ReferringPhysicianName StudyDate"
    for keyword in f"{unknown} StudyTime KVP PositionReferenceIndicator".split():
        setattr(dataset, keyword, None)
    dataset.Modality, dataset.BodyPartExamined, dataset.PatientPosition = "CT", "CHEST", "HFS"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
    dataset.FrameOfReferenceUID = frame
    dataset.SeriesNumber, dataset.InstanceNumber, dataset.AcquisitionNumber = number + 1, 1, 1
    dataset.BurnedInAnnotation = "NO"

    # Where the pixels lie: axial, the patient's right at the left, the front at the top.
    millimetres = format_number_as_ds(float(spacing))
    dataset.ImagePositionPatient = [0, 0, 0]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.SliceThickness = [millimetres, millimetres], millimetres

    # HU, and how to show them: viewers open the first window.
    low, high = window
    windows = {"LUNG": (-600, 1500), "MEDIASTINUM": (40, 400)}
    windows["DATA"] = (low + high) / 2, high - low
    dataset.WindowCenter = [format_number_as_ds(float(center)) for center, _ in windows.values()]
    dataset.WindowWidth = [format_number_as_ds(float(width)) for _, width in windows.values()]
    dataset.WindowCenterWidthExplanation = list(windows)
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, 0, "HU"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.PixelData = stored.astype("<i2").tobytes()
    return dataset


def png_info(window: Window, spacing: float | None = None) -> DatasetInfo:
    """What dataset.json must say beside PNG files of `write_slice`, for their HU to be read."""
    return DatasetInfo(((window[1] - window[0]) / PNG_LEVELS, window[0]), spacing)


def format_of(path: Path) -> str:
    """The format that a file's name asks for; ValueError where it asks for none of them."""
    for name, suffix in SUFFIXES.items():
        if path.name.lower().endswith(suffix):
            return name
    raise ValueError(f"{path}: expected a name that ends in {', '.join(SUFFIXES.values())}")


def require_scale(folder: Path, window: Window, spacing: float | None = None) -> None:
    """See to it that the folder's dataset.json gives the HU of PNG files of `write_slice`.

    It is written where there is none; ValueError where it is of images with another scale.
    """
    expected, found = png_info(window, spacing), read_dataset_info(folder)
    if found.rescale is None:
        write_dataset_info(folder, expected)
    elif found.rescale != expected.rescale:
        raise ValueError(f"{folder} holds a dataset.json of other images; use another folder")


def write_slice(
    path: Path,
    image: np.ndarray,
    window: Window,
    file_format: str,
    spacing: float = 1.0,
    run: str = "",
    number: int = 0,
    comment: str = "",
) -> None:
    """Write one slice (H, W), in [-1, 1] over `window`; what is read back is the same to 1 HU.

    "png" holds the window over 0 to 65535: in 8 bits, 1400 HU would become steps of 5.5 HU. Its
    HU are read with `png_info` beside it. "npy" is float32 HU; "nifti" and "dicom" int16 HU with
    pixels of `spacing` mm. `run`, `number` and `comment` go into DICOM: see `synthetic_dicom`.
    """
    image = np.clip(image, -1, 1)
    if file_format == "png":
        pixels = np.round((image.astype(np.float64) + 1) * (PNG_LEVELS / 2)).astype(np.uint16)
        disk.write_atomically(path, Image.fromarray(pixels).save)
        return
    hu = unit_to_hu(image, window)
    if file_format == "npy":
        file = io.BytesIO()  # np.save by itself does not say that a disk is full
        np.save(file, hu)
        disk.write_atomically(path, lambda temporary: temporary.write_bytes(file.getvalue()))
        return
    stored = np.round(hu).astype(np.int16)
    if file_format == "nifti":
        # NIfTI's axes point to the patient's right, front and head: the image's x and y turned.
        affine = np.diag([-spacing, -spacing, spacing, 1.0])
        volume = nibabel.Nifti1Image(stored.T[:, :, None], affine)
        volume.set_sform(affine, code="scanner")
        volume.set_qform(affine, code="scanner")
        volume.header.set_xyzt_units("mm")
        volume.header["descrip"] = "SYNTHETIC by FibLDM, of no patient. Not for diagnosis."
        disk.write_atomically(path, lambda temporary: nibabel.save(volume, temporary))
    elif file_format == "dicom":
        dataset = synthetic_dicom(stored, window, spacing, path.name, run, number, comment)
        disk.write_atomically(
            path, lambda temporary: dataset.save_as(temporary, enforce_file_format=True)
        )
    else:
        raise ValueError(f"format {file_format!r}; expected one of {', '.join(FORMATS)}")
