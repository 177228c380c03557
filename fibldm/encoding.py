"""Encode a data set into a folder of latents, whole or not at all."""

import csv
import json
import os
import shutil
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fibldm import ct, distributed
from fibldm.checkpoint import file_hash, require_equal
from fibldm.datasets import CTDataset, LatentDataset, Views, ahead, chunks, load_slices
from fibldm.disk import StoredRows, create_rows, sync_folder
from fibldm.environment import environment
from fibldm.tables import Split, read_table
from fibldm.vae import LATENT_SCALE, VAE

MEASURED = 512  # contours at most, evenly spaced, whose style is measured


def write_latents(
    folder: str | Path,
    dataset: CTDataset,
    vae: VAE,
    facts: dict,
    device: torch.device,
    batch_size: int = 32,
    workers: int = 0,
) -> list[str]:
    """Encode a data set into `folder`, whole or not at all; the ranks share the work.

    Writes latents.npy (mean * LATENT_SCALE), contours.npy, heldout_images.npy (float16, rows of
    val and test), manifest.csv, meta.json (`facts`, shapes, the contours' style). Call it on every
    rank; the main one gets notes for the user.
    """
    notes = []
    folder = Path(folder)
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    held = dataset.indices("val", "test")
    count, size = len(dataset), dataset.image_size
    latent = (vae.config["latent_dim"], vae.config["latent_size"], vae.config["latent_size"])
    shapes = {
        "latents": ((count, *latent), np.float32),
        "contours": ((count, dataset.contour_channels, size, size), np.uint8),
        "heldout_images": ((len(held), 1, size, size), np.float16),
    }

    # The main process lays the files out, each rank fills its rows.
    if distributed.is_main():
        for left in partial, old:
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, (shape, dtype) in shapes.items():
            create_rows(partial / f"{name}.npy", dtype, shape)
    distributed.barrier()
    arrays = {name: StoredRows(partial / f"{name}.npy", writable=True) for name in shapes}
    position = {row: i for i, row in enumerate(held)}
    mine = chunks(distributed.share(count), batch_size)
    loaded = ahead(load_slices(dataset, mine, workers, device))
    latents, before, finite = None, [], True
    quiet = None if distributed.is_main() else True
    for batch, images in tqdm(loaded, "encoding", len(mine), disable=quiet):
        distributed.alive()
        rows = batch["row"].tolist()
        with torch.no_grad():
            encoded = vae.encode(images).mean * LATENT_SCALE
        # A GPU is still at it: meanwhile write what is here, and the batch before.
        arrays["contours"][rows] = batch["contour"].numpy()
        for row, image in zip(rows, batch["image"].numpy(), strict=True):
            if row in position:
                arrays["heldout_images"][position[row]] = image
        if before:
            arrays["latents"][before] = latents.cpu().numpy()
        latents, before = encoded, rows
        finite &= bool(encoded.isfinite().all())
    if before:
        arrays["latents"][before] = latents.cpu().numpy()
    for array in arrays.values():
        array.flush()
    if distributed.any_rank(not finite, device):  # also a barrier
        raise ValueError(f"{folder}: not written, since the VAE gives latents that are not finite")

    # The main process describes them and makes the folder appear.
    if distributed.is_main():
        with open(partial / "manifest.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "image", "patient_id", "label", "split", "view"])
            for i, row in enumerate(dataset.rows):
                writer.writerow([i, row.image, row.patient_id, row.label, row.split, row.view])
        style, notes = measure_style(
            arrays["contours"], dataset.slices, dataset.facts.contour_style
        )
        labels = {row.label for row in dataset.rows if row.split == "train"}
        meta = {
            "latent_shape": [count, *latent],
            "contour_shape": list(shapes["contours"][0]),
            "window": list(dataset.window),
            "latent_scale": LATENT_SCALE,
            "classes": sorted(labels - {""}),
            "contour_style": style,
            "latents_sha256": file_hash(partial / "latents.npy"),
            "contours_sha256": file_hash(partial / "contours.npy"),
            "environment": environment(),
            **facts,
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return notes


def measure_style(
    contours: StoredRows, slices: int, declared: str | None
) -> tuple[str | None, list[str]]:
    """The style of the first `slices` contours (rows, K, H, W), and a warning where it differs.

    It is as dataset.json says (`declared`), else that of nine in ten of the contours which have
    a clear one, else None.
    """
    rows = np.linspace(0, slices - 1, min(slices, MEASURED)).round().astype(int)
    counts = Counter(ct.contour_style(contours[row]) for row in rows)
    del counts[None]
    style, most = max(counts.items(), key=lambda item: item[1], default=(None, 0))
    notes = []
    if {declared or style} != {*counts, declared or style}:
        found = " and ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        said = f", and dataset.json says {declared}" if declared else ""
        notes.append(
            f"WARNING: contours of several styles: of {len(rows)} looked at {found}{said}; "
            "expected one style; convert them by scripts/prepare_data.py --contour_style"
        )
    if declared is None and most < 0.9 * counts.total():
        style = None
    return declared or style, notes


def encode_csv(
    folder: str | Path,
    csv_file: str | Path,
    root: str | Path,
    vae: VAE,
    vae_file: str | Path,
    vae_content: dict,
    contour_channels: int,
    device: torch.device,
    batch_size: int,
    workers: int,
    views: Views,
    overwrite: bool = False,
    remedy: str = "use --overwrite",
) -> list[str]:
    """Make `folder` the latents of a table by a VAE file, or find that it is; return notes.

    Window and split come from the VAE's checkpoint, so that all stages agree. A folder made
    from other data or another VAE is an error (ValueError with both hashes and `remedy`) unless
    `overwrite`.
    """
    folder = Path(folder)
    rows, notes = read_table(csv_file, root, Split(**vae_content["split"]))
    dataset = CTDataset(
        rows,
        root,
        Path(csv_file).parent,
        vae.config["image_size"],
        tuple(vae_content["window"]),
        contour_channels,
        views,
    )
    facts = {
        "views": list(astuple(views)),
        "vae_sha256": file_hash(vae_file),
        "label_csv_sha256": file_hash(csv_file),
        "files_sha256": dataset.fingerprint(),
        "split": vae_content["split"],
    }
    said = dataset.facts.pixel_spacing, dataset.facts.contour_style
    if said != (None, None):
        facts["dataset_json"] = list(said)
    notes += dataset.notes()
    if vae_content["lineage"].get("label_csv") != facts["label_csv_sha256"]:
        notes.append(
            f"WARNING: {csv_file} is not the table that the VAE was trained with. A patient whose "
            "patient_id or split changed since may now be held out, but was trained on."
        )
    present = folder.exists() and any(folder.iterdir())
    if present and not (folder / "meta.json").is_file():
        raise ValueError(f"{folder}: not a latent data set, and not empty; it is left as it is")
    if present and not overwrite:
        existing = LatentDataset(folder)
        for name, value in facts.items():
            found = existing.meta.get(name)
            require_equal(f"{folder}: its {name}", found, value, remedy)
        require_equal(
            f"{folder}: its contour channels",
            existing.contour_channels,
            contour_channels,
            f"{remedy}, or the same --contour_channels",
        )
        return [*notes, f"{folder} holds these latents already; nothing to encode"]
    sizes, _ = dataset.check()  # also a barrier: no rank sees what another is about to write
    facts["pixel_spacing"] = dataset.fitted_spacing(sizes)
    return notes + write_latents(folder, dataset, vae, facts, device, batch_size, workers)
