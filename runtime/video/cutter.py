"""Sample frames to the model's rate and cut them into chunks: timestamps in, chunks out.

Pure: no clock, no thread, no decoding.
"""

import math
from dataclasses import dataclass

from framesink.runtime.arrays import UInt8Array

# Containers round timestamps to milliseconds; a frame may lie that much before its place.
TOLERANCE_SECONDS = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class SampledFrame:
    """A frame the model is to see.

    `image` is uint8 `[H, W, 3]`, RGB. `timestamp` is seconds of video time, `captured_at` is
    `time.monotonic()` at its arrival. `motion` is how much it differs from the sampled frame
    before it (mean grey level difference, 0 to 255; infinite for the first).
    """

    image: UInt8Array
    timestamp: float
    captured_at: float
    motion: float = math.inf


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """The sampled frames (at least one, ascending) of the video time `[t0, t1)`."""

    frames: tuple[SampledFrame, ...]
    t0: float
    t1: float


def frames_per_chunk(fps: float, chunk_seconds: float) -> int:
    """How many frames a whole chunk has. Raises ValueError for rates or lengths not above 0."""
    if not (math.isfinite(fps) and fps > 0 and math.isfinite(chunk_seconds) and chunk_seconds > 0):
        raise ValueError(
            f"fps ({fps}) and chunk_seconds ({chunk_seconds}) must be finite and above 0."
        )
    return max(1, round(fps * chunk_seconds))


class ChunkCutter:
    """Cuts video time into chunks of `chunk_seconds`, each of `frames_per_chunk` equal slots.

    The first frame in a slot is the slot's. A chunk is cut as soon as its last slot is filled or a
    frame of a later chunk comes; slots no frame fell into are left out, and so are chunks without
    frames.
    """

    def __init__(self, fps: float, chunk_seconds: float) -> None:
        """Raises ValueError for rates or lengths not above 0."""
        self.frames_per_chunk = frames_per_chunk(fps, chunk_seconds)
        self.chunk_seconds = chunk_seconds
        self._slot_seconds = chunk_seconds / self.frames_per_chunk
        self._last_slot: int | None = None
        self._chunk = 0
        self._frames: list[SampledFrame] = []

    def wants(self, timestamp: float) -> bool:
        """Whether a frame of this time would be the first of its slot."""
        return self._last_slot is None or self._slot(timestamp) > self._last_slot

    def add(self, frame: SampledFrame) -> list[Cut]:
        """Take a frame; returns the chunks it completes, in order: none, one, or two.

        A frame that is not wanted is ignored.
        """
        if not self.wants(frame.timestamp):
            return []
        slot = self._slot(frame.timestamp)
        chunk, place = divmod(slot, self.frames_per_chunk)
        done = self.flush() if chunk != self._chunk else []
        self._chunk, self._last_slot = chunk, slot
        self._frames.append(frame)
        return done + self.flush() if place == self.frames_per_chunk - 1 else done

    def flush(self) -> list[Cut]:
        """The chunk that was begun, if any: at the end of the video it is short of frames."""
        if not self._frames:
            return []
        t0 = self._chunk * self.chunk_seconds
        cut = Cut(tuple(self._frames), t0, (self._chunk + 1) * self.chunk_seconds)
        self._frames = []
        return [cut]

    def _slot(self, timestamp: float) -> int:
        return math.floor((timestamp + TOLERANCE_SECONDS) / self._slot_seconds)
