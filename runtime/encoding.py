"""The half of the engine's loop that encodes: the chunks whose replies are due first."""

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Row
from dataclasses import dataclass

from framesink.runtime.arrays import Float32Array
from framesink.runtime.errors import error_sentence
from framesink.runtime.executors.base import Executor, FrameEncoder
from framesink.runtime.observer import EngineObserver
from framesink.runtime.preprocess import Grid
from framesink.runtime.scheduler import Encoding, Scheduler, Work
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
        everyone = list(sequences)
        waiting = {
            sequence.number: (sequence, chunk)
            for sequence in everyone
            if (chunk := sequence.chunk_to_encode) is not None
        }
        if not waiting:
            return False
        replies = [
            Work(each.number, each.deadline, 1, True, each.reply_tokens, each.chunk_seconds)
            for each in everyone
            if each.decoding
        ]
        chosen = self._scheduler.schedule_encoding(
            (
                Encoding(
                    number,
                    sequence.deadline,
                    chunk.grid.patches,
                    sequence.reply_tokens,
                    sequence.chunk_seconds,
                )
                for number, (sequence, chunk) in waiting.items()
            ),
            replies,
        )
        for group in _groups([waiting[number] for number in chosen]):
            started = time.monotonic()
            self._encode(group)
            seconds = (time.monotonic() - started) / len(group)
            for _, chunk in group:
                self.figures.chunks += 1
                self.figures.seconds += seconds
                self._observer.encoded(chunk.grid.patches, seconds)
        return bool(chosen)

    def _encode(self, group: Row[tuple[Sequence, PreparedChunk]]) -> None:
        """Encode chunks of one shape. If that fails, every one is tried by itself."""
        try:
            found = self._embeddings([chunk for _, chunk in group])
        except Exception as error:  # whatever it is, it ends one session alone
            if len(group) > 1:
                for member in group:
                    self._encode([member])
                return
            self._fail(
                group[0][0], error_sentence(f"{self._executor.name} could not encode", error)
            )
            return
        for (sequence, _), embeddings in zip(group, found, strict=True):
            sequence.encoded(embeddings)

    def _embeddings(self, chunks: Row[PreparedChunk]) -> list[Float32Array]:
        held = [chunk.pixels for chunk in chunks if chunk.pixels is not None]
        if self._frame_encoder is not None and held:
            return self._frame_encoder.encode_frames(held, chunks[0].grid)
        return [self._executor.encode_vision(chunk.content, chunk.grid) for chunk in chunks]


def _groups(
    members: Iterable[tuple[Sequence, PreparedChunk]],
) -> list[list[tuple[Sequence, PreparedChunk]]]:
    """Chunks of frames of one shape together, which an executor may encode in one call; all others
    by themselves."""
    groups: list[list[tuple[Sequence, PreparedChunk]]] = []
    by_shape: dict[tuple[Grid, tuple[int, ...]], list[tuple[Sequence, PreparedChunk]]] = {}
    for member in members:
        chunk = member[1]
        if chunk.pixels is None:
            groups.append([member])
            continue
        shape = (chunk.grid, tuple(chunk.pixels.shape))
        if shape not in by_shape:
            by_shape[shape] = []
            groups.append(by_shape[shape])
        by_shape[shape].append(member)
    return groups
