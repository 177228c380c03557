"""Encode the slices of label.csv by a trained VAE, into a latent data set."""

import argparse

from fibldm import distributed
from fibldm.checkpoint import load_model
from fibldm.cli import add_machine_options, add_view_options, make_parser, positive, run_script
from fibldm.datasets import Views
from fibldm.encoding import LatentDataset, encode_csv
from fibldm.optim import Precision
from fibldm.vae import VAE


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        "  python encode_dataset.py --csv_file ./data/label.csv --img_dir ./data/ \\\n"
        "      --vae_checkpoint ./vae_run_1/vae_best.pth --output_dir ./data/latents_dataset",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--csv_file", default="./data/label.csv", help="the table that the VAE was trained on"
    )
    data.add_argument("--img_dir", default="./data/", help="folder its paths are relative to")
    data.add_argument(
        "--vae_checkpoint", default="./vae_run_1/vae_best.pth", help="from train_vae.py"
    )
    data.add_argument(
        "--output_dir", default="./data/latents_dataset",
        help="folder of the latent data set, which appears when it is whole",
    )  # fmt: skip
    data.add_argument(
        "--contour_channels", type=positive, default=1,
        help="maps of a contour; 1: lung or not; K: contour files hold the labels 0 to K",
    )  # fmt: skip
    data.add_argument(
        "--overwrite", action="store_true", help="replace another latent data set there"
    )
    data.add_argument(
        "--batch_size", type=positive, default=32,
        help="slices encoded at once, over all processes together",
    )  # fmt: skip
    data.add_argument(
        "--dry_run", action="store_true",
        help="check the VAE and that all files can be read, and encode nothing",
    )  # fmt: skip
    add_view_options(parser)
    add_machine_options(parser, seed=False)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # Setup.
    device = distributed.setup(args.device, args.timeout)
    precision = Precision(args.precision, device)

    # Model.
    vae, content = load_model(args.vae_checkpoint, VAE)

    # Data.
    at_once = -(-args.batch_size // distributed.world_size())
    with precision.autocast():
        notes = encode_csv(
            args.output_dir, args.csv_file, args.img_dir, vae.to(device), args.vae_checkpoint,
            content, args.contour_channels, device, at_once, args.num_workers,
            Views(args.views, args.max_shift, args.max_scale), args.overwrite,
            dry_run=args.dry_run,
        )  # fmt: skip
    if distributed.is_main():
        for note in notes:
            print(note)
    if distributed.is_main() and not args.dry_run:
        data = LatentDataset(args.output_dir)
        counts = ", ".join(f"{len(data.indices(s))} {s}" for s in ("train", "val", "test"))
        print(f"{args.output_dir}: {len(data)} latents {data.latents.shape[1:]}: {counts}")


if __name__ == "__main__":
    run_script(main, parse_args)
