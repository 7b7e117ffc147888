"""Frames from clients: checked before they are decoded, and shrunk as they are.

A file's header decides whether it is decoded at all; what comes out must be what the header said.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from framesink.runtime.arrays import AnyArray, UInt8Array
from framesink.runtime.errors import VideoError
from framesink.runtime.preprocess import PreprocessConfig, resize_frames, smart_resize
from framesink.serving.errors import ServingError, StatusCode
from framesink.serving.image_header import ImageFile, invalid_image, read_header
from framesink.serving.options import ServeOptions

# An orientation in the file's metadata would swap width and height after they were checked.
DECODE_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """The most a chunk's frames may be: their number, the bytes of a file, the pixels of a frame,
    and of all of them together, the pixels and the ViT patches they make."""

    frames: int
    file_bytes: int
    pixels: int
    chunk_pixels: int
    patches: int

    @classmethod
    def of(cls, options: ServeOptions, max_patches: int) -> "FrameLimits":
        """Those of a server, for a session of at most `max_patches` a chunk."""
        return cls(
            options.max_frames,
            options.max_frame_bytes,
            options.max_frame_pixels,
            options.max_chunk_pixels,
            max_patches,
        )


def decode_files(
    files: Sequence[bytes], limits: FrameLimits, config: PreprocessConfig
) -> UInt8Array:
    """JPEG or PNG files to frames of the model's size, uint8 `[T, H, W, 3]` RGB.

    Everything that can be known from the headers is checked before the first file is decoded.
    Raises ServingError (INVALID_ARGUMENT) for too many, too large, unlike or damaged frames.
    """
    _require_count(len(files), limits)
    for file in files:
        if len(file) > limits.file_bytes:
            raise ServingError(
                StatusCode.INVALID_ARGUMENT,
                f"A frame has {len(file)} bytes, but this server takes at most "
                f"{limits.file_bytes}; compress it more, or make it smaller.",
            )
    images = [read_header(file) for file in files]
    require_size(len(images), {(image.width, image.height) for image in images}, limits, config)
    # One by one, so that no more than one frame of full size is in memory.
    return np.concatenate([resize_frames([_decode(image)], config) for image in images])


def check_raw_frames(frames: AnyArray, limits: FrameLimits, config: PreprocessConfig) -> UInt8Array:
    """Raw frames from a client, if they are uint8 `[T, H, W, 3]` within the limits.

    Raises ServingError (INVALID_ARGUMENT) otherwise.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ServingError(
            StatusCode.INVALID_ARGUMENT,
            f"RAW_FRAMES must be UINT8 of shape [frames, height, width, 3], not {frames.dtype} "
            f"{list(frames.shape)}.",
        )
    _require_count(len(frames), limits)
    require_size(len(frames), {(frames.shape[2], frames.shape[1])}, limits, config)
    return frames


def require_size(
    count: int, sizes: set[tuple[int, int]], limits: FrameLimits, config: PreprocessConfig
) -> None:
    """Raise ServingError unless `count` frames of these sizes (width, height) make one chunk that
    the session takes."""
    if len(sizes) != 1:
        listed = ", ".join(f"{width}×{height}" for width, height in sorted(sizes)[:3])
        raise ServingError(
            StatusCode.INVALID_ARGUMENT,
            f"The frames of a chunk must be of one size, not of {listed}; resize them.",
        )
    ((width, height),) = sizes
    if width * height > limits.pixels:
        raise ServingError(
            StatusCode.INVALID_ARGUMENT,
            f"A frame of {width}×{height} pixels is larger than the {limits.pixels} pixels this "
            "server takes; send smaller frames.",
        )
    if count * width * height > limits.chunk_pixels:
        raise ServingError(
            StatusCode.INVALID_ARGUMENT,
            f"A chunk of {count} frames of {width}×{height} pixels is larger than the "
            f"{limits.chunk_pixels} pixels this server takes at once; send fewer or smaller "
            "frames.",
        )
    try:
        rows, columns = smart_resize(
            height,
            width,
            factor=config.patch_size * config.merge_size,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
        )
    except VideoError as error:
        raise ServingError(StatusCode.INVALID_ARGUMENT, str(error)) from error
    steps = -(-count // config.temporal_patch_size)
    patches = steps * (rows // config.patch_size) * (columns // config.patch_size)
    if patches > limits.patches:
        raise ServingError(
            StatusCode.INVALID_ARGUMENT,
            f"A chunk of {count} frames makes {patches} patches, but this session takes at most "
            f"{limits.patches}; send fewer or smaller frames.",
        )


def _require_count(count: int, limits: FrameLimits) -> None:
    if not 1 <= count <= limits.frames:
        raise ServingError(
            StatusCode.INVALID_ARGUMENT,
            f"A chunk has {count} frames, but this server takes 1 to {limits.frames}.",
        )


def _decode(image: ImageFile) -> UInt8Array:
    try:
        frame = cv2.imdecode(np.frombuffer(image.data, np.uint8), DECODE_FLAGS)
    except cv2.error:
        frame = None
    if frame is None:
        raise invalid_image(f"is a {image.format} file that cannot be decoded")
    if frame.shape != (image.height, image.width, 3):
        raise invalid_image(
            f"says it has {image.width}×{image.height} pixels, and has "
            f"{frame.shape[1]}×{frame.shape[0]}"
        )
    decoded: UInt8Array = np.asarray(frame, np.uint8)
    return decoded
