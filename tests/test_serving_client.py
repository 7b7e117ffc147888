"""The client's own logic, against a stand-in of the server (tests/fake/triton_service.py)."""

import asyncio
import itertools
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest
from fake.triton_client import FRAME, PNG, WORDS, text_of
from fake.triton_service import FakeTriton
from fake.waiting import until
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
    fake_triton: FakeTriton, fake_triton_client: Client, frame_format: str, tolerance: int
) -> None:
    ramp = np.linspace(0, 255, 32)[None, :, None] * np.array([1.0, 0.6, 0.2])
    frames = np.broadcast_to(ramp, (2, 24, 32, 3)).astype(np.uint8)
    settings = SessionSettings(frame_format=frame_format, quality=95)
    with fake_triton_client.session(settings=settings) as session:
        session.push(frames, [3.0, 3.5], t0=3.0, t1=4.0)
        assert next(iter(session)).t0 == 3.0
        (chunk,) = fake_triton.sessions[session.sequence_id].chunks
        if frame_format == "raw":
            received = [np.frombuffer(chunk["RAW_FRAMES"], np.uint8).reshape(2, 24, 32, 3)[0]]
        else:
            length = int.from_bytes(chunk["FRAMES"][:4], "little")
            file = np.frombuffer(chunk["FRAMES"][4 : 4 + length], np.uint8)
            received = [cv2.cvtColor(cv2.imdecode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)]
    assert np.abs(received[0].astype(int) - frames[0]).max() <= tolerance
    assert np.frombuffer(chunk["TIMESTAMPS"], np.float64).tolist() == [3.0, 3.5]
    assert np.frombuffer(chunk["CHUNK_SPAN"], np.float64).tolist() == [3.0, 4.0]


def test_a_session_from_the_first_chunk_to_the_end(
    fake_triton: FakeTriton, fake_triton_client: Client
) -> None:
    session = fake_triton_client.session(
        query="Say what happens.", max_new_tokens=7, vision_seconds=4.5
    )
    stored = fake_triton.sessions[session.sequence_id]
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
    assert fake_triton.sessions == {}
    with pytest.raises(SessionClosedError):
        session.push(FRAME)


def test_responses_that_overtake_each_other_are_put_in_order(fake_triton: FakeTriton) -> None:
    """As Triton lets them: the first of a chunk before the last of the one before it."""
    fake_triton.overtaking = True
    settings = SessionSettings(frame_format="png", max_in_flight=5)
    with connect(fake_triton.url) as client, client.session(settings=settings) as session:
        for _ in range(4):
            session.push(FRAME)
        session.ask("How many?")
        session.push(FRAME)
        session.finish()
        events = list(session)
    assert [event.turn for event in events] == [turn for turn in range(5) for _ in range(3)]
    assert [event.words for event in events] == [(0,), (1,), ()] * 5
    assert [event.final for event in events] == [False, False, True] * 5


def test_who_does_not_read_cannot_push(fake_triton: FakeTriton, fake_triton_client: Client) -> None:
    with fake_triton_client.session(settings=PNG) as session:
        session.push(FRAME)
        session.push(FRAME)
        with pytest.raises(BacklogError, match="read the session's events"):
            session.push(FRAME, timeout=0.5)
        assert len(fake_triton.sessions[session.sequence_id].chunks) == 2
        events = iter(session)
        for _ in range(3):
            next(events)
        session.push(FRAME, timeout=2.0)
        assert [next(events).turn for _ in range(6)] == [1, 1, 1, 2, 2, 2]


def test_one_refused_chunk_costs_no_other(
    fake_triton: FakeTriton, fake_triton_client: Client
) -> None:
    fake_triton.bad_chunk = 2
    with fake_triton_client.session(settings=PNG) as session:
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
        assert session.sequence_id in fake_triton.sessions


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
    fake_triton: FakeTriton,
    fake_triton_client: Client,
    refusal: str,
    expected: type[Exception],
    code: str,
) -> None:
    fake_triton.refusal = refusal
    with pytest.raises(expected, match=r"^Not like this\.$") as caught:
        fake_triton_client.session()
    assert caught.value.code == code


def test_a_server_that_is_not_ready(fake_triton: FakeTriton, fake_triton_client: Client) -> None:
    fake_triton.ready = False
    assert not fake_triton_client.ready()
    with pytest.raises(ServerUnavailableError, match="not ready"):
        fake_triton_client.session()


def test_nobody_there() -> None:
    server = FakeTriton()
    server.start()
    server.stop()
    with pytest.raises(ServerGoneError, match="cannot be reached"):
        connect(server.url, timeout=2.0)
    with pytest.raises(OptionError, match="HOST:PORT"):
        connect("somewhere")


def test_cancelling(fake_triton: FakeTriton, fake_triton_client: Client) -> None:
    with fake_triton_client.session(settings=PNG) as session:
        fake_triton.silent = True
        number = session.sequence_id
        session.push(FRAME)
        session.push(FRAME)
        until(lambda: len(fake_triton.sessions[number].chunks) == 2)
        assert not fake_triton.cancelled.is_set()
        session.cancel()
        assert fake_triton.cancelled.wait(5.0)
        fake_triton.silent = False
        session.push(FRAME)
        assert [event.turn for event in itertools.islice(session, 3)] == [2, 2, 2]
        assert session.sequence_id == number


def test_closing_ends_the_session_on_the_server(
    fake_triton: FakeTriton, fake_triton_client: Client
) -> None:
    fake_triton.silent = True
    session = fake_triton_client.session()
    session.push(FRAME)
    reader = threading.Thread(target=list, args=(session,))
    reader.start()
    session.close()
    reader.join(5.0)
    assert not reader.is_alive()
    assert fake_triton.ended == [session.sequence_id]
    session.close()
    with pytest.raises(SessionClosedError):
        session.push(FRAME)
    left = fake_triton_client.session()
    fake_triton_client.close()
    assert fake_triton.ended[1:] == [left.sequence_id]


@pytest.mark.parametrize("output", ["KIND", "TEXT", "VIDEO_SPAN", "TOKENS"])
def test_a_server_that_breaks_the_contract(
    fake_triton: FakeTriton, fake_triton_client: Client, output: str
) -> None:
    fake_triton.damage = output
    with fake_triton_client.session() as session:
        session.push(FRAME)
        with pytest.raises(ResponseError, match=output):
            list(session)


@pytest.mark.parametrize(
    "parameters",
    [{"sink_txt": 3}, {"sink_text": "3"}, {"sink_text": True}, {"temperature": float("nan")}],
)
def test_parameters_are_checked_first(
    fake_triton: FakeTriton, fake_triton_client: Client, parameters: dict
) -> None:
    with pytest.raises(OptionError):
        fake_triton_client.session(**parameters)
    assert fake_triton.sessions == {}


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
    fake_triton: FakeTriton, fake_triton_client: Client, arguments: dict
) -> None:
    with fake_triton_client.session() as session:
        for _ in range(3):  # a refused chunk keeps no place
            with pytest.raises(VideoError):
                session.push(**arguments, timeout=0.1)
        assert fake_triton.sessions[session.sequence_id].chunks == []


def test_asyncio_sessions_share_a_loop(fake_triton: FakeTriton) -> None:
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
        async with await connect_async(fake_triton.url) as client:
            sessions = [await client.session() for _ in range(8)]
            return await asyncio.gather(*(watch(session) for session in sessions))

    assert asyncio.run(asyncio.wait_for(run(), 30.0)) == [WORDS * 5] * 8


def test_asyncio_waiting_to_push_leaves_the_loop_free(fake_triton: FakeTriton) -> None:
    async def run() -> int:
        async with (
            await connect_async(fake_triton.url) as client,
            await client.session(settings=PNG) as session,
        ):
            fake_triton.silent = True
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
