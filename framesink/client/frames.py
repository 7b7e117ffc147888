"""Frames as they travel: checked, and compressed one by one or raw."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import cv2
import numpy as np

from framesink.client.wire import ChunkPayload
from framesink.runtime.arrays import UInt8Array
from framesink.runtime.errors import OptionError, VideoError
from framesink.runtime.video.chunk import Chunk, stack_frames

FrameFormat = Literal["jpeg", "png", "raw"]
FRAME_FORMATS: tuple[FrameFormat, ...] = ("jpeg", "png", "raw")


@dataclass(frozen=True, slots=True, eq=False)
class OutgoingChunk:
    """Frames uint8 RGB `[T, H, W, 3]` to be sent, and what is known of their time (see Chunk)."""

    frames: UInt8Array
    timestamps: tuple[float, ...]
    span: tuple[float, float] | None
    captured_at: float
    dropped: int = 0

    @classmethod
    def of_frames(
        cls,
        frames: UInt8Array | Sequence[UInt8Array],
        timestamps: Sequence[float] | None,
        t0: float | None,
        t1: float | None,
    ) -> Self:
        """Frames that have just arrived. Raises VideoError if frames or times make no sense."""
        if (t0 is None) != (t1 is None):
            raise VideoError("A chunk has a begin t0 and an end t1; give both or neither.")
        span = None if t0 is None or t1 is None else (t0, t1)
        stacked = stack_frames(frames)
        _require_times(len(stacked), timestamps, span)
        return cls(stacked, tuple(timestamps or ()), span, time.monotonic())

    @classmethod
    def of_chunk(cls, chunk: Chunk) -> Self:
        """A chunk of a capture. Raises VideoError if its frames or times make no sense."""
        span, stacked = (chunk.t0, chunk.t1), stack_frames(chunk.frames)
        _require_times(len(stacked), chunk.timestamps, span)
        return cls(stacked, chunk.timestamps, span, chunk.captured_at, chunk.dropped)

    def payload(self, frame_format: FrameFormat, quality: int) -> ChunkPayload:
        """The chunk as it travels. Raises VideoError as `compress` does."""
        return ChunkPayload(
            files=() if frame_format == "raw" else compress(self.frames, frame_format, quality),
            raw=self.frames if frame_format == "raw" else None,
            timestamps=self.timestamps,
            span=self.span,
            dropped=self.dropped,
        )


def compress(frames: UInt8Array, frame_format: Literal["jpeg", "png"], quality: int) -> list[bytes]:
    """Each of the frames, uint8 RGB `[T, H, W, 3]`, as a JPEG (`quality` 1 to 100) or PNG file.

    Raises VideoError for a frame that its format cannot hold (JPEG: more than 65,500 pixels wide
    or high).
    """
    if frame_format == "jpeg":
        suffix, parameters = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality]
    else:
        suffix, parameters = ".png", [cv2.IMWRITE_PNG_COMPRESSION, 1]
    files = []
    for frame in frames:
        try:
            done, data = cv2.imencode(suffix, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), parameters)
        except cv2.error:
            done = False
        if not done:
            height, width = frame.shape[:2]
            raise VideoError(
                f"A frame of {width}×{height} pixels cannot be compressed as {frame_format}; "
                "scale it down."
            )
        files.append(data.tobytes())
    return files


def require_format(frame_format: str, quality: int) -> None:
    """Raise OptionError for a format or a JPEG quality that does not exist."""
    if frame_format not in FRAME_FORMATS:
        raise OptionError(
            f"frame_format={frame_format!r} is not one of {', '.join(FRAME_FORMATS)}."
        )
    if not 1 <= quality <= 100:
        raise OptionError(f"quality={quality} is not a JPEG quality; give 1 to 100.")


def _require_times(
    count: int, timestamps: Sequence[float] | None, span: tuple[float, float] | None
) -> None:
    if timestamps is not None and (
        len(timestamps) != count
        or not np.isfinite(timestamps).all()
        or (np.diff(timestamps) < 0).any()
    ):
        raise VideoError(
            f"The timestamps of {count} frames must be {count} finite, ascending seconds, not "
            f"{list(timestamps)}."
        )
    if span is not None and not (np.isfinite(span).all() and span[0] < span[1]):
        raise VideoError(
            f"A chunk from {span[0]:g} s to {span[1]:g} s has no length; t1 must be later."
        )
