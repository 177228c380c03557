"""The files below folders, each once, and what is left out and why."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fibldm import limits

SUFFIXES = (
    *(".nii.gz", ".nii", ".dcm", ".dicom", ".ima", ".png", ".tif", ".tiff"),
    *(".npy", ".npz", ".mat", ".jpg", ".jpeg", ".gif", ".bmp"),
)


@dataclass(frozen=True)
class LeftOut:
    """A file, slice or series that is not used, and why: "what: details"."""

    where: str
    reason: str


def find_files(
    inputs: Sequence[Path], exclude: Path
) -> tuple[list[tuple[Path, Path]], list[LeftOut]]:
    """All files below the inputs, each once and with its input's folder; absolute paths.

    Hidden files, what lies below `exclude`, and earlier outputs of prepare_data.py are not among
    them; folders that may not be read are left out. ValueError for an input that is missing.
    """
    found: dict[Path, tuple[Path, Path]] = {}  # links resolved -> path, input
    left_out: list[LeftOut] = []
    for top in (Path(os.path.abspath(top)) for top in inputs):
        if top.is_file():
            found.setdefault(top.resolve(), (top, top.parent))
            continue
        if not top.is_dir():
            raise ValueError(f"{top}: no such file or folder")

        def refuse(error: OSError) -> None:
            left_out.append(LeftOut(str(error.filename), f"cannot be opened: {error.strerror}"))

        visited = {exclude.resolve()}  # also what links lead back to
        hidden: list[Path] = []
        for name, folders, names in os.walk(top, onerror=refuse, followlinks=True):
            folder = Path(name)
            is_output = folder != top and json_object(folder / "dataset.json").get("key_check")
            if is_output:
                left_out.append(LeftOut(name, "an output of prepare_data.py"))
            if is_output or folder.resolve() in visited:
                folders.clear()
                continue
            visited.add(folder.resolve())
            hidden += [folder / name for name in (*folders, *names) if name.startswith(".")]
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (folder / name for name in sorted(names) if not name.startswith(".")):
                if path.is_file():
                    found.setdefault(path.resolve(), (path, top))
        if hidden:
            what = f"hidden: {len(hidden)} files and folders, as {hidden[0].name}"
            left_out.append(LeftOut(str(hidden[0].parent), what))
    return list(found.values()), left_out


def stem(path: Path) -> str:
    """The file's name without the suffix of its format: no other part of a dotted name is one."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def natural(name: str) -> list:
    """Sorts slice_10 behind slice_9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def json_object(path: Path) -> dict:
    """A JSON file's object; empty where there is none."""
    try:
        content = limits.read_json(path) if path.is_file() else {}
    except (OSError, ValueError):
        content = {}
    return content if isinstance(content, dict) else {}
