"""What a session host says to clients when there is no time for them, and when they are late."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake.engine import make_engine
from fake.host import HostDesk, RecordingSink, make_desk
from fake.live import SlowExecutor
from fake.waiting import WAIT_SECONDS, until
from pydantic import ValidationError

from framesink.runtime.events import EventKind
from framesink.runtime.load.costs import CostMeter, LinearCost, WorkCosts
from framesink.serving.errors import StatusCode
from framesink.serving.metrics import ServingMetrics
from framesink.serving.options import ServeOptions

# A second has time for two chunks, whatever is in them.
TWO_FIT = WorkCosts(LinearCost(0.4, 0.0), LinearCost(0.0, 0.0), LinearCost(0.0, 0.0))


@contextmanager
def host(
    costs: WorkCosts | None, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Iterator[HostDesk]:
    """A host whose engine is sure of what work costs."""
    monkeypatch.setattr(CostMeter, "costs", property(lambda _: costs))
    sink = RecordingSink()
    metrics = ServingMetrics(sink)
    engine = make_engine(threaded=True, observer=metrics)
    desk = make_desk(engine, metrics, sink, ServeOptions(threads=2, **options))
    try:
        yield desk
    finally:
        desk.host.close()


def test_a_session_without_time_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with host(TWO_FIT, monkeypatch) as desk:
        desk.open(1)
        desk.open(2)
        refused = desk.ask(3, start=True)
        assert refused.code is StatusCode.UNAVAILABLE
        assert "time for 2 such live streams and 2 are open" in refused.sentence
        assert desk.chunk(3, 0).code is StatusCode.UNAVAILABLE, "the session never was"
        assert desk.end(1).code is None
        desk.open(4)
        desk.metrics.flush()
        assert desk.sink.values["framesink_sessions_refused_total",] == 1
        until(lambda: desk.sink.values.get(("framesink_predicted_load",)) == pytest.approx(0.8))
        until(lambda: desk.sink.values.get(("framesink_streams_that_fit",)) == 2)


def test_sessions_that_wait_are_opened_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    with host(TWO_FIT, monkeypatch, wait_seconds=WAIT_SECONDS) as desk:
        desk.open(1)
        desk.open(2)
        third = desk.ask(3, start=True)
        fourth = desk.ask(4, start=True)
        until(lambda: desk.sink.values.get(("framesink_sessions_queued",)) == 2)
        assert not third.done
        assert desk.end(1).code is None
        assert third.code is None
        assert not fourth.done
        assert desk.chunk(3, 0).code is None
        assert desk.end(2).code is None
        assert fourth.code is None
        desk.metrics.flush()
        assert desk.sink.values["framesink_sessions_refused_total",] == 0


def test_a_client_that_ends_its_session_waits_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    with host(TWO_FIT, monkeypatch, wait_seconds=WAIT_SECONDS) as desk:
        desk.open(1)
        desk.open(2)
        third = desk.ask(3, start=True)
        until(lambda: desk.sink.values.get(("framesink_sessions_queued",)) == 1)
        desk.end(3).wait()
        assert third.code is not None
        until(lambda: desk.sink.values.get(("framesink_sessions_queued",)) == 0)


def test_without_admission_everybody_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with host(TWO_FIT, monkeypatch, admission="none") as desk:
        for number in range(1, 6):
            desk.open(number)


@pytest.mark.parametrize(("ladder", "degraded"), [(None, True), ("none", False)])
def test_a_late_session_is_told_what_it_does_without(
    monkeypatch: pytest.MonkeyPatch, ladder: str | None, degraded: bool
) -> None:
    """Its executor is too slow for it, on a clock of its own."""
    start = time.monotonic()

    class Clock:
        """Real time, and what the executor takes on top of it."""

        slow = 0.0
        real = time.monotonic

        @property
        def now(self) -> float:
            return Clock.real() + self.slow

        @now.setter
        def now(self, value: float) -> None:
            self.slow += max(0.0, value - self.now)

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    assert clock() >= start
    executor = SlowExecutor(clock)
    executor.slowness = 20.0
    sink = RecordingSink()
    metrics = ServingMetrics(sink)
    engine = make_engine(executor=executor, threaded=True, observer=metrics)
    options = ServeOptions(threads=2, admission="none", idle_seconds=1e6, resume_seconds=1e6)
    desk = make_desk(engine, metrics, sink, options)
    try:
        desk.open(1, **({} if ladder is None else {"ladder": ladder}))
        answers = [desk.chunk(1, number).wait() for number in range(8)]
        notices = [e for a in answers for e in a.events if e.kind is EventKind.DEGRADED]
        assert bool(notices) == degraded
        for notice in notices:
            assert not notice.final
            assert "later than the 1 s that are allowed: from here on " in notice.text
    finally:
        desk.host.close()


def test_a_ladder_of_a_client_is_checked() -> None:
    with pytest.raises(ValidationError, match="ladder has no rung 'speed'"):
        ServeOptions(ladder="speed")
    with pytest.raises(ValidationError):
        ServeOptions(wait_seconds=-1.0)


def test_a_session_with_a_ladder_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    with host(None, monkeypatch, admission="none") as desk:
        refused = desk.ask(1, start=True, ladder="frames,,")
        assert refused.code is StatusCode.INVALID_ARGUMENT
        assert "A ladder has no rung ''" in refused.sentence
