"""Train the ControlNet that steers a trained U-Net by contours, into controlnet_best.pth."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fibldm import distributed
from fibldm.batches import Batches, seed_dropout
from fibldm.checkpoint import load_model, require_equal, source_hash
from fibldm.cli import (
    add_machine_options,
    add_training_options,
    add_validation_options,
    add_view_options,
    fraction,
    make_parser,
    positive,
    run_script,
)
from fibldm.controlnet import ControlNet, make_denoiser
from fibldm.datasets import Views
from fibldm.encoding import LatentDataset, encode_csv, training_batches
from fibldm.optim import EMA, Precision, clip_gradients, learning_rate, optimizer_step
from fibldm.run import Run
from fibldm.scheduler import CosineScheduler, Denoiser, diffusion_loss
from fibldm.unet import NO_LABEL, UNet, contour_condition
from fibldm.vae import VAE
from fibldm.validation import Validation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        "  python train_controlnet.py --data_path ./data --csv_path label.csv \\\n"
        "      --vae_checkpoint ./vae_run_1/vae_best.pth \\\n"
        "      --unet_checkpoint ./model_runs/ldm_unet_run_1/unet_best.pth \\\n"
        "      --save_dir ./model_runs/controlnet_run_1 --latent_dim 8 --latent_size 16 \\\n"
        "      --contour_channels 1",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data_path", default="./data", help="folder of the slices, encoded once")
    data.add_argument("--csv_path", default="label.csv", help="their table, relative to it")
    data.add_argument(
        "--latent_data_dir",
        help="latent data set, from encode_dataset.py, instead of the two above",
    )  # fmt: skip
    data.add_argument(
        "--vae_checkpoint", default="./vae_run_1/vae_best.pth", help="the VAE that encodes them"
    )
    data.add_argument(
        "--unet_checkpoint", default="./model_runs/ldm_unet_run_1/unet_best.pth",
        help="the U-Net to steer; it stays as it is",
    )  # fmt: skip
    data.add_argument(
        "--save_dir", default="./model_runs/controlnet_run_1",
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
        "--contour_channels", type=positive, default=1,
        help="maps of a contour, as the U-Net and the data have them; 1: lung or not",
    )  # fmt: skip
    parser.rare.add_argument(
        "--label_dropout", type=fraction, default=0.1,
        help="share of slices whose class label is withheld in training",
    )  # fmt: skip
    add_view_options(parser)
    add_validation_options(parser)
    add_training_options(
        parser, steps=20_000, batch_size=32, lr=1e-4, warmup_steps=500, ema_decay=0.999,
        save_interval=500, val_interval=2500,
    )  # fmt: skip
    add_machine_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # Setup.
    device = distributed.setup(args.device, args.timeout)
    precision = Precision(args.precision, device)
    run = Run(args, device)
    vae, vae_content = load_model(args.vae_checkpoint, VAE)
    unet, unet_content = load_model(args.unet_checkpoint, UNet)
    vae, unet = vae.to(device), unet.to(device)
    require_equal(
        f"{args.unet_checkpoint}: the SHA-256 of the VAE it was trained with",
        unet_content["lineage"]["vae"],
        source_hash(args.vae_checkpoint),
        f"give the VAE that encoded its latents, not {args.vae_checkpoint}",
    )
    unet_channels = unet.config["contour_channels"]
    require_equal("--contour_channels", args.contour_channels, unet_channels, "as the U-Net has")

    # Data: latents made before, or made now, once.
    folder = args.latent_data_dir
    if folder is None:
        folder = run.folder / "latents"
        table = Path(args.data_path) / args.csv_path
        with precision.autocast():
            notes = encode_csv(
                folder, table, args.data_path, vae, args.vae_checkpoint, vae_content,
                args.contour_channels, device, 32, args.num_workers,
                Views(args.views, args.max_shift, args.max_scale),
                remedy="use another --save_dir",
            )  # fmt: skip
        for note in notes:
            run.say(note)
    data = LatentDataset(folder)
    data.require_shape(args.latent_dim, args.latent_size, args.contour_channels)
    lineage = {**data.lineage(args.vae_checkpoint), "unet": source_hash(args.unet_checkpoint)}
    data.use_classes(unet_content["classes"])
    style = unet_content.get("contour_style")
    if style and data.contour_style:
        what = f"{folder}: the style of its contours"
        remedy = "as the U-Net's; convert them by scripts/prepare_data.py --contour_style"
        require_equal(what, data.contour_style, style, remedy)

    # Model.
    torch.manual_seed(args.seed)
    controlnet = ControlNet(unet, data.image_size).to(device)
    ema = EMA(controlnet, args.ema_decay)
    optimizer = torch.optim.AdamW(
        controlnet.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    scaler = precision.scaler()
    scheduler = CosineScheduler(device=device)
    parts = {"controlnet": controlnet, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    progress = run.resume("train_controlnet", parts, lineage)
    if args.compile:
        controlnet.compile()
        unet.compile()
    model = distributed.wrap(controlnet, device)
    train_rows = data.indices("train")
    batches = Batches(train_rows, args, progress["step"])
    validation = Validation(data, vae, scheduler, args, precision, run)
    run.say(
        f"{len(train_rows)} latents of {len(data.indices('train', views=False))} slices to train "
        f"on, {len(data.indices('val'))} held out for "
        f"validation; {sum(p.numel() for p in controlnet.parameters()) / 1e6:.1f} M parameters; "
        f"{device}, {precision.name}, {distributed.world_size()} process(es)"
    )

    def train_step(step: int, order: Iterator[tuple[Tensor, ...]]) -> None:
        """Loss, backward pass and optimizer step on this rank's parts of the batch."""
        for part in range(args.grad_accum):
            # Timestep, noise and withheld labels of each item.
            x0, contour, label, noise, draws = next(order)
            t = (draws[:, 0] * scheduler.num_timesteps).long()
            condition = contour_condition(contour, data.latent_size)
            label = torch.where(draws[:, 1] < args.label_dropout, NO_LABEL, label)

            # Loss.
            seed_dropout(args.seed, step, batches.positions(part))

            def denoiser(x, t, contour=contour, condition=condition, label=label):
                return unet(x, t, condition, label, model(x, t, contour, condition, label))

            with distributed.sync_gradients(model, part + 1 == args.grad_accum):
                with precision.autocast():
                    loss = diffusion_loss(denoiser, scheduler, x0, t, noise).mean()
                run.average(loss=loss)
                scaler.scale(loss / args.grad_accum).backward()

        # Step.
        if run.is_sound(step, clip_gradients(optimizer, scaler, args.grad_clip)):
            schedule = args.warmup_steps, args.lr_schedule, args.steps
            optimizer_step(optimizer, scaler, learning_rate(step, args.lr, *schedule))
            ema.update(controlnet)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def averaged(contours: Tensor, labels: Tensor) -> Denoiser:
        return make_denoiser(unet, ema.model, contours, labels)

    def batches_in_order() -> Iterator[tuple[Tensor, ...]]:
        return training_batches(data, batches, "control", 2, device)

    def validate_and_keep_best(step: int) -> None:
        if validation.measure(averaged, run, step):
            facts = {"window": list(data.window), "step": step}
            run.save_best("controlnet_best.pth", ema.model, **facts)
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
    run.say(f"{run.folder / 'controlnet_best.pth'}: validation loss {progress['best']:.4f}")
    run.close()


if __name__ == "__main__":
    run_script(main, parse_args)
