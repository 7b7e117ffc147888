"""A server that dies, is told to stop, or is asked for what it must not give."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
from serving_server import RunningServer, start_server

from framesink.client import Event, EventKind, SessionSettings, connect
from framesink.client.session import Session
from framesink.runtime.arrays import UInt8Array

CLIP = Path(__file__).parents[1] / "demo" / "clip.mp4"
FRAMES_PER_CHUNK = 2


@pytest.fixture(scope="module")
def server(demo_bundle: Path) -> Iterator[RunningServer]:
    """A server of this file's own: its processes are killed."""
    pytest.importorskip("pytriton", reason="nvidia-pytriton carries the server")
    with start_server(demo_bundle, max_sessions=10) as server:
        yield server


@pytest.fixture(scope="module")
def frame() -> UInt8Array:
    capture = cv2.VideoCapture(str(CLIP))
    _, picture = capture.read()
    capture.release()
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def read_turns(session: Session, count: int, seconds: float = 60.0) -> list[Event]:
    """Events up to the end of so many turns."""
    events: list[Event] = []
    deadline = time.monotonic() + seconds
    while sum(event.final for event in events) < count:
        assert time.monotonic() < deadline, events
        event = session.next_event(1.0)
        if event is not None:
            events.append(event)
    return events


def live_sessions(server: RunningServer) -> int:
    (line,) = (
        line
        for line in server.metrics().splitlines()
        if line.startswith("framesink_sessions ") or line.startswith("framesink_sessions{")
    )
    return int(float(line.split()[-1]))


def test_eight_sessions_survive_the_death_of_the_model(
    server: RunningServer, frame: UInt8Array
) -> None:
    chunk = np.stack([frame] * FRAMES_PER_CHUNK)
    settings = SessionSettings(reconnect_seconds=60.0)
    with connect(server.url) as client:
        sessions = [client.session(settings=settings) for _ in range(8)]
        for session in sessions:
            session.push(chunk)
            read_turns(session, 1)
        said = [session.transcript for session in sessions]
        wait_until(lambda: live_sessions(server) == 8)
        for session in sessions:
            session.push(chunk)
        old = server.model_process("language_model")
        old.kill()
        wait_until(lambda: not server.ready(), 5.0)
        for session, before in zip(sessions, said, strict=True):
            session.push(chunk)
            events = read_turns(session, 2)
            assert events[-1].kind in (EventKind.COMMENTARY, EventKind.SILENCE)
            assert any(event.kind is EventKind.DEGRADED for event in events)
            assert session.transcript.startswith(before)
        assert server.model_process("language_model").pid != old.pid
        for session in sessions:
            session.close()
    wait_until(lambda: live_sessions(server) == 0)


@pytest.mark.parametrize("victim", ["preprocess", "tritonserver"])
def test_whatever_dies_is_recovered(server: RunningServer, frame: UInt8Array, victim: str) -> None:
    wait_until(server.ready)
    language_model = server.model_process("language_model")
    if victim == "tritonserver":
        (process,) = (
            child
            for child in psutil.Process().children()
            if child.name() == "tritonserver" and language_model in child.children(recursive=True)
        )
    else:
        process = server.model_process(victim)
    process.kill()
    wait_until(lambda: not server.ready(), 5.0)
    wait_until(server.ready)
    assert not language_model.is_running()
    settings = SessionSettings(model="streaming_vlm")
    with connect(server.url) as client, client.session(settings=settings) as session:
        session.push(np.stack([frame] * FRAMES_PER_CHUNK))
        assert read_turns(session, 1)[-1].kind is not EventKind.ERROR
