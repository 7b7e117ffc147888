"""How many live streams does a machine hold? A simulation in real time.

Every stream's chunk arrives once per chunk length, as a camera's would, all streams spread evenly
over it. A stream is live while its reply is whole before its next chunk arrives.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from framesink.bench.live_stream import LiveStream, fill
from framesink.bench.measure import Quantiles
from framesink.bench.memory import Memory
from framesink.bench.power import GpuPower, PowerMeter
from framesink.bench.time_shares import TimeShares, time_shares
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.load.ladder import RealTime
from framesink.runtime.policies import Policy
from framesink.runtime.video.chunk import Chunk

# Seconds of every run that are not counted: the load has to settle.
SETTLING = 3.0


@dataclass(frozen=True, slots=True)
class StreamsResult:
    """`streams` at once for `seconds`, of which `counted` chunks are told. Times are seconds:
    `chunk` from the arrival of a chunk to the end of its reply, `ttft` from its being pushed to its
    first token, `itl` between tokens. `refused` chunks found the stream's queue full, before or
    while it was counted. `shares` says where the time went, and `power` what the GPU drew,
    where there is one. `growth` is of memory, while it was counted."""

    streams: int
    seconds: float
    counted: int
    chunk: Quantiles
    ttft: Quantiles
    itl: Quantiles
    refused: int
    mean_batch: float
    shares: TimeShares | None
    growth: Memory
    power: GpuPower | None

    def is_live(self, chunk_seconds: float) -> bool:
        """Whether 99 of 100 replies were whole in time and none was refused."""
        return self.refused == 0 and self.chunk.p99 < chunk_seconds


@dataclass(frozen=True, slots=True)
class StreamsReport:
    """`live_streams` is the most streams that were live; 0 if none were. `admitted` is how many the
    engine would let in by the costs it has measured meanwhile, None where it knows none.
    `by_deadline` says whether it divided its steps by deadline, as it does for live sessions.
    `memory` is that at the end."""

    executor: str
    frame_size: tuple[int, int]
    chunk_seconds: float
    context_tokens: int
    live_streams: int
    admitted: int | None
    by_deadline: bool
    results: tuple[StreamsResult, ...]
    memory: Memory


def measure_streams(
    engine: StreamingEngine,
    source: Callable[[int], Iterator[Chunk]],
    *,
    counts: Sequence[int],
    seconds: float,
    warmup: int,
    find: bool = False,
    by_deadline: bool = True,
    policy: Policy | None = None,
    max_new_tokens: int | None = None,
    previous_text: str = "",
) -> StreamsReport:
    """Hold each of `counts` streams for `seconds`, after `warmup` chunks of each to fill windows.

    With `find`, numbers between the most that were live and the next that were not follow, until
    there is none between them. Sessions are live ones that are all let in and never degraded or,
    without `by_deadline`, ordinary ones. `source(i)` is the video of stream i, `previous_text` what
    every stream begins with. Raises CapacityError if the engine has no room for the largest count,
    FramesinkError if a session fails.
    """
    with ExitStack() as stack:
        streams = [
            LiveStream(
                stack.enter_context(
                    engine.open_session(
                        policy,
                        max_new_tokens=max_new_tokens,
                        previous_text=previous_text,
                        real_time=RealTime("none", ladder=None) if by_deadline else None,
                    )
                ),
                source(index),
            )
            for index in range(max(counts))
        ]
        fill(streams, warmup)
        length = streams[0].chunk_seconds
        results: dict[int, StreamsResult] = {}
        waiting = sorted(counts)
        while waiting:
            count = waiting.pop(0)
            results[count] = _hold(engine, streams[:count], length, seconds)
            if find and not waiting:
                live = [n for n, result in results.items() if result.is_live(length)]
                waiting = _between(live, [n for n in results if n not in live])
        context = max(stream.session.stats().context_tokens for stream in streams)
        admitted, memory = engine.capacity().by_time, Memory.now()
    return StreamsReport(
        executor=engine.executor_reason,
        frame_size=streams[0].frame_size,
        chunk_seconds=length,
        context_tokens=context,
        live_streams=max(
            (count for count, result in results.items() if result.is_live(length)), default=0
        ),
        admitted=admitted,
        by_deadline=by_deadline,
        results=tuple(results[count] for count in sorted(results)),
        memory=memory,
    )


def _between(live: Sequence[int], late: Sequence[int]) -> list[int]:
    """The next number to try: halfway between the most that were live and the fewest above that
    were not; none if there is nothing between, or nothing above."""
    most = max(live, default=0)
    above = [count for count in late if count > most]
    if not above or min(above) - most < 2:
        return []
    return [(most + min(above)) // 2]


def _hold(
    engine: StreamingEngine,
    streams: Sequence[LiveStream],
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
    pushed: list[tuple[float, LiveStream]] = []
    before, memory = engine.stats(), Memory.now()
    settled = False
    meter = PowerMeter.of_first_gpu()
    for arrival, stream in arrivals:
        time.sleep(max(0.0, arrival - time.monotonic()))
        if arrival >= counted_from and not settled:
            settled = True
            before, memory = engine.stats(), Memory.now()
            counted_from = time.monotonic()
            if meter is not None:
                meter.start()
        if stream.push(arrival):
            pushed.append((arrival, stream))
    after, counted_to = engine.stats(), time.monotonic()
    growth = Memory.now().growth_since(memory)
    power = meter.stop() if meter is not None and settled else None
    events = [(arrival, stream.wait()) for arrival, stream in pushed]
    counted = [event for arrival, event in events if arrival >= start + SETTLING]
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
        shares=time_shares(
            before.gpu_seconds,
            after.gpu_seconds,
            [(arrival, arrival + event.lag) for arrival, event in events],
            (counted_from, counted_to),
        ),
        growth=growth,
        power=power,
    )
