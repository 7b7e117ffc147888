"""How steps reach an executor: launched ahead where it can do that, run at once where it cannot."""

from collections.abc import Sequence

from framesink.runtime.arrays import Float32Array
from framesink.runtime.executors.base import (
    ChoosingExecutor,
    Executor,
    LaunchingExecutor,
    SequenceInput,
)

Answer = Float32Array | int | None


class StepDriver:
    """Runs steps on any kind of executor."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._chooser = executor if isinstance(executor, ChoosingExecutor) else None
        self._launcher = executor if isinstance(executor, LaunchingExecutor) else None

    @property
    def launches_ahead(self) -> bool:
        """Whether a step may be launched before the one before it is collected."""
        return self._launcher is not None

    def launch(self, batch: Sequence[SequenceInput]) -> object:
        """Begin a step. What it returns is for `collect`."""
        if self._launcher is not None:
            return self._launcher.launch(batch)
        if self._chooser is not None:
            return self._chooser.step_and_choose(batch)
        return [*self._executor.step(batch)]

    def collect(self, launched: object) -> list[Answer]:
        """Wait for the oldest step not collected yet: every sequence's next token, or the logits it
        chooses from itself."""
        if self._launcher is not None:
            return self._launcher.collect(launched)
        assert isinstance(launched, list)
        return launched
