"""Latent data sets: of the VAE, whole, checked, refused, and of older versions."""

import errno
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import SIZE, SPLIT, dataset_of, make_data

from fibldm.balance import BalancedBatches
from fibldm.batches import Batches, Plan, item_noise, item_uniform
from fibldm.checkpoint import load, save, save_model
from fibldm.datasets import CHECKED, CTDataset, Views
from fibldm.disk import PackedRows, create_rows, file_hash
from fibldm.encoding import LatentDataset, encode_csv, training_batches, write_latents
from fibldm.tables import Split
from fibldm.unet import NO_LABEL
from fibldm.vae import LATENT_SCALE, VAE

CPU = torch.device("cpu")


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
    assert data.table["split"].tolist() == [row.split for row in slices.rows]
    assert data.table["patient_id"].tolist() == [row.patient_id for row in slices.rows]
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
        table = LatentDataset(tmp_path / f"latents_{seed}").table
        assert table["split"].tolist() == [split.of(patient) for patient in table["patient_id"]]


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
    assert LatentDataset(tmp_path / "latents").table.equals(new.table)
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
    for i, row in enumerate(data.table[count:].itertuples(index=False)):
        own = plain.table.iloc[train[i % len(train)]]
        assert (row.image, row.patient_id, row.split) == (own.image, own.patient_id, own.split)
        assert row.view == 1 + i // len(train)
        assert not np.array_equal(data.latents[count + i], plain.latents[train[i % len(train)]])
    assert not np.array_equal(data.latents[count], data.latents[count + len(train)])
    with pytest.raises(ValueError, match=r"its views: found \[3, 0.1, 0.05\].*--overwrite"):
        encode(tmp_path / "views", csv_file, vae_file)


def test_views_of_a_rare_class_are_drawn_equally_often(tmp_path):
    csv_file, vae_file = make_data(tmp_path / "data"), save_vae(tmp_path / "vae.pth")
    text = csv_file.read_text().splitlines()
    labels = ["fibrosis" if line.startswith("p0") else "normal" for line in text[1:]]
    rows = [line.split(",") for line in text[1:]]
    rows = [[*row[:3], label, row[4]] for row, label in zip(rows, labels, strict=True)]
    csv_file.write_text("\n".join([text[0], *map(",".join, rows)]) + "\n")
    encode(tmp_path / "views", csv_file, vae_file, views=Views(3, 0.1, 0.05))
    data = LatentDataset(tmp_path / "views")
    train, plan = data.indices("train"), Plan(36, 8, balance_labels=[])
    assert len(train) == 24
    batches = BalancedBatches(train, plan, 0, (), data.label_names("train"))
    drawn = Counter(row for batch in batches for row in batch)
    of_class = {
        name: [drawn[r] for r in train if data.table["label"][r] == name] for name in labels
    }
    assert {name: len(counts) for name, counts in of_class.items()} == {"fibrosis": 6, "normal": 18}
    assert set(of_class["fibrosis"]) <= {23, 24, 25} and set(of_class["normal"]) <= {7, 8, 9}


def test_a_view_does_not_depend_on_the_other_rows(tmp_path):
    csv_file, vae_file = make_data(tmp_path / "data"), save_vae(tmp_path / "vae.pth")
    views = Views(2, 0.1, 0.05)
    encode(tmp_path / "all", csv_file, vae_file, views=views)
    lines = csv_file.read_text().splitlines()
    fewer = csv_file.with_name("fewer.csv")
    fewer.write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    encode(tmp_path / "few", fewer, vae_file, views=views)
    both = [LatentDataset(tmp_path / name) for name in ("all", "few")]
    found = [
        dict(zip(zip(d.table["image"], d.table["view"], strict=True), d.latents[:], strict=True))
        for d in both
    ]
    assert found[1].keys() < found[0].keys()
    for key, latent in found[1].items():
        np.testing.assert_allclose(latent, found[0][key], atol=1e-5)


def test_training_batches_are_those_of_their_rows_and_positions(latents):
    data = LatentDataset(latents[0])
    plan = Plan(batch_size=4, grad_accum=2, steps=3, seed=7)
    batches = Batches(data.indices("train"), plan)
    found = list(training_batches(data, batches, "unet", 3, CPU))
    assert len(found) == 6
    for (step, positions, _), batch in zip(batches.all_micro_batches(), found, strict=True):
        x0, contour, label, noise, draws = batch
        chosen = batches.rows_of(step, positions)
        assert torch.equal(x0, torch.from_numpy(data.latents[chosen]))
        assert torch.equal(contour, torch.from_numpy(data.contours[chosen]))
        assert label.tolist() == data.labels[chosen].tolist()
        assert torch.equal(noise, item_noise(7, "unet", step, positions, x0.shape[1:]))
        assert torch.equal(draws, item_uniform(7, "draws", step, positions, 3))
    later = Batches(data.indices("train"), plan, 2)
    for one, other in zip(training_batches(data, later, "unet", 3, CPU), found[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_latents_of_another_scale_are_refused_with_both(latents):
    meta = latents[0] / "meta.json"
    meta.write_text(meta.read_text().replace("0.18" + "215", "0.13025"))
    with pytest.raises(ValueError, match=r"latent scale: found 0\.13025, expected 0\.18"):
        LatentDataset(latents[0])


def test_contours_are_bits_on_disk_and_bytes_in_use(latents):
    data, found = dataset_of(latents[1]), LatentDataset(latents[0])
    expected = np.stack([data[i]["contour"].numpy() for i in range(len(data))])
    assert found.contours.shape == expected.shape and expected.any()
    for index in (3, [5, 0, 5], slice(2, 7), slice(None)):
        assert np.array_equal(found.contours[index], expected[index])
    assert found.contours[[1]].dtype == np.uint8
    path = latents[0] / "contours.npy"
    assert np.load(path).nbytes * 8 == expected.size
    assert found.meta["contours_sha256"] == file_hash(path)


def test_bits_of_lines_that_eight_does_not_divide(tmp_path):
    odd = np.random.default_rng(0).integers(0, 2, (4, 2, 5, 11)).astype(np.uint8)
    packed = PackedRows(create_rows(tmp_path / "odd.npy", np.uint8, (4, 2, 5, 2)), 11)
    packed[[2, 0]], packed[[1, 3]] = odd[[2, 0]], odd[[1, 3]]
    assert np.array_equal(packed[:], odd) and packed.shape == odd.shape
    with pytest.raises(ValueError, match=r"odd\.npy.*expected uint8, 3 bytes"):
        PackedRows(packed.stored, 17)


def test_a_folder_with_a_byte_for_each_pixel_is_read_as_before(latents):
    folder, csv_file, vae_file = latents
    new, meta = LatentDataset(folder), json.loads((folder / "meta.json").read_text())
    contours = new.contours[:]
    np.save(folder / "contours.npy", contours)
    del meta["contour_bits"]
    meta["contours_sha256"] = file_hash(folder / "contours.npy")
    (folder / "meta.json").write_text(json.dumps(meta))
    old = LatentDataset(folder)
    assert np.array_equal(old.contours[:], contours)
    assert (old.contour_channels, old.image_size) == (new.contour_channels, new.image_size)
    assert old.lineage(vae_file)["contours"] == file_hash(folder / "contours.npy")
    assert "nothing to encode" in encode(folder, csv_file, vae_file)[-1]


def test_what_the_vae_has_checked_is_not_decoded_again_before_it_is_encoded(tmp_path, monkeypatch):
    csv_file, vae_file = make_data(tmp_path / "data"), save_vae(tmp_path / "vae.pth")
    read = []
    monkeypatch.setattr(
        CTDataset, "_size_or_problem", lambda self, row: read.append(row) or (SIZE, SIZE)
    )
    encode(tmp_path / "a", csv_file, vae_file)
    assert len(read) == 14 and not (tmp_path / CHECKED).exists()
    dataset_of(csv_file).check(tmp_path / CHECKED)
    before, read[:] = (tmp_path / CHECKED).read_bytes(), []
    encode(tmp_path / "b", csv_file, vae_file)
    assert read == [] and (tmp_path / CHECKED).read_bytes() == before
    assert {path.name for path in csv_file.parent.iterdir()} == {
        "label.csv",
        *(f"p{i}_{k}{end}.png" for i in range(7) for k in (0, 1) for end in ("", "_c")),
    }
