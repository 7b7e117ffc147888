"""The demo clip on the real server: the captions of the local runtime, token for token."""

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from serving_server import RunningServer

pytest.importorskip("pytriton", reason="the server's wheel is not installed")
from framesink.client import Event, SessionSettings, connect, connect_async
from framesink.client.frames import compress
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.video.capture import ChunkStream
from framesink.runtime.video.chunk import Chunk
from framesink.runtime.video.source import open_source

ROOT = Path(__file__).parents[1]
CLIP, SCRIPT = ROOT / "demo" / "clip.mp4", ROOT / "scripts" / "stream_client.py"
QUESTIONS = {31: "Where is the purple star?", 63: "How many red stars have entered?"}


def essence(event: Event) -> tuple[Any, ...]:
    """What must be the same: all but the times of the clock."""
    return (
        event.turn,
        event.kind,
        event.question,
        event.text,
        event.words,
        event.tokens,
        event.final,
        event.t0,
        event.t1,
    )


def narrate(session: Any, chunks: list[Chunk]) -> list[tuple[Any, ...]]:
    """All events of the clip, each chunk after the reply to the one before."""
    events: list[Event] = []
    coming = iter(session)
    for number, chunk in enumerate(chunks):
        session.push_chunk(chunk, question=QUESTIONS.get(number))
        for event in coming:
            events.append(event)
            if event.final:
                break
    session.finish()
    events.extend(coming)
    return [essence(event) for event in events]


@pytest.fixture(scope="module")
def clip() -> list[Chunk]:
    with ChunkStream(open_source(CLIP), realtime=False) as chunks:
        return list(chunks)


@pytest.fixture(scope="module")
def local(demo_bundle: Path, clip: list[Chunk]) -> list[tuple[Any, ...]]:
    with StreamingEngine.load(demo_bundle, max_sessions=1, threads=1) as engine:
        said = narrate(engine.open_session(), clip)
    assert len({event[5] for event in said if event[6]}) > 20
    return said


@pytest.mark.parametrize("frame_format", ["png", "raw"])
@pytest.mark.parametrize("model", ["language_model", "streaming_vlm"])
def test_both_roads_say_what_the_local_runtime_says(
    demo_server: RunningServer, clip: list[Chunk], local: list[Any], model: str, frame_format: str
) -> None:
    settings = SessionSettings(model=model, frame_format=frame_format)
    with connect(demo_server.url) as client, client.session(settings=settings) as session:
        assert narrate(session, clip) == local


def test_jpeg_frames_are_narrated_as_they_arrive(
    demo_server: RunningServer, demo_bundle: Path, clip: list[Chunk]
) -> None:
    def as_received(chunk: Chunk) -> Chunk:
        images = [
            cv2.cvtColor(
                cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
            )
            for file in compress(chunk.frames, "jpeg", 90)
        ]
        return replace(chunk, frames=np.stack(images))

    with StreamingEngine.load(demo_bundle, max_sessions=1, threads=1) as engine:
        expected = narrate(engine.open_session(), [as_received(chunk) for chunk in clip[:24]])
    with connect(demo_server.url) as client, client.session() as session:
        assert narrate(session, clip[:24]) == expected


def test_the_script_prints_captions(demo_server: RunningServer, local: list[Any]) -> None:
    arguments = [demo_server.url, CLIP, "--fast", "--frame-format", "png"]
    result = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "")
    asked = min(turn for turn, _, question, *_ in local if question)
    expected: dict[int, str] = {}
    for turn, _, _, text, *_ in local:
        expected[turn] = expected.get(turn, "") + text
    lines = [f"[{turn:.1f}–{turn + 1:.1f}] {text}" for turn, text in expected.items() if text]
    before = [line for line in lines if float(line[1:].split("–")[0]) < asked]
    assert [" ".join(line.split()) for line in result.stdout.splitlines()][: len(before)] == [
        " ".join(line.split()) for line in before
    ]
    assert len(before) > 10


def test_asyncio_without_waiting_for_replies(
    demo_server: RunningServer, clip: list[Chunk], local: list[Any]
) -> None:
    """Chunks under way together are answered one by one, in order."""

    async def run() -> list[Any]:
        settings = SessionSettings(frame_format="png", max_in_flight=3)
        async with (
            await connect_async(demo_server.url) as client,
            await client.session(settings=settings) as session,
        ):

            async def feed() -> None:
                for chunk in clip[:20]:
                    await session.push_chunk(chunk)
                await session.finish()

            feeding = asyncio.create_task(feed())
            events = [essence(event) async for event in session]
            await feeding
            return events

    said = asyncio.run(asyncio.wait_for(run(), 120.0))
    assert said == [event for event in local if event[0] < 20]
