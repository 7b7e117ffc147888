"""A session host without Triton: requests are made here, responses are kept."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from fake.engine import make_frames
from fake.waiting import WAIT_SECONDS
from framesink.runtime.arrays import AnyArray, UInt8Array
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.events import Event
from framesink.serving.errors import StatusCode
from framesink.serving.metrics import ServingMetrics, Write
from framesink.serving.options import ServeOptions
from framesink.serving.requests import RawRequest
from framesink.serving.session_host import SessionHost


class RecordingSink:
    """A metric sink that keeps every value by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def counter(self, name: str, meaning: str, labels: Mapping[str, str]) -> Write:
        """See MetricSink."""
        key = (name, *labels.values())
        self.values[key] = 0.0

        def add(value: float) -> None:
            assert value > 0, "a counter never falls"
            self.values[key] += value

        return add

    def gauge(self, name: str, meaning: str, labels: Mapping[str, str]) -> Write:
        """See MetricSink."""
        key = (name, *labels.values())
        return lambda value: self.values.__setitem__(key, value)


class Answer:
    """A responder that keeps what it is told, in order, and refuses anything after the last."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.error: tuple[StatusCode, str] | None = None
        self.cancelled = False
        self._done = threading.Event()

    def send(self, event: Event, *, last: bool) -> None:
        """See Responder."""
        assert not self._done.is_set(), "a response after the last"
        self.events.append(event)
        if last:
            self._done.set()

    def finish(self) -> None:
        """See Responder."""
        assert not self._done.is_set(), "a response after the last"
        self._done.set()

    def fail(self, code: StatusCode, sentence: str) -> None:
        """See Responder."""
        assert not self._done.is_set(), "a response after the last"
        assert sentence.endswith(".")
        self.error = (code, sentence)
        self._done.set()

    @property
    def done(self) -> bool:
        """Whether the last response has come."""
        return self._done.is_set()

    def wait(self) -> "Answer":
        """Wait for the last response."""
        assert self._done.wait(WAIT_SECONDS), "no answer came"
        return self

    @property
    def code(self) -> StatusCode | None:
        """The status it ended with, None for success."""
        return self.wait().error[0] if self.wait().error else None

    @property
    def sentence(self) -> str:
        """The error's sentence; empty for success."""
        return self.wait().error[1] if self.wait().error else ""

    @property
    def tokens(self) -> list[int]:
        """The tokens of the reply it got."""
        return [token for event in self.wait().events for token in event.tokens]


@dataclass
class HostDesk:
    """A session host and what its surroundings were told."""

    engine: StreamingEngine
    sink: RecordingSink
    metrics: ServingMetrics
    host: SessionHost
    draining: threading.Event
    drained: threading.Event
    broken: list[str]
    asked: list[Answer] = field(default_factory=list)

    def ask(
        self,
        session: int | str,
        *,
        start: bool = False,
        end: bool = False,
        frames: UInt8Array | None = None,
        question: str | None = None,
        inputs: Mapping[str, AnyArray] | None = None,
        answer: Answer | None = None,
        **parameters: Any,
    ) -> Answer:
        """Submit a request; frames travel as PNG files."""
        tensors: dict[str, AnyArray] = dict(inputs or {})
        if frames is not None:
            files = [bytes(cv2.imencode(".png", frame[..., ::-1])[1]) for frame in frames]
            tensors["FRAMES"] = np.array(files, dtype=np.object_)
        if question is not None:
            tensors["QUESTION"] = np.array([question.encode()], dtype=np.object_)
        answer = answer or Answer()
        self.asked.append(answer)
        text = json.dumps(parameters) if parameters else ""
        self.host.submit(RawRequest(session, start, end, text, tensors), answer)
        return answer

    def open(self, session: int, **parameters: Any) -> None:
        """Open a session."""
        assert self.ask(session, start=True, **parameters).code is None

    def chunk(self, session: int, number: int, **more: Any) -> Answer:
        """Send a chunk of two random frames."""
        return self.ask(session, frames=make_frames(number), **more)

    def end(self, session: int, **parameters: Any) -> Answer:
        """End a session."""
        return self.ask(session, end=True, **parameters)


def make_desk(
    engine: StreamingEngine, metrics: ServingMetrics, sink: RecordingSink, options: ServeOptions
) -> HostDesk:
    """A host over `engine`, which must be threaded and have `metrics` as its observer."""
    draining, drained = threading.Event(), threading.Event()
    broken: list[str] = []
    host = SessionHost(
        engine,
        precision="fp16",
        options=options,
        metrics=metrics,
        is_draining=draining.is_set,
        on_drained=drained.set,
        on_broken=broken.append,
    )
    return HostDesk(engine, sink, metrics, host, draining, drained, broken)
