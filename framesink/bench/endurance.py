"""One session for hours: does anything grow?"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from framesink.bench.measure import ChunkResult, Quantiles, TimedSession, resident_bytes
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import OptionError
from framesink.runtime.policies import Policy
from framesink.runtime.video.chunk import Chunk

BASELINE_CHUNK = 100
_WINDOW = 100
_CHECKPOINTS = 10
# The windows are full once the context is this close to what it is at the end.
_FULL_SHARE = 0.98


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """After `chunk` chunks: bytes, pages and tokens held, and of the last 100 chunks the median
    seconds and processor seconds per chunk, and the seconds between tokens, which do not depend on
    how long replies are."""

    chunk: int
    resident: int
    pages_used: int
    context_tokens: int
    chunk_seconds: float
    cpu_seconds: float
    itl: float


@dataclass(frozen=True, slots=True)
class Growth:
    """The end compared with checkpoint `since`: bytes and pages more, ratios of the times."""

    since: int
    resident: int
    pages: int
    chunk_ratio: float
    cpu_ratio: float
    itl_ratio: float


@dataclass(frozen=True, slots=True)
class EnduranceReport:
    """The first checkpoint is at chunk 100, the last at the end."""

    executor: str
    checkpoints: tuple[Checkpoint, ...]

    @property
    def growth(self) -> Growth:
        """Since chunk 100, where the windows may still be filling."""
        return self._growth_since(self.checkpoints[0])

    @property
    def full_growth(self) -> Growth:
        """Since the first checkpoint with full windows."""
        full = _FULL_SHARE * self.checkpoints[-1].context_tokens
        return self._growth_since(
            next(point for point in self.checkpoints if point.context_tokens >= full)
        )

    def _growth_since(self, begin: Checkpoint) -> Growth:
        end = self.checkpoints[-1]
        return Growth(
            since=begin.chunk,
            resident=end.resident - begin.resident,
            pages=end.pages_used - begin.pages_used,
            chunk_ratio=end.chunk_seconds / begin.chunk_seconds,
            cpu_ratio=end.cpu_seconds / begin.cpu_seconds,
            itl_ratio=end.itl / begin.itl,
        )


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
    policy: Policy | None = None,
    max_new_tokens: int | None = None,
) -> EnduranceReport:
    """Run one session. Raises OptionError for too few chunks."""
    looks = set(checkpoint_chunks(chunks))
    checkpoints: list[Checkpoint] = []
    recent: deque[ChunkResult] = deque(maxlen=_WINDOW)
    with engine.open_session(policy, max_new_tokens=max_new_tokens) as session:
        timed = TimedSession(session)
        for number, chunk in enumerate(islice(source, chunks), start=1):
            recent.append(timed.run(chunk))
            if number in looks:
                checkpoints.append(
                    Checkpoint(
                        chunk=number,
                        resident=resident_bytes(),
                        pages_used=engine.stats().pages_used,
                        context_tokens=session.stats().context_tokens,
                        chunk_seconds=Quantiles.of([result.seconds for result in recent]).p50,
                        cpu_seconds=Quantiles.of([result.cpu_seconds for result in recent]).p50,
                        itl=Quantiles.of([gap for result in recent for gap in result.itl]).p50,
                    )
                )
    return EnduranceReport(engine.executor_reason, tuple(checkpoints))
