"""`framesink serve` as a process: what it prints, how it ends, and that nothing stays behind."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from itertools import groupby
from pathlib import Path

import numpy as np
import psutil
import pytest
from fake.waiting import until

from framesink.client import (
    Client,
    Event,
    EventKind,
    ServerUnavailableError,
    SessionSettings,
    connect,
)
from framesink.serving.endpoints import free_ports
from framesink.serving.guardian import SHARED_MEMORY

pytest.importorskip("pytriton", reason="nvidia-pytriton carries the server")

CHUNK = np.full((2, 112, 112, 3), 90, np.uint8)
CHUNKS = 4
MAIN = "from framesink.cli.main import main; main()"
PORTS = ("grpc", "http", "metrics")
SUMMARY_ROWS = (
    "serving",
    "gRPC",
    "health",
    "metrics",
    "models",
    "executor",
    "capacity",
    "limits",
)


class Command:
    """A running `framesink serve`, ready; killed at the end if it still runs."""

    def __init__(self, bundle: Path) -> None:
        ports = dict(zip(PORTS, free_ports(3), strict=True))
        self.grpc_port, self.http_port = ports["grpc"], ports["http"]
        options = [f"--{name}-port={port}" for name, port in ports.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve", str(bundle), "--threads=1", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.summary = "".join(self.process.stdout.readline() for _ in SUMMARY_ROWS)
        self.parts = psutil.Process(self.process.pid).children(recursive=True)

    def health(self) -> int | None:
        """The status that the health endpoint answers; None where nothing listens."""
        connection = HTTPConnection("127.0.0.1", self.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status
        except (OSError, HTTPException):
            return None
        finally:
            connection.close()


@pytest.fixture
def command(demo_bundle: Path) -> Iterator[Command]:
    command = Command(demo_bundle)
    with command.process:
        yield command
        command.process.kill()


@pytest.mark.parametrize("road", ["language_model", "streaming_vlm"])
def test_told_to_stop_it_answers_what_waits(command: Command, demo_bundle: Path, road: str) -> None:
    rows = dict(line.split(maxsplit=1) for line in command.summary.splitlines())
    assert tuple(rows) == SUMMARY_ROWS
    assert str(demo_bundle) in rows["serving"]
    assert rows["gRPC"] == f"127.0.0.1:{command.grpc_port} (no TLS)"
    assert rows["executor"].startswith("onnxruntime on the CPU: ")
    assert re.match(r"\d+ live streams? fit \(\d+ by time, of which one takes ", rows["capacity"])
    assert command.health() == 200

    with connect(f"127.0.0.1:{command.grpc_port}") as client:
        settings = SessionSettings(model=road, max_in_flight=CHUNKS, reconnect_seconds=0.0)
        session = client.session(settings=settings)
        for _ in range(CHUNKS):
            session.push(CHUNK)
        command.process.send_signal(signal.SIGTERM)
        events: list[Event] = []
        while sum(event.final for event in events) < CHUNKS:
            event = session.next_event(30.0)
            assert event is not None
            events.append(event)
        assert all(event.kind is not EventKind.ERROR for event in events), events
        until(lambda: _refuses(client, settings))
    output, errors = command.process.communicate(timeout=30)
    assert (command.process.returncode, output, errors) == (0, "", "")
    until(lambda: not any(_runs(part) for part in command.parts))


def test_readiness_ends_with_the_drain(command: Command) -> None:
    with connect(f"127.0.0.1:{command.grpc_port}") as client:
        session = client.session(settings=SessionSettings(reconnect_seconds=0.0))
        session.push(CHUNK)
        assert session.next_event(30.0) is not None
        assert command.health() == 200
        command.process.send_signal(signal.SIGTERM)
        answers = []
        while command.process.poll() is None:
            answers.append(command.health())
        assert command.process.returncode == 0
    kinds = [answer for answer, _ in groupby(answers)]
    assert kinds[kinds[0] == 200 :] in ([400], [400, None])


def test_nothing_outlives_a_killed_command(command: Command) -> None:
    assert len(command.parts) == 6  # a guardian, the server and four models
    (model,) = (part.cmdline() for part in command.parts if "language_model_0_0" in part.cmdline())
    directory = Path(model[1]).parents[3]
    region = SHARED_MEMORY / model[2]
    assert directory.is_dir()
    assert region.is_file()
    command.process.kill()
    until(lambda: not any(_runs(part) for part in command.parts))
    assert not directory.exists()
    assert not region.exists()


def _refuses(client: Client, settings: SessionSettings) -> bool:
    """Whether no new session can be opened."""
    try:
        client.session(settings=settings).close()
    except ServerUnavailableError:
        return True
    return False


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_model_that_does_not_load_says_why(demo_bundle: Path) -> None:
    ports = [f"--{name}-port={port}" for name, port in zip(PORTS, free_ports(3), strict=True)]
    result = subprocess.run(
        [sys.executable, "-c", MAIN, "serve", str(demo_bundle), "--executor=nonsense", *ports],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 10
    assert result.stdout == ""
    assert re.fullmatch(
        r"error: The executor 'nonsense' is unknown; available are .*\.\n", result.stderr
    )
