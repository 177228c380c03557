"""Files that outlive a process: written whole or not at all, read without running code in them.

`*_best.pth` rebuilds a model for inference; `last.pth` holds a training's whole state.
"""

import functools
import hashlib
import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from importlib import metadata
from pathlib import Path
from reprlib import repr as short
from typing import Any, Protocol, TypeVar

import safetensors.torch
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fibldm import disk
from fibldm.limits import require_stored

VERSION = 1
LARGEST, MOST_BLOCKS = 2**12, 64  # sizes, and blocks of a resolution, in a network's config
MOST_PIXELS = 128  # of a latent's side: a config with more would take minutes to build
SPARE = 2**24  # numbers that building a model may take beyond its file's bytes
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
Model = TypeVar("Model", bound=nn.Module)


class Stateful(Protocol):
    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> Any: ...


def save(path: str | Path, content: dict) -> None:
    """Write plain types and tensors to a temporary file beside `path`, flush it, rename it.

    Equal content gives equal bytes, whether or not a part of it was loaded from a file before.
    """
    path, plain = Path(path), _plain(content)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            try:
                torch.save(plain, file)
            except RuntimeError as error:  # its own, after a write that failed
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    disk.write_atomically(path, write)
    disk.sync_folder(path.parent)


def _plain(value: Any) -> Any:
    """The same content, each string one object: a pickle tells equal strings of two apart."""
    if isinstance(value, dict):
        return {_plain(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(part) for part in value)
    return sys.intern(value) if type(value) is str else value


class Content(dict):
    """What a checkpoint holds; a name that it lacks is a ValueError with the file's name."""

    def __init__(self, path: Path, content: dict) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.path}: {name} is missing in it; damaged, or of another version")


def load(path: str | Path, kind: str) -> dict:
    """Read what `save` wrote; raise ValueError if it is missing, damaged or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a {kind} checkpoint")
    try:
        if path.suffix == WEIGHTS_ALONE:
            content = _load_weights(path)
        else:
            require_stored(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can lead to any
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({path.stat().st_size} bytes; truncated, "
            f"damaged, or not written by FibLDM): {reason}"
        ) from error
    if not isinstance(content, dict) or not {"kind", "version"} <= content.keys():
        raise ValueError(f"{path}: not a FibLDM checkpoint (no kind and version in it)")
    found, version = content["kind"], content["version"]
    if not _is_text(found) or found != kind:
        raise ValueError(f"{path}: expected a {kind} checkpoint, found kind {short(found):.200}")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"{path}: written by a newer FibLDM: format {short(version):.80}, this one reads up to "
            f"{VERSION}"
        )
    for name, (right, expected) in FACTS.items():
        if name in content and not right(content[name]):
            found = f"{short(content[name]):.200}"
            raise ValueError(f"{path}: its {name} is {found}, expected {expected}")
    content = Content(path, content)
    if "lineage" in content:
        content["lineage"] = Content(path, content["lineage"])
    return content


# Weights for others: safetensors, with all else that a model's checkpoint says as JSON.

WEIGHTS_ALONE = ".safetensors"


def export_weights(path: str | Path, kind: str, output: Path) -> dict:
    """Write a model's checkpoint as safetensors; return what it says besides the weights.

    What could name patients or this machine's paths is left out: the environment.
    """
    content = load(path, kind)
    state = {name: tensor.contiguous() for name, tensor in content["state"].items()}
    facts = {n: v for n, v in content.items() if n not in ("state", "environment")}
    facts |= {"lineage": dict(content["lineage"]), "sha256": source_hash(path)}
    facts["weights_sha256"] = _weights_hash(state)
    content = safetensors.torch.save(state, {"fibldm": json.dumps(facts)})
    disk.write_atomically(output, lambda temporary: temporary.write_bytes(content))
    return facts


def _load_weights(path: Path) -> dict:
    """What `export_weights` wrote, as a checkpoint; ValueError where the weights changed since."""
    with safetensors.safe_open(path, framework="pt") as file:
        content = json.loads((file.metadata() or {}).get("fibldm", "{}"))
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not isinstance(content, dict) or content.get("weights_sha256") != _weights_hash(state):
        raise ValueError("its weights are not as they were written (SHA-256)")
    return {**content, "state": state}


def _weights_hash(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source_hash(path: str | Path) -> str:
    """The SHA-256 by which lineage names a model's file; exported weights keep that of theirs."""
    path = Path(path)
    if path.suffix == WEIGHTS_ALONE and path.is_file():
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return str(json.loads(file.metadata()["fibldm"])["sha256"])
        except Exception as error:  # damaged, or another's
            raise ValueError(f"{path}: not exported by scripts/export_weights.py") from error
    return disk.file_hash(path)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are(right: Callable[[object], bool], kind: type, value: object) -> bool:
    """Whether a value is a list whose items, or a dict of names whose values, are all right."""
    if isinstance(value, dict) and not all(map(_is_text, value)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, kind) and all(map(right, items))


def _is_number(value: object, most: float = LARGEST) -> bool:
    return isinstance(value, int | float) and 0 <= value <= most


def _is_size(value: object, most: int = LARGEST) -> bool:
    """A number of a network's config, or several: with larger ones building it might never end."""
    if isinstance(value, list | tuple):
        return len(value) <= MOST_BLOCKS and all(_is_number(part, most) for part in value)
    return _is_number(value, most)


def _is_config(value: object) -> bool:
    if not _are(_is_size, dict, value) or not _is_size(value.get("blocks", 0), MOST_BLOCKS):
        return False
    sides = value.get("image_size", 0), value.get("latent_size", LARGEST)
    return all(map(_is_number, sides)) and sides[0] <= MOST_PIXELS * sides[1]


def _is_window(value: object) -> bool:
    two = isinstance(value, list | tuple) and len(value) == 2
    numbers = two and all(isinstance(end, int | float) and math.isfinite(end) for end in value)
    return numbers and value[0] < value[1]


def _is_split(value: object) -> bool:
    names = ("seed", "val_fraction", "test_fraction")
    if not isinstance(value, dict) or not set(value) <= set(names):
        return False
    seed, *fractions = (value.get(name, 0) for name in names)
    return isinstance(seed, int) and all(_is_number(part, 1) for part in fractions)


def _is_weight(value: object) -> bool:
    """A tensor as `save_model` writes it, with a value of its own for each element."""
    plain = torch.is_tensor(value) and value.layout == torch.strided
    return plain and not value.is_meta and not value.is_complex()


# What a checkpoint's parts must look like, where it has them.
FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "config": (_is_config, f"sizes to {LARGEST:,}, at most {MOST_BLOCKS} blocks"),
    "lineage": (lambda v: _are(_is_text, dict, v), "hashes by name"),
    "window": (_is_window, "two HU, the lower first"),
    "classes": (lambda v: _are(_is_text, list, v), "a list of names"),
    "split": (_is_split, "a seed and two fractions"),
    "state": (lambda v: _are(_is_weight, dict, v), "tensors by name"),
    "states": (lambda v: _are(lambda part: isinstance(part, dict), dict, v), "states by name"),
    "pixel_spacing": (lambda v: v is None or (_is_number(v) and v > 0), "mm above 0"),
    "contour_style": (lambda v: v is None or _is_text(v), "a name"),
}


def save_model(path: str | Path, model: nn.Module, lineage: dict[str, str], **facts: Any) -> None:
    """Write a model for inference: its kind, constructor config, weights, lineage and facts.

    `lineage` maps each file that the model came from to its hash; `facts` are what inference
    needs besides weights (HU window, split, class names).
    """
    content = {"version": VERSION, "kind": model.kind, "config": model.config, "lineage": lineage}
    content["environment"] = environment()
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    save(path, {**content, **facts, "state": state})


class Allowance(TorchFunctionMode):
    """Stops the building of a model whose config asks for more numbers than its file can hold."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.left = numbers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FACTORIES:
            size = args[0] if args and isinstance(args[0], list | tuple) else args
            self.left -= math.prod(n for n in size if isinstance(n, int))
            if self.left < 0:
                raise ValueError("the config asks for more weights than the file has")
        return func(*args, **(kwargs or {}))


def load_model(path: str | Path, model_class: type[Model], *parts: Any) -> tuple[Model, dict]:
    """Rebuild what `save_model` wrote, frozen and in eval mode; also return the file's content.

    `parts` are positional constructor arguments that are no plain values (a ControlNet's U-Net).
    """
    content = load(path, model_class.kind)
    config, state = content["config"], content["state"]
    try:
        with Allowance(Path(path).stat().st_size + SPARE):
            model = model_class(*parts, **config)
        for name, tensor in model.state_dict().items():
            if name not in state or state[name].shape != tensor.shape:
                found = tuple(state[name].shape) if name in state else "absent"
                raise ValueError(f"{name} is {found}, expected {tuple(tensor.shape)}")
        model.load_state_dict(state)
    except Exception as error:  # a network of other numbers can raise any
        raise ValueError(
            f"{path}: its weights do not fit a {model_class.__name__} built from its config "
            f"{config}; it comes from another version: {str(error)[:500]}"
        ) from error
    return model.requires_grad_(False).eval(), content


def require_equal(what: str, found: object, expected: object, remedy: str) -> None:
    """Raise ValueError naming both values where they differ."""
    if found != expected:
        raise ValueError(f"{what}: found {found}, expected {expected}; {remedy}")


def read_start(
    path: str | Path, model: Model, lineage: dict, split: dict | None, window: Sequence[float],
    free: Collection[str] = (),
) -> tuple[Model, dict, list[str]]:  # fmt: skip
    """A model trained before, whose weights another of its kind may start from.

    Returns it, its file's content, and what to warn of. `lineage` and `split` are those of the data
    to train on. ValueError where its HU window or its config is another, but for the names in
    `free`, or where it was trained on the same table by another split: it has seen patients who are
    held out now.
    """
    trained, content = load_model(path, type(model))
    remedy, before = "repeat the options that it was trained with", content["lineage"]
    for name, value in trained.config.items():
        if name not in free:
            require_equal(f"{path}: its {name}", value, model.config[name], remedy)
    require_equal(f"{path}: its window", list(content["window"]), list(window), remedy)
    same_table = before.get("label_csv") == lineage["label_csv"]
    same_vae = before.get("vae") == lineage.get("vae")  # whose split all later stages have
    if same_table and "split" in content:
        require_equal(f"{path}: its split", content["split"], split, remedy)
    warnings = []
    if not (same_table and ("split" in content or same_vae)):
        what = f"{path} was trained on another table, or by another split"
        warnings.append(f"{what}: its patients must not be among the held-out ones here")
    if not same_vae:
        warnings.append(f"{path} was trained on latents of another VAE, and has to learn these")
    return trained, content, warnings


def save_training(
    path: str | Path, kind: str, components: dict[str, Stateful], lineage: dict, **progress: Any
) -> None:
    """Write a training's whole state: each component's, lineage, and plain progress."""
    states = {name: component.state_dict() for name, component in components.items()}
    content = {"version": VERSION, "kind": kind, "lineage": lineage, "states": states}
    content["environment"] = environment()
    save(path, {**content, **progress})


def load_training(
    path: str | Path,
    kind: str,
    components: dict[str, Stateful],
    lineage: dict,
    unchecked: Collection[str] = (),
) -> dict:
    """Restore each component from what `save_training` wrote; return the file's content.

    What differs in the lineage is refused, but for the names in `unchecked`.
    """
    content = load(path, kind)
    before = content.get("lineage", {})
    for name in {**lineage, **before}.keys() - set(unchecked):
        require_equal(
            f"{path}: the SHA-256 of its {name}",
            before.get(name),
            lineage.get(name),
            "the input changed since this run began; train into another --save_dir",
        )
    found = sorted(content.get("states", {}))
    require_equal(f"{path}: its parts", found, sorted(components), "it belongs to other options")
    for name, component in components.items():
        try:
            component.load_state_dict(content["states"][name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: its {name} does not fit the one that these options build"
                f"{', nor its precision this --precision' * (name == 'scaler')}: {error}"
            ) from error
    return content


PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "pillow", "pydicom")
PACKAGES += ("nibabel", "torchmetrics", "lpips")


@functools.cache
def environment() -> dict:
    """Versions, git commit, command line and GPUs of this process, as plain types."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "command": shlex.join(sys.argv),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if gpus else None,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
        "threads": torch.get_num_threads(),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of this code, with "+changes" where files differ from it; None without git."""
    here = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=30
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")
