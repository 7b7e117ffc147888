"""A server that dies, is told to stop, or is asked for what it must not give."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from fake.waiting import until
from serving_server import RunningServer, start_server

from framesink.client import Event, EventKind, SessionSettings, connect
from framesink.client.session import Session
from framesink.runtime.arrays import UInt8Array
from framesink.serving import supervisor
from framesink.serving.endpoints import free_ports
from framesink.serving.errors import ServerDiedError, ServerError
from framesink.serving.options import ServeOptions

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
        until(lambda: live_sessions(server) == 8)
        for session in sessions:
            session.push(chunk)
        old = server.model_process("language_model")
        old.kill()
        until(lambda: not server.ready(), 5.0)
        for session, before in zip(sessions, said, strict=True):
            session.push(chunk)
            events = read_turns(session, 2)
            assert events[-1].kind in (EventKind.COMMENTARY, EventKind.SILENCE)
            assert any(event.kind is EventKind.DEGRADED for event in events)
            assert session.transcript.startswith(before)
        assert server.model_process("language_model").pid != old.pid
        for session in sessions:
            session.close()
    until(lambda: live_sessions(server) == 0)


@pytest.mark.parametrize("victim", ["preprocess", "tritonserver"])
def test_whatever_dies_is_recovered(server: RunningServer, frame: UInt8Array, victim: str) -> None:
    until(server.ready)
    language_model = server.model_process("language_model")
    process = server.model_process(victim) if victim == "preprocess" else language_model.parent()
    assert process is not None
    process.kill()
    until(lambda: not server.ready(), 5.0)
    until(server.ready)
    assert server.model_process("language_model").pid != language_model.pid
    settings = SessionSettings(model="streaming_vlm")
    with connect(server.url) as client, client.session(settings=settings) as session:
        session.push(np.stack([frame] * FRAMES_PER_CHUNK))
        assert read_turns(session, 1)[-1].kind is not EventKind.ERROR


def test_a_server_that_cannot_come_back_says_why(demo_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("pytriton", reason="nvidia-pytriton carries the server")
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle, bundle)
    with start_server(bundle, ensemble=False) as server:
        (bundle / "tokenizer.json").write_text("{}")
        server.model_process("language_model").kill()
        assert server.supervisor.wait(60.0)
        with pytest.raises(ServerError, match=r"tokenizer\.json .* is truncated"):
            server.supervisor.raise_failure()


class DyingProcess:
    """A server that is dead as soon as it was ready."""

    last_lines = ("nothing helps",)
    alive = 0

    def __init__(self) -> None:
        DyingProcess.alive += 1

    def dead_part(self) -> str:
        return "The server"

    def kill(self) -> None:
        DyingProcess.alive -= 1


def test_a_server_is_started_again_however_often_it_dies(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or a client that knows how to end it could end it for good."""
    launches: list[DyingProcess] = []

    class Launcher:
        def __init__(self, *arguments: object) -> None: ...

        def launch(self, stopping: threading.Event) -> DyingProcess:
            launches.append(DyingProcess())
            if len(launches) % 3 == 0:
                launches[-1].kill()
                raise ServerDiedError("It ended before it was ready.")
            return launches[-1]

    monkeypatch.setattr(supervisor, "Launcher", Launcher)
    ports = dict(zip(("grpc_port", "http_port", "metrics_port"), free_ports(3), strict=True))
    server = supervisor.Supervisor(demo_bundle, ServeOptions(**ports))
    with server:
        until(lambda: len(launches) >= 10)
        assert not server.wait(0.0)
    server.raise_failure()
    assert DyingProcess.alive == 0
    assert "nothing helps" in caplog.text
