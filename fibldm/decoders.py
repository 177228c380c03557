"""Decoders of compressed DICOM pixels, which pydicom calls. None takes a stream that ends early."""

import struct

import imagecodecs
import numpy as np
from pydicom import uid
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import DecodeRunner

PLUGIN = "imagecodecs"
DECODERS = {
    uid.JPEGBaseline8Bit: imagecodecs.jpeg8_decode,
    uid.JPEGExtended12Bit: imagecodecs.jpeg8_decode,
    uid.JPEGLossless: imagecodecs.jpeg8_decode,
    uid.JPEGLosslessSV1: imagecodecs.jpeg8_decode,
    uid.JPEGLSLossless: imagecodecs.jpegls_decode,
    uid.JPEGLSNearLossless: imagecodecs.jpegls_decode,
    uid.JPEG2000Lossless: imagecodecs.jpeg2k_decode,
    uid.JPEG2000: imagecodecs.jpeg2k_decode,
    uid.HTJ2KLossless: imagecodecs.jpeg2k_decode,
    uid.HTJ2KLosslessRPCL: imagecodecs.jpeg2k_decode,
    uid.HTJ2K: imagecodecs.jpeg2k_decode,
}
DECODER_DEPENDENCIES = dict.fromkeys(DECODERS, ("imagecodecs",))  # pydicom asks for it
FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers that size follows
BOXED = b"\0\0\0\x0cjP  "  # a JP2 file around a JPEG 2000 stream
JPEG_2000 = b"\xff\x4f\xff\x51"
ENDS_EARLY = "compressed pixels end early"
STARTS = (b"\xff\xd8", JPEG_2000, BOXED)
DATA, END = (b"\xff\xda", b"\xff\x93"), b"\xff\xd9"  # markers of JPEG and JPEG 2000, in no data


def plugin_for(syntax: str) -> str:
    """Which decoder pydicom is to take, "" where nothing is compressed."""
    if syntax in DECODERS:
        return PLUGIN
    return "pydicom" if syntax == uid.RLELossless else ""


def coded_shape(stream: bytes) -> tuple[int, ...]:
    """Rows and columns by the header of a compressed slice, and its channels where not 1."""
    if stream.startswith(JPEG_2000) and len(stream) >= 42:
        right, bottom, left, top = struct.unpack(">4I", stream[8:24])
        shape, channels = (bottom - top, right - left), int.from_bytes(stream[40:42], "big")
        return shape if channels == 1 else (*shape, channels)
    at = 2
    while stream[:2] == b"\xff\xd8" and stream[at : at + 1] == b"\xff" and at + 10 <= len(stream):
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at + 1] in FRAMES:
            rows, columns, channels = struct.unpack(">HHB", stream[at + 5 : at + 10])
            return (rows, columns) if channels == 1 else (rows, columns, channels)
        if length < 2 or 0xD0 <= stream[at + 1] <= 0xD9:
            break
        at += 2 + length
    raise ValueError("compressed pixels without a header: damaged")


def require_end(stream: bytes) -> None:
    """ValueError where a JPEG, JPEG-LS or JPEG 2000 stream ends within its data.

    Some decoders make up what is missing.
    """
    if stream.rfind(END) < max(map(stream.rfind, DATA)):
        raise ValueError(f"{ENDS_EARLY}, after {len(stream):,} bytes: cut short")


def decode_whole(stream: bytes, syntax: str) -> np.ndarray:
    """The values of a stream. ValueError where it ends early, though an end is marked.

    Then the decoder takes what is put before that mark for data.
    """
    require_end(stream)
    decode = DECODERS[syntax]
    values = decode(stream)
    if decode is imagecodecs.jpeg8_decode:
        end = stream.rfind(END)
        if not np.array_equal(values, decode(stream[:end] + b"\x55\xaa" * 64 + END)):
            raise ValueError(f"{ENDS_EARLY}: some are missing")
    return values


def is_available(syntax: str) -> bool:
    """What pydicom asks of a module that decodes."""
    return syntax in DECODERS


def decode_frame(stream: bytes, runner: DecodeRunner) -> bytes:
    """A compressed slice -> its values as stored, for pydicom."""
    if stream.startswith(BOXED):
        stream = stream[max(stream.find(JPEG_2000), 0) :]
    expected = runner.rows, runner.columns
    found = coded_shape(stream)  # before the decoder takes memory by it
    if found == expected:
        frame = decode_whole(stream, runner.transfer_syntax)
        found = frame.shape
    if found != expected:
        raise ValueError(f"compressed pixels of shape {found}, expected {expected}")
    runner.set_option("bits_allocated", 8 * frame.itemsize)
    return frame.tobytes()


for syntax in DECODERS:
    get_decoder(syntax).add_plugin(PLUGIN, (__name__, "decode_frame"))
