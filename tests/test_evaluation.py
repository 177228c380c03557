"""Evaluations on phantoms and tiny models, from Python and by scripts/evaluate.py."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, sample_options

import sample
from fibldm import ct, evaluation, export
from fibldm.datasets import CTDataset
from fibldm.evaluation import Evaluation
from fibldm.features import ALEXNET, INCEPTION, use_weights
from fibldm.lungs import lung_mask
from fibldm.metrics import contour_dice
from fibldm.report import write_report
from fibldm.synthesis import Synthesizer
from fibldm.tables import Split, read_table, write_csv

sys.path.insert(0, str(ROOT / "scripts"))
import evaluate

pytestmark = pytest.mark.usefixtures("without_weights")
SPLIT = ["--val_fraction", "0.3"]  # of the stages' VAE
OPTIONS = {"split": "val", "patient_split": Split(0, 0.3, 0.1), "draws": 20, "workers": 0}
QUICK = ["--draws", "20", "--device", "cpu", "--num_workers", "0", "--date", "2026-11-22"]


@pytest.fixture(autouse=True)
def no_weights_dir():
    yield
    use_weights(None)


def run(real: Path, samples: Path, output: Path, *more: str) -> tuple[dict, str]:
    """metrics.json and the page."""
    options = ["--real", real, "--samples", samples, "--output_dir", output, *QUICK, *more]
    evaluate.main(evaluate.parse_args([str(option) for option in options]))
    return json.loads((output / "metrics.json").read_text()), (output / "index.html").read_text()


def slices(phantoms: Path, *splits: str) -> tuple[list, CTDataset]:
    rows, _ = read_table(phantoms / "label.csv", phantoms, Split(0, 0.3, 0.1))
    rows = [row for row in rows if row.split in splits]
    return rows, CTDataset(rows, phantoms, phantoms, 32)


def write(folder: Path, images, contours: list[str], labels: list[str], **options) -> Path:
    """A folder as sample.py writes it."""
    folder.mkdir()
    kind = options.get("kind", "png")
    names = [f"sample_{i:05d}{export.SUFFIXES[kind]}" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        export.write_slice(folder / name, image, ct.DEFAULT_WINDOW, kind)
    if kind == "png":
        ct.write_dataset_info(folder, export.png_info(options.get("window", ct.DEFAULT_WINDOW)))
    columns = ["file", "contour", "label"]
    cells = zip(names, contours, labels, strict=True)
    lines = [dict(zip(columns, line, strict=True)) for line in cells]
    write_csv(folder / "samples.csv", lines, columns)
    return folder


def held_out(phantoms: Path, folder: Path, **options) -> Path:
    """The slices of val as if they were samples asked to follow their own contours."""
    rows, data = slices(phantoms, "val")
    images = [data[i]["image"][0].numpy() for i in range(len(rows))]
    contours = [f"contour of {row.image}" for row in rows]
    return write(folder, images, contours, [row.label for row in rows], **options)


def scores(content: dict, group: str) -> dict[str, dict]:
    return {row["name"]: row for row in content["groups"][group]["scores"]}


# From Python.


def test_an_evaluation_has_scores_verdicts_and_samples(phantoms, stages, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    model, said = Synthesizer.from_checkpoints(stages / "vae" / "vae_best.pth", device="cpu"), []
    found = evaluation.evaluate(
        phantoms, samples, train=phantoms, model=model, say=said.append, **OPTIONS
    )
    assert isinstance(found, Evaluation) and said
    assert list(found.groups)[:3] == ["Realism", "Control", "Disease"]
    assert "Privacy" in found.groups and found.groups["Control"].verdict.word == "good"
    files = sorted(path.name for path in samples.glob("*.png"))
    assert [one.file for one in found.samples] == files
    assert all(set(one.nearest.distances) == {"latents", "pixels"} for one in found.samples)
    assert len(found.real) == len(found.real_labels) == len(files)
    assert found.paired and found.pictures and found.closest
    table = found.table()
    assert {"group", "name", "value", "low", "high", "baseline", "source"} <= set(table.columns)
    dice = table[table["name"] == "dice"].iloc[0]
    assert dice["group"] == "Control" and dice["value"] == pytest.approx(dice["baseline"], abs=0.02)
    write_report(found, tmp_path / "report")
    assert (tmp_path / "report" / "index.html").is_file()


def test_the_same_call_gives_the_same_numbers_and_leaves_nothing(phantoms, tmp_path):
    samples, scratch = held_out(phantoms, tmp_path / "samples"), tmp_path / "scratch"
    tables = [
        evaluation.evaluate(phantoms, samples, scratch=scratch, **OPTIONS).table().to_csv()
        for _ in range(2)
    ]
    assert tables[0] == tables[1] and list(scratch.iterdir()) == []


def test_copies_are_not_looked_for_without_training_data(phantoms, tmp_path):
    found = evaluation.evaluate(phantoms, held_out(phantoms, tmp_path / "samples"), **OPTIONS)
    assert found.groups["Privacy"].verdict.word == "not judged"
    assert "no training data were given" in found.groups["Privacy"].verdict.sentence
    assert all(one.nearest is None for one in found.samples) and found.closest == []


def test_a_window_that_is_not_the_models_is_refused(phantoms, stages, tmp_path):
    model = Synthesizer.from_checkpoints(stages / "vae" / "vae_best.pth", device="cpu")
    with pytest.raises(ValueError, match=r"window .*-600.*expected .*-1000"):
        evaluation.evaluate(phantoms, tmp_path, model=model, window=(-600.0, 200.0))


def test_pictures_are_rgb(phantoms, tmp_path):
    found = evaluation.evaluate(phantoms, held_out(phantoms, tmp_path / "samples"), **OPTIONS)
    for picture in found.pictures:
        assert picture.pixels.dtype == np.uint8 and picture.pixels.shape[2] == 3


# By the script.


@pytest.fixture(scope="module")
def drawn(stages, tmp_path_factory) -> Path:
    """Samples of the tiny models, for held-out contours, and what the report says of them."""
    folder = tmp_path_factory.mktemp("drawn")
    options = ["--latent_data_dir", str(stages / "latents"), "--num_samples", "6"]
    sample.main(sample.parse_args(sample_options(stages, folder / "samples", *options)))
    return folder


def test_samples_of_a_model_from_end_to_end(drawn, stages, phantoms, tmp_path):
    vae = ["--vae_checkpoint", stages / "vae" / "vae_best.pth"]
    content, page = run(
        phantoms,
        drawn / "samples",
        tmp_path / "report",
        "--split",
        "val",
        "--train",
        phantoms,
        *vae,
    )
    assert {"Realism", "Control", "Disease", "Privacy"} <= content["groups"].keys()
    for group in content["groups"].values():
        assert group["verdict"] in (None, "good", "doubtful", "bad", "not judged")
        for row in group["scores"]:
            assert row["name"] in page
    assert scores(content, "Realism").keys() == {"ssim"}  # all that needs no weights
    assert any("fetch_metric_weights" in note for note in content["groups"]["Realism"]["notes"])
    assert "distance to the nearest training slice, latents, median" in str(content)
    assert content["facts"]["Date"] == "2026-11-22"
    assert "vae_best.pth, SHA-256" in content["facts"]["Samples' vae"]
    assert [one["file"] for one in content["samples"]] == [f"sample_{i:05d}.png" for i in range(6)]
    assert page.count("data:image/png") >= 12  # six samples, six closest pairs
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["index.html", "metrics.json"]


def test_no_patient_is_named(phantoms, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    content, page = run(
        phantoms, samples, tmp_path / "report", "--split", "val", "--train", phantoms, *SPLIT
    )
    rows, _ = slices(phantoms, "train", "val", "test")
    for text in (page, json.dumps(content)):
        for row in rows:
            assert row.patient_id not in text and row.image not in text


@pytest.mark.parametrize("kind", export.FORMATS)
def test_real_slices_as_samples_reach_the_ceiling_in_every_format(phantoms, tmp_path, kind):
    """What is compared with itself: no distance, and the contours followed as real slices do."""
    samples = held_out(phantoms, tmp_path / "samples", kind=kind)
    content, _ = run(phantoms, samples, tmp_path / "report", "--split", "val", *SPLIT)
    disease = scores(content, "Disease")
    apart = disease["mean"]["difference"]["value"]
    assert apart == pytest.approx(0, abs=0.5)  # HU: NIfTI and DICOM round
    assert content["groups"]["Disease"]["verdict"] == "good"
    assert scores(content, "Realism")["ssim"]["value"] == pytest.approx(1, abs=1e-3)
    dice = scores(content, "Control")["dice"]
    assert dice["value"] == pytest.approx(dice["baseline"], abs=0.02)
    assert content["groups"]["Privacy"]["verdict"] == "not judged"
    assert {"Disease: fibrosis", "Disease: normal"} & content["groups"].keys()


def test_control_is_the_dice_of_lungs_and_the_contour_asked_for(phantoms, tmp_path):
    """Contours of other slices lower it; by as much as the masks tell."""
    rows, data = slices(phantoms, "val")
    images = [data[i]["image"][0].numpy() for i in range(len(rows))]
    others = [f"contour of {row.image}" for row in [*rows[1:], rows[0]]]
    samples = write(tmp_path / "samples", images, others, [""] * len(rows))
    content, _ = run(phantoms, samples, tmp_path / "report", "--split", "val", *SPLIT)
    dice = scores(content, "Control")["dice"]
    contours = np.stack([data[i]["contour"][0].numpy() for i in range(len(rows))])
    masks = np.stack([lung_mask(ct.unit_to_hu(image)) for image in images])
    expected = contour_dice(masks, np.roll(contours, -1, axis=0)).mean()
    assert dice["value"] == pytest.approx(expected, abs=1e-6) and dice["value"] < dice["baseline"]


def test_millimetres_are_pixels_times_the_spacing_of_the_data(phantoms, tmp_path):
    data = shutil.copytree(phantoms, tmp_path / "data")
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**content, "pixel_spacing": 2.5}))
    rows, _ = slices(phantoms, "val")
    samples = held_out(phantoms, tmp_path / "samples")
    found, _ = run(data, samples, tmp_path / "report", "--split", "val", *SPLIT)
    control = scores(found, "Control")
    assert control["hd95_mm"]["value"] == pytest.approx(2.5 * control["hd95_px"]["value"])
    assert control["hd95_mm"]["baseline"] == pytest.approx(2.5 * control["hd95_px"]["baseline"])
    assert control["hd95_mm"]["n_fake"] == len(rows)


def test_contours_given_as_files_give_control_but_no_pairs(phantoms, tmp_path):
    rows, data = slices(phantoms, "val")
    images = [data[i]["image"][0].numpy() for i in range(len(rows))]
    files = [str(phantoms / row.contour) for row in rows]
    samples = write(tmp_path / "samples", images, files, [""] * len(rows))
    content, page = run(phantoms, samples, tmp_path / "report", "--split", "val", *SPLIT)
    assert scores(content, "Control")["dice"]["n_fake"] == len(rows)
    assert scores(content, "Realism")["ssim"]["value"] is None
    assert "real slice 1" in page


def test_a_folder_of_images_alone_has_no_control_and_it_is_said(phantoms, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    (samples / "samples.csv").unlink()
    content, page = run(phantoms, samples, tmp_path / "report", "--split", "val", *SPLIT)
    assert content["groups"]["Control"]["verdict"] == "not judged"
    assert "No samples.csv beside the samples" in page


def test_copies_of_training_slices_are_flagged_and_shown(phantoms, tmp_path):
    _, data = slices(phantoms, "train")
    images = [data[i]["image"][0].numpy() for i in range(4)]
    samples = write(tmp_path / "samples", images, [""] * 4, [""] * 4)
    content, page = run(
        phantoms, samples, tmp_path / "report", "--split", "val", "--train", phantoms, *SPLIT
    )
    assert [one["nearest"]["training_slice"] for one in content["samples"]] == [0, 1, 2, 3]
    assert all(one["nearest"]["flagged"] for one in content["samples"])
    assert content["groups"]["Privacy"]["verdict"] == "bad"
    assert "sample_00000.png and training slice 0: flagged" in page


def test_implausible_samples_are_counted_and_listed(phantoms, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    export.write_slice(samples / "sample_00001.png", np.ones((32, 32)), ct.DEFAULT_WINDOW, "png")
    content, page = run(phantoms, samples, tmp_path / "report", "--split", "val", *SPLIT)
    assert content["samples"][1]["implausible"] == "no lung found"
    assert "sample_00001.png: no lung found" in page
    assert content["samples"][1]["measures"] == {}  # no NaN in the file


def test_processes_and_their_number_change_nothing(phantoms, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    options = ["--split", "val", "--train", phantoms, *SPLIT]
    one, _ = run(phantoms, samples, tmp_path / "a", *options)
    two, _ = run(phantoms, samples, tmp_path / "b", *options, "--num_workers", "2")
    assert one == two


def test_hostile_file_names_stay_text(phantoms, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    (samples / "samples.csv").unlink()
    name = "<img src=x onerror=alert(1)>.png"
    shutil.move(samples / "sample_00000.png", samples / name)
    content, page = run(phantoms, samples, tmp_path / "report", "--split", "val", *SPLIT)
    assert name in [one["file"] for one in content["samples"]]
    assert "<img src=x" not in page and "&lt;img src=x" in page


# Bad input: one message that names what was found and what is expected, and no report.


def refused(real, samples, output, *more) -> str:
    with pytest.raises(ValueError) as error:
        run(real, samples, output, "--split", "val", *more)
    assert not (output / "index.html").exists() and not (output / "metrics.json").exists()
    return str(error.value)


def test_no_samples(phantoms, tmp_path):
    folder = tmp_path / "samples"
    assert "no such folder" in refused(phantoms, folder, tmp_path / "r", *SPLIT)
    folder.mkdir()
    assert "no samples in it" in refused(phantoms, folder, tmp_path / "r", *SPLIT)
    (folder / "samples.csv").write_text("file,contour,label\n")
    assert "no samples in it" in refused(phantoms, folder, tmp_path / "r", *SPLIT)
    (folder / "samples.csv").write_text("file,contour,label\ngone.png,,\n")
    assert "gone.png" in refused(phantoms, folder, tmp_path / "r", *SPLIT)
    (folder / "samples.csv").write_text("name,outline\na.png,b.png\n")
    assert "expected file, contour, label" in refused(phantoms, folder, tmp_path / "r", *SPLIT)


def test_contours_of_another_data_set(phantoms, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    text = (samples / "samples.csv").read_text()
    (samples / "samples.csv").write_text(text.replace("contour of images", "contour of elsewhere"))
    message = refused(phantoms, samples, tmp_path / "r", *SPLIT)
    assert "elsewhere" in message and "--real" in message


def test_sizes_that_differ(phantoms, stages, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    export.write_slice(samples / "sample_00000.png", np.zeros((48, 48)), ct.DEFAULT_WINDOW, "png")
    message = refused(phantoms, samples, tmp_path / "r", *SPLIT)
    assert "sizes differ" in message and "sample_00000.png: 48x48" in message
    large = write(tmp_path / "large", [np.zeros((48, 48))] * 2, [""] * 2, [""] * 2)
    vae = ["--vae_checkpoint", stages / "vae" / "vae_best.pth"]
    message = refused(phantoms, large, tmp_path / "r", *vae)
    assert "48x48" in message and "expected 32x32 as the VAE has" in message


def test_another_window(phantoms, stages, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples", window=(-600.0, 200.0))
    message = refused(phantoms, samples, tmp_path / "r", *SPLIT)
    assert "another window" in message and "-600 to 200 HU, expected -1000 to 400" in message
    vae = ["--vae_checkpoint", stages / "vae" / "vae_best.pth", "--window", "-600", "200"]
    assert "(-1000.0, 400.0)" in refused(phantoms, samples, tmp_path / "r", *vae)


def test_png_without_its_scale(phantoms, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    (samples / "dataset.json").unlink()
    assert "write a dataset.json beside the samples" in refused(
        phantoms, samples, tmp_path / "r", *SPLIT
    )


def test_damaged_samples_are_named(phantoms, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    (samples / "sample_00001.png").write_bytes(b"no picture")
    assert "sample_00001.png" in refused(phantoms, samples, tmp_path / "r", *SPLIT)


def test_data_that_are_not_there(phantoms, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    message = refused(tmp_path / "none", samples, tmp_path / "r", *SPLIT)
    assert f"{tmp_path / 'none'}: no such folder" in message
    message = refused(phantoms, samples, tmp_path / "r", "--train", tmp_path / "gone", *SPLIT)
    assert f"{tmp_path / 'gone'}: no such folder" in message
    table = ["--val_fraction", "0.3", "--test_fraction", "0"]
    with pytest.raises(ValueError, match="none of its 24 rows is in the test split"):
        run(phantoms, samples, tmp_path / "r", "--split", "test", *table)


def test_another_split_than_the_vaes(phantoms, stages, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    vae = ["--vae_checkpoint", stages / "vae" / "vae_best.pth", "--val_fraction", "0.5"]
    assert "found 0.5, expected 0.3" in refused(phantoms, samples, tmp_path / "r", *vae)


@pytest.mark.parametrize("name", [INCEPTION, ALEXNET])
def test_corrupt_weights(phantoms, tmp_path, name):
    samples = held_out(phantoms, tmp_path / "samples")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / name).write_bytes(b"no weights")
    message = refused(phantoms, samples, tmp_path / "r", *SPLIT, "--weights_dir", weights)
    assert name in message and "fetch_metric_weights.py" in message


def test_another_page_is_left_alone(phantoms, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    with pytest.raises(ValueError, match=r"another index\.html"):
        run(phantoms, samples, tmp_path / "site", "--split", "val", *SPLIT)
    assert (tmp_path / "site" / "index.html").read_text() == "mine"


def test_the_numbers_are_plain_json(phantoms, tmp_path):
    samples = held_out(phantoms, tmp_path / "samples")
    run(phantoms, samples, tmp_path / "report", "--split", "val", *SPLIT)

    def no_constant(name):
        raise AssertionError(name)

    text = (tmp_path / "report" / "metrics.json").read_text()
    content = json.loads(text, parse_constant=no_constant)
    assert all(
        math.isfinite(row["value"]) for row in content["groups"]["Control"]["scores"]
    )  # they were measured
