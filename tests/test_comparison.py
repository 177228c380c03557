"""The same lungs with each label: one noise, files, table, picture, what is said and refused."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from conftest import sample_options
from PIL import Image
from test_pipeline import torchrun

import sample
from fibldm import comparison, ct
from fibldm.checkpoint import save
from fibldm.conditions import Conditions, RealSlices, label_caption, parse_compared
from fibldm.disease import measure
from fibldm.encoding import LatentDataset
from fibldm.lungs import lung_mask

CLASSES = ["fibrosis", "normal"]


def draw(stages: Path, folder: Path, *more: object) -> list[dict[str, str]]:
    """The rows of samples.csv of a run."""
    words = ["--latent_data_dir", stages / "latents", "--num_samples", "3", "--format", "npy"]
    words = sample_options(stages, folder, *words, *more)
    sample.main(sample.parse_args([str(word) for word in words]))
    return list(csv.DictReader((folder / "samples.csv").open()))


def pixels(folder: Path, rows: list[dict[str, str]]) -> np.ndarray:
    return np.stack([np.load(folder / row["file"]) for row in rows])


def test_each_contour_is_drawn_with_each_label_from_one_noise(stages, tmp_path, capsys):
    rows = draw(stages, tmp_path / "both", "--compare_labels")
    said = capsys.readouterr().out
    assert [row["file"] for row in rows] == [f"sample_{i:05d}.npy" for i in range(6)]
    assert [row["label"] for row in rows] == 3 * CLASSES
    assert [row["noise"] for row in rows] == ["0", "0", "1", "1", "2", "2"]
    names = [row["contour"] for row in rows]
    assert names[::2] == names[1::2] and len({*names}) == 3
    found = pixels(tmp_path / "both", rows)
    assert not np.array_equal(found[::2], found[1::2])

    # The same as each label alone.
    for k, label in enumerate(CLASSES):
        alone = draw(stages, tmp_path / label, "--label", label)
        assert [row["contour"] for row in alone] == names[::2]
        assert np.array_equal(pixels(tmp_path / label, alone), found[k::2])

    # What is said: of the files, and of the real slices with the label.
    data = LatentDataset(stages / "latents")
    held = data.indices("val", views=False)
    for k, label in enumerate(CLASSES):
        rows_of = [row for row in held if data.table["label"].iloc[row] == label]
        real = ct.unit_to_hu(data.heldout_images(rows_of, "cpu")[:, 0].numpy(), data.window)
        shares = [
            [measure(hu, lung_mask(hu))["high_attenuation"] for hu in hus]
            for hus in (found[k::2], real)
        ]
        assert f"  {label}: {comparison._mean_share(shares[0], 'samples')}; " in said
        assert f"; {comparison._mean_share(shares[1], 'real slices')}\n" in said
    assert "segmented from 6 samples" in said.splitlines()[-1]


def test_a_model_that_has_learned_nothing_of_labels_draws_the_same(stages, tmp_path):
    """So all that differs between the samples of a contour comes from the label."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "vae").symlink_to(stages / "vae")
    content = torch.load(stages / "unet" / "unet_best.pth", weights_only=True)
    content["state"]["encoder.label.weight"].zero_()
    (models / "unet").mkdir()
    save(models / "unet" / "unet_best.pth", content)
    options = sample_options(models, tmp_path / "out", "--unconditional", "--format", "npy")
    at = options.index("--controlnet_checkpoint")
    more = ["--num_samples", "2", "--compare_labels", "normal", "fibrosis", "--sampler", "ddpm"]
    sample.main(sample.parse_args([*options[:at], *options[at + 2 :], *more]))
    rows = list(csv.DictReader((tmp_path / "out" / "samples.csv").open()))
    found = pixels(tmp_path / "out", rows)
    assert [row["label"] for row in rows] == ["normal", "fibrosis"] * 2
    assert np.array_equal(found[::2], found[1::2]) and not np.array_equal(found[0], found[2])


def test_the_picture_has_a_row_a_contour_and_a_column_a_label(stages, tmp_path):
    mixture = "normal=0.4 fibrosis=0.6"
    draw(stages, tmp_path / "a", "--compare_labels", "normal", mixture, "fibrosis")
    rows = list(csv.DictReader((tmp_path / "a" / "samples.csv").open()))
    assert [row["label"] for row in rows] == ["normal", mixture, "fibrosis"] * 3
    picture = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    side, gap, line = 128, 8, 18  # slices of 32 pixels are enlarged four times
    assert picture.shape[1] == 6 * side  # contour, real slice, three samples, overlay
    header, footer = 6 + 3 * line, 4 + line
    assert picture.shape[0] == header + 3 * (side + footer + gap) - gap
    # The first row's cells.
    cells = picture[header : header + side].reshape(side, 6, side, 3).swapaxes(0, 1)[:, ::4, ::4]
    data = LatentDataset(stages / "latents")
    row = data.indices("val", views=False)[0]
    assert np.array_equal(cells[0, ..., 0], 255 * data.contours[row][0])
    real = ct.unit_to_hu(data.heldout_images([row], "cpu")[0, 0].numpy(), data.window)
    for cell, hu in zip(cells[1:5], [real, *pixels(tmp_path / "a", rows[:3])], strict=True):
        shown = np.clip((hu + 1350) / 1500, 0, 1) * 255  # the lung window
        assert np.abs(cell[..., 0] - shown).max() <= 1
    # Each column has a title, and each real slice its label; a sample has its label above alone.
    text = picture.max(axis=2)
    assert all(text[:header, k * side : (k + 1) * side].any() for k in range(6))
    below = text[header + side : header + side + footer]
    assert below[:, side : 2 * side].any()
    assert not below[:, :side].any() and not below[:, 2 * side :].any()


def test_samples_that_copies_took_the_place_of_are_told(tmp_path, monkeypatch):
    """The picture says which cell has no sample, or one of other noise."""
    seen = {}
    monkeypatch.setattr(comparison, "write_comparison", lambda path, *rest: seen.update(given=rest))
    asked = Conditions(None, [""], [""], ["normal", "fibrosis"])
    attempts = {0: 0, 1: 2, 3: 0}
    comparison.write_rows(tmp_path, attempts, asked, lambda i: np.full((4, 4), -600.0))
    samples, contours, real, captions = seen["given"]
    assert contours is None and real is None
    assert captions == {
        "sample: normal": ["", "left out"], "sample: fibrosis": ["drawn again", ""],
    }  # fmt: skip
    assert (samples["sample: normal"][1] == -1).all() and (samples["sample: normal"][0] == 0).all()


def test_slices_without_lungs_have_no_share(stages):
    asked = Conditions(None, ["a"], ["normal"], ["normal", ""])
    shares = {0: 0.1, 1: float("nan"), 2: float("nan"), 3: float("nan"), 4: 0.3}
    said = comparison.describe_high_attenuation(shares, asked)
    assert said[1:] == ["  normal: 20.0 % in 2 of 3 samples", "  no label: no samples with lungs"]
    real = RealSlices(LatentDataset(stages / "latents"), [])
    said = comparison.describe_high_attenuation(
        shares, replace(asked, labels=["fibrosis"], real=real)
    )
    assert said[1] == "  normal: 20.0 % in 2 of 3 samples; no real slices"


def test_labels_as_typed():
    assert parse_compared([], ["b", "a"]) == ["b", "a"]
    assert parse_compared(["no fibrosis", ""], ["no fibrosis", "fibrosis"]) == ["no fibrosis", ""]
    labels = parse_compared(["a", "b=0.25 a=.75"], ["a", "b"])
    assert labels == ["a", {"b": 0.25, "a": 0.75}]
    assert [label_caption(label) for label in labels] == ["a", "25 % b, 75 % a"]
    for texts, classes, message in (
        ([], ["one"], r"expected two labels or more.*knows the classes \['one'\]"),
        ([], [], r"knows the classes \(none\)"),
        (["a"], ["a", "b"], "expected two labels or more"),
        (["a", "a"], ["a", "b"], "each once"),
        (["a", "c"], ["a", "b"], r"label c: the U-Net knows the classes \['a', 'b'\]"),
        (["a", "a=0.5 b=0.6"], ["a", "b"], r"sum to 1\.1"),
        (["a", "b=much"], ["a", "b"], "--compare_labels b=much: a weight is no number"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_compared(texts, classes)


def test_labels_are_compared_or_given(stages, tmp_path, capsys):
    with pytest.raises(SystemExit):
        draw(stages, tmp_path, "--label", "normal", "--compare_labels")
    assert "not allowed with argument --label" in capsys.readouterr().err
    with pytest.raises(ValueError, match="label ill: the U-Net knows"):
        draw(stages, tmp_path, "--compare_labels", "ill", "normal", "--dry_run")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_samples_of_all_labels(stages, tmp_path, capsys):
    options = sample_options(stages, tmp_path / "out", "--dry_run", "--compare_labels")
    options += ["--latent_data_dir", str(stages / "latents"), "--num_samples", "3"]
    sample.main(sample.parse_args(options))
    assert "6 samples can be drawn" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_it_goes_on_where_it_was_from_the_same_command_or_its_settings(stages, tmp_path, capsys):
    """As a kill leaves it before the table: the second label of one contour is missing."""
    rows = draw(stages, tmp_path / "out", "--compare_labels")

    def files() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.suffix != ".json"}

    before, said = files(), capsys.readouterr().out
    (tmp_path / "out" / "samples.csv").unlink()
    (tmp_path / "out" / rows[3]["file"]).unlink()
    times = {row["file"]: (tmp_path / "out" / row["file"]).stat().st_mtime_ns for row in rows[:3]}
    config = ["--config", tmp_path / "out" / "args.json", "--output_dir", tmp_path / "out"]
    sample.main(sample.parse_args([str(word) for word in config]))
    assert files() == before
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == time for n, time in times.items())
    again = capsys.readouterr().out
    assert "begun before; going on" in again and again.endswith(said)
    with pytest.raises(ValueError, match="holds other samples already"):
        draw(stages, tmp_path / "out", "--compare_labels", "normal", "fibrosis")


def test_two_processes_compare_as_one(stages, tmp_path):
    one = draw(stages, tmp_path / "one", "--compare_labels")
    words = ["--latent_data_dir", stages / "latents", "--num_samples", "3", "--format", "npy"]
    words += ["--compare_labels", "--batch_size", "2"]
    torchrun(sample, sample_options(stages, tmp_path / "two", *words))
    two = list(csv.DictReader((tmp_path / "two" / "samples.csv").open()))
    assert one == two
    assert np.allclose(pixels(tmp_path / "one", one), pixels(tmp_path / "two", two), atol=0.5)


def test_samples_of_a_contour_are_other_images_of_dicom(stages, tmp_path):
    rows = draw(stages, tmp_path, "--compare_labels", "--format", "dicom")
    images = [pydicom.dcmread(tmp_path / row["file"]) for row in rows]
    assert len({image.SOPInstanceUID for image in images}) == len(rows) == 6
