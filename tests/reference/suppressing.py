"""An executor whose model never says certain tokens."""

from collections.abc import Sequence

from framesink.runtime.arrays import Float32Array
from framesink.runtime.executors.base import Executor, SequenceInput
from framesink.runtime.preprocess import Grid

IMPOSSIBLE = -1e9


class SuppressingExecutor:
    """Passes every call on and lowers the logits of some tokens, in copies."""

    def __init__(self, executor: Executor, never: Sequence[int]) -> None:
        self._executor = executor
        self._never = list(never)
        self.name = executor.name
        self.page_size = executor.page_size
        self.num_pages = executor.num_pages

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """See Executor."""
        return self._executor.encode_vision(patches, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """See Executor."""
        return [self._lowered(logits) for logits in self._executor.step(batch)]

    def _lowered(self, logits: Float32Array | None) -> Float32Array | None:
        if logits is None:
            return None
        lowered = logits.copy()
        lowered[self._never] = IMPOSSIBLE
        return lowered

    def close(self) -> None:
        """See Executor."""
        self._executor.close()
