"""label.csv and its split, slices as tensors, and latent data sets: whole, checked, refused."""

import argparse
import errno
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fibldm import ct, datasets
from fibldm.batches import Batches, item_noise, item_uniform
from fibldm.checkpoint import load, save, save_model
from fibldm.datasets import CTDataset, Views, ahead, load_batches, shift_slices
from fibldm.disk import file_hash
from fibldm.encoding import LatentDataset, encode_csv, training_batches, write_latents
from fibldm.tables import Row, Split, read_table
from fibldm.unet import NO_LABEL
from fibldm.vae import LATENT_SCALE, VAE

CPU = torch.device("cpu")
SIZE = 16
HEADER = "image,contour,patient_id,label,split"
SPLIT = Split(0, 0.2, 0.1)


def write_pair(root: Path, name: str, size: tuple[int, int] = (SIZE, SIZE), seed: int = 0) -> None:
    """An 8-bit image and its contour, a rectangle of 255."""
    pixels = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    contour = np.zeros(size, np.uint8)
    contour[2 : size[0] // 2, 3:-2] = 255
    Image.fromarray(pixels).save(root / f"{name}.png")
    Image.fromarray(contour).save(root / f"{name}_c.png")


def make_data(root: Path, splits: str = "ttttvvs", slices: int = 2) -> Path:
    """A folder with a label.csv; a letter of `splits` is a patient: train, val or test."""
    root.mkdir(parents=True, exist_ok=True)
    names, lines = {"t": "train", "v": "val", "s": "test"}, [HEADER]
    for patient, letter in enumerate(splits):
        for k in range(slices):
            name = f"p{patient}_{k}"
            write_pair(root, name, seed=10 * patient + k)
            label = ("healthy", "fibrosis")[patient % 2]
            lines.append(f"{name}.png,{name}_c.png,p{patient},{label},{names[letter]}")
    (root / "label.csv").write_text("\n".join(lines) + "\n")
    return root / "label.csv"


# Slices.


def dataset_of(csv_file: Path, size: int = SIZE, **options) -> CTDataset:
    rows, _ = read_table(csv_file, csv_file.parent, SPLIT)
    return CTDataset(rows, csv_file.parent, csv_file.parent, size, **options)


def test_items_are_the_files(tmp_path):
    data = dataset_of(make_data(tmp_path))
    item = data[3]
    stored = np.asarray(Image.open(tmp_path / "p1_1.png")).astype(np.float32)
    np.testing.assert_allclose(item["image"][0].numpy(), stored / 127.5 - 1, atol=1e-5)
    contour = np.asarray(Image.open(tmp_path / "p1_1_c.png")) > 0
    np.testing.assert_array_equal(item["contour"][0].numpy(), contour)
    assert item["image"].dtype == torch.float32 and item["contour"].dtype == torch.uint8
    assert int(item["row"]) == 3 and len(data) == 14
    assert data.indices("val") == [8, 9, 10, 11] and data.indices("val", "test")[-1] == 13


@pytest.mark.parametrize("place", ["table", "root"])
def test_16_bit_slices_take_dataset_json_beside_the_table_or_in_the_root(tmp_path, place):
    csv_file = make_data(tmp_path / "root", "tv", slices=1)
    stored = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 5
    Image.fromarray(stored).save(tmp_path / "root" / "p0_0.png")
    tables = tmp_path / "tables"
    tables.mkdir()
    folder = {"table": tables, "root": tmp_path / "root"}[place]
    content = {"rescale_slope": 1, "rescale_intercept": -1024}
    (folder / "dataset.json").write_text(json.dumps(content))
    rows, _ = read_table(csv_file, tmp_path / "root", SPLIT)
    image = CTDataset(rows, tmp_path / "root", tables, SIZE)[0]["image"][0]
    np.testing.assert_allclose(image, ct.hu_to_unit(stored - 1024.0), atol=1e-5)


def test_the_window_is_the_one_asked_for(tmp_path):
    csv_file = make_data(tmp_path, "tv", slices=1)
    hu = np.linspace(-2000, 1000, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.float32)
    np.save(tmp_path / "a.npy", hu)
    csv_file.write_text(csv_file.read_text().replace("p0_0.png", "a.npy"))
    image = dataset_of(csv_file, window=(-1350.0, 150.0))[0]["image"][0]
    np.testing.assert_allclose(image, np.clip((hu + 600) / 750, -1, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(20, 32), (32, 32), (24, 24), (9, 8), (16, 16)])
def test_contours_stay_binary_and_images_in_range(tmp_path, size):
    csv_file = make_data(tmp_path, "tv", slices=1)
    write_pair(tmp_path, "p0_0", size)
    item = dataset_of(csv_file)[0]
    assert item["image"].shape == item["contour"].shape == (1, SIZE, SIZE)
    assert set(item["contour"].unique().tolist()) == {0, 1}
    assert item["image"].min() >= -1 and item["image"].max() <= 1


def test_padding_is_air_outside_of_the_contour(tmp_path):
    csv_file = make_data(tmp_path, "tv", slices=1)
    Image.fromarray(np.full((8, 16), 200, np.uint8)).save(tmp_path / "p0_0.png")
    Image.fromarray(np.full((8, 16), 255, np.uint8)).save(tmp_path / "p0_0_c.png")
    item = dataset_of(csv_file)[0]
    assert (item["image"][0, :4] == -1).all() and (item["image"][0, 12:] == -1).all()
    inside = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    inside[4:12] = 1
    assert torch.equal(item["contour"][0], inside)


def test_a_pixel_is_in_the_contour_where_half_of_it_is(tmp_path):
    csv_file = make_data(tmp_path, "tv", slices=1)
    write_pair(tmp_path, "p0_0", (2 * SIZE, 2 * SIZE))
    fine = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
    fine[0, 0], fine[0, 2:4], fine[0:2, 4:6] = 255, 255, 255  # 1, 2 and 4 of 4 pixels
    Image.fromarray(fine).save(tmp_path / "p0_0_c.png")
    contour = dataset_of(csv_file)[0]["contour"][0]
    assert contour[0, :4].tolist() == [0, 1, 1, 0] and int(contour.sum()) == 2


def test_contour_channels(tmp_path):
    csv_file = make_data(tmp_path, "tv", slices=1)
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[:4], labels[8:] = 1, 2
    Image.fromarray(labels).save(tmp_path / "p0_0_c.png")
    contour = dataset_of(csv_file, contour_channels=2)[0]["contour"]
    np.testing.assert_array_equal(contour, np.stack([labels == 1, labels == 2]))


def test_a_contour_of_another_size_is_refused_with_both(tmp_path):
    csv_file = make_data(tmp_path)
    Image.fromarray(np.zeros((SIZE, 12), np.uint8)).save(tmp_path / "p0_0_c.png")
    with pytest.raises(ValueError, match=r"p0_0_c\.png.*\(16, 12\).*p0_0\.png.*\(16, 16\)"):
        dataset_of(csv_file)[0]


def test_check_lists_all_bad_rows(tmp_path):
    csv_file = make_data(tmp_path)
    dataset_of(csv_file).check()
    (tmp_path / "p1_0.png").write_bytes(b"no image")
    whole = (tmp_path / "p2_1.png").read_bytes()
    (tmp_path / "p2_1.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "p6_1_c.png")
    with pytest.raises(ValueError, match="3 of 14 rows are bad") as error:
        dataset_of(csv_file).check()
    for name in ("p1_0.png", "p2_1.png", "p6_1_c.png"):
        assert str(error.value).count(f"\n  {tmp_path / name}: ") == 1


def test_notes_say_what_is_assumed(tmp_path):
    csv_file = make_data(tmp_path)
    (note,) = dataset_of(csv_file).notes()
    assert re.search(r"dataset\.json.*8-bit.*0 is -1000 HU, 255 is 400 HU", note)
    notes = dataset_of(csv_file, size=8).notes()
    assert len(notes) == 2 and "16x16" in notes[1] and "8x8" in notes[1]
    content = {"rescale_slope": 5, "rescale_intercept": -1000}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert dataset_of(csv_file).notes() == []


# Latents.


def tiny_vae(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return VAE(SIZE, 4, 3, base_channels=6, blocks=1).requires_grad_(False).eval()


def save_vae(path: Path, seed: int = 0) -> Path:
    facts = {"window": [-1000.0, 400.0], "split": vars(SPLIT), "step": 1}
    save_model(path, tiny_vae(seed), {}, **facts)
    return path


def encode(folder: Path, csv_file: Path, vae_file: Path, **options) -> list[str]:
    content = load(vae_file, "vae")
    vae = VAE(**content["config"]).eval()
    vae.load_state_dict(content["state"])
    options = {"contour_channels": 1, "views": Views(), **options}
    return encode_csv(
        folder, csv_file, csv_file.parent, vae, vae_file, content, device=CPU, batch_size=4,
        workers=0, **options,
    )  # fmt: skip


@pytest.fixture
def latents(tmp_path) -> tuple[Path, Path, Path]:
    """A latent data set, its table and its VAE."""
    csv_file, vae_file = make_data(tmp_path / "data"), save_vae(tmp_path / "vae.pth")
    encode(tmp_path / "latents", csv_file, vae_file)
    return tmp_path / "latents", csv_file, vae_file


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_latents_are_those_of_the_vae(latents):
    folder, csv_file, vae_file = latents
    data, slices, vae = LatentDataset(folder), dataset_of(csv_file), tiny_vae()
    assert len(data) == 14
    rows = [0, 5, 13]
    batch, contours, labels = data.batch(rows, CPU)
    images = torch.stack([slices[row]["image"] for row in rows])
    expected = vae.encode(images).mean * LATENT_SCALE
    torch.testing.assert_close(batch, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(contours, torch.stack([slices[row]["contour"] for row in rows]))
    assert data.classes == ["fibrosis", "healthy"] and labels.tolist() == [1, 1, 1]
    assert [row.split for row in data.rows] == [row.split for row in slices.rows]
    assert [row.patient_id for row in data.rows] == [row.patient_id for row in slices.rows]
    assert data.window == (-1000.0, 400.0)
    assert data.meta["vae_sha256"] == file_hash(vae_file)
    assert data.meta["latents_sha256"] == file_hash(folder / "latents.npy")


def test_latents_that_are_cut_short_in_use_are_named(latents, tmp_path):
    """Also where a memory map would end the process: beyond the last page of what is left."""
    folder = shutil.copytree(latents[0], tmp_path / "copy")
    data = LatentDataset(folder)
    first = data.latents[[0]]
    os.truncate(folder / "latents.npy", data.latents.start + first.nbytes * 3 // 2)
    assert np.array_equal(data.latents[[0]], first)
    for index in (1, len(data) - 1):
        with pytest.raises(ValueError, match=rf"latents\.npy: row {index} is cut off .*copy it"):
            data.batch([0, index], CPU)


def test_a_disk_that_fails_is_named_with_the_file(latents, monkeypatch):
    data = LatentDataset(latents[0])

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*contours\.npy'"):
        data.contours[0]


def test_held_out_slices_are_kept_and_training_slices_are_not(latents):
    folder, csv_file, _ = latents
    data, slices = LatentDataset(folder), dataset_of(csv_file)
    held = data.indices("val", "test")
    images = data.heldout_images(held[::-1], CPU)
    expected = torch.stack([slices[row]["image"] for row in held[::-1]])
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)
    with pytest.raises(KeyError):
        data.heldout_images([0], CPU)


def test_labels_are_numbered_as_the_model_has_them(latents):
    data = LatentDataset(latents[0])
    data.use_classes(["other", "fibrosis"])
    _, _, labels = data.batch([0, 2], CPU)
    assert labels.tolist() == [NO_LABEL, 1]


@pytest.mark.parametrize("existing", [False, True])
def test_latents_appear_whole_or_not_at_all(tmp_path, monkeypatch, existing):
    folder, data, vae = tmp_path / "latents", dataset_of(make_data(tmp_path / "data")), tiny_vae()
    if existing:
        write_latents(folder, data, vae, {"vae_sha256": "x"}, CPU)
        before = tree(folder)
    calls, encode = [], vae.encode

    def fail_on_third(x):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return encode(x)

    monkeypatch.setattr(vae, "encode", fail_on_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        write_latents(folder, data, vae, {"vae_sha256": "y"}, CPU, batch_size=4)
    assert folder.exists() == existing
    if existing:
        assert tree(folder) == before
    monkeypatch.undo()
    write_latents(folder, data, vae, {"vae_sha256": "y"}, CPU, batch_size=4)
    assert LatentDataset(folder).meta["vae_sha256"] == "y"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "latents"]


def test_latents_that_are_not_finite_are_not_written(tmp_path):
    folder, data, vae = tmp_path / "latents", dataset_of(make_data(tmp_path / "data")), tiny_vae()
    vae.latent_shift.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"latents: not written.*not finite"):
        write_latents(folder, data, vae, {}, CPU)
    assert not folder.exists()


def test_encoding_again_finds_the_same_latents(latents):
    folder, csv_file, vae_file = latents
    before = tree(folder)
    notes = encode(folder, csv_file, vae_file)
    assert "nothing to encode" in notes[-1]
    assert tree(folder) == before
    encode(folder, csv_file, vae_file, overwrite=True)
    assert tree(folder) == before


def test_latents_of_another_vae_or_table_are_refused_with_both_hashes(latents, tmp_path):
    folder, csv_file, vae_file = latents
    before = tree(folder)
    other = save_vae(tmp_path / "other.pth", seed=1)
    hashes = file_hash(vae_file), file_hash(other)
    with pytest.raises(ValueError, match=rf"vae_sha256.*{hashes[0]}.*{hashes[1]}.*--overwrite"):
        encode(folder, csv_file, other)

    old = file_hash(csv_file)
    csv_file.write_text(csv_file.read_text().replace("healthy", "normal"))
    with pytest.raises(ValueError, match=rf"label_csv.*{old}.*{file_hash(csv_file)}"):
        encode(folder, csv_file, vae_file)
    with pytest.raises(ValueError, match=r"label_csv|contour channels: found 1, expected 2"):
        encode(folder, csv_file, vae_file, contour_channels=2)
    assert tree(folder) == before

    encode(folder, csv_file, other, overwrite=True)
    assert LatentDataset(folder).meta["vae_sha256"] == hashes[1]
    assert LatentDataset(folder).classes == ["fibrosis", "normal"]


def test_other_contour_channels_are_refused_with_both(latents):
    folder, csv_file, vae_file = latents
    with pytest.raises(ValueError, match=r"contour channels: found 1, expected 2"):
        encode(folder, csv_file, vae_file, contour_channels=2)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_content_is_never_touched(latents, tmp_path, overwrite):
    _, csv_file, vae_file = latents
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis: not a latent data set"):
        encode(folder, csv_file, vae_file, overwrite=overwrite)
    assert (folder / "chapter.txt").read_text() == "years of work"


def test_an_empty_folder_is_filled(latents, tmp_path):
    _, csv_file, vae_file = latents
    (tmp_path / "empty").mkdir()
    encode(tmp_path / "empty", csv_file, vae_file)
    assert len(LatentDataset(tmp_path / "empty")) == 14


def test_the_split_comes_from_the_vae(latents, tmp_path):
    _, csv_file, vae_file = latents
    lines = [",".join(line.split(",")[:3]) for line in csv_file.read_text().splitlines()]
    csv_file.write_text("\n".join(lines))
    content = load(vae_file, "vae")
    for seed in (0, 1, 2):
        split = Split(seed, 0.4, 0.1)
        save(vae_file, {**content, "split": vars(split)})
        encode(tmp_path / f"latents_{seed}", csv_file, vae_file)
        rows = LatentDataset(tmp_path / f"latents_{seed}").rows
        assert [row.split for row in rows] == [split.of(row.patient_id) for row in rows]


def test_another_vae_than_the_latents_is_refused_with_both_hashes(latents, tmp_path):
    folder, csv_file, vae_file = latents
    data, other = LatentDataset(folder), save_vae(tmp_path / "other.pth", seed=1)
    assert data.lineage(vae_file) == {
        "vae": file_hash(vae_file),
        "latents": file_hash(folder / "latents.npy"),
        "contours": file_hash(folder / "contours.npy"),
        "label_csv": file_hash(csv_file),
    }
    with pytest.raises(ValueError, match=rf"other\.pth.*{file_hash(other)}.*{file_hash(vae_file)}"):
        data.lineage(other)
    with pytest.raises(ValueError, match=r"gone\.pth.*no such file"):
        data.lineage(tmp_path / "gone.pth")


def test_options_that_are_not_the_data_are_refused_with_both_values(latents):
    data = LatentDataset(latents[0])
    data.require_shape(3, 4)
    data.require_shape(None, None)
    with pytest.raises(ValueError, match=r"--latent_dim 8.*have 3"):
        data.require_shape(8, 4)
    with pytest.raises(ValueError, match=r"--latent_size 16.*have 4"):
        data.require_shape(3, 16)


@pytest.mark.parametrize(
    "name", ["meta.json", "manifest.csv", "latents.npy", "contours.npy", "heldout_images.npy"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_damaged_latents_are_refused_by_name(latents, name, damage):
    path = latents[0] / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(ValueError, match=re.escape(str(latents[0]))):
        LatentDataset(latents[0])


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252"])
def test_an_older_manifest_in_the_encoding_of_its_locale(tmp_path, encoding):
    csv_file, vae_file = make_data(tmp_path / "data"), save_vae(tmp_path / "vae.pth")
    text = (
        csv_file.read_text()
        .replace("healthy", "légère")
        .replace("fibrosis", "é" if encoding == "latin-1" else "€")
    )
    csv_file.write_text(text, "utf-8")
    encode(tmp_path / "latents", csv_file, vae_file)
    new, manifest = LatentDataset(tmp_path / "latents"), tmp_path / "latents" / "manifest.csv"
    lines = manifest.read_text("utf-8").splitlines()
    older = "".join(line.rsplit(",", 1)[0] + "\r\n" for line in lines)  # without views
    manifest.write_bytes(older.encode(encoding))
    assert LatentDataset(tmp_path / "latents").rows == new.rows
    assert {*new.labels} == {0, 1}


def test_changed_images_are_not_taken_for_encoded_ones(latents):
    """The table is the same, the files it names are not: named with both hashes and the remedy."""
    folder, csv_file, vae_file = latents
    (csv_file.parent / "dataset.json").write_text(
        '{"rescale_slope": 1.0, "rescale_intercept": -1000.0}'
    )
    with pytest.raises(ValueError, match=r"files_sha256: found \w{64}, expected \w{64}.*overwrite"):
        encode(folder, csv_file, vae_file)
    encode(folder, csv_file, vae_file, overwrite=True)
    encode(folder, csv_file, vae_file)


def test_views_move_a_slice_and_its_contour_alike(tmp_path):
    """A square that is bright and is the contour stays both, wherever it goes."""
    hu, contour = np.full((64, 64), -1000.0, np.float32), np.zeros((1, 64, 64), np.uint8)
    hu[20:40, 24:44], contour[0, 20:40, 24:44] = 100.0, 1
    places, sizes = [], []
    for number in range(1, 9):
        row = Row(f"{number}.png", "", "", "", "train", number)
        moved, drawn = Views(9, 0.125, 0.2).move(hu, contour, row)
        assert moved.shape == hu.shape and drawn.dtype == np.uint8
        assert moved.min() >= -1000 and moved.max() <= 100
        inside = moved > -450
        assert (inside != (drawn[0] > 0)).mean() < 0.02
        places.append(np.argwhere(inside).mean(axis=0))
        sizes.append(inside.sum())
    places = np.array(places) - [29.5, 33.5]
    assert np.abs(places).max() <= 8 + 2 and places.std(axis=0).min() > 1  # of 64: an eighth
    assert 0.6 * 400 < min(sizes) < 400 < max(sizes) < 1.5 * 400


def test_views_that_are_no_small_change_are_refused():
    for shift, scale in ((0.6, 0.0), (0.1, 1.0), (-0.1, 0.0)):
        with pytest.raises(ValueError, match=rf"--max_shift {shift:g} --max_scale {scale:g}"):
            Views(2, shift, scale)


def test_a_shifted_view_keeps_each_pixel():
    rng = np.random.default_rng(0)
    hu, contour = rng.normal(0, 100, (32, 32)), np.zeros((1, 32, 32), np.uint8)
    row = Row("a.png", "", "", "", "train", 3)
    moved, _ = Views(4, 0.1, 0.0).move(hu, contour, row)
    shifts = [(y, x) for y in range(-3, 4) for x in range(-3, 4)]
    middle = np.s_[4:-4, 4:-4]
    errors = {s: np.abs(np.roll(hu, s, (0, 1)) - moved)[middle].max() for s in shifts}
    assert min(errors.values()) < 1e-6 and errors[0, 0] > 1


def test_outlines_stay_closed_in_views():
    contour = np.zeros((1, 64, 64), bool)
    contour[0, 20:44, 10:30] = True
    outline = ct.outline_mask(contour).astype(np.uint8)
    for number in range(1, 6):
        row = Row("a.png", "", "", "", "train", number)
        _, drawn = Views(6, 0.1, 0.1).move(np.zeros((64, 64)), outline, row)
        assert ct.contour_style(drawn) == "outline"


def test_views_are_further_rows_of_training_slices(tmp_path):
    csv_file, vae_file = make_data(tmp_path / "data"), save_vae(tmp_path / "vae.pth")
    encode(tmp_path / "plain", csv_file, vae_file)
    encode(tmp_path / "views", csv_file, vae_file, views=Views(3, 0.1, 0.05))
    plain, data = LatentDataset(tmp_path / "plain"), LatentDataset(tmp_path / "views")
    count, train = len(plain), plain.indices("train")
    assert len(data) == count + 2 * len(train)
    assert np.array_equal(data.latents[:count], plain.latents[:])
    assert data.indices("val", "test") == plain.indices("val", "test")
    assert data.indices("train", views=False) == train
    for i, row in enumerate(data.rows[count:]):
        own = plain.rows[train[i % len(train)]]
        assert (row.image, row.patient_id, row.split) == (own.image, own.patient_id, own.split)
        assert row.view == 1 + i // len(train)
        assert not np.array_equal(data.latents[count + i], plain.latents[train[i % len(train)]])
    assert not np.array_equal(data.latents[count], data.latents[count + len(train)])
    with pytest.raises(ValueError, match=r"its views: found \[3, 0.1, 0.05\].*--overwrite"):
        encode(tmp_path / "views", csv_file, vae_file)


def test_a_view_does_not_depend_on_the_other_rows(tmp_path):
    csv_file, vae_file = make_data(tmp_path / "data"), save_vae(tmp_path / "vae.pth")
    views = Views(2, 0.1, 0.05)
    encode(tmp_path / "all", csv_file, vae_file, views=views)
    lines = csv_file.read_text().splitlines()
    fewer = csv_file.with_name("fewer.csv")
    fewer.write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    encode(tmp_path / "few", fewer, vae_file, views=views)
    both = [LatentDataset(tmp_path / name) for name in ("all", "few")]
    found = [{(r.image, r.view): d.latents[i] for i, r in enumerate(d.rows)} for d in both]
    assert found[1].keys() < found[0].keys()
    for key, latent in found[1].items():
        np.testing.assert_allclose(latent, found[0][key], atol=1e-5)


def test_ahead_keeps_order_and_is_one_ahead():
    made: list[int] = []

    def make():
        for i in range(5):
            made.append(i)
            yield i

    items = ahead(make())
    assert next(items) == 0
    while len(made) < 2:  # the next is made without being asked for
        time.sleep(0.001)
    time.sleep(0.05)
    assert made == [0, 1]
    assert list(items) == [1, 2, 3, 4]


def test_ahead_raises_what_was_raised():
    def make():
        yield 1
        raise ValueError("torn")

    items = ahead(make())
    assert next(items) == 1
    with pytest.raises(ValueError, match="torn"):
        next(items)


def test_training_batches_are_those_of_their_rows_and_positions(latents):
    data = LatentDataset(latents[0])
    args = argparse.Namespace(batch_size=4, grad_accum=2, steps=3, seed=7)
    rows = data.indices("train")
    found = list(training_batches(data, Batches(rows, args, 0), "unet", 3, CPU))
    assert len(found) == 6
    for (step, positions, chosen), batch in zip(Batches(rows, args, 0).parts(), found, strict=True):
        x0, contour, label, noise, draws = batch
        assert torch.equal(x0, torch.from_numpy(data.latents[chosen]))
        assert torch.equal(contour, torch.from_numpy(data.contours[chosen]))
        assert label.tolist() == data.labels[chosen].tolist()
        assert torch.equal(noise, item_noise(7, "unet", step, positions, x0.shape[1:]))
        assert torch.equal(draws, item_uniform(7, "draws", step, positions, 3))
    resumed = list(training_batches(data, Batches(rows, args, 2), "unet", 3, CPU))
    for mine, theirs in zip(resumed, found[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_latents_of_another_scale_are_refused_with_both(latents):
    meta = latents[0] / "meta.json"
    meta.write_text(meta.read_text().replace("0.18" + "215", "0.13025"))
    with pytest.raises(ValueError, match=r"latent scale: found 0\.13025, expected 0\.18"):
        LatentDataset(latents[0])


def test_shift_slices_moves_each_by_its_own_and_fills_with_air():
    x, most = torch.rand(5, 1, 6, 8), 5
    offsets = torch.tensor([[0, 0], [2, -3], [-1, 5], [5, -5], [-5, 4]])
    uniform = (offsets + most + 0.5) / (2 * most + 1)
    moved = shift_slices(x, uniform, most)
    for before, after, (down, right) in zip(x, moved, offsets.tolist(), strict=True):
        expected = np.pad(before[0], 10, constant_values=-1)  # with air all around
        expected = np.roll(expected, (down, right), (0, 1))[10:-10, 10:-10]
        assert np.array_equal(after[0], expected)
    assert torch.equal(shift_slices(x, uniform, 0), x)


def test_shift_slices_takes_every_distance_equally_often():
    x = torch.full((3000, 1, 9, 9), -1.0)
    x[:, :, 4, 4] = 1.0
    uniform = torch.rand(3000, 2, generator=torch.Generator().manual_seed(0))
    at = shift_slices(x, uniform, 4).flatten(1).argmax(dim=1)
    counts = torch.bincount(at // 9, minlength=9)
    assert (counts > 250).all() and len(at.unique()) == 81


def test_what_takes_the_place_of_an_unreadable_slice_is_of_the_same_split(phantoms, tmp_path):
    """Never a held-out slice in training; and not more of them than allowed."""
    shutil.copytree(phantoms, tmp_path / "data")
    rows, _ = read_table(tmp_path / "data" / "label.csv", tmp_path / "data", Split())
    rows = [replace(row, split=("train", "val", "test")[i % 3]) for i, row in enumerate(rows)]
    for i in 0, 3:
        (tmp_path / "data" / rows[i].image).write_bytes(b"gone")

    def data(max_bad: int) -> CTDataset:
        folder = tmp_path / "data"
        return CTDataset(rows, folder, folder, 32, max_bad=max_bad)

    tolerant = data(3)
    item = tolerant[0]
    assert torch.equal(item["image"], tolerant[6]["image"])  # after 0 and 3, which can't be read
    assert item["row"] == 0 and item["unreadable"].tolist() == [0, 3, -1]
    assert tolerant[1]["unreadable"].tolist() == [-1, -1, -1]
    assert tolerant.check() == ({(32, 32)}, [0, 3])
    with pytest.raises(ValueError, match=rf"{rows[3].image}: cannot be decoded"):
        data(1)[0]
    with pytest.raises(ValueError, match="2 of 24 rows are bad"):
        data(1).check()


def test_processes_for_which_shared_memory_has_no_room_are_not_started(monkeypatch, capsys):
    items, batches = [{"x": torch.zeros(2**20)}] * 8, [[0, 1], [2, 3]]  # 16 MiB a process
    usage = datasets.shutil.disk_usage("/")
    for free, used in ((2**30, 4), (40 * 2**20, 2), (2**20, 0)):
        now = usage._replace(free=free)
        monkeypatch.setattr(datasets.shutil, "disk_usage", lambda _, now=now: now)
        assert load_batches(items, batches, 4).num_workers == used
        said = capsys.readouterr().out
        assert (f"{used} processes decode images, not 4" in said) is (used != 4)
