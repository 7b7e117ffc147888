"""Driving the engine and the dense reference through the same video."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import Qwen2_5_VLForConditionalGeneration

from framesink.runtime.bundle import Bundle
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.events import Event, EventKind
from framesink.runtime.executors import create_executor
from framesink.runtime.manifest import Limits
from framesink.runtime.policies import FullAttention, Policy, SinkWindow, SlidingWindow
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.session import Session
from framesink.runtime.tokenizer import Tokenizer
from framesink.runtime.video.chunk import Chunk
from reference.comparison import assert_same_turn
from reference.dense_streaming import (
    DenseFullAttention,
    DensePolicy,
    DenseSinkWindow,
    DenseSlidingWindow,
    DenseStream,
    TurnRecord,
)
from reference.frames import moving_frames
from reference.recording import RecordingExecutor

DEFAULT_SIZE = (56, 84)
NUM_PAGES = 2048


@dataclass(frozen=True)
class Scenario:
    """One stream of chunks of one second: what is asked when, and how large its frames are.

    `policy` counts windows in turns; `questions` and `sizes` (height, width) are by chunk, a size
    holding until the next.
    """

    policy: DensePolicy
    query: str | None = None
    query_placement: Literal["pinned", "first_turn"] = "pinned"
    questions: Mapping[int, str] = field(default_factory=dict)
    sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    max_new_tokens: int = 8
    repetition_penalty: float = 1.0
    seed: int = 0

    def frames(self, chunk: int) -> NDArray[np.uint8]:
        """The frames of a chunk."""
        changes = [start for start in self.sizes if start <= chunk]
        height, width = self.sizes[max(changes)] if changes else DEFAULT_SIZE
        return moving_frames(chunk, height=height, width=width, seed=self.seed)

    def chunk(self, chunk: int) -> Chunk:
        """The same frames as the engine takes them."""
        return make_chunk(self.frames(chunk), chunk)

    def engine_policy(self) -> Policy:
        """The policy in the engine's own terms: seconds, at one second a chunk."""
        match self.policy:
            case DenseSinkWindow(vision_turns, reply_turns, sink_text, recent_text):
                return SinkWindow(
                    sink_text=sink_text,
                    recent_text=recent_text,
                    vision_seconds=float(vision_turns),
                    reply_turns=reply_turns,
                )
            case DenseSlidingWindow(turns):
                return SlidingWindow(seconds=float(turns))
            case DenseFullAttention():
                return FullAttention()

    def dense_stream(
        self, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer
    ) -> DenseStream:
        """The reference of this scenario."""
        return DenseStream(
            model,
            tokenizer,
            self.policy,
            query=self.query,
            query_placement=self.query_placement,
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=self.repetition_penalty,
        )

    def open_session(self, engine: StreamingEngine) -> Session:
        """A session of this scenario."""
        return engine.open_session(
            self.engine_policy(),
            self.query,
            SamplingParams(repetition_penalty=self.repetition_penalty),
            max_new_tokens=self.max_new_tokens,
            query_placement=self.query_placement,
        )


def make_chunk(frames: NDArray[np.uint8], number: int) -> Chunk:
    """Frames of the second that begins at `number`."""
    times = tuple(number + index / len(frames) for index in range(len(frames)))
    return Chunk(frames, float(number), number + 1.0, times, time.monotonic())


@contextmanager
def recording_engine(
    directory: Path, *, num_pages: int = NUM_PAGES, token_budget: int | None = None
) -> Iterator[tuple[StreamingEngine, RecordingExecutor]]:
    """An engine that works only when told to, and the record of what it asks its executor for.

    `token_budget` is the most prefill tokens of one step (None: the bundle's own limit).
    """
    bundle = Bundle.open(directory, check="sizes")
    executor, _ = create_executor(bundle, "onnxruntime", num_pages=num_pages, threads=1)
    recorder = RecordingExecutor(executor)
    manifest = bundle.manifest
    limits = manifest.limits
    if token_budget is not None:
        limits = Limits.model_validate({**limits.model_dump(), "max_prefill": token_budget})
    engine = StreamingEngine(
        recorder,
        manifest.model,
        bundle.protocol(),
        manifest.preprocess,
        manifest.streaming,
        limits,
        threaded=False,
    )
    with engine:
        yield engine, recorder


def assert_parity(
    bundle: Path,
    model: Qwen2_5_VLForConditionalGeneration,
    scenario: Scenario,
    *,
    chunks: int,
    tolerance: float,
    num_pages: int = NUM_PAGES,
    token_budget: int | None = None,
) -> list[TurnRecord]:
    """Stream the scenario through both and compare every turn.

    Retained tokens, positions, logits within `tolerance`, greedy tokens and final events must
    agree. Returns the reference's records, for a test to say that what it is about did happen.
    """
    stream = scenario.dense_stream(model, Tokenizer.from_directory(bundle))
    records = []
    with recording_engine(bundle, num_pages=num_pages, token_budget=token_budget) as (
        engine,
        recorder,
    ):
        session = scenario.open_session(engine)
        for number in range(chunks):
            question = scenario.questions.get(number)
            if question is not None:
                session.ask(question)
            session.push_chunk(scenario.chunk(number))
            events = list(session)
            record = stream.chunk(scenario.frames(number), number, number + 1.0, question=question)
            assert_same_turn(stream, record, recorder.take(), tolerance=tolerance)
            assert_events_tell(stream, record, events, question)
            records.append(record)
    return records


def assert_events_tell(
    stream: DenseStream, record: TurnRecord, events: Sequence[Event], question: str | None
) -> None:
    """Raise AssertionError unless the events of one turn say what the reference said."""
    words = stream.words(record.tokens)
    text = stream.tokenizer.decode(words)
    final = events[-1]
    assert [event.final for event in events] == [False] * (len(events) - 1) + [True]
    assert {event.turn for event in events} == {record.turn}
    assert "".join(event.text for event in events) == text
    stops = (stream.im_end, stream.end_of_text)
    assert [token for token in final.tokens if token not in stops] == [
        token for token in record.tokens if token not in stops
    ]
    expected = EventKind.ANSWER if question is not None else EventKind.COMMENTARY
    assert final.kind is (expected if words else EventKind.SILENCE)
    assert (final.t0, final.t1) == (float(record.turn), record.turn + 1.0)
