"""The half of the engine's loop that encodes: the chunks whose replies are due first."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from framesink.runtime.arrays import Float32Array
from framesink.runtime.errors import error_sentence
from framesink.runtime.executors.base import Executor, FrameEncoder
from framesink.runtime.observer import EngineObserver
from framesink.runtime.scheduler import Encoding, Scheduler
from framesink.runtime.sequence import Sequence
from framesink.runtime.session_input import PreparedChunk


@dataclass(slots=True)
class EncodingFigures:
    """Counts since the start; times in seconds."""

    chunks: int = 0
    seconds: float = 0.0


class ChunkEncoder:
    """Gives sequences the embeddings they wait for."""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        observer: EngineObserver,
        fail: Callable[[Sequence, str], None],
    ) -> None:
        """`fail` ends a sequence whose chunk could not be encoded, saying why."""
        self.figures = EncodingFigures()
        self._executor = executor
        self._frame_encoder = executor if isinstance(executor, FrameEncoder) else None
        self._scheduler = scheduler
        self._observer = observer
        self._fail = fail

    def run(self, sequences: Iterable[Sequence]) -> bool:
        """Encode as many waiting chunks as one round has room for; whether any waited."""
        waiting = {
            sequence.number: (sequence, chunk)
            for sequence in sequences
            if (chunk := sequence.chunk_to_encode) is not None
        }
        chosen = self._scheduler.schedule_encoding(
            Encoding(number, sequence.deadline, chunk.grid.patches)
            for number, (sequence, chunk) in waiting.items()
        )
        for number in chosen:
            sequence, chunk = waiting[number]
            started = time.monotonic()
            try:
                sequence.encoded(self._encode(chunk))
            except Exception as error:  # whatever it is, it ends this session alone
                self._fail(
                    sequence, error_sentence(f"{self._executor.name} could not encode", error)
                )
            seconds = time.monotonic() - started
            self.figures.chunks += 1
            self.figures.seconds += seconds
            self._observer.encoded(chunk.grid.patches, seconds)
        return bool(chosen)

    def _encode(self, chunk: PreparedChunk) -> Float32Array:
        if self._frame_encoder is not None and chunk.pixels is not None:
            return self._frame_encoder.encode_frames(chunk.pixels, chunk.grid)
        return self._executor.encode_vision(chunk.content, chunk.grid)
