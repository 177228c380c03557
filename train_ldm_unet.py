"""Train the U-Net to denoise latents, on a latent data set, into unet_best.pth."""

import argparse
from functools import partial

import torch

from fibldm import cli, distributed
from fibldm.batches import Plan, seed_dropout
from fibldm.checkpoint import load_model, read_start
from fibldm.disk import file_hash
from fibldm.encoding import LatentDataset, training_batches
from fibldm.optim import EMA, adamw, clear_gradients, clip_gradients, optimizer_step
from fibldm.run import Run
from fibldm.scheduler import CosineScheduler, diffusion_loss
from fibldm.synthesis import Synthesizer
from fibldm.unet import NO_LABEL, UNet, blocks_per_level, contour_condition
from fibldm.vae import VAE
from fibldm.validation import Validation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(
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
    cli.add_run_option(data, "./model_runs/ldm_unet_run_1")
    model = parser.add_argument_group("model")
    cli.add_latent_shape_options(model)
    model.add_argument(
        "--channels", type=cli.positive, nargs="+", default=[128, 256, 768], metavar="N",
        help="channels at each resolution; each halves the size of the one before",
    )  # fmt: skip
    model.add_argument(
        "--blocks", type=cli.positive, nargs="+", metavar="N",
        help="blocks at each resolution, or one number for all (default: 1, and 3 at the smallest)",
    )  # fmt: skip
    model.add_argument(
        "--dropout", type=cli.fraction, default=0.0,
        help="share of features withheld at random; 0.1 helps against memorization of few patients",
    )  # fmt: skip
    model.add_argument(
        "--init_checkpoint", metavar="FILE",
        help="start from the weights of this unet_best.pth, of the same sizes; it must not have "
        "been trained on patients that are held out here; classes of the same names are kept",
    )  # fmt: skip
    parser.rare.add_argument(
        "--contour_dropout", type=cli.fraction, default=0.1,
        help="share of slices whose contour is withheld in training",
    )  # fmt: skip
    cli.add_diffusion_options(parser, steps=50_000, batch_size=64, lr=2e-4)
    cli.add_machine_options(parser, workers=False)
    parser.rare.add_argument(
        "--num_workers", type=cli.worker_count, default=0,
        help="unused: latents are read while the step before is computed",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        args.blocks = list(blocks_per_level(args.blocks, len(args.channels)))
    except ValueError as error:
        parser.error(f"--blocks: {error}")
    return args


def main(args: argparse.Namespace) -> None:
    # Setup.
    device = distributed.setup(args.device, args.timeout)
    run = Run(args.save_dir, Plan.of(vars(args)), device, vars(args))
    precision = run.precision
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
    if args.init_checkpoint:
        split, free = data.meta.get("split"), ("num_classes", "dropout")
        start, content, warnings = read_start(
            args.init_checkpoint, unet, lineage, split, data.window, free
        )
        distributed.warn(*warnings)
        lineage["init_checkpoint"] = file_hash(args.init_checkpoint)
        unet.load_from(start, data.classes, content["classes"])
    ema = EMA(unet, args.ema_decay)
    optimizer, scaler = adamw(unet, args.lr), precision.scaler()
    components = {"unet": unet, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    run.resume("train_ldm_unet", components, lineage)
    model = distributed.wrap(unet, device, args.compile)
    scheduler = CosineScheduler(device=device)

    # Data.
    batches = run.batches_of(data.indices("train"), labels=data.label_names("train"))
    synthesizer = Synthesizer(
        vae.to(device), ema.model, classes=data.classes, window=data.window, precision=precision
    )
    validation = Validation(
        data, synthesizer, run, args.val_samples, args.val_sampling_steps, args.max_copies
    )
    distributed.introduce(data.summary(), unet, device, precision.name)

    def validate(step: int) -> None:
        if validation.measure(step):
            facts = {"classes": data.classes, "pixel_spacing": data.pixel_spacing}
            if "split" in data.meta:
                facts["split"] = data.meta["split"]
            facts |= {"window": list(data.window), "contour_style": data.contour_style}
            run.save_best("unet_best.pth", ema.model, **facts, step=step)

    # Train.
    # Between the steps, run.steps logs, saves, validates and stops; first comes a preflight.
    load = partial(training_batches, data, batches, "unet", 3, device)
    for step, micro_batches in run.steps(load, validate):
        for micro, (x0, contour, label, noise, draws) in micro_batches:
            # Timestep and withheld conditions of each item.
            t = scheduler.training_timesteps(draws[:, 0])
            given = draws[:, 1] >= args.contour_dropout
            contour = contour_condition(contour, data.latent_size, given)
            label = torch.where(draws[:, 2] < args.label_dropout, NO_LABEL, label)

            # Loss.
            seed_dropout(args.seed, step, micro.positions)
            with distributed.sync_gradients(model, micro.last):
                with precision.autocast():
                    loss = diffusion_loss(
                        lambda x, t: model(x, t, contour, label), scheduler, x0, t, noise
                    ).mean()
                run.average(loss=loss)
                scaler.scale(loss / args.grad_accum).backward()

        # Step.
        if run.may_step(clip_gradients(optimizer, scaler, args.grad_clip)):
            optimizer_step(optimizer, scaler, run.plan.learning_rate(step))
            ema.update(unet)
        clear_gradients(optimizer, scaler)


if __name__ == "__main__":
    cli.run_script(main, parse_args)
