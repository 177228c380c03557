"""Counts what a step of each stage asks of a GPU: operations, kernels, and waits of the host.

The GPU is pretended (tests/pretended_gpu.py), the networks have their default sizes. `--code`
counts another checkout.
"""

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--code", default=ROOT, help="a checkout of the project, to count its steps"
    )
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--batch_size", default="4")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    sys.path[:0] = [str(args.code), str(ROOT / "tests")]
    from pretended_gpu import of_a_step  # it imports the package, from `code`

    from fibldm.phantom import write_dataset

    def run(script: str, *words: object) -> None:
        module = importlib.import_module(script)
        with contextlib.redirect_stdout(io.StringIO()):
            module.main(module.parse_args([str(word) for word in words]))

    def count(title: str, few: int, many: int, script: str, folder: str, *words: object) -> None:
        def stage(steps: int) -> None:
            run(script, *words, folder, root / f"{title}_{steps}", "--steps", steps)

        dispatches, kernels, waits = of_a_step(stage, few, many)
        print(f"| {title} | {dispatches:,.0f} | {kernels:,.0f} | {waits.total():.0f} |", flush=True)

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_dataset(root / "data", patients=12, slices_per_patient=1, size=256)
        table = ["--csv_file", root / "data" / "label.csv", "--img_dir", root / "data"]
        machine = ["--device", "cuda", "--precision", args.precision]
        common = [*machine, "--batch_size", args.batch_size, "--no_preflight"]
        common += ["--val_interval", 99, "--log_interval", 99]
        samples = ["--val_samples", 2, "--val_sampling_steps", 2]
        vae = ["--vae_checkpoint", root / "vae_2" / "vae_best.pth"]
        unet = ["--unet_checkpoint", root / "unet_2" / "unet_best.pth"]
        control = ["--controlnet_checkpoint", root / "controlnet_2" / "controlnet_best.pth"]
        latents = ["--latent_data_dir", root / "latents"]
        print("| a step | dispatches | kernels | waits |\n|---|---|---|---|")
        count("vae", 2, 5, "train_vae", "--save_dir", *table, *common, "--num_workers", 0)
        encoding = [*table, *vae, "--output_dir", root / "latents", "--num_workers", 0]
        run("encode_dataset", *encoding, "--device", "cpu")
        inputs = [*latents, *vae, *common, *samples]
        count("unet", 2, 5, "train_ldm_unet", "--save_dir", *inputs)
        count("controlnet", 2, 5, "train_controlnet", "--save_dir", *inputs, *unet)
        inputs = [*latents, *vae, *unet, *control, *machine, "--num_samples", 2]
        count("sample", 5, 20, "sample", "--output_dir", *inputs)


if __name__ == "__main__":
    main(parse_args())
