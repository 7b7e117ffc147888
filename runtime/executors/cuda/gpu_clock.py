"""How long the GPU works on what, read without waiting for it in between."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Events that wait take memory.
_COLLECT_AT = 1000


class GpuClock:
    """Sums the GPU's seconds by name. One thread measures, any may read.

    A span is known once the GPU has passed it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
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
        """The sums of all spans that are over."""
        with self._lock:
            self._collect()
            return dict(self._seconds)

    def _collect(self) -> None:
        waiting = []
        for name, begin, end in self._open:
            if end.query():
                self._seconds[name] += begin.elapsed_time(end) / 1000.0
            else:
                waiting.append((name, begin, end))
        self._open = waiting
