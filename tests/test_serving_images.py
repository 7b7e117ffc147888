"""Frames from clients: what is decoded, and what is refused before anything is."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.preprocess import PreprocessConfig, frames_to_patches
from framesink.serving.errors import ServingError, StatusCode
from framesink.serving.image_header import read_header
from framesink.serving.images import FrameLimits, check_raw_frames, decode_files

CONFIG = PreprocessConfig(min_pixels=28 * 28, max_pixels=112 * 112)
LIMITS = FrameLimits(
    frames=8, file_bytes=200_000, pixels=640 * 480, chunk_pixels=2_000_000, patches=4096
)


def picture(height: int = 60, width: int = 84, seed: int = 0) -> UInt8Array:
    """Smooth enough for JPEG, different in every channel: uint8 `[height, width, 3]` RGB."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def encode(frame: UInt8Array, kind: str = ".png", *flags: int) -> bytes:
    done, data = cv2.imencode(kind, np.ascontiguousarray(frame[..., ::-1]), list(flags))
    assert done
    return bytes(data)


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_of(width: int, height: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG file whose header says `width` × `height`, whatever `rows` hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *extra, body, chunk(b"IEND", b"")]
    )


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """The same JPEG file with another size in its frame header."""
    at = next(at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the files that reach the decoder."""
    calls: list[int] = []
    original = cv2.imdecode

    def counting(buffer: UInt8Array, flags: int) -> object:
        calls.append(buffer.size)
        return original(buffer, flags)

    monkeypatch.setattr(cv2, "imdecode", counting)
    return calls


def refusal(*files: bytes, limits: FrameLimits = LIMITS) -> str:
    with pytest.raises(ServingError) as caught:
        decode_files(files, limits, CONFIG)
    assert caught.value.code is StatusCode.INVALID_ARGUMENT
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(("height", "width"), [(60, 84), (400, 300), (28, 28), (17, 101)])
def test_files_make_the_patches_of_the_frames_they_hold(height: int, width: int) -> None:
    """Shrinking each frame as it is decoded changes nothing the model sees."""
    frames = np.stack([picture(height, width, seed) for seed in range(3)])
    decoded = decode_files([encode(frame) for frame in frames], LIMITS, CONFIG)
    patches, grid = frames_to_patches(decoded, CONFIG)
    expected, expected_grid = frames_to_patches(frames, CONFIG)
    assert grid == expected_grid
    assert np.array_equal(patches, expected)


@pytest.mark.parametrize("progressive", [0, 1])
def test_jpeg_files_are_decoded_as_opencv_does(progressive: int) -> None:
    data = encode(picture(), ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    expected = cv2.cvtColor(
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
    )
    same_size = PreprocessConfig(patch_size=2, merge_size=1, min_pixels=4, max_pixels=640 * 480)
    assert np.array_equal(decode_files([data], LIMITS, same_size)[0], expected)


def test_an_orientation_in_the_metadata_does_not_turn_the_frame() -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    data = encode(picture(56, 84), ".jpg")
    turned = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    shown = cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape[:2] == (84, 56)
    assert decode_files([turned], LIMITS, CONFIG).shape == (1, 56, 84, 3)


def test_files_larger_than_the_limits_never_reach_the_decoder(decoder: list[int]) -> None:
    rows = bytes(1 + 3 * 64)
    assert "100000×100000 pixels" in refusal(png_of(100_000, 100_000, rows))
    assert "65000×65000 pixels" in refusal(with_jpeg_size(encode(picture(), ".jpg"), 65000, 65000))
    assert "has 200001 bytes" in refusal(bytes(200_001))
    assert "9 frames" in refusal(*[encode(picture())] * 9)
    assert "8 frames of 640×480 pixels is larger than the 2000000" in refusal(
        *[png_of(640, 480, rows)] * 8
    )
    assert "0 frames" in refusal()
    assert "of one size" in refusal(encode(picture()), encode(picture(84, 60)))
    few = FrameLimits(
        frames=8, file_bytes=200_000, pixels=640 * 480, chunk_pixels=2_000_000, patches=16
    )
    assert "makes 24 patches" in refusal(encode(picture(56, 84)), limits=few)
    assert "times as long" in refusal(png_of(8000, 2, rows))
    assert "has no area" in refusal(png_of(0, 0, rows))
    assert decoder == []


def test_a_file_that_lies_about_its_size_is_refused() -> None:
    """The header names more, or fewer, rows than there are."""
    rows = b"".join(b"\0" + bytes(3 * 64) for _ in range(48))
    assert read_header(png_of(64, 48, rows)).width == 64
    assert decode_files([png_of(64, 48, rows)], LIMITS, CONFIG).shape[0] == 1
    assert "cannot be decoded" in refusal(png_of(64, 400, rows[: len(rows) // 2]))
    jpeg = encode(picture(), ".jpg")
    assert decode_files([jpeg], LIMITS, CONFIG).shape[0] == 1


def test_a_decoder_that_finds_another_size_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    larger = picture(120, 168)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: larger)
    assert "84×60 pixels, and has 168×120" in refusal(encode(picture(60, 84)))


def test_compressed_text_and_animations_are_left_out_before_decoding(decoder: list[int]) -> None:
    """A text chunk of a few kilobytes may hold gigabytes; a picture needs none of them."""
    rows = b"".join(b"\0" + bytes(3 * 64) for _ in range(48))
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000), 9))
    frames = chunk(b"acTL", struct.pack(">II", 1 << 30, 0))
    plain = png_of(64, 48, rows)
    assert decode_files([png_of(64, 48, rows, bomb, frames)], LIMITS, CONFIG).shape[0] == 1
    assert decoder == [len(plain)]


def test_a_jpeg_of_thousands_of_scans_is_refused(decoder: list[int]) -> None:
    data = encode(picture(), ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    at = data.rindex(b"\xff\xda")
    scan = data[at : data.rindex(b"\xff\xd9")]
    assert "more than 24 scans" in refusal(data[:at] + scan * 100 + b"\xff\xd9")
    assert decoder == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a" + bytes(100),
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"\x89PNG\r\n\x1a\n",
        b"BM" + bytes(200),
        b"\xff\xd8\xff\xe0\xff\xff" + bytes(10),
        b"\xff\xd8\xff\xc3\x00\x0b\x08\x00\x10\x00\x10\x01\x01\x11\x00\xff\xda\xff\xd9",
        b"\xff\xd8\xff\xc0\x00\x0b\x0c\x00\x10\x00\x10\x01\x01\x11\x00\xff\xda\xff\xd9",
        png_of(64, 48, b"")[:-12],
        png_of(64, 48, b"")[8:],
    ],
)
def test_what_is_no_whole_picture_is_refused(data: bytes) -> None:
    assert "frame" in refusal(data).lower()


@given(
    kind=st.sampled_from([".png", ".jpg"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.floats(0.2, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_damaged_files_are_refused_or_decoded_to_the_size_they_name(
    kind: str, edits: list[tuple[float, int]], cut: float
) -> None:
    data = bytearray(encode(picture(), kind))
    for place, value in edits:
        data[int(place * (len(data) - 1))] = value
    del data[int(cut * len(data)) :]
    try:
        header = read_header(bytes(data))
        frames = decode_files([bytes(data)], LIMITS, CONFIG)
    except ServingError:
        return  # of any other kind, an error would fail here
    assert header.width * header.height <= LIMITS.pixels
    assert frames.dtype == np.uint8
    assert frames.shape[0] == 1


def test_raw_frames_are_checked_too() -> None:
    frames = np.stack([picture(), picture()])
    assert check_raw_frames(frames, LIMITS, CONFIG) is frames
    for wrong, said in [
        (frames.astype(np.int16), "must be UINT8"),
        (frames[0], "must be UINT8"),
        (frames[..., :2], "must be UINT8"),
        (np.zeros((9, 4, 4, 3), np.uint8), "9 frames"),
        (np.zeros((1, 700, 700, 3), np.uint8), "larger than the"),
        (np.zeros((1, 0, 4, 3), np.uint8), "no area"),
    ]:
        with pytest.raises(ServingError, match=said):
            check_raw_frames(wrong, LIMITS, CONFIG)
