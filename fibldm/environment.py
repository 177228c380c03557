"""What a result was computed with, so that it can be computed again: kept in every file."""

import functools
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

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
