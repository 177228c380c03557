"""Files that are there whole or not at all; what the disk says comes with the file's name."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

TEMPORARY = ".tmp_"  # what a file's name begins with until it is whole


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the disk the file's name, which they lack while it is read or written."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        number, what = error.errno or errno.EIO, error.strerror or str(error)
        raise OSError(number, what, str(path)) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file with the same suffixes, then rename it to `path`."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with naming(path):
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:  # a full disk needs the room
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, and survive a power cut."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep(path: Path, as_path: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    temporary = as_path.with_name(f"{TEMPORARY}{as_path.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, as_path)
    temporary.unlink(missing_ok=True)  # a rename to a name of the same file does nothing


def create_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file, mapped, for which the disk has room: the whole is taken at once.

    Else writing through the map would end the process without a word (SIGBUS) once the disk is
    full. Raises OSError where it is.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    size = path.stat().st_size
    try:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        path.unlink()
        what = f"{error.strerror} for {size / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free"
        raise OSError(error.errno, what, str(path)) from error
    return array
