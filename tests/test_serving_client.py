"""The client's own logic, against a stand-in of the server (tests/fake/triton_service.py)."""

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from fake.triton_service import FakeTriton
from hypothesis import given
from hypothesis import strategies as st

from framesink.client import (
    Client,
    Event,
    EventKind,
    RefusedError,
    ResponseError,
    ServerGoneError,
    ServerUnavailableError,
    SessionSettings,
    connect,
    connect_async,
)
from framesink.client.frames import OutgoingChunk
from framesink.client.transcript import Transcript
from framesink.runtime.errors import BacklogError, OptionError, SessionClosedError, VideoError

FRAME = np.random.default_rng(5).integers(0, 256, (2, 24, 32, 3), np.uint8)
PNG = SessionSettings(frame_format="png", quiet_seconds=0.2, reconnect_seconds=5.0)
WORDS = " one two"


@pytest.fixture
def server() -> Iterator[FakeTriton]:
    service = FakeTriton()
    service.start()
    yield service
    service.stop()


@pytest.fixture
def client(server: FakeTriton) -> Iterator[Client]:
    with connect(server.url, timeout=2.0) as connected:
        yield connected


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if event.kind is not EventKind.DEGRADED)


def test_it_needs_little() -> None:
    script = (
        "import sys\n"
        "import framesink.client\n"
        "heavy = ('onnxruntime', 'pydantic', 'tokenizers', 'safetensors', 'onnx', 'torch', 'rich',"
        " 'click', 'psutil', 'transformers')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


@pytest.mark.parametrize(("frame_format", "tolerance"), [("raw", 0), ("png", 0), ("jpeg", 12)])
def test_frames_arrive_as_they_were(
    server: FakeTriton, client: Client, frame_format: str, tolerance: int
) -> None:
    ramp = np.linspace(0, 255, 32)[None, :, None] * np.array([1.0, 0.6, 0.2])
    frames = np.broadcast_to(ramp, (2, 24, 32, 3)).astype(np.uint8)
    settings = SessionSettings(frame_format=frame_format, quality=95)
    with client.session(settings=settings) as session:
        session.push(frames, [3.0, 3.5], t0=3.0, t1=4.0)
        assert next(iter(session)).t0 == 3.0
        (chunk,) = server.sessions[session.sequence_id].chunks
        if frame_format == "raw":
            received = [np.frombuffer(chunk["RAW_FRAMES"], np.uint8).reshape(2, 24, 32, 3)[0]]
        else:
            length = int.from_bytes(chunk["FRAMES"][:4], "little")
            file = np.frombuffer(chunk["FRAMES"][4 : 4 + length], np.uint8)
            received = [cv2.cvtColor(cv2.imdecode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)]
    assert np.abs(received[0].astype(int) - frames[0]).max() <= tolerance
    assert np.frombuffer(chunk["TIMESTAMPS"], np.float64).tolist() == [3.0, 3.5]
    assert np.frombuffer(chunk["CHUNK_SPAN"], np.float64).tolist() == [3.0, 4.0]


def test_a_session_from_the_first_chunk_to_the_end(server: FakeTriton, client: Client) -> None:
    session = client.session(query="Say what happens.", max_new_tokens=7, vision_seconds=4.5)
    stored = server.sessions[session.sequence_id]
    assert stored.parameters["query"] == "Say what happens."
    assert stored.parameters["max_new_tokens"] == 7
    assert stored.parameters["vision_seconds"] == 4.5
    session.push(FRAME)
    session.ask("How many?")
    session.push(FRAME)
    assert [event.question for event in itertools.islice(session, 3)] == [None] * 3
    session.push(FRAME, question="Where?")
    session.finish()
    events = list(session)
    assert text_of(events) == WORDS * 2
    assert session.transcript == WORDS * 3
    assert [event.turn for event in events if event.final] == [1, 2]
    assert [event.question for event in events] == ["How many?"] * 3 + ["Where?"] * 3
    assert events[2].tokens == (0, 1, 9)
    assert [event.words for event in events[:3]] == [(0,), (1,), ()]
    timing = events[2].timing
    assert timing is not None
    assert len(timing.itl) == 2
    assert timing.total == pytest.approx(timing.ttft + sum(timing.itl))
    assert server.sessions == {}
    with pytest.raises(SessionClosedError):
        session.push(FRAME)


def test_responses_that_overtake_each_other_are_put_in_order(server: FakeTriton) -> None:
    """As Triton lets them: the first of a chunk before the last of the one before it."""
    server.overtaking = True
    settings = SessionSettings(frame_format="png", max_in_flight=5)
    with connect(server.url) as client, client.session(settings=settings) as session:
        for _ in range(4):
            session.push(FRAME)
        session.ask("How many?")
        session.push(FRAME)
        session.finish()
        events = list(session)
    assert [event.turn for event in events] == [turn for turn in range(5) for _ in range(3)]
    assert [event.words for event in events] == [(0,), (1,), ()] * 5
    assert [event.final for event in events] == [False, False, True] * 5


def test_who_does_not_read_cannot_push(server: FakeTriton, client: Client) -> None:
    with client.session(settings=PNG) as session:
        session.push(FRAME)
        session.push(FRAME)
        with pytest.raises(BacklogError, match="read the session's events"):
            session.push(FRAME, timeout=0.5)
        assert len(server.sessions[session.sequence_id].chunks) == 2
        events = iter(session)
        for _ in range(3):
            next(events)
        session.push(FRAME, timeout=2.0)
        assert [next(events).turn for _ in range(6)] == [1, 1, 1, 2, 2, 2]


def test_one_refused_chunk_costs_no_other(server: FakeTriton, client: Client) -> None:
    server.bad_chunk = 2
    with client.session(settings=PNG) as session:
        for second in range(3):
            session.push(FRAME, t0=second, t1=second + 1.0, timeout=0.1 if second < 2 else 5.0)
            if second:
                events = list(itertools.islice(session, 3 if second == 1 else 4))
        assert text_of(events) == WORDS
        (notice,) = [event for event in events if event.kind is EventKind.DEGRADED]
        assert (notice.text, notice.t0, notice.final) == (
            "This chunk is not to be shown.",
            1.0,
            True,
        )
        assert session.sequence_id in server.sessions


@pytest.mark.parametrize(
    ("refusal", "expected", "code"),
    [
        ("Not like this. [UNAVAILABLE]", ServerUnavailableError, "UNAVAILABLE"),
        ("Not like this. [INVALID_ARGUMENT]", RefusedError, "INVALID_ARGUMENT"),
        (
            "in ensemble 'streaming_vlm', Not like this. [ALREADY_EXISTS]",
            RefusedError,
            "ALREADY_EXISTS",
        ),
        ("Not like this.", ServerUnavailableError, "UNKNOWN"),
    ],
)
def test_a_refused_session(
    server: FakeTriton, client: Client, refusal: str, expected: type[Exception], code: str
) -> None:
    server.refusal = refusal
    with pytest.raises(expected, match=r"^Not like this\.$") as caught:
        client.session()
    assert caught.value.code == code


def test_a_server_that_is_not_ready(server: FakeTriton, client: Client) -> None:
    server.ready = False
    assert not client.ready()
    with pytest.raises(ServerUnavailableError, match="not ready"):
        client.session()


def test_nobody_there() -> None:
    server = FakeTriton()
    server.start()
    server.stop()
    with pytest.raises(ServerGoneError, match="cannot be reached"):
        connect(server.url, timeout=2.0)
    with pytest.raises(OptionError, match="HOST:PORT"):
        connect("somewhere")


def test_a_lost_connection_goes_on_in_the_same_session(server: FakeTriton, client: Client) -> None:
    with client.session(settings=PNG) as session:
        number = session.sequence_id
        session.push(FRAME)
        events = iter(session)
        for _ in range(3):
            next(events)
        server.silent = True
        session.push(FRAME, t0=7.0, t1=8.0)
        wait_until(lambda: len(server.sessions[number].chunks) == 2)
        server.silent = False
        server.break_streams()
        notice = next(events)
        assert notice.kind is EventKind.DEGRADED
        assert "the session goes on; 1 chunks have no full reply" in notice.text
        lost = next(events)
        assert (lost.kind, lost.t0, lost.t1, lost.final) == (EventKind.DEGRADED, 7.0, 8.0, True)
        session.push(FRAME)
        assert [next(events).turn for _ in range(3)] == [2, 2, 2]
        assert session.sequence_id == number


def test_a_crashed_server_goes_on_from_the_transcript(server: FakeTriton, client: Client) -> None:
    with client.session(query="Look.", settings=PNG) as session:
        number = session.sequence_id
        events = iter(session)
        for _ in range(2):
            session.push(FRAME)
            for _ in range(3):
                next(events)
        session.ask("How many?")
        wait_until(lambda: server.sessions[number].questions == ["How many?"])
        server.silent = True
        session.push(FRAME, t0=9.0, t1=10.0)
        wait_until(lambda: len(server.sessions[number].chunks) == 3)
        server.stop()
        server.sessions.clear()
        server.silent = False
        server.start()
        notice = next(events)
        assert "a new one goes on from the words of the old" in notice.text
        answer = [next(events) for _ in range(3)]
        assert [(event.turn, event.t0, event.question) for event in answer] == [
            (2, 9.0, "How many?")
        ] * 3
        assert session.sequence_id != number
        (stored,) = server.sessions.values()
        assert stored.parameters["query"] == "Look."
        assert stored.parameters["previous_text"] == WORDS * 2
        assert session.transcript == WORDS * 3


def test_a_forgotten_session_gets_its_chunks_again_in_order(
    server: FakeTriton, client: Client
) -> None:
    settings = SessionSettings(max_in_flight=4, reconnect_seconds=5.0)
    with client.session(settings=settings) as session:
        session.push(FRAME, t0=0.0, t1=1.0)
        events = iter(session)
        for _ in range(3):
            next(events)
        server.sessions.clear()
        for second in (5.0, 6.0, 7.0):
            session.push(FRAME, t0=second, t1=second + 1.0)
        notice, *replies = itertools.islice(events, 10)
        assert "a new one goes on" in notice.text
        assert [event.t0 for event in replies] == [5.0] * 3 + [6.0] * 3 + [7.0] * 3
        assert [event.turn for event in replies] == [1] * 3 + [2] * 3 + [3] * 3


def test_a_chunk_that_brings_servers_down_is_sent_twice_at_most(
    server: FakeTriton, client: Client
) -> None:
    server.silent = True
    with client.session(settings=PNG) as session:
        session.push(FRAME)
        seen = []
        for _ in range(2):
            wait_until(lambda: len(server.sessions[session.sequence_id].chunks) == 1)
            seen.append(session.sequence_id)
            server.sessions.clear()
            server.break_streams()
            notice = session.next_event(5.0)
            assert notice is not None
        assert len(set(seen)) == 2
        assert "1 chunks have no full reply" in notice.text
        lost = session.next_event(5.0)
        assert lost is not None
        assert lost.final
        assert server.sessions[session.sequence_id].chunks == []


def test_a_server_that_is_gone_for_good(server: FakeTriton, client: Client) -> None:
    settings = SessionSettings(reconnect_seconds=1.0, quiet_seconds=0.2)
    session = client.session(settings=settings)
    session.push(FRAME)
    assert text_of(list(itertools.islice(session, 3))) == WORDS
    server.stop()
    with pytest.raises(ServerGoneError, match="cannot be reached"):
        list(session)
    with pytest.raises(ServerGoneError):
        session.push(FRAME)
    with pytest.raises(ServerGoneError):
        session.resume()
    server.start()
    server.sessions.clear()
    session.resume()
    session.push(FRAME)
    notice, *reply = itertools.islice(session, 4)
    assert "a new one goes on" in notice.text
    assert [event.turn for event in reply] == [1, 1, 1]
    assert server.sessions[session.sequence_id].parameters["previous_text"] == WORDS
    session.close()


def test_a_server_that_goes_while_nothing_is_under_way(server: FakeTriton, client: Client) -> None:
    session = client.session(settings=SessionSettings(reconnect_seconds=0.5))
    server.stop()
    with pytest.raises(ServerGoneError):
        list(session)


def test_a_server_that_stops_answering(server: FakeTriton) -> None:
    settings = SessionSettings(reconnect_seconds=0.5, quiet_seconds=0.2)
    with connect(server.url, timeout=0.3) as impatient:
        session = impatient.session(settings=settings)
        server.deaf = True
        session.push(FRAME)
        with pytest.raises(ServerGoneError):
            list(session)


def test_a_reply_that_never_comes(server: FakeTriton, client: Client) -> None:
    settings = SessionSettings(reply_seconds=0.5, quiet_seconds=0.2, max_in_flight=1)
    with client.session(settings=settings) as session:
        server.silent = True
        session.push(FRAME)
        wait_until(lambda: len(server.sessions[session.sequence_id].chunks) == 1)
        server.silent = False
        events = list(itertools.islice(session, 2))
        session.push(FRAME)
        events += itertools.islice(session, 3)
        assert "1 chunks have no full reply" in events[0].text
        assert [event.final for event in events] == [False, True, False, False, True]
        assert text_of(events) == WORDS


def test_cancelling(server: FakeTriton, client: Client) -> None:
    with client.session(settings=PNG) as session:
        server.silent = True
        number = session.sequence_id
        session.push(FRAME)
        session.push(FRAME)
        wait_until(lambda: len(server.sessions[number].chunks) == 2)
        assert not server.cancelled.is_set()
        session.cancel()
        assert server.cancelled.wait(5.0)
        server.silent = False
        session.push(FRAME)
        assert [event.turn for event in itertools.islice(session, 3)] == [2, 2, 2]
        assert session.sequence_id == number


def test_closing_ends_the_session_on_the_server(server: FakeTriton, client: Client) -> None:
    server.silent = True
    session = client.session()
    session.push(FRAME)
    reader = threading.Thread(target=list, args=(session,))
    reader.start()
    session.close()
    reader.join(5.0)
    assert not reader.is_alive()
    assert server.ended == [session.sequence_id]
    session.close()
    with pytest.raises(SessionClosedError):
        session.push(FRAME)
    left = client.session()
    client.close()
    assert server.ended[1:] == [left.sequence_id]


@pytest.mark.parametrize("output", ["KIND", "TEXT", "VIDEO_SPAN", "TOKENS"])
def test_a_server_that_breaks_the_contract(server: FakeTriton, client: Client, output: str) -> None:
    server.damage = output
    with client.session() as session:
        session.push(FRAME)
        with pytest.raises(ResponseError, match=output):
            list(session)


@pytest.mark.parametrize(
    "parameters",
    [{"sink_txt": 3}, {"sink_text": "3"}, {"sink_text": True}, {"temperature": float("nan")}],
)
def test_parameters_are_checked_first(server: FakeTriton, client: Client, parameters: dict) -> None:
    with pytest.raises(OptionError):
        client.session(**parameters)
    assert server.sessions == {}


@pytest.mark.parametrize(
    "arguments",
    [
        {"frames": FRAME[:0]},
        {"frames": FRAME.astype(np.float32)},
        {"frames": [FRAME[0], FRAME[1, :10]]},
        {"frames": FRAME, "timestamps": [0.0]},
        {"frames": FRAME, "timestamps": [1.0, 0.5]},
        {"frames": FRAME, "timestamps": [0.0, float("nan")]},
        {"frames": FRAME, "t0": 2.0, "t1": 2.0},
        {"frames": FRAME, "t0": 2.0},
    ],
)
def test_frames_and_times_are_checked_first(
    server: FakeTriton, client: Client, arguments: dict
) -> None:
    with client.session() as session:
        for _ in range(3):  # a refused chunk keeps no place
            with pytest.raises(VideoError):
                session.push(**arguments, timeout=0.1)
        assert server.sessions[session.sequence_id].chunks == []


def test_asyncio_sessions_share_a_loop(server: FakeTriton) -> None:
    async def watch(session) -> str:
        async def feed() -> None:
            for _ in range(5):
                await session.push(FRAME)
            await session.finish()

        feeding = asyncio.create_task(feed())
        events = [event async for event in session]
        await feeding
        return text_of(events)

    async def run() -> list[str]:
        async with await connect_async(server.url) as client:
            sessions = [await client.session() for _ in range(8)]
            return await asyncio.gather(*(watch(session) for session in sessions))

    assert asyncio.run(asyncio.wait_for(run(), 30.0)) == [WORDS * 5] * 8


def test_asyncio_waiting_to_push_leaves_the_loop_free(server: FakeTriton) -> None:
    async def run() -> int:
        async with (
            await connect_async(server.url) as client,
            await client.session(settings=PNG) as session,
        ):
            server.silent = True
            await session.push(FRAME)
            await session.push(FRAME)
            pushing = asyncio.create_task(session.push(FRAME, timeout=0.5))
            ticks = 0
            while not pushing.done():
                ticks += 1
                await asyncio.sleep(0.01)
            with pytest.raises(BacklogError):
                await pushing
            await session.cancel()
            return ticks

    assert asyncio.run(asyncio.wait_for(run(), 30.0)) > 3


@given(st.lists(st.text("ab é", max_size=12), max_size=12), st.integers(2, 40))
def test_a_transcript_keeps_beginning_and_end(pieces: list[str], limit: int) -> None:
    transcript = Transcript(limit)
    for piece in pieces:
        transcript.add(Event(EventKind.COMMENTARY, piece, 0.0, 1.0, 0, 0.0, False))
    whole = "".join(pieces)
    if len(whole) <= limit:
        assert transcript.text == whole
    else:
        assert transcript.text == whole[: limit // 2] + whole[-(limit - limit // 2) :]


def test_a_transcript_parts_replies() -> None:
    transcript = Transcript(100, "Before")
    for turn, kind, text in (
        (0, EventKind.COMMENTARY, "a star"),
        (0, EventKind.DEGRADED, "late"),
        (0, EventKind.COMMENTARY, "fish"),
        (1, EventKind.ANSWER, "two"),
        (2, EventKind.SILENCE, ""),
    ):
        transcript.add(Event(kind, text, 0.0, 1.0, turn, 0.0, False))
    assert transcript.text == "Before a starfish two"


def test_a_payload_is_of_one_format() -> None:
    chunk = OutgoingChunk.of_frames(FRAME, None, None, None)
    assert (len(chunk.payload("png", 90).files), chunk.payload("png", 90).raw) == (2, None)
    assert chunk.payload("raw", 90).files == ()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
