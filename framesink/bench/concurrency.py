"""Many sessions at once: how fast together, and does each say what it says alone?"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

from framesink.bench.measure import ChunkResult, Quantiles, TimedSession, resident_bytes
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.policies import Policy
from framesink.runtime.session import Session
from framesink.runtime.video.chunk import Chunk


@dataclass(frozen=True, slots=True)
class ConcurrencyReport:
    """Times are seconds. `alone_seconds` is all sessions one after another, `together_seconds` all
    at once, the first `warmup` chunks of each left out of `chunk`, `ttft` and `itl` only.
    `same_tokens` counts sessions whose every token was the same both ways. `mean_batch` is
    sequences a step while together; `pages_peak` is the most pages seen in use, `resident` is bytes
    at the end."""

    executor: str
    sessions: int
    chunks: int
    warmup: int
    chunk: Quantiles
    ttft: Quantiles
    itl: Quantiles
    fps: float
    alone_seconds: float
    together_seconds: float
    mean_batch: float
    same_tokens: int
    pages_peak: int
    pages_total: int
    resident: int


def measure_concurrency(
    engine: StreamingEngine,
    source: Callable[[int], Iterator[Chunk]],
    *,
    sessions: int,
    chunks: int,
    warmup: int,
    policy: Policy | None = None,
    max_new_tokens: int | None = None,
) -> ConcurrencyReport:
    """Run every session alone, then all at once; `source(i)` is the video of session i.

    Raises CapacityError if the engine has no room for so many sessions.
    """

    def opened() -> Session:
        return engine.open_session(policy, max_new_tokens=max_new_tokens)

    def watch(session: Session, video: Iterator[Chunk]) -> tuple[list[ChunkResult], int]:
        timed, peak = TimedSession(session), 0
        results = []
        for chunk in islice(video, chunks):
            results.append(timed.run(chunk))
            peak = max(peak, engine.stats().pages_used)
        return results, peak

    with ExitStack() as stack:  # refused before anything is measured, if there is no room
        for _ in range(sessions):
            stack.enter_context(opened())

    started = time.perf_counter()
    alone = []
    for index in range(sessions):
        with opened() as session:
            alone.append(watch(session, source(index))[0])
    alone_seconds = time.perf_counter() - started

    before = engine.stats()
    with ExitStack() as stack:
        together = [stack.enter_context(opened()) for _ in range(sessions)]
        videos = [source(index) for index in range(sessions)]
        started = time.perf_counter()
        with ThreadPoolExecutor(sessions, thread_name_prefix="bench") as threads:
            watched = list(threads.map(watch, together, videos))
        together_seconds = time.perf_counter() - started
        after, resident = engine.stats(), resident_bytes()
    results = [run for run, _ in watched]
    measured = [result for run in results for result in run[warmup:]]
    steps = after.steps - before.steps
    sequences = after.mean_batch * after.steps - before.mean_batch * before.steps
    return ConcurrencyReport(
        executor=engine.executor_reason,
        sessions=sessions,
        chunks=chunks,
        warmup=warmup,
        chunk=Quantiles.of([result.seconds for result in measured]),
        ttft=Quantiles.of([result.ttft for result in measured if result.ttft is not None]),
        itl=Quantiles.of([gap for result in measured for gap in result.itl]),
        fps=sum(result.frames for run in results for result in run) / together_seconds,
        alone_seconds=alone_seconds,
        together_seconds=together_seconds,
        mean_batch=sequences / steps if steps else 0.0,
        same_tokens=sum(
            [result.tokens for result in run] == [result.tokens for result in other]
            for run, other in zip(results, alone, strict=True)
        ),
        pages_peak=max(peak for _, peak in watched),
        pages_total=after.pages_total,
        resident=resident,
    )
