"""How long the GPU works on what, read without waiting for it in between."""

import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from framesink.runtime.covered_time import CoveredTime

# What the time in which the GPU worked on anything is called.
BUSY = "busy"
# Events that wait take memory.
_COLLECT_AT = 1000


class GpuClock:
    """Sums the GPU's seconds by name, and those in which it worked on anything. One thread
    measures, any may read.

    A span is known once the GPU has passed it and all that were launched before it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._busy = CoveredTime()
        self._open: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        # Times are told from this event, which moves along: events tell float32 milliseconds.
        self._origin: torch.cuda.Event | None = None
        self._origin_seconds = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count what is launched inside, in the current stream, as `name`."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        with self._lock:
            self._open.append((name, begin, end))
            if len(self._open) >= _COLLECT_AT:
                self._collect()

    def seconds(self) -> dict[str, float]:
        """The sums of all spans that are over, and under `BUSY` the time that any of them took:
        less than their sum where the GPU worked on two at once."""
        with self._lock:
            self._collect()
            return {**self._seconds, BUSY: self._busy.seconds}

    def _collect(self) -> None:
        spans: list[tuple[float, float]] = []
        origin = self._origin
        while self._open and self._open[0][2].query():
            name, begin, end = self._open.popleft()
            seconds = begin.elapsed_time(end) / 1000.0
            self._seconds[name] += seconds
            origin = origin or begin
            since = origin.elapsed_time(begin) / 1000.0
            spans.append((self._origin_seconds + since, self._origin_seconds + since + seconds))
            last, last_seconds = begin, self._origin_seconds + since
        if spans:
            self._busy.add(spans)
            self._origin, self._origin_seconds = last, last_seconds
