"""The GPU's clock, on made-up events."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framesink.runtime.covered_time import CoveredTime

torch = pytest.importorskip("torch", reason="its events are torch's")

from framesink.runtime.executors.cuda.gpu_clock import GpuClock  # noqa: E402

SPANS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 40)), max_size=30)


@given(SPANS, st.integers(1, 7))
def test_covered_time_counts_every_moment_once(drawn: list[tuple[int, int]], size: int) -> None:
    spans = sorted((begin, begin + length) for begin, length in drawn)
    covered = CoveredTime()
    for start in range(0, len(spans), size):
        covered.add([(float(begin), float(end)) for begin, end in spans[start : start + size]])
    moments = np.zeros(300, bool)
    for begin, end in spans:
        moments[begin:end] = True
    assert covered.seconds == moments.sum()


class Events:
    """Stands in for `torch.cuda.Event`: each is passed at the next of `times`, milliseconds."""

    def __init__(self, times: list[float]) -> None:
        self.now = 0.0
        self._times = iter(times)

    def __call__(self, enable_timing: bool) -> "Events.Event":
        assert enable_timing
        return Events.Event(self)

    class Event:
        def __init__(self, events: "Events") -> None:
            self._events = events

        def record(self) -> None:
            self.time = next(self._events._times)

        def query(self) -> bool:
            return self.time <= self._events.now

        def elapsed_time(self, end: "Events.Event") -> float:
            assert self.query()
            assert end.query()
            return end.time - self.time


def test_work_side_by_side_is_busy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Vision from 10 to 20 beside two steps, 12 to 15 and 18 to 26; nothing until 40.
    events = Events([10, 20, 12, 15, 18, 26, 40, 41])
    monkeypatch.setattr(torch.cuda, "Event", events)
    clock = GpuClock()
    for name in ("vision", "decode", "decode", "prefill"):
        with clock.measure(name):
            pass
    assert clock.seconds() == {"busy": 0.0}
    events.now = 20  # the first step is over too, and told now
    assert clock.seconds() == pytest.approx({"vision": 0.010, "decode": 0.003, "busy": 0.010})
    events.now = 50
    told = {"vision": 0.010, "decode": 0.011, "prefill": 0.001, "busy": 0.017}
    assert clock.seconds() == pytest.approx(told)
    assert clock.seconds() == pytest.approx(told)
