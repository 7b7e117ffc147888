"""A lowered session says what one says that is shown less, whatever executor is below."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from fake.engine import PREPROCESS, make_engine, make_frames, make_protocol
from fake.launching import LaunchingFakeExecutor
from fake.prompt_executor import make_prompt_engine

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.events import Event, EventKind
from framesink.runtime.load.ladder import Ladder, RealTime, Rung
from framesink.runtime.preprocess import PreprocessConfig, resize_frames
from framesink.runtime.session import Session
from framesink.runtime.video.chunk import Chunk

LOWEST = RealTime(
    admission="none", ladder=Ladder(rungs=(Rung(frames=0.5, pixels=0.25, reply=0.5),))
)
REPLY_TOKENS = 6
FRAMES = make_frames(3, height=112, width=112, count=4)


def push(session: Session, number: int, frames: UInt8Array, *, late: float = 0.0) -> list[Event]:
    """A chunk that was complete `late` seconds ago, and what is said about it."""
    times = tuple(number + i / len(frames) for i in range(len(frames)))
    at = time.monotonic() - late
    session.push_chunk(Chunk(frames, float(number), number + 1.0, times, at))
    events = []
    for event in session:
        events.append(event)
        if event.final:
            return events
    raise AssertionError("no reply came")


def least(frames: UInt8Array, config: PreprocessConfig) -> UInt8Array:
    """The first and last of four frames, or both of two, a quarter as large as they would be."""
    _, height, width, _ = resize_frames(frames, config).shape
    kept = frames[[0, 3]] if len(frames) == 4 else frames
    return resize_frames(kept, replace(config, max_pixels=height * width // 4))


@pytest.fixture(params=["fake", "launching", "onnxruntime"])
def engine(request: pytest.FixtureRequest) -> Iterator[StreamingEngine]:
    make: dict[str, Callable[[], StreamingEngine]] = {
        "fake": make_engine,
        "launching": lambda: make_engine(
            executor=LaunchingFakeExecutor(make_protocol(), num_pages=2048, page_size=16)
        ),
        "onnxruntime": lambda: StreamingEngine.load(
            request.getfixturevalue("tiny_bundle"), "onnxruntime", threads=1, threaded=False
        ),
    }
    with make[request.param]() as engine:
        yield engine


def test_less_is_seen_and_said(engine: StreamingEngine) -> None:
    # A chunk of the tiny bundle has at most two frames of this size: leaving one out saves nothing.
    frames = FRAMES[:2] if engine.limits.max_patches >= 64 else FRAMES
    with (
        engine.open_session(max_new_tokens=REPLY_TOKENS, real_time=LOWEST) as lowered,
        engine.open_session(max_new_tokens=REPLY_TOKENS) as shown_less,
    ):
        first = push(lowered, 0, frames, late=10.0)
        assert [event.tokens for event in first if event.final] == [
            event.tokens for event in push(shown_less, 0, frames) if event.final
        ]
        assert lowered.stats().rung == 1
        notice, *said = push(lowered, 1, frames)
        assert notice.kind is EventKind.DEGRADED
        assert ("2 of 4 frames of a chunk are seen" in notice.text) == (len(frames) == 4)
        assert "frames are made " in notice.text
        # The last token is not read before the next turn, so a shorter reply begins the same.
        expected = push(shown_less, 1, least(frames, engine.preprocess))[-1].tokens
        assert 0 < len(said[-1].tokens) <= REPLY_TOKENS // 2
        assert said[-1].tokens == expected[: len(said[-1].tokens)]
    engine.check_integrity()


def test_so_it_is_over_whole_prompts() -> None:
    engine, executor = make_prompt_engine(lambda request: [65] * request.max_new_tokens)
    with engine, engine.open_session(real_time=LOWEST) as session:
        push(session, 0, FRAMES, late=10.0)
        notice, *_, reply = push(session, 1, FRAMES)
        assert notice.kind is EventKind.DEGRADED
        assert len(reply.tokens) == 3
        assert [request.max_new_tokens for request in executor.requests] == [6, 3]
        whole, lowered = (video.pixels for video in executor.requests[-1].prompt.videos)
        assert (whole.shape, lowered.shape) == ((4, 56, 56, 3), (2, 28, 28, 3))
        assert np.array_equal(lowered, least(FRAMES, PREPROCESS))
