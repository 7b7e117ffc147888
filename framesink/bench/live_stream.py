"""One simulated camera and the session that watches it."""

import time
from collections.abc import Iterator
from dataclasses import replace

from framesink.runtime.errors import BacklogError, FramesinkError
from framesink.runtime.events import Event, EventKind
from framesink.runtime.session import Session
from framesink.runtime.video.chunk import Chunk


class LiveStream:
    """Pushes the chunks of an endless video, one after another in video time."""

    def __init__(self, session: Session, source: Iterator[Chunk]) -> None:
        self.session = session
        self.refused = 0
        self._source = source
        self._next = next(source)
        self._pushed = 0
        self._events = iter(session)

    @property
    def chunk_seconds(self) -> float:
        """How long its chunks are."""
        return self._next.t1 - self._next.t0

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width."""
        return (self._next.frames.shape[1], self._next.frames.shape[2])

    def push(self, arrived: float, *, block: bool = False) -> bool:
        """Push the next chunk, which arrived at `arrived` (`time.monotonic()`), and wait for room
        in the session's queue with `block`; False, and counted as refused, if it was full."""
        chunk, t0 = self._next, self._pushed * self.chunk_seconds
        moved = replace(
            chunk,
            t0=t0,
            t1=t0 + self.chunk_seconds,
            timestamps=tuple(t0 + seconds - chunk.t0 for seconds in chunk.timestamps),
            captured_at=arrived,
        )
        try:
            self.session.push_chunk(moved, block=block)
        except BacklogError:
            self.refused += 1
            return False
        self._pushed += 1
        self._next = next(self._source)
        return True

    def wait(self) -> Event:
        """The final event of the next reply. Raises FramesinkError if the session fails."""
        for event in self._events:
            if event.kind is EventKind.ERROR:
                raise FramesinkError(event.text)
            if event.final:
                return event
        raise FramesinkError("A stream ended before it replied; run the bench again.")


def fill(streams: list[LiveStream], chunks: int) -> None:
    """Let every stream answer so many chunks."""
    for _ in range(chunks):
        for stream in streams:
            stream.push(time.monotonic(), block=True)
        for stream in streams:
            stream.wait()
