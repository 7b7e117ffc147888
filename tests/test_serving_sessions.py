"""Many sessions on the real server: each its own words, and what is left of clients that vanish."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from reference.prometheus import read_metrics, wait_for_metrics
from serving_server import RunningServer, start_server

pytest.importorskip("pytriton", reason="the server's wheel is not installed")
from framesink.client import (
    Client,
    Event,
    EventKind,
    SessionLostError,
    SessionSettings,
    connect,
)
from framesink.client.connection import Connection
from framesink.client.wire import Request
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.video.capture import ChunkStream
from framesink.runtime.video.chunk import Chunk
from framesink.runtime.video.source import open_source

CLIP = Path(__file__).parents[1] / "demo" / "clip.mp4"
RESERVED, USED = (f'framesink_kv_pages{{state="{state}"}}' for state in ("reserved", "used"))
LIVE = "framesink_sessions"
Words = list[tuple[int, tuple[int, ...], tuple[int, ...]]]
ROADS = ("language_model", "streaming_vlm")
SESSIONS, CHUNKS = 32, 4
# Far beyond the limits of the server under test: a failure is a page that never comes back.
PATIENCE = 30.0


@cache
def clip() -> list[Chunk]:
    with ChunkStream(open_source(CLIP), realtime=False) as chunks:
        return list(chunks)


def video(number: int, count: int = CHUNKS) -> list[Chunk]:
    """A piece of the clip, another for each number, from second 0."""
    begin = 2 * number
    return [
        replace(
            chunk,
            t0=chunk.t0 - begin,
            t1=chunk.t1 - begin,
            timestamps=tuple(second - begin for second in chunk.timestamps),
        )
        for chunk in clip()[begin : begin + count]
    ]


def said(session: Any, chunks: list[Chunk]) -> Words:
    """Turn, words and tokens of all events; chunks are pushed as fast as the session takes them."""
    events: list[Event] = []
    reader = threading.Thread(target=lambda: events.extend(session))
    reader.start()
    for chunk in chunks:
        session.push_chunk(chunk)
    session.finish()
    reader.join(120.0)
    assert not reader.is_alive()
    assert [event.text for event in events if event.kind is EventKind.DEGRADED] == []
    return [(event.turn, event.words, event.tokens) for event in events]


@pytest.fixture
def client(demo_server: RunningServer) -> Iterator[Client]:
    with connect(demo_server.url, timeout=PATIENCE) as connected:
        yield connected


@pytest.fixture(scope="module")
def alone(demo_bundle: Path) -> list[Any]:
    """What each video is told of by the local runtime."""
    with StreamingEngine.load(demo_bundle, max_sessions=1, threads=1) as engine:
        every = []
        for number in range(SESSIONS):
            with engine.open_session() as session:
                every.append(said(session, video(number)))
    assert len({str(one) for one in every}) > SESSIONS / 2
    return every


def test_thirty_two_sessions_each_get_their_own_words(
    demo_server: RunningServer, client: Client, alone: list[Any]
) -> None:
    time.sleep(2.0)  # metrics are told once a second: until what other tests did is told
    before = read_metrics(demo_server.metrics_url)
    chunks = before["framesink_chunks_total"] + SESSIONS * CHUNKS
    settings = [
        SessionSettings(model=ROADS[number % 2], frame_format="png") for number in range(SESSIONS)
    ]

    def watch(number: int) -> Words:
        return said(client.session(settings=settings[number]), video(number))

    with ThreadPoolExecutor(SESSIONS) as threads:
        together = list(threads.map(watch, range(SESSIONS)))
    assert together == alone

    def over(now: dict[str, float]) -> bool:
        return now[LIVE] == 0 and now["framesink_chunks_total"] >= chunks

    after = wait_for_metrics(demo_server.metrics_url, over, PATIENCE)
    assert after[USED] == before[USED]
    assert after["framesink_chunks_total"] == chunks

    def grown(name: str) -> float:
        return after[f"framesink_{name}"] - before[f"framesink_{name}"]

    assert grown("step_batch_size_sum") / grown("step_batch_size_count") > 2
    assert grown('replies_total{kind="error"}') == 0


class Beside:
    """A session that goes on beside the others, a chunk every now and then, in its own thread."""

    def __init__(self, client: Client) -> None:
        self._session = client.session(settings=SessionSettings(frame_format="png"))
        self._stopping = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._heard = self._thread.submit(self._run)

    def _run(self) -> Words:
        heard: Words = []
        events = iter(self._session)
        for chunk in clip():
            self._session.push_chunk(chunk)
            for event in events:
                heard.append((event.turn, event.words, event.tokens))
                if event.final:
                    break
            if self._stopping.wait(0.3):
                break
        self._session.close()
        return heard

    def finish(self) -> Words:
        """What it said."""
        self._stopping.set()
        return self._heard.result(PATIENCE)


@pytest.fixture
def beside(demo_server: RunningServer, demo_bundle: Path, client: Client) -> Iterator[Beside]:
    wait_for_metrics(demo_server.metrics_url, lambda now: now[LIVE] == 0, PATIENCE)
    other = Beside(client)
    yield other
    heard = other.finish()
    with StreamingEngine.load(demo_bundle, max_sessions=1, threads=1) as engine:
        assert heard == said(engine.open_session(), clip()[: heard[-1][0] + 1])


def pages_come_back(demo_server: RunningServer, before: dict[str, float], *reasons: str) -> None:
    """One more session has ended, for one of these reasons, and no page of it is left."""

    def ended(now: dict[str, float]) -> float:
        names = (f'framesink_sessions_ended_total{{reason="{reason}"}}' for reason in reasons)
        return sum(now[name] for name in names)

    def back(now: dict[str, float]) -> bool:
        return now[LIVE] == 1 and ended(now) == ended(before) + 1

    after = wait_for_metrics(demo_server.metrics_url, back, PATIENCE)
    assert after[RESERVED] == before[RESERVED]


def settled(demo_server: RunningServer) -> dict[str, float]:
    """The metrics with the one session beside."""
    return wait_for_metrics(
        demo_server.metrics_url, lambda now: now[LIVE] == 1 and now[RESERVED] > 0, PATIENCE
    )


# It pushes for ever, so that when it ends a reply is under way, as a rule.
CLIENT_PROGRAM = """
import sys
import threading
import numpy as np
from framesink.client import SessionSettings, connect
session = connect(sys.argv[1]).session(
    settings=SessionSettings(frame_format="raw", max_in_flight=4, model=sys.argv[2])
)
frames = np.random.default_rng(3).integers(0, 256, (2, 112, 112, 3), np.uint8)
def push():
    while True:
        session.push(frames)
threading.Thread(target=push, daemon=True).start()
for number, event in enumerate(session):
    if number == 0:
        print("speaking", flush=True)
"""


@pytest.mark.parametrize("model", ROADS)
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stops reading"])
def test_a_client_that_vanishes_in_mid_reply(
    demo_server: RunningServer,
    beside: Beside,
    model: str,
    end: signal.Signals,
) -> None:
    """Triton tells of a broken connection by cancelling what is under way, and through an ensemble
    not at all: where nothing was under way, it is the idle limit that frees the pages."""
    seen = end is signal.SIGKILL and model == ROADS[0]
    before = settled(demo_server)
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT_PROGRAM, demo_server.url, model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "speaking\n"
        process.send_signal(end)
        try:
            pages_come_back(demo_server, before, "idle", *(["abandoned"] if seen else []))
        finally:
            process.kill()


def test_a_cancelled_stream_frees_its_session(
    demo_server: RunningServer, client: Client, beside: Beside
) -> None:
    before = settled(demo_server)
    session = client.session(settings=SessionSettings(frame_format="raw", max_in_flight=4))
    for chunk in video(3):
        session.push_chunk(chunk)
    # By then the server has taken all of them: those that it has not are dropped without a word.
    next(event for event in session if event.turn == CHUNKS - 1)
    session.cancel()
    session.push_chunk(video(0, CHUNKS + 1)[-1])
    # A reply that was whole before it could be given up is still read.
    last = next(event for event in session if event.final and event.turn >= CHUNKS)
    assert (last.turn, last.t0) == (CHUNKS, CHUNKS)
    session.close()
    pages_come_back(demo_server, before, "closed")


def test_a_sequence_that_is_never_ended(demo_server: RunningServer, beside: Beside) -> None:
    before = settled(demo_server)
    connection = Connection(demo_server.url, timeout=10.0)
    connection.call(Request("language_model", "1", 77, start=True))
    connection.call(Request("language_model", "2", 77, question="Who is there?"))
    pages_come_back(demo_server, before, "idle")
    with pytest.raises(SessionLostError, match="without a request"):
        connection.require_session("language_model", 77)
    connection.close()


def test_the_model_process_dies_under_eight_sessions(demo_bundle: Path, alone: list[Any]) -> None:
    with start_server(demo_bundle) as server, connect(server.url) as client:
        crash_under(server, client, alone)


def crash_under(server: RunningServer, client: Client, alone: list[Any]) -> None:
    def watch(number: int) -> tuple[list[Event], int]:
        """All events of a session that goes on until it was answered after the crash."""
        road = ROADS[number % 2]
        settings = SessionSettings(model=road, frame_format="png", reconnect_seconds=60.0)
        with client.session(settings=settings) as session:
            first = session.sequence_id
            pieces = iter(video(number, 58))
            events: list[Event] = []
            coming = iter(session)
            while True:
                session.push_chunk(next(pieces))
                for event in coming:
                    events.append(event)
                    if event.final:
                        break
                speaking.release()
                if crashed.is_set() and session.sequence_id != first:
                    return events, len(session.transcript)

    victim = server.model_process("language_model")
    speaking, crashed = threading.Semaphore(0), threading.Event()
    with ThreadPoolExecutor(8) as threads:
        watched = [threads.submit(watch, number) for number in range(8)]
        for _ in range(16):
            assert speaking.acquire(timeout=PATIENCE)
        crashed.set()
        victim.kill()
        results = [one.result(timeout=120.0) for one in watched]
    assert server.model_process("language_model").pid != victim.pid
    for events, characters in results:
        notices = [event for event in events if event.kind is EventKind.DEGRADED]
        assert "a new one goes on from the words of the old" in notices[0].text
        assert events[-1].final
        turns = [event.turn for event in events]
        assert turns == sorted(turns)
        assert characters > 0
    assert client.ready()
    with client.session(settings=SessionSettings(frame_format="png")) as session:
        assert said(session, video(0)) == alone[0]
