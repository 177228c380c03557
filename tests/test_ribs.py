"""Air outside of the ribs is no lung: under the skin, between breasts, beside a cut body."""

import numpy as np
import pytest
from scipy import ndimage as ndi

from fibldm import ct
from fibldm.lungs import lung_mask
from fibldm.phantom import phantom_slice
from fibldm.ribs import outside_of_ribs

LEVELS = (0.3, 0.5, 0.8)


def frame_of(hu, mask):
    """Body, its equivalent diameter in pixels, and rows and columns in units of that, from the
    lungs' middle and the front of the body there."""
    labels, _ = ndi.label(hu > -350)
    body = ndi.binary_fill_holes(labels == np.bincount(labels[labels > 0]).argmax())
    size = 2 * np.sqrt(body.sum() / np.pi)
    y, x = (np.indices(hu.shape) + 0.5) / size
    x -= x[mask].mean()
    y -= y[body & (abs(x) < 0.02)].min()
    return body, size, y, x


def under_the_skin(hu, mask, kind):
    """Pockets in the chest's wall, behind the skin and before the ribs; or a sheet around them."""
    body, size, y, x = frame_of(hu, mask)
    far = ndi.distance_transform_edt(
        ~ndi.binary_closing(np.pad(mask, 99), iterations=20)[99:-99, 99:-99]
    )
    deep = ndi.distance_transform_edt(body)
    wall = body & (far > 0.045 * size) & (deep > 0.02 * size) & (deep < 0.15 * size) & (hu < 120)
    if kind == "pockets":
        where = wall & (np.sin(55 * x) + np.sin(50 * y + 1) > 0.4)
    else:
        where = wall & (far < 0.075 * size) & (np.sin(14 * x + 9 * y) > -0.6)
    soft = ndi.gaussian_filter(where.astype(float), 0.4 * len(hu) / 256)
    air = -850 + 40 * np.sin(97 * x) * np.sin(89 * y)  # as dark as lung
    return (hu + soft * (air - hu)).astype(np.float32), mask, where


def between_breasts(hu, mask, level=-850.0):
    """Two breasts that touch, so that they close a wedge of air before the sternum."""
    body, _, y, x = frame_of(hu, mask)
    breasts = np.zeros_like(body)
    for side in (-1, 1):
        breasts |= np.hypot((x - side * 0.125) / 0.125, (y + 0.075) / 0.12) < 1
    closed = ndi.binary_fill_holes(body | breasts | ((abs(x) < 0.03) & (abs(y + 0.1) < 0.03)))
    hu = np.where((breasts | closed) & ~body, -90.0, hu)
    wedge = closed & ~body & ~breasts & (y > -0.075)
    return np.where(wedge, level, hu).astype(np.float32), mask, wedge


def beside_an_arm(hu, mask, level=-930.0):
    """An arm that touches the chest above and below; the picture ends in the air between them."""
    body, _, y, x = frame_of(hu, mask)
    left = x[body].max() + 0.1
    down = y - y[body].mean()
    arm = np.hypot((x - left) / 0.17, down / 0.33) < 1
    arm &= np.hypot((x - left) / 0.11, down / 0.24) >= 1
    between = ~body & ~arm & (x > x[body].max() - 0.06) & (abs(down) < 0.24)
    hu = np.where(body, hu, np.where(arm, 20.0, np.where(between, level, -1000.0)))
    end = np.flatnonzero(x[0] < left)[-1]
    return hu[:, :end].astype(np.float32), mask[:, :end], between[:, :end]


def wrong(found, mask):
    """The share of the lungs' area that was found beside them, and that of them not found."""
    near = max(1, round(2 * max(mask.shape) / 256))
    beside = found & ~ndi.binary_dilation(mask, iterations=near)
    missing = ndi.binary_erosion(mask, iterations=near) & ~found
    return beside.sum() / mask.sum(), missing.sum() / mask.sum()


def mean_wrong(pairs, change):
    """What was found of the air, and the shares that are wrong, on average."""
    shares = []
    for hu, mask, air in (change(*pair) for pair in pairs):
        found = lung_mask(hu)
        shares.append((found[air].mean(), *wrong(found, mask)))
    return np.mean(shares, axis=0)


def beneath_cloth(hu, mask, level=-850.0):
    """Two breasts apart, and cloth from one to the other; no bone behind."""
    body, size, y, x = frame_of(hu, mask)
    breasts = np.hypot((abs(x) - 0.2) / 0.14, (y + 0.02) / 0.14) < 1
    cloth = (abs(y + 0.14) < max(0.008, 1 / size)) & (abs(x) < 0.2)
    closed = ndi.binary_fill_holes(body | breasts | cloth)
    air = closed & ~body & ~breasts & ~cloth
    hu = np.where(closed & ~body, np.where(air, level, 0.0), hu)
    hu[body & (abs(x) < 0.15) & (y < 0.25) & (hu > 60)] = 45.0
    return hu.astype(np.float32), mask, air


def large_pockets(hu, mask, level=-850.0):
    body, size, _, x = frame_of(hu, mask)
    deep = ndi.distance_transform_edt(body) / size
    far = ndi.distance_transform_edt(~mask) / size
    air = (deep > 0.025) & (deep < 0.1) & (far > 0.06) & (hu < 120) & (np.sin(22 * x) > 0.3)
    return np.where(air, level, hu).astype(np.float32), mask, air


CHANGES = {
    "pockets": lambda hu, mask: under_the_skin(hu, mask, "pockets"),
    "sheet": lambda hu, mask: under_the_skin(hu, mask, "sheet"),
    "cleavage": between_breasts,
    "arm": beside_an_arm,
}


@pytest.mark.parametrize("size", [64, 128, 256, 512])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("fibrosis", [0.0, 0.8])
def test_air_outside_of_the_ribs_is_no_lung(name, size, fibrosis):
    pairs = [phantom_slice(p, level, size, fibrosis) for p in range(3) for level in LEVELS]
    air, beside, missing = mean_wrong(pairs, CHANGES[name])
    assert air < (0.3 if size == 64 else 0.12) and missing < 0.01
    assert beside < 0.04


@pytest.mark.parametrize("size", [128, 256, 512])
@pytest.mark.parametrize("change", [beneath_cloth, large_pockets])
def test_nor_where_the_lungs_are_small_or_far(change, size):
    pairs = [phantom_slice(p, level, size) for p in range(3) for level in (0.05, 0.5, 0.95)]
    plain = np.mean([wrong(lung_mask(hu), mask)[1] for hu, mask in pairs])
    air, beside, missing = mean_wrong(pairs, change)
    assert air < 0.1 and beside < 0.05 and missing < plain + 0.02


@pytest.fixture(scope="module")
def real_slices(ct_folder):
    pairs = []
    for file in sorted((ct_folder / "lungs" / "images").glob("*.png"))[3::20]:
        mask = ct.read_contour(ct_folder / "lungs" / "contours" / file.name)[0]
        pairs.append((ct.read_hu(file, (1.0, -1024.0)), mask))
    return pairs


@pytest.mark.parametrize("name", ["pockets", "sheet"])
def test_nor_is_it_in_real_slices(real_slices, name):
    air, beside, missing = mean_wrong(real_slices, CHANGES[name])
    assert air < 0.025 and beside < 0.02 and missing < 0.01


@pytest.mark.parametrize("both_whole", [True, False])
def test_air_that_the_border_cuts_is_no_lung_where_both_lungs_are_whole(both_whole):
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    lung = np.hypot((abs(x) - 0.35) / 0.25, y / 0.45) < 1
    labels = np.where(lung, np.where(x < 0, 1, 2), 0)
    labels[40:90, -12:] = 3
    if not both_whole:
        labels[labels == 2] = 0
    hu = np.where(labels > 0, -850.0, 40.0)
    pieces = np.isin(np.arange(4), labels[labels > 0])
    outside = outside_of_ribs(labels, pieces, hu, np.ones(hu.shape, bool))
    assert outside.tolist() == [False, False, False, both_whole]


def test_a_volume_does_not_bring_it_back():
    pairs = [phantom_slice(1, level, 128) for level in np.linspace(0.3, 0.7, 9)]
    changed = [under_the_skin(*pair, "pockets") for pair in pairs]
    found = lung_mask(np.stack([hu for hu, _, _ in changed]))
    shares = [wrong(*pair) for pair in zip(found, (mask for _, mask in pairs), strict=True)]
    assert np.max(shares) < 0.04


@pytest.mark.parametrize("shift", [(0, 70), (0, -70)])
@pytest.mark.parametrize("round_", [False, True])
def test_lungs_that_the_field_of_view_cuts_are_lung(real_slices, shift, round_):
    def change(hu, mask):
        hu, mask = (ndi.shift(a, shift, order=0, cval=c) for a, c in ((hu, -1000), (mask, 0)))
        outside = np.hypot(*(np.indices(hu.shape) - 127.5)) > (127 if round_ else 999)
        return np.where(outside, -1000, hu), mask & ~outside, outside | True

    *_, missing = mean_wrong(real_slices, change)
    assert missing < 0.05


def test_a_tongue_of_lung_before_the_liver_is_lung(ct_folder):
    mask = lung_mask(ct.read_hu(ct_folder / "ipf_dicom" / "020.dcm"))
    assert mask[130, 200] and mask[213, 629]
