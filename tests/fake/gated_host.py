"""A session host over an executor that stands still, or fails, when told to."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fake.engine import finals, make_engine, make_frames, make_protocol
from fake.executor import FakeExecutor
from fake.host import HostDesk, RecordingSink, make_desk
from fake.waiting import WAIT_SECONDS
from framesink.runtime.arrays import Float32Array
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.preprocess import Grid
from framesink.serving.metrics import ServingMetrics
from framesink.serving.options import ServeOptions

# Executors that stand still are neither measured nor late.
UNHURRIED = {"threads": 2, "admission": "none", "ladder": "none"}


class GatedExecutor(FakeExecutor):
    """Waits at the vision encoder while the gate is closed, and fails when told to."""

    def __init__(self, num_pages: int = 2048) -> None:
        super().__init__(make_protocol(), num_pages=num_pages, page_size=16)
        self.gate = threading.Event()
        self.gate.set()
        self.dies = False

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """See Executor."""
        assert self.gate.wait(WAIT_SECONDS)
        return super().encode_vision(patches, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """See Executor."""
        if self.dies:
            raise SystemExit("the device is gone")
        return super().step(batch)


@contextmanager
def desk(
    executor: FakeExecutor | None = None, *, max_sessions: int | None = None, **options: Any
) -> Iterator[HostDesk]:
    """A host over an engine of its own; at the end all is answered and no page is used."""
    sink = RecordingSink()
    metrics = ServingMetrics(sink)
    engine = make_engine(
        executor=executor or GatedExecutor(),
        threaded=True,
        max_sessions=max_sessions,
        observer=metrics,
    )
    made = make_desk(engine, metrics, sink, ServeOptions(**(UNHURRIED | options)))
    try:
        yield made
    finally:
        made.host.close()
    assert all(answer.done for answer in made.asked), "a request was never answered"
    assert engine.stats().pages_used == engine.stats().sessions == 0


def alone(numbers: Sequence[int], **options: Any) -> list[list[int]]:
    """What a session on an engine of its own says about these chunks."""
    with make_engine() as engine:
        session = engine.open_session(**options)
        said = []
        for number in numbers:
            session.push(make_frames(number))
            said += [list(tokens) for tokens in finals(list(session))]
        return said
