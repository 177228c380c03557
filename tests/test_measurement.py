"""Slices of an evaluation: what several processes do is what one does, in order."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from images import pixel_networks, slices

from fibldm.measurement import (
    MeasuredSlice,
    Measurement,
    SliceSet,
    filled_contour,
    in_batches,
    spread,
)


def square(limit: int, item: int) -> int:
    if item >= limit:
        raise ValueError(f"item {item} is damaged")
    return item * item


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_an_error_comes_as_it_is(workers):
    state = torch.get_rng_state()
    found = list(in_batches(functools.partial(square, 9), range(7), workers, "items", 3))
    assert found == [[0, 1, 4], [9, 16, 25], [36]]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"^item 5 is damaged$"):
        list(in_batches(functools.partial(square, 5), range(7), workers, "items", 3))
    assert list(in_batches(functools.partial(square, 5), [], workers, "items")) == []


def test_what_is_kept_of_slices(tmp_path: Path):
    """Images and features in files, in order; pairs where there are some, and NaN elsewhere."""
    images, others = (slices(5, seed=i, size=32)[:, 0].numpy() for i in (0, 1))
    networks = pixel_networks()
    kept = SliceSet([f"p{i // 2}" for i in range(5)], [""] * 5, 32, networks, tmp_path / "kept")
    batch = [
        MeasuredSlice(
            image, image > 0, None, Measurement({}, 2, 0.5 + i, i != 1, 0.1 * i, 10.0 * i),
            other if i in (2, 4) else None,
        )
        for i, (image, other) in enumerate(zip(images, others, strict=True))
    ]  # fmt: skip
    kept.add(batch[:3])
    kept.add(batch[3:])
    np.testing.assert_array_equal(kept.images[:], images)
    seen = networks.features(torch.from_numpy(images)[:, None])
    np.testing.assert_array_equal(kept.features[:], seen)
    some = [torch.from_numpy(part[[2, 4]])[:, None] for part in (images, others)]
    for name, values in networks.pairs(*some).items():
        assert np.isnan(kept.pairs[name][[0, 1, 3]]).all()
        np.testing.assert_allclose(kept.pairs[name][[2, 4]], values)
    agreement = kept.agreement
    assert agreement.owners == ["p0", "p1", "p1", "p2"]
    np.testing.assert_allclose(agreement.dice, [0, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(agreement.spacing, [0.5, 2.5, 3.5, 4.5])
    assert len(kept.measures) == 5


def test_filled_masks_and_outlines_ask_for_the_same_lungs():
    disk = np.hypot(*np.mgrid[-20:20, -20:20]) <= 15
    outline = np.zeros_like(disk)
    outline[5:36, 5:36] = True
    outline[6:35, 6:35] = False
    assert np.array_equal(filled_contour(disk[None], 40), disk)
    assert filled_contour(outline[None], 40).sum() == 31 * 31


def test_what_is_shown_is_spread_evenly():
    assert spread(100, 5) == [0, 25, 50, 74, 99] and spread(3, 12) == [0, 1, 2]
