"""An executor that writes down what it was asked for: which tokens, at which positions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from framesink.runtime.arrays import Float32Array, Int32Array
from framesink.runtime.executors.base import Executor, SequenceInput
from framesink.runtime.preprocess import Grid
from reference.positions import Position

NULL_PAGE = 0


@dataclass(frozen=True)
class RecordedSequence:
    """One sequence's share of one step. `tokens` counts every token attended to, new ones
    included, by its position and id (steps of a vision block may share positions); `new` holds the
    positions of the new tokens in order."""

    tokens: Counter[tuple[Position, int]]
    new: tuple[Position, ...]
    logits: Float32Array | None
    batch_size: int


class RecordingExecutor:
    """Passes every call on, and keeps what went by until `take` is called.

    It follows token ids through slots by itself: what a context holds is what was last written
    into its slots. Raises AssertionError when a sequence reads a slot that was never written, when
    a row is written to the null page or to a slot that is read in the same step, and when one slot
    is written twice in a step.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._token_in: dict[int, int] = {}
        self._steps: list[RecordedSequence] = []
        self.name = executor.name
        self.page_size = executor.page_size
        self.num_pages = executor.num_pages

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """See Executor."""
        return self._executor.encode_vision(patches, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """See Executor."""
        self._check_slots(batch)
        contexts = [self._context(sequence) for sequence in batch]
        outputs = self._executor.step(batch)
        for sequence, tokens, logits in zip(batch, contexts, outputs, strict=True):
            new = _as_positions(sequence.positions)
            ids, slots = sequence.token_ids.tolist(), sequence.slots.tolist()
            tokens.update(zip(new, ids, strict=True))
            self._token_in.update(zip(slots, ids, strict=True))
            kept = None if logits is None else np.array(logits)
            self._steps.append(RecordedSequence(tokens, tuple(new), kept, len(batch)))
        return outputs

    def close(self) -> None:
        """See Executor."""
        self._executor.close()

    def take(self) -> list[RecordedSequence]:
        """What was recorded since the last call."""
        taken, self._steps = self._steps, []
        return taken

    def _slots_read(self, sequence: SequenceInput) -> list[int]:
        context = sequence.context
        rows = np.arange(self.page_size)
        slots = (context.block_table[:, None] * self.page_size + rows).reshape(-1)
        read: list[int] = slots[context.valid].tolist()
        return read

    def _context(self, sequence: SequenceInput) -> Counter[tuple[Position, int]]:
        positions = _as_positions(sequence.context.positions[:, sequence.context.valid])
        slots = self._slots_read(sequence)
        assert set(slots) <= self._token_in.keys(), "a slot is read that was never written"
        tokens = (self._token_in[slot] for slot in slots)
        return Counter(zip(positions, tokens, strict=True))

    def _check_slots(self, batch: Sequence[SequenceInput]) -> None:
        written = [slot for sequence in batch for slot in sequence.slots.tolist()]
        read = {slot for sequence in batch for slot in self._slots_read(sequence)}
        assert len(set(written)) == len(written), "a slot is written twice in a step"
        assert not read.intersection(written), "a slot is read and written in the same step"
        assert min(written) >= (NULL_PAGE + 1) * self.page_size, "the null page is written to"


def _as_positions(positions: Int32Array) -> list[Position]:
    return [(t, h, w) for t, h, w in positions.T.tolist()]
