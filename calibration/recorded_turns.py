"""What an engine asks of its executor over a stream, turn by turn, so that another can redo it.

A replayed executor is asked for the same steps: the same frames, the same tokens (those the
recorded executor chose, forced on it), positions and slots. Only its own numbers differ.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import VerificationError
from framesink.runtime.events import EventKind
from framesink.runtime.executors.base import ContextView, Executor, SequenceInput
from framesink.runtime.manifest import Limits, StreamingDefaults
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.preprocess import Grid, PreprocessConfig
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.video.chunk import Chunk


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """All that a `StreamingEngine` needs beside its executor."""

    model: ModelConfig
    protocol: ChatProtocol
    preprocess: PreprocessConfig
    defaults: StreamingDefaults
    limits: Limits

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Self:
        """The settings a bundle was built with."""
        manifest = bundle.manifest
        return cls(
            manifest.model,
            bundle.protocol(),
            manifest.preprocess,
            manifest.streaming,
            manifest.limits,
        )

    def num_pages(self, page_size: int) -> int:
        """Pages of an executor for one session of full length, the null page included."""
        return -(-self.limits.max_context // page_size) + 1

    def engine(self, executor: Executor) -> StreamingEngine:
        """An engine for one session that works in the calling thread."""
        return StreamingEngine(
            executor,
            self.model,
            self.protocol,
            self.preprocess,
            self.defaults,
            self.limits,
            threaded=False,
            max_sessions=1,
        )


@dataclass(frozen=True, slots=True, eq=False)
class RecordedStep:
    """One step of one sequence, its vision embeddings left out: the step takes the next
    `vision_rows` rows of those its executor encoded. `logits` float32 `[vocab]` are the recorded
    executor's, None where none were asked for."""

    sequence: SequenceInput
    vision_rows: int
    logits: Float32Array | None

    def with_vision(self, rows: Float32Array | None) -> SequenceInput:
        """The step with vision embeddings float32 `[vision_rows, hidden]`, None for no rows."""
        return replace(self.sequence, vision_embeddings=rows)


@dataclass(frozen=True, slots=True, eq=False)
class RecordedTurn:
    """All that happened for one chunk. `patches` float32 `[n, patch_dim]` were encoded to
    `embeddings` float32 `[v, hidden]` by the recorded executor."""

    chunk: int
    patches: Float32Array
    grid: Grid
    embeddings: Float32Array
    steps: tuple[RecordedStep, ...]


def record_turns(
    executor: Executor,
    settings: StreamSettings,
    chunks: Iterable[Chunk],
    *,
    questions: Mapping[int, str] | None = None,
) -> Iterator[RecordedTurn]:
    """Stream `chunks` through an engine over `executor`, greedily, in the calling thread.

    Eviction, replies and context are those of a live session with the settings' defaults.
    `questions` are asked with the chunk of that number. A turn is yielded when it has ended;
    turns may be kept, or used and dropped. `executor` is not closed. Raises VerificationError if
    the session fails.
    """
    recorder = _Recorder(executor)
    with settings.engine(recorder) as engine, engine.open_session(sampling=SamplingParams()) as s:
        for number, chunk in enumerate(chunks):
            question = (questions or {}).get(number)
            if question is not None:
                s.ask(question)
            s.push_chunk(chunk)
            for event in s:
                if event.kind is EventKind.ERROR:
                    raise VerificationError(f"The streamed session failed: {event.text}")
            yield recorder.take(number)


class _Recorder:
    """Passes every call on, and keeps copies of what went by until `take` is called."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._vision: tuple[Float32Array, Grid, Float32Array] | None = None
        self._steps: list[RecordedStep] = []
        self.name = executor.name
        self.page_size = executor.page_size
        self.num_pages = executor.num_pages

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """See Executor."""
        embeddings = self._executor.encode_vision(patches, grid)
        self._vision = (patches, grid, embeddings)
        return embeddings

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """See Executor."""
        outputs = self._executor.step(batch)
        for sequence, logits in zip(batch, outputs, strict=True):
            rows = 0 if sequence.vision_embeddings is None else len(sequence.vision_embeddings)
            kept = None if logits is None else logits.copy()
            self._steps.append(RecordedStep(_copy(sequence), rows, kept))
        return outputs

    def close(self) -> None:
        """The executor belongs to whoever made it."""

    def take(self, chunk: int) -> RecordedTurn:
        """What went by since the last call, for one chunk."""
        if self._vision is None:
            raise RuntimeError(f"nothing was encoded for chunk {chunk}")
        patches, grid, embeddings = self._vision
        turn = RecordedTurn(chunk, patches, grid, embeddings, tuple(self._steps))
        self._vision, self._steps = None, []
        return turn


def _copy(sequence: SequenceInput) -> SequenceInput:
    """The engine goes on changing the arrays of a context in place."""
    context = sequence.context
    return replace(
        sequence,
        token_ids=sequence.token_ids.copy(),
        vision_embeddings=None,
        positions=sequence.positions.copy(),
        slots=sequence.slots.copy(),
        bases=_copied(sequence.bases),
        context=ContextView(
            block_table=context.block_table.copy(),
            positions=context.positions.copy(),
            valid=context.valid.copy(),
            bases=_copied(context.bases),
            edition=context.edition,
        ),
    )


def _copied(array: AnyArray | None) -> AnyArray | None:
    return None if array is None else np.array(array)
