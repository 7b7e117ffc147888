"""What a JPEG or PNG file says about itself, read without decoding anything.

Sources: ITU-T T.81 (JPEG), annex B; the PNG specification (W3C, third edition), chapters 5 and 11.
Whatever a decoder would do more than the frame needs is refused or left out here: further images in
the file, thousands of scans over the same picture, compressed text and colour profiles.
"""

import struct
from dataclasses import dataclass
from typing import Literal

from framesink.serving.errors import ServingError, StatusCode

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
JPEG_SCAN = b"\xff\xda"
# Start-of-frame markers of the three Huffman-coded processes (baseline, extended, progressive), and
# of those no decoder here reads.
JPEG_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
JPEG_OTHER_FRAMES = frozenset((0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
# A progressive file has about ten scans; each is another pass over the whole picture.
MAX_SCANS = 24
# What a picture needs; animations and compressed text are other chunks.
PNG_CHUNKS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
MAX_PNG_CHUNKS = 65_536


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file whose header was read: its format, its width and height in pixels, and the bytes to
    hand to a decoder."""

    format: Literal["JPEG", "PNG"]
    width: int
    height: int
    data: bytes


def read_header(data: bytes) -> ImageFile:
    """Read the header of a JPEG or PNG file.

    Raises ServingError (INVALID_ARGUMENT) for anything else, and for a file that is cut short.
    """
    if data.startswith(PNG_SIGNATURE):
        return _read_png(data)
    if data.startswith(JPEG_START):
        return _read_jpeg(data)
    raise invalid_image("is neither a JPEG nor a PNG file")


def invalid_image(what: str) -> ServingError:
    """The refusal of a frame that `what`."""
    return ServingError(StatusCode.INVALID_ARGUMENT, f"A frame {what}; send another.")


def _read_jpeg(data: bytes) -> ImageFile:
    at, size = 2, len(data)
    while at + 4 <= size:
        if data[at] != 0xFF:
            raise invalid_image("is a damaged JPEG file")
        marker = data[at + 1]
        if marker == 0xFF:  # markers may be padded
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < 2 or at + 2 + length > size:
            break
        if marker in JPEG_FRAMES:
            return _jpeg_frame(data, data[at + 4 : at + 2 + length])
        if marker in JPEG_OTHER_FRAMES:
            raise invalid_image("is a JPEG file of a kind that is not supported")
        if marker == JPEG_SCAN[1] or marker < 0xC0:
            raise invalid_image("is a damaged JPEG file")
        at += 2 + length
    raise invalid_image("is a JPEG file that is cut short")


def _jpeg_frame(data: bytes, segment: bytes) -> ImageFile:
    if len(segment) < 6 or segment[0] != 8:
        raise invalid_image("is a JPEG file without 8 bits a sample")
    height, width = struct.unpack(">HH", segment[1:5])
    if data.rfind(JPEG_END) < 0 or JPEG_SCAN not in data:
        raise invalid_image("is a JPEG file that is cut short")
    if data.count(JPEG_SCAN) > MAX_SCANS:
        raise invalid_image(f"is a JPEG file of more than {MAX_SCANS} scans")
    return ImageFile("JPEG", width, height, data)


def _read_png(data: bytes) -> ImageFile:
    """Walk the chunks; only those a picture needs are handed to the decoder."""
    at, size = len(PNG_SIGNATURE), len(data)
    kept = [PNG_SIGNATURE]
    width = height = 0
    for number in range(MAX_PNG_CHUNKS):
        if at + 12 > size:
            break
        length = int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        end = at + 12 + length
        if end > size:
            break
        if (number == 0) != (kind == b"IHDR") or (number == 0 and length != 13):
            raise invalid_image("is a damaged PNG file")
        if number == 0:
            width, height = struct.unpack(">II", data[at + 8 : at + 16])
        if kind in PNG_CHUNKS:
            kept.append(data[at:end])
        if kind == b"IEND":
            return ImageFile("PNG", width, height, b"".join(kept))
        at = end
    raise invalid_image("is a PNG file that is cut short")
