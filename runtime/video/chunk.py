"""A chunk: the frames of one span of video time, the unit a session is fed with."""

from dataclasses import dataclass

from framesink.runtime.arrays import UInt8Array


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
