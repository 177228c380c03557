"""Read damaged and hostile files: a clear error or a right answer, no hang, no flood of memory.

    python benchmarks/fuzz.py --inputs 10000

Each input is a small valid file, changed by a generator that its number seeds, so that one can be
looked at again: --only FORMAT --input NUMBER shows what it leads to.
"""

import argparse
import contextlib
import gzip
import io
import json
import logging
import os
import resource
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import h5py
import imagecodecs
import nibabel
import numpy as np
import scipy.io
import tifffile
import torch
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm import checkpoint, ct, disk, export, headers, tables, volumes
from fibldm.config import read_settings
from fibldm.encoding import LatentDataset
from fibldm.tables import SPLITS, Row, Split
from fibldm.vae import VAE

MEMORY = 2**31  # bytes of address space that one input may take beyond what the process has
SECONDS = 10  # that one input may take
SIZE = 24  # pixels of the files' sides
OUTCOMES = ("answered", "refused", "other error", "hung", "out of memory", "died")
SHOWN = 5
BOMBS = 10  # of a format, at most: its first inputs


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="of each format")
    parser.add_argument("--only", choices=FORMATS, help="one format")
    parser.add_argument("--input", type=int, help="one input, with the traceback of its error")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    return parser.parse_args(argv)


# Valid files, of which inputs are made.


def slice_hu() -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE]
    return (-900 + 30 * x + 5 * y).astype(np.int16)


def saved(write: Callable[[Path], object], suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        write(path)
        return path.read_bytes()


def of_slice(file_format: str) -> bytes:
    image = ct.hu_to_unit(slice_hu())
    write = lambda path: export.write_slice(path, image, ct.DEFAULT_WINDOW, file_format)  # noqa: E731
    return saved(write, export.SUFFIXES[file_format])


def of_array(write: Callable[[io.BytesIO, np.ndarray], object], array: np.ndarray) -> bytes:
    file = io.BytesIO()
    write(file, array)
    return file.getvalue()


def jpeg2k(stored: np.ndarray) -> bytes:
    return imagecodecs.jpeg2k_encode(stored, level=0, codecformat="j2k", reversible=True)


CODECS: dict[str, Callable[[np.ndarray], bytes]] = {
    uid.JPEGLosslessSV1: lambda stored: imagecodecs.ljpeg_encode(stored, bitspersample=16),
    uid.JPEGLSLossless: imagecodecs.jpegls_encode,
    uid.JPEG2000Lossless: jpeg2k,
}


def compressed_dicoms() -> list[bytes]:
    """By run lengths, and by each of CODECS."""
    files = []
    for syntax in (uid.RLELossless, *CODECS):
        dataset = export.synthetic_dicom(slice_hu(), ct.DEFAULT_WINDOW, 1.0, "x", "run", 0, "")
        if syntax in CODECS:
            stored = (slice_hu() + 1024).astype(np.uint16)
            dataset.PixelRepresentation, dataset.RescaleIntercept = 0, -1024
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset.PixelData = encapsulate([CODECS[syntax](stored)])
            dataset["PixelData"].is_undefined_length = True
        else:
            dataset.compress(syntax)
        write = lambda path, of=dataset: of.save_as(path, enforce_file_format=True)  # noqa: E731
        files.append(saved(write, ".dcm"))
    return files


def checkpoints() -> list[bytes]:
    vae = VAE(16, 4, 2, base_channels=4, blocks=1)
    facts = {"window": [-1000.0, 400.0], "split": {"seed": 0, "val_fraction": 0.1}, "step": 1}
    facts["lineage"] = {"label_csv": "a" * 64}
    model = saved(lambda path: checkpoint.save_model(path, vae, **facts), "")
    state = saved(lambda path: checkpoint.save_training(path, "t", {"vae": vae}, {}, step=1), "")
    return [model, state]


LINES = [f"a_{i}.png,c_{i}.png,p{i},fibrosis,{'val' if i < 2 else 'train'}" for i in range(9)]
TABLE = "image,contour,patient_id,label,split\n" + "\n".join(LINES) + "\n"
FACTS = '{"rescale_slope": 1.0, "rescale_intercept": -1024.0, "pixel_spacing": 0.7}'


def pictures() -> list[bytes]:
    stored = (slice_hu() + 1024).astype(np.uint16)
    mask = (slice_hu() > 0).astype(np.uint8) * 255
    png = lambda file, array: Image.fromarray(array).save(file, "PNG")  # noqa: E731
    return [of_array(png, stored), of_array(png, mask), of_array(png, np.stack([mask] * 3, 2))]


# How they are read: (file as it lies there) -> nothing, or ValueError.


def read_slice(path: Path) -> None:
    hu = ct.read_hu(path, (1.0, -1024.0))
    assert hu.ndim == 2 and hu.dtype == np.float32 and np.isfinite(hu).all()


def read_picture(path: Path) -> None:
    with contextlib.suppress(ValueError):
        mask = ct.read_contour(path)
        assert mask.ndim == 3 and mask.dtype == bool
    read_slice(path)


def read_dicom(path: Path) -> None:
    with contextlib.suppress(ValueError):
        headers.read_headers(path)
    read_slice(path)


def read_array(path: Path) -> None:
    assert volumes.read_volume(path).values.ndim == 3


def read_checkpoint(path: Path) -> None:
    with contextlib.suppress(ValueError):
        vae = VAE(16, 4, 2, base_channels=4, blocks=1)
        checkpoint.load_training(path, "t", {"vae": vae}, {})
    _, content = checkpoint.load_model(path, VAE)
    assert len(content["window"]) == 2
    assert all(isinstance(digest, str) for digest in content["lineage"].values())


def read_table(path: Path) -> None:
    rows, _ = tables.read_table(path, path.parent, Split())
    assert all(isinstance(row, Row) and row.split in SPLITS for row in rows)


def table(folder: Path) -> list[bytes]:
    """A label.csv whose files are there."""
    for i in range(9):
        for name in "a", "c":
            (folder / f"{name}_{i}.png").touch()
    return [TABLE.encode()]


def read_json(path: Path) -> None:
    with contextlib.suppress(ValueError):
        read_settings(path)
    os.replace(path, path.parent / "dataset.json")
    ct.read_dataset_info(path.parent)


def read_latents(path: Path) -> None:
    """The input is one of the files of a latent data set, which its first byte chooses."""
    folder = path.parent / "latents"
    content = path.read_bytes()
    names = sorted(file.name for file in folder.iterdir())
    kept = folder / names[(content or b"\0")[0] % len(names)]
    before = kept.read_bytes()
    try:
        kept.write_bytes(content[1:])
        LatentDataset(folder).lineage(path.parent / "vae.pth")
    finally:
        kept.write_bytes(before)


def latents(folder: Path) -> list[bytes]:
    """A latent data set in the folder, and its files as inputs."""
    place = folder / "latents"
    place.mkdir(exist_ok=True)
    np.save(place / "latents.npy", np.zeros((6, 2, 4, 4), np.float32))
    np.save(place / "contours.npy", np.zeros((6, 1, 16, 2), np.uint8))  # bits of 16 x 16 pixels
    np.save(place / "heldout_images.npy", np.zeros((2, 1, 16, 16), np.float32))
    lines = [f"{i},a_{i}.png,p{i},,{'val' if i < 2 else 'train'},0" for i in range(6)]
    table = "row,image,patient_id,label,split,view\n" + "\n".join(lines) + "\n"
    (place / "manifest.csv").write_text(table)
    (folder / "vae.pth").write_bytes(b"a VAE")
    meta = {"window": [-1000, 400], "latent_scale": 0.18215, "classes": []}
    meta |= {"contour_bits": True, "contour_shape": [6, 1, 16, 16]}
    meta |= {f"{n}_sha256": "a" * 64 for n in ("latents", "contours", "label_csv")}
    meta["vae_sha256"] = disk.file_hash(folder / "vae.pth")
    (place / "meta.json").write_text(json.dumps(meta))
    files = sorted(place.iterdir())
    return [bytes([i]) + file.read_bytes() for i, file in enumerate(files)]


def archive(file: io.BytesIO, array: np.ndarray) -> None:
    np.savez_compressed(file, volume=array)


VOLUME = np.stack([slice_hu()] * 3)


def matlab_files() -> list[bytes]:
    """Of MATLAB 5, deflated and not; of MATLAB 4, which has no volumes."""
    found = []
    for version, deflated, array in (
        ("5", True, VOLUME),
        ("5", False, VOLUME),
        ("4", False, VOLUME[0]),
    ):
        file = io.BytesIO()
        content = {"volume": array.astype(np.float64), "note": "x" * 40}
        scipy.io.savemat(file, content, format=version, do_compression=deflated)
        found.append(file.getvalue())
    return found


def hdf5_files() -> list[bytes]:
    """Of MATLAB 7.3: deflated in chunks, and as it is."""
    found = []
    for options in {"compression": "gzip"}, {}:
        file = io.BytesIO()
        with h5py.File(file, "w") as content:
            content.create_dataset("volume", data=VOLUME, **options)
        found.append(file.getvalue())
    return found


FORMATS: dict[str, tuple[str, Callable[[Path], list[bytes]], Callable[[Path], None]]] = {
    "checkpoint": (".pth", lambda _: checkpoints(), read_checkpoint),
    "npy": (".npy", lambda _: [of_slice("npy"), of_array(np.save, slice_hu())], read_slice),
    "csv": (".csv", table, read_table),
    "dicom": (".dcm", lambda _: [of_slice("dicom"), *compressed_dicoms()], read_dicom),
    "png": (".png", lambda _: pictures(), read_picture),
    "nifti": (".nii.gz", lambda _: [of_slice("nifti")], read_slice),
    "tiff": (".tif", lambda _: [of_array(tifffile.imwrite, slice_hu())], read_slice),
    "npz": (".npz", lambda _: [of_array(archive, VOLUME)], read_array),
    "mat": (".mat", lambda _: matlab_files(), read_array),
    "hdf5": (".mat", lambda _: hdf5_files(), read_array),
    "json": (".json", lambda _: [FACTS.encode()], read_json),
    "latents": (".bin", latents, read_latents),
}


# What is done to them.


def bombs(name: str) -> list[bytes]:
    """Files of a few KB that claim, or inflate to, gigabytes."""
    if name == "npy":
        header = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d), }"
        return [
            b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 64
            for text in ((header % (n, n)).encode().ljust(118) for n in (10**5, 10**9))
        ]
    if name == "nifti":
        volume = nibabel.Nifti1Header()
        volume.set_data_shape((30000, 30000, 30000))
        volume["dim"][1:4] = 30000
        volume["vox_offset"] = 352
        far = volume.copy()
        far["vox_offset"] = 2e9
        return [gzip.compress(h.binaryblock + b"\0" * 2**25) for h in (volume, far)]
    if name == "png":
        side = 60_000
        chunks = [(b"IHDR", side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0]))]
        chunks += [(b"IDAT", zlib.compress(b"\0" * 2**25, 9)), (b"IEND", b"")]
        parts = [
            len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
            for kind, body in chunks
        ]
        text = zlib.compress(b"a" * 2**28, 9)
        body = b"zTXt" + b"note\0\0" + text
        chunk = len(body[4:]).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        small = pictures()[0]
        return [b"\x89PNG\r\n\x1a\n" + b"".join(parts), small[:33] + chunk + small[33:]]
    if name == "npz":
        file = io.BytesIO()
        text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4096, 4096, 4096), }".ljust(118)
        content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 2**25
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("volume.npy", content)
        dense = io.BytesIO()
        with zipfile.ZipFile(dense, "w", zipfile.ZIP_BZIP2) as packed:  # inflated without a limit
            packed.writestr("volume.npy", content + b"\0" * 2**26)
        return [file.getvalue(), dense.getvalue()]
    if name == "mat":
        file = io.BytesIO()
        scipy.io.savemat(file, {"volume": np.zeros((64, 64))})
        small, size, many = file.getvalue(), 64 * 64 * 8, 2**30
        at = small.find(struct.pack("<II", 9, size))  # where the values are said to be so many
        packer = zlib.compressobj(9)
        body = packer.compress(struct.pack("<II", 14, many) + small[136:at])
        body += packer.compress(struct.pack("<II", 9, many))
        body += b"".join(packer.compress(b"\0" * 2**24) for _ in range(many // 2**24))
        body += packer.flush()
        dimensions = small.find(struct.pack("<iii", 8, 64, 64)) + 4
        claims = small[:dimensions] + struct.pack("<ii", 10**5, 10**5) + small[dimensions + 8 :]
        return [small[:128] + struct.pack("<II", 15, len(body)) + body, claims]
    if name == "hdf5":
        file, claims = io.BytesIO(), io.BytesIO()
        deflate = {"compression": "gzip", "compression_opts": 9}
        most = {"maxshape": (None, None), **deflate}
        with h5py.File(file, "w") as content:
            made = content.create_dataset("volume", (64, 64), "u1", chunks=(2**14, 2**14), **most)
            made[:] = 1
        with h5py.File(claims, "w") as content:  # without a chunk: all is the fill value
            content.create_dataset("volume", (10**5, 10**5), "f8", chunks=(64, 64), **most)
        inflates = io.BytesIO()
        with h5py.File(inflates, "w") as content:
            made = content.create_dataset(
                "volume", (64, 64, 64), "u1", chunks=(64, 64, 64), **deflate
            )
            packer = zlib.compressobj(9)
            body = b"".join(packer.compress(b"\0" * 2**24) for _ in range(64)) + packer.flush()
            made.id.write_direct_chunk((0, 0, 0), body)
        return [file.getvalue(), claims.getvalue(), inflates.getvalue()]
    if name == "checkpoint":
        file = io.BytesIO()
        before = zipfile.ZipFile(io.BytesIO(checkpoints()[0]))
        with before, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for part in before.infolist():
                packed.writestr(part.filename, before.read(part) + b"\0" * 2**22)
        config = {"image_size": 2**12, "latent_size": 2**10, "base_channels": 2**12}
        content = torch.load(io.BytesIO(checkpoints()[0]), weights_only=True)
        wide, deep = io.BytesIO(), io.BytesIO()
        torch.save(content | {"config": content["config"] | config}, wide)
        torch.save(content | {"config": content["config"] | {"blocks": 2**16}}, deep)
        laughs = ["lol"]
        for _ in range(40):  # few bytes, since each list is stored once; 10**40 words in print
            laughs = [laughs] * 10
        endless = []
        for name in "kind", "version", "config", "lineage", "window":
            endless.append(io.BytesIO())
            torch.save(content | {name: laughs}, endless[-1])
        return [part.getvalue() for part in (file, wide, deep, *endless)]
    if name == "dicom":
        dataset = export.synthetic_dicom(slice_hu(), ct.DEFAULT_WINDOW, 1.0, "x", "run", 0, "")
        dataset.Rows = dataset.Columns = 65535
        claims = saved(lambda path: dataset.save_as(path, enforce_file_format=True), ".dcm")
        dataset.Rows = dataset.Columns = SIZE
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
        dataset.ImageComments = "x"
        inflates = saved(lambda path: dataset.save_as(path, enforce_file_format=True), ".dcm")
        start = 144 + int.from_bytes(inflates[140:144], "little")
        packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        body = b"".join(packer.compress(b"\0" * 2**24) for _ in range(40)) + packer.flush()
        far = inflates.find(b"\x02\x00\x10\x00")  # the transfer syntax, behind much else
        padding = b"\x02\x00\x03\x00UI" + (60_000).to_bytes(2, "little") + b"1" * 60_000
        padded = inflates[:far] + padding + inflates[far:start]
        coded = compressed_dicoms()[-1]  # JPEG 2000, whose own header claims more
        at = coded.find(b"\xff\x4f\xff\x51") + 8
        claims_within = coded[:at] + (60_000).to_bytes(4, "big") * 2 + coded[at + 8 :]
        return [claims, inflates[:start] + body, padded + body, claims_within]
    if name == "json":
        return [b"[" * 10**6, b'{"a":' * 10**5, b"0" * 2**25]
    return []


def change(content: bytes, others: list[bytes], generator: np.random.Generator) -> bytes:
    """One to four changes of a file's bytes."""
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 5))):
        at = int(generator.integers(0, len(data) + 1))
        if generator.random() < 0.5:
            at = min(at, int(generator.integers(0, 400)))  # headers decide most
        run = int(2 ** generator.uniform(0, 8))
        match int(generator.integers(0, 9)):
            case 0:
                data = data[:at]
            case 1 if at < len(data):
                data[at] ^= 1 << int(generator.integers(0, 8))
            case 2:
                data[at : at + run] = generator.bytes(len(data[at : at + run]))
            case 3:
                data[at:at] = generator.bytes(run)
            case 4:
                del data[at : at + run]
            case 5:
                data[at:at] = data[at : at + run] * int(generator.integers(1, 20))
            case 6:
                other = others[int(generator.integers(0, len(others)))]
                data[at:] = other[int(generator.integers(0, len(other) + 1)) :]
            case 7:
                width = int(generator.choice([1, 2, 4, 8]))
                number = int(generator.choice([0, -1, 1, 2**31 - 1, -(2**31), 2**15, 2**24]))
                number &= 2 ** (8 * width) - 1
                order = "little" if generator.random() < 0.5 else "big"
                data[at : at + width] = number.to_bytes(width, order)
            case 8:
                words = [b"nan", b"-1", b"1e309", b"9" * 30, b"\0", b'"', b",", b"../x", b"\xff"]
                data[at:at] = words[int(generator.integers(0, len(words)))]
        if not data:
            break
    return bytes(data)


def make_input(name: str, number: int, files: list[bytes], special: list[bytes]) -> bytes:
    if number < len(special):
        return special[number]
    generator = np.random.default_rng([number, *name.encode()])
    if generator.random() < 0.02:
        return generator.bytes(int(generator.integers(0, 2000)))
    content = files[number % len(files)]
    if name == "checkpoint" and generator.random() < 0.5:
        return change_part(content, generator)
    return change(content, files, generator)


def change_part(content: bytes, generator: np.random.Generator) -> bytes:
    """A checkpoint one of whose parts is changed, most often the pickle, with a checksum that fits:
    what a person who means harm would make.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(file, "w") as after:
        names = before.namelist()
        pickled = next(name for name in names if name.endswith("data.pkl"))
        changed = pickled if generator.random() < 0.8 else str(generator.choice(names))
        for name in names:
            part = before.read(name)
            after.writestr(name, change(part, [part], generator) if name == changed else part)
    return file.getvalue()


# Reading them.


class Hung(BaseException):
    """No Exception, so that nothing on the way takes it for an error of the file."""


def hang(number: int, frame: object) -> None:
    raise Hung


def outcome_of(name: str, content: bytes, folder: Path, show: bool = False) -> tuple[str, str]:
    """One of OUTCOMES, and the error's text."""
    suffix, _, read = FORMATS[name]
    path = folder / f"input{suffix}"
    path.write_bytes(content)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(path)
        return "answered", ""
    except ValueError as error:
        if show:
            traceback.print_exc()
        if ran_out(error):
            return "out of memory", str(error)
        named = str(folder) in str(error)
        return ("refused", str(error)) if named else ("other error", f"no file is named: {error}")
    except MemoryError as error:
        return "out of memory", repr(error)
    except Hung:
        return "hung", traceback.format_exc()
    except Exception as error:
        if show:
            traceback.print_exc()
        return "other error", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or one that it follows from, is a lack of memory."""
    if error is None or isinstance(error, MemoryError):
        return error is not None
    return ran_out(error.__cause__ or error.__context__)


def prepare(name: str, folder: Path, first: int) -> tuple[list[bytes], list[bytes]]:
    """The valid files, and the bombs where one of the inputs from `first` on can be one."""
    _, files, _ = FORMATS[name]
    return files(folder), bombs(name) if first < BOMBS else []


def read_inputs(name: str, numbers: range, results: Connection) -> None:
    """Send what a part of the inputs leads to; in a process of its own, with little memory."""
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files, special = prepare(name, folder, numbers.start)
        with open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):
            outcome_of(name, files[0], folder)  # what is loaded once
            used = int(Path("/proc/self/statm").read_text().split()[0])
            most = used * os.sysconf("SC_PAGE_SIZE") + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            for number in numbers:
                content = make_input(name, number, files, special)
                results.send((number, *outcome_of(name, content, folder)))


def read_part(name: str, numbers: range) -> list[tuple[int, str, str]]:
    """What a part of the inputs leads to. After one that ends its process, or that no signal stops,
    another process goes on.
    """
    found, fork = [], get_context("fork")
    while numbers:
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=read_inputs, args=(name, numbers, there))
        process.start()
        there.close()
        outcome, before = "died", len(found)
        with contextlib.suppress(EOFError):
            while here.poll(6 * SECONDS):
                found.append(here.recv())
            process.kill()
            outcome = "hung"
        process.join()
        numbers = numbers[len(found) - before :]
        if numbers:
            found.append((numbers[0], outcome, f"exit code {process.exitcode}"))
            numbers = numbers[1:]
    return found


def fuzz(name: str, inputs: int, processes: int) -> Iterator[tuple[int, str, str]]:
    """What each input leads to, in order."""
    size = 200
    parts = [range(i, min(i + size, inputs)) for i in range(0, inputs, size)]
    with ThreadPoolExecutor(processes) as pool:
        for found in pool.map(lambda part: read_part(name, part), parts):
            yield from found


def main(args: argparse.Namespace) -> int:
    names = [args.only] if args.only else list(FORMATS)
    if args.input is not None:
        signal.signal(signal.SIGALRM, hang)
        with tempfile.TemporaryDirectory() as place:
            files, special = prepare(names[0], Path(place), args.input)
            content = make_input(names[0], args.input, files, special)
            print(*outcome_of(names[0], content, Path(place), show=True))
        return 0
    print(f"| format | inputs | {' | '.join(OUTCOMES)} |\n|{'---|' * (2 + len(OUTCOMES))}")
    bad = []
    for name in names:
        counts = Counter()
        for number, outcome, text in tqdm(
            fuzz(name, args.inputs, args.processes), name, args.inputs, disable=None
        ):
            counts[outcome] += 1
            if outcome in OUTCOMES[2:]:
                bad.append((name, number, outcome, text))
        cells = [f"{counts[outcome]:,}" for outcome in OUTCOMES]
        print(f"| {name} | {sum(counts.values()):,} | {' | '.join(cells)} |", flush=True)
        for _, number, outcome, text in [b for b in bad if b[0] == name][:SHOWN]:
            print(f"--only {name} --input {number}: {outcome}: {text[-600:]}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
