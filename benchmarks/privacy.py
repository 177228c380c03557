"""How well fibldm.privacy tells copies of training slices from slices of other patients.

    python benchmarks/privacy.py ../shared/ct/lungs --vae_checkpoint V --name lungs
    python benchmarks/privacy.py PHANTOMS --vae_checkpoint V --name phantoms
    python benchmarks/privacy.py --speed

Of the data set's patients a quarter is held out, in several splits. Prints a Markdown table: the
share of changed training slices that are found, in either space and in each alone, and the share of
held-out slices flagged by thresholds that other patients set; mean over splits, and the worst. With
--speed instead: time and memory of 2,000 samples against 20,000 training slices, all of them noise.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fibldm import ct  # noqa: E402
from fibldm.checkpoint import load_model  # noqa: E402
from fibldm.datasets import CTDataset  # noqa: E402
from fibldm.privacy import LATENTS, PIXELS, Privacy, altered_copies  # noqa: E402
from fibldm.tables import Split, parse_table  # noqa: E402
from fibldm.vae import LATENT_SCALE, VAE  # noqa: E402

BATCH = 16
EITHER, HELDOUT = "either space", "held-out slices flagged"


def in_batches(function, array):
    parts = [function(array[i : i + BATCH]) for i in range(0, len(array), BATCH)]
    return np.concatenate(parts)


def measure(folder: Path, vae_file: Path, splits: int, count: int, name: str) -> None:
    vae, content = load_model(vae_file, VAE)

    @torch.no_grad()
    def encode(images):
        slices = torch.from_numpy(np.asarray(images, np.float32))[:, None]
        return in_batches(lambda x: (vae.encode(x).mean * LATENT_SCALE).numpy(), slices)

    @torch.no_grad()
    def decode(latents):
        z = torch.from_numpy(latents) / LATENT_SCALE
        return in_batches(lambda x: vae.decode(x).clamp(-1, 1)[:, 0].numpy(), z)

    rows, _, _ = parse_table(folder / "label.csv", folder, Split())
    size, window = vae.config["image_size"], tuple(content["window"])
    data = CTDataset(rows, folder, folder, size, window, 1)
    images = np.stack([data[i]["image"][0].numpy() for i in range(len(rows))])
    patients, latents = np.array([row.patient_id for row in rows]), encode(images)
    ids, found = np.unique(patients), {}
    for split in range(splits):
        generator = np.random.default_rng(split)
        held = np.isin(patients, generator.permutation(ids)[: len(ids) // 4])
        train = np.flatnonzero(~held)
        privacy = Privacy(images[train], patients[train], latents[train])
        limits = privacy.calibrate(images[held], latents[held], patients[held])
        print(f"split {split}: {limits}, {privacy.negative_control().value:.3f}", file=sys.stderr)
        found.setdefault((HELDOUT, EITHER), []).append(privacy.negative_control().value)
        for space in limits:
            for what, measure_of in ("median", np.median), ("minimum", np.min):
                key = f"held-out distance, {what}", space
                found.setdefault(key, []).append(float(measure_of(privacy.heldout[space])))
            found.setdefault(("threshold", space), []).append(limits[space])

        picked = generator.permutation(len(train))[:count]
        changed = altered_copies(images[train[picked]], split)
        changed["VAE round trip"] = decode(latents[train[picked]])
        mixed = altered_copies(changed["VAE round trip"], split)["3-pixel shift"]
        changed["all four at once"] = altered_copies(altered_copies(mixed, split)["noise"], split)[
            "intensity"
        ]
        for way, copies in changed.items():
            matches = privacy.nearest(copies, encode(copies))
            mine = patients[train[picked]]
            near = {
                space: np.array(
                    [
                        m.distances[space] < limit and patients[train[m.rows[space]]] == patient
                        for m, patient in zip(matches, mine, strict=True)
                    ]
                )
                for space, limit in limits.items()
            }
            near[EITHER] = near[PIXELS] | near[LATENTS]
            for space, flags in near.items():
                found.setdefault((way, space), []).append(float(flags.mean()))

    spaces = EITHER, PIXELS, LATENTS
    held_slices, slices = int(held.sum()), len(train)
    print(f"{name}: {splits} splits, {slices} training and {held_slices} held-out slices\n")
    print(f"| | {' | '.join(spaces)} |\n|---|{'---|' * len(spaces)}")
    for what in dict.fromkeys(key[0] for key in found):
        cells = []
        for space in spaces:
            values = found.get((what, space))
            if values is None:
                cells.append("")
            elif what == HELDOUT:
                cells.append(f"{np.mean(values):.3f} (at most {max(values):.3f})")
            else:
                cells.append(f"{np.mean(values):.3f} (at least {min(values):.3f})")
        print(f"| {what} | {' | '.join(cells)} |")


def speed(train_count: int, sample_count: int) -> None:
    """Noise, smooth as slices are; from memory maps, as a big data set is read."""
    with tempfile.TemporaryDirectory() as folder:
        generator, arrays = np.random.default_rng(0), {}
        for name, count in ("train", train_count), ("samples", sample_count), ("held", 200):
            for space, shape in (PIXELS, (256, 256)), (LATENTS, (8, 16, 16)):
                file = Path(folder, f"{name}_{space}.npy")
                array = np.lib.format.open_memmap(file, "w+", np.float32, (count, *shape))
                for i in range(count):
                    values = generator.standard_normal((16, 16) if space == PIXELS else shape)
                    array[i] = ct.fit_square(values, 256, 0) if space == PIXELS else values
                del array
                arrays[name, space] = np.load(file, mmap_mode="r")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        patients = [f"p{i // 20}" for i in range(train_count)]
        privacy = Privacy(arrays["train", PIXELS], patients, arrays["train", LATENTS])
        built = time.monotonic()
        held = [f"h{i // 20}" for i in range(200)]
        privacy.calibrate(arrays["held", PIXELS], arrays["held", LATENTS], held)
        calibrated = time.monotonic()
        privacy.nearest(arrays["samples", PIXELS], arrays["samples", LATENTS])
        done = time.monotonic()
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(
        f"{sample_count} samples against {train_count} training slices, {torch.get_num_threads()}"
    )
    print(
        f"threads: reading {built - start:.0f} s, 200 held-out slices {calibrated - built:.0f} s,"
    )
    print(
        f"samples {done - calibrated:.0f} s; resident memory grew by {peak:.2f} GiB, mapped pages"
    )
    print("of the files included")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="a data set with label.csv")
    parser.add_argument("--vae_checkpoint", type=Path, help="vae_best.pth of its image size")
    parser.add_argument("--name", default="slices", help="of the data set, in the table")
    parser.add_argument("--splits", type=int, default=5, help="of patients")
    parser.add_argument("--count", type=int, default=100, help="training slices changed, a split")
    parser.add_argument("--speed", action="store_true", help="time and memory instead")
    args = parser.parse_args()
    if args.speed:
        speed(20_000, 2_000)
    elif args.folder is None or args.vae_checkpoint is None:
        parser.error("give a data set and --vae_checkpoint, or --speed")
    else:
        measure(args.folder, args.vae_checkpoint, args.splits, args.count, args.name)


if __name__ == "__main__":
    main()
