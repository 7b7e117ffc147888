"""A stream that cannot keep up goes down its ladder, says so, and comes up again."""

import math
import re
from itertools import pairwise

import pytest
from fake.live import COSTS, LiveMachine
from hypothesis import given, settings
from hypothesis import strategies as st

from framesink.runtime.errors import OptionError, VideoError
from framesink.runtime.events import EventKind
from framesink.runtime.load.admission import LiveStreams
from framesink.runtime.load.capacity import StreamShape, predicted_load
from framesink.runtime.load.ladder import Ladder, RealTime, Rung
from framesink.runtime.load.ladder_control import LadderControl
from framesink.runtime.preprocess import Grid, PreprocessConfig

UNCHECKED = RealTime(admission="none")
PREPROCESS = PreprocessConfig(min_pixels=56 * 56, max_pixels=560 * 1008)
FULL_SHAPE = StreamShape(1.0, 2880, 760, 20)


def rungs(notices: list[str]) -> list[int]:
    """The rungs that notices name."""
    return [int(found[1]) for text in notices if (found := re.search(r"rung (\d) of 3", text))]


def test_overload_lowers_streams_until_they_are_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = LiveMachine(monkeypatch)
    with machine.engine:
        for number in range(7):
            machine.open(UNCHECKED, offset=number / 7)
        machine.run(40.0)
        lowered = [live for live in machine.live if live.session.stats().rung > 0]
        assert len(lowered) >= 5
        for live in machine.live:
            assert max(live.lags()) > 1.0, "it was too much"
            assert max(live.lags()[-10:]) < 1.0, "it is in time now"
            steps = rungs(live.notices())
            assert steps[:1] == [1], "the first rung comes first"
            assert steps[-1:] == [live.session.stats().rung]
        stats = machine.engine.stats()
        assert sum(stats.rungs.values()) == 7
        assert stats.predicted_load is not None
        assert stats.predicted_load < 0.85

        # Nothing changes any more while the load stays.
        said = [len(live.notices()) for live in machine.live]
        machine.run(60.0)
        assert [len(live.notices()) for live in machine.live] == said
        assert all(max(live.lags()[-60:]) < 1.0 for live in machine.live)

        # With room again they come up, one after the other, and stay.
        while len(machine.live) > 3:
            machine.close(machine.live[0])
        machine.run(60.0)
        for live in machine.live:
            assert live.session.stats().rung == 0
            assert live.notices()[-1].startswith("Replies are in time again: from here on all is ")
            assert max(live.lags()[-30:]) < 1.0


def test_a_notice_stands_before_the_first_reply_that_it_is_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = LiveMachine(monkeypatch)
    with machine.engine:
        live = machine.open(UNCHECKED)
        machine.executor.slowness = 10.0
        machine.run(60.0)
        degraded = [event for event in live.events if event.kind is EventKind.DEGRADED]
        assert rungs([event.text for event in degraded]) == [1, 2, 3]
        assert not any(event.final for event in degraded)
        for notice in degraded:
            about = [event for event in live.events if event.turn == notice.turn]
            assert about[0] is notice
            assert about[-1].final
        assert degraded[0].text.endswith("2 of 4 frames of a chunk are seen (rung 1 of 3).")
        assert "frames are made 56×28 pixels" in degraded[1].text
        replies = {event.turn: event.tokens for event in live.events if event.final}
        shortened = degraded[2].turn
        assert max(len(replies[turn]) for turn in range(shortened)) == 6
        assert max(len(replies[turn]) for turn in replies if turn >= shortened) == 3


def test_the_last_rung_is_not_silent_either(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = LiveMachine(monkeypatch)
    with machine.engine:
        live = machine.open(UNCHECKED)
        machine.executor.slowness = 16.0
        machine.run(90.0)
        assert live.notices()[-1].endswith("the machine is too slow for its streams.")
        assert len(live.notices()) == 4


def test_a_stream_without_a_ladder_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = LiveMachine(monkeypatch)
    with machine.engine:
        live = [machine.open(RealTime(admission="none", ladder=None)), machine.open(None)]
        machine.executor.slowness = 8.0
        machine.run(30.0)
        for each in live:
            assert max(each.lags()) > 5.0
            assert not each.notices()


class Desk:
    """One control, a clock, and streams whose costs are unknown unless given."""

    def __init__(self, ladder: Ladder, streams: LiveStreams | None = None) -> None:
        self.now = 100.0
        self.streams = streams or LiveStreams(lambda: None)
        self.streams.enter(1, FULL_SHAPE, check=False)
        self.control = LadderControl(
            1,
            ladder,
            self.streams,
            PREPROCESS,
            FULL_SHAPE,
            text_tokens=40,
            now=lambda: self.now,
        )
        self.show()

    def show(self, count: int = 4, height: int = 560, width: int = 1008) -> str | None:
        """Push a chunk; what is said about it."""
        treatment = self.control.treat((count, height, width, 3), range(count))
        self.control.handed_over(treatment)
        return treatment.notice

    def reply(self, lag: float, *, every: float = 1.0, times: int = 1) -> None:
        """Replies that come `lag` seconds after their chunks, pushed as they were complete."""
        for _ in range(times):
            self.now += every
            self.show()
            self.control.replied(lag)


def test_it_takes_some_time_down_and_longer_up() -> None:
    desk = Desk(Ladder(down_after=3.0, up_after=10.0))
    desk.reply(1.2, times=3)
    assert desk.control.rung == 0
    desk.reply(1.2)
    assert desk.control.rung == 1
    desk.reply(0.8, times=40)
    assert desk.control.rung == 1, "neither late nor early"
    desk.reply(0.3, times=10)
    assert desk.control.rung == 1
    desk.reply(0.3)
    assert desk.control.rung == 0


def test_replies_that_were_under_way_are_not_held_against_a_step() -> None:
    desk = Desk(Ladder(down_after=3.0))
    desk.reply(6.0)
    assert desk.control.rung == 1
    desk.reply(6.0, times=5)
    assert desk.control.rung == 1
    desk.reply(6.0, times=5)
    assert desk.control.rung == 2


@given(lags=st.lists(st.sampled_from([0.2, 0.7, 1.5, 4.0]), max_size=300))
@settings(max_examples=100, deadline=None)
def test_steps_are_never_closer_than_the_ladder_says(lags: list[float]) -> None:
    desk = Desk(Ladder(down_after=3.0, up_after=10.0))
    stood, since = 0, -math.inf
    for lag in lags:
        desk.reply(lag, every=0.5)
        rung = desk.control.rung
        assert 0 <= rung <= 3
        if rung != stood:
            assert abs(rung - stood) == 1
            assert desk.now - since >= (3.0 if rung > stood else 10.0)
            stood, since = rung, desk.now


def test_a_step_up_that_does_not_last_makes_the_next_one_wait() -> None:
    """Costs are unknown, and full quality is always too much: it is tried more and more seldom."""
    desk = Desk(Ladder(down_after=3.0, up_after=10.0))
    ups: list[float] = []
    for _ in range(1200):
        before = desk.control.rung
        desk.reply(1.5 if before == 0 else 0.3)
        if desk.control.rung < before:
            ups.append(desk.now)
    gaps = [later - earlier for earlier, later in pairwise(ups)]
    assert gaps[0] < 30
    assert gaps[-1] > 100
    assert len(ups) < 20


def test_a_step_up_needs_room_for_it() -> None:
    streams = LiveStreams(lambda: COSTS)
    desk = Desk(Ladder(down_after=3.0, up_after=10.0), streams)
    desk.reply(5.0)
    assert desk.control.rung == 1
    desk.reply(0.1, times=200)
    assert desk.control.rung == 1
    assert predicted_load([FULL_SHAPE], COSTS) > 0.85


def test_a_stream_waits_for_what_others_have_freed() -> None:
    """Late, but the load fits by now, and it becomes less late: no reason to lower it."""
    costs = COSTS
    small = StreamShape(1.0, 24, 46, 6)
    streams = LiveStreams(lambda: costs)
    streams.enter(1, small, check=False)
    now = 100.0
    control = LadderControl(
        1, Ladder(down_after=3.0), streams, PREPROCESS, small, text_tokens=40, now=lambda: now
    )
    for tenth in range(60, 12, -4):
        now += 1.0
        control.replied(tenth / 10)
    assert control.rung == 0
    for _ in range(8):
        now += 1.0
        control.replied(3.0)
    assert control.rung > 0


@pytest.mark.parametrize(
    ("count", "height", "width", "effects"),
    [
        # Two frames are one step of the encoder: resolution is the first that helps.
        (2, 560, 1008, ["frames are made 700×392 pixels", "replies end after 10 tokens"]),
        # Frames of the smallest size stay.
        (8, 56, 56, ["4 of 8 frames of a chunk are seen", "replies end after 10 tokens"]),
        (2, 56, 56, ["replies end after 10 tokens"]),
    ],
)
def test_rungs_that_save_nothing_are_passed_over(
    count: int, height: int, width: int, effects: list[str]
) -> None:
    desk = Desk(Ladder(down_after=1.0))
    said = []
    for _ in range(60):
        desk.now += 1.0
        notice = desk.show(count, height, width)
        if notice is not None and "no lower rung" not in notice:
            said.append(notice)
        desk.control.replied(2.5)
    assert len(said) == len(effects)
    for notice, effect in zip(said, effects, strict=True):
        assert effect in notice


def test_rungs_that_save_nothing_are_passed_over_upwards_too() -> None:
    desk = Desk(Ladder(down_after=1.0, up_after=5.0))
    desk.show(2)
    desk.now += 1.0
    desk.control.replied(2.5)
    assert desk.control.rung == 2
    assert desk.show(2) is not None
    for _ in range(7):
        desk.now += 1.0
        desk.control.replied(0.1)
    assert desk.control.rung == 0
    notice = desk.show(2)
    assert notice is not None
    assert notice.endswith("from here on all is seen and said in full (rung 0 of 3).")


def test_frames_that_are_refused_change_nothing() -> None:
    desk = Desk(Ladder(down_after=1.0))
    for height, width in ((0, 10), (2, 1000)):
        with pytest.raises(VideoError):
            desk.show(4, height, width)
    desk.now += 1.0
    desk.control.replied(2.5)
    assert desk.control.rung == 1


def test_of_encoded_chunks_only_the_reply_is_shortened() -> None:
    desk = Desk(Ladder(down_after=1.0))
    grid = Grid(1, 40, 72)
    desk.control.treat_encoded(grid, 2)
    for _ in range(8):
        desk.now += 1.0
        desk.control.replied(2.5)
    treatment = desk.control.treat_encoded(grid, 2)
    assert (treatment.rung, treatment.reply_tokens, len(treatment.frames)) == (3, 10, 2)
    assert treatment.notice is not None
    assert "from here on replies end after 10 tokens (rung 3 of 3)" in treatment.notice


def test_kept_frames_are_spread_over_the_chunk() -> None:
    desk = Desk(Ladder(rungs=(Rung(frames=0.5),), down_after=1.0))
    desk.reply(2.5, times=2)
    assert desk.control.treat((8, 560, 1008, 3), range(8)).frames == (0, 2, 5, 7)


def test_ladders_are_written_as_what_is_halved() -> None:
    assert Ladder.parse("frames,resolution,replies") == Ladder()
    assert Ladder.parse("none") is None
    ladder = Ladder.parse("replies, resolution,resolution")
    assert ladder is not None
    assert ladder.rungs == (
        Rung(reply=0.5),
        Rung(reply=0.5, pixels=0.5),
        Rung(reply=0.5, pixels=0.25),
    )
    for text in ("", "frames,none", "speed"):
        with pytest.raises(OptionError, match="ladder has no rung"):
            Ladder.parse(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"late": 0.5},
        {"early": 0.0},
        {"down_after": 0.0},
        {"up_after": -1.0},
        {"rungs": (Rung(),)},
        {"rungs": (Rung(pixels=0.5), Rung(frames=0.5))},
    ],
)
def test_ladders_that_make_no_sense(settings: dict) -> None:
    with pytest.raises(OptionError):
        Ladder(**settings)


def test_shares_that_make_no_sense() -> None:
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(OptionError):
            Rung(frames=share)
