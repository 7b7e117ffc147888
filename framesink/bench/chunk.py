"""Time per chunk of one session."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from framesink.bench.measure import ChunkResult, Quantiles, TimedSession, resident_bytes
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.policies import Policy
from framesink.runtime.video.chunk import Chunk


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """Times are seconds; `fps` is frames per second of wall time, `realtime_factor` seconds of
    video per second of wall time; `resident` is bytes at the end."""

    executor: str
    chunks: int
    warmup: int
    frame_size: tuple[int, int]
    chunk: Quantiles
    ttft: Quantiles
    itl: Quantiles
    fps: float
    realtime_factor: float
    tokens_per_chunk: float
    context_tokens: int
    pages_used: int
    pages_total: int
    resident: int


def measure_chunks(
    engine: StreamingEngine,
    source: Iterator[Chunk],
    *,
    chunks: int,
    warmup: int,
    policy: Policy | None = None,
    max_new_tokens: int | None = None,
) -> ChunkReport:
    """Run `warmup` chunks, then measure `chunks`; both at least 1."""
    with engine.open_session(policy, max_new_tokens=max_new_tokens) as session:
        timed = TimedSession(session)
        video_seconds = 0.0
        results: list[ChunkResult] = []
        size = (0, 0)
        for chunk in islice(source, warmup):
            timed.run(chunk)
        for chunk in islice(source, chunks):
            results.append(timed.run(chunk))
            video_seconds += chunk.t1 - chunk.t0
            size = (chunk.frames.shape[1], chunk.frames.shape[2])
        session_stats, engine_stats = session.stats(), engine.stats()
        resident = resident_bytes()
    seconds = [result.seconds for result in results]
    return ChunkReport(
        executor=engine.executor_reason,
        chunks=len(results),
        warmup=warmup,
        frame_size=size,
        chunk=Quantiles.of(seconds),
        ttft=Quantiles.of([result.ttft for result in results if result.ttft is not None]),
        itl=Quantiles.of([gap for result in results for gap in result.itl]),
        fps=sum(result.frames for result in results) / sum(seconds),
        realtime_factor=video_seconds / sum(seconds),
        tokens_per_chunk=sum(len(result.tokens) for result in results) / len(results),
        context_tokens=session_stats.context_tokens,
        pages_used=engine_stats.pages_used,
        pages_total=engine_stats.pages_total,
        resident=resident,
    )
