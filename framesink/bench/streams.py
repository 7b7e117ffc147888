"""How many live streams does a machine hold? A simulation in real time.

Every stream's chunk arrives once per chunk length, as a camera's would, all streams spread evenly
over it. A stream is live while its reply is whole before its next chunk arrives.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice

from framesink.bench.measure import Quantiles, resident_bytes
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import BacklogError, FramesinkError
from framesink.runtime.events import Event, EventKind
from framesink.runtime.policies import Policy
from framesink.runtime.session import Session
from framesink.runtime.video.chunk import Chunk

# Seconds of every run that are not counted: the load has to settle.
SETTLING = 3.0


@dataclass(frozen=True, slots=True)
class StreamsResult:
    """`streams` at once for `seconds`, of which `counted` chunks are told. Times are seconds:
    `chunk` from the arrival of a chunk to the end of its reply, `ttft` to its first token, `itl`
    between tokens. `refused` chunks found the stream's queue full. `gpu_shares` is what part of the
    time a GPU worked on what."""

    streams: int
    seconds: float
    counted: int
    chunk: Quantiles
    ttft: Quantiles
    itl: Quantiles
    refused: int
    mean_batch: float
    gpu_shares: dict[str, float]

    def is_live(self, chunk_seconds: float) -> bool:
        """Whether 99 of 100 replies were whole in time and none was refused."""
        return self.refused == 0 and self.chunk.p99 < chunk_seconds


@dataclass(frozen=True, slots=True)
class StreamsReport:
    """`live_streams` is the most streams that were live; 0 if none were."""

    executor: str
    frame_size: tuple[int, int]
    chunk_seconds: float
    context_tokens: int
    live_streams: int
    results: tuple[StreamsResult, ...]
    resident: int


def measure_streams(
    engine: StreamingEngine,
    source: Callable[[int], Iterator[Chunk]],
    *,
    counts: Sequence[int],
    seconds: float,
    warmup: int,
    policy: Policy | None = None,
    max_new_tokens: int | None = None,
    previous_text: str = "",
) -> StreamsReport:
    """Hold each of `counts` streams for `seconds`, after `warmup` chunks of each to fill windows.

    `source(i)` is the video of stream i; its first chunks are used again and again. `previous_text`
    is what every stream begins with. Raises CapacityError if the engine has no room for the largest
    count, FramesinkError if a session fails.
    """
    with ExitStack() as stack:
        streams = [
            _Stream(
                stack.enter_context(
                    engine.open_session(
                        policy, max_new_tokens=max_new_tokens, previous_text=previous_text
                    )
                ),
                list(islice(source(index), _FRAMES_KEPT)),
            )
            for index in range(max(counts))
        ]
        for _ in range(warmup):
            for stream in streams:
                stream.push(time.monotonic())
            for stream in streams:
                stream.wait()
        length = streams[0].chunk_seconds
        results = []
        for count in counts:
            results.append(_hold(engine, streams[:count], length, seconds))
        context = max(stream.session.stats().context_tokens for stream in streams)
        resident = resident_bytes()
    return StreamsReport(
        executor=engine.executor_reason,
        frame_size=streams[0].frame_size,
        chunk_seconds=length,
        context_tokens=context,
        live_streams=max((r.streams for r in results if r.is_live(length)), default=0),
        results=tuple(results),
        resident=resident,
    )


# Making frames takes longer than running them: a few are shown in turn.
_FRAMES_KEPT = 4


class _Stream:
    """One session, its frames, and the final events it has sent."""

    def __init__(self, session: Session, chunks: Sequence[Chunk]) -> None:
        self.session = session
        self.refused = 0
        self._chunks = chunks
        self._pushed = 0
        self._events = iter(session)

    @property
    def chunk_seconds(self) -> float:
        return self._chunks[0].t1 - self._chunks[0].t0

    @property
    def frame_size(self) -> tuple[int, int]:
        return (self._chunks[0].frames.shape[1], self._chunks[0].frames.shape[2])

    def push(self, arrived: float) -> bool:
        """Push the next chunk, which arrived at `arrived`; False if the queue was full."""
        chunk = self._chunks[self._pushed % len(self._chunks)]
        t0 = self._pushed * self.chunk_seconds
        moved = replace(
            chunk,
            t0=t0,
            t1=t0 + self.chunk_seconds,
            timestamps=tuple(t0 + seconds - chunk.t0 for seconds in chunk.timestamps),
            captured_at=arrived,
        )
        try:
            self.session.push_chunk(moved, block=False)
        except BacklogError:
            self.refused += 1
            return False
        self._pushed += 1
        return True

    def wait(self) -> Event:
        """The final event of the next reply."""
        for event in self._events:
            if event.kind is EventKind.ERROR:
                raise FramesinkError(event.text)
            if event.final:
                return event
        raise FramesinkError("A stream ended before it replied; run the bench again.")


def _hold(
    engine: StreamingEngine,
    streams: Sequence[_Stream],
    length: float,
    seconds: float,
) -> StreamsResult:
    """Run streams in real time for `seconds` after they have settled."""
    start = time.monotonic() + length
    rounds = round((SETTLING + seconds) / length)
    arrivals = [
        (start + (number + index / len(streams)) * length, stream)
        for number in range(rounds)
        for index, stream in enumerate(streams)
    ]
    counted_from = start + SETTLING
    refused = sum(stream.refused for stream in streams)
    pushed: list[tuple[float, _Stream]] = []
    before = engine.stats()
    settled = False
    for arrival, stream in arrivals:
        time.sleep(max(0.0, arrival - time.monotonic()))
        if arrival >= counted_from and not settled:
            settled = True
            before = engine.stats()
        if stream.push(arrival):
            pushed.append((arrival, stream))
    after = engine.stats()
    lasted = time.monotonic() - counted_from
    events = [(arrival, stream.wait()) for arrival, stream in pushed]
    counted = [event for arrival, event in events if arrival >= counted_from]
    timings = [event.timing for event in counted if event.timing is not None]
    steps = after.steps - before.steps
    sequences = after.mean_batch * after.steps - before.mean_batch * before.steps
    return StreamsResult(
        streams=len(streams),
        seconds=seconds,
        counted=len(counted),
        chunk=Quantiles.of([event.lag for event in counted]),
        ttft=Quantiles.of([timing.ttft for timing in timings]),
        itl=Quantiles.of([gap for timing in timings for gap in timing.itl]),
        refused=sum(stream.refused for stream in streams) - refused,
        mean_batch=sequences / steps if steps else 0.0,
        gpu_shares={
            name: (total - before.gpu_seconds.get(name, 0.0)) / lasted
            for name, total in after.gpu_seconds.items()
        },
    )
