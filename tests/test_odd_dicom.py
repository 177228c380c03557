"""DICOM files that stray from the standard, or use what few do: read rightly, or refused."""

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.encaps import encapsulate
from scans import SIZE, ct_dataset, ct_datasets, enhanced, scan, write_dicom
from test_prepare_data import assert_is_the_scan, prepare, rows_of, volume_of

from fibldm import dicom, volumes


def stored_of(dataset: pydicom.Dataset) -> np.ndarray:
    return np.frombuffer(dataset.PixelData, "<u2").reshape(SIZE, SIZE)


def in_boxes(values):
    return imagecodecs.jpeg2k_encode(values, codecformat="jp2", reversible=True, level=0)


def plain_2000(values):
    return imagecodecs.jpeg2k_encode(values, codecformat="j2k", reversible=True, level=0)


def high_throughput(values):
    return imagecodecs.htj2k_encode(values, reversible=True)


def lossy_12_bits(values):
    return imagecodecs.jpeg8_encode(values, level=100, bitspersample=12)


CODECS = {
    "JPEG Lossless": (uid.JPEGLosslessSV1, imagecodecs.ljpeg_encode),
    "JPEG Lossless, any predictor": (uid.JPEGLossless, imagecodecs.ljpeg_encode),
    "JPEG-LS": (uid.JPEGLSLossless, imagecodecs.jpegls_encode),
    "JPEG 2000": (uid.JPEG2000Lossless, plain_2000),
    "JP2": (uid.JPEG2000Lossless, in_boxes),
    "HTJ2K": (uid.HTJ2KLossless, high_throughput),
    "HTJ2K, RPCL": (uid.HTJ2KLosslessRPCL, high_throughput),
    "HTJ2K, not lossless": (uid.HTJ2K, high_throughput),
    "JPEG, 12 bits": (uid.JPEGExtended12Bit, lossy_12_bits),
}


def compressed(codec: str, change=lambda stream: stream) -> list[pydicom.Dataset]:
    """The scan's slices, `change` done to the stream of the third."""
    syntax, encode = CODECS[codec]
    datasets = ct_datasets()
    for i, dataset in enumerate(datasets):
        stream = bytes(encode(stored_of(dataset)))
        dataset.PixelData = encapsulate([change(stream) if i == 2 else stream])
        dataset.file_meta.TransferSyntaxUID = syntax
    return datasets


@pytest.mark.parametrize("codec", CODECS)
def test_codecs_give_what_was_stored(tmp_path, codec):
    write_dicom(tmp_path / "in", compressed(codec, lambda stream: stream + bytes(7)))
    assert_is_the_scan(prepare(tmp_path / "in"), 16 if codec == "JPEG, 12 bits" else 0)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("share", [0.5, 0.9, 0.995])
def test_a_stream_that_ends_early_is_left_out(tmp_path, capsys, codec, share):
    """Some decoders make up the rest; in a file it is filled up by zeros, or is not there."""

    def cut(stream):
        kept = stream[: int(len(stream) * share)]
        return kept + bytes(len(stream) - len(kept)) if share == 0.9 else kept

    write_dicom(tmp_path / "in", compressed(codec, cut))
    data = prepare(tmp_path / "in")
    np.testing.assert_allclose(volume_of(data), scan()[[0, 1, 3, 4]], atol=16)
    printed = capsys.readouterr().out
    assert "all available plugins" not in printed and "IM003" in printed


@pytest.mark.parametrize(
    "elements",
    [
        {"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MIP"]},
        {"ImageType": ["DERIVED", "SECONDARY", "MIN_IP"]},
        {"ImageType": ["DERIVED", "SECONDARY", "MPR", "MINIP_THIN"]},
        {"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE"]},
        {"ImageType": ["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"]},
        {"ImageType": ["DERIVED", "SECONDARY", "VRT"]},
        {"SeriesDescription": "Lunge 10mm MIP ax"},
        {"DerivationDescription": "max-ip over 8 mm"},
        {"SeriesDescription": "AxialMIP10"},
        {"SeriesDescription": "MaxIntProj"},
        {"SeriesDescription": "Iodine map"},
        {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 MIP10"]},
        {"VolumeBasedCalculationTechnique": "MAX_IP"},
    ],
)
def test_what_is_computed_of_several_slices_is_left_out(tmp_path, capsys, elements):
    write_dicom(tmp_path / "in" / "a", ct_datasets())
    write_dicom(tmp_path / "in" / "b", ct_datasets(1, SeriesInstanceUID="1.9", **elements))
    assert_is_the_scan(prepare(tmp_path / "in"))
    assert "5  computed of several slices" in capsys.readouterr().out


def test_what_else_is_derived_is_taken_and_said(tmp_path, capsys):
    words = "Maximum inspiration 1 mm, minimum dose"
    derived = {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"], "SeriesDescription": words}
    write_dicom(tmp_path / "in", ct_datasets(**derived))
    assert_is_the_scan(prepare(tmp_path / "in"))
    assert "5 DICOM slices" in (printed := capsys.readouterr().out) and "say DERIVED" in printed


def raw(path, name: str, value: bytes) -> None:
    """Put a value into a file that pydicom would not write."""
    dataset = pydicom.dcmread(path)
    marker = ("8" * len(value)).encode()
    setattr(dataset, name, marker.decode())
    dataset.save_as(path, enforce_file_format=True)
    content = path.read_bytes()
    assert content.count(marker) == 1
    path.write_bytes(content.replace(marker, value))


@pytest.mark.parametrize("name", ["InstanceNumber", "AcquisitionNumber"])
@pytest.mark.parametrize("value", [b"1A000001", b"n/a     ", b"1.500000", b"999999999999"])
def test_numbers_that_are_none_matter_only_where_they_are_needed(tmp_path, name, value):
    for path in write_dicom(tmp_path / "in", ct_datasets()):
        raw(path, name, value)
    assert_is_the_scan(prepare(tmp_path / "in"))


def test_what_is_warned_of_pixels_is_counted(tmp_path, capsys, recwarn):
    datasets = ct_datasets()
    for i, dataset in enumerate(datasets):
        dataset.PixelData += bytes(100 + 2 * i)
    write_dicom(tmp_path / "in", datasets)
    assert_is_the_scan(prepare(tmp_path / "in"))
    printed = capsys.readouterr()
    assert "5 warnings while its files were read" in printed.out
    assert not printed.err.count("Warning") and not len(recwarn)


def test_what_pydicom_warns_of_is_counted(tmp_path, capsys, recwarn):
    for path in write_dicom(tmp_path / "in", ct_datasets()):
        raw(path, "InstanceNumber", b"1A000001")
    prepare(tmp_path / "in")
    printed = capsys.readouterr()
    notes = [line for line in printed.out.splitlines() if "DICOM does not allow" in line]
    assert len(notes) == 1 and "5 DICOM slices" in notes[0] and "IS" in notes[0]
    assert not printed.err.count("Invalid value") and not len(recwarn)


@pytest.mark.parametrize("orientation", [True, False])
@pytest.mark.parametrize("by", ["InstanceNumber", "from 0", "below 0", "SliceLocation", "zeros"])
def test_without_positions_instance_numbers_order(tmp_path, capsys, orientation, by):
    datasets = ct_datasets()
    for i, dataset in enumerate(datasets):
        del dataset.ImagePositionPatient
        if not orientation:
            del dataset.ImageOrientationPatient
        if by == "SliceLocation":
            dataset.InstanceNumber, dataset.SliceLocation = 1, 100 - 5 * i
        elif by == "zeros":
            dataset.ImagePositionPatient = [0, 0, 0]
        elif by != "InstanceNumber":
            dataset.InstanceNumber = i if by == "from 0" else i - 4
    scout = ct_dataset(scan()[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_dicom(tmp_path / "in", [*datasets, scout])
    assert_is_the_scan(prepare(tmp_path / "in"))
    assert "5 slices without ImagePositionPatient" in capsys.readouterr().out


def test_without_positions_and_numbers_the_order_is_unknown(tmp_path):
    datasets = ct_datasets()
    for dataset in datasets:
        del dataset.ImagePositionPatient
        dataset.InstanceNumber = 1
    write_dicom(tmp_path / "in", datasets)
    with pytest.raises(ValueError, match="its place is unknown"):
        prepare(tmp_path / "in")


def with_tissue_as_padding(value: int, intercept: int) -> pydicom.Dataset:
    """Signed pixels; padding of a value that tissue has, too."""
    hu = scan()[2].copy()
    hu[20:30, 30] = value + intercept
    hu[:3] = value + intercept
    stored = (hu - intercept).astype("<i2")
    signed = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15}
    signed |= {"RescaleIntercept": intercept, "PixelData": stored.tobytes()}
    dataset = ct_dataset(hu, **signed)
    dataset.add_new("PixelPaddingValue", "SS", value)
    return dataset


@pytest.mark.parametrize(("value", "intercept"), [(0, 0), (1024, -1024), (100, 0)])
def test_padding_is_tissue_but_at_the_border(value, intercept):
    hu = dicom.read_frame(with_tissue_as_padding(value, intercept))
    assert (hu[:3] == dicom.AIR).all() and (hu[20:30, 30] == value + intercept).all()


@pytest.mark.parametrize("signed", [False, True])
def test_values_beyond_bits_stored_are_values(signed):
    hu = scan()[2].astype(np.int32)
    hu[20:22, 20:22], hu[24, 24] = 9000, 3500
    dataset = ct_dataset(scan()[2])
    stored = hu if signed else hu + 1024
    dataset.PixelRepresentation = int(signed)
    dataset.RescaleIntercept = 0 if signed else -1024
    dataset.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()
    np.testing.assert_array_equal(dicom.read_frame(dataset), np.maximum(hu, -1024))


@pytest.mark.parametrize("name", ["scan.png", "scan.npy", "scan.mat", "scan.tif", "scan.nii", "x"])
@pytest.mark.parametrize("preamble", [True, False])
def test_dicom_is_told_by_its_content(tmp_path, name, preamble):
    (path,) = write_dicom(tmp_path, ct_datasets()[:1])
    content = path.read_bytes()
    (tmp_path / name).write_bytes(content if preamble else content[132:])
    assert volumes.kind_of(tmp_path / name) == "dicom"
    np.testing.assert_array_equal(volumes.read_volume(tmp_path / name).values[0], scan()[0])


def test_what_else_is_named_dicom_is_told_by_its_content(tmp_path):
    np.save(tmp_path / "scan.npy", scan())
    (tmp_path / "scan.npy").rename(tmp_path / "scan.dcm")
    assert volumes.kind_of(tmp_path / "scan.dcm") == "npy"
    assert len(rows_of(prepare(tmp_path, "--output_dir", tmp_path / "data"))) == 5


@pytest.mark.parametrize("codec", ["JPEG Lossless", "JPEG, 12 bits"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_an_end_that_is_put_behind_a_part_is_no_end(tmp_path, capsys, codec, share):
    def cut(stream):
        return stream[: int(len(stream) * share)] + b"\xff\xd9"

    write_dicom(tmp_path / "in", compressed(codec, cut))
    assert len(rows_of(prepare(tmp_path / "in"))) == 4
    assert "compressed pixels end early" in capsys.readouterr().out


@pytest.mark.parametrize("parts", [3, 4, 6, 10])
def test_frames_that_are_lost_or_not_told_are_refused(tmp_path, parts):
    """Else those behind a lost one are taken for others."""
    dataset = enhanced()
    volume = np.frombuffer(dataset.PixelData, "<u2").reshape(5, SIZE, SIZE)
    streams = [bytes(plain_2000(frame)) for frame in volume]
    dataset.PixelData = encapsulate((streams * 2)[:parts], has_bot=False)
    dataset.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless
    write_dicom(tmp_path / "in", [dataset])
    with pytest.raises(ValueError, match="no slice is usable"):
        prepare(tmp_path / "in")
    dataset.PixelData = encapsulate(streams, fragments_per_frame=2)
    write_dicom(tmp_path / "in", [dataset])
    assert_is_the_scan(prepare(tmp_path / "in"))


@pytest.mark.parametrize("packed", [True, False])
def test_frames_without_their_number_are_refused(tmp_path, packed):
    (dataset,) = ct_datasets()[:1]
    stored = stored_of(dataset)
    dataset.PixelData = stored.tobytes() * 3
    if packed:
        dataset.PixelData = encapsulate([bytes(plain_2000(stored))] * 3)
        dataset.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless
    (path,) = write_dicom(tmp_path, [dataset])
    with pytest.raises(ValueError, match="pixel data of 3 frames, but NumberOfFrames is 1"):
        volumes.decode(path)
