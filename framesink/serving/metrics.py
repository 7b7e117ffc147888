"""What a server tells Prometheus about its sessions.

Recording costs a lock and an addition; `flush` hands everything on at once, from a thread that may
wait. A write to Triton is a message to the server that holds Python's lock until it is answered
(0.13 ms, seen on two busy cores), so there are few, however much was recorded: Triton's own
histograms, which take observations one by one, are not used. The names, labels and buckets are
those the dashboard in docs/grafana reads.
"""

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from framesink.runtime.events import Event, EventKind
from framesink.runtime.observer import StepReport
from framesink.runtime.stats import EngineStats
from framesink.serving.errors import StatusCode
from framesink.serving.session_end import EndReason

Write = Callable[[float], None]

SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 16.0)
RUNGS = ("0", "1", "2", "3+")
BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)


class MetricSink(Protocol):
    """Where metrics go. Each method makes one metric and returns how to write to it."""

    def counter(self, name: str, meaning: str, labels: Mapping[str, str]) -> Write:
        """A number that grows; a write adds to it."""
        ...

    def gauge(self, name: str, meaning: str, labels: Mapping[str, str]) -> Write:
        """A number of now; a write sets it."""
        ...


class _Histogram:
    """A distribution as Prometheus stores one: how many observations are at most each bound, how
    many there are, and their sum."""

    def __init__(self, sink: MetricSink, name: str, meaning: str, bounds: Sequence[float]) -> None:
        self._bounds = (*bounds, math.inf)
        labels = [*(f"{bound:g}" for bound in bounds), "+Inf"]
        self._buckets = [sink.counter(f"{name}_bucket", meaning, {"le": le}) for le in labels]
        self._sum = sink.counter(f"{name}_sum", meaning, {})
        self._count = sink.counter(f"{name}_count", meaning, {})

    def write(self, values: Sequence[float]) -> None:
        """Add observations, 0 or more each."""
        ordered = sorted(values)
        for bound, bucket in zip(self._bounds, self._buckets, strict=True):
            if below := bisect_right(ordered, bound):
                bucket(below)
        self._count(len(ordered))
        if total := math.fsum(ordered):
            self._sum(total)


class ServingMetrics:
    """The metrics of a server. Safe from any thread; also the engine's observer."""

    def __init__(self, sink: MetricSink) -> None:
        def counter(name: str, meaning: str, **labels: str) -> Write:
            return sink.counter(f"framesink_{name}_total", meaning, labels)

        def gauge(name: str, meaning: str, **labels: str) -> Write:
            return sink.gauge(f"framesink_{name}", meaning, labels)

        def histogram(name: str, meaning: str, bounds: Sequence[float] = SECONDS) -> _Histogram:
            return _Histogram(sink, f"framesink_{name}", meaning, bounds)

        self._sink = sink  # Triton's metrics are gone as soon as nobody holds their families
        self._lock = threading.Lock()
        self._added: dict[Write, float] = {}
        self._set: dict[Write, float] = {}
        self._observed: dict[_Histogram, list[float]] = {}

        self._sessions = gauge("sessions", "live sessions")
        self._pages = {
            state: gauge("kv_pages", "K/V pages by state", state=state)
            for state in ("used", "free", "reserved")
        }
        self._load = gauge("predicted_load", "share of the time that live sessions take")
        self._fit = gauge("streams_that_fit", "live sessions of the default kind there is room for")
        self._waiting = gauge("sessions_queued", "sessions that wait to be opened")
        self._not_opened = counter("sessions_refused", "sessions that found no room")
        self._by_rung = [
            gauge("sessions_by_rung", "live sessions by the rung of their ladder", rung=name)
            for name in RUNGS
        ]
        self._in_queue = 0
        self._opened = counter("sessions_opened", "sessions opened")
        self._ended = {
            reason: counter("sessions_ended", "sessions ended, by reason", reason=reason.value)
            for reason in EndReason
        }
        self._refused = {
            code: counter("refusals", "requests refused, by status", code=code.name.lower())
            for code in StatusCode
        }
        self._chunks = counter("chunks", "chunks taken")
        self._questions = counter("questions", "questions taken")
        self._dropped = counter("dropped_frames", "frames clients dropped before sending")
        self._replies = {
            kind: counter("replies", "replies ended, by kind", kind=kind.value)
            for kind in EventKind
        }
        self._evicted = counter("evicted_tokens", "tokens that left a context")
        self._tokens = counter("tokens", "tokens written, prompts and replies")
        self._patches = counter("patches", "ViT patches encoded")
        self._ttft = histogram("ttft_seconds", "from a chunk's arrival to its reply's first token")
        self._itl = histogram("itl_seconds", "between tokens of a reply")
        self._lag = histogram("lag_seconds", "from a chunk's end to the end of its reply")
        self._step_batch = histogram("step_batch_size", "sequences a step", BATCH_SIZES)
        self._step_seconds = histogram("step_seconds", "a step of the language model")
        self._encode_seconds = histogram("encode_seconds", "a chunk in the vision encoder")

    def session_opened(self) -> None:
        """A session was opened."""
        self._add(self._opened)

    def session_waits(self, change: int) -> None:
        """One session more, or less, waits to be opened."""
        with self._lock:
            self._in_queue += change

    def session_refused(self) -> None:
        """A session found no room."""
        self._add(self._not_opened)

    def session_ended(self, reason: EndReason) -> None:
        """A session ended, whoever ended it."""
        self._add(self._ended[reason])

    def refused(self, code: StatusCode) -> None:
        """A request was refused."""
        self._add(self._refused[code])

    def chunk_taken(self) -> None:
        """A chunk waits for its turn."""
        self._add(self._chunks)

    def question_taken(self) -> None:
        """A question waits for its turn."""
        self._add(self._questions)

    def reply_ended(self, event: Event) -> None:
        """A reply, or a session, ended with this final event."""
        self._add(self._replies[event.kind])
        if event.timing is not None:
            self._observe(self._ttft, event.timing.ttft)
            self._observe(self._itl, *event.timing.itl)
            self._observe(self._lag, event.lag)

    def state(self, sessions: int, stats: EngineStats, streams_that_fit: int) -> None:
        """Figures of now."""
        lowest = len(RUNGS) - 1
        with self._lock:
            self._set[self._sessions] = sessions
            self._set[self._waiting] = self._in_queue
            self._set[self._fit] = streams_that_fit
            if stats.predicted_load is not None:
                self._set[self._load] = stats.predicted_load
            for rung, write in enumerate(self._by_rung):
                self._set[write] = sum(
                    count for stood, count in stats.rungs.items() if min(stood, lowest) == rung
                )
            self._set[self._pages["used"]] = stats.pages_used
            self._set[self._pages["free"]] = stats.pages_total - stats.pages_used
            self._set[self._pages["reserved"]] = stats.pages_reserved

    def stepped(self, report: StepReport) -> None:
        """See EngineObserver."""
        self._add(self._tokens, report.tokens)
        self._observe(self._step_batch, report.decoding + report.prefilling)
        self._observe(self._step_seconds, report.seconds)

    def encoded(self, patches: int, seconds: float) -> None:
        """See EngineObserver."""
        self._add(self._patches, patches)
        self._observe(self._encode_seconds, seconds)

    def turn_began(self, session: int, *, evicted_tokens: int, dropped_frames: int) -> None:  # noqa: ARG002
        """See EngineObserver."""
        self._add(self._evicted, evicted_tokens)
        self._add(self._dropped, dropped_frames)

    def flush(self) -> None:
        """Hand everything recorded since the last time to the sink."""
        with self._lock:
            added, self._added = self._added, {}
            levels, self._set = self._set, {}
            observed, self._observed = self._observed, {}
        for write, value in (*added.items(), *levels.items()):
            write(value)
        for histogram, values in observed.items():
            histogram.write(values)

    def _add(self, write: Write, value: float = 1.0) -> None:
        if value:
            with self._lock:
                self._added[write] = self._added.get(write, 0.0) + value

    def _observe(self, histogram: _Histogram, *values: float) -> None:
        if values:
            with self._lock:
                self._observed.setdefault(histogram, []).extend(values)
