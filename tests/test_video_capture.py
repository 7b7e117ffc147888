"""The capture thread: what it delivers, and that it always ends."""

import threading
import time

import numpy as np
import pytest

from framesink.runtime.errors import VideoError
from framesink.runtime.video.capture import ChunkStream


class ScriptedSource:
    """Frames at given times; then the end, an error, or silence until it is interrupted."""

    def __init__(self, times, *, live=False, end: Exception | str = "end") -> None:
        self.name, self.live = "script", live
        self.times, self.end = list(times), end
        self.interrupted = threading.Event()
        self.closed = 0
        self.exhausted = threading.Event()
        self.gate_at, self.gate = -1.0, threading.Event()

    def grab(self):
        if self.interrupted.is_set():
            return None
        if self.times and self.times[0] == self.gate_at:
            self.gate.wait(30)
        if self.times:
            return self.times.pop(0)
        self.exhausted.set()
        if isinstance(self.end, Exception):
            raise self.end
        if self.end == "hang":
            self.interrupted.wait(30)
        return None

    def retrieve(self):
        return np.zeros((4, 6, 3), np.uint8)

    def interrupt(self):
        self.interrupted.set()

    def close(self):
        self.closed += 1


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def half_seconds(seconds: int) -> list[float]:
    return [index / 2 for index in range(2 * seconds)]


def test_a_file_as_fast_as_chunks_are_taken_loses_nothing() -> None:
    source = ScriptedSource(half_seconds(50))
    chunks = list(ChunkStream(source, realtime=False, drop_policy="latest"))
    assert [chunk.t0 for chunk in chunks] == [float(i) for i in range(50)]
    assert all(chunk.dropped == 0 and len(chunk.frames) == 2 for chunk in chunks)
    assert source.closed == 1


def test_reading_ahead_is_bounded() -> None:
    source = ScriptedSource(half_seconds(1000))
    with ChunkStream(source, realtime=False) as stream:
        assert next(stream).t0 == 0.0
        assert len(source.times) > 2 * 1000 - 20
    assert len(source.times) > 2 * 1000 - 20
    assert source.closed == 1


@pytest.mark.parametrize(("policy", "start"), [("latest", 9.0), ("uniform", 1.0), ("motion", 1.0)])
def test_a_slow_model_on_a_live_source(policy, start: float) -> None:
    source = ScriptedSource(half_seconds(10), live=True, end="hang")
    source.gate_at = 1.0
    with ChunkStream(source, drop_policy=policy) as stream:
        first = next(stream)
        source.gate.set()
        assert source.exhausted.wait(30)
        second = next(stream)
    assert (first.t0, first.t1, first.dropped) == (0.0, 1.0, 0)
    assert (second.t0, second.t1, second.dropped) == (start, 10.0, 16)
    assert len(second.frames) == 2
    assert stream.dropped_frames == 16


def test_realtime_pacing_hands_out_no_frame_before_it_is_due() -> None:
    started = time.monotonic()
    chunks = list(ChunkStream(ScriptedSource([0.0, 0.02, 0.04, 0.06]), 50.0, 0.02))
    assert len(chunks) + sum(chunk.dropped for chunk in chunks) == 4
    assert all(chunk.captured_at - started >= chunk.timestamps[-1] for chunk in chunks)


def test_an_error_comes_after_what_was_captured() -> None:
    source = ScriptedSource([0.0, 0.5, 1.0], end=VideoError("cut off."))
    stream = ChunkStream(source, realtime=False)
    assert next(stream).t0 == 0.0
    partial = next(stream)
    assert (partial.t0, len(partial.frames)) == (1.0, 1)
    with pytest.raises(VideoError, match="cut off"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert source.closed == 1


def test_a_defect_of_the_source_is_not_swallowed() -> None:
    stream = ChunkStream(ScriptedSource([], end=ZeroDivisionError("defect")), realtime=False)
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_closing_before_the_start() -> None:
    source = ScriptedSource(half_seconds(3))
    stream = ChunkStream(source)
    stream.close()
    stream.close()
    assert source.closed == 1
    assert list(stream) == []


def test_closing_while_the_reader_waits() -> None:
    source = ScriptedSource([], live=True, end="hang")
    stream = ChunkStream(source)
    seen: list[object] = []
    reader = threading.Thread(target=lambda: seen.extend(stream))
    reader.start()
    assert source.exhausted.wait(30)
    stream.close()
    reader.join(30)
    assert not reader.is_alive()
    assert seen == []
    assert source.closed == 1


def test_closing_while_the_capture_waits_for_the_reader() -> None:
    source = ScriptedSource(half_seconds(100))
    stream = ChunkStream(source, realtime=False)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert source.closed == 1


def test_a_slow_camera_gives_short_chunks() -> None:
    source = ScriptedSource([0.0, 1.4, 2.8, 4.2], live=False)
    chunks = list(ChunkStream(source, realtime=False))
    assert [(chunk.t0, len(chunk.frames)) for chunk in chunks] == [
        (0.0, 1),
        (1.0, 1),
        (2.0, 1),
        (4.0, 1),
    ]
