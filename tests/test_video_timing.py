"""Timestamps, sampling, cutting and dropping: timestamps in, chunks out, no clock."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framesink.runtime.video.cutter import ChunkCutter, Cut, SampledFrame
from framesink.runtime.video.dropping import (
    Backlog,
    MotionMeter,
    assemble,
    most_moving,
    spread_evenly,
)
from framesink.runtime.video.timeline import Timeline

PIXEL = np.zeros((1, 1, 3), np.uint8)


def frame(timestamp: float, motion: float = 0.0) -> SampledFrame:
    return SampledFrame(PIXEL, timestamp, captured_at=100.0 + timestamp, motion=motion)


ascending = st.lists(st.floats(0.002, 3.0), min_size=1, max_size=60).map(
    lambda gaps: [float(x) for x in np.cumsum(gaps)]
)
wild = st.lists(
    st.floats() | st.sampled_from([0.0, 0.04, 0.08, math.nan, math.inf, -3.7e20, 1e5, -5.0]),
    min_size=1,
    max_size=60,
)


@given(wild)
def test_any_timestamps_become_increasing_seconds(raw: list[float]) -> None:
    timeline = Timeline(25.0)
    placed = [timeline.place(value) for value in raw]
    assert all(math.isfinite(value) and value >= 0 for value in placed)
    assert all(a < b for a, b in itertools.pairwise(placed))


@given(ascending)
def test_good_timestamps_pass_unchanged(raw: list[float]) -> None:
    timeline = Timeline(25.0)
    assert [timeline.place(value) for value in raw] == raw


@pytest.mark.parametrize(
    ("raw", "placed"),
    [
        ([math.nan] * 4, [0.0, 0.1, 0.2, 0.3]),
        ([-3.7e20] * 3, [0.0, 0.1, 0.2]),
        ([0.0, 0.1, 0.1, 0.3], [0.0, 0.1, 0.2, 0.3]),
        ([0.0, 0.1, 0.3, 0.2, 0.4], [0.0, 0.1, 0.3, 0.301, 0.4]),
        ([5.0, 5.1, 0.0, 0.1, 0.2], [5.0, 5.1, 5.2, 5.3, 5.4]),
        ([0.0, 9e4, 9e4 + 0.1], [0.0, 0.1, 0.2]),
        ([-0.2, -0.1, 0.0], [0.0, 0.1, 0.2]),
    ],
)
def test_bad_timestamps_are_mended_where_they_break(raw: list[float], placed: list[float]) -> None:
    timeline = Timeline(10.0)
    assert [timeline.place(value) for value in raw] == pytest.approx(placed)


@pytest.mark.parametrize("fps", [0.0, -1.0, math.nan, math.inf])
def test_an_unknown_frame_rate_has_a_fallback(fps: float) -> None:
    assert Timeline(fps).frame_seconds == 1 / 25


rates = st.sampled_from([(2.0, 1.0), (1.0, 1.0), (4.0, 0.5), (2.0, 2.0), (3.0, 1.0), (0.5, 1.0)])


@given(ascending, rates)
def test_cuts_hold_the_first_frame_of_each_slot(times: list[float], rate) -> None:
    fps, seconds = rate
    cutter = ChunkCutter(fps, seconds)
    cuts = [cut for time in times for cut in cutter.add(frame(time))] + cutter.flush()
    assert cutter.flush() == []
    slot = seconds / cutter.frames_per_chunk
    expected = {}
    for time in times:
        expected.setdefault(math.floor((time + 1e-3) / slot), time)
    assert [f.timestamp for cut in cuts for f in cut.frames] == list(expected.values())
    for cut in cuts:
        assert 1 <= len(cut.frames) <= cutter.frames_per_chunk
        assert cut.t1 - cut.t0 == pytest.approx(seconds)
        assert all(cut.t0 - 1e-3 <= f.timestamp < cut.t1 for f in cut.frames)
    assert all(a.t1 <= b.t0 + 1e-9 for a, b in itertools.pairwise(cuts))


@pytest.mark.parametrize("fps", [24, 25, 29.97, 30, 60, 10, 2])
def test_regular_video_gives_whole_chunks(fps: float) -> None:
    cutter = ChunkCutter(2.0, 1.0)
    times = [round(index / fps, 3) for index in range(int(10 * fps))]  # as MKV rounds them
    cuts = [cut for time in times for cut in cutter.add(frame(time))]
    assert [(cut.t0, cut.t1) for cut in cuts] == [(float(i), i + 1.0) for i in range(10)]
    assert all(len(cut.frames) == 2 for cut in cuts)


def test_a_chunk_is_cut_when_its_last_slot_is_filled() -> None:
    cutter = ChunkCutter(2.0, 1.0)
    assert cutter.add(frame(0.0)) == []
    assert not cutter.wants(0.49)
    assert len(cutter.add(frame(0.5))) == 1
    assert cutter.add(frame(3.1)) == []
    late = cutter.add(frame(7.6))
    assert [(cut.t0, len(cut.frames)) for cut in late] == [(3.0, 1), (7.0, 1)]


@pytest.mark.parametrize(("fps", "seconds"), [(0, 1), (2, 0), (math.nan, 1), (2, math.inf)])
def test_impossible_rates_are_refused(fps: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        ChunkCutter(fps, seconds)


@given(ascending, st.integers(1, 70))
def test_even_spread(times: list[float], keep: int) -> None:
    chosen = spread_evenly(times, keep)
    assert len(chosen) == min(keep, len(times))
    assert chosen == sorted(set(chosen))
    assert chosen[-1] == len(times) - 1
    if keep > 1:
        assert chosen[0] == 0


@given(st.integers(2, 40), st.integers(2, 8))
def test_even_spread_of_regular_frames_is_even(count: int, keep: int) -> None:
    chosen = spread_evenly([float(i) for i in range(count)], keep)
    gaps = np.diff(chosen)
    if keep <= count:
        assert gaps.max() - gaps.min() <= 1


@given(st.lists(st.floats(0, 255), min_size=1, max_size=30), st.integers(1, 35))
def test_most_moving_keeps_the_largest_differences(motions: list[float], keep: int) -> None:
    chosen = most_moving(motions, keep)
    assert chosen == sorted(set(chosen))
    kept = sorted(motions[i] for i in chosen)
    assert kept == sorted(motions)[-keep:]


def test_motion_is_the_mean_grey_difference() -> None:
    meter = MotionMeter()
    assert meter.measure(np.full((72, 128, 3), 10, np.uint8)) == math.inf
    assert meter.measure(np.full((72, 128, 3), 10, np.uint8)) == 0
    assert meter.measure(np.full((72, 128, 3), 30, np.uint8)) == pytest.approx(20, abs=1)
    half = np.full((50, 60, 3), 30, np.uint8)
    half[:25] = 130
    assert meter.measure(half) == pytest.approx(50, abs=2)


def cut(second: int, motions: tuple[float, float] = (0.0, 0.0)) -> Cut:
    times = (float(second), second + 0.5)
    frames = tuple(frame(time, motion) for time, motion in zip(times, motions, strict=True))
    return Cut(frames, float(second), second + 1.0)


def test_latest_keeps_the_newest_chunk() -> None:
    backlog = Backlog("latest", 2, 8)
    for second in range(3):
        backlog.add(cut(second))
    chunk = backlog.take()
    assert (chunk.t0, chunk.t1, chunk.timestamps, chunk.dropped) == (2.0, 3.0, (2.0, 2.5), 4)
    assert backlog.take() is None
    backlog.add(cut(3))
    assert backlog.take().dropped == 0


def test_uniform_spreads_over_the_backlog() -> None:
    backlog = Backlog("uniform", 2, 8)
    for second in range(3):
        backlog.add(cut(second))
    chunk = backlog.take()
    assert (chunk.t0, chunk.t1, chunk.timestamps, chunk.dropped) == (0.0, 3.0, (0.0, 2.5), 4)


def test_motion_keeps_what_moved() -> None:
    backlog = Backlog("motion", 2, 8)
    for second, motions in enumerate([(0.0, 9.0), (1.0, 2.0), (7.0, 0.0)]):
        backlog.add(cut(second, motions))
    chunk = backlog.take()
    assert (chunk.t0, chunk.t1, chunk.timestamps, chunk.dropped) == (0.0, 3.0, (0.5, 2.0), 4)
    assert chunk.captured_at == 102.0


def test_without_a_policy_the_writer_waits() -> None:
    backlog = Backlog(None, 2, 2)
    backlog.add(cut(0))
    assert not backlog.full
    backlog.add(cut(1))
    assert backlog.full
    assert backlog.take().t0 == 0.0
    assert backlog.take().t0 == 1.0
    assert backlog.dropped_total == 0


@given(
    st.sampled_from(["latest", "uniform", "motion"]),
    st.lists(st.integers(0, 6), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
)
def test_no_policy_lets_the_backlog_grow(policy, arrivals: list[int], random) -> None:
    """A simulated camera: `arrivals[i]` cuts come while the model works on one chunk."""
    backlog = Backlog(policy, 2, 4)
    offered = delivered = dropped = 0
    second = 0
    last = -1.0
    for count in arrivals:
        for _ in range(count):
            backlog.add(cut(second, (random.random(), random.random())))
            second, offered = second + 1, offered + 2
            assert backlog.frames <= 8
            assert not backlog.full
        chunk = backlog.take()
        if count == 0:
            assert chunk is None
            continue
        delivered, dropped = delivered + len(chunk.frames), dropped + chunk.dropped
        assert len(chunk.frames) == 2
        assert chunk.t1 == second
        assert last <= chunk.t0 <= chunk.timestamps[0] < chunk.timestamps[-1] < chunk.t1
        last = chunk.t1
        if policy != "latest":
            assert chunk.t0 == second - count
    assert offered == delivered + dropped
    assert dropped == backlog.dropped_total


def test_frames_of_another_size_take_that_of_the_newest() -> None:
    old = SampledFrame(np.full((4, 6, 3), 50, np.uint8), 0.0, 1.0)
    new = SampledFrame(np.full((8, 10, 3), 90, np.uint8), 0.5, 1.5)
    chunk = assemble([old, new], 0.0, 1.0, 0)
    assert chunk.frames.shape == (2, 8, 10, 3)
    assert (chunk.frames[0] == 50).all()
    assert (chunk.frames[1] == 90).all()
    assert chunk.captured_at == 1.5
