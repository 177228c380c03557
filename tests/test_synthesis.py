"""Synthesis from Python: what sample.py draws, from arrays, and clear errors before it begins."""

import re
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import ROOT, sample_options

import sample as script
from fibldm import ct, synthesis
from fibldm.checkpoint import load, save_model
from fibldm.conditions import parse_label, read_label
from fibldm.encoding import LatentDataset
from fibldm.export import SUFFIXES
from fibldm.synthesis import Sample, Sampling, Synthesizer
from fibldm.unet import NO_LABEL, UNet
from fibldm.vae import LATENT_SCALE

FAST = {"steps": 3}


def paths(stages: Path) -> list[Path]:
    return [stages / name / f"{name}_best.pth" for name in ("vae", "unet", "controlnet")]


@pytest.fixture(scope="module")
def model(stages) -> Synthesizer:
    return Synthesizer.from_checkpoints(*paths(stages), device="cpu")


@pytest.fixture(scope="module")
def contours(stages) -> np.ndarray:
    data = LatentDataset(stages / "latents")
    return data.contours[data.indices("val", views=False)[:3]]


def images(samples) -> np.ndarray:
    return np.stack([one.image for one in samples])


@pytest.mark.parametrize("name", SUFFIXES)
def test_python_and_the_script_write_the_same_bytes(name, stages, model, tmp_path):
    data = LatentDataset(stages / "latents")
    contours = data.contours[data.indices("val", views=False)]
    options = sample_options(stages, tmp_path / "script", "--seed", "3", "--batch_size", "4")
    options += ["--latent_data_dir", str(stages / "latents"), "--format", name]
    options += ["--label", "fibrosis"]
    script.main(script.parse_args(options))
    (tmp_path / "python").mkdir()
    for one in model.sample(contours, "fibrosis", seed=3, batch_size=4, **FAST):
        one.save(tmp_path / "python" / f"sample_{one.index:05d}{SUFFIXES[name]}")
    written = sorted(path.name for path in (tmp_path / "script").glob("sample_*"))
    assert len(written) == len(contours)
    for file in written + ["dataset.json"] * (name == "png"):
        assert (tmp_path / "python" / file).read_bytes() == (
            tmp_path / "script" / file
        ).read_bytes()


def test_a_sample_is_what_was_asked_for(model, contours):
    drawn = list(model.sample(contours, ["normal", None, "fibrosis"], seed=5, **FAST))
    assert [one.index for one in drawn] == [0, 1, 2]
    assert [one.label for one in drawn] == ["normal", "", "fibrosis"]
    assert {(one.seed, one.attempt, one.copy_of) for one in drawn} == {(5, 0, None)}
    np.testing.assert_array_equal(np.stack([one.contour for one in drawn]), contours)
    for one in drawn:
        assert isinstance(one, Sample) and one.image.shape == one.hu.shape == (32, 32)
        assert one.hu.dtype == np.float32 and -1000 <= one.hu.min() <= one.hu.max() <= 400
        np.testing.assert_allclose(ct.hu_to_unit(one.hu), one.image, atol=1e-5)
        decoded = model.decode(one.latent[None], one.seed, [one.index])
        np.testing.assert_allclose(decoded[0], one.image, atol=1e-5)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_sample_i_follows_from_seed_and_i_alone(model, contours, sampler):
    options = {"sampler": sampler, **FAST}
    whole = images(model.sample(contours, indices=range(6), seed=1, **options))
    parts = images(model.sample(contours, indices=range(6), seed=1, batch_size=2, **options))
    some = images(model.sample(contours, indices=[5, 1], seed=1, **options))
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    np.testing.assert_allclose(some, whole[[5, 1]], atol=1e-4)
    other = images(model.sample(contours, indices=range(6), seed=2, **options))
    assert np.abs(other - whole).max(axis=(1, 2)).min() > 0.01
    # Numbers beyond the contours take them in turn, with noise of their own.
    assert np.abs(whole[3] - whole[0]).max() > 0.01


def test_each_step_and_the_texture_have_noise_of_their_own(model, contours, monkeypatch):
    drawn, item_noise = [], synthesis.item_noise

    def watched(seed, stream, step, items, shape):
        drawn.append(item_noise(seed, stream, step, items, shape).flatten(1)[:, :48])
        return item_noise(seed, stream, step, items, shape)

    monkeypatch.setattr(synthesis, "item_noise", watched)
    list(model.sample(contours, sampler="ddpm", steps=4))
    assert len(drawn) == 1 + 3 + 1  # the last step adds none
    assert len({row.numpy().tobytes() for noise in drawn for row in noise}) == 5 * len(contours)


def test_contours_of_any_size_style_and_type(model, contours):
    large = contours.repeat(8, axis=2).repeat(8, axis=3)  # (M, 1, 256, 256)
    outlines = np.stack([ct.outline_mask(c) for c in large])
    mixed = [contours[0, 0], large[1], outlines[2, 0]]
    assert contours.any(axis=(1, 2, 3)).all() and (contours[0] != contours[1]).any()
    for given in (
        *(contours > 0, contours[:, 0], 255 * contours, 1.0 * contours, large, large[:, 0] * 1.0),
        *(outlines, mixed),
    ):
        drawn = list(model.sample(given, **FAST))
        np.testing.assert_array_equal(np.stack([one.contour for one in drawn]), contours)
    (one,) = model.sample(contours[0, 0], **FAST)
    np.testing.assert_array_equal(one.contour, contours[0])


def test_what_is_drawn_follows_the_contour(stages, contours):
    model = Synthesizer.from_checkpoints(*paths(stages)[:2], device="cpu")
    model.unet.encoder.conv_in.weight[:, 4:] *= 100  # a few steps leave little of a contour
    model.unet.decoder.conv_out.weight *= 10
    drawn, others = (images(model.sample(c, **FAST)) for c in (contours, contours[[1, 2, 0]]))
    assert np.abs(drawn - others).max(axis=(1, 2)).min() > 0.01


def test_a_label_asks_for_its_class_and_a_mixture_for_what_lies_between(stages, contours):
    model = Synthesizer.from_checkpoints(*paths(stages), device="cpu")
    model.unet.encoder.label.weight *= 100  # a few steps of training leave little of a label

    def drawn(labels):
        return images(model.sample(contours[:2], labels, guidance_scale=4, **FAST))

    plain, whole, half = (
        drawn("normal"),
        drawn({"normal": 1}),
        drawn({"normal": 0.5, "fibrosis": 0.5}),
    )
    np.testing.assert_allclose(whole, plain, atol=1e-3)
    assert np.abs(half - plain).max() > 1e-3
    pair = drawn(["normal", {"normal": 0.5, "fibrosis": 0.5}])
    np.testing.assert_allclose(pair, [plain[0], half[1]], atol=1e-3)


def test_without_contours_the_u_net_samples_alone(stages):
    alone = Synthesizer.from_checkpoints(*paths(stages)[:2], device="cpu")
    first, second = alone.sample(indices=range(2), **FAST)
    assert first.contour is None and first.label == "" and np.abs(first.hu - second.hu).max() > 1
    assert len(list(alone.sample(labels=["normal", "fibrosis"], **FAST))) == 2
    unguided = images(alone.sample(indices=range(2), guidance_scale=1, **FAST))
    np.testing.assert_array_equal(unguided, images([first, second]))


class CopyFinder:
    """A `Privacy` that takes slices for copies by their mean alone."""

    spaces, thresholds, patients = ("pixels",), {"pixels": 0.5}, np.array(["patient a"])

    def __init__(self, is_copy) -> None:
        self.is_copy = is_copy

    def nearest(self, images, latents):
        return [Found(bool(self.is_copy(image))) for image in images]


class Found:
    row = 0

    def __init__(self, flagged: bool) -> None:
        self.flagged = flagged


def test_a_copy_is_drawn_again_with_another_seed(model, contours):
    first = list(model.sample(contours, **FAST))
    bad = first[1].image.mean()
    finder = CopyFinder(lambda image: abs(image.mean() - bad) < 1e-5)
    kept = list(model.sample(contours, avoid=finder, **FAST))
    assert [(one.index, one.attempt) for one in kept] == [(0, 0), (1, 1), (2, 0)]
    np.testing.assert_array_equal(kept[0].image, first[0].image)
    again = list(model.sample(contours, seed=kept[1].seed, indices=[1], **FAST))
    np.testing.assert_allclose(again[0].image, kept[1].image, atol=1e-4)
    everything = list(model.sample(contours, avoid=finder, copies=True, **FAST))
    assert [one.copy_of for one in everything] == [None, "patient a", None, None]


def test_what_stays_a_copy_is_left_out_with_a_warning(model, contours, monkeypatch):
    monkeypatch.setattr(synthesis, "ATTEMPTS", 2)
    with pytest.warns(UserWarning, match="sample 0 is left out: in 2 attempts"):
        assert list(model.sample(contours[:1], avoid=CopyFinder(lambda _: True), **FAST)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(model.sample(contours, avoid=CopyFinder(lambda _: False), **FAST))) == 3


def test_encode_and_decode_are_the_vae(model, phantoms, stages):
    data = LatentDataset(stages / "latents")
    rows = data.indices("val", views=False)
    held_out = data.heldout_images(rows, torch.device("cpu"))[:, 0].numpy()
    latents = model.encode(held_out)
    np.testing.assert_allclose(latents, data.latents[rows], atol=0.02)  # slices kept as float16
    with torch.no_grad():
        z = torch.from_numpy(latents) / LATENT_SCALE
        expected = model.vae.decode(z).clamp(-1, 1)[:, 0].numpy()
    np.testing.assert_allclose(model.decode(latents), expected, atol=1e-5)


class NotCalibrated:
    thresholds: ClassVar[dict] = {}


BAD = {
    "expected one of them, or weights": {"labels": "sarcoidosis"},
    "weights that sum to 1.5": {"labels": {"normal": 1, "fibrosis": 0.5}},
    "labels: 2 given, expected 1 or 3": {"labels": ["normal", "normal"]},
    "labels: 0 given": {"labels": []},
    "label 1: expected a class name": {"labels": 1},
    "label nan: expected a class name": {"labels": [float("nan")] * 3},
    "weight '1', expected a number": {"labels": {"normal": "1"}},
    "None beside mixtures": {"labels": [None, {"normal": 1}, "normal"]},
    "sampling steps": {"steps": 0},
    "sampler 'euler'": {"sampler": "euler"},
    "spacing 'even'": {"spacing": "even"},
    "guidance_interval": {"guidance_interval": (0.9, 0.1)},
    "guidance_rescale": {"guidance_rescale": 2},
    "guidance_scale nan": {"guidance_scale": float("nan")},
    "batch_size": {"batch_size": 0},
    "from 0, each once": {"indices": [-1]},
    "each once": {"indices": [1, 1]},
    "indices: True: expected a whole number": {"indices": [True, False]},
    "seed None: expected a whole number": {"seed": None},
    "not calibrated": {"avoid": NotCalibrated()},
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_given_is_refused_before_anything_is_drawn(message, model, contours):
    with pytest.raises(ValueError, match=message):
        model.sample(contours, **{**FAST, **BAD[message]})


def test_contours_that_are_none_are_refused(model, contours):
    for bad, message in (
        (np.zeros((1, 2, 3, 32, 32)), "contour 0: expected a contour of 1 channel"),
        (np.random.default_rng(0).random((32, 32)), "contour 0: a picture rather than a contour"),
        ([contours[0], -1.0 * contours[1]], "contour 1: values from -1"),
        (np.full((32, 32), np.nan), "not finite"),
        (np.zeros((0, 32, 32)), "none given"),
        (torch.from_numpy(contours), "found a tensor"),
        (None, "a ControlNet needs contours"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(bad, **FAST)


def wider(unet: Path, path: Path) -> Path:
    """A U-Net of the same VAE with other widths, as a file."""
    content = load(unet, UNet.kind)
    config = {**content["config"], "channels": [16, 16]}
    facts = {name: content[name] for name in ("classes", "window", "contour_style")}
    save_model(path, UNet(**config), dict(content["lineage"]), **facts)
    return path


def test_models_that_do_not_belong_together_are_refused(stages, tmp_path):
    vae, unet, controlnet = paths(stages)
    with pytest.raises(ValueError, match="expected a unet checkpoint, found kind 'controlnet'"):
        Synthesizer.from_checkpoints(vae, controlnet)
    with pytest.raises(ValueError, match="a ControlNet steers a U-Net"):
        Synthesizer.from_checkpoints(vae, controlnet=controlnet)
    other = tmp_path / "vae.pth"
    content = torch.load(vae, weights_only=True)
    torch.save({**content, "step": 1}, other)
    with pytest.raises(ValueError, match=r"SHA-256 of its VAE.*give the VAE it was"):
        Synthesizer.from_checkpoints(other, unet)
    with pytest.raises(ValueError, match=r"SHA-256 of its U-Net.*give the U-Net it was"):
        Synthesizer.from_checkpoints(vae, wider(unet, tmp_path / "unet.pth"), controlnet)
    with pytest.raises(ValueError, match="sampling needs a U-Net"):
        Synthesizer.from_checkpoints(vae).sample()


def test_labels_as_typed():
    classes = ["fibrosis", "normal", "a=b"]
    assert parse_label(["normal"], classes) == "normal"
    assert parse_label(["a=b"], classes) == "a=b"
    assert parse_label(["normal=0.4", "fibrosis=.6"], classes) == {"normal": 0.4, "fibrosis": 0.6}
    with pytest.raises(ValueError, match="a weight is no number"):
        parse_label(["normal=much"], classes)
    with pytest.raises(ValueError, match="each class once"):
        parse_label(["normal=0.5", "normal=0.5"], classes)


def test_no_label_has_the_number_that_the_u_net_knows():
    assert read_label(None, []) == read_label("", ["a"]) == NO_LABEL


def test_one_label_in_a_list_and_numbers_of_numpy(model, contours):
    numbers = {"seed": np.int64(3), "indices": np.arange(2)}
    drawn = model.sample(contours, ["normal"], **numbers, **FAST)
    assert [(s.label, s.seed, s.index) for s in drawn] == [("normal", 3, 0), ("normal", 3, 1)]


def test_a_mixture_reads_back_as_it_was(model, contours):
    third = {"normal": 1 / 3, "fibrosis": 2 / 3}
    (one,) = model.sample(contours[:1], third, **FAST)
    assert parse_label(one.label.split(), model.classes) == third


@pytest.mark.parametrize("more", [["--label", "sarcoidosis"], ["--steps", "5000"]])
def test_a_dry_run_refuses_what_cannot_be_drawn(more, stages, tmp_path):
    options = ["--latent_data_dir", str(stages / "latents"), "--dry_run", *more]
    with pytest.raises(ValueError, match=r"sarcoidosis|5000"):
        script.main(script.parse_args(sample_options(stages, tmp_path / "out", *options)))
    assert not (tmp_path / "out").exists()


def test_names_of_files_choose_the_format(model, contours, tmp_path):
    (one,) = model.sample(contours[:1], **FAST)
    with pytest.raises(ValueError, match=r"expected a name that ends in \.png, \.npy"):
        one.save(tmp_path / "slice.jpg")
    one.save(tmp_path / "slice.png")
    (tmp_path / "dataset.json").write_text('{"rescale_slope": 1, "rescale_intercept": 0}')
    with pytest.raises(ValueError, match=r"holds a dataset\.json of other images"):
        one.save(tmp_path / "slice.png")


def test_the_script_has_its_defaults_from_here():
    args = script.parse_args(["--vae_checkpoint", "v", "--unet_checkpoint", "u", "--unconditional"])
    found = {name: getattr(args, name) for name in Sampling.__dataclass_fields__}
    assert Sampling(**{**found, "guidance_interval": tuple(args.guidance_interval)}) == Sampling()


def test_docs_python_runs_as_it_stands(
    stages, phantoms, without_weights, tmp_path, monkeypatch, capsys
):
    """The blocks of docs/python.md, one after the other, on models of the tests."""
    options = ["--latent_data_dir", str(stages / "latents")]
    script.main(script.parse_args(sample_options(stages, tmp_path / "samples", *options)))
    for name in ("vae", "latents", "unet", "controlnet"):
        (tmp_path / "quickstart").mkdir(exist_ok=True)
        (tmp_path / "quickstart" / name).symlink_to(stages / name)
    (tmp_path / "quickstart" / "data").symlink_to(phantoms)
    (tmp_path / "quickstart" / "samples").symlink_to(tmp_path / "samples")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    assert len(blocks) > 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert {f"{i}.dcm" for i in range(4)} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "report" / "index.html").is_file()
