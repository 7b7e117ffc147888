"""What the client does when a server or its connection is lost, against the stand-in."""

import itertools

import pytest
from fake.triton_client import FRAME, PNG, WORDS, text_of
from fake.triton_service import FakeTriton
from fake.waiting import until

from framesink.client import Client, EventKind, ServerGoneError, SessionSettings, connect


def test_a_lost_connection_goes_on_in_the_same_session(
    fake_triton: FakeTriton, fake_triton_client: Client
) -> None:
    with fake_triton_client.session(settings=PNG) as session:
        number = session.sequence_id
        session.push(FRAME)
        events = iter(session)
        for _ in range(3):
            next(events)
        fake_triton.silent = True
        session.push(FRAME, t0=7.0, t1=8.0)
        until(lambda: len(fake_triton.sessions[number].chunks) == 2)
        fake_triton.silent = False
        fake_triton.break_streams()
        notice = next(events)
        assert notice.kind is EventKind.DEGRADED
        assert "the session goes on; 1 chunks have no full reply" in notice.text
        lost = next(events)
        assert (lost.kind, lost.t0, lost.t1, lost.final) == (EventKind.DEGRADED, 7.0, 8.0, True)
        session.push(FRAME)
        assert [next(events).turn for _ in range(3)] == [2, 2, 2]
        assert session.sequence_id == number


def test_a_crashed_server_goes_on_from_the_transcript(
    fake_triton: FakeTriton, fake_triton_client: Client
) -> None:
    with fake_triton_client.session(query="Look.", settings=PNG) as session:
        number = session.sequence_id
        events = iter(session)
        for _ in range(2):
            session.push(FRAME)
            for _ in range(3):
                next(events)
        session.ask("How many?")
        until(lambda: fake_triton.sessions[number].questions == ["How many?"])
        fake_triton.silent = True
        session.push(FRAME, t0=9.0, t1=10.0)
        until(lambda: len(fake_triton.sessions[number].chunks) == 3)
        fake_triton.stop()
        fake_triton.sessions.clear()
        fake_triton.silent = False
        fake_triton.start()
        notice = next(events)
        assert "a new one goes on from the words of the old" in notice.text
        answer = [next(events) for _ in range(3)]
        assert [(event.turn, event.t0, event.question) for event in answer] == [
            (2, 9.0, "How many?")
        ] * 3
        assert session.sequence_id != number
        (stored,) = fake_triton.sessions.values()
        assert stored.parameters["query"] == "Look."
        assert stored.parameters["previous_text"] == WORDS * 2
        assert session.transcript == WORDS * 3


def test_a_forgotten_session_gets_its_chunks_again_in_order(
    fake_triton: FakeTriton, fake_triton_client: Client
) -> None:
    settings = SessionSettings(max_in_flight=4, reconnect_seconds=5.0)
    with fake_triton_client.session(settings=settings) as session:
        session.push(FRAME, t0=0.0, t1=1.0)
        events = iter(session)
        for _ in range(3):
            next(events)
        fake_triton.sessions.clear()
        for second in (5.0, 6.0, 7.0):
            session.push(FRAME, t0=second, t1=second + 1.0)
        notice, *replies = itertools.islice(events, 10)
        assert "a new one goes on" in notice.text
        assert [event.t0 for event in replies] == [5.0] * 3 + [6.0] * 3 + [7.0] * 3
        assert [event.turn for event in replies] == [1] * 3 + [2] * 3 + [3] * 3


def test_a_chunk_that_brings_servers_down_is_sent_twice_at_most(
    fake_triton: FakeTriton, fake_triton_client: Client
) -> None:
    fake_triton.silent = True
    with fake_triton_client.session(settings=PNG) as session:
        session.push(FRAME)
        seen = []
        for _ in range(2):
            until(lambda: len(fake_triton.sessions[session.sequence_id].chunks) == 1)
            seen.append(session.sequence_id)
            fake_triton.sessions.clear()
            fake_triton.break_streams()
            notice = session.next_event(5.0)
            assert notice is not None
        assert len(set(seen)) == 2
        assert "1 chunks have no full reply" in notice.text
        lost = session.next_event(5.0)
        assert lost is not None
        assert lost.final
        assert fake_triton.sessions[session.sequence_id].chunks == []


def test_a_server_that_is_gone_for_good(
    fake_triton: FakeTriton, fake_triton_client: Client
) -> None:
    settings = SessionSettings(reconnect_seconds=1.0, quiet_seconds=0.2)
    session = fake_triton_client.session(settings=settings)
    session.push(FRAME)
    assert text_of(list(itertools.islice(session, 3))) == WORDS
    fake_triton.stop()
    with pytest.raises(ServerGoneError, match="cannot be reached"):
        list(session)
    with pytest.raises(ServerGoneError):
        session.push(FRAME)
    with pytest.raises(ServerGoneError):
        session.resume()
    fake_triton.start()
    fake_triton.sessions.clear()
    session.resume()
    session.push(FRAME)
    notice, *reply = itertools.islice(session, 4)
    assert "a new one goes on" in notice.text
    assert [event.turn for event in reply] == [1, 1, 1]
    assert fake_triton.sessions[session.sequence_id].parameters["previous_text"] == WORDS
    session.close()


def test_a_server_that_goes_while_nothing_is_under_way(
    fake_triton: FakeTriton, fake_triton_client: Client
) -> None:
    session = fake_triton_client.session(settings=SessionSettings(reconnect_seconds=0.5))
    fake_triton.stop()
    with pytest.raises(ServerGoneError):
        list(session)


def test_a_server_that_stops_answering(fake_triton: FakeTriton) -> None:
    settings = SessionSettings(reconnect_seconds=0.5, quiet_seconds=0.2)
    with connect(fake_triton.url, timeout=0.3) as impatient:
        session = impatient.session(settings=settings)
        fake_triton.deaf = True
        session.push(FRAME)
        with pytest.raises(ServerGoneError):
            list(session)


def test_a_reply_that_never_comes(fake_triton: FakeTriton, fake_triton_client: Client) -> None:
    settings = SessionSettings(reply_seconds=0.5, quiet_seconds=0.2, max_in_flight=1)
    with fake_triton_client.session(settings=settings) as session:
        fake_triton.silent = True
        session.push(FRAME)
        until(lambda: len(fake_triton.sessions[session.sequence_id].chunks) == 1)
        fake_triton.silent = False
        events = list(itertools.islice(session, 2))
        session.push(FRAME)
        events += itertools.islice(session, 3)
        assert "1 chunks have no full reply" in events[0].text
        assert [event.final for event in events] == [False, True, False, False, True]
        assert text_of(events) == WORDS
