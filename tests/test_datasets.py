"""Slices as tensors: read, checked once, moved, and what takes the place of an unreadable one."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import vae_options
from PIL import Image
from small_data import SIZE, SPLIT, dataset_of, make_data, write_pair

import train_vae
from fibldm import ct, datasets
from fibldm.balance import BalancedBatches
from fibldm.batches import Batches, Plan, item_noise, item_uniform
from fibldm.datasets import (
    CHECKED,
    CTDataset,
    Views,
    ahead,
    load_batches,
    load_slices,
    shift_slices,
    training_slices,
)
from fibldm.tables import Row, Split, read_table

# Slices.


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


def test_decoding_processes_of_a_thread_end_without_error(tmp_path):
    """Else PyTorch raises "worker exited unexpectedly" wherever the main thread is by then."""
    data = dataset_of(make_data(tmp_path))
    items = ahead(load_slices(data, [[0, 1], [2], [3]], 1, torch.device("cpu")))
    first, images = next(items)
    assert first["row"].tolist() == [0, 1] and images.shape == (2, 1, SIZE, SIZE)
    (process,) = multiprocessing.active_children()
    assert [batch["row"].tolist() for batch, _ in items] == [[2], [3]]
    process.join()
    assert process.exitcode == 0


def test_what_replaces_an_unreadable_slice_is_of_its_label_where_labels_are_balanced(tmp_path):
    """And it is the slice that a resumed run draws instead, which knows the row."""
    csv_file = make_data(tmp_path)
    data = dataset_of(csv_file, max_bad=1, by_label=True)
    train, labels = data.indices("train"), data.label_names("train")
    assert labels == ["healthy"] * 2 + ["fibrosis"] * 2 + ["healthy"] * 2 + ["fibrosis"] * 2
    bad = train[1]
    (tmp_path / data.rows[bad].image).write_bytes(b"gone")
    found = data[bad]
    assert torch.equal(found["image"], data[train[4]]["image"]) and train[4] == bad + 3
    assert found["unreadable"].tolist() == [bad]
    assert torch.equal(dataset_of(csv_file, max_bad=1)[bad]["image"], data[train[2]]["image"])
    plan = Plan(5, 8, balance_labels=[])
    before, after = (BalancedBatches(train, plan, 0, rows, labels) for rows in ([], [bad]))
    rows = [row for batch in before for row in batch]
    assert [train[4] if row == bad else row for row in rows] == [r for b in after for r in b]


@pytest.mark.parametrize("workers", [0, 1])
def test_slices_to_train_on_come_in_order_with_their_own_numbers(tmp_path, workers):
    data = dataset_of(make_data(tmp_path), images_alone=True, max_bad=1)
    batches = Batches(data.indices("train"), Plan(3, 4, grad_accum=2, seed=7), start=1)
    loaded = training_slices(data, batches, workers, 2, (2, 3, 3), torch.device("cpu"))
    micro_batches = list(batches.all_micro_batches())
    for (step, positions, _), found in zip(micro_batches, loaded, strict=True):
        uniform = item_uniform(7, "shift", step, positions, 3)
        x = torch.stack([data[row]["image"] for row in batches.rows_of(step, positions)])
        expected = (
            shift_slices(x, uniform[:, :2], 2), item_noise(7, "vae", step, positions, (2, 3, 3)),
            item_noise(7, "texture", step, positions, x.shape[1:]), uniform[:, 2],
            torch.full((2, 1), -1),
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(micro_batches) == 4


def test_images_alone_are_read_without_contours_which_are_checked_nevertheless(tmp_path):
    csv_file = make_data(tmp_path)
    whole, alone = dataset_of(csv_file), dataset_of(csv_file, images_alone=True)
    assert torch.equal(alone[0]["image"], whole[0]["image"]) and "contour" not in alone[0]
    (tmp_path / whole.rows[0].contour).write_bytes(b"gone")
    assert torch.equal(alone[1]["image"], whole[1]["image"]) and alone[0]["row"] == 0
    with pytest.raises(ValueError, match="1 of 14 rows are bad"):
        alone.check()


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


# What was checked is remembered.


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The images that are decoded from now on."""
    names, read_pair = [], CTDataset.read_pair

    def read(self: CTDataset, row: int) -> tuple[np.ndarray, np.ndarray]:
        names.append(self.rows[row].image)
        return read_pair(self, row)

    monkeypatch.setattr(CTDataset, "read_pair", read)
    return names


def test_files_that_did_not_change_are_decoded_once(tmp_path, decoded):
    csv_file, record = make_data(tmp_path / "data"), tmp_path / "run" / "checked.json"
    images = sorted(row.image for row in dataset_of(csv_file).rows)
    found = dataset_of(csv_file).check(record)
    assert sorted(decoded) == images and found == ({(SIZE, SIZE)}, [])
    decoded.clear()
    assert dataset_of(csv_file).check(record) == found and decoded == []
    dataset_of(csv_file).check()  # without a record
    assert sorted(decoded) == images


@pytest.mark.parametrize("file", ["p3_1.png", "p3_1_c.png"])
def test_only_what_changed_is_decoded_again(tmp_path, decoded, file):
    csv_file, record = make_data(tmp_path / "data"), tmp_path / "checked.json"
    dataset_of(csv_file).check(record)
    decoded.clear()
    path = csv_file.with_name(file)
    seconds = path.stat().st_mtime + 1
    os.utime(path, (seconds, seconds))  # of the same size
    dataset_of(csv_file).check(record)
    assert decoded == ["p3_1.png"]
    decoded.clear()
    path.write_bytes(path.read_bytes()[:60])
    for _ in range(2):  # what cannot be read is not remembered
        with pytest.raises(ValueError, match=rf"1 of 14 rows are bad:\n  .*{file}"):
            dataset_of(csv_file).check(record)
    assert decoded == ["p3_1.png", "p3_1.png"]
    assert dataset_of(csv_file, max_bad=1).check(record) == ({(SIZE, SIZE)}, [7])


def test_a_record_of_another_reading_or_a_damaged_one_counts_for_nothing(tmp_path, decoded):
    csv_file, record = make_data(tmp_path / "data"), tmp_path / "checked.json"
    dataset_of(csv_file).check(record)
    content = record.read_text()
    damaged = ["", content[:-30], "[]", "{}", '{"reading": null, "sizes": 3}', "[" * 5000]
    damaged += [content.replace("[[16, 16,", start) for start in ('[["a", 16,', "[[16,")]
    for text in damaged:
        assert text != content
        record.write_text(text)
        decoded.clear()
        dataset_of(csv_file).check(record)
        assert len(decoded) == 14 and record.read_text() == content
    for options in ({"window": (-900.0, 300.0)}, {"contour_channels": 2}):
        decoded.clear()
        with contextlib.suppress(ValueError):
            dataset_of(csv_file, **options).check(record)
        assert len(decoded) == 14
    dataset_of(csv_file).check(record)
    scale = {"rescale_slope": 1.0, "rescale_intercept": -1000.0}
    (csv_file.parent / "dataset.json").write_text(json.dumps(scale))
    decoded.clear()
    dataset_of(csv_file).check(record)
    assert len(decoded) == 14


def test_a_record_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "replace_text", full)
    assert dataset_of(make_data(tmp_path / "data")).check(tmp_path / "a")[1] == []


def test_the_fingerprint_is_of_names_sizes_and_scale(tmp_path):
    csv_file = make_data(tmp_path)
    pairs = [
        [n, (tmp_path / n).stat().st_size]
        for row in dataset_of(csv_file).rows
        for n in (row.image, row.contour)
    ]
    expected = hashlib.sha256(json.dumps([None, pairs]).encode()).hexdigest()
    assert dataset_of(csv_file).fingerprint() == expected  # as runs of older versions have it
    assert dataset_of(csv_file, views=Views(3)).fingerprint() == expected


def test_resuming_the_vae_decodes_no_file_to_check_it(phantoms, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(
        CTDataset, "_size_or_problem", lambda self, row: checked.append(row) or (32, 32)
    )
    options = vae_options(phantoms, tmp_path / "run")
    for steps in ("1", "2"):
        train_vae.main(train_vae.parse_args([*options, "--steps", steps]))
    assert sorted(checked) == list(range(24))
    assert (tmp_path / "run" / CHECKED).is_file() and not (phantoms / CHECKED).exists()
