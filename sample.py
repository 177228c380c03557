"""Sample new slices whose lungs follow given contours, and write them as images or in HU."""

import argparse
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fibldm import ct, distributed, export
from fibldm.batches import item_noise
from fibldm.checkpoint import environment, load, load_model, require_equal
from fibldm.cli import (
    add_machine_options,
    fraction,
    make_parser,
    positive,
    positive_float,
    run_script,
)
from fibldm.controlnet import ControlNet, steer
from fibldm.datasets import chunks
from fibldm.disk import file_hash, replace_text
from fibldm.encoding import LatentDataset
from fibldm.optim import Precision
from fibldm.panels import write_samples
from fibldm.privacy import Privacy
from fibldm.run import read_settings
from fibldm.samplers import SAMPLERS, guide
from fibldm.scheduler import SPACINGS, CosineScheduler
from fibldm.tables import SPLITS
from fibldm.unet import NO_LABEL, UNet
from fibldm.vae import LATENT_SCALE, VAE
from fibldm.validation import dice, read_privacy

GRID = 32  # samples in grid.png
ATTEMPTS = 10  # draws of a sample with --drop_copies, the first included
FREE_OPTIONS = ("output_dir", "overwrite", "batch_size", "timeout")  # the samples are the same
NEXT_SEED = 1_000_003  # from one attempt to the next: far from the seeds that people give
IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".npy", ".nii", ".nii.gz", ".dcm")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        "  python sample.py --vae_checkpoint ./vae_run_1/vae_best.pth \\\n"
        "      --unet_checkpoint ./model_runs/ldm_unet_run_1/unet_best.pth \\\n"
        "      --controlnet_checkpoint ./model_runs/controlnet_run_1/controlnet_best.pth \\\n"
        "      --latent_data_dir ./data/latents_dataset --split val --num_samples 16",
    )
    models = parser.add_argument_group("models")
    models.add_argument("--vae_checkpoint", required=True, help="vae_best.pth")
    models.add_argument("--unet_checkpoint", required=True, help="unet_best.pth")
    models.add_argument("--controlnet_checkpoint", help="controlnet_best.pth; without: U-Net alone")
    source = parser.add_argument_group("what to sample (one of the first three)")
    given = source.add_mutually_exclusive_group(required=True)
    given.add_argument("--contours", help="a contour image, or a folder of them")
    given.add_argument("--latent_data_dir", help="take contours and labels from a latent data set")
    given.add_argument("--unconditional", action="store_true", help="no contour")
    source.add_argument("--split", choices=SPLITS, default="val", help="of --latent_data_dir")
    source.add_argument(
        "--label", nargs="+", metavar="NAME",
        help="class name for all samples (default: the data set's, or none); or weights of several "
        "that sum to 1, for what lies between: normal=0.4 fibrosis=0.6",
    )  # fmt: skip
    source.add_argument(
        "--num_samples", type=positive,
        help="contours are used in turn (default: one sample a contour; 16 if unconditional)",
    )  # fmt: skip
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--sampler", choices=SAMPLERS, default="dpmpp_2m", help="ddpm is random")
    sampling.add_argument("--steps", type=positive, default=20, help="evaluations of the denoiser")
    sampling.add_argument("--spacing", choices=SPACINGS, default="logsnr", help="of the timesteps")
    sampling.add_argument("--guidance_scale", type=float, default=2.0, help="1: no guidance")
    sampling.add_argument(
        "--guidance_interval", type=fraction, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
        help="noise levels t / T at which guidance acts",
    )  # fmt: skip
    sampling.add_argument(
        "--guidance_rescale", type=fraction, default=0.0, help="towards the unguided contrast"
    )
    sampling.add_argument("--batch_size", type=positive, default=16, help="samples at once")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="samples", help="gets the files and grid.png")
    output.add_argument(
        "--format", choices=export.FORMATS, default="png",
        help="all hold HU; 16-bit png by the scale in dataset.json",
    )  # fmt: skip
    output.add_argument(
        "--pixel_spacing", type=positive_float,
        help="mm, in NIfTI and DICOM (default: the training data's where known, else 1)",
    )  # fmt: skip
    output.add_argument("--overwrite", action="store_true", help="replace samples that are there")
    output.add_argument(
        "--drop_copies", metavar="LATENT_DATA_DIR",
        help="draw a sample again, with another seed, where it is nearer to a training slice of "
        "this latent data set than held-out slices are; not written where it still is after "
        f"{ATTEMPTS} attempts",
    )  # fmt: skip
    add_machine_options(parser, workers=False)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Request:
    """Contours (M, K, H, W), or None; and for each of them a name and a class label ("": none)."""

    contours: np.ndarray | None
    names: list[str]
    labels: list[str]


def read_requests(args: argparse.Namespace, unet: UNet, content: dict, size: int) -> Request:
    """What the options ask for; ValueError where the models cannot give it.

    Contours of another style than the U-Net's, which `content` of its file tells, are converted.
    """
    channels, classes = unet.config["contour_channels"], content["classes"]
    style = content.get("contour_style")
    if args.unconditional:
        request = Request(None, [""], [""])
    elif args.contours is not None:
        files = contour_files(Path(args.contours))
        contours = fit_contours((ct.read_contour(f, channels) for f in files), size, style)
        request = Request(contours, [str(f) for f in files], [""] * len(files))
    else:
        data = LatentDataset(args.latent_data_dir)
        rows = data.indices(args.split, views=False)
        if not rows:
            raise ValueError(f"{args.latent_data_dir}: its {args.split} split is empty")
        what = f"{args.latent_data_dir}: contour channels and size"
        found = (data.contour_channels, data.image_size)
        require_equal(what, found, (channels, size), "another data set than the models'")
        names = [f"contour of {data.rows[row].image}" for row in rows]
        labels = [data.rows[row].label for row in rows]
        labels = [name if name in classes else "" for name in labels]
        request = Request(fit_contours(data.contours[rows], size, style), names, labels)
    if args.label is not None:
        read_label(args.label, classes)
        labels = [" ".join(args.label)] * len(request.names)
        request = Request(request.contours, request.names, labels)
    return request


def read_label(words: Sequence[str], classes: list[str]) -> int | list[float]:
    """The class that --label names, or for NAME=WEIGHT ... a weight of each class; ValueError."""
    if len(words) == 1 and words[0] in classes:
        return classes.index(words[0])
    pairs = [word.rpartition("=") for word in words]
    weights, names = [0.0] * len(classes), [name for name, _, _ in pairs]
    unknown = [word for word, (name, _, _) in zip(words, pairs, strict=True) if name not in classes]
    if unknown:
        raise ValueError(
            f"--label {' '.join(unknown)}: the U-Net knows the classes {classes or '(none)'}; "
            "expected one of them, or NAME=WEIGHT of several"
        )
    for name, _, weight in pairs:
        try:
            weights[classes.index(name)] += float(weight)
        except ValueError as error:
            raise ValueError(f"--label {name}={weight}: the weight is no number") from error
    if not (min(weights) >= 0 and abs(sum(weights) - 1) < 1e-6) or len({*names}) < len(names):
        raise ValueError(
            f"--label {' '.join(words)}: weights that sum to {sum(weights):g}; expected each class "
            "once, at least 0, and 1 in all"
        )
    return weights


def fit_contours(contours: Iterable[np.ndarray], size: int, style: str | None) -> np.ndarray:
    """Contours (K, H, W) -> (M, K, size, size), in the style that the U-Net knows."""
    fitted, converted = [], 0
    for contour in contours:
        converted += style is not None and ct.contour_style(contour) not in (None, style)
        fitted.append(ct.fit_contour(contour, size, style))
    if converted and distributed.is_main():
        done = "masks, their outlines" if style == "outline" else "outlines, filled masks"
        print(
            f"{converted} of {len(fitted)} contours are {done} are taken: the U-Net was trained on "
            f"{style} contours"
        )
    return np.stack(fitted)


def contour_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"--contours {path}: no such file or folder")
    files = sorted(p for p in path.iterdir() if p.name.lower().endswith(IMAGE_SUFFIXES))
    if not files:
        raise ValueError(f"--contours {path}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    return files


def identity(args: argparse.Namespace, request: Request) -> str:
    """A hash of what the samples follow from, but not of file names: sample i is of this run."""
    files = (args.vae_checkpoint, args.unet_checkpoint, args.controlnet_checkpoint)
    options = ("sampler", "steps", "spacing", "guidance_scale", "guidance_interval")
    facts = [file_hash(file) for file in files if file is not None]
    facts += [getattr(args, name) for name in (*options, "guidance_rescale", "seed")]
    if args.drop_copies is not None:
        facts.append(LatentDataset(args.drop_copies).meta["latents_sha256"])
    contours = b"" if request.contours is None else request.contours.tobytes()
    return hashlib.sha256(repr([facts, request.labels]).encode() + contours).hexdigest()


def read_training(args: argparse.Namespace) -> Privacy | None:
    """The latents of --drop_copies, with thresholds that its held-out latents set."""
    if args.drop_copies is None:
        return None
    data = LatentDataset(args.drop_copies)
    data.lineage(args.vae_checkpoint)
    privacy = read_privacy(data)
    if privacy is None:
        raise ValueError(
            f"--drop_copies {args.drop_copies}: fewer than 2 held-out slices, expected more: they "
            "tell how near is too near"
        )
    if privacy.caution() and distributed.is_main():
        print(f"WARNING: --drop_copies {args.drop_copies}: {privacy.caution()}")
    return privacy


def seed_of(seed: int, attempt: int) -> int:
    """The seed of an attempt at a sample; given as --seed, it draws this sample first."""
    return seed + attempt * NEXT_SEED


def draw_no_copies(
    items: Sequence[int],
    seed: int,
    draw: Callable[[Sequence[int], int], np.ndarray],
    find_copied: Callable[[np.ndarray], list[str | None]],
) -> tuple[dict[int, tuple[np.ndarray, int]], list[tuple[int, str]]]:
    """Draw samples until they are no copies: {number: (image (H, W), attempt)}, and the copies.

    draw(items, seed) gives images (N, H, W), find_copied(images) for each the training patient whom
    it copies, or None. A copy is (number, patient), once for each attempt that was one; what still
    is after ATTEMPTS is in no dictionary.
    """
    kept, copies, left = {}, [], list(items)
    for attempt in range(ATTEMPTS):
        images = draw(left, seed_of(seed, attempt))
        for i, image, patient in zip(left, images, find_copied(images), strict=True):
            if patient is None:
                kept[i] = image, attempt
            else:
                copies.append((i, patient))
        left = [i for i in left if i not in kept]
        if not left:
            break
    return kept, copies


def load_models(args: argparse.Namespace) -> tuple[VAE, UNet, ControlNet | None, dict, dict]:
    """The models and the contents of the VAE's and U-Net's files; refuses what does not match."""
    vae, vae_content = load_model(args.vae_checkpoint, VAE)
    unet, unet_content = load_model(args.unet_checkpoint, UNet)
    require_equal(
        f"{args.unet_checkpoint}: the SHA-256 of the VAE it was trained with",
        unet_content["lineage"]["vae"],
        file_hash(args.vae_checkpoint),
        f"give that VAE, not {args.vae_checkpoint}",
    )
    controlnet = None
    if args.controlnet_checkpoint is not None:
        require_equal(
            f"{args.controlnet_checkpoint}: the SHA-256 of the U-Net it was trained with",
            load(args.controlnet_checkpoint, ControlNet.kind)["lineage"]["unet"],
            file_hash(args.unet_checkpoint),
            f"give that U-Net, not {args.unet_checkpoint}",
        )
        controlnet, _ = load_model(args.controlnet_checkpoint, ControlNet, unet)
    return vae, unet, controlnet, vae_content, unet_content


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    # Setup.
    device = distributed.setup(args.device, args.timeout)
    precision = Precision(args.precision, device)
    output = Path(args.output_dir)
    if args.unconditional and args.controlnet_checkpoint is not None:
        raise ValueError("--unconditional: a ControlNet needs contours; leave it out")

    # Models and contours.
    vae, unet, controlnet, vae_content, unet_content = load_models(args)
    for model in filter(None, (vae, unet, controlnet)):
        model.to(device)
    classes, window = unet_content["classes"], tuple(vae_content["window"])
    size = vae.config["image_size"]
    request = read_requests(args, unet, unet_content, size)
    privacy = read_training(args)
    run = identity(args, request)
    settings = {name: v for name, v in vars(args).items() if name not in FREE_OPTIONS}
    settings |= {"samples_of": run, "environment": environment()}
    settings = json.loads(json.dumps(settings))
    begun = require_place(output, settings, args.overwrite)
    distributed.barrier()  # no rank writes before all have looked
    if begun and (output / "samples.csv").exists():
        if distributed.is_main():
            print(f"{output} holds these samples already; nothing to draw")
        return
    known_spacing = args.pixel_spacing or unet_content.get("pixel_spacing")
    spacing = known_spacing or 1.0
    count = args.num_samples or (16 if args.unconditional else len(request.names))
    scheduler = CosineScheduler(device=device)
    timesteps = scheduler.timesteps(args.steps, args.spacing)
    shape = [unet.config[name] for name in ("latent_dim", "latent_size", "latent_size")]

    sources = [i % len(request.names) for i in range(count)]  # the contour of each sample
    plain = args.unconditional and args.label is None  # then there is nothing to guide towards

    def draw(items: Sequence[int], seed: int) -> np.ndarray:
        """Samples (N, H, W) in [-1, 1]; sample i depends on the seed and i alone."""
        if args.label is not None:
            numbers = [read_label(args.label, classes)] * len(items)
        else:
            labels = [request.labels[sources[i]] for i in items]
            numbers = [classes.index(name) if name else NO_LABEL for name in labels]
        label, contour = torch.tensor(numbers, device=device), None
        if request.contours is not None:
            contour = torch.from_numpy(request.contours[[sources[i] for i in items]]).to(device)
        with precision.autocast():
            denoiser = guide(
                steer(unet, controlnet, contour, label), steer(unet), scheduler,
                1.0 if plain else args.guidance_scale, args.guidance_interval,
                args.guidance_rescale,
            )  # fmt: skip
            z = SAMPLERS[args.sampler](
                denoiser, scheduler, item_noise(seed, "sample", 0, items, shape).to(device),
                timesteps,
                lambda k: item_noise(seed, "ddpm", k, items, shape).to(device),
            )  # fmt: skip
        noise = item_noise(seed, "grain", 0, items, (1, size, size)).to(device)
        return vae.decode(z.float() / LATENT_SCALE, noise).clamp(-1, 1)[:, 0].cpu().numpy()

    def find_copied(images: np.ndarray) -> list[str | None]:
        """The training patient whom each sample (N, H, W) copies, or None.

        The image is encoded again, as the training slices were: it is what will be given away.
        """
        if privacy is None:
            return [None] * len(images)
        latents = vae.encode(torch.from_numpy(images)[:, None].to(device)).mean * LATENT_SCALE
        matches = privacy.nearest(None, latents.cpu().numpy())
        return [str(privacy.patients[m.row]) if m.flagged else None for m in matches]

    # Sample: each rank its part, but what is there since an earlier start.
    info = export.png_info(window, known_spacing)
    if distributed.is_main():
        output.mkdir(parents=True, exist_ok=True)
        if not begun:
            remove_samples(output)
        replace_text(output / "args.json", json.dumps(settings, indent=2) + "\n")
        if args.format == "png":
            ct.write_dataset_info(output, info)
    distributed.barrier()
    files = [f"sample_{i:05d}{export.SUFFIXES[args.format]}" for i in range(count)]
    mine, copies = distributed.share(count), []
    attempts: dict[int, int] = {}
    if begun and privacy is None:
        attempts = {i: 0 for i in mine if (output / files[i]).is_file()}
        if attempts and distributed.is_main():
            print(f"{output}: begun before; going on")
    quiet = None if distributed.is_main() else True
    with tqdm(total=len(mine), initial=len(attempts), desc="sampling", disable=quiet) as bar:
        for items in chunks(mine, args.batch_size):
            missing = {i for i in items if i not in attempts}
            if not missing:
                continue
            distributed.alive()
            # The whole batch, of which some may be there: in another the last bits would differ.
            kept, copied = draw_no_copies(items, args.seed, draw, find_copied)
            copies += copied
            for i, (image, attempt) in sorted(kept.items()):
                if i not in missing:
                    continue
                # No file name of a contour: it may be a patient's, and samples are given away.
                label, seed = request.labels[sources[i]] or "none", seed_of(args.seed, attempt)
                comment = f"Sample {i} of seed {seed}, class {label}, run {run[:12]}."
                path = output / files[i]
                export.write_slice(path, image, window, args.format, spacing, run, i, comment)
                attempts[i] = attempt
            bar.update(len(missing))

    # How they look, and how well the lungs follow the contours, from the files.
    shown, agreement = [], []
    for i in sorted(attempts):
        image = ct.hu_to_unit(ct.read_hu(output / files[i], info.rescale, window), window)
        if len(shown) < GRID:
            shown.append((i, image))
        if request.contours is not None:
            agreement += dice(image[None], request.contours[[sources[i]]], window).tolist()
    shown = [pair for part in distributed.gather(shown) for pair in part][:GRID]
    agreement = [value for part in distributed.gather(agreement) for value in part]
    copies = [pair for part in distributed.gather(copies) for pair in part]
    attempts = {i: number for part in distributed.gather(attempts) for i, number in part.items()}
    if not distributed.is_main():
        return
    if not attempts:
        raise ValueError(
            f"--drop_copies {args.drop_copies}: none of {count} samples is written: in {ATTEMPTS} "
            "attempts each was a copy of a training slice; the model has memorized them: train on "
            "more patients, for fewer steps, or a smaller model"
        )

    # The grid, and the table, which tells that all is there.
    checkpoints = [args.vae_checkpoint, args.unet_checkpoint, args.controlnet_checkpoint or ""]
    header = ["file", "contour", "label", "seed", "attempt", "vae", "unet", "controlnet"]
    rows = []
    for i, attempt in sorted(attempts.items()):
        name, label = request.names[sources[i]], request.labels[sources[i]]
        seed = seed_of(args.seed, attempt)
        rows.append([files[i], name, label, seed, attempt, *checkpoints])
    at = [sources[i] for i, _ in shown]
    contours = None if request.contours is None else request.contours[at]
    write_samples(output / "grid.png", np.stack([image for _, image in shown]), contours)
    write_table(output / "samples.csv", [header, *rows])
    print(f"{output}: {len(rows)} samples ({args.format}), samples.csv, grid.png")
    if privacy is not None:
        report_copies(copies, [files[i] for i in range(count) if i not in attempts])
    if known_spacing is None and args.format in ("nifti", "dicom"):
        print("pixels are written as 1 mm, an assumption: the data's are unknown (--pixel_spacing)")
    if agreement:
        mean = np.mean(agreement)
        print(f"mean Dice of contours and lungs segmented from {len(rows)} samples: {mean:.3f}")


def report_copies(copies: list[tuple[int, str]], left_out: list[str]) -> None:
    """Print how many samples were drawn again, of how many patients, and which are not written.

    copies: number of the sample and training patient, one for each draw that was a copy.
    """
    again, patients = len({i for i, _ in copies}), len({patient for _, patient in copies})
    print(
        f"--drop_copies: {again} samples drawn again ({len(copies)} draws were copies, of "
        f"{patients} training patients)"
    )
    if left_out:
        names = ", ".join(left_out[:10]) + (", ..." if len(left_out) > 10 else "")
        print(
            f"WARNING: {len(left_out)} samples are not written, still copies after {ATTEMPTS} "
            f"attempts: {names}"
        )


def require_place(output: Path, settings: dict, overwrite: bool) -> bool:
    """Whether these very samples were begun in the folder; ValueError where others are there."""
    file, table = output / "args.json", output / "samples.csv"
    before = read_settings(file) if file.is_file() else {}
    if before and "samples_of" not in before:
        raise ValueError(f"{output} holds a run of another script; use another --output_dir")
    if not before and not table.exists() and (output / "dataset.json").exists():
        raise ValueError(f"{output} holds a dataset.json of other images; use another --output_dir")
    asked, found = (s | {"environment": None} for s in (settings, before))
    if overwrite or not (before or table.exists()):
        return False
    if asked != found:
        raise ValueError(
            f"{output} holds other samples already; use --overwrite or another --output_dir"
        )
    environments = [s["environment"] | {"command": None} for s in (settings, before)]
    return table.exists() or environments[0] == environments[1]


def remove_samples(output: Path) -> None:
    """Remove what an earlier run wrote, so that no runs are mixed."""
    if not any((output / name).exists() for name in ("args.json", "samples.csv")):
        return
    (output / "samples.csv").unlink(missing_ok=True)
    for suffix in export.SUFFIXES.values():
        for path in output.glob(f"sample_{'[0-9]' * 5}*{suffix}"):
            path.unlink()
    for name in "dataset.json", "args.json":
        (output / name).unlink(missing_ok=True)


def write_table(path: Path, rows: list[list]) -> None:
    """Write a CSV file whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    replace_text(path, text.getvalue())


if __name__ == "__main__":
    run_script(main, parse_args)
