"""How long the training stages take to start, and to resume, as the data grow.

    python benchmarks/scaling.py --slices 100000 --views 8
    python benchmarks/scaling.py --slices 1000 --views 8 --code OLDER_COMMIT --stages train_vae

Makes up a data set in a temporary folder: label.csv of slices that are hard links to one image,
20 a patient, and their latents, zeros in files without blocks. Then starts each stage, with a tiny
model at 256x256, lets it stop after its first step, and starts it again. Prints seconds from start
to end and CPU seconds. `--code` runs the scripts of another checkout.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIZE, PATIENT, LINKS = 256, 20, 20_000  # pixels, slices of one patient, links to one file
STAGES = ("train_vae", "train_ldm_unet", "train_controlnet")


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_slices(folder: Path, count: int) -> None:
    """label.csv and `count` slices with contours, which are links to a few files."""
    generator = np.random.default_rng(0)
    contour = np.zeros((SIZE, SIZE), np.uint8)
    contour[64:192, 32:224] = 255
    image = np.where(contour > 0, 40, 180) + generator.integers(0, 40, contour.shape)
    lines = ["image,contour,patient_id,label"]
    for name in ("images", "contours"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        for name, pixels in (("images", image.astype(np.uint8)), ("contours", contour)):
            path = folder / name / f"{i:06d}.png"
            if i % LINKS == 0:
                Image.fromarray(pixels).save(path)
            else:
                os.link(folder / name / f"{i - i % LINKS:06d}.png", path)
        patient = i // PATIENT
        label = ("normal", "fibrosis")[patient % 2]
        lines.append(f"images/{i:06d}.png,contours/{i:06d}.png,P{patient:05d},{label}")
    (folder / "label.csv").write_text("\n".join(lines) + "\n")


def make_latents(folder: Path, data: Path, models: Path, views: int) -> int:
    """Models without training, and latents of zeros as encode_dataset.py lays them out; rows."""
    import torch

    from fibldm import encoding
    from fibldm.checkpoint import save_model
    from fibldm.datasets import CTDataset, Views
    from fibldm.disk import create_rows
    from fibldm.tables import Split, read_table
    from fibldm.unet import UNet
    from fibldm.vae import LATENT_SCALE, VAE

    split, window, vae_file = Split(), [-1000.0, 400.0], models / "vae_best.pth"
    models.mkdir()
    table_hash = file_hash(data / "label.csv")
    facts = {"window": window, "split": split.__dict__, "step": 1}
    save_model(vae_file, VAE(SIZE, 16, 8, 16, 1), {"label_csv": table_hash}, **facts)
    rows, _ = read_table(data / "label.csv", data, split)
    table = CTDataset(rows, data, data, SIZE, views=Views(views))
    count, held = len(table.rows), len(table.indices("val", "test"))
    packed = hasattr(encoding, "PackedRows")
    folder.mkdir()
    create_rows(folder / "latents.npy", np.float32, (count, 8, 16, 16))
    width = SIZE // 8 if packed else SIZE
    create_rows(folder / "contours.npy", np.uint8, (count, 1, SIZE, width))
    create_rows(folder / "heldout_images.npy", np.float16, (held, 1, SIZE, SIZE))
    lines = ["row,image,patient_id,label,split,view"]
    lines += [
        f"{i},{row.image},{row.patient_id},{row.label},{row.split},{row.view}"
        for i, row in enumerate(table.rows)
    ]
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    hashes = {"latents": "a" * 64, "contours": "b" * 64, "vae": file_hash(vae_file)}
    meta = {
        "latent_shape": [count, 8, 16, 16],
        "contour_shape": [count, 1, SIZE, SIZE],
        "contour_bits": packed,
        "window": window,
        "latent_scale": LATENT_SCALE,
        "classes": ["fibrosis", "normal"],
        "contour_style": "filled",
        "label_csv_sha256": table_hash,
        "files_sha256": table.fingerprint(),
        "split": split.__dict__,
        "views": [views, 0.0, 0.0],
        **{f"{name}_sha256": digest for name, digest in hashes.items()},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    torch.manual_seed(0)
    lineage = {**hashes, "label_csv": table_hash}
    facts = {"window": window, "classes": meta["classes"], "step": 1}
    facts |= {"pixel_spacing": None, "contour_style": "filled"}
    save_model(models / "unet_best.pth", UNet(8, 16, 1, 2, [32, 64], 1), lineage, **facts)
    return count


def commands(work: Path, views: int) -> dict[str, list]:
    """Of each stage, its script and options."""
    data, models = work / "data", work / "models"
    small = [
        *("--device", "cpu", "--num_workers", 0, "--batch_size", 4, "--time_limit", "0:00:01"),
        *("--steps", 1000, "--val_interval", 1000),
    ]
    sampling = ["--val_samples", 32, "--val_sampling_steps", 4]
    as_they_are = ["--views", views, "--max_shift", 0, "--max_scale", 0]
    given = ["--vae_checkpoint", models / "vae_best.pth"]
    return {
        "train_vae": [
            *("--csv_file", data / "label.csv", "--img_dir", data, "--base_channels", 16),
            *("--blocks", 1, "--perceptual", "none", "--save_dir", work / "vae", *small),
        ],
        "train_ldm_unet": [
            *("--latent_data_dir", work / "latents", *given, "--save_dir", work / "unet"),
            *("--channels", 32, 64, "--blocks", 1, *sampling, *small),
        ],
        "train_controlnet": [
            *("--data_path", data, "--csv_path", "label.csv", *given, *as_they_are),
            *("--unet_checkpoint", models / "unet_best.pth", "--save_dir", work / "controlnet"),
            *(*sampling, *small),
        ],
        "encode_dataset": [
            *("--csv_file", data / "label.csv", "--img_dir", data, *given, *as_they_are),
            *("--output_dir", work / "latents"),
            *("--device", "cpu", "--num_workers", 0),
        ],
    }


def timed(code: Path, stage: str, options: list) -> tuple[float, float]:
    """Seconds and CPU seconds of a stage until it has stopped after a step."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, str(code / f"{stage}.py"), *map(str, options)]
    done = subprocess.run(command, cwd=code, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 75):
        raise SystemExit(f"{stage}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=100_000)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--code", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument("--stages", nargs="+", default=[*STAGES, "encode_dataset"])
    parser.add_argument("--work", type=Path, help="where to make the data (default: /tmp)")
    args = parser.parse_args()
    code = args.code.resolve()
    sys.path.insert(0, str(code))
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        work = Path(work)
        make_slices(work / "data", args.slices)
        count = make_latents(work / "latents", work / "data", work / "models", args.views)
        (work / "controlnet").mkdir()
        (work / "controlnet" / "latents").symlink_to(work / "latents")
        print(f"{args.slices} slices, {count} rows of latents\n")
        print("| stage | start, s (CPU) | resume, s (CPU) |\n|---|---|---|")
        for stage in args.stages:
            options = commands(work, args.views)[stage]
            cells = [timed(code, stage, options) for _ in range(2)]
            shown = " | ".join(f"{seconds:.0f} ({cpu:.0f})" for seconds, cpu in cells)
            print(f"| {stage} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
