"""Copies of training slices are found, slices of other patients are not; sample.py drops copies."""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, TINY_UNET, TINY_VALIDATION

import encode_dataset
import sample
import train_ldm_unet
from fibldm import checkpoint, ct, disk, privacy, synthesis
from fibldm.encoding import LatentDataset
from fibldm.phantom import phantom_slice, write_dataset
from fibldm.privacy import (
    LATENTS,
    PIXELS,
    Match,
    Privacy,
    Rows,
    altered_copies,
    evenly_over,
    threshold,
)
from fibldm.vae import LATENT_SCALE, VAE

TRAINED, HELD = 24, 12  # patients


def exact_vae(size: int = 32) -> VAE:
    """A VAE that moves pixels into channels and back, without loss, and learns nothing."""
    vae = VAE(size, size // 4, 16, base_channels=8, blocks=1)
    with torch.no_grad():
        for last in vae.encoder.network[-1], vae.decoder.mean[-1]:
            last.weight.zero_()
            last.bias.zero_()
        vae.encoder.shortcut.weight.copy_(torch.eye(16).view(16, 1, 4, 4))
        vae.decoder.shortcut[0].weight.zero_()
        vae.decoder.shortcut[0].weight[:, :, 1, 1] = torch.eye(16)
        for layer in vae.encoder.shortcut, vae.decoder.shortcut[0]:
            layer.bias.zero_()
        vae.texture.logvar[2].bias.fill_(-100.0)  # hardly any texture
    return vae.eval()


@pytest.fixture(scope="module")
def slices() -> tuple[np.ndarray, np.ndarray]:
    """One slice of 64x64 of each of 36 synthetic patients, in [-1, 1], and the patients' names."""
    count = TRAINED + HELD
    images = [ct.hu_to_unit(phantom_slice(i, 0.5, 64)[0]) for i in range(count)]
    return np.stack(images).astype(np.float32), np.array([f"p{i}" for i in range(count)])


def pooled(images: np.ndarray) -> np.ndarray:
    """Stands for an encoder: (n, 64, 64) -> (n, 1, 32, 32)."""
    return np.asarray(images).reshape(-1, 1, 32, 2, 32, 2).mean(axis=(3, 5))


def unpooled(latents: np.ndarray) -> np.ndarray:
    return ct.fit_square(latents[:, 0], 64, -1)


@pytest.fixture(scope="module")
def calibrated(slices) -> Privacy:
    images, patients = slices
    latents = pooled(images)
    found = Privacy(images[:TRAINED], patients[:TRAINED], latents[:TRAINED])
    found.calibrate(images[TRAINED:], latents[TRAINED:], patients[TRAINED:])
    return found


# Distances.


def test_the_same_slice_is_at_distance_0_and_the_nearest_row(calibrated, slices):
    images, _ = slices
    rows = [5, 0, TRAINED - 1]
    matches = calibrated.nearest(images[rows], pooled(images[rows]))
    assert [match.row for match in matches] == rows and all(match.flagged for match in matches)
    for match in matches:
        assert match.rows == {PIXELS: match.row, LATENTS: match.row}
        assert match.distances == pytest.approx({PIXELS: 0, LATENTS: 0}, abs=1e-5)


@pytest.mark.parametrize("way", ["noise", "3-pixel shift", "intensity"])
def test_changed_copies_are_found_in_pixels_alone(way, slices):
    images, patients = slices
    found = Privacy(images[:TRAINED], patients[:TRAINED])
    found.calibrate(images[TRAINED:], None, patients[TRAINED:])
    matches = found.nearest(altered_copies(images[:12], 1)[way], None)
    assert [match.row for match in matches] == list(range(12))
    assert all(match.flagged for match in matches)


def test_the_nearest_latent_is_that_of_the_highest_correlation(slices, monkeypatch):
    """Block by block and from a memory map's rows, as numpy gives it from one matrix."""
    monkeypatch.setattr(privacy, "BLOCK", 5)
    latents = np.random.default_rng(0).standard_normal((40, 2, 4, 4)).astype(np.float32) + 3
    rows = np.arange(0, 40, 2)
    found = Privacy(None, [f"p{i}" for i in rows], Rows(latents, rows))
    found.calibrate(None, latents[1:20:2], [f"h{i}" for i in range(10)])
    distances, nearest = found.distances(None, latents[21::2])
    centred = (latents - latents[rows].mean(axis=0)).reshape(40, -1)
    table = 1 - np.corrcoef(centred)[21::2][:, rows]
    assert np.allclose(distances[LATENTS], table.min(axis=1), atol=1e-5)
    assert np.array_equal(nearest[LATENTS], table.argmin(axis=1))


def test_blocks_do_not_change_what_is_found(calibrated, slices, monkeypatch):
    images, patients = slices
    whole = calibrated.nearest(images[TRAINED:], pooled(images[TRAINED:]))
    monkeypatch.setattr(privacy, "BLOCK", 7)
    again = Privacy(images[:TRAINED], patients[:TRAINED], pooled(images[:TRAINED]))
    again.calibrate(images[TRAINED:], pooled(images[TRAINED:]), patients[TRAINED:])
    for a, b in zip(whole, again.nearest(images[TRAINED:], pooled(images[TRAINED:])), strict=True):
        assert a.rows == b.rows and a.distances == pytest.approx(b.distances, abs=1e-5)


# Thresholds and controls.


class Counted:
    """An array that counts the rows that are read of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.read = array, 0

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: object) -> np.ndarray:
        found = self.array[index]
        self.read += 1 if found.ndim == self.array.ndim - 1 else len(found)
        return found


def test_few_held_out_slices_of_all_patients_set_the_thresholds(monkeypatch):
    """However many there are: else the time grows with their number times the training's."""
    monkeypatch.setattr(privacy, "CALIBRATED", 20)
    monkeypatch.setattr(privacy, "BLOCK", 20)
    latents = np.random.default_rng(0).standard_normal((300, 2, 4, 4)).astype(np.float32)
    train, held = Counted(latents[:200]), Counted(latents[200:])
    found = Privacy(None, [f"p{i // 10}" for i in range(200)], train)
    train.read = 0
    patients = [f"h{i % 10}" for i in range(100)]
    found.calibrate(None, held, patients)
    assert (held.read, train.read) == (20, 200)  # held-out slices once, and one pass for them all
    assert Counter(found.heldout_patients.tolist()) == {f"h{i}": 2 for i in range(10)}
    assert len(found.heldout[LATENTS]) == 20 and found.thresholds[LATENTS] > 0
    copy = found.nearest(None, latents[137:138])[0]  # the search itself leaves out no slice
    assert copy.flagged and copy.row == 137


@pytest.mark.parametrize("count", [1, 7, 100])
def test_evenly_over_patients(count):
    patients = [f"p{i % 9}" for i in range(90)]
    rows = evenly_over(patients, count)
    assert len(rows) == len({*rows.tolist()}) == min(count, 90) and (np.diff(rows) > 0).all()
    assert len({patients[row] for row in rows}) == min(count, 9)
    assert evenly_over(patients, 90).tolist() == list(range(90))


def test_of_many_slices_the_threshold_is_a_percentile():
    distances = np.linspace(0.1, 1, 1001)
    assert threshold(distances, 0.01) == pytest.approx(distances[10])
    assert (distances < threshold(distances, 0.01)).mean() <= 0.01


def test_of_few_slices_the_threshold_is_below_the_minimum_and_said_to_be():
    """So that the next slice of the same distribution is not flagged as often as 1 in 20."""
    generator, flagged = np.random.default_rng(0), []
    for _ in range(500):
        *held, new = np.exp(generator.normal(-1, 0.2, 21))
        flagged.append(new < threshold(np.array(held), 0.005))
        assert threshold(np.array(held), 0.005) <= min(held)
    assert np.mean(flagged) <= 0.02


def test_both_controls_hold(calibrated):
    scores = calibrated.positive_control(pooled, unpooled, count=20)
    names = [f"copies found: {n}" for n in ("noise", "3-pixel shift", "intensity")]
    assert [score.name for score in scores] == [*names, "copies found: VAE round trip"]
    for score in scores:
        assert score.value >= 0.95 and score.low <= score.value <= score.high, score
        assert score.n_fake == 20 and "too few for a percentile" in score.warning
    false = calibrated.negative_control()
    assert false.value <= 1 / HELD and false.n_real == HELD


def test_the_negative_control_is_of_patients_who_set_no_threshold(calibrated):
    """A slice that is a copy is flagged, though it lies in the held-out set itself."""
    found = Privacy(np.zeros((2, 8, 8)), ["a", "b"])
    found.heldout_patients = np.array([f"h{i}" for i in range(40)])
    found.heldout = {PIXELS: np.linspace(0.5, 0.6, 40)}
    assert found.negative_control().value == 0
    found.heldout[PIXELS][3] = 0.01
    score = found.negative_control()
    assert score.value == pytest.approx(1 / 40) and "more than 2%" in score.warning


def test_a_held_out_copy_makes_copies_hard_to_tell_and_that_is_said(slices):
    """A patient under two ids, in training and held out: the threshold falls, the control tells."""
    images, patients = slices
    found = Privacy(images[:TRAINED], patients[:TRAINED])
    held = [*range(TRAINED, TRAINED + HELD), 0]
    found.calibrate(images[held], None, [*patients[TRAINED:], "p0 again"])
    score = {s.name: s for s in found.positive_control(count=8)}["copies found: noise"]
    assert score.value < 0.95 and "such copies are missed" in score.warning


def test_scores_count_samples_and_patients(calibrated):
    matches = [
        Match(row, ratio, ratio < 1, {PIXELS: d, LATENTS: d}, {PIXELS: row, LATENTS: row})
        for row, ratio, d in [(3, 0.1, 0.01), (3, 0.2, 0.02), (7, 2.0, 0.4), (8, 2.0, 0.5)]
    ]
    flagged, copied, *distances = calibrated.scores(matches, ["a", "b", "c", "d"])
    assert flagged.value == 0.5 and 0 <= flagged.low < 0.5 < flagged.high <= 1
    assert flagged.baseline == calibrated.negative_control().value
    assert copied.value == pytest.approx(1 / TRAINED)
    assert [score.value for score in distances] == [pytest.approx(0.21)] * 2
    assert (flagged.n_real, flagged.n_fake) == (HELD, 4)


def test_held_out_slices_are_not_flagged_beyond_the_share(calibrated, slices):
    """Of other patients again, who are neither trained on nor held out."""
    images = [ct.hu_to_unit(phantom_slice(i, 0.5, 64)[0]) for i in range(100, 120)]
    images = np.stack(images).astype(np.float32)
    matches = calibrated.nearest(images, pooled(images))
    assert sum(match.flagged for match in matches) <= 1


def test_what_does_not_fit_is_refused(slices, calibrated):
    images, patients = slices
    with pytest.raises(ValueError, match=r"training slices \{\}"):
        Privacy(None, patients)
    with pytest.raises(ValueError, match=r"training slices .*36.* of 3 patients"):
        Privacy(images, patients[:3])
    with pytest.raises(ValueError, match="not calibrated"):
        Privacy(images, patients).nearest(images, None)
    with pytest.raises(ValueError, match=r"'p0'.* held out and trained on"):
        Privacy(images, patients).calibrate(images[:2], None, patients[:2])
    with pytest.raises(ValueError, match="1 held-out slices"):
        Privacy(images, patients).calibrate(images[:1], None, ["x"])
    with pytest.raises(ValueError, match="no latents given"):
        calibrated.nearest(images, None)


# sample.py --drop_copies


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """vae.pth (exact), latents/ of 36 synthetic patients, and unet/, trained for a step."""
    folder = tmp_path_factory.mktemp("models")
    write_dataset(folder / "data", patients=TRAINED + HELD, slices_per_patient=1, size=32)
    table = folder / "data" / "label.csv"
    rows = list(csv.reader(table.open()))
    part = rows[0].index("split") if "split" in rows[0] else len(rows[0])
    for i, row in enumerate(rows):
        row[part:] = ["split" if i == 0 else "train" if i <= TRAINED else "val"]
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    vae = exact_vae()
    images = [
        ct.hu_to_unit(ct.read_hu(folder / "data" / row[0], (1.0, -1024.0))) for row in rows[1:]
    ]
    means = vae.encode(torch.from_numpy(np.stack(images)).float()[:, None]).mean
    vae.calibrate(means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3)))
    split = {"seed": 0, "val_fraction": 0.3, "test_fraction": 0.0}
    lineage = {"label_csv": disk.file_hash(table)}
    checkpoint.save_model(
        folder / "vae.pth", vae, lineage, window=list(ct.DEFAULT_WINDOW), split=split, step=0
    )
    data = ["--csv_file", str(table), "--img_dir", str(folder / "data"), "--num_workers", "0"]
    made = ["--vae_checkpoint", str(folder / "vae.pth"), "--device", "cpu"]
    run(encode_dataset, [*data, *made, "--output_dir", str(folder / "latents")])
    inputs = ["--latent_data_dir", str(folder / "latents"), "--vae_checkpoint"]
    inputs += [str(folder / "vae.pth"), "--save_dir", str(folder / "unet"), "--steps", "1"]
    run(train_ldm_unet, [*inputs, *QUICK, *TINY_UNET, *TINY_VALIDATION])
    return folder


def run(script, arguments):
    script.main(script.parse_args([str(a) for a in arguments]))


def draw(models: Path, folder: Path, *more) -> list[dict[str, str]]:
    """The rows of samples.csv of a run."""
    options = ["--vae_checkpoint", models / "vae.pth", "--unet_checkpoint"]
    options += [models / "unet" / "unet_best.pth", "--device", "cpu", "--format", "npy"]
    options += ["--latent_data_dir", models / "latents", "--output_dir", folder, "--steps", "3"]
    run(sample, [*options, "--guidance_scale", "1", *more])
    return list(csv.DictReader((folder / "samples.csv").open()))


@pytest.fixture
def memorized(models, monkeypatch):
    """A function that makes the model an exact denoiser: of a training latent where an item's noise
    is high in its first number, and of what no patient looks like elsewhere."""
    data = LatentDataset(models / "latents")
    copied = torch.from_numpy(data.latents[data.indices("train")[3]].copy())

    def set_rate(always: bool) -> None:
        def guide(denoiser, both, scheduler, *_):
            chosen: list[torch.Tensor] = []

            def exact(x, t):
                if not chosen:  # the first step: x is the item's own noise
                    high = torch.full((len(x),), True) if always else x[:, 0, 0, 0] > 0
                    other = x.clone()
                    chosen.append(torch.where(high[:, None, None, None], copied, other))
                return scheduler.v_from_x0(x, chosen[0], t)

            return exact

        monkeypatch.setattr(synthesis, "guide", guide)

    return set_rate


def hu_of(models: Path, row: int) -> np.ndarray:
    data = LatentDataset(models / "latents")
    vae, _ = checkpoint.load_model(models / "vae.pth", VAE)
    latent = torch.from_numpy(data.latents[[row]] / LATENT_SCALE)
    return ct.unit_to_hu(vae.decode(latent).clamp(-1, 1)[0, 0].numpy(), ct.DEFAULT_WINDOW)


def test_copies_are_drawn_again(models, memorized, tmp_path, capsys):
    memorized(always=False)
    copy = hu_of(models, LatentDataset(models / "latents").indices("train")[3])
    before = draw(models, tmp_path / "all", "--num_samples", "8")
    copies = [
        i
        for i in range(8)
        if np.allclose(np.load(tmp_path / "all" / before[i]["file"]), copy, 0, 2)
    ]
    assert 0 < len(copies) < 8 and {row["attempt"] for row in before} == {"0"}
    capsys.readouterr()

    rows = draw(
        models, tmp_path / "dropped", "--num_samples", "8", "--drop_copies", models / "latents"
    )
    said = capsys.readouterr().out
    assert f"{len(copies)} samples drawn again" in said and "of 1 training patients" in said
    assert "WARNING: --drop_copies" in said and "too few for a percentile" in said
    for i, (old, new) in enumerate(zip(before, rows, strict=True)):
        image = np.load(tmp_path / "dropped" / new["file"])
        assert not np.allclose(image, copy, 0, 2)
        assert (new["attempt"] != "0") == (i in copies)
        if i not in copies:
            assert np.array_equal(image, np.load(tmp_path / "all" / old["file"]))

    # A row's seed draws that sample first; batches don't matter.
    i = copies[0]
    draw(models, tmp_path / "seed", "--num_samples", "8", "--seed", rows[i]["seed"])
    file = rows[i]["file"]
    image = np.load(tmp_path / "dropped" / file)
    assert np.allclose(np.load(tmp_path / "seed" / file), image, 0, 0.5)
    more = ["--drop_copies", models / "latents", "--batch_size", "3"]
    again = draw(models, tmp_path / "batches", "--num_samples", "8", *more)
    assert again == rows
    assert np.allclose(np.load(tmp_path / "batches" / file), image, 0, 0.5)


def test_copies_are_told_by_label(models, memorized, tmp_path, capsys):
    """A sample that is drawn again has other noise than that of the other label."""
    memorized(always=False)
    options = ["--num_samples", "4", "--drop_copies", models / "latents", "--compare_labels"]
    rows = draw(models, tmp_path, *options)
    assert [row["noise"] for row in rows] == [str(i // 2) for i in range(8)]
    labels = [row["label"] for row in rows if row["attempt"] != "0"]
    said = capsys.readouterr().out
    assert f"--drop_copies: {len(labels)} samples drawn again" in said and labels
    for label in {*labels}:
        assert re.search(rf"patients\): .*\b{labels.count(label)} of {label}", said)
    assert "drawn again have other noise" in said


def test_a_model_that_only_copies_writes_nothing(models, memorized, tmp_path):
    memorized(always=True)
    with pytest.raises(ValueError, match=r"none of 3 samples is written.* memorized"):
        draw(models, tmp_path / "out", "--num_samples", "3", "--drop_copies", models / "latents")
    assert list((tmp_path / "out").glob("sample*")) == []


def test_a_sample_that_stays_a_copy_is_left_out(models, memorized, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(synthesis, "ATTEMPTS", 1)
    memorized(always=False)
    rows = draw(models, tmp_path / "out", "--num_samples", "8", "--drop_copies", models / "latents")
    written = {path.name for path in (tmp_path / "out").glob("sample_*")}
    assert written == {row["file"] for row in rows} and 0 < len(rows) < 8
    said = capsys.readouterr().out
    assert f"{8 - len(rows)} samples are not written" in said
    missing = next(f"sample_{i:05d}.npy" for i in range(8) if f"sample_{i:05d}.npy" not in written)
    assert missing in said


def test_an_untrained_model_is_not_taken_for_a_copier(models, tmp_path, capsys):
    rows = draw(models, tmp_path, "--num_samples", "12", "--drop_copies", models / "latents")
    assert [row["attempt"] for row in rows] == ["0"] * 12
    assert "0 samples drawn again" in capsys.readouterr().out


def test_latents_of_another_vae_are_refused(stages, models, tmp_path):
    with pytest.raises(ValueError, match=r"the VAE that .*latents was encoded with"):
        draw(models, tmp_path, "--num_samples", "1", "--drop_copies", stages / "latents")
