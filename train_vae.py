"""Train the VAE on the slices of label.csv, into vae_best.pth, with its latents made standard."""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fibldm import checkpoint, disk, distributed
from fibldm.batches import Batches, item_noise, item_uniform
from fibldm.cli import (
    add_machine_options,
    add_training_options,
    add_window_option,
    count,
    fraction,
    integer,
    make_parser,
    not_negative,
    positive,
    run_script,
)
from fibldm.ct import DEFAULT_WINDOW
from fibldm.datasets import CHECKED, CTDataset, chunks, load_batches, shift_slices
from fibldm.features import load_lpips, missing_weights, reconstruction_metrics
from fibldm.losses import structural_loss, view_at
from fibldm.optim import EMA, Muon, Precision, clip_gradients, learning_rate, optimizer_step
from fibldm.panels import write_reconstructions
from fibldm.run import Run
from fibldm.tables import Split, read_table
from fibldm.vae import VAE, clipped, grain_loss, moved, reconstruct
from fibldm.validation import (
    heldout_latents,
    input_warnings,
    latent_warnings,
    moments,
    reconstruction_warnings,
)

LOOKED_AT = 16  # slices at most, evenly spaced, whose values are looked at before the start
PANEL = 8  # slices in the picture
BATCH = 16  # slices at a time where nothing is trained
PERCEPTUAL_MARGIN = 3  # pixels, of the random offsets that the perceptual loss looks from
MEASURED = 4096  # slices at most, evenly spaced, for the mean and variance of the latents


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
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
    data.add_argument(
        "--save_dir", default="./vae_run_1",
        help="folder of this run; the same command again resumes the run in it",
    )  # fmt: skip
    add_window_option(data, DEFAULT_WINDOW, "HU that become -1 and 1; values beyond are clipped")
    data.add_argument(
        "--val_fraction", type=fraction, default=0.1, help="share of patients for validation"
    )
    data.add_argument(
        "--test_fraction", type=fraction, default=0.1, help="share of patients for the final test"
    )
    data.add_argument(
        "--max_shift", type=not_negative,
        help="how far slices are moved at random in training, at most, in each direction: a share "
        "of the side; 0: not at all (default: what one latent covers, 1 / --latent_size)",
    )  # fmt: skip
    parser.rare.add_argument(
        "--split_seed", type=integer, default=0, help="of the split by patient"
    )
    parser.rare.add_argument(
        "--max_bad_images", type=count, default=0,
        help="slices that may be unreadable; others take their places",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument(
        "--image_size", type=positive, default=256,
        help="height and width in pixels to which slices are resized",
    )  # fmt: skip
    model.add_argument(
        "--latent_size", type=positive, default=16,
        help="height and width of the latent; must divide --image_size",
    )  # fmt: skip
    model.add_argument("--latent_dim", type=positive, default=8, help="channels of the latent")
    model.add_argument(
        "--base_channels", type=positive, default=64, help="channels at the first level"
    )
    model.add_argument("--blocks", type=positive, default=2, help="residual blocks a level")
    model.add_argument(
        "--init_checkpoint", metavar="FILE",
        help="start from the weights of this vae_best.pth, of the same sizes; it must not have "
        "been trained on patients that are held out here",
    )  # fmt: skip
    parser.rare.add_argument(
        "--kl_weight", type=not_negative, default=1e-6,
        help="weight of the KL divergence, which is summed over a slice's latent",
    )  # fmt: skip
    parser.rare.add_argument(
        "--perceptual", choices=("auto", "lpips", "structural", "none"), default="auto",
        help="perceptual loss; structural: of gradients and SSIM, which needs no weights; auto: "
        "LPIPS where its weights are found, else structural",
    )  # fmt: skip
    parser.rare.add_argument(
        "--perceptual_weight", type=not_negative, default=0.1,
        help="weight of the perceptual loss; that of L1 is 1",
    )  # fmt: skip
    add_training_options(
        parser, steps=20_000, batch_size=16, lr=2e-3, warmup_steps=200, ema_decay=0.999,
        save_interval=500, val_interval=1000,
    )  # fmt: skip
    add_machine_options(parser)
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
    precision = Precision(args.precision, device)
    have_lpips = all(distributed.gather(not missing_weights(["lpips"])))
    args.perceptual = choose_perceptual(args.perceptual, have_lpips)
    run = Run(args, device)
    split = Split(args.split_seed, args.val_fraction, args.test_fraction)
    rows, notes = read_table(args.csv_file, args.img_dir, split)
    folder = Path(args.csv_file).parent
    data = CTDataset(
        rows, args.img_dir, folder, args.image_size, tuple(args.window),
        max_bad=args.max_bad_images,
    )  # fmt: skip
    train_rows, val_rows = data.indices("train"), data.indices("val")
    for note in notes + data.notes():
        run.say(note)
    _, bad_rows = data.check(run.folder / CHECKED)
    looked_at = [train_rows[i] for i in evenly(len(train_rows), LOOKED_AT)]
    run.warn(input_warnings({rows[i].image: data.read_or_replace(i)[0] for i in looked_at}))

    # Model.
    torch.manual_seed(args.seed)
    vae = VAE(args.image_size, args.latent_size, args.latent_dim, args.base_channels, args.blocks)
    lineage = {"label_csv": disk.file_hash(args.csv_file), "files": data.fingerprint()}
    if args.init_checkpoint:
        run.warn(start_from(args.init_checkpoint, vae, args.window, lineage["label_csv"], split))
        lineage["init_checkpoint"] = disk.file_hash(args.init_checkpoint)
    vae.to(device)
    ema = EMA(vae, args.ema_decay)
    optimizer = Muon(vae, args.lr)
    scaler = precision.scaler()
    parts = {"vae": vae, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    lpips = load_lpips(device) if have_lpips else None
    perceptual = {"lpips": lpips, "structural": structural_loss, "none": None}[args.perceptual]
    unchecked = ["files"] if bad_rows else []  # their sizes are not what they were
    progress = run.resume("train_vae", parts, lineage, unchecked)
    if args.compile:
        vae.compile()
    model = distributed.wrap(vae, device)

    # Data.
    batches = Batches(train_rows, args, progress["step"], progress["bad_images"])
    run.leave_out_images(batches, bad_rows)
    most_pixels = round(args.max_shift * args.image_size)
    latent_shape = (args.latent_dim, args.latent_size, args.latent_size)
    run.say(
        f"{len(train_rows)} slices to train on, {len(val_rows)} held out for validation; "
        f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M parameters; {device}, "
        f"{precision.name}, {distributed.world_size()} process(es)"
    )

    def reconstruction_loss(mean: Tensor, recon: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        """L1 of the mean; perceptual loss of what is seen, the mean with its grain; (N,)."""
        loss = (mean - x).abs().mean(dim=(1, 2, 3))
        if perceptual is None:
            return loss
        recon, x = (view_at(v, offsets, PERCEPTUAL_MARGIN) for v in (recon, x))
        return loss + args.perceptual_weight * perceptual(recon, x)

    def train_step(step: int, order: Iterator[dict[str, Tensor]]) -> None:
        """Loss, backward pass and optimizer step on this rank's parts of the batch."""
        for part in range(args.grad_accum):
            positions, batch = batches.positions(part), next(order)
            run.suspect(batch["unreadable"])
            uniform = item_uniform(args.seed, "shift", step, positions, 6)
            x = shift_slices(batch["image"], uniform[:, :2], most_pixels)
            x = x.to(device, non_blocking=True)
            noise = item_noise(args.seed, "vae", step, positions, latent_shape)

            # Loss.
            with distributed.sync_gradients(model, part + 1 == args.grad_accum):
                with precision.autocast():
                    slices, posterior = model(x, noise.to(device))
                    decoded = slices._replace(logvar=slices.logvar.detach())
                    recon = decoded.sample(moved(vae.grain, uniform[:, 4:]))
                    rec = reconstruction_loss(slices.mean, recon, x, uniform[:, 2:4]).mean()
                    kl, texture = posterior.kl(), grain_loss(*slices, x)
                    loss = rec + args.kl_weight * kl + texture
                run.average(loss=loss, reconstruction=rec, kl=kl, grain=texture)
                scaler.scale(loss / args.grad_accum).backward()

        # Step.
        if run.is_sound(step, clip_gradients(optimizer, scaler, args.grad_clip)):
            schedule = args.warmup_steps, args.lr_schedule, args.steps
            optimizer_step(optimizer, scaler, learning_rate(step, args.lr, *schedule))
            ema.update(vae)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def validate_on(held: list[int], path: Path) -> tuple:
        return validate(ema.model, data, held, reconstruction_loss, lpips, run, path)

    def validate_and_keep_best(step: int) -> None:
        path = run.folder / "samples" / f"step_{step:07d}.png"
        values, heldout, noise_std = validate_on(val_rows, path)
        run.picture(step, path)
        run.warn(latent_warnings(heldout[1], noise_std))
        run.warn(reconstruction_warnings(values["brightness"], values["contrast"]))
        best = copy.deepcopy(ema.model) if run.is_best(values["loss"]) else None
        if best is not None:
            trained = measure_latents(best, data, train_rows, run)
            values |= heldout_latents(trained, heldout)
        run.log(step, values, "val")
        if best is not None:
            best.calibrate(*trained)
            facts = {"window": args.window, "split": asdict(split), "step": step}
            run.save_best("vae_best.pth", best, **facts)
        run.end_validation(step)

    def rehearse(step: int, folder: Path) -> None:
        train_step(step, iter(load_batches(data, batches, args.num_workers)))
        few = val_rows[: BATCH * distributed.world_size()]
        validate_on(few, folder / "panel.png")
        measure_latents(ema.model, data, few, run)

    # Train.
    run.preflight(rehearse)
    if run.validation_pending():
        validate_and_keep_best(progress["step"])
    order = iter(load_batches(data, batches, args.num_workers))
    for step in run.steps(batches):
        train_step(step, order)

        # Log and save, reconstruct and validate.
        if run.end_step(step):
            validate_and_keep_best(step)
    run.say(f"{run.folder / 'vae_best.pth'}: validation loss {progress['best']:.4f}")
    run.close()


def choose_perceptual(name: str, have_lpips: bool) -> str:
    """What "auto" means here, and so in args.json; ValueError where LPIPS cannot be had."""
    message = "" if have_lpips else missing_weights(["lpips"]).get("lpips", "absent on a node")
    if name == "lpips" and not have_lpips:
        raise ValueError(f"--perceptual lpips: {message}")
    if name == "auto" and not have_lpips and distributed.is_main():
        print(f"--perceptual auto is the structural loss. {message}", flush=True)
    return name if name != "auto" else "lpips" if have_lpips else "structural"


def start_from(path: str, vae: VAE, window: list[float], label_csv: str, split: Split) -> list[str]:
    """Load the weights of a VAE trained before; returns what must be said of its patients.

    ValueError where it is of another form, or has seen slices of `label_csv` that are held out.
    """
    trained, content = checkpoint.load_model(path, VAE)
    remedy = "repeat the options that it was trained with"
    for name, value in trained.config.items():
        checkpoint.require_equal(f"{path}: its {name}", value, vae.config[name], remedy)
    checkpoint.require_equal(f"{path}: its window", list(content["window"]), window, remedy)
    vae.load_state_dict(trained.state_dict())
    vae.uncalibrate()
    if content["lineage"].get("label_csv") == label_csv:
        checkpoint.require_equal(f"{path}: its split", content["split"], asdict(split), remedy)
        return []
    return [f"{path} was trained on another table: none of its patients may be held out here"]


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` positions, evenly spaced, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


@torch.no_grad()
def validate(
    vae: VAE,
    data: CTDataset,
    rows: list[int],
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    lpips: nn.Module | None,
    run: Run,
    panel: Path,
) -> tuple[dict[str, float], tuple[Tensor, Tensor], Tensor]:
    """Reconstruct the held-out slices, shared over ranks, and write the panel.

    Returns mean metrics; mean and standard deviation (C,) of the latents; and their noise's.
    """
    mine = [rows[i] for i in distributed.share(len(rows))]
    totals: dict[str, float] = {}
    sums = torch.zeros(3, vae.config["latent_dim"], dtype=torch.float64, device=run.device)
    parts = chunks(mine, BATCH)
    for part, batch in zip(parts, load_batches(data, parts, 0), strict=True):
        distributed.alive()
        run.suspect(batch["unreadable"])
        x = batch["image"].to(run.device)
        posterior = vae.encode(x)
        offsets = item_uniform(0, "val", 0, part, 2)  # each slice's own, always the same
        slices = vae.likelihood(posterior.mean)
        recon = clipped(slices.sample(vae.grain))
        values = {
            "loss": loss(slices.mean, recon, x, offsets),
            **reconstruction_metrics(recon, x, lpips),
        }
        values["mean_psnr"] = reconstruction_metrics(clipped(slices.mean), x)["psnr"]
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + float(value.sum())
        mean = posterior.mean.double()
        noise = posterior.logvar.double().exp()
        sums += torch.stack([mean, mean.square(), noise]).sum(dim=(1, 3, 4))
    parts = distributed.gather(totals)
    names = dict.fromkeys(name for part in parts for name in part)
    values = {name: sum(part.get(name, 0.0) for part in parts) / len(rows) for name in names}
    if distributed.is_main():
        x = torch.stack([data[row]["image"] for row in rows[:PANEL]])
        recon = reconstruct(vae, x.to(run.device)).cpu()
        with run.keep_going(panel):
            write_reconstructions(panel, x[:, 0].numpy(), recon[:, 0].numpy())
    count = len(rows) * vae.config["latent_size"] ** 2
    sums = distributed.sum_over_ranks(sums)
    return values, moments(sums[:2], count), (sums[2] / count).sqrt().float()


@torch.no_grad()
def measure_latents(vae: VAE, data: CTDataset, rows: list[int], run: Run) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of each latent channel over training slices."""
    picked = evenly(len(rows), MEASURED)
    mine = [rows[picked[i]] for i in distributed.share(len(picked))]
    args, latent_dim = run.args, vae.config["latent_dim"]
    sums = torch.zeros(2, latent_dim, dtype=torch.float64, device=run.device)
    for batch in load_batches(data, chunks(mine, BATCH), args.num_workers):
        distributed.alive()
        run.suspect(batch["unreadable"])
        mean = vae.encode(batch["image"].to(run.device)).mean.double()
        sums += torch.stack([mean, mean.square()]).sum(dim=(1, 3, 4))
    return moments(distributed.sum_over_ranks(sums), len(picked) * args.latent_size**2)


if __name__ == "__main__":
    run_script(main, parse_args)
