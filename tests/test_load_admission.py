"""Who may stream live: as many as fit, in the order they came."""

import threading

import pytest
from fake.engine import make_engine
from fake.live import COSTS, LiveMachine
from fake.waiting import until
from reference.live_machine import H200, W720

from framesink.runtime.errors import BusyError, OptionError, SessionClosedError
from framesink.runtime.load.admission import Entrance, LiveStreams
from framesink.runtime.load.capacity import StreamShape, predicted_load
from framesink.runtime.load.ladder import RealTime
from framesink.runtime.session import Session

WAIT = 30.0


def test_one_stream_too_many_is_told_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = LiveMachine(monkeypatch)
    with machine.engine:
        # By the executor's own costs, for chunks of 48 patches, 12 vision tokens and some text.
        shape = StreamShape(1.0, 48, 50, 6)
        most = max(n for n in range(9) if predicted_load([shape] * n, COSTS) <= 0.85)
        for number in range(most):
            machine.open(RealTime(), offset=number / 5)
        with pytest.raises(BusyError, match=f"time for {most} such live streams and {most} are"):
            machine.open(RealTime())
        assert machine.engine.stats().refused == 1
        machine.run(10.0)
        assert max(lag for live in machine.live for lag in live.lags()) < 1.0
        machine.open(None)
        machine.open(RealTime(admission="none"))
        machine.close(machine.live[0])
        machine.close(machine.live[-1])
        machine.open(RealTime())


def test_live_streams_are_in_time_beside_sessions_that_take_all_they_get(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = LiveMachine(monkeypatch)
    with machine.engine:
        for number in range(3):
            machine.open(RealTime(), offset=number / 3)
        greedy = [machine.open(None) for _ in range(3)]
        for each in greedy:
            each.every = 0.01
        machine.run(30.0)
        for live in machine.live[:3]:
            assert len(live.lags()) >= 29
            assert max(live.lags()) < 1.0
        for each in greedy:
            assert len(each.lags()) >= 3


def test_a_machine_too_slow_for_one_stream_takes_one() -> None:
    streams = LiveStreams(lambda: H200)
    huge = StreamShape(1.0, 600_000, 40_000, 20)
    assert predicted_load([huge], H200) > 1
    streams.enter(1, huge, check=True)
    with pytest.raises(BusyError, match="time for 1 such live streams and 1 are open"):
        streams.enter(2, huge, check=True)
    streams.enter(3, huge, check=False)
    streams.leave(1)
    streams.leave(3)
    streams.enter(4, huge, check=True)


def test_what_streams_were_declared_with_counts_not_what_they_were_lowered_to() -> None:
    streams = LiveStreams(lambda: H200, utilisation=0.85)
    half = StreamShape(1.0, 1440, 388, 20)
    for number in range(34):
        streams.enter(number, W720, check=True)
        streams.update(number, W720, half, rung=1)
    load = streams.load()
    assert load is not None
    assert load == pytest.approx(predicted_load([half] * 34, H200))
    assert streams.rungs() == {1: 34}
    with pytest.raises(BusyError):
        streams.enter(34, W720, check=True)


def test_while_costs_are_unknown_nobody_is_refused() -> None:
    streams = LiveStreams(lambda: None)
    for number in range(100):
        streams.enter(number, W720, check=True)
    assert streams.load() is None


class Room:
    """Room for a few, who say their names as they come in."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.came: list[str] = []

    def enter(self, name: str) -> str:
        if self.places == 0:
            raise BusyError("There is no room.")
        self.places -= 1
        self.came.append(name)
        return name


def test_who_waits_comes_in_order() -> None:
    entrance, room = Entrance(), Room(0)
    names = ["first", "second", "third"]
    threads = []
    for number, name in enumerate(names):
        threads.append(
            threading.Thread(target=entrance.admit, args=(lambda name=name: room.enter(name), WAIT))
        )
        threads[-1].start()
        until(lambda waiting=number + 1: entrance.waiting == waiting)
    with pytest.raises(BusyError, match="Other sessions wait"):
        entrance.admit(lambda: room.enter("pushy"), None)
    for number in range(3):
        room.places += 1
        entrance.changed()
        threads[number].join(WAIT)
        assert room.came == names[: number + 1]
    assert (entrance.waiting, entrance.refused) == (0, 1)


def test_a_session_waits_for_another_to_be_closed() -> None:
    """Whatever there is too little of: here it is the number of sessions."""
    patient = RealTime(admission="none", wait=WAIT)
    with make_engine(threaded=True, max_sessions=1) as engine:
        first = engine.open_session(real_time=patient)
        opened: list[Session] = []
        thread = threading.Thread(
            target=lambda: opened.append(engine.open_session(real_time=patient))
        )
        thread.start()
        until(lambda: engine.stats().queued == 1)
        assert not opened
        first.close()
        thread.join(WAIT)
        assert [session.stats().rung for session in opened] == [0]
        with pytest.raises(BusyError, match="1 sessions are open"):
            engine.open_session(real_time=RealTime(admission="none", wait=0.01))


def test_who_waits_too_long_is_refused_and_holds_up_nobody() -> None:
    entrance, room = Entrance(), Room(0)
    with pytest.raises(BusyError, match="no room"):
        entrance.admit(lambda: room.enter("late"), 0.01)
    room.places = 1
    assert entrance.admit(lambda: room.enter("next"), None) == "next"


def test_closing_sends_those_who_wait_away() -> None:
    entrance, room = Entrance(), Room(0)
    raised: list[Exception] = []

    def wait() -> None:
        try:
            entrance.admit(lambda: room.enter("patient"), WAIT)
        except SessionClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: entrance.waiting == 1)
    entrance.close("The engine was closed.")
    thread.join(WAIT)
    assert [str(error) for error in raised] == ["The engine was closed."]


@pytest.mark.parametrize(
    "settings", [{"admission": "maybe"}, {"wait": -1.0}, {"wait": float("nan")}]
)
def test_settings_that_make_no_sense(settings: dict) -> None:
    with pytest.raises(OptionError):
        RealTime(**settings)
