"""Damaged files, and those made to harm: a clear error, no program run, no flood of memory."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from benchmarks import fuzz
from fibldm import checkpoint, ct, datasets, limits
from fibldm.datasets import LatentDataset, Split
from fibldm.vae import VAE


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_changed_files_are_answered_or_refused_by_name(name):
    found = list(fuzz.fuzz(name, 150, 1))
    assert len(found) == 150
    wrong = [result for result in found if result[1] not in ("answered", "refused")]
    assert wrong == []
    assert sum(outcome == "refused" for _, outcome, _ in found) > 50


def test_the_fuzzer_sees_other_errors_hangs_and_unnamed_files(tmp_path, monkeypatch):
    def read(path):
        text = path.read_text()
        if text == "loop":
            while True:
                pass
        raise {"bug": KeyError("x"), "unnamed": ValueError("bad")}.get(text, ValueError(path))

    monkeypatch.setitem(fuzz.FORMATS, "csv", (".csv", None, read))
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    before = fuzz.signal.signal(fuzz.signal.SIGALRM, fuzz.hang)
    outcomes = [fuzz.outcome_of("csv", word, tmp_path)[0] for word in (b"bug", b"unnamed", b"loop")]
    assert outcomes == ["other error", "other error", "hung"]
    assert fuzz.outcome_of("csv", b"fine", tmp_path)[0] == "refused"
    fuzz.signal.signal(fuzz.signal.SIGALRM, before)


READ = """
import resource, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks import fuzz
path = Path({path!r})
fuzz.outcome_of({name!r}, fuzz.FORMATS[{name!r}][1](path.parent)[0], path.parent)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    fuzz.FORMATS[{name!r}][2](path)
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("npy", 0, ["cannot be decoded", "mmap length"]),
        ("nifti", 0, ["claims an array of (30000, 30000, 30000)"]),
        ("nifti", 1, ["voxels start at byte 2e+09"]),
        ("png", 0, ["decompression bomb"]),
        ("npz", 0, ["claims an array of (4096, 4096, 4096)"]),
        ("checkpoint", 0, ["compressed parts"]),
        ("checkpoint", 1, ["do not fit"]),
        ("checkpoint", 2, ["at most 64 blocks"]),
        ("dicom", 0, ["65535x65535 pixels"]),
        ("dicom", 1, ["inflates to more than"]),
        ("json", 0, ["nested too deeply"]),
        ("json", 2, ["33,554,432 bytes, expected at most"]),
    ],
)
def test_a_bomb_is_refused_before_it_takes_memory(name, number, words, tmp_path):
    path = tmp_path / f"bomb{fuzz.FORMATS[name][0]}"
    path.write_bytes(fuzz.bombs(name)[number])
    code = READ.format(root=str(ROOT), path=str(path), name=name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *message, grown = done.stdout.splitlines()
    for word in words:
        assert word in "\n".join(message)
    assert int(grown) < 120 * 1024, f"{int(grown) / 1024:.0f} MiB"


def test_what_real_volumes_need_is_allowed(tmp_path):
    path = tmp_path / "volume.nii.gz"
    path.write_bytes(b"0" * 100)
    limits.require_values(path, (512, 512, 2048), limits.VOLUME)  # a label map may be so small
    with pytest.raises(ValueError, match=r"claims an array of \(512, 512, 2049\)"):
        limits.require_values(path, (512, 512, 2049), limits.VOLUME)
    with pytest.raises(ValueError, match="-3"):
        limits.require_values(path, (-3, 4), limits.VOLUME)


def test_a_changed_byte_of_a_checkpoint_is_found(tmp_path):
    """In a weight, which no other check would notice."""
    path = tmp_path / "vae_best.pth"
    vae = VAE(16, 4, 2, base_channels=4, blocks=1)
    checkpoint.save_model(path, vae, {})
    content = bytearray(path.read_bytes())
    weight = next(iter(vae.parameters()))
    at = bytes(content).find(weight.detach().numpy().tobytes())
    assert at > 0
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vae_best\.pth.*is not as it was written \(CRC-32\)"):
        checkpoint.load_model(path, VAE)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("window", [400, -1000], "two HU"),
        ("window", "wide", "two HU"),
        ("classes", "fibrosis", "list of names"),
        ("lineage", {"vae": 5}, "hashes by name"),
        ("config", {"image_size": 10**9}, "sizes to"),
        ("config", {"blocks": 65}, "at most 64 blocks"),
        ("state", {"weight": 3}, "tensors by name"),
    ],
)
def test_content_of_another_type_is_refused_by_name(name, value, words, tmp_path):
    path = tmp_path / "vae_best.pth"
    vae = VAE(16, 4, 2, base_channels=4, blocks=1)
    checkpoint.save_model(path, vae, {}, window=[-1000.0, 400.0])
    checkpoint.save(path, {**checkpoint.load(path, "vae"), name: value})
    with pytest.raises(ValueError, match=rf"vae_best\.pth: its {name} is .*{words}"):
        checkpoint.load_model(path, VAE)


def test_what_a_checkpoint_lacks_is_named(tmp_path):
    checkpoint.save_model(tmp_path / "a.pth", VAE(16, 4, 2, base_channels=4, blocks=1), {})
    _, content = checkpoint.load_model(tmp_path / "a.pth", VAE)
    for missing in (lambda: content["window"], lambda: content["lineage"]["vae"]):
        with pytest.raises(ValueError, match=r"a\.pth: (window|vae) is missing"):
            missing()


def table(folder: Path, image: str) -> Path:
    lines = ["image,contour,patient_id,label,split"]
    lines += [f"{image},c.png,p0,,val", "b.png,c.png,p1,,train"]
    for name in "b.png", "c.png":
        (folder / name).touch()
    (folder / "label.csv").write_text("\n".join(lines) + "\n")
    return folder / "label.csv"


@pytest.mark.parametrize("how", ["absolute", "up", "up inside"])
def test_paths_of_a_table_cannot_leave_the_data_folder(how, tmp_path):
    (tmp_path / "secret.png").touch()
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    secret = str(tmp_path / "secret.png")
    name = {"absolute": secret, "up": "../secret.png", "up inside": "sub/../../secret.png"}[how]
    assert (data / name).is_file()
    with pytest.raises(ValueError, match=r"(?s)1 paths do not stay below .*secret\.png"):
        datasets.read_table(table(data, name), data, Split())


def test_links_that_the_user_made_are_followed(tmp_path):
    (tmp_path / "elsewhere.png").touch()
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.png").symlink_to(tmp_path / "elsewhere.png")
    rows, _ = datasets.read_table(table(data, "link.png"), data, Split())
    assert rows[0].image == "link.png"


def test_a_picture_that_would_start_a_program_is_not_opened(tmp_path):
    """Pillow gives PostScript to Ghostscript, whatever the file's name says."""
    Image.new("L", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: cannot be decoded as an image"):
        ct.read_hu(tmp_path / "a.png")


def test_a_short_latent_file_is_named(stages, tmp_path):
    for name in "latents", "contours", "heldout_images":
        folder = tmp_path / name
        shutil.copytree(stages / "latents", folder)
        path = folder / f"{name}.npy"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=rf"{name}\.npy of [\d,]+ bytes cannot be read"):
            LatentDataset(folder)
        whole = np.load(stages / "latents" / f"{name}.npy")
        np.save(path, whole[:-1])
        what = rf"{name}\.npy: rows, by manifest\.csv: found {len(whole) - 1}, expected"
        with pytest.raises(ValueError, match=what):
            LatentDataset(folder)
