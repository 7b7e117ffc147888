"""One session for hours: does anything grow?"""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from framesink.bench.measure import TimedSession, resident_bytes
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import OptionError
from framesink.runtime.video.chunk import Chunk

BASELINE_CHUNK = 100
_WINDOW = 50
_CHECKPOINTS = 10


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """After `chunk` chunks: bytes, pages and tokens held, median seconds of the last 50 chunks."""

    chunk: int
    resident: int
    pages_used: int
    context_tokens: int
    chunk_seconds: float


@dataclass(frozen=True, slots=True)
class EnduranceReport:
    """The first checkpoint is at chunk 100, the last at the end."""

    executor: str
    checkpoints: tuple[Checkpoint, ...]

    @property
    def resident_growth(self) -> int:
        """Bytes more at the end than at chunk 100."""
        return self.checkpoints[-1].resident - self.checkpoints[0].resident

    @property
    def pages_growth(self) -> int:
        """Pages more at the end than at chunk 100."""
        return self.checkpoints[-1].pages_used - self.checkpoints[0].pages_used

    @property
    def time_ratio(self) -> float:
        """Time per chunk at the end by that at chunk 100."""
        return self.checkpoints[-1].chunk_seconds / self.checkpoints[0].chunk_seconds


def checkpoint_chunks(chunks: int) -> list[int]:
    """Where to look: chunk 100, then evenly spread, the last at the end.

    Raises OptionError if there is no chunk after the first look.
    """
    if chunks <= BASELINE_CHUNK:
        raise OptionError(
            f"An endurance run compares chunk {BASELINE_CHUNK} with the end; "
            f"{chunks} chunks are too few."
        )
    step = (chunks - BASELINE_CHUNK) / _CHECKPOINTS
    return sorted({BASELINE_CHUNK + round(step * index) for index in range(_CHECKPOINTS + 1)})


def measure_endurance(
    engine: StreamingEngine,
    source: Iterable[Chunk],
    *,
    chunks: int,
    max_new_tokens: int | None = None,
) -> EnduranceReport:
    """Run one session. Raises OptionError for too few chunks."""
    looks = set(checkpoint_chunks(chunks))
    checkpoints: list[Checkpoint] = []
    recent: deque[float] = deque(maxlen=_WINDOW)
    with engine.open_session(max_new_tokens=max_new_tokens) as session:
        timed = TimedSession(session)
        for number, chunk in enumerate(islice(source, chunks), start=1):
            recent.append(timed.run(chunk).seconds)
            if number in looks:
                checkpoints.append(
                    Checkpoint(
                        chunk=number,
                        resident=resident_bytes(),
                        pages_used=engine.stats().pages_used,
                        context_tokens=session.stats().context_tokens,
                        chunk_seconds=statistics.median(recent),
                    )
                )
    return EnduranceReport(engine.executor_reason, tuple(checkpoints))
