"""How much a file may ask for, found in its header before anything is allocated.

A few bytes can claim, or decompress to, more than a machine has ("decompression bombs").
"""

import contextlib
import gzip
import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tifffile import TiffFile

SLICE = 2**26  # values of a slice: 8192 x 8192
VOLUME = 2**31  # values of a volume: 1024 x 1024 x 2048
SMALL = 2**29  # values that a file may hold however well it is compressed: 512 x 512 x 2048
RATIO = 200  # values of a byte of a larger file, at most: label maps compress far better than CT
TEXT = 2**28  # bytes of a table
SETTINGS = 2**24  # bytes of a JSON file
HEADER = 2**20  # bytes before the voxels of a NIfTI file
DEFLATED = 2**29  # bytes that a deflated DICOM file may inflate to
PIECE = 2**20
MAT_DEFLATED = 15  # a part's kind in a MATLAB 5 file
MAT_NUMBERS = range(6, 16)  # an array's class there: double to uint64
MAT_COMPLEX = 0x800  # an array's flag
MAT_OPAQUE = 17  # of another language, which SciPy skips
MAT_VALUES = {*range(1, 8), 9, 12, 13}  # kinds of its values: int8 to single, double, int64, uint64


class Bounded(io.BufferedReader):
    """A file object that allocates no more bytes than the file has, however many are asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.length = path.stat().st_size

    def read(self, size: int | None = -1) -> bytes:
        whole = size is None or size < 0
        return super().read(-1 if whole else min(size, self.length))


def require_values(path: Path, shape: Sequence[int], most: int) -> None:
    """ValueError where an array of this shape has more values than `most`, or than its file can
    plausibly hold, or a negative side.
    """
    shape = tuple(int(n) for n in shape)
    count = math.prod(shape)
    plausible = max(SMALL, RATIO * Path(path).stat().st_size)
    if min(shape, default=0) < 0 or count > min(most, plausible):
        raise ValueError(
            f"its header claims an array of {shape}, {count:,} values; expected at most "
            f"{min(most, plausible):,}: damaged, or made to fill the memory"
        )


def require_bytes(path: Path, most: int) -> None:
    """ValueError where a file is larger than `most`."""
    size = Path(path).stat().st_size
    if size > most:
        raise ValueError(f"{path}: {size:,} bytes, expected at most {most:,}")


def read_json(path: Path, most: int = SETTINGS) -> Any:
    """What a JSON file holds; ValueError where it is too large, too deep or no JSON."""
    require_bytes(path, most)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path}: brackets nested too deeply") from error


def require_stored(path: Path) -> None:
    """ValueError where a checkpoint is not as torch.save writes it.

    That is a ZIP file with uncompressed parts and right checksums. torch.load would also take older
    forms, parts that inflate, and bytes that were changed.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # what torch.load takes for another form
            raise ValueError("not a ZIP file, as torch.save writes them")
    try:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
            total = sum(part.file_size for part in parts)
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise ValueError("compressed parts, expected them as torch.save writes them")
            if total > path.stat().st_size:
                raise ValueError(f"parts of {total:,} bytes, more than the file has: they overlap")
            damaged = file.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error) as error:
        raise ValueError(f"not a ZIP file, as torch.save writes them: {error}") from error
    if damaged:
        raise ValueError(f"{damaged} in it is not as it was written (CRC-32)")


def require_tiff(path: Path, file: TiffFile, most: int) -> None:
    """ValueError where the first picture has more than `most` values."""
    len(file.pages)  # ends a circular chain of pages, which `series` would follow for ever
    require_values(path, file.series[0].shape, most)


def is_gzip(path: Path) -> bool:
    """By content: names may say otherwise."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def is_nifti(start: bytes) -> bool:
    """Whether a file that starts so is NIfTI in one file, gzipped or not."""
    if start[:2] == b"\x1f\x8b":
        try:
            start = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(start, 352)
        except zlib.error:
            return False
    return start[344:348] == b"n+1\0" or start[4:8] == b"n+2\0"


def require_gzip(path: Path) -> None:
    """ValueError where a gzipped file is not as it was packed: nibabel does not read its end."""
    with gzip.open(path, "rb") as file:
        try:
            while file.read(PIECE):
                pass
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"gzipped, and damaged: {error}") from error


def require_nifti(path: Path) -> None:
    """ValueError where a NIfTI header puts the voxels far behind itself.

    nibabel reads all bytes before the voxels, which could fill the memory.
    """
    with (gzip.open if is_gzip(path) else open)(path, "rb") as file:
        head = file.read(540)
    for order in "<", ">":
        if len(head) >= 348 and struct.unpack(f"{order}i", head[:4])[0] == 348:
            offset = struct.unpack(f"{order}f", head[108:112])[0]
        elif len(head) >= 540 and struct.unpack(f"{order}i", head[:4])[0] == 540:
            offset = struct.unpack(f"{order}q", head[168:176])[0]
        else:
            continue
        if not 0 <= offset <= HEADER:
            raise ValueError(f"its voxels start at byte {offset:g}, expected at most {HEADER:,}")


def _inflated(read: Callable[[int], bytes], size: int, wbits: int) -> Iterator[bytes]:
    """What `size` deflated bytes inflate to, piece by piece."""
    inflate = zlib.decompressobj(wbits)
    while size > 0 and not inflate.eof and (rest := read(min(size, PIECE))):
        size -= len(rest)
        while rest and not inflate.eof:
            yield inflate.decompress(rest, PIECE)
            rest = inflate.unconsumed_tail


def require_inflatable(deflated: bytes, most: int, wbits: int = -zlib.MAX_WBITS) -> None:
    """ValueError where deflated bytes, raw or as `wbits` says, inflate to more than `most`."""
    total = 0
    for piece in _inflated(io.BytesIO(deflated).read, len(deflated), wbits):
        total += len(piece)
        if total > most:
            raise ValueError(f"inflates to more than {most:,} bytes, expected less")


def require_mat(path: Path) -> set[bytes]:
    """The names of a MATLAB 5 file's complex arrays; ValueError where its headers contradict.

    SciPy would allocate the bytes that a header claims, whatever the array's shape, and it may
    crash on parts of another kind.
    """
    names = set()
    with open(path, "rb") as file:
        order = "<" if file.read(128)[126:] == b"IM" else ">"
        while len(tag := file.read(8)) == 8:
            kind, size = struct.unpack(f"{order}II", tag)
            end = file.tell() + size
            try:
                if kind == MAT_DEFLATED:
                    head = next(_inflated(file.read, size, zlib.MAX_WBITS), b"")
                else:
                    head = tag + file.read(min(size, PIECE))
                names |= _require_mat_array(head, order)
            except (zlib.error, struct.error) as error:
                raise ValueError(f"damaged: {error}") from error
            file.seek(end)
    return names


def _require_mat_array(head: bytes, order: str) -> set[bytes]:
    """Of an array's first bytes, its flags, shape, name and values: its name if it is complex."""

    def part(at: int) -> tuple[int, int, int, int]:
        """Kind, bytes, and where they are, of the part here; where the next one is."""
        kind, size = struct.unpack_from(f"{order}II", head, at)
        if kind >> 16:  # a few bytes, in the place of their number
            return kind & 0xFFFF, min(kind >> 16, 4), at + 4, at + 8
        return kind, size, at + 8, at + 8 + -(-size // 8) * 8

    (flags,) = struct.unpack_from(f"{order}I", head, 16)
    if flags & 0xFF == MAT_OPAQUE:
        return set()
    _, size, place, at = part(24)
    shape = struct.unpack_from(f"{order}{min(size // 4, 32)}i", head, place)
    _, size, place, at = part(at)
    name = head[place : place + size].rstrip(b"\0")
    if at > len(head):
        raise ValueError(f"damaged: a name of {size:,} bytes where {len(head) - place:,} are left")
    if flags & 0xFF not in MAT_NUMBERS:
        return set()
    kind, size, _, _ = part(at)
    most = 8 * math.prod(max(n, 0) for n in shape)
    if kind not in MAT_VALUES or size > most:
        raise ValueError(
            f"damaged: {size:,} bytes of kind {kind} for an array of {shape}; expected numbers of "
            f"at most {most:,} bytes"
        )
    return {name} if flags & MAT_COMPLEX else set()


def inside(name: str) -> bool:
    """Whether a path of a table stays below the folder that it is relative to."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of decoders, which raise anything on damaged files, the file's name."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: cannot be decoded as an image: {error}") from error


def require_one_frame(count: int) -> None:
    if count != 1:
        raise ValueError(
            f"{count} frames, expected one slice; scripts/prepare_data.py makes slices of DICOM "
            "files with several"
        )
