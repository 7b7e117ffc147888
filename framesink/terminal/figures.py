"""Figures of a running stream, from the events of its session."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from framesink.runtime.events import Event, EventKind

_RECENT_TURNS = 10


@dataclass(frozen=True, slots=True)
class Summary:
    """A whole run. `video_seconds` is the span of video time the replies cover; times are seconds
    of wall time; `ttft`, `itl` and `lag` are medians, None where there was nothing to measure."""

    video_seconds: float
    wall_seconds: float
    chunks: int
    frames: int
    dropped_frames: int
    captions: int
    answers: int
    silent: int
    ttft: float | None
    itl: float | None
    lag: float | None

    @property
    def realtime_factor(self) -> float:
        """Seconds of video per second of wall time."""
        return self.video_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def sentence(self) -> str:
        """The summary in one line."""
        return (
            f"{self.video_seconds:.1f} s of video in {self.wall_seconds:.1f} s "
            f"({self.realtime_factor:.2f}× real time): "
            f"{_count(self.chunks, 'chunk')}, {_count(self.frames, 'frame')}, "
            f"{self.dropped_frames} dropped; {_count(self.captions, 'caption')}, "
            f"{_count(self.answers, 'answer')}, {self.silent} silent; "
            f"medians: TTFT {milliseconds(self.ttft)}, ITL {milliseconds(self.itl)}, "
            f"lag {seconds(self.lag)}"
        )


class Figures:
    """Collects as events come. Not safe for several threads at once."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._started: float | None = None
        self._ended = 0.0
        self._first_t0 = self._last_t1 = 0.0
        self._kinds: dict[EventKind, int] = dict.fromkeys(EventKind, 0)
        self._ttfts: list[float] = []
        self._itls: list[float] = []
        self._lags: list[float] = []
        self._frames = self._dropped = self._chunks = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT_TURNS + 1)

    def begin(self) -> None:
        """The first chunk is about to be handed over: wall time counts from here."""
        self._started = self._ended = self._now()
        self._recent.append((self._started, 0))

    def pushed(self, frames: int, dropped: int) -> None:
        """A chunk of so many frames was handed over; so many were dropped before it."""
        self._chunks += 1
        self._frames += frames
        self._dropped += dropped

    def replied(self, event: Event) -> None:
        """A final event came."""
        self._ended = self._now()
        if sum(self._kinds.values()) == 0:
            self._first_t0 = event.t0
        self._last_t1 = max(self._last_t1, event.t1)
        self._kinds[event.kind] += 1
        self._lags.append(event.lag)
        self._recent.append((self._ended, self._frames))
        if event.timing is not None:
            self._ttfts.append(event.timing.ttft)
            self._itls.extend(event.timing.itl)

    @property
    def fps(self) -> float:
        """Frames the model was given per second of wall time, over the last turns."""
        if len(self._recent) < 2:
            return 0.0
        (begin, frames_then), (end, frames_now) = self._recent[0], self._recent[-1]
        return (frames_now - frames_then) / (end - begin) if end > begin else 0.0

    def summary(self) -> Summary:
        """The figures so far."""
        return Summary(
            video_seconds=max(0.0, self._last_t1 - self._first_t0),
            wall_seconds=self._ended - self._started if self._started is not None else 0.0,
            chunks=self._chunks,
            frames=self._frames,
            dropped_frames=self._dropped,
            captions=self._kinds[EventKind.COMMENTARY],
            answers=self._kinds[EventKind.ANSWER],
            silent=self._kinds[EventKind.SILENCE],
            ttft=statistics.median(self._ttfts) if self._ttfts else None,
            itl=statistics.median(self._itls) if self._itls else None,
            lag=statistics.median(self._lags) if self._lags else None,
        )


def milliseconds(value: float | None) -> str:
    """A time in milliseconds, three digits."""
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value >= 0.1 else f"{value * 1000:.1f} ms"


def seconds(value: float | None) -> str:
    """A time in seconds, two decimals."""
    return "–" if value is None else f"{value:.2f} s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
