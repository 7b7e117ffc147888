"""One chunk through a session, timed."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import psutil

from framesink.runtime.errors import FramesinkError
from framesink.runtime.events import Event, EventKind
from framesink.runtime.session import Session
from framesink.runtime.video.chunk import Chunk


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """One chunk. `seconds` is from just before its frames are handed over (uint8, as captured) to
    its last event, `cpu_seconds` the processor time of the whole process meanwhile, which other
    programs on the machine hardly change; `ttft` and each of `itl` are seconds; `tokens` are the
    reply's ids."""

    seconds: float
    cpu_seconds: float
    frames: int
    ttft: float | None
    itl: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Median, 99th percentile and how many values they come from; seconds. NaN without values."""

    p50: float
    p99: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> "Quantiles":
        """Quantiles with linear interpolation."""
        if not values:
            return cls(float("nan"), float("nan"), 0)
        p50, p99 = np.quantile(values, (0.5, 0.99))
        return cls(float(p50), float(p99), len(values))


class TimedSession:
    """Feeds a session chunk by chunk, each after the reply to the one before."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._events: Iterator[Event] = iter(session)

    def run(self, chunk: Chunk) -> ChunkResult:
        """Push a chunk and take its reply. Raises FramesinkError if the session fails."""
        started, cpu_started = time.perf_counter(), time.process_time()
        self.session.push_chunk(chunk)
        for event in self._events:
            if not event.final:
                continue
            if event.kind is EventKind.ERROR:
                raise FramesinkError(event.text)
            timing = event.timing
            return ChunkResult(
                seconds=time.perf_counter() - started,
                cpu_seconds=time.process_time() - cpu_started,
                frames=len(chunk.frames),
                ttft=timing.ttft if timing else None,
                itl=timing.itl if timing else (),
                tokens=event.tokens,
            )
        raise FramesinkError("The session ended before it replied to a chunk; run the bench again.")


def resident_bytes() -> int:
    """Physical memory of this process."""
    return int(psutil.Process().memory_info().rss)
