"""One session run as several: what an executor answers when sequences share its steps."""

from collections.abc import Sequence
from dataclasses import replace

from framesink.runtime.arrays import Float32Array, Int32Array
from framesink.runtime.executors.base import ContextView, Executor, SequenceInput
from framesink.runtime.preprocess import Grid

# Contexts are numbered from 1 on, far below this.
_EDITIONS = 1 << 40


class SharedSteps:
    """An executor for one session, over one that runs it `copies` times, each in pages of its own.

    Every answer is the last copy's. Copies share a step as long as it has at most `max_tokens` new
    tokens; larger parts of a prompt are run one after the other.
    """

    def __init__(self, executor: Executor, *, copies: int, max_tokens: int) -> None:
        self.name = executor.name
        self.page_size = executor.page_size
        self.num_pages = (executor.num_pages - 1) // copies + 1
        self._executor = executor
        self._copies = copies
        self._max_tokens = max_tokens

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """See Executor."""
        return self._executor.encode_vision(patches, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """See Executor."""
        copied = [[self._copy(given, number) for given in batch] for number in range(self._copies)]
        if self._copies * sum(len(given.token_ids) for given in batch) > self._max_tokens:
            return [self._executor.step(part) for part in copied][-1]
        return self._executor.step([given for part in copied for given in part])[-len(batch) :]

    def close(self) -> None:
        """See Executor."""
        self._executor.close()

    def _copy(self, given: SequenceInput, number: int) -> SequenceInput:
        """The sequence as copy `number`; the null page, 0, is everybody's."""
        pages = number * (self.num_pages - 1)
        view = given.context
        table: Int32Array = view.block_table + pages * (view.block_table > 0)
        edition = view.edition and (view.edition[0] + number * _EDITIONS, view.edition[1])
        return replace(
            given,
            slots=given.slots + pages * self.page_size,
            context=ContextView(
                block_table=table.astype(given.slots.dtype),
                positions=view.positions,
                valid=view.valid,
                bases=view.bases,
                edition=edition,
            ),
        )
