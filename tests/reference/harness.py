"""Driving the engine and the dense reference through the same video."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

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
from reference.suppressing import SuppressingExecutor

DEFAULT_SIZE = (56, 84)
DEFAULT_FRAME_COUNT = 2
NUM_PAGES = 2048
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Scenario:
    """One stream: what is asked when, what its frames are, how replies are chosen.

    `policy` counts windows in turns. `questions`, `sizes` (height, width) and `frame_counts` are by
    chunk, the latter two holding until the next; `video` gives a chunk's frames in their place.
    `never` names special tokens the model is kept from saying.
    """

    policy: DensePolicy
    query: str | None = None
    query_placement: Literal["pinned", "first_turn"] = "pinned"
    questions: Mapping[int, str] = field(default_factory=dict)
    sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    frame_counts: Mapping[int, int] = field(default_factory=dict)
    video: Callable[[int], NDArray[np.uint8]] | None = None
    chunk_seconds: float = 1.0
    max_new_tokens: int = 8
    repetition_penalty: float = 1.0
    never: tuple[str, ...] = ()
    seed: int = 0

    def frames(self, chunk: int) -> NDArray[np.uint8]:
        """The frames of a chunk."""
        if self.video is not None:
            return self.video(chunk)
        height, width = _latest(self.sizes, chunk, DEFAULT_SIZE)
        count = _latest(self.frame_counts, chunk, DEFAULT_FRAME_COUNT)
        return moving_frames(chunk, height=height, width=width, count=count, seed=self.seed)

    def times(self, chunk: int) -> tuple[float, float]:
        """When a chunk begins and ends, in seconds of video time."""
        return chunk * self.chunk_seconds, (chunk + 1) * self.chunk_seconds

    def chunk(self, chunk: int) -> Chunk:
        """The same frames as the engine takes them."""
        frames = self.frames(chunk)
        t0, t1 = self.times(chunk)
        times = np.linspace(t0, t1, len(frames), endpoint=False)
        return Chunk(frames, t0, t1, tuple(times.tolist()), time.monotonic())

    def engine_policy(self) -> Policy:
        """The policy in the engine's own terms: seconds."""
        match self.policy:
            case DenseSinkWindow(vision_turns, reply_turns, sink_text, recent_text):
                return SinkWindow(
                    sink_text=sink_text,
                    recent_text=recent_text,
                    vision_seconds=vision_turns * self.chunk_seconds,
                    reply_turns=reply_turns,
                )
            case DenseSlidingWindow(turns):
                return SlidingWindow(seconds=turns * self.chunk_seconds)
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
            never=[tokenizer.special(name) for name in self.never],
        )

    def open_session(self, engine: StreamingEngine) -> Session:
        """A session of this scenario."""
        return engine.open_session(
            self.engine_policy(),
            self.query,
            SamplingParams(repetition_penalty=self.repetition_penalty),
            max_new_tokens=self.max_new_tokens,
            query_placement=self.query_placement,
            chunk_seconds=self.chunk_seconds,
        )


def _latest(changes: Mapping[int, _Value], chunk: int, default: _Value) -> _Value:
    begun = [start for start in changes if start <= chunk]
    return changes[max(begun)] if begun else default


@contextmanager
def recording_engine(
    directory: Path,
    *,
    num_pages: int = NUM_PAGES,
    token_budget: int | None = None,
    never: Sequence[str] = (),
) -> Iterator[tuple[StreamingEngine, RecordingExecutor]]:
    """An engine that works only when told to, and the record of what it asks its executor for.

    `token_budget` is the most prefill tokens of one step (None: the bundle's own limit); `never`
    names special tokens that are kept from being said, after the record is made.
    """
    bundle = Bundle.open(directory, check="sizes")
    executor, _ = create_executor(bundle, "onnxruntime", num_pages=num_pages, threads=1)
    recorder = RecordingExecutor(executor)
    manifest = bundle.manifest
    limits = manifest.limits
    if token_budget is not None:
        limits = Limits.model_validate({**limits.model_dump(), "max_prefill": token_budget})
    tokenizer = bundle.tokenizer()
    engine = StreamingEngine(
        SuppressingExecutor(recorder, [tokenizer.special(name) for name in never]),
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
    follow: bool = False,
) -> list[TurnRecord]:
    """Stream the scenario through both and compare every turn.

    Retained tokens, positions, logits within `tolerance`, greedy tokens and final events must
    agree. With `follow` the reference says what the engine said, so that a near tie does not part
    them. Returns the reference's records, for a test to say that what it is about did happen.
    """
    stream = scenario.dense_stream(model, Tokenizer.from_directory(bundle))
    records = []
    with recording_engine(
        bundle, num_pages=num_pages, token_budget=token_budget, never=scenario.never
    ) as (engine, recorder):
        session = scenario.open_session(engine)
        for number in range(chunks):
            question = scenario.questions.get(number)
            if question is not None:
                session.ask(question)
            session.push_chunk(scenario.chunk(number))
            events = list(session)
            times = scenario.times(number)
            said = events[-1].tokens if follow else None
            record = stream.chunk(scenario.frames(number), *times, question=question, said=said)
            assert_same_turn(stream, record, recorder.take(), tolerance=tolerance)
            assert_events_tell(stream, record, events, question)
            assert (events[-1].t0, events[-1].t1) == times
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
