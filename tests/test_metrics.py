"""Scores of realism and control."""

import hashlib
import warnings

import numpy as np
import pytest
import torch
from images import CPU, Pixels, mean_difference, needs, pixel_networks, slices
from scipy import ndimage
from torch import Tensor

from fibldm import features, metrics
from fibldm.distances import frechet_distance, within_balls
from fibldm.metrics import ImageSet, realism_scores
from fibldm.verdicts import Score, halves, judge

NAN = float("nan")


# Control.


def test_dice_of_filled_masks_and_of_outlines():
    disk = np.hypot(*np.mgrid[-20:21, -20:21]) <= 15
    outline = disk & ~ndimage.binary_erosion(disk)
    pierced = disk.copy()
    pierced[20, 20] = False
    empty, half = np.zeros_like(disk), disk & (np.arange(41) >= 20)
    masks = np.stack([disk, disk, pierced, empty, disk, half])
    contours = np.stack([disk, outline, disk, empty, empty, disk])
    share = half.sum() / disk.sum()
    expected = [1, 1, 1, 1, 0, 2 * share / (1 + share)]
    np.testing.assert_allclose(metrics.contour_dice(masks, contours.astype(np.uint8)), expected)
    with pytest.raises(ValueError, match=r"\(2, 41, 41\)"):
        metrics.contour_dice(masks[:2], contours)


def discs(*radii: float, size: int = 48) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size // 2
    return np.stack([np.hypot(y, x) <= r for r in radii])


def test_hausdorff_distance_is_that_of_all_pairs_of_border_pixels():
    from scipy.spatial.distance import cdist

    masks, contours = discs(10, 15, 20), np.roll(discs(12, 15, 9), (0, 3, 5), axis=(0, 1, 2))
    masks[1, :6, :9] = True  # an island
    contours[0, 20:26, 20:26] = False  # a hole, which is filled
    found = metrics.hausdorff95(masks, contours)
    contours[0] = ndimage.binary_fill_holes(contours[0])
    for i in range(3):
        borders = [np.argwhere(m[i] & ~ndimage.binary_erosion(m[i])) for m in (masks, contours)]
        pairs = cdist(*borders)
        known = max(np.percentile(pairs.min(1), 95), np.percentile(pairs.min(0), 95))
        assert found[i] == pytest.approx(known, abs=1e-9)
    assert metrics.hausdorff95(discs(10), discs(14)) == pytest.approx(4, abs=0.5)
    empty = np.zeros((1, 48, 48), bool)
    assert metrics.hausdorff95(empty, empty) == 0
    assert np.isnan(metrics.hausdorff95(discs(10), empty)).all()


def following(found, asked, spacing, owners):
    dice, hd95 = metrics.contour_dice(found, asked), metrics.hausdorff95(found, asked)
    return metrics.ContourAgreement(dice, hd95, np.asarray(spacing, float), owners)


def test_control_scores_count_what_they_leave_out():
    asked, found = discs(10, 10, 15, 15), discs(10, 12, 15, 15)
    found[3] = False
    names, spacing = ["a", "b", "c", "d"], [0.5, 2.0, np.nan, 1.0]
    samples = following(found, asked, spacing, names)
    real = following(discs(11, 13, 15), discs(10, 12, 14), [2.0] * 3, ["p", "p", "q"])
    dice, pixels, mm = metrics.control_scores(samples, real)
    assert [s.name for s in (dice, pixels, mm)] == ["dice", "hd95_px", "hd95_mm"]
    assert [s.judged for s in (dice, pixels, mm)] == [True, False, False]
    assert dice.difference.value == pytest.approx(dice.value - dice.baseline)
    share = 2 * asked[1].sum() / (asked[1].sum() + found[1].sum())
    assert dice.value == pytest.approx((1 + share + 1 + 0) / 4)
    assert 0 <= dice.low < dice.value < dice.high <= 1 and dice.baseline > 0.8
    assert pixels.low == 0  # no distance is negative
    assert (dice.n_real, dice.n_fake, pixels.n_fake, mm.n_fake) == (3, 4, 3, 2)
    distance = metrics.hausdorff95(found[1:2], asked[1:2])[0]
    assert pixels.value == pytest.approx(distance / 3) and mm.value == pytest.approx(distance)
    assert mm.baseline == pytest.approx(2 * pixels.baseline) and pixels.baseline > 0
    assert "1 samples without lungs" in pixels.warning and "lungs" not in dice.warning
    assert "unknown spacing" in mm.warning and "2 patients" in dice.source

    none = metrics.control_scores(following(found, asked, [np.nan] * 4, names), real)
    assert [s.name for s in none] == ["dice", "hd95_px"]
    alone = metrics.control_scores(samples, following(found[:0], asked[:0], [], []))
    assert all(np.isnan(s.baseline) and "baseline" in s.warning for s in alone)
    empty = metrics.control_scores(following(found[3:], asked[3:], [1.0], ["d"]), real)
    assert empty[0].value == 0 and np.isnan(empty[1].value)
    with pytest.raises(ValueError, match="4 Dice, 4 distances, 4 spacings, 3 owners"):
        following(found, asked, spacing, names[:3])


# Realism, with stand-ins for both networks.


def patients_of(count: int, each: int = 2) -> list[str]:
    return [f"p{i // each}" for i in range(count)]


def image_set(networks: features.Networks, images: Tensor, owners: list[str]) -> ImageSet:
    return ImageSet(images[:, 0].numpy(), networks.features(images), owners)


def realism_of(
    real: Tensor,
    fake: Tensor,
    paired: Tensor | None = None,
    patients: list[str] | None = None,
    networks: features.Networks | None = None,
    **options: int,
) -> dict[str, Score]:
    """The scores of sets of images by name; `paired` with the first of the samples."""
    networks = networks or pixel_networks()
    pairs = {name: np.full(len(fake), np.nan) for name in ("ssim", "lpips")}
    if paired is not None:
        for name, values in networks.pairs(paired, fake[: len(paired)]).items():
            pairs[name][: len(values)] = values
    sides = image_set(networks, real, patients or patients_of(len(real)))
    names = [f"s{i}" for i in range(len(fake))]
    scores = realism_scores(sides, image_set(networks, fake, names), pairs, networks, **options)
    return {score.name: score for score in scores}


def test_realism_without_weights_is_ssim(no_weights):
    real, fake = slices(8, seed=0, size=32), slices(5, seed=1, size=32)
    found = realism_of(real, fake, real[:5], networks=features.Networks(CPU))
    (score,) = found.values()
    expected = float(features.ssim_per_image(real[:5], fake).mean())
    assert score.name == "ssim" and score.value == pytest.approx(expected, abs=1e-6)
    assert score.low < score.value < score.high and np.isfinite(score.baseline)


def test_every_score_has_what_it_takes_to_believe_it():
    real, fake = slices(24, seed=0, size=32), slices(20, seed=1, size=32)
    found = realism_of(real, fake, real[:20])
    order = ["fid", "kid", "precision", "recall", "lpips", "ssim", "diversity"]
    assert list(found) == order
    for name, score in found.items():
        assert score.low <= score.value <= score.high and score.low < score.high
        assert np.isfinite(score.baseline) and score.source == "pixels" and "under" in score.warning
        assert score.judged == (name in ("kid", "precision", "recall"))
    assert (found["fid"].n_real, found["fid"].n_fake) == (24, 20)
    assert (found["ssim"].n_real, found["ssim"].n_fake, found["diversity"].n_fake) == (20, 20, 20)
    assert "2,048" in found["fid"].warning and found["kid"].baseline == 0

    plain = Pixels()
    x, y = (plain(features.to_bytes(images)) for images in (real, fake))
    assert found["fid"].value == pytest.approx(float(frechet_distance(x, y)), rel=1e-6)
    assert "baseline of 12 against 12 images" in found["fid"].warning
    assert found["lpips"].value == pytest.approx(float(mean_difference(real[:20], fake).mean()))
    assert found["lpips"].baseline == found["diversity"].baseline  # both of unrelated real slices
    assert realism_of(real, fake, real[:20]) == found


def test_the_baseline_of_fid_is_the_mean_over_halves_in_equal_numbers():
    generator = np.random.default_rng(0)
    real, fake = (torch.from_numpy(generator.standard_normal((n, 4))) for n in (40, 9))
    baseline, text = metrics.frechet_baseline(real, fake, patients_of(40), seed=0)
    assert "baseline of 9 against 9 images" in text
    known = []
    for seed in range(200):
        first, second = (
            rows[:9] for rows in map(generator.permutation, halves(patients_of(40), seed))
        )
        known.append(float(frechet_distance(real[first], real[second])))
    assert abs(baseline - np.mean(known)) < 3 * np.std(known) / metrics.FID_HALVINGS**0.5


def test_scores_order_what_is_worse():
    """Other patients are good; darker ones, and one sample repeated, are bad."""
    real = slices(48, seed=0, size=32)
    others = slices(40, seed=1, size=32)
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, fake in {
        "others": others,
        "darker": (others - 0.7).clamp(-1, 1),
        "same": others[:1] + 0.01 * noise,
    }.items():
        found[name] = realism_of(real, fake)
    for name, word in (("others", "good"), ("darker", "bad"), ("same", "bad")):
        assert judge([score for score in found[name].values() if score.margin]).word == word
    others, darker, same = (found[name] for name in ("others", "darker", "same"))
    for name in ("fid", "kid"):
        assert others[name].high < min(darker[name].low, same[name].low)
    assert abs(others["kid"].value) < 0.1 * darker["kid"].value
    assert darker["precision"].value < 0.5 < others["precision"].value
    assert same["recall"].value < 0.1 < others["recall"].value
    assert same["diversity"].high < 0.5 * same["diversity"].baseline < others["diversity"].low
    assert np.isnan(others["lpips"].value) and "no pair" in others["lpips"].warning


def test_slices_of_one_patient_are_no_more_evidence():
    """Each slice four times: with their patients known, KID's interval does not shrink."""
    real, fake = slices(20, seed=0, size=32), slices(30, seed=1, size=32)
    widths = []
    for images, patients in (
        (real, patients_of(20, each=1)),
        (real.repeat_interleave(4, 0), patients_of(80, each=4)),
        (real.repeat_interleave(4, 0), patients_of(80, each=1)),
    ):
        kid = realism_of(images, fake, patients=patients)["kid"]
        widths.append(kid.high - kid.low)
    assert widths[1] == pytest.approx(widths[0]) and widths[2] < 0.8 * widths[1]


def test_too_few_images_or_patients_are_said():
    images = slices(9, seed=0, size=32)
    for score in realism_of(images[:0], images[:0], patients=[]).values():
        assert np.isnan([score.value, score.low, score.baseline]).all() and score.warning
    found = realism_of(images[:5], images[5:6], images[:1], patients=["p"] * 5)
    assert "5 real images and 1 samples" in found["kid"].warning
    assert found["ssim"].value < 1 and "baseline" in found["ssim"].warning
    found = realism_of(images[:8], images, patients=["p"] * 8)
    assert found["fid"].value > 0 and np.isnan([found["fid"].low, found["fid"].baseline]).all()
    assert "baseline" in found["fid"].warning
    for name in ("fid", "kid", "precision"):
        assert "one patient" in found[name].warning and not found[name].judged


def test_samples_without_a_pair_are_left_out_of_what_is_of_pairs():
    real, fake = slices(6, seed=0, size=32), slices(5, seed=1, size=32)
    some, all_paired = realism_of(real, fake, real[:3]), realism_of(real, fake[:3], real[:3])
    for name in ("lpips", "ssim"):
        assert some[name].value == all_paired[name].value and some[name].n_fake == 3


# With the real networks.


@needs("fid")
def test_fid_kid_precision_and_recall_are_those_of_torch_fidelity(no_sockets):
    """From images to numbers, by torch-fidelity's own network and functions; nothing is fetched."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = slices(8, seed=0), slices(8, seed=1)
    fake[:4] = 0.5 * fake[:4] + 0.5 * real[:4]
    state = torch.get_rng_state()
    networks = features.Networks(CPU)
    assert torch.equal(torch.get_rng_state(), state)
    found = realism_of(real, fake, networks=networks, patients=patients_of(8, each=1))

    path = str(features.weight_file(features.INCEPTION))
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path).eval()
    shown = [((images + 1) / 2 * 255).byte().expand(-1, 3, -1, -1) for images in (real, fake)]
    with torch.no_grad():
        x, y = (network(images)[0] for images in shown)
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)
    assert found["fid"].value == pytest.approx(fid["frechet_inception_distance"], rel=1e-3)
    kid = kid_features_to_metric(x, y, kid_subset_size=8, kid_subsets=1, verbose=False)
    known = kid["kernel_inception_distance_mean"]
    assert found["kid"].value == pytest.approx(known, rel=1e-3, abs=1e-6)
    prc = prc_features_to_metric(y, x, verbose=False)
    inside = within_balls(torch.cat([x, y]).double(), torch.arange(8))[:, 8:].any(0)
    assert float(inside.double().mean()) == pytest.approx(prc["precision"], abs=1e-3)
    with open(path, "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest()[:12] in found["fid"].source


@needs("lpips")
def test_lpips_and_diversity_are_those_of_the_lpips_package(no_sockets):
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="alex", verbose=False)
    networks = features.Networks(CPU)
    networks.inception = None
    real, fake = slices(4, seed=0, size=64), slices(4, seed=1, size=64)
    found = realism_of(real, fake, real, networks=networks)
    with torch.no_grad():
        known = network(real.expand(-1, 3, -1, -1), fake.expand(-1, 3, -1, -1)).mean()
        every = {(i, j): float(network(fake[i], fake[j])) for i in range(4) for j in range(i)}
    assert found["lpips"].value == pytest.approx(float(known), abs=1e-4)
    matchings = [every[1, 0] + every[3, 2], every[2, 0] + every[3, 1], every[3, 0] + every[2, 1]]
    assert min(abs(found["diversity"].value - total / 2) for total in matchings) < 1e-4
    assert features.weights_hash(features.ALEXNET) in found["lpips"].source
