"""Image files that are damaged, or lie about what they hold. Seeded."""

import struct
import zlib

import cv2
import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
OTHER_FORMATS = (
    b"",
    b"GIF89a\x38\x00\x38\x00\x80\x00\x00",
    b"BM\x7a\x00\x00\x00\x00\x00\x00\x00",
    b"II*\x00\x08\x00\x00\x00",
    b"RIFF\x10\x00\x00\x00WEBPVP8 ",
    b"P6 56 56 255\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n",
)


def picture(rng: np.random.Generator, suffix: str, *, side: int = 56) -> bytes:
    """A good file of noise, `.png` or `.jpg`."""
    frame = rng.integers(0, 256, (side, side, 3), np.uint8)
    return cv2.imencode(suffix, frame)[1].tobytes()


def cut(rng: np.random.Generator, file: bytes) -> bytes:
    """Its beginning alone; the end of the picture is missing."""
    return file[: int(rng.integers(0, len(file) - 12))]


def flipped(rng: np.random.Generator, file: bytes) -> bytes:
    """With some bits the other way; decoders may or may not notice."""
    damaged = bytearray(file)
    for at in rng.integers(0, len(file), int(rng.integers(1, 16))):
        damaged[at] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(width: int, height: int, pixels: bytes, *extra: bytes, depth: int = 8) -> bytes:
    """A PNG file that says it has this size, holds these bytes of filtered rows, and `extra` chunks
    before them. Every checksum is right."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(pixels))
    return PNG_SIGNATURE + header + b"".join(extra) + data + png_chunk(b"IEND", b"")


def rows(width: int, height: int) -> bytes:
    """The filtered rows of a black picture."""
    return bytes((3 * width + 1) * height)


def png_bomb(rng: np.random.Generator) -> bytes:
    """A few bytes that say they are gigabytes of pixels."""
    side = int(rng.choice((10_000, 65_535, 1_000_000, 2**31 - 1)))
    return png(side, side, bytes(4096))


def jpeg_saying(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A small JPEG whose frame header names another size."""
    file = bytearray(picture(rng, ".jpg"))
    at = file.find(b"\xff\xc0") + 5
    file[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(file)


def many_scans(rng: np.random.Generator) -> bytes:
    """A JPEG that repeats its scan some hundred times."""
    file = picture(rng, ".jpg", side=16)
    scan = file[file.find(b"\xff\xda") : -2]
    return file[:-2] + scan * int(rng.integers(100, 500)) + file[-2:]
