"""Damaged files, and those made to harm: a clear error, no program run, no flood of memory."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from benchmarks import fuzz
from fibldm import checkpoint, ct, limits, report
from fibldm.encoding import LatentDataset
from fibldm.evaluation import Picture
from fibldm.tables import Split, read_table
from fibldm.vae import VAE
from fibldm.verdicts import Score, Verdict


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
        if text == "full":
            raise ValueError(path) from MemoryError()
        raise {"bug": KeyError("x"), "unnamed": ValueError("bad")}.get(text, ValueError(path))

    monkeypatch.setitem(fuzz.FORMATS, "csv", (".csv", None, read))
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    before = fuzz.signal.signal(fuzz.signal.SIGALRM, fuzz.hang)
    words = (b"bug", b"unnamed", b"loop", b"full")
    outcomes = [fuzz.outcome_of("csv", word, tmp_path)[0] for word in words]
    assert outcomes == ["other error", "other error", "hung", "out of memory"]
    assert fuzz.outcome_of("csv", b"fine", tmp_path)[0] == "refused"
    fuzz.signal.signal(fuzz.signal.SIGALRM, before)


def test_the_fuzzer_goes_on_after_an_input_that_ends_its_process(monkeypatch):
    def read(path):
        if path.read_bytes() == b"5":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(path)

    monkeypatch.setitem(fuzz.FORMATS, "csv", (".csv", lambda _: [b"0"], read))
    monkeypatch.setattr(fuzz, "make_input", lambda name, number, *_: b"%d" % number)
    found = list(fuzz.fuzz("csv", 20, 1))
    assert [number for number, *_ in found] == list(range(20))
    assert [number for number, outcome, _ in found if outcome != "refused"] == [5]
    assert found[5][1:] == ("died", "exit code -9")


READ = """
import json, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks import fuzz

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

folder = Path({folder!r})
suffix, files, read = fuzz.FORMATS[{name!r}]
fuzz.outcome_of({name!r}, files(folder)[0], folder)
found = []
for content in fuzz.bombs({name!r}):
    path = folder / f"bomb{{suffix}}"
    path.write_bytes(content)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, message = peak(), "answered"
    try:
        read(path)
    except ValueError as error:
        message = str(error)
    found.append((message, (peak() - before) / 1024))
print(json.dumps(found))
"""
REFUSALS = {
    "npy": ["cannot be decoded.*mmap length"] * 2,
    "nifti": [r"claims an array of \(30000, 30000, 30000\)", r"voxels start at byte 2e\+09"],
    "png": ["decompression bomb", "cannot be decoded"],
    "npz": [r"claims an array of \(4096, 4096, 4096\)", "packed by another method"],
    "mat": [
        r"damaged: 1,073,741,824 bytes of kind 9 for an array of \(64, 64\)",
        r"claims an array of \(100000, 100000\)",
    ],
    "hdf5": [
        r"in pieces of \(16384, 16384\)",
        r"claims an array of \(100000, 100000\)",
        "inflates to more than 262,148 bytes",
    ],
    "checkpoint": [
        "compressed parts",
        "do not fit.*asks for more weights than the file has",
        "at most 64 blocks",
        r"found kind \[\[",
        r"format \[\[",
        r"its config is \[\[",
        r"its lineage is \[\[",
        r"its window is \[\[",
    ],
    "dicom": [
        "65535x65535 pixels",
        "inflates to more than",
        "inflates to more than",
        r"compressed pixels of shape \(60000, 60000\), expected \(24, 24\)",
    ],
    "json": ["nested too deeply", "nested too deeply", "33,554,432 bytes, expected at most"],
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bombs_are_refused_before_they_take_memory(name, tmp_path):
    code = READ.format(root=str(ROOT), folder=str(tmp_path), name=name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    most = 300 if name == "mat" else 120  # SciPy inflates 128 KiB at a time, by up to 1,032 times
    for (message, grown), expected in zip(found, REFUSALS[name], strict=True):
        assert re.search(f"(?s){expected}", message), message
        assert len(message) < 1000 and grown < most, f"{grown:.0f} MiB: {message}"


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
        ("config", {"image_size": 4096, "latent_size": 16}, "sizes to"),
        ("split", {"seed": 0, "part": 0.1}, "a seed and two fractions"),
        ("window", [float("nan"), 400], "two HU"),
        ("state", {5: torch.zeros(1)}, "tensors by name"),
        ("state", {"weight": torch.zeros(1, device="meta")}, "tensors by name"),
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
        read_table(table(data, name), data, Split())


def test_links_that_the_user_made_are_followed(tmp_path):
    (tmp_path / "elsewhere.png").touch()
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.png").symlink_to(tmp_path / "elsewhere.png")
    rows, _ = read_table(table(data, "link.png"), data, Split())
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


def test_a_large_seed_of_the_split_is_read(tmp_path):
    split = {"seed": 20_261_124, "val_fraction": 0.1, "test_fraction": 0.1}
    checkpoint.save_model(tmp_path / "a.pth", VAE(16, 4, 2, 4, 1), {}, split=split)
    assert checkpoint.load_model(tmp_path / "a.pth", VAE)[1]["split"] == split


def test_a_checkpoint_behind_other_bytes_is_refused(tmp_path):
    """A ZIP file may start anywhere; torch.load takes one that does for its older form."""
    checkpoint.save_model(tmp_path / "a.pth", VAE(16, 4, 2, 4, 1), {})
    (tmp_path / "b.pth").write_bytes(b"junk" + (tmp_path / "a.pth").read_bytes())
    with pytest.raises(ValueError, match=r"b\.pth: .*not a ZIP file"):
        checkpoint.load_model(tmp_path / "b.pth", VAE)


NASTY = """<script>alert("1")</script> & 'b' " onload='x'"""


def test_the_report_shows_names_as_text():
    score = Score(NASTY, 1.0, 1.0, 1.0, 1.0, 3, 3, NASTY, NASTY)
    curve = np.ones((1, 2))
    plots = [
        report.histograms([1, 2], [1, 3], NASTY, NASTY),
        report.spectra([1, 2], curve, curve, NASTY, NASTY, NASTY),
    ]
    picture = Picture(NASTY, np.zeros((4, 4, 3), np.uint8), NASTY)
    section = report.Section(
        NASTY, NASTY, [score, score], [picture], [NASTY], plots, {NASTY: NASTY},
        Verdict("good", NASTY),
    )  # fmt: skip
    page = report.render(NASTY, [section], {NASTY: NASTY})
    seen = Seen()
    seen.feed(page)
    assert "script" not in seen.tags and not {n for n in seen.names if n.startswith("on")}
    assert seen.values.count(NASTY) == 3  # alt of the picture, labels of two plots
    assert "".join(seen.texts).count(NASTY) > 15


class Seen(HTMLParser):
    """The tags, attributes and text of a page, as a browser takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.names, self.values, self.texts = set(), set(), [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.names |= {name for name, _ in attributes}
        self.values += [value for _, value in attributes]

    def handle_data(self, text):
        self.texts.append(text)
