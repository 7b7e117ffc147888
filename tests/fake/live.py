"""A slow machine with a clock of its own, and live streams of one-second chunks on it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fake.engine import PREPROCESS, make_engine, make_protocol
from fake.executor import FakeExecutor
from framesink.runtime.arrays import Float32Array
from framesink.runtime.events import Event
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.load.costs import LinearCost, WorkCosts
from framesink.runtime.load.ladder import RealTime
from framesink.runtime.preprocess import Grid
from framesink.runtime.session import Session
from framesink.runtime.video.chunk import Chunk

# A chunk of four frames of 56×84 pixels takes an eighth of a second, a decode step a hundredth.
COSTS = WorkCosts(
    vision=LinearCost(0.005, 0.0025),
    prefill=LinearCost(0.005, 0.0005),
    decode=LinearCost(0.01, 0.002),
)
FRAMES = 4
MOST_WAITING = 5
LIVE_PREPROCESS = replace(PREPROCESS, fps=float(FRAMES))
# No special token, so that replies are as long as they may be.
ORDINARY_TOKEN = 65


class Clock:
    """Stands in for `time.monotonic`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class SlowExecutor(FakeExecutor):
    """Takes as long as `costs` say, times `slowness`."""

    def __init__(self, clock: Clock, costs: WorkCosts = COSTS) -> None:
        super().__init__(make_protocol(), num_pages=4096, page_size=16)
        self.slowness = 1.0
        self._likely = [ORDINARY_TOKEN]
        self._clock = clock
        self._costs = costs

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """See Executor."""
        self._clock.now += self.slowness * self._costs.vision.seconds(grid.patches)
        return super().encode_vision(patches, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """See Executor."""
        sizes = [given.token_ids.size for given in batch]
        decoding = sizes.count(1)
        self._clock.now += self.slowness * self._costs.step(
            decoding, sum(sizes) - decoding, len(sizes) - decoding
        )
        return super().step(batch)


@dataclass
class LiveSession:
    """A session a chunk of which arrives `every` so often, the next one at `due`."""

    session: Session
    due: float
    every: float = 1.0
    chunks: int = 0
    events: list[Event] = field(default_factory=list)

    def lags(self) -> list[float]:
        """Of every reply."""
        return [event.lag for event in self.events if event.final]

    def notices(self) -> list[str]:
        """What its `degraded` events say."""
        return [event.text for event in self.events if event.kind == "degraded"]


class LiveMachine:
    """An engine over a slow executor, and streams that are fed while it works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        monkeypatch.setattr(time, "monotonic", self.clock)
        self.executor = SlowExecutor(self.clock)
        self.engine = make_engine(executor=self.executor, preprocess=LIVE_PREPROCESS)
        self.live: list[LiveSession] = []

    def open(self, real_time: RealTime | None, *, offset: float = 0.0) -> LiveSession:
        """Open a session whose first chunk is complete in `offset` seconds."""
        session = self.engine.open_session(max_pending_chunks=MOST_WAITING, real_time=real_time)
        self.live.append(LiveSession(session, self.clock.now + offset))
        return self.live[-1]

    def close(self, live: LiveSession) -> None:
        """End a session."""
        live.events += live.session
        live.session.close()
        self.live.remove(live)

    def run(self, seconds: float) -> None:
        """Let chunks arrive, and everything be done, for so long; then take the events."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            for live in self.live:
                while live.due <= self.clock.now:
                    self._push(live)
            if not self.engine.run_once():
                self.clock.now = min([end, *(live.due for live in self.live)])
        for live in self.live:
            live.events += live.session

    def _push(self, live: LiveSession) -> None:
        """The chunk that is due; where too many wait, it is lost."""
        arrived, live.due = live.due, live.due + live.every
        if live.chunks - live.session.stats().turns == MOST_WAITING:
            return
        frames = np.full((FRAMES, 56, 84, 3), live.chunks % 256, np.uint8)
        t0 = float(live.chunks)
        times = tuple(t0 + i / FRAMES for i in range(FRAMES))
        live.session.push_chunk(Chunk(frames, t0, t0 + 1.0, times, arrived))
        live.chunks += 1
