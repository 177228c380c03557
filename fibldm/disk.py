"""Files that are written whole or not at all; errors of the disk that name the file."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import DTypeLike

# What file systems answer that know no such call: Lustre without flock, CIFS, shared folders.
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK)
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


def write_secret(path: Path, text: str) -> None:
    """Write a text file that only its owner may read, whole or not at all."""

    def write(to: Path) -> None:
        with open(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(text.encode())

    if path.exists() and not path.is_file():  # /dev/null
        write(path)
    else:
        write_atomically(path, write)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made where absent; ValueError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing to it") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            _warn_once(
                f"{folder}: its file system has no locks ({error.strerror}): do not write to it "
                "from two processes at a time"
            )
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_once(
            f"{folder}: its file system cannot flush folders ({error.strerror}): a power cut may "
            "cost the newest files"
        )
    finally:
        os.close(handle)


@functools.cache
def _warn_once(text: str) -> None:
    print(f"WARNING: {text}", flush=True)


def replace_folder(partial: Path, folder: Path) -> None:
    """Let a finished folder appear, in the place of an older one, and survive a power cut."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    for path in partial.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


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


def lock(path: Path, seconds: float) -> TextIO:
    """Lock a file for as long as what is returned is open, at most until this process ends.

    BlockingIOError where another process holds it for so many seconds more, another OSError where
    the file system has no locks.
    """
    file, until = open(path, "w"), time.monotonic() + seconds  # noqa: SIM115 (the lock's life)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


class StoredRows:
    """An array in a .npy file whose rows are read, and written, when they are asked for.

    No memory map: where one's file is cut short, or its disk is full or fails, the process ends
    without a word (SIGBUS), and processes of several nodes that write to one page of it overwrite
    each other. Raises ValueError where the file is no array of numbers in C order, or shorter than
    its header says, or has become so.
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        self.path = path
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy raises anything on damaged headers
            size = path.stat().st_size if path.is_file() else 0
            raise ValueError(f"{path.name} of {size:,} bytes cannot be read: {error}") from error
        if not isinstance(found, np.memmap) or found.dtype.kind not in "fui" or not found.ndim:
            raise ValueError(f"{path.name}: expected an array of numbers")
        if not found.flags.c_contiguous:
            raise ValueError(f"{path.name}: its last axis is not the innermost")
        self.shape, self.dtype, self.ndim, self.start = (
            found.shape, found.dtype, found.ndim, found.offset,
        )  # fmt: skip
        self.file = open(path, "r+b" if writable else "rb", buffering=0)  # noqa: SIM115

    def __reduce__(self) -> tuple:  # another process opens the file anew
        return StoredRows, (self.path, self.file.writable())

    def __len__(self) -> int:
        return self.shape[0]

    def _places(self, index: Any, values: np.ndarray) -> Iterator[tuple[int, int, memoryview]]:
        """Of each row at the index: its number, where it is in the file, its bytes in `values`."""
        rows = np.arange(len(self))[index]
        flat = values.reshape(rows.size, math.prod(self.shape[1:])).view(np.uint8)
        for row, place in zip(rows.flat, flat, strict=True):
            yield int(row), self.start + int(row) * place.nbytes, memoryview(place)

    def __getitem__(self, index: int | slice | Sequence[int]) -> np.ndarray:
        values = np.empty((*np.arange(len(self))[index].shape, *self.shape[1:]), self.dtype)
        for row, at, place in self._places(index, values):
            done = 0
            with naming(self.path):
                while size := os.preadv(self.file.fileno(), [place[done:]], at + done):
                    done += size
            if done < len(place):
                raise ValueError(
                    f"{self.path}: row {row} is cut off ({done} of {len(place)} bytes): the file "
                    "became shorter while it was in use; copy it again, or encode again"
                )
        return values

    def __setitem__(self, index: int | slice | Sequence[int], values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self.dtype)
        for _, at, place in self._places(index, values):
            done = 0
            with naming(self.path):
                while done < len(place):
                    done += os.pwrite(self.file.fileno(), place[done:], at + done)

    def flush(self) -> None:
        with naming(self.path):
            os.fsync(self.file.fileno())


class PackedRows:
    """Masks (rows, ..., width), uint8 of 0 or 1, kept as bits: eight neighbours in a byte.

    `stored`: their bytes (rows, ..., width / 8, rounded up), uint8. Raises ValueError where it
    has another width.
    """

    def __init__(self, stored: StoredRows, width: int) -> None:
        self.stored, self.path, self.ndim = stored, stored.path, stored.ndim
        self.shape = (*stored.shape[:-1], width)
        if stored.dtype != np.uint8 or stored.shape[-1] != packed_size(width):
            raise ValueError(
                f"{self.path.name}: {stored.dtype} {stored.shape}; expected uint8, "
                f"{packed_size(width)} bytes for each line of {width} bits"
            )

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int | slice | Sequence[int]) -> np.ndarray:
        return np.unpackbits(self.stored[index], axis=-1, count=self.shape[-1])

    def __setitem__(self, index: int | slice | Sequence[int], values: np.ndarray) -> None:
        self.stored[index] = np.packbits(values, axis=-1)

    def flush(self) -> None:
        self.stored.flush()


def packed_size(width: int) -> int:
    """Bytes that this many bits take."""
    return -(-width // 8)


def create_rows(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> StoredRows:
    """A new .npy file of zeros; OSError where the disk has no room for it, before it is filled."""
    size, free = np.dtype(dtype).itemsize * math.prod(shape), shutil.disk_usage(path.parent).free
    if size > free:
        what = f"No space left on device for {size / 2**20:,.1f} MiB, {free / 2**20:,.1f} are free"
        raise OSError(errno.ENOSPC, what, str(path))
    with naming(path), open(path, "wb") as file:
        facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, facts)
        file.truncate(file.tell() + size)
    return StoredRows(path, writable=True)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
