"""A disk that is full or read-only for a while, no shared memory, and a run of many steps."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, sample_options, unet_options, vae_options
from killing import contents, differences, one_thread, run, start

pytestmark = pytest.mark.timeout(3600)
STEPS = ["--steps", "300", "--save_interval", "5", "--val_interval", "100", "--log_interval", "1"]


@pytest.fixture(scope="module", autouse=True)
def single_threaded():
    with one_thread():
        yield


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "fibldm_disk", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def step_of(folder: Path) -> int:
    """The last step in a run's log."""
    file = folder / "run" / "metrics.jsonl"
    rows = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(row)["step"] for row in rows[:-1]), default=0)


def wait_for(step: int, folder: Path, process) -> None:
    while step_of(folder) < step:
        assert process.is_alive(), Path(f"{folder}.log").read_text()
        time.sleep(0.02)


def fill(disk: Path) -> None:
    """Leave no room: remove `filler` to have it back."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)


def numbers(folder: Path) -> dict:
    """What a run has computed: a disk may have been full when a picture was due."""
    return {k: v for k, v in contents(folder).items() if "samples" not in k and "board" not in k}


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_fails_for_a_while_costs_nothing(fault, stages, disk, tmp_path, tally):
    arguments = [*unet_options(stages, "run", *STEPS), "--keep_last", "2"]
    whole, folder = tmp_path / "whole", disk / "work"
    for place in whole, folder:
        place.mkdir()
    process, _ = start("train_ldm_unet", arguments, whole)
    process.join(300)
    assert process.exitcode == 0

    survived = tally(f"a disk that is {fault} for a while")
    process, _ = start("train_ldm_unet", arguments, folder)
    wait_for(20, folder, process)
    if fault == "full":
        fill(disk)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=False)
    time.sleep(1.5)
    assert process.is_alive(), Path(f"{folder}.log").read_text()
    last = torch.load(folder / "run" / "last.pth", weights_only=True)["step"]
    if fault == "full":
        (disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    process.join(300)
    assert process.exitcode == 0, Path(f"{folder}.log").read_text()
    assert last < 300
    assert differences(numbers(whole), numbers(folder)) == []
    survived()


@pytest.mark.parametrize("script", ["encode_dataset", "sample"])
def test_a_full_disk_ends_what_makes_files_with_one_message(
    script, stages, phantoms, disk, tmp_path, tally
):
    """Which names the file, also where a library writes it; then the same command ends the same."""
    vae = ["--vae_checkpoint", str(stages / "vae" / "vae_best.pth")]
    arguments = {
        "encode_dataset": [
            *("--csv_file", str(phantoms / "label.csv"), "--img_dir", str(phantoms), *vae),
            *("--device", "cpu", "--num_workers", "0", "--output_dir", "made"),
        ],
        "sample": sample_options(
            *(stages, Path("made"), "--num_samples", "4", "--format", "npy"),
            *("--latent_data_dir", str(stages / "latents")),
        ),
    }[script]
    survived = tally(f"a disk that is full for {script}.py")
    whole, folder = tmp_path / "whole", disk / "work"
    for place in whole, folder:
        place.mkdir()
    assert run(script, arguments, whole)[0] == 0, Path(f"{whole}.log").read_text()
    fill(disk)
    with open(disk / "filler", "r+b") as file:  # room for the small files, not for all
        file.truncate((disk / "filler").stat().st_size - 3 * 4096)
    log = tmp_path / "full.log"
    Path(f"{folder}.log").symlink_to(log)  # a log on the full disk would stay empty
    assert run(script, arguments, folder)[0] == 2, log.read_text()
    said = log.read_text()
    assert said.count("error: ") == 1 and "No space left on device" in said, said
    assert "made" in said.rpartition("on device")[2], said
    (disk / "filler").unlink()
    assert run(script, arguments, folder)[0] == 0, log.read_text()
    assert differences(contents(whole), contents(folder)) == []
    survived()


def test_latents_that_are_cut_short_under_way_are_named(stages, tmp_path, tally):
    survived = tally("a latent file that is cut short under way")
    folder, latents = tmp_path / "work", tmp_path / "latents"
    folder.mkdir()
    shutil.copytree(stages / "latents", latents)
    arguments = [*unet_options(stages, "run", *STEPS), "--latent_data_dir", str(latents)]
    process, _ = start("train_ldm_unet", arguments, folder)
    wait_for(20, folder, process)
    os.truncate(latents / "latents.npy", 200)
    process.join(300)
    said = Path(f"{folder}.log").read_text()
    assert process.exitcode == 2, said
    assert "latents.npy: row " in said and "is cut off" in said
    assert torch.load(folder / "run" / "last.pth", weights_only=True)["step"] >= 15
    survived()


def test_without_shared_memory_images_are_decoded_all_the_same(phantoms, tmp_path, tally):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    inner = f'mount --bind {hidden} /dev/shm && mount -o remount,ro,bind /dev/shm && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", inner, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    survived = tally("no /dev/shm")
    said = {}
    for name, before in ("with", []), ("without", prefix):
        folder = tmp_path / name
        folder.mkdir()
        more = ("--steps", "4", "--val_interval", "2", "--log_interval", "1")
        options = vae_options(phantoms, "run", *more)
        options[options.index("--num_workers") + 1] = "2"
        environment = {**os.environ, "TORCH_HOME": str(tmp_path / "no_weights")}
        done = subprocess.run(
            [*before, sys.executable, str(ROOT / "train_vae.py"), *map(str, options)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        said[name] = done.stdout
    assert "(--num_workers 0): there is no shared memory" in said["without"]
    assert "shared memory" not in said["with"]
    assert differences(contents(tmp_path / "with"), contents(tmp_path / "without")) == []
    survived()


def used(pid: int) -> tuple[float, int]:
    """MiB of memory and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))


def test_memory_and_files_stay_flat_in_a_long_run(stages, tmp_path, full, tally):
    steps = 20_000 if full else 1_200
    survived = tally(f"{steps} steps: memory, open files, TensorBoard files")
    folder = tmp_path / "long"
    folder.mkdir()
    more = ["--steps", str(steps), "--val_interval", str(steps // 12), "--save_interval", "100"]
    arguments = unet_options(stages, "run", *more, "--log_interval", "10", "--keep_last", "3")
    process, _ = start("train_ldm_unet", arguments, folder)
    seen = []
    while process.is_alive():
        with_step = step_of(folder)
        try:
            seen.append((with_step, *used(process.pid)))
        except (OSError, ValueError):
            break
        time.sleep(0.2)
    process.join(60)
    assert process.exitcode == 0, Path(f"{folder}.log").read_text()
    early = [row for row in seen if steps * 0.2 < row[0] < steps * 0.4]
    late = [row for row in seen if row[0] > steps * 0.8]
    growth = max(row[1] for row in late) - max(row[1] for row in early)
    print(f"{steps} steps: {max(r[1] for r in early):.0f} MiB, then {growth:+.1f} MiB")
    assert growth < (10 if full else 20)
    assert max(row[2] for row in late) <= max(row[2] for row in early) + 1
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1
    assert len(list((folder / "run").glob("*.pth"))) == 4  # the best, the last 3
    shutil.rmtree(folder)
    survived()
