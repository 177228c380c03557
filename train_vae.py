"""Train the VAE on the slices of label.csv, into vae_best.pth, with its latents made standard."""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from fibldm import cli, distributed
from fibldm.batches import Plan
from fibldm.checkpoint import read_start
from fibldm.ct import DEFAULT_WINDOW
from fibldm.datasets import CHECKED, CTDataset, training_slices
from fibldm.disk import file_hash
from fibldm.optim import EMA, Muon, clear_gradients, clip_gradients, optimizer_step
from fibldm.reconstruction import VAEValidation, input_warnings
from fibldm.run import Run
from fibldm.tables import Split, read_table
from fibldm.texture import random_angles
from fibldm.vae import TEXTURE_WEIGHT, VAE


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(
        __doc__,
        "  python train_vae.py --csv_file ./data/label.csv --img_dir ./data/ "
        "--save_dir ./vae_run_1\n  torchrun --nproc_per_node 4 train_vae.py --batch_size 64",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--csv_file", default="./data/label.csv",
        help="table of image, contour and, where known, patient_id, label, split",
    )  # fmt: skip
    data.add_argument("--img_dir", default="./data/", help="folder its paths are relative to")
    cli.add_run_option(data, "./vae_run_1")
    cli.add_window_option(
        data, DEFAULT_WINDOW, "HU that become -1 and 1; values beyond are clipped"
    )
    data.add_argument(
        "--val_fraction", type=cli.fraction, default=0.1, help="share of patients for validation"
    )
    data.add_argument(
        "--test_fraction", type=cli.fraction, default=0.1,
        help="share of patients for the final test",
    )  # fmt: skip
    data.add_argument(
        "--max_shift", type=cli.not_negative,
        help="how far slices are moved at random in training, at most, in each direction: a share "
        "of the side; 0: not at all (default: what one latent covers, 1 / --latent_size)",
    )  # fmt: skip
    parser.rare.add_argument(
        "--split_seed", type=cli.integer, default=0, help="of the split by patient"
    )
    parser.rare.add_argument(
        "--max_bad_images", type=cli.count, default=0,
        help="slices that may be unreadable; others take their places",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument(
        "--image_size", type=cli.positive, default=256,
        help="height and width in pixels to which slices are resized",
    )  # fmt: skip
    model.add_argument(
        "--latent_size", type=cli.positive, default=16,
        help="height and width of the latent; must divide --image_size",
    )  # fmt: skip
    model.add_argument("--latent_dim", type=cli.positive, default=8, help="channels of the latent")
    model.add_argument(
        "--base_channels", type=cli.positive, default=64, help="channels at the first level"
    )
    model.add_argument("--blocks", type=cli.positive, default=2, help="residual blocks a level")
    model.add_argument(
        "--init_checkpoint", metavar="FILE",
        help="start from the weights of this vae_best.pth, of the same sizes; it must not have "
        "been trained on patients that are held out here",
    )  # fmt: skip
    parser.rare.add_argument(
        "--kl_weight", type=cli.not_negative, default=1e-6,
        help="weight of the KL divergence, which is summed over a slice's latent",
    )  # fmt: skip
    cli.add_training_options(
        parser, steps=20_000, batch_size=16, lr=2e-3, warmup_steps=200, ema_decay=0.999,
        save_interval=500, val_interval=1000,
    )  # fmt: skip
    cli.add_machine_options(parser)
    args = parser.parse_args(argv)
    if args.image_size % args.latent_size:
        parser.error(
            f"--image_size {args.image_size} is not a multiple of --latent_size {args.latent_size}"
        )
    if args.val_fraction + args.test_fraction >= 1:
        parser.error(
            f"--val_fraction {args.val_fraction:g} and --test_fraction {args.test_fraction:g}: "
            "expected less than 1 in all, which leaves patients to train on"
        )
    if args.max_shift is None:
        args.max_shift = 1 / args.latent_size
    if args.max_shift >= 1:
        parser.error(
            f"--max_shift {args.max_shift:g}: expected a share of the side, from 0 to below 1, not "
            f"pixels; {args.max_shift:g} pixels of --image_size {args.image_size} are "
            f"{args.max_shift / args.image_size:.6g}"
        )
    return args


def main(args: argparse.Namespace) -> None:
    # Setup.
    device = distributed.setup(args.device, args.timeout)
    run = Run(args.save_dir, Plan.of(vars(args)), device, vars(args))
    precision = run.precision
    split = Split(args.split_seed, args.val_fraction, args.test_fraction)
    rows, notes = read_table(args.csv_file, args.img_dir, split)
    folder, window = Path(args.csv_file).parent, tuple(args.window)
    data = CTDataset(
        rows, args.img_dir, folder, args.image_size, window, max_bad=args.max_bad_images,
        images_alone=True, by_label=args.balance_labels is not None,
    )  # fmt: skip
    distributed.say(*notes, *data.notes())
    _, bad_rows = data.check(run.folder.path / CHECKED)
    distributed.warn(*input_warnings(data))

    # Model.
    torch.manual_seed(args.seed)
    vae = VAE(args.image_size, args.latent_size, args.latent_dim, args.base_channels, args.blocks)
    lineage = {"label_csv": file_hash(args.csv_file), "files": data.fingerprint()}
    if args.init_checkpoint:
        start, _, warnings = read_start(
            args.init_checkpoint, vae, lineage, asdict(split), args.window
        )
        distributed.warn(*warnings)
        lineage["init_checkpoint"] = file_hash(args.init_checkpoint)
        vae.load_state_dict(start.state_dict())
        vae.uncalibrate()
    vae.to(device)
    ema, optimizer, scaler = EMA(vae, args.ema_decay), Muon(vae, args.lr), precision.scaler()
    components = {"vae": vae, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    # Files that cannot be read have not the sizes that they had.
    run.resume("train_vae", components, lineage, unchecked=["files"] if bad_rows else [])
    model = distributed.wrap(vae, device, args.compile)

    # Data.
    batches = run.batches_of(data.indices("train"), bad_rows, data.label_names("train"))
    most_pixels = round(args.max_shift * args.image_size)
    latent_shape = (args.latent_dim, args.latent_size, args.latent_size)
    validation = VAEValidation(data, run)
    distributed.introduce(data.summary(), vae, device, precision.name)

    def validate(step: int) -> None:
        if (best := validation.measure(ema.model, step)) is not None:
            run.save_best("vae_best.pth", best, window=args.window, split=asdict(split), step=step)

    # Train.
    # Between the steps, run.steps logs, saves, validates and stops; first comes a preflight.
    load = partial(
        training_slices, data, batches, args.num_workers, most_pixels, latent_shape, device
    )
    for step, micro_batches in run.steps(load, validate):
        for micro, (x, noise, texture_noise, uniform, unreadable) in micro_batches:
            run.note_unreadable(unreadable)

            # Loss.
            with distributed.sync_gradients(model, micro.last):
                with precision.autocast():
                    angles = random_angles(uniform)
                    mean, posterior, texture = model(x, noise, texture_noise, angles)
                    rec, kl, texture = (mean - x).abs().mean(), posterior.kl(), texture.mean()
                    loss = rec + args.kl_weight * kl + TEXTURE_WEIGHT * texture
                run.average(loss=loss, reconstruction=rec, kl=kl, texture=texture)
                scaler.scale(loss / args.grad_accum).backward()

        # Step.
        if run.may_step(clip_gradients(optimizer, scaler, args.grad_clip)):
            optimizer_step(optimizer, scaler, run.plan.learning_rate(step))
            ema.update(vae)
        clear_gradients(optimizer, scaler)


if __name__ == "__main__":
    cli.run_script(main, parse_args)
