"""A machine of known costs that live streams share, in a time of its own: the scheduler alone."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from framesink.runtime.load.capacity import StreamShape
from framesink.runtime.load.costs import LinearCost, WorkCosts
from framesink.runtime.scheduler import Encoding, Scheduler, Work

# What one H200 takes for 7B sizes in FP8, rounded (docs/performance.md): seconds per chunk of 2,880
# patches, prompt of 748 tokens, decode step.
H200 = WorkCosts(
    vision=LinearCost(0.0, 5e-3 / 2880),
    prefill=LinearCost(1e-3, 13.5e-3 / 748),
    decode=LinearCost(2.6e-3, 0.175e-3),
    round=0.3e-3,
)
W720 = StreamShape(chunk_seconds=1.0, patches=2880, prompt_tokens=748, new_tokens=20)


@dataclass
class LiveStream:
    """A stream whose first chunk is complete at `first`; `lags` are those of its replies so far."""

    shape: StreamShape
    first: float
    lags: list[float] = field(default_factory=list)
    waiting: deque[float] = field(default_factory=deque)
    arrived: float | None = None
    encoded: bool = False
    prompt: int = 0
    said: int = 0

    def begin(self) -> None:
        """Take the next chunk that waits."""
        if self.arrived is None and self.waiting:
            self.arrived = self.waiting.popleft()
            self.encoded, self.prompt, self.said = False, self.shape.prompt_tokens, 0

    @property
    def deadline(self) -> float:
        assert self.arrived is not None
        return self.arrived + self.shape.chunk_seconds

    def work(self, number: int) -> Work:
        """What it has to write."""
        decoding = self.prompt == 0
        return Work(
            number,
            self.deadline,
            1 if decoding else self.prompt,
            decoding,
            self.shape.new_tokens - self.said,
            self.shape.chunk_seconds,
        )


@dataclass
class Run:
    """Every stream, and the longest that a reply waited between two tokens."""

    streams: Sequence[LiveStream]
    longest_stall: float = 0.0

    def lags(self, after: float = 3.0) -> list[float]:
        """Lags of all replies but the first ones."""
        skip = math.ceil(after)
        return [lag for stream in self.streams for lag in stream.lags[skip:]]


def run_live(
    streams: Sequence[LiveStream],
    seconds: float,
    make_scheduler: Callable[[Callable[[], float]], Scheduler],
    costs: WorkCosts = H200,
) -> Run:
    """Let chunks arrive for `seconds` and answer all of them. `make_scheduler` is given a clock."""
    run, now = Run(streams), 0.0
    scheduler = make_scheduler(lambda: now)
    arrivals = sorted(
        (stream.first + k * stream.shape.chunk_seconds, number)
        for number, stream in enumerate(streams)
        for k in range(int((seconds - stream.first) / stream.shape.chunk_seconds))
    )
    spoke = dict.fromkeys(range(len(streams)), 0.0)
    while True:
        while arrivals and arrivals[0][0] <= now:
            at, number = arrivals.pop(0)
            streams[number].waiting.append(at)
        for stream in streams:
            stream.begin()
        busy = {number: s for number, s in enumerate(streams) if s.arrived is not None}
        if not busy:
            if not arrivals:
                return run
            now = arrivals[0][0]
            continue
        replies = [s.work(n) for n, s in busy.items() if s.encoded and s.prompt == 0]
        waiting = [
            Encoding(n, s.deadline, s.shape.patches, s.shape.new_tokens, s.shape.chunk_seconds)
            for n, s in busy.items()
            if not s.encoded
        ]
        encoded = scheduler.schedule_encoding(waiting, replies)
        for number in encoded:
            now += costs.vision.seconds(streams[number].shape.patches)
            streams[number].encoded = True
        shares = scheduler.schedule([s.work(n) for n, s in busy.items() if s.encoded])
        assert encoded or shares, "there is work, and none is done"
        decoding = sum(streams[share.sequence].prompt == 0 for share in shares)
        prompt = sum(s.tokens for s in shares if streams[s.sequence].prompt > 0)
        now += costs.step(decoding, prompt, len(shares) - decoding)
        for share in shares:
            stream = streams[share.sequence]
            if stream.prompt > 0:
                stream.prompt -= share.tokens
                if stream.prompt > 0:
                    continue
            else:
                run.longest_stall = max(run.longest_stall, now - spoke[share.sequence])
            spoke[share.sequence] = now
            stream.said += 1
            if stream.said == stream.shape.new_tokens:
                assert stream.arrived is not None
                stream.lags.append(now - stream.arrived)
                stream.arrived = None
