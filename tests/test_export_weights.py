"""Weights for others: safetensors draw the same samples, and the model card names nobody."""

import csv
import json
import sys

import numpy as np
import pytest
import safetensors.torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import export_weights

from fibldm.checkpoint import source_hash
from fibldm.disk import file_hash
from fibldm.encoding import LatentDataset
from fibldm.synthesis import Synthesizer

KINDS = ("vae", "unet", "controlnet")


def run(*arguments: object) -> None:
    export_weights.main(export_weights.parse_args([str(one) for one in arguments]))


@pytest.fixture(scope="module")
def exported(stages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    run(*(stages / kind for kind in KINDS), "--output", folder)
    return folder


def test_exported_weights_draw_the_same_samples(stages, exported):
    data = LatentDataset(stages / "latents")
    contours = data.contours[data.indices("val", views=False)[:2]]
    files = [stages / kind / f"{kind}_best.pth" for kind in KINDS]
    for given in ([exported], [exported / f"{kind}.safetensors" for kind in KINDS]):
        images = [
            np.stack([one.image for one in model.sample(contours, "fibrosis", steps=2)])
            for model in (
                Synthesizer.from_checkpoints(*files, device="cpu"),
                Synthesizer.from_checkpoints(*given, device="cpu"),
            )
        ]
        np.testing.assert_array_equal(*images)


def test_exported_weights_keep_their_lineage(stages, exported):
    for kind in KINDS:
        file = stages / kind / f"{kind}_best.pth"
        assert source_hash(exported / f"{kind}.safetensors") == file_hash(file) == source_hash(file)
    facts = json.loads((exported / "config.json").read_text())
    assert facts["unet"]["lineage"]["vae"] == facts["vae"]["sha256"]
    assert facts["unet"]["classes"] == ["fibrosis", "normal"]
    # Old and exported models go together.
    Synthesizer.from_checkpoints(stages / "vae" / "vae_best.pth", exported / "unet.safetensors")


def test_a_folder_takes_no_models_beside_it(stages, exported):
    with pytest.raises(ValueError, match="give no others beside it"):
        Synthesizer.from_checkpoints(exported, stages / "unet" / "unet_best.pth")


def test_other_tools_read_the_weights(exported):
    state = safetensors.torch.load_file(exported / "vae.safetensors")
    assert state and all(name.isascii() for name in state)


def test_the_card_is_filled_in_and_names_nobody(exported, phantoms, stages):
    card = (exported / "README.md").read_text()
    with open(phantoms / "label.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    patients = {row["patient_id"] for row in rows}
    counts = [line.split("|")[2:4] for line in card.splitlines() if line.startswith("| train |")]
    assert len(counts) == 1 and 0 < int(counts[0][0]) < len(patients)
    assert "fibrosis, normal" in card and "| U-Net | 4 | dice |" in card and "## Limits" in card
    for path in exported.iterdir():
        content = path.read_bytes()
        for name in [*patients, str(phantoms), str(stages), *(row["image"] for row in rows)]:
            assert name.encode() not in content


def test_the_card_has_a_reports_numbers(stages, tmp_path):
    score = {"name": "KID", "value": 0.0123, "low": 0.01, "high": 0.02, "baseline": None}
    mean = {**score, "name": "mean", "source": "|distance| of attenuation (HU)"}
    groups = {"Realism": [score], "Disease": [mean], "Disease: fibrosis": [mean]}
    content = {"groups": {name: {"scores": scores} for name, scores in groups.items()}}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    run(*(stages / kind for kind in KINDS), "--output", tmp_path / "out", "--report", tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| KID | 0.0123 | 0.01 to 0.02 | - |" in card
    assert r"| mean (\|distance\| of attenuation (HU)) | 0.0123 |" in card
    assert r"| mean (\|distance\| of attenuation (HU)), fibrosis | 0.0123 |" in card
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no metrics\.json of evaluate\.py"):
        run(stages / "vae", "--output", tmp_path / "other", "--report", tmp_path)
    assert not (tmp_path / "other").exists()


def test_runs_that_do_not_belong_together_are_refused(stages, tmp_path):
    for runs, message in (
        ([tmp_path], r"no \*_best\.pth"),
        ([stages / "unet"], "no vae_best.pth"),
        ([stages / "vae", stages / "vae"], "one run of each stage"),
        ([stages / "vae", stages / "controlnet"], "give its unet_best.pth"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*runs, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", [20, -5])
def test_damaged_weights_are_refused(at, exported, tmp_path):
    content = bytearray((exported / "vae.safetensors").read_bytes())
    content[at] ^= 0x55
    (tmp_path / "vae.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"vae\.safetensors: (cannot be read|not exported)"):
        Synthesizer.from_checkpoints(tmp_path / "vae.safetensors", device="cpu")


def test_exported_weights_go_on_in_later_stages(stages, exported):
    data = LatentDataset(stages / "latents")
    assert data.lineage(exported / "vae.safetensors") == data.lineage(
        stages / "vae" / "vae_best.pth"
    )
