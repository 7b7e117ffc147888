"""A chunk: the frames of one span of video time, the unit a session is fed with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.errors import VideoError


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Frames of the video time `[t0, t1)`.

    `frames` is uint8 `[T, H, W, 3]`, RGB, T ≥ 1. `t0` and `t1` are seconds of video time.
    `timestamps` holds T seconds of video time, ascending. `captured_at` is `time.monotonic()` when
    the last frame of the chunk arrived: lag is counted from it. `dropped` is how many captured
    frames of this span of time were dropped before the chunk was cut.
    """

    frames: UInt8Array
    t0: float
    t1: float
    timestamps: tuple[float, ...]
    captured_at: float
    dropped: int = 0


def stack_frames(frames: UInt8Array | Sequence[UInt8Array]) -> UInt8Array:
    """Frames as one array `[T, H, W, 3]`. Raises VideoError unless they are uint8 RGB of one size,
    at least one."""
    if len(frames) == 0:
        raise VideoError("A chunk without frames cannot be shown to the model.")
    if len({np.shape(frame) for frame in frames}) > 1:
        raise VideoError("The frames of a chunk differ in size; resize or split the chunk.")
    stacked = np.asarray(frames)
    if stacked.dtype != np.uint8 or stacked.ndim != 4 or stacked.shape[3] != 3:
        raise VideoError(
            f"Frames must be uint8 RGB of shape [height, width, 3], not {stacked.dtype} "
            f"{list(stacked.shape[1:])}."
        )
    return stacked
