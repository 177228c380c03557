"""Train the ControlNet that steers a trained U-Net by contours, into controlnet_best.pth."""

import argparse
from functools import partial
from pathlib import Path

import torch

from fibldm import cli, distributed
from fibldm.batches import Plan, seed_dropout
from fibldm.checkpoint import load_model, require_equal, source_hash
from fibldm.controlnet import ControlNet
from fibldm.datasets import Views
from fibldm.encoding import LatentDataset, encode_csv, training_batches
from fibldm.optim import EMA, adamw, clear_gradients, clip_gradients, optimizer_step
from fibldm.run import Run
from fibldm.scheduler import CosineScheduler, diffusion_loss
from fibldm.synthesis import Synthesizer
from fibldm.unet import NO_LABEL, UNet, contour_condition
from fibldm.vae import VAE
from fibldm.validation import Validation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(
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
    cli.add_run_option(data, "./model_runs/controlnet_run_1")
    model = parser.add_argument_group("model")
    cli.add_latent_shape_options(model)
    model.add_argument(
        "--contour_channels", type=cli.positive, default=1,
        help="maps of a contour, as the U-Net and the data have them; 1: lung or not",
    )  # fmt: skip
    cli.add_view_options(parser)
    cli.add_diffusion_options(parser, steps=20_000, batch_size=32, lr=1e-4)
    cli.add_machine_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # Setup.
    device = distributed.setup(args.device, args.timeout)
    run = Run(args.save_dir, Plan.of(vars(args)), device, vars(args))
    precision = run.precision
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
        folder = run.folder.path / "latents"
        table = Path(args.data_path) / args.csv_path
        with precision.autocast():
            notes = encode_csv(
                folder, table, args.data_path, vae, args.vae_checkpoint, vae_content,
                args.contour_channels, device, 32, args.num_workers,
                Views(args.views, args.max_shift, args.max_scale),
                remedy="use another --save_dir",
            )  # fmt: skip
        distributed.say(*notes)
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
    optimizer, scaler = adamw(controlnet, args.lr), precision.scaler()
    components = {"controlnet": controlnet, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    run.resume("train_controlnet", components, lineage)
    unet = precision.frozen(unet)
    if args.compile:
        unet.compile()
    model = distributed.wrap(controlnet, device, args.compile)
    scheduler = CosineScheduler(device=device)
    batches = run.batches_of(data.indices("train"), labels=data.label_names("train"))
    synthesizer = Synthesizer(
        vae, unet, ema.model, classes=data.classes, window=data.window, precision=precision
    )
    validation = Validation(
        data, synthesizer, run, args.val_samples, args.val_sampling_steps, args.max_copies
    )
    distributed.introduce(data.summary(), controlnet, device, precision.name)

    def validate(step: int) -> None:
        if validation.measure(step):
            window = list(data.window)
            run.save_best("controlnet_best.pth", ema.model, window=window, step=step)

    # Train.
    # Between the steps, run.steps logs, saves, validates and stops; first comes a preflight.
    load = partial(training_batches, data, batches, "control", 2, device)
    for step, micro_batches in run.steps(load, validate):
        for micro, (x0, contour, label, noise, draws) in micro_batches:
            # Timestep and withheld label of each item.
            t = scheduler.training_timesteps(draws[:, 0])
            condition = contour_condition(contour, data.latent_size)
            label = torch.where(draws[:, 1] < args.label_dropout, NO_LABEL, label)

            # Loss.
            seed_dropout(args.seed, step, micro.positions)

            def denoiser(x, t, contour=contour, condition=condition, label=label):
                return unet(x, t, condition, label, model(x, t, contour, condition, label))

            with distributed.sync_gradients(model, micro.last):
                with precision.autocast():
                    loss = diffusion_loss(denoiser, scheduler, x0, t, noise).mean()
                run.average(loss=loss)
                scaler.scale(loss / args.grad_accum).backward()

        # Step.
        if run.may_step(clip_gradients(optimizer, scaler, args.grad_clip)):
            optimizer_step(optimizer, scaler, run.plan.learning_rate(step))
            ema.update(controlnet)
        clear_gradients(optimizer, scaler)


if __name__ == "__main__":
    cli.run_script(main, parse_args)
