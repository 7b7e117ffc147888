"""Who waits for a session, and what wakes them: bounded queues, threads and asyncio."""

import asyncio
import threading

import pytest
from fake.engine import finals, make_engine, make_frames, make_protocol
from fake.executor import FakeExecutor

from framesink.runtime.arrays import Float32Array
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import BacklogError, SessionClosedError
from framesink.runtime.events import Event
from framesink.runtime.preprocess import Grid
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.session import Session


class GatedExecutor(FakeExecutor):
    """Waits in every step until the gate is open."""

    def __init__(self, protocol: ChatProtocol) -> None:
        super().__init__(protocol, num_pages=512, page_size=16)
        self.gate = threading.Event()

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """See Executor."""
        self.gate.wait()
        return super().encode_vision(patches, grid)


def gated_engine() -> tuple[StreamingEngine, GatedExecutor]:
    executor = GatedExecutor(make_protocol())
    return make_engine(executor=executor, threaded=True), executor


def fill(session: Session) -> int:
    """Push until the queue is full."""
    count = 0
    while True:
        try:
            session.push(make_frames(count), timeout=0.2)
        except BacklogError:
            return count
        count += 1


def test_the_queue_of_chunks_is_bounded() -> None:
    engine, executor = gated_engine()
    with engine:
        session = engine.open_session(max_pending_chunks=2)
        pushed = fill(session)
        assert pushed == 3  # one is being encoded, two wait
        with pytest.raises(BacklogError, match="2 chunks of this session wait"):
            session.push(make_frames(9), block=False)
        pusher = threading.Thread(target=session.push, args=[make_frames(9)])
        pusher.start()
        executor.gate.set()
        pusher.join()
        session.finish()
        assert len(finals(list(session))) == pushed + 1


def test_closing_wakes_those_who_wait() -> None:
    engine, executor = gated_engine()
    with engine:
        session = engine.open_session(max_pending_chunks=1)
        fill(session)
        outcomes: list[str] = []

        def push() -> None:
            try:
                session.push(make_frames(9))
            except SessionClosedError as error:
                outcomes.append(str(error))

        def read() -> None:
            outcomes.extend(event.text for event in session)

        threads = [threading.Thread(target=push), threading.Thread(target=read)]
        for thread in threads:
            thread.start()
        closer = threading.Thread(target=session.close)
        closer.start()
        executor.gate.set()
        for thread in [*threads, closer]:
            thread.join()
        assert any("was closed" in outcome for outcome in outcomes)
        assert engine.stats().pages_used == 0


def test_iterating_asynchronously_leaves_the_loop_free() -> None:
    engine, executor = gated_engine()

    async def read(session: Session) -> list[Event]:
        return [event async for event in session]

    async def main() -> tuple[list[Event], list[Event]]:
        sessions = [engine.open_session(), engine.open_session()]
        for session in sessions:
            session.push(make_frames(0))
            session.push(make_frames(1))
            session.finish()
        readers = [asyncio.create_task(read(session)) for session in sessions]
        await asyncio.sleep(0.05)  # the readers wait, the loop turns
        assert not any(reader.done() for reader in readers)
        executor.gate.set()
        first, second = await asyncio.gather(*readers)
        return first, second

    with engine:
        first, second = asyncio.run(main())
    assert finals(first) == finals(second)
    assert len(finals(first)) == 2


def test_a_cancelled_reader_loses_nothing() -> None:
    engine, executor = gated_engine()

    async def main() -> list[tuple[int, ...]]:
        session = engine.open_session()
        session.push(make_frames(0))
        session.finish()
        waiting = asyncio.ensure_future(anext(aiter(session)))
        await asyncio.sleep(0.02)
        waiting.cancel()
        executor.gate.set()
        return finals([event async for event in session])

    with engine:
        assert len(asyncio.run(main())) == 1


def test_async_iteration_works_without_a_thread() -> None:
    async def main(session: Session) -> list[Event]:
        return [event async for event in session]

    with make_engine() as engine:
        session = engine.open_session()
        session.push(make_frames(0))
        assert len(finals(asyncio.run(main(session)))) == 1
