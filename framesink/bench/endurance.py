"""Sessions for hours, as fast as the machine goes: does anything grow?"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from framesink.bench.live_stream import LiveStream, fill
from framesink.bench.measure import Quantiles
from framesink.bench.memory import Memory
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import OptionError
from framesink.runtime.events import Event
from framesink.runtime.policies import Policy
from framesink.runtime.stats import EngineStats
from framesink.runtime.video.chunk import Chunk

# Chunks of a stream between two looks: a minute of video, where chunks are a second long.
MINUTE = 60


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """After `chunk` chunks of every stream: what is held (pages of K/V, and tokens in the longest
    context), and of the last minute the median seconds per chunk, from its being pushed to the end
    of its reply, and between tokens, the mean seconds per step, wall and processor seconds per
    chunk of all streams, and the GPU's seconds per chunk on what it worked on."""

    chunk: int
    memory: Memory
    pages_used: int
    context_tokens: int
    chunk_seconds: float
    itl: float
    step_seconds: float
    seconds_each: float
    cpu_seconds: float
    gpu_seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Growth:
    """The end compared with checkpoint `since`: memory and pages more, ratios of the times."""

    since: int
    memory: Memory
    pages: int
    chunk_ratio: float
    itl_ratio: float
    step_ratio: float
    seconds_ratio: float
    cpu_ratio: float
    gpu_ratio: dict[str, float]


@dataclass(frozen=True, slots=True)
class EnduranceReport:
    """The first checkpoint is after a minute of video, the last at the end; `seconds` is how long
    it all took."""

    executor: str
    streams: int
    frame_size: tuple[int, int]
    warmup: int
    seconds: float
    checkpoints: tuple[Checkpoint, ...]

    @property
    def growth(self) -> Growth:
        """Of the last minute since the first."""
        begin, end = self.checkpoints[0], self.checkpoints[-1]
        return Growth(
            since=begin.chunk,
            memory=end.memory.growth_since(begin.memory),
            pages=end.pages_used - begin.pages_used,
            chunk_ratio=end.chunk_seconds / begin.chunk_seconds,
            itl_ratio=end.itl / begin.itl,
            step_ratio=end.step_seconds / begin.step_seconds,
            seconds_ratio=end.seconds_each / begin.seconds_each,
            cpu_ratio=end.cpu_seconds / begin.cpu_seconds,
            gpu_ratio={
                name: end.gpu_seconds.get(name, 0.0) / seconds
                for name, seconds in begin.gpu_seconds.items()
                if seconds
            },
        )


def measure_endurance(
    engine: StreamingEngine,
    source: Callable[[int], Iterator[Chunk]],
    *,
    chunks: int,
    warmup: int,
    streams: int = 1,
    most_seconds: float | None = None,
    policy: Policy | None = None,
    max_new_tokens: int | None = None,
    previous_text: str = "",
    progress: Callable[[int], None] | None = None,
) -> EnduranceReport:
    """Run `streams` sessions for `chunks` chunks each, in whole minutes, after `warmup` that fill
    their windows; for fewer minutes if `most_seconds` are over.

    Of several streams the next chunks wait in their queues while some are answered, so that the
    machine never waits for input; a single one gets its next chunk when it has answered. `source`
    and `previous_text` are as of `measure_streams`; `progress` is told of every chunk number.
    Raises OptionError for too few chunks, CapacityError if there is no room for so many streams.
    """
    if chunks < 2 * MINUTE:
        raise OptionError(
            f"An endurance run compares its last {MINUTE} chunks with the first {MINUTE}; "
            f"{chunks} chunks are too few."
        )
    ahead = 0 if streams == 1 else 1
    checkpoints: list[Checkpoint] = []
    started = time.monotonic()
    with ExitStack() as stack:
        running = [
            LiveStream(
                stack.enter_context(
                    engine.open_session(
                        policy, max_new_tokens=max_new_tokens, previous_text=previous_text
                    )
                ),
                source(index),
            )
            for index in range(streams)
        ]
        fill(running, warmup)
        minute = _Minute(engine.stats())
        for number in range(1, chunks // MINUTE * MINUTE + 1):
            for stream in running:
                stream.push(time.monotonic(), block=True)
            if number > ahead:
                minute.replies += [stream.wait() for stream in running]
            if progress is not None:
                progress(number)
            if number % MINUTE == 0:
                checkpoints.append(minute.close(number, engine.stats(), running))
                minute = _Minute(engine.stats())
                if most_seconds is not None and time.monotonic() - started > most_seconds:
                    break
    if len(checkpoints) < 2:
        raise OptionError(
            f"In {most_seconds:g} seconds less than two minutes of video were answered; give more."
        )
    return EnduranceReport(
        engine.executor_reason,
        streams,
        running[0].frame_size,
        warmup,
        time.monotonic() - started,
        tuple(checkpoints),
    )


class _Minute:
    """What happened since a moment."""

    def __init__(self, before: EngineStats) -> None:
        self.replies: list[Event] = []
        self._before = before
        self._started, self._cpu = time.monotonic(), time.process_time()

    def close(self, number: int, after: EngineStats, streams: list[LiveStream]) -> Checkpoint:
        """Look at it, after `number` chunks of every stream."""
        count, before = len(self.replies), self._before
        timings = [reply.timing for reply in self.replies if reply.timing is not None]
        steps = max(1, after.steps - before.steps)
        step_seconds = (
            after.mean_step_seconds * after.steps - before.mean_step_seconds * before.steps
        )
        return Checkpoint(
            chunk=number,
            memory=Memory.now(),
            pages_used=after.pages_used,
            context_tokens=max(stream.session.stats().context_tokens for stream in streams),
            chunk_seconds=Quantiles.of([timing.total for timing in timings]).p50,
            itl=Quantiles.of([gap for timing in timings for gap in timing.itl]).p50,
            step_seconds=step_seconds / steps,
            seconds_each=(time.monotonic() - self._started) / count,
            cpu_seconds=(time.process_time() - self._cpu) / count,
            gpu_seconds=_each(before.gpu_seconds, after.gpu_seconds, count),
        )


def _each(before: Mapping[str, float], after: Mapping[str, float], count: int) -> dict[str, float]:
    return {
        name: (seconds - before.get(name, 0.0)) / count for name, seconds in sorted(after.items())
    }
