"""Sample new slices whose lungs follow given contours, and write them as images or in HU."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from fibldm import cli, comparison, conditions, distributed, export, samples
from fibldm.checkpoint import environment
from fibldm.conditions import Conditions, label_name
from fibldm.encoding import LatentDataset
from fibldm.samplers import SAMPLERS
from fibldm.scheduler import SPACINGS
from fibldm.synthesis import ATTEMPTS, Sampling, Synthesizer
from fibldm.tables import SPLITS

# Options that may differ in a folder of the same samples.
FREE_OPTIONS = {"output_dir", "overwrite", "batch_size", "timeout", "dry_run"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(
        __doc__,
        "  python sample.py --vae_checkpoint ./vae_run_1/vae_best.pth \\\n"
        "      --unet_checkpoint ./model_runs/ldm_unet_run_1/unet_best.pth \\\n"
        "      --controlnet_checkpoint ./model_runs/controlnet_run_1/controlnet_best.pth \\\n"
        "      --latent_data_dir ./data/latents_dataset --split val --num_samples 16",
    )
    # fmt: off
    add = parser.add_argument_group("models").add_argument
    add("--vae_checkpoint", required=True, help="vae_best.pth")
    add("--unet_checkpoint", required=True, help="unet_best.pth")
    add("--controlnet_checkpoint", help="controlnet_best.pth; without: the U-Net alone")
    source = parser.add_argument_group("what to sample (one of the first three)")
    given, add = source.add_mutually_exclusive_group(required=True), source.add_argument
    given.add_argument("--contours", help="a contour image, or a folder of them")
    given.add_argument("--latent_data_dir", help="take contours and labels from a latent data set")
    given.add_argument("--unconditional", action="store_true", help="no contour")
    add("--split", choices=SPLITS, default="val", help="of --latent_data_dir")
    label = source.add_mutually_exclusive_group().add_argument
    label("--label", nargs="+", metavar="NAME",
        help="class name for all samples (default: the data set's, or none); or weights of several "
        "that sum to 1, for what lies between: normal=0.4 fibrosis=0.6")
    label("--compare_labels", nargs="*", metavar="NAME",
        help="draw each contour with each of these labels (without names: all classes), from the "
        "same noise: the same lungs with and without disease; weights go in quotes")
    add("--num_samples", type=cli.positive,
        help="contours are used in turn (default: one sample a contour; 16 if unconditional); "
        "with --compare_labels: samples of each label")
    add, rare = parser.add_argument_group("sampling").add_argument, parser.rare.add_argument
    add("--sampler", choices=SAMPLERS, default=Sampling.sampler, help="ddpm is random")
    add("--steps", type=cli.positive, default=Sampling.steps, help="evaluations of the denoiser")
    add("--guidance_scale", type=cli.finite, default=Sampling.guidance_scale,
        help="1: no guidance; more: more of the label, disease less varied")
    add("--batch_size", type=cli.positive, default=16, help="samples at once, over all processes")
    rare("--spacing", choices=SPACINGS, default=Sampling.spacing, help="of the timesteps")
    rare("--guidance_interval", type=cli.fraction, nargs=2, metavar=("LOW", "HIGH"),
         default=list(Sampling.guidance_interval), help="noise levels t / T at which guidance acts")
    rare("--guidance_rescale", type=cli.fraction, default=Sampling.guidance_rescale,
         help="how far the contrast goes back to that without guidance")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="samples", help="gets the samples, samples.csv and grid.png")
    add("--format", choices=export.FORMATS, default="png",
        help="all hold HU; 16-bit png by the scale in dataset.json")
    add("--pixel_spacing", type=cli.positive_float,
        help="mm, in NIfTI and DICOM (default: the training data's where known, else 1)")
    add("--overwrite", action="store_true", help="replace samples that are there")
    add("--drop_copies", metavar="LATENT_DATA_DIR",
        help="draw a sample again, with another seed, if it is nearer to a training slice of this "
        f"latent data set than held-out slices are; leave it out after {ATTEMPTS} attempts")
    add("--dry_run", action="store_true", help="check models and contours, and draw nothing")
    # fmt: on
    cli.add_machine_options(parser, workers=False)
    return parser.parse_args(argv)


def read_conditions(args: argparse.Namespace, model: Synthesizer) -> tuple[Conditions, list[str]]:
    """What the options ask for, and notes; ValueError where the models cannot give it."""
    if args.unconditional:
        asked, notes = Conditions(None, [""], [""]), []
    elif args.contours is not None:
        asked, notes = conditions.read_contours(Path(args.contours), model.contour_form)
    else:
        data, form = LatentDataset(args.latent_data_dir), model.contour_form
        asked, notes = conditions.conditions_of(data, args.split, form, model.classes)
    if args.label is not None:
        label = conditions.parse_label(args.label, model.classes)
        asked = replace(asked, labels=[label] * len(asked.names))
    if args.compare_labels is not None:
        compared = conditions.parse_compared(args.compare_labels, model.classes)
        asked = replace(asked, compared=compared)
    return asked, notes


def main(args: argparse.Namespace) -> None:
    # Setup.
    device = distributed.setup(args.device, args.timeout)
    if args.unconditional and args.controlnet_checkpoint is not None:
        raise ValueError("--unconditional: leave out --controlnet_checkpoint: it needs contours")

    def say(*lines: str) -> None:
        if distributed.is_main() and lines:
            print(*lines, sep="\n")

    # Models and contours.
    checkpoints = args.vae_checkpoint, args.unet_checkpoint, args.controlnet_checkpoint
    model = Synthesizer.from_checkpoints(*checkpoints, device, args.precision)
    asked, notes = read_conditions(args, model)
    avoid, cautions = samples.read_avoid(args.drop_copies, args.vae_checkpoint)
    say(*notes, *cautions)
    fields = {name: getattr(args, name) for name in Sampling.__dataclass_fields__}
    how = Sampling(**{**fields, "guidance_interval": tuple(args.guidance_interval)})
    names = [label_name(label) for label in asked.compared or asked.labels]
    settings = {name: v for name, v in vars(args).items() if name not in FREE_OPTIONS}
    settings["samples_of"] = model.request_hash(asked.contours, names, args.seed, how, avoid)
    settings = json.loads(json.dumps({**settings, "environment": environment()}))
    output = samples.SampleFolder(Path(args.output_dir), args.format, settings, args.overwrite)
    distributed.barrier()  # no rank writes before all have looked
    noises = args.num_samples or (16 if args.unconditional else len(asked.names))
    if output.whole:
        return say(f"{output.folder} holds these samples already; nothing to draw")

    # Sample: each rank its part, but what is there since an earlier start.
    count, attempts, copies = noises * asked.per_noise, {}, []
    part = distributed.share(noises)
    own = range(part.start * asked.per_noise, part.stop * asked.per_noise)
    if output.begun and avoid is None:
        attempts = {i: 0 for i in own if output.path(i).is_file()}
        say(*[f"{output.folder}: begun before; going on"] * bool(attempts))
    size = -(-args.batch_size // distributed.world_size())
    drawn = samples.draw(model, asked, part, {*attempts}, args.seed, how, size, avoid)
    if args.dry_run:
        return say(f"--dry_run: {count} samples can be drawn into {output.folder}")
    pixel_spacing = args.pixel_spacing or model.pixel_spacing
    if distributed.is_main():
        output.open(model.window, pixel_spacing)
    distributed.barrier()
    quiet = None if distributed.is_main() else True
    with tqdm(total=len(own), initial=len(attempts), desc="sampling", disable=quiet) as bar:
        for i, sample in drawn:
            distributed.alive()
            if sample.copy_of is not None:
                copies.append((i, sample.copy_of))
            elif i not in attempts:
                sample.save(output.path(i), args.pixel_spacing)
                attempts[i] = sample.attempt
                bar.update()

    # How well the lungs follow the contours, and how diseased they are, from the files.
    follow = asked.contours is not None
    looks = output.look(sorted(attempts), asked, model.window) if follow or asked.compared else []
    looks, copies, attempts = (
        [item for part in distributed.gather(list(found)) for item in part]
        for found in (looks, copies, attempts.items())
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
    output.finish(dict(attempts), args.seed, models, asked, model.window)
    say(f"{output.folder}: {len(attempts)} samples ({args.format}), samples.csv, grid.png")
    if avoid is not None:
        left_out = [output.path(i).name for i in range(count) if i not in dict(attempts)]
        say(f"--drop_copies: {samples.describe_copies(copies, left_out, asked)}")
    if pixel_spacing is None and args.format in ("nifti", "dicom"):
        say("pixels are written as 1 mm, an assumption: the data's are unknown (--pixel_spacing)")
    if asked.compared:
        shares = {look.sample: look.high_attenuation for look in looks}
        say(*comparison.describe_high_attenuation(shares, asked))
    if follow:
        say(samples.describe_agreement(looks))


if __name__ == "__main__":
    cli.run_script(main, parse_args)
