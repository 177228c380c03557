"""Slices listed in label.csv, latents encoded from them, and their split by patient."""

import csv
import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fibldm import ct, distributed
from fibldm.checkpoint import file_hash, require_equal, sync_folder
from fibldm.unet import NO_LABEL
from fibldm.vae import LATENT_SCALE, VAE

SPLITS = ("train", "val", "test")
SHOWN = 20  # of a list of bad rows in an error


@dataclass(frozen=True)
class Split:
    """How patients without a `split` column are divided; kept in the VAE's checkpoint."""

    seed: int = 0
    val_fraction: float = 0.1
    test_fraction: float = 0.1

    def of(self, patient_id: str) -> str:
        """A stable hash of seed and patient decides, so that more patients reshuffle nobody."""
        digest = hashlib.sha256(f"{self.seed}:{patient_id}".encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        if position < self.val_fraction:
            return "val"
        return "test" if position < self.val_fraction + self.test_fraction else "train"


@dataclass(frozen=True)
class Row:
    """One line of label.csv; label is "" where there is none."""

    image: str
    contour: str
    patient_id: str
    label: str
    split: str


def list_some(lines: Sequence[str]) -> str:
    shown = "\n  ".join(lines[:SHOWN])
    more = f"\n  ... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"\n  {shown}{more}"


def read_table(csv_file: str | Path, root: str | Path, split: Split) -> tuple[list[Row], list[str]]:
    """Read label.csv, whose paths are relative to `root`; return its rows and notes for the user.

    Raises ValueError for a missing or empty table, missing columns, files or patients.
    """
    csv_file, root, notes = Path(csv_file), Path(root), []
    if not csv_file.is_file():
        raise ValueError(f"{csv_file}: no such file; expected a table with columns image,contour")
    try:
        with open(csv_file, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            numbered = [(reader.line_num, line) for line in reader if "".join(line).strip()]
            lines = [line for _, line in numbered]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{csv_file}: not a CSV text file in UTF-8: {error}") from error
    if len(lines) < 2:
        raise ValueError(f"{csv_file}: {len(lines)} lines; expected a header and a line a slice")

    # Columns by name, or the first two.
    header = [name.strip().lower() for name in lines[0]]
    if len(header) < 2:
        raise ValueError(
            f"{csv_file}: 1 column ({lines[0][0]!r}); expected at least two, image and contour"
        )
    column = {name: i for i, name in enumerate(header)}
    if "image" not in column or "contour" not in column:
        column |= {"image": 0, "contour": 1}
        notes.append(f"{csv_file}: columns {lines[0][:2]} are taken as image and contour")
    short = [f"line {i}: {line}" for i, line in numbered[1:] if len(line) < len(header)]
    if short:
        raise ValueError(
            f"{csv_file}: {len(short)} lines have fewer cells than the header's {len(header)}:"
            + list_some(short)
        )

    # Rows, with their files and their split.
    rows, missing = [], []
    for line in lines[1:]:
        cells = {name: line[i].strip() for name, i in column.items()}
        patient = cells.get("patient_id") or cells["image"]
        part = cells.get("split", "").lower() or split.of(patient)
        if part not in SPLITS:
            raise ValueError(f"{csv_file}: split {part!r}; expected one of {', '.join(SPLITS)}")
        rows.append(Row(cells["image"], cells["contour"], patient, cells.get("label", ""), part))
        pair = rows[-1].image, rows[-1].contour
        missing += [name for name in pair if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"{csv_file}: {len(missing)} files are missing below {root} (paths in the table are "
            f"relative to that folder):" + list_some(missing)
        )
    check_split(csv_file, rows)
    if "patient_id" not in column:
        notes.append(
            f"WARNING: {csv_file} has no patient_id column: each row counts as its own patient. If "
            "a patient has several slices, some land in training and some in validation, and "
            "held-out numbers will look better than they are."
        )
    return rows, notes


def check_split(csv_file: Path, rows: list[Row]) -> None:
    """Raise ValueError where a patient is in two splits, or none is in training or validation."""
    parts: dict[str, str] = {}
    for row in rows:
        if parts.setdefault(row.patient_id, row.split) != row.split:
            raise ValueError(
                f"{csv_file}: patient {row.patient_id} is in {parts[row.patient_id]} and in "
                f"{row.split}; a patient's slices belong to one split"
            )
    count = Counter(parts.values())
    for part, remedy in ("train", "lower"), ("val", "raise"):
        if not count[part]:
            raise ValueError(
                f"{csv_file}: of {len(parts)} patients none falls into the {part} split, expected "
                f"at least 1; {remedy} --val_fraction of train_vae.py, change its --split_seed, "
                "or add a split column"
            )


class CTDataset(Dataset):
    """Slices of a table as {"image": (1, S, S) float32 in [-1, 1], "contour": (K, S, S), "row"}.

    The contour is uint8, 0 or 1. Images of another size are padded to a square and resized.
    """

    def __init__(
        self,
        rows: list[Row],
        root: str | Path,
        rescale_folder: str | Path,
        image_size: int,
        window: ct.Window = ct.DEFAULT_WINDOW,
        contour_channels: int = 1,
    ) -> None:
        self.rows, self.root, self.image_size = rows, Path(root), image_size
        self.window, self.contour_channels = window, contour_channels
        self.rescale = ct.read_rescale(Path(rescale_folder))
        if self.rescale is None:
            self.rescale = ct.read_rescale(self.root)

    def __len__(self) -> int:
        return len(self.rows)

    def read_pair(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """HU (H, W) and contour (K, H, W) as the files have them; ValueError where they differ."""
        image = self.root / self.rows[row].image
        hu = ct.read_hu(image, self.rescale, self.window)
        contour = ct.read_contour(self.root / self.rows[row].contour, self.contour_channels)
        if contour.shape[1:] != hu.shape:
            raise ValueError(
                f"{self.root / self.rows[row].contour}: a contour of {contour.shape[1:]} pixels, "
                f"but its image {self.rows[row].image} has {hu.shape}"
            )
        return hu, contour

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        hu, contour = self.read_pair(row)
        image = ct.hu_to_unit(ct.fit_square(hu, self.image_size, ct.AIR), self.window)
        contour = ct.fit_contour(contour, self.image_size)
        return {
            "image": torch.from_numpy(image)[None],
            "contour": torch.from_numpy(contour),
            "row": torch.tensor(row),
        }

    def indices(self, *splits: str) -> list[int]:
        """Rows that belong to one of the splits."""
        return [i for i, row in enumerate(self.rows) if row.split in splits]

    def fingerprint(self) -> str:
        """SHA-256 of the files' names and sizes and of their scale: whether the data changed."""
        files = [
            (name, (self.root / name).stat().st_size)
            for row in self.rows
            for name in (row.image, row.contour)
        ]
        return hashlib.sha256(json.dumps([self.rescale, files]).encode()).hexdigest()

    def notes(self) -> list[str]:
        """What is assumed of the files: their scale, and whether they are resized."""
        array, is_hu = ct.decode(self.root / self.rows[0].image)
        notes = []
        if not is_hu and self.rescale is None:
            low, high = self.window
            scale = (
                f"8-bit, taken as already windowed: 0 is {low:g} HU, 255 is {high:g} HU"
                if array.dtype == np.uint8
                else f"{array.dtype}, taken as HU"
            )
            notes.append(f"no dataset.json: images are {scale}")
        if array.shape[:2] != (self.image_size, self.image_size):
            notes.append(
                f"images of {array.shape[0]}x{array.shape[1]} are padded to a square and resized "
                f"to {self.image_size}x{self.image_size}"
            )
        return notes

    def check(self) -> None:
        """Decode every file, shared over the ranks; ValueError lists the bad ones."""

        def problem(row: int) -> str | None:
            try:
                self.read_pair(row)
            except ValueError as error:
                return str(error)
            return None

        mine = distributed.share(len(self))
        quiet = None if distributed.is_main() else True
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            found = list(tqdm(pool.map(problem, mine), "checking files", len(mine), disable=quiet))
        mine_bad = [text for text in found if text]
        problems = [text for part in distributed.gather(mine_bad) for text in part]
        if problems:
            raise ValueError(f"{len(problems)} of {len(self)} rows are bad:" + list_some(problems))


def load_batches(dataset: Dataset, batches: Iterable[list[int]], workers: int) -> DataLoader:
    """Batches of a dataset in the order given; `workers` processes decode ahead of their use."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals
    )


def ignore_signals(worker: int) -> None:
    """In a decoding process: the main process decides when to stop, after it has saved."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)


def chunks(items: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive parts of at most `size` items."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


class LatentDataset:
    """A folder of latents, memory-mapped: see `write_latents` for what it holds.

    latents (rows, C, h, w) float32, contours (rows, K, H, W) uint8, and for the rows held out
    of training the real slices. Raises ValueError where the folder is incomplete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "meta.json").is_file():
            raise ValueError(
                f"{self.folder}: not a latent data set (no meta.json); make one with "
                "encode_dataset.py"
            )
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            with open(self.folder / "manifest.csv", newline="") as file:
                lines = list(csv.DictReader(file))
            self.latents = np.load(self.folder / "latents.npy", mmap_mode="r")
            self.contours = np.load(self.folder / "contours.npy", mmap_mode="r")
            self._heldout = np.load(self.folder / "heldout_images.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{self.folder}: damaged latent data set: {error}") from error
        self.rows = [Row(r["image"], "", r["patient_id"], r["label"], r["split"]) for r in lines]
        held = self.indices("val", "test")
        counts = len(self.rows), len(self.latents), len(self.contours), len(self._heldout)
        expected = len(self.rows), len(self.rows), len(self.rows), len(held)
        require_equal(f"{self.folder}: rows of its files", counts, expected, "encode again")
        self._heldout_position = {row: i for i, row in enumerate(held)}

        scale = self.meta.get("latent_scale")
        require_equal(f"{self.folder}: its latent scale", scale, LATENT_SCALE, "encode again")
        self.window: ct.Window = tuple(self.meta["window"])
        self.use_classes(self.meta["classes"])
        self.latent_dim, self.latent_size = self.latents.shape[1:3]
        self.contour_channels, self.image_size = self.contours.shape[1:3]

    def __len__(self) -> int:
        return len(self.rows)

    def indices(self, *splits: str) -> list[int]:
        """Rows that belong to one of the splits."""
        return [i for i, row in enumerate(self.rows) if row.split in splits]

    def use_classes(self, classes: list[str]) -> None:
        """Number the labels by these class names; other labels count as none given."""
        self.classes = list(classes)
        numbers = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([numbers.get(row.label, NO_LABEL) for row in self.rows])

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
        vae = file_hash(vae_file) if Path(vae_file).is_file() else "no such file"
        require_equal(
            f"{vae_file}: its SHA-256",
            vae,
            self.meta["vae_sha256"],
            f"the VAE that {self.folder} was encoded with; encode again, or give that VAE",
        )
        names = ("latents", "contours", "label_csv")
        return {"vae": vae, **{name: self.meta[f"{name}_sha256"] for name in names}}

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (N, C, h, w) as loaded, contours (N, K, H, W) and labels (N,) of the rows."""
        latents = torch.from_numpy(self.latents[rows]).to(device, non_blocking=True)
        contours = torch.from_numpy(self.contours[rows]).to(device, non_blocking=True)
        return latents, contours, torch.from_numpy(self.labels[rows]).to(device)

    def heldout_images(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Real slices (N, 1, H, W) in [-1, 1] of rows outside of the train split."""
        positions = [self._heldout_position[row] for row in rows]
        return torch.from_numpy(self._heldout[positions].astype(np.float32)).to(device)


def write_latents(
    folder: str | Path,
    dataset: CTDataset,
    vae: VAE,
    facts: dict,
    device: torch.device,
    batch_size: int = 32,
    workers: int = 0,
) -> None:
    """Encode a data set into `folder`, whole or not at all; the ranks share the work.

    Writes latents.npy (mean * LATENT_SCALE), contours.npy, heldout_images.npy (float16, rows of
    val and test), manifest.csv, meta.json (`facts` and shapes). Call it on every rank.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    held = dataset.indices("val", "test")
    count, size = len(dataset), dataset.image_size
    latent = (vae.config["latent_dim"], vae.config["latent_size"], vae.config["latent_size"])
    shapes = {
        "latents": ((count, *latent), np.float32),
        "contours": ((count, dataset.contour_channels, size, size), np.uint8),
        "heldout_images": ((len(held), 1, size, size), np.float16),
    }

    def open_array(name: str, mode: str) -> np.ndarray:
        shape, dtype = shapes[name]
        return np.lib.format.open_memmap(partial / f"{name}.npy", mode, dtype, shape)

    # The main process lays the files out, each rank fills its rows.
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in shapes:
            open_array(name, "w+").flush()
    distributed.barrier()
    arrays = {name: open_array(name, "r+") for name in shapes}
    position = {row: i for i, row in enumerate(held)}
    batches = chunks(distributed.share(count), batch_size)
    quiet = None if distributed.is_main() else True
    for batch in tqdm(load_batches(dataset, batches, workers), "encoding", disable=quiet):
        rows = batch["row"].tolist()
        with torch.no_grad():
            mean = vae.encode(batch["image"].to(device, non_blocking=True)).mean
        arrays["latents"][rows] = (mean * LATENT_SCALE).cpu().numpy()
        arrays["contours"][rows] = batch["contour"].numpy()
        for row, image in zip(rows, batch["image"].numpy(), strict=True):
            if row in position:
                arrays["heldout_images"][position[row]] = image
    for array in arrays.values():
        array.flush()
    distributed.barrier()

    # The main process describes them and makes the folder appear.
    if distributed.is_main():
        if not np.isfinite(arrays["latents"]).all():
            raise ValueError(
                f"{folder}: not written, since the VAE gives latents that are not finite"
            )
        with open(partial / "manifest.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "image", "patient_id", "label", "split"])
            for i, row in enumerate(dataset.rows):
                writer.writerow([i, row.image, row.patient_id, row.label, row.split])
        labels = {row.label for row in dataset.rows if row.split == "train"}
        meta = {
            "latent_shape": [count, *latent],
            "contour_shape": list(shapes["contours"][0]),
            "window": list(dataset.window),
            "latent_scale": LATENT_SCALE,
            "classes": sorted(labels - {""}),
            "latents_sha256": file_hash(partial / "latents.npy"),
            "contours_sha256": file_hash(partial / "contours.npy"),
            **facts,
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
        sync_folder(folder.parent)
    distributed.barrier()


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
    )
    facts = {
        "vae_sha256": file_hash(vae_file),
        "label_csv_sha256": file_hash(csv_file),
        "files_sha256": dataset.fingerprint(),
        "split": vae_content["split"],
    }
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
    dataset.check()  # also a barrier: no rank sees the folder that another is about to write
    write_latents(folder, dataset, vae, facts, device, batch_size, workers)
    return notes
