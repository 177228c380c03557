"""Weights & Biases: one run there for a run here, however often it goes on; numbers alone."""

import sys

import pytest

from fibldm.tracking import require_wandb, track


def test_a_run_that_goes_on_is_the_same_one_there(wandb, tmp_path):
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        track(tmp_path / name, "lungs", {"lr": 0.1}).finish()
    first, other, again = wandb.begun
    assert first == again and first["id"] != other["id"]
    assert (first["project"], first["name"], first["config"]) == ("lungs", "a", {"lr": 0.1})
    assert first["sync_tensorboard"] and first["resume"] == "allow"
    assert wandb.ended == [run["id"] for run in wandb.begun]


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--wandb needs .* pip install wandb"):
        require_wandb()


def test_what_goes_wrong_at_its_start_is_told_with_a_remedy(wandb, tmp_path):
    def fail(**options):
        raise RuntimeError("no API key")

    wandb.init = fail
    with pytest.raises(ValueError, match=r"--wandb lungs: no API key; .*WANDB_MODE=offline"):
        track(tmp_path, "lungs", {})
