"""Sample new slices whose lungs follow given contours, and write them as images or in HU."""

import argparse
import json
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fibldm import distributed, export
from fibldm.checkpoint import environment
from fibldm.cli import (
    add_machine_options,
    fraction,
    make_parser,
    positive,
    positive_float,
    run_script,
)
from fibldm.datasets import chunks
from fibldm.encoding import LatentDataset
from fibldm.privacy import Privacy
from fibldm.samplers import SAMPLERS
from fibldm.samples import (
    Request,
    SampleFolder,
    describe_copies,
    request_from_files,
    request_from_latents,
)
from fibldm.scheduler import SPACINGS
from fibldm.synthesis import (
    ATTEMPTS,
    NEXT_SEED,
    Sampling,
    Synthesizer,
    label_name,
    parse_label,
)
from fibldm.tables import SPLITS
from fibldm.validation import read_privacy

GRID = 32  # samples in grid.png
FREE_OPTIONS = ("output_dir", "overwrite", "batch_size", "timeout")  # the samples are the same


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
    add, how = sampling.add_argument, Sampling
    add("--sampler", choices=SAMPLERS, default=how.sampler, help="ddpm is random")
    add("--steps", type=positive, default=how.steps, help="evaluations of the denoiser")
    add("--spacing", choices=SPACINGS, default=how.spacing, help="of the timesteps")
    add("--guidance_scale", type=float, default=how.guidance_scale, help="1: no guidance")
    add(
        "--guidance_interval", type=fraction, nargs=2, default=list(how.guidance_interval),
        metavar=("LOW", "HIGH"), help="noise levels t / T at which guidance acts",
    )  # fmt: skip
    add(
        "--guidance_rescale", type=fraction, default=how.guidance_rescale,
        help="towards the unguided contrast",
    )  # fmt: skip
    add("--batch_size", type=positive, default=16, help="samples at once")
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


def read_request(args: argparse.Namespace, model: Synthesizer) -> tuple[Request, list[str]]:
    """What the options ask for, and notes; ValueError where the models cannot give it."""
    if args.unconditional:
        request, notes = Request(None, [""], [""]), []
    elif args.contours is not None:
        request, notes = request_from_files(Path(args.contours), model)
    else:
        data = LatentDataset(args.latent_data_dir)
        request, notes = request_from_latents(data, args.split, model)
    if args.label is not None:
        label = parse_label(args.label, model.classes)
        request = replace(request, labels=[label] * len(request.names))
    return request, notes


def read_avoid(args: argparse.Namespace) -> Privacy | None:
    """The training slices of --drop_copies, with thresholds that its held-out slices set."""
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


def main(args: argparse.Namespace) -> None:
    # Setup.
    device = distributed.setup(args.device, args.timeout)
    if args.unconditional and args.controlnet_checkpoint is not None:
        raise ValueError("--unconditional: a ControlNet needs contours; leave it out")

    # Models and contours.
    checkpoints = args.vae_checkpoint, args.unet_checkpoint, args.controlnet_checkpoint
    model = Synthesizer.from_checkpoints(*checkpoints, device, args.precision)
    request, notes = read_request(args, model)
    avoid = read_avoid(args)
    if distributed.is_main():
        print(*notes, sep="\n", end="\n" if notes else "")
    how = Sampling(
        args.sampler, args.steps, args.spacing, args.guidance_scale,
        tuple(args.guidance_interval), args.guidance_rescale,
    )  # fmt: skip
    names = [label_name(label) for label in request.labels]
    settings = {name: v for name, v in vars(args).items() if name not in FREE_OPTIONS}
    settings["samples_of"] = model.request_hash(request.contours, names, args.seed, how, avoid)
    settings = json.loads(json.dumps({**settings, "environment": environment()}))
    output = SampleFolder(Path(args.output_dir), args.format, settings, args.overwrite)
    distributed.barrier()  # no rank writes before all have looked
    if output.whole:
        if distributed.is_main():
            print(f"{output.folder} holds these samples already; nothing to draw")
        return
    pixel_spacing = args.pixel_spacing or model.pixel_spacing
    if distributed.is_main():
        output.open(model.window, pixel_spacing)
    distributed.barrier()

    # Sample: each rank its part, but what is there since an earlier start.
    count = args.num_samples or (16 if args.unconditional else len(request.names))
    own, attempts, copies = distributed.share(count), {}, []
    if output.begun and avoid is None:
        attempts = {i: 0 for i in own if output.path(i).is_file()}
        if attempts and distributed.is_main():
            print(f"{output.folder}: begun before; going on")
    # A batch of which some are there is drawn whole: in another the last bits would differ.
    batches = [batch for batch in chunks(own, args.batch_size) if not attempts.keys() >= {*batch}]
    samples = model.sample(
        request.contours, request.labels, indices=chain(*batches), seed=args.seed,
        batch_size=args.batch_size, avoid=avoid, copies=True, **asdict(how),
    )  # fmt: skip
    quiet = None if distributed.is_main() else True
    with tqdm(total=len(own), initial=len(attempts), desc="sampling", disable=quiet) as bar:
        for sample in samples:
            distributed.alive()
            if sample.copy_of is not None:
                copies.append((sample.index, sample.copy_of))
            elif sample.index not in attempts:
                sample.save(output.path(sample.index), args.pixel_spacing)
                attempts[sample.index] = sample.attempt
                bar.update()

    # How they look, and how well the lungs follow the contours, from the files.
    images, agreement = output.look(sorted(attempts), request, model.window, GRID)
    images, agreement, copies, attempts = (
        [item for part in distributed.gather(list(found)) for item in part]
        for found in (images, agreement, copies, attempts.items())
    )
    if not distributed.is_main():
        return
    if not attempts:
        raise ValueError(
            f"--drop_copies {args.drop_copies}: none of {count} samples is written: in {ATTEMPTS} "
            "attempts each was a copy of a training slice; the model has memorized them: train on "
            "more patients, for fewer steps, or a smaller model"
        )

    # The grid, and the table, which tells that all is there.
    models = dict(zip(("vae", "unet", "controlnet"), [c or "" for c in checkpoints], strict=True))
    rows = [
        {"seed": args.seed + attempt * NEXT_SEED, "attempt": attempt, **models}
        for _, attempt in sorted(attempts)
    ]
    output.finish(sorted(dict(attempts)), rows, request, images[:GRID])
    print(f"{output.folder}: {len(rows)} samples ({args.format}), samples.csv, grid.png")
    if avoid is not None:
        left_out = [output.path(i).name for i in range(count) if i not in dict(attempts)]
        print("--drop_copies:", describe_copies(copies, left_out))
    if pixel_spacing is None and args.format in ("nifti", "dicom"):
        print("pixels are written as 1 mm, an assumption: the data's are unknown (--pixel_spacing)")
    if agreement:
        mean = np.mean(agreement)
        print(f"mean Dice of contours and lungs segmented from {len(rows)} samples: {mean:.3f}")


if __name__ == "__main__":
    run_script(main, parse_args)
