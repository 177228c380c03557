"""Train the U-Net to denoise latents, on a latent data set, into unet_best.pth."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fibldm import distributed
from fibldm.batches import Batches, seed_dropout
from fibldm.checkpoint import load_model
from fibldm.cli import (
    add_machine_options,
    add_training_options,
    add_validation_options,
    fraction,
    make_parser,
    positive,
    run_script,
)
from fibldm.controlnet import make_denoiser
from fibldm.encoding import LatentDataset, training_batches
from fibldm.optim import EMA, Precision, clip_gradients, learning_rate, optimizer_step
from fibldm.run import Run
from fibldm.scheduler import CosineScheduler, Denoiser, diffusion_loss
from fibldm.unet import NO_LABEL, UNet, contour_condition
from fibldm.vae import VAE
from fibldm.validation import Validation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        "  python train_ldm_unet.py --latent_data_dir ./data/latents_dataset \\\n"
        "      --vae_checkpoint ./vae_run_1/vae_best.pth \\\n"
        "      --save_dir ./model_runs/ldm_unet_run_1 --latent_dim 8 --latent_size 16",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--latent_data_dir", default="./data/latents_dataset",
        help="latent data set, from encode_dataset.py",
    )  # fmt: skip
    data.add_argument(
        "--vae_checkpoint", default="./vae_run_1/vae_best.pth", help="the VAE that encoded it"
    )
    data.add_argument(
        "--save_dir", default="./model_runs/ldm_unet_run_1",
        help="folder of this run; the same command again resumes the run in it",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument(
        "--latent_dim", type=positive, help="channels of the latents: checked against the data"
    )
    model.add_argument(
        "--latent_size", type=positive,
        help="height and width of the latents: checked against the data",
    )  # fmt: skip
    model.add_argument(
        "--channels", type=positive, nargs="+", default=[128, 256, 768], metavar="N",
        help="channels at each resolution; each halves the size of the one before",
    )  # fmt: skip
    model.add_argument(
        "--blocks", type=positive, nargs="+", metavar="N",
        help="blocks at each resolution, or one number for all (default: 1, and 3 at the smallest)",
    )  # fmt: skip
    model.add_argument(
        "--dropout", type=fraction, default=0.0,
        help="share of features withheld at random; with few patients, 0.1 helps against learning "
        "them by heart",
    )  # fmt: skip
    parser.rare.add_argument(
        "--contour_dropout", type=fraction, default=0.1,
        help="share of slices whose contour is withheld in training",
    )  # fmt: skip
    parser.rare.add_argument(
        "--label_dropout", type=fraction, default=0.1,
        help="share of slices whose class label is withheld in training; guidance needs some",
    )  # fmt: skip
    add_validation_options(parser)
    add_training_options(
        parser, steps=50_000, batch_size=64, lr=2e-4, warmup_steps=500, ema_decay=0.999,
        save_interval=500, val_interval=2500,
    )  # fmt: skip
    add_machine_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # Setup.
    device = distributed.setup(args.device, args.timeout)
    precision = Precision(args.precision, device)
    run = Run(args, device)
    data = LatentDataset(args.latent_data_dir)
    data.require_shape(args.latent_dim, args.latent_size)
    vae, _ = load_model(args.vae_checkpoint, VAE)
    lineage = data.lineage(args.vae_checkpoint)

    # Model.
    torch.manual_seed(args.seed)
    unet = UNet(
        data.latent_dim, data.latent_size, data.contour_channels, len(data.classes),
        args.channels, args.blocks, args.dropout,
    ).to(device)  # fmt: skip
    ema = EMA(unet, args.ema_decay)
    optimizer = torch.optim.AdamW(
        unet.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    scaler = precision.scaler()
    scheduler = CosineScheduler(device=device)
    parts = {"unet": unet, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    progress = run.resume("train_ldm_unet", parts, lineage)
    if args.compile:
        unet.compile()
    model = distributed.wrap(unet, device)

    # Data.
    train_rows = data.indices("train")
    batches = Batches(train_rows, args, progress["step"])
    validation = Validation(data, vae.to(device), scheduler, args, precision, run)
    run.say(
        f"{len(train_rows)} latents of {len(data.indices('train', views=False))} slices to train "
        f"on, {len(data.indices('val'))} held out for "
        f"validation; classes {data.classes or 'none'}; "
        f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters; {device}, "
        f"{precision.name}, {distributed.world_size()} process(es)"
    )

    def train_step(step: int, order: Iterator[tuple[Tensor, ...]]) -> None:
        """Loss, backward pass and optimizer step on this rank's parts of the batch."""
        for part in range(args.grad_accum):
            # Timestep, noise and withheld conditions of each item.
            x0, contour, label, noise, draws = next(order)
            t = (draws[:, 0] * scheduler.num_timesteps).long()
            contour = contour_condition(
                contour, data.latent_size, draws[:, 1] >= args.contour_dropout
            )
            label = torch.where(draws[:, 2] < args.label_dropout, NO_LABEL, label)

            # Loss.
            seed_dropout(args.seed, step, batches.positions(part))
            with distributed.sync_gradients(model, part + 1 == args.grad_accum):
                with precision.autocast():
                    loss = diffusion_loss(
                        lambda x, t: model(x, t, contour, label), scheduler, x0, t, noise
                    ).mean()
                run.average(loss=loss)
                scaler.scale(loss / args.grad_accum).backward()

        # Step.
        if run.is_sound(step, clip_gradients(optimizer, scaler, args.grad_clip)):
            schedule = args.warmup_steps, args.lr_schedule, args.steps
            optimizer_step(optimizer, scaler, learning_rate(step, args.lr, *schedule))
            ema.update(unet)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def averaged(contours: Tensor, labels: Tensor) -> Denoiser:
        return make_denoiser(ema.model, None, contours, labels)

    def batches_in_order() -> Iterator[tuple[Tensor, ...]]:
        return training_batches(data, batches, "unet", 3, device)

    def validate_and_keep_best(step: int) -> None:
        if validation.measure(averaged, run, step):
            facts = {"window": list(data.window), "classes": data.classes, "step": step}
            facts |= {"pixel_spacing": data.pixel_spacing, "contour_style": data.contour_style}
            run.save_best("unet_best.pth", ema.model, **facts)
        run.end_validation(step)

    def rehearse(step: int, folder: Path) -> None:
        train_step(step, batches_in_order())
        validation.rehearse(averaged, folder)

    # Train.
    run.preflight(rehearse)
    if run.validation_pending():
        validate_and_keep_best(progress["step"])
    order = batches_in_order()
    for step in run.steps(batches):
        train_step(step, order)

        # Log and save, sample and validate.
        if run.end_step(step):
            validate_and_keep_best(step)
    run.say(f"{run.folder / 'unet_best.pth'}: validation loss {progress['best']:.4f}")
    run.close()


if __name__ == "__main__":
    run_script(main, parse_args)
