"""Encode a data set into a folder of latents, whole or not at all."""

import contextlib
import json
import locale
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fibldm import ct, distributed, limits
from fibldm.batches import Batches, item_noise, item_uniform, to_device
from fibldm.checkpoint import environment, require_equal, source_hash
from fibldm.datasets import CHECKED, CTDataset, Views, ahead, chunks, load_slices
from fibldm.disk import PackedRows, StoredRows, create_rows, file_hash, packed_size, replace_folder
from fibldm.tables import Split, read_csv, read_table, write_csv
from fibldm.unet import NO_LABEL
from fibldm.vae import LATENT_SCALE, VAE

MANIFEST = ("row", "image", "patient_id", "label", "split", "view")
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

    Writes latents.npy (mean * LATENT_SCALE), contours.npy (their bits), heldout_images.npy
    (float16, rows of val and test), manifest.csv, meta.json (`facts`, shapes, the contours' style).
    Call it on every rank; the main one gets notes for the user.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    count, channels, size = len(dataset), dataset.contour_channels, dataset.image_size
    latent = (vae.config["latent_dim"], vae.config["latent_size"], vae.config["latent_size"])
    shapes = {
        "latents": ((count, *latent), np.float32),
        "contours": ((count, channels, size, packed_size(size)), np.uint8),
        "heldout_images": ((len(dataset.indices("val", "test")), 1, size, size), np.float16),
    }

    # The main process lays the files out, each rank fills its rows.
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, (shape, dtype) in shapes.items():
            create_rows(partial / f"{name}.npy", dtype, shape)
    distributed.barrier()
    arrays = {name: StoredRows(partial / f"{name}.npy", writable=True) for name in shapes}
    contours = PackedRows(arrays["contours"], size)
    finite = _encode_rows(
        dataset, vae, arrays["latents"], contours, arrays["heldout_images"], device, batch_size,
        workers,
    )  # fmt: skip
    for array in arrays.values():
        array.flush()
    if distributed.any_rank(not finite, device):  # also a barrier
        raise ValueError(f"{folder}: not written, since the VAE gives latents that are not finite")

    # The main process describes them and makes the folder appear.
    notes = []
    if distributed.is_main():
        notes = _describe(partial, dataset, arrays["latents"].shape, contours, facts)
        replace_folder(partial, folder)
    distributed.barrier()
    return notes


def _describe(
    folder: Path,
    dataset: CTDataset,
    latent_shape: tuple[int, ...],
    contours: PackedRows,
    facts: dict,
) -> list[str]:
    """Write manifest.csv and meta.json beside the arrays; return notes on the contours."""
    manifest = pd.DataFrame(dataset.rows).assign(row=range(len(dataset)))
    write_csv(folder / "manifest.csv", manifest, MANIFEST)
    rows = np.linspace(0, dataset.slices - 1, min(dataset.slices, MEASURED)).round().astype(int)
    style, notes = ct.common_style(contours[rows], dataset.info.contour_style)
    labels = {row.label for row in dataset.rows if row.split == "train"}
    meta = {
        "latent_shape": list(latent_shape),
        "contour_shape": list(contours.shape),
        "contour_bits": True,
        "window": list(dataset.window),
        "latent_scale": LATENT_SCALE,
        "classes": sorted(labels - {""}),
        "contour_style": style,
        "latents_sha256": file_hash(folder / "latents.npy"),
        "contours_sha256": file_hash(folder / "contours.npy"),
        "environment": environment(),
        **facts,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return notes


def _encode_rows(
    dataset: CTDataset,
    vae: VAE,
    latents: StoredRows,
    contours: PackedRows,
    heldout_images: StoredRows,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> bool:
    """Fill this rank's rows of the arrays; whether all of its latents are finite."""
    position = {row: i for i, row in enumerate(dataset.indices("val", "test"))}
    own = chunks(distributed.share(len(dataset)), batch_size)
    loaded = ahead(load_slices(dataset, own, workers, device))
    encoded, before, finite = None, [], True
    quiet = None if distributed.is_main() else True
    for batch, images in tqdm(loaded, "encoding", len(own), disable=quiet):
        distributed.alive()
        rows, last = batch["row"].tolist(), encoded
        with torch.no_grad():
            encoded = vae.encode(images).mean * LATENT_SCALE
        # A GPU is still at it: meanwhile write what is here, and the batch before.
        contours[rows] = batch["contour"].numpy()
        for row, image in zip(rows, batch["image"].numpy(), strict=True):
            if row in position:
                heldout_images[position[row]] = image
        if before:
            latents[before] = last.cpu().numpy()
        before = rows
        finite &= bool(encoded.isfinite().all())
    if before:
        latents[before] = encoded.cpu().numpy()
    return finite


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
    dry_run: bool = False,
) -> list[str]:
    """Encode a table's slices by a VAE file into `folder`, unless that is done; return notes.

    With `dry_run` it is only checked that this can begin. Window and split come from the VAE's
    checkpoint, so that all stages agree. A folder made from other data or another VAE is an error
    (ValueError with both hashes and `remedy`) unless `overwrite`.
    """
    folder = Path(folder)
    rows, notes = read_table(csv_file, root, Split(**vae_content["split"]))
    size, window = vae.config["image_size"], tuple(vae_content["window"])
    beside = Path(csv_file).parent
    dataset = CTDataset(rows, root, beside, size, window, contour_channels, views)
    facts = {
        "views": list(astuple(views)),
        "vae_sha256": source_hash(vae_file),
        "label_csv_sha256": file_hash(csv_file),
        "files_sha256": dataset.fingerprint(),
        "split": vae_content["split"],
    }
    said = dataset.info.pixel_spacing, dataset.info.contour_style
    if said != (None, None):
        facts["dataset_json"] = list(said)
    notes += dataset.notes()
    if vae_content["lineage"].get("label_csv") != facts["label_csv_sha256"]:
        notes.append(
            f"WARNING: {csv_file} is not the table that the VAE was trained with. A patient whose "
            "patient_id or split changed since may now be held out, but was trained on."
        )
    if _holds(folder, facts, contour_channels, overwrite, remedy):
        return [*notes, f"{folder} holds these latents already; nothing to encode"]
    # What the VAE's training has checked is not decoded twice. It is also a barrier: no rank sees
    # what another is about to write.
    sizes, _ = dataset.check(Path(vae_file).with_name(CHECKED), update=False)
    if dry_run:
        what = f"{len(dataset)} latents of {len(rows)} slices"
        return [*notes, f"--dry_run: {what} can be encoded into {folder}"]
    facts["pixel_spacing"] = dataset.fitted_spacing(sizes)
    return notes + write_latents(folder, dataset, vae, facts, device, batch_size, workers)


def _holds(folder: Path, facts: dict, channels: int, overwrite: bool, remedy: str) -> bool:
    """Whether a folder has these latents already, False where it is to be filled; ValueError where
    it has others that may not be overwritten, or something else.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "meta.json").is_file():
        raise ValueError(f"{folder}: not a latent data set, and not empty; it is left as it is")
    if overwrite:
        return False
    existing = LatentDataset(folder)
    for name, value in facts.items():
        require_equal(f"{folder}: its {name}", existing.meta.get(name), value, remedy)
    what, same = f"{folder}: its contour channels", f"{remedy}, or the same --contour_channels"
    require_equal(what, existing.contour_channels, channels, same)
    return True


def read_manifest(path: Path, classes: Sequence[str]) -> pd.DataFrame:
    """manifest.csv: image, patient_id, label and split as strings, view as a number.

    Older ones lack the views, or are in the encoding of their locale: the one in which the training
    slices have the `classes` is taken.
    """
    try:
        manifest = read_csv(path)
    except ValueError as error:
        for encoding in (locale.getencoding(), "cp1252", "latin-1"):
            with contextlib.suppress(ValueError):
                manifest = read_csv(path, encoding)
                if {*manifest["label"][manifest["split"] == "train"], ""} == {*classes, ""}:
                    break
        else:
            raise error
    manifest = manifest[[name for name in MANIFEST[1:] if name in manifest or name != "view"]]
    views = manifest["view"].astype(int) if "view" in manifest else 0
    return manifest.assign(view=views).reset_index(drop=True)


LINEAGE = ("vae", "latents", "contours", "label_csv")  # what latents come from, and they


def read_facts(meta: Any) -> tuple[ct.Window, float | None, str | None]:
    """Window, mm of a pixel and contour style of a meta.json, the latter two None where unknown.

    ValueError, KeyError or TypeError where it says something else.
    """
    if not isinstance(meta, dict):
        raise ValueError("meta.json: expected an object")
    scale = meta.get("latent_scale")
    require_equal("meta.json: its latent scale", scale, LATENT_SCALE, "encode again")
    low, high = (float(end) for end in meta["window"])
    if not -np.inf < low < high < np.inf:
        raise ValueError(f"meta.json: window {low:g} to {high:g}, expected two HU, LOW first")
    spacing, style = meta.get("pixel_spacing"), meta.get("contour_style")
    if spacing is not None and not 0 < float(spacing) < np.inf:
        raise ValueError(f"meta.json: pixel_spacing {spacing}, expected mm above 0")
    if style not in (None, *ct.STYLES):
        raise ValueError(f"meta.json: contour_style {style!r}, expected {ct.STYLES}")
    if not all(isinstance(name, str) for name in meta["classes"]):
        raise ValueError(f"meta.json: classes {meta['classes']!r}, expected names")
    return (low, high), spacing, style


class LatentDataset:
    """A folder of latents, read row by row: see `write_latents` for what it holds.

    latents (rows, C, h, w) float32, contours (rows, K, H, W) uint8, and for the rows held out
    of training the real slices. `table` has a line for each row, with image, patient_id, label,
    split and view (0: the slice itself). Raises ValueError where the folder is incomplete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "meta.json").is_file():
            raise ValueError(
                f"{self.folder}: not a latent data set (no meta.json); make one with "
                "encode_dataset.py"
            )
        try:
            self.meta = limits.read_json(self.folder / "meta.json")
            self.window, self.pixel_spacing, self.contour_style = read_facts(self.meta)
            self.table = read_manifest(self.folder / "manifest.csv", self.meta["classes"])
            self.latents, stored, self._heldout = (
                StoredRows(self.folder / f"{name}.npy")
                for name in ("latents", "contours", "heldout_images")
            )
            for array in self.latents, stored, self._heldout:
                if array.ndim != 4:
                    raise ValueError(f"{array.path.name}: {array.shape}, expected 4D")
            bits = self.meta.get("contour_bits")  # older folders have a byte for each pixel
            self.contours = PackedRows(stored, self.meta["contour_shape"][3]) if bits else stored
        except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{self.folder}: damaged latent data set: {what}") from error
        held = self.indices("val", "test")
        for name, array, expected in (
            ("latents", self.latents, len(self)),
            ("contours", self.contours, len(self)),
            ("heldout_images", self._heldout, len(held)),
        ):
            what = f"{self.folder / name}.npy: rows, by manifest.csv"
            require_equal(what, len(array), expected, "copy it again, or encode again")
        self._heldout_position = {row: i for i, row in enumerate(held)}

        self.classes: list[str] = []
        self.labels = np.empty(0, int)
        self.use_classes(self.meta["classes"])
        self.latent_dim, self.latent_size = self.latents.shape[1:3]
        self.contour_channels, self.image_size = self.contours.shape[1:3]

    def __len__(self) -> int:
        return len(self.table)

    def indices(self, *splits: str, views: bool = True) -> list[int]:
        """Rows that belong to one of the splits; without `views` each slice once."""
        chosen = self.table["split"].isin(splits)
        return np.flatnonzero(chosen if views else chosen & (self.table["view"] == 0)).tolist()

    def label_names(self, *splits: str) -> list[str]:
        """The labels of the `indices` of the splits, "" for none."""
        return self.table["label"].iloc[self.indices(*splits)].tolist()

    def summary(self) -> str:
        """How many latents there are to train on, and slices to validate with."""
        train, slices = self.indices("train"), self.indices("train", views=False)
        return (
            f"{len(train)} latents of {len(slices)} slices to train on, "
            f"{len(self.indices('val'))} held out for validation; "
            f"classes {self.classes or 'none'}"
        )

    def use_classes(self, classes: list[str]) -> None:
        """Number the labels by these class names; other labels count as none given."""
        self.classes = list(classes)
        numbers = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([numbers.get(label, NO_LABEL) for label in self.table["label"]])

    def require_shape(
        self, latent_dim: int | None, latent_size: int | None, contour_channels: int | None = None
    ) -> None:
        """Raise ValueError where one of these options is given and not what the data have."""
        for option, asked, found in (
            ("--latent_dim", latent_dim, self.latent_dim),
            ("--latent_size", latent_size, self.latent_size),
            ("--contour_channels", contour_channels, self.contour_channels),
        ):
            if asked is not None and asked != found:
                raise ValueError(f"{option} {asked}, but the latents in {self.folder} have {found}")

    def lineage(self, vae_file: str | Path) -> dict[str, str]:
        """Hashes of these latents and of their VAE; ValueError where `vae_file` is another."""
        hashes = {name: self.meta.get(f"{name}_sha256") for name in LINEAGE}
        absent = [name for name, digest in hashes.items() if not isinstance(digest, str)]
        if absent:
            raise ValueError(f"{self.folder}: meta.json has no SHA-256 of {absent}; encode again")
        vae = source_hash(vae_file) if Path(vae_file).is_file() else "no such file"
        require_equal(
            f"{vae_file}: its SHA-256",
            vae,
            hashes["vae"],
            f"the VAE that {self.folder} was encoded with; encode again, or give that VAE",
        )
        return hashes

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (N, C, h, w) as loaded, contours (N, K, H, W) and labels (N,) of the rows."""
        found = self.latents[rows], self.contours[rows], self.labels[rows]
        return tuple(to_device(torch.from_numpy(array), device) for array in found)

    def heldout_images(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Real slices (N, 1, H, W) in [-1, 1] of rows outside of the train split."""
        positions = [self._heldout_position[row] for row in rows]
        return torch.from_numpy(self._heldout[positions].astype(np.float32)).to(device)


def training_batches(
    data: LatentDataset, batches: Batches, stream: str, draws: int, device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Latents, contours, labels, noise (as latents) and uniform draws (N, draws), by micro-batch.

    In the order of `batches`, read and drawn while the one before trains; `stream` names the
    noise.
    """

    def make() -> Iterator[tuple[Tensor, ...]]:
        seed, shape = batches.plan.seed, data.latents.shape[1:]
        for step, positions, _ in batches.all_micro_batches():
            drawn = (
                item_noise(seed, stream, step, positions, shape),
                item_uniform(seed, "draws", step, positions, draws),
            )
            loaded = data.batch(batches.rows_of(step, positions), device)
            yield *loaded, *(to_device(value, device) for value in drawn)

    return ahead(make())
