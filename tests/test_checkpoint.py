"""Checkpoints: whole or not at all, read without running code, refused by name where unfit."""

import os
import pickle
import re

import pytest
import torch
from torch import Tensor, nn

from fibldm import disk
from fibldm.checkpoint import (
    VERSION,
    load,
    load_model,
    load_training,
    save,
    save_model,
    save_training,
)
from fibldm.controlnet import ControlNet
from fibldm.disk import file_hash
from fibldm.unet import UNet
from fibldm.vae import VAE

CONTENT = {"version": VERSION, "kind": "vae", "weights": torch.arange(5000.0), "names": ["a", "b"]}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def perturb(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    return model


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def refused(path, kind: str = "vae", match: str = "") -> None:
    """Loading raises a ValueError that names the file."""
    with pytest.raises(ValueError, match=rf"(?s){re.escape(str(path))}.*{match}"):
        load(path, kind)


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path / "a.pth", CONTENT)
    content = load(tmp_path / "a.pth", "vae")
    assert torch.equal(content["weights"], CONTENT["weights"])
    assert content["names"] == ["a", "b"]


@pytest.mark.parametrize("culprit", ["torch.save", "os.replace", "os.fsync"])
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, culprit):
    path = tmp_path / "a.pth"
    save(path, CONTENT)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        if culprit == "torch.save":
            args[1].write(b"half a checkpoint")
        raise OSError("No space left on device")

    module, name = culprit.split(".")
    monkeypatch.setattr({"torch": torch, "os": disk.os}[module], name, fail)
    with pytest.raises(OSError, match="No space"):
        save(path, {**CONTENT, "names": []})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]  # a full disk needs the room
    save(path, {**CONTENT, "names": ["new"]})  # what the failure left behind is in no one's way
    assert load(path, "vae")["names"] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_the_same_content_has_the_same_bytes(tmp_path):
    save(tmp_path / "a.pth", CONTENT)
    save(tmp_path / "other_name.pth", {**CONTENT, "weights": CONTENT["weights"].clone()})
    save(tmp_path / "c.pth", {**CONTENT, "weights": CONTENT["weights"] + 1})
    hashes = [file_hash(tmp_path / name) for name in ("a.pth", "other_name.pth", "c.pth")]
    assert hashes[0] == hashes[1] != hashes[2]
    assert len(hashes[0]) == 64


def test_loaded_content_is_written_with_the_same_bytes_again(tmp_path):
    """Its strings are other objects, and those that were one object may be two."""
    content = {**CONTENT, "extra": {"names": "vae", "weights": {"kind": ("vae", [0.5])}}}
    save(tmp_path / "a.pth", content)
    save(tmp_path / "b.pth", load(tmp_path / "a.pth", "vae") | {"kind": "".join("vae")})
    assert file_hash(tmp_path / "a.pth") == file_hash(tmp_path / "b.pth")


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "a.pth", match="no such file.*vae")
    refused(tmp_path, match="no such file")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, part):
    path = tmp_path / "a.pth"
    save(path, CONTENT)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    refused(path, match="truncated")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0" * 100, b"PK\x03\x04", b"<!DOCTYPE html>", b"image,contour\na.png,b.png\n"),
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_garbage_is_refused(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    refused(path)


def test_random_bytes_are_refused(tmp_path):
    path, generator = tmp_path / "a.pth", torch.Generator().manual_seed(0)
    for _ in range(200):
        numbers = torch.randint(0, 256, (50,), generator=generator)
        path.write_bytes(bytes(numbers.tolist()))
        refused(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"weights": torch.ones(2)}, "kind"),
        ([1, 2], "kind"),
        ({**CONTENT, "kind": "unet"}, "expected a vae checkpoint, found kind 'unet'"),
        ({**CONTENT, "version": VERSION + 1}, f"newer.*{VERSION + 1}.*{VERSION}"),
        ({"kind": "vae", "state_dict": {}}, ""),
    ],
)
def test_content_of_another_kind_is_refused(tmp_path, content, match):
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", match=match)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_checkpoint_that_runs_code_is_refused_and_not_run(tmp_path, writer):
    path, marker = tmp_path / "a.pth", tmp_path / "was_run"
    content = {**CONTENT, "extra": Touch(str(marker))}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"kind": "vae", "extra": Touch(str(marker))}, 2))
    refused(path)
    assert not marker.exists()
    if writer == "pickle":  # the marker is no empty threat
        pickle.loads(path.read_bytes())
        assert marker.exists()


def models() -> list[tuple[nn.Module, tuple]]:
    unet = perturb(UNet(3, 4, 2, 2, channels=(8, 12), blocks=1))
    return [
        (perturb(VAE(16, 4, 3, base_channels=6, blocks=1)), ()),
        (unet, ()),
        (perturb(ControlNet(unet, 16)), (unet,)),
    ]


@pytest.mark.parametrize("index", range(3), ids=["vae", "unet", "controlnet"])
def test_a_model_comes_back_whole(tmp_path, index):
    model, parts = models()[index]
    path, lineage = tmp_path / "best.pth", {"label_csv": "ab" * 32}
    save_model(path, model, lineage, window=[-1000.0, 400.0], step=7)
    again, content = load_model(path, type(model), *parts)
    assert again.config == model.config == content["config"]
    assert content["lineage"] == lineage
    assert content["window"] == [-1000.0, 400.0] and content["step"] == 7
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_a_loaded_controlnet_steers_as_the_saved_one(tmp_path):
    control, (unet,) = models()[2]
    save_model(tmp_path / "c.pth", control, {})
    again, _ = load_model(tmp_path / "c.pth", ControlNet, unet)
    x, t, contour = normal(2, 3, 4, 4), torch.tensor([3, 900]), torch.ones(2, 2, 16, 16)
    for mine, theirs in zip(control(x, t, contour), again(x, t, contour), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model, _ = models()[0]
    path = tmp_path / "best.pth"
    save_model(path, model, {})
    content = load(path, "vae")
    for config in ({**content["config"], "latent_dim": 5}, {"image_size": 16, "colour": 3}):
        save(path, {**content, "config": config})
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*VAE"):
            load_model(path, VAE)


def test_a_vae_given_as_a_unet_is_refused(tmp_path):
    save_model(tmp_path / "best.pth", models()[0][0], {})
    with pytest.raises(ValueError, match=r"best\.pth.*expected a unet.*'vae'"):
        load_model(tmp_path / "best.pth", UNet)


def training_parts(seed: int) -> dict:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_training_goes_on_where_it_was(tmp_path):
    path, lineage = tmp_path / "last.pth", {"vae": "a" * 64}
    parts, fresh = training_parts(0), training_parts(1)
    save_training(path, "train_x", parts, lineage, step=12, best=0.5)
    content = load_training(path, "train_x", fresh, lineage)
    assert content["step"] == 12 and content["best"] == 0.5
    for part in (parts, fresh):
        part["optimizer"].zero_grad()
        part["model"](torch.ones(1, 3)).square().sum().backward()
        part["optimizer"].step()
    assert torch.equal(parts["model"].weight, fresh["model"].weight)


def test_another_lineage_is_refused_with_both_hashes(tmp_path):
    path = tmp_path / "last.pth"
    save_training(path, "train_x", training_parts(0), {"vae": "a" * 64, "latents": "c" * 64})
    fresh = training_parts(1)
    before = fresh["model"].weight.clone()
    with pytest.raises(ValueError, match=rf"last\.pth.*vae.*{'a' * 64}.*{'b' * 64}"):
        load_training(path, "train_x", fresh, {"vae": "b" * 64, "latents": "c" * 64})
    assert torch.equal(fresh["model"].weight, before)


def test_other_parts_or_shapes_are_refused(tmp_path):
    path = tmp_path / "last.pth"
    save_training(path, "train_x", training_parts(0), {})
    parts = training_parts(0)
    with pytest.raises(ValueError, match=r"last\.pth.*parts.*optimizer"):
        load_training(path, "train_x", {"model": parts["model"]}, {})
    with pytest.raises(ValueError, match=r"last\.pth.*its model"):
        load_training(path, "train_x", {**parts, "model": nn.Linear(4, 2)}, {})
    with pytest.raises(ValueError, match=r"last\.pth.*train_y"):
        load_training(path, "train_y", parts, {})
