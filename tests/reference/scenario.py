"""A stream's script, and an engine that records what it does with it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from framesink.runtime.bundle import Bundle
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.executors import create_executor
from framesink.runtime.manifest import Limits
from framesink.runtime.policies import FullAttention, Policy, SinkWindow, SlidingWindow
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.session import Session
from framesink.runtime.video.chunk import Chunk
from reference.dense_policies import (
    DenseFullAttention,
    DensePolicy,
    DenseSinkWindow,
    DenseSlidingWindow,
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
