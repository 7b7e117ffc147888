"""Why a file cannot be opened as a video, told from its first bytes."""

from pathlib import Path

# ISO base media (MP4, MOV): a sequence of boxes, each with its size (u32 big endian) and its name.
_ISO_BRANDS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


def describe_unreadable(path: Path) -> str:
    """One sentence on a file FFmpeg could not open."""
    if _is_iso_without_index(path):
        return (
            f"The video {path} was cut off before its index (an MP4 writes it last), so nothing "
            "in it can be played; copy or record it again."
        )
    return (
        f"{path} is not a video that can be read; give a file with a video stream "
        "(such as MP4, MKV, AVI or WebM)."
    )


def _is_iso_without_index(path: Path) -> bool:
    """Walk the top-level boxes (ISO/IEC 14496-12, 4.2) looking for `moov`."""
    size = path.stat().st_size
    offset = 0
    with path.open("rb") as file:
        while offset + 8 <= size:
            file.seek(offset)
            header = file.read(16)
            length, name = int.from_bytes(header[:4], "big"), header[4:8]
            if offset == 0 and name not in _ISO_BRANDS:
                return False
            if name == b"moov":
                return offset + length > size
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            if length < 8:
                return True
            offset += length
    return offset > 0
