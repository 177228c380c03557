"""Scores: halves of patients, the bootstrap over them, realism and control."""

import hashlib
import json
import warnings

import numpy as np
import pytest
import torch
from images import CPU, Pixels, mean_difference, needs, pixel_networks, slices
from scipy import ndimage
from torch import Tensor

from fibldm import features, metrics
from fibldm.metrics import (
    ImageSet,
    Score,
    Verdict,
    halves,
    interval,
    judge,
    realism_scores,
    resamples,
    worst,
)

PATIENTS = [f"p{i // 3}" for i in range(60)]  # 20 patients of 3 slices


def test_halves_split_patients_and_not_slices():
    first, second = halves(PATIENTS, seed=1)
    assert sorted([*first, *second]) == list(range(60))
    names = np.array(PATIENTS)
    assert not set(names[first]) & set(names[second])
    assert len(set(names[first])) == len(set(names[second])) == 10
    assert not np.array_equal(first, halves(PATIENTS, seed=2)[0])


def test_resamples_draw_whole_patients():
    for rows in resamples(PATIENTS, draws=5):
        assert len(rows) == 60
        counts = np.bincount(rows, minlength=60).reshape(20, 3)
        assert (counts == counts[:, :1]).all()


def test_the_interval_covers_a_mean_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    for trial in range(200):
        patients = generator.normal(size=20)
        values = np.repeat(patients, 3)  # slices of a patient are copies: 20 values, not 60
        means = [values[rows].mean() for rows in resamples(PATIENTS, 200, seed=trial)]
        low, high = interval(means)
        covered += low <= 0 <= high
    assert 0.85 < covered / 200 < 0.98  # slices as if independent would give 0.74


def test_too_little_for_an_interval_is_nan_and_none_in_json():
    assert np.isnan(interval([1.0])).all() and np.isnan(interval([np.nan, 1.0])).all()
    score = Score("fid", 1.0, *interval([]), float("nan"), 2, 3, "Inception", "few")
    content = json.loads(json.dumps(score.as_dict(), allow_nan=False))
    assert content["low"] is None and content["value"] == 1.0


# Verdicts.

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "low", "high", "baseline", "options", "word"),
    [
        (5.0, 3.0, 7.0, 3.5, {}, "good"),  # the interval reaches the baseline
        (5.0, 4.0, 7.0, 3.5, {}, "doubtful"),
        (9.0, 8.0, 10.0, 3.5, {}, "bad"),
        (9.0, 8.0, 10.0, 3.5, {"squared": True}, "doubtful"),
        (15.0, 14.0, 16.0, 3.5, {"squared": True}, "bad"),
        (0.90, 0.88, 0.96, 0.95, {"higher_is_better": True}, "good"),
        (0.91, 0.90, 0.92, 0.95, {"higher_is_better": True}, "doubtful"),
        (0.70, 0.68, 0.72, 0.95, {"higher_is_better": True}, "bad"),
        (5.0, NAN, NAN, 3.5, {}, "doubtful"),  # without an interval the value counts
        (3.0, NAN, NAN, 3.5, {}, "good"),
        (0.01, -0.01, 0.02, -0.02, {"squared": True}, "good"),  # KID's baseline below 0 is chance
        (0.01, 0.005, 0.02, -0.02, {"squared": True}, "bad"),
        (5.0, 4.0, 6.0, NAN, {}, "not judged"),
        (5.0, 4.0, 6.0, 0.0, {}, "not judged"),  # how far is twice as far as 0?
        (NAN, NAN, NAN, 1.0, {}, "not judged"),
    ],
)
def test_judge(value, low, high, baseline, options, word):
    verdict = judge(Score("m", value, low, high, baseline, 40, 41, "net"), **options)
    assert verdict.word == word
    assert verdict.sentence.startswith("m ")


def test_a_group_is_as_good_as_its_worst_number():
    words = [Verdict("good", "a"), Verdict("bad", "b"), Verdict("not judged", "c")]
    assert worst(words) == Verdict("bad", "a; b; c")
    assert worst(words[::2]).word == "good"


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
    share = 2 * asked[1].sum() / (asked[1].sum() + found[1].sum())
    assert dice.value == pytest.approx((1 + share + 1 + 0) / 4)
    assert dice.low < dice.value < dice.high and dice.baseline > 0.8
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
    found = realism_of(real, fake, real[:20], draws=40)
    order = ["fid", "kid", "precision", "recall", "lpips", "ssim", "diversity"]
    assert list(found) == order
    for score in found.values():
        assert score.low <= score.value <= score.high and score.low < score.high
        assert np.isfinite(score.baseline) and score.source == "pixels" and "under" in score.warning
    assert (found["fid"].n_real, found["fid"].n_fake) == (24, 20)
    assert (found["ssim"].n_real, found["ssim"].n_fake, found["diversity"].n_fake) == (20, 20, 20)
    assert "2,048" in found["fid"].warning

    plain = Pixels()
    x, y = (plain(features.to_bytes(images)) for images in (real, fake))
    assert found["fid"].value == pytest.approx(features.frechet_feature_distance(x, y), rel=1e-6)
    first, second = halves(patients_of(24))
    second = np.sort(np.random.default_rng(0).permutation(second)[:20])
    baseline = features.frechet_feature_distance(x[first], x[second])
    assert found["fid"].baseline == pytest.approx(baseline, rel=1e-6)
    assert found["lpips"].value == pytest.approx(float(mean_difference(real[:20], fake).mean()))
    assert found["lpips"].baseline == found["diversity"].baseline  # both of unrelated real slices
    assert realism_of(real, fake, real[:20], draws=40) == found


def test_scores_order_what_is_worse():
    """Other patients reach the baseline, darker ones do not, and one sample repeated is no set."""
    real = slices(48, seed=0, size=32)
    others = slices(40, seed=1, size=32)
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, fake in {
        "others": others,
        "darker": (others - 0.7).clamp(-1, 1),
        "same": others[:1] + 0.01 * noise,
    }.items():
        found[name] = realism_of(real, fake, draws=20)
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
        kid = realism_of(images, fake, patients=patients, draws=100)["kid"]
        widths.append(kid.high - kid.low)
    assert widths[1] > 0.8 * widths[0] and widths[2] < 0.8 * widths[1]


def test_large_sets_have_fewer_resamples_and_say_so():
    assert metrics.fid_draws(200, 200) == 200 and metrics.fid_draws(200, 50000) >= 20
    generator = np.random.default_rng(0)
    real, fake = generator.standard_normal((2, 500, 4))
    names = [str(i) for i in range(500)]
    fid = metrics.set_score("fid", real, fake, names, names, CPU, "normal", draws=50)
    assert "interval from 40 resamples" in fid.warning and fid.low < fid.value < fid.high


def test_too_few_images_or_patients_are_said():
    images = slices(6, seed=0, size=32)
    for score in realism_of(images[:0], images[:0], patients=[]).values():
        assert np.isnan([score.value, score.low, score.baseline]).all() and score.warning
    found = realism_of(images[:5], images[5:], images[:1], patients=["p"] * 5)
    assert "5 real images and 1 samples" in found["kid"].warning
    assert found["ssim"].value < 1 and "baseline" in found["ssim"].warning
    fid = realism_of(images[:5], images, patients=["p"] * 5)["fid"]
    assert fid.value > 0 and np.isnan([fid.low, fid.baseline]).all()
    assert "one patient" in fid.warning and "baseline" in fid.warning


def test_samples_without_a_pair_are_left_out_of_what_is_of_pairs():
    real, fake = slices(6, seed=0, size=32), slices(5, seed=1, size=32)
    some, all_paired = realism_of(real, fake, real[:3]), realism_of(real, fake[:3], real[:3])
    for name in ("lpips", "ssim"):
        assert some[name] == all_paired[name] and some[name].n_fake == 3


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
    found = realism_of(real, fake, networks=networks, draws=2)

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
    assert found["precision"].value == pytest.approx(prc["precision"], abs=1e-3)
    assert found["recall"].value == pytest.approx(prc["recall"], abs=1e-3)
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
