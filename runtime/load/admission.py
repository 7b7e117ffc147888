"""Who may stream live: what all live streams take together, and the queue of those who wait."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from framesink.runtime.errors import BusyError, SessionClosedError
from framesink.runtime.load.capacity import (
    UTILISATION,
    StreamShape,
    predicted_load,
    streams_that_fit,
)
from framesink.runtime.load.costs import WorkCosts

# How often who waits looks whether the load has changed without a session ending.
_LOOK_SECONDS = 0.25

_Admitted = TypeVar("_Admitted")


@dataclass(slots=True)
class _Stream:
    declared: StreamShape
    running: StreamShape
    rung: int = 0


class LiveStreams:
    """The live streams of an engine by their sessions' numbers. Safe from any thread.

    Each has the shape it was declared with, in full quality, and the one it runs in after its
    ladder.
    """

    def __init__(
        self, costs: Callable[[], WorkCosts | None], utilisation: float = UTILISATION
    ) -> None:
        """`costs` are those of now, None while they are unknown."""
        self.utilisation = utilisation
        self._costs = costs
        self._streams: dict[int, _Stream] = {}
        self._lock = threading.Lock()

    def enter(self, number: int, shape: StreamShape, *, check: bool) -> None:
        """Count a stream from now on.

        With `check`, raises BusyError if all declared shapes together would take more than the
        utilisation. The first stream always enters: it holds up nobody, and its ladder is what
        helps it where the machine is too slow. So does every stream while costs are unknown.
        """
        with self._lock:
            if check and self._streams:
                self._require_time(shape)
            self._streams[number] = _Stream(shape, shape)

    def leave(self, number: int) -> None:
        """Do not count it any more."""
        with self._lock:
            self._streams.pop(number, None)

    def update(self, number: int, declared: StreamShape, running: StreamShape, rung: int) -> None:
        """What a stream would ask for in full quality, what it asks for on its rung, and that."""
        with self._lock:
            if number in self._streams:
                self._streams[number] = _Stream(declared, running, rung)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._streams)

    def load(self) -> float | None:
        """Share of the time that the streams take as they run; None while costs are unknown."""
        costs = self._costs()
        with self._lock:
            shapes = [stream.running for stream in self._streams.values()]
        return None if costs is None else predicted_load(shapes, costs)

    def load_if(self, number: int, running: StreamShape) -> float | None:
        """The same, if one stream ran in another shape."""
        costs = self._costs()
        with self._lock:
            shapes = [s.running for n, s in self._streams.items() if n != number]
        return None if costs is None else predicted_load([*shapes, running], costs)

    def rungs(self) -> dict[int, int]:
        """How many streams stand on which rung; 0 is full quality."""
        with self._lock:
            rungs = [stream.rung for stream in self._streams.values()]
        return {rung: rungs.count(rung) for rung in sorted(set(rungs))}

    def _require_time(self, shape: StreamShape) -> None:
        costs = self._costs()
        if costs is None:
            return
        shapes = [stream.declared for stream in self._streams.values()]
        load = predicted_load([*shapes, shape], costs)
        if load <= self.utilisation:
            return
        fit = max(1, streams_that_fit(shape, costs, self.utilisation))
        raise BusyError(
            f"This machine has time for {fit} such live streams and {len(shapes)} are open: with "
            f"one more they would take {load:.0%} of it, and {self.utilisation:.0%} is the most "
            "that is planned; close one, or open the session with admission none."
        )


class Entrance:
    """First come, first served, for sessions that find no room. Safe from any thread."""

    def __init__(self) -> None:
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()
        self._refused = 0
        self._closed: str | None = None

    @property
    def waiting(self) -> int:
        """Sessions that wait."""
        with self._changed:
            return len(self._waiting)

    @property
    def refused(self) -> int:
        """Sessions that were refused so far."""
        with self._changed:
            return self._refused

    def admit(self, attempt: Callable[[], _Admitted], wait: float | None) -> _Admitted:
        """What `attempt` returns. Where it raises BusyError, it is tried again for `wait` seconds,
        after those who came before; then the error is raised.

        Raises SessionClosedError once `close` was called.
        """
        deadline = time.monotonic() + (wait or 0.0)
        place = object()
        with self._changed:
            self._waiting.append(place)
        try:
            while True:
                try:
                    if self._is_next(place):
                        return attempt()
                    raise BusyError("Other sessions wait to be opened already; try again later.")
                except BusyError:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        with self._changed:
                            self._refused += 1
                        raise
                self._pause(left)
        finally:
            with self._changed:
                self._waiting.remove(place)
                self._changed.notify_all()

    def changed(self) -> None:
        """A session has ended: there may be room."""
        with self._changed:
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        """Nobody enters any more."""
        with self._changed:
            self._closed = reason
            self._changed.notify_all()

    def _is_next(self, place: object) -> bool:
        with self._changed:
            if self._closed is not None:
                raise SessionClosedError(self._closed)
            return self._waiting[0] is place

    def _pause(self, left: float) -> None:
        with self._changed:
            self._changed.wait(min(left, _LOOK_SECONDS))
