"""Sends the numbers of a run's log to Weights & Biases: --wandb, by an optional package."""

import importlib
import os
import secrets
from pathlib import Path
from types import ModuleType
from typing import Any

from fibldm.disk import replace_text


def require_wandb() -> ModuleType:
    """The package; ValueError where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"--wandb needs a package that is not installed: pip install wandb ({error})"
        ) from error


def track(folder: Path, project: str, settings: dict[str, Any]) -> Any:
    """Begin to send what is written to TensorBoard from now on; `.finish()` of the result ends it.

    A run that goes on is the same one there: its id lies in the folder. Pictures are not written
    to TensorBoard meanwhile, since they show patients, and what is printed is not sent.
    ValueError where it cannot begin.
    """
    wandb, file = require_wandb(), folder / "wandb_id"
    if not file.is_file():
        replace_text(file, f"{secrets.token_hex(8)}\n")
    os.environ.setdefault("WANDB_CONSOLE", "off")
    try:
        return wandb.init(
            project=project, id=file.read_text().strip(), resume="allow", name=folder.name,
            dir=str(folder), config=settings, sync_tensorboard=True,
        )  # fmt: skip
    except Exception as error:
        raise ValueError(
            f"--wandb {project}: {error}; log in by `wandb login`, or set WANDB_MODE=offline"
        ) from error
