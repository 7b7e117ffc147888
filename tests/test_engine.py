"""The engine over the fake executor: many sessions, long runs, limits, and failures."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from fake.engine import LIMITS, finals, make_engine, make_frames, make_protocol
from fake.executor import FakeExecutor

from framesink.runtime.arrays import Float32Array
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import CapacityError, OptionError, SessionClosedError
from framesink.runtime.events import Event, EventKind
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.policies import FullAttention, SinkWindow, SlidingWindow
from framesink.runtime.preprocess import Grid
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.session import Session

SESSIONS = 20
TURNS = 12
POLICIES = [
    SinkWindow(5, 9, 3.0, 2),
    SinkWindow(5, 9, 2.0, 4),
    SlidingWindow(3.0),
    FullAttention(),
]


def open_one(engine: StreamingEngine, number: int) -> Session:
    """Sessions of all policies; half of them share their query, some sample."""
    sampling = SamplingParams(temperature=0.8, top_k=40, repetition_penalty=1.2, seed=number)
    return engine.open_session(
        POLICIES[number % len(POLICIES)],
        ["Commentate.", None, f"You are number {number}.", None][number % 4],
        sampling if number % 3 == 0 else None,
        max_new_tokens=3 + number % 5,
    )


def feed(session: Session, number: int) -> list[Event]:
    """Push all chunks, a question among them, and read to the end."""
    for turn in range(TURNS):
        if turn == number % 7 + 2:
            session.ask("How many?")
        session.push(make_frames(100 * number + turn, width=28 * (1 + number % 2)))
    session.finish()
    return list(session)


def alone(number: int) -> list[tuple[int, ...]]:
    with make_engine() as engine:
        session = open_one(engine, number)
        replies = []
        for turn in range(TURNS):
            if turn == number % 7 + 2:
                session.ask("How many?")
            session.push(make_frames(100 * number + turn, width=28 * (1 + number % 2)))
            replies += finals(list(session))
        return replies


def test_sessions_together_say_what_each_says_alone() -> None:
    expected = [alone(number) for number in range(SESSIONS)]
    assert len(set(map(tuple, expected))) == SESSIONS
    executor = FakeExecutor(make_protocol(), num_pages=8192, page_size=16)
    with make_engine(executor=executor) as engine:
        sessions = [open_one(engine, number) for number in range(SESSIONS)]
        said: list[list[tuple[int, ...]]] = [[] for _ in sessions]
        for turn in range(TURNS):
            for number, session in enumerate(sessions):
                if turn == number % 7 + 2:
                    session.ask("How many?")
                session.push(make_frames(100 * number + turn, width=28 * (1 + number % 2)))
            engine.run_until_idle()
            engine.check_integrity()
            for number, session in enumerate(sessions):
                said[number] += finals(list(session))
        assert said == expected
        assert max(executor.batch_sizes) > SESSIONS // 2
        for session in sessions:
            session.close()
        assert engine.stats().pages_used == engine.stats().pages_reserved == 0
        engine.check_integrity()


def test_sessions_of_many_threads_each_say_what_they_say_alone() -> None:
    """Chance decides which sessions share a step; it changes nothing."""
    expected = [alone(number) for number in range(8)]
    said: dict[int, list[tuple[int, ...]]] = {}
    with make_engine(num_pages=4096, threaded=True) as engine:

        def run(number: int) -> None:
            with open_one(engine, number) as session:
                replies = []
                for turn in range(TURNS):
                    if turn == number % 7 + 2:
                        session.ask("How many?")
                    session.push(make_frames(100 * number + turn, width=28 * (1 + number % 2)))
                    replies.append(next(event.tokens for event in session if event.final))
                said[number] = replies

        threads = [threading.Thread(target=run, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [said[number] for number in range(8)] == expected
        assert engine.stats().pages_used == engine.stats().sessions == 0
        engine.check_integrity()


def test_an_endless_session_needs_no_more_pages_than_a_short_one() -> None:
    chunks, settled = 2000, 400
    policy = SinkWindow(16, 16, 3.0, 4)
    with make_engine(page_size=4) as engine:
        session = engine.open_session(policy, "Commentate.", max_new_tokens=5)
        used = []
        for number in range(chunks):
            t0 = 1000.0 + number  # times of as many digits at the end as at the start
            session.push(make_frames(number % 50), t0=t0, t1=t0 + 1)
            assert len(finals(list(session))) == 1
            used.append(engine.stats().pages_used)
            if number % 100 == 0:
                engine.check_integrity()
        promised = engine.stats().pages_reserved
        assert max(used) <= promised
        assert abs(np.mean(used[-settled:]) - np.mean(used[settled : 2 * settled])) < 0.5
        assert max(used[-settled:]) <= max(used[settled:-settled])
        assert session.stats().turns == chunks
        assert session.stats().evicted_tokens > chunks * 20
        session.close()
        assert engine.stats().pages_used == 0
        engine.check_integrity()


def test_a_shared_prefix_is_written_once_and_freed_by_its_last_user() -> None:
    executor = FakeExecutor(make_protocol(), num_pages=2048, page_size=16)
    with make_engine(executor=executor) as engine:
        first = engine.open_session(query="Commentate on this video, please.")
        engine.run_until_idle()
        tokens, pages = engine.stats().tokens, engine.stats().pages_used
        assert pages > 0
        second = engine.open_session(query="Commentate on this video, please.")
        engine.run_until_idle()
        assert engine.stats().tokens == tokens
        assert engine.stats().pages_used == pages
        other = engine.open_session(query="Something else.")
        engine.run_until_idle()
        assert engine.stats().tokens > tokens
        other.close()
        for session in (first, second):
            session.push(make_frames(0))
        assert finals(list(first)) == finals(list(second))
        engine.check_integrity()
        first.close()
        engine.check_integrity()
        second.push(make_frames(1))
        assert len(finals(list(second))) == 1
        second.close()
        assert engine.stats().pages_used == 0


def test_sessions_beyond_the_limit_are_refused() -> None:
    with make_engine(max_sessions=2) as engine:
        sessions = [engine.open_session() for _ in range(2)]
        with pytest.raises(CapacityError, match="2 sessions are open"):
            engine.open_session()
        sessions[0].close()
        engine.open_session()


def test_a_pool_too_small_is_refused_with_the_size_needed() -> None:
    with make_engine() as engine:
        engine.open_session()
        both = engine.stats().pages_reserved
        engine.open_session()
        each = engine.stats().pages_reserved - both
        prefix = both - each
    with make_engine(num_pages=prefix + 2 * each + each // 2 + 1) as engine:
        engine.open_session()
        engine.open_session()
        with pytest.raises(CapacityError, match=rf"needs {each} pages .* {each // 2} of the pool"):
            engine.open_session()
        assert engine.stats().sessions == 2
    with make_engine(num_pages=each + 1) as engine:
        with pytest.raises(CapacityError, match=r"shared prefix needs \d+ pages"):
            engine.open_session()
        assert engine.stats().pages_reserved == 0


class BreakingExecutor(FakeExecutor):
    """Raises for a step that holds `poison`, and for a chunk of one colour."""

    def __init__(self, poison: int) -> None:
        super().__init__(make_protocol(), num_pages=2048, page_size=16)
        self._poison = poison

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """See Executor."""
        if not np.ptp(patches, axis=0).any():
            raise RuntimeError("black frames")
        return super().encode_vision(patches, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """See Executor."""
        if any((given.token_ids == self._poison).any() for given in batch):
            raise RuntimeError("poisoned")
        return super().step(batch)


@pytest.mark.parametrize("threaded", [False, True])
def test_a_failing_step_ends_the_sessions_in_it_and_no_others(threaded: bool) -> None:
    protocol = make_protocol()
    (poison,) = protocol.tokenizer.encode("ÿ")[:1]
    engine = make_engine(executor=BreakingExecutor(poison), threaded=threaded)
    with engine:
        healthy, broken = engine.open_session(), engine.open_session()
        for session in (healthy, broken):
            session.push(make_frames(0))
            assert next(event for event in session if event.final).kind is not EventKind.ERROR
        broken.ask("ÿ")
        broken.push(make_frames(1))
        events = list(broken)
        assert [event.kind for event in events] == [EventKind.ERROR]
        assert events[0].final
        assert events[0].text == "A step of fake failed (RuntimeError: poisoned)."
        with pytest.raises(SessionClosedError, match="poisoned"):
            broken.push(make_frames(2))
        healthy.push(make_frames(1))
        healthy.finish()
        assert len(finals(list(healthy))) == 1
        assert engine.stats().pages_used == engine.stats().sessions == 0
        engine.check_integrity()


def test_a_chunk_that_cannot_be_encoded_ends_its_session() -> None:
    with make_engine(executor=BreakingExecutor(-1)) as engine:
        healthy, broken = engine.open_session(), engine.open_session()
        broken.push(make_frames(0) * 0)
        healthy.push(make_frames(0))
        engine.run_until_idle()
        (error,) = list(broken)
        assert error.kind is EventKind.ERROR
        assert "fake could not encode (RuntimeError: black frames)" in error.text
        assert len(finals(list(healthy))) == 1
        engine.check_integrity()


def test_a_prefix_that_cannot_be_written_fails_its_sessions_only() -> None:
    protocol = make_protocol()
    (poison,) = protocol.tokenizer.encode("ÿ")[:1]
    with make_engine(executor=BreakingExecutor(poison)) as engine:
        broken = [engine.open_session(query="ÿ") for _ in range(2)]
        engine.run_until_idle()
        assert [[e.kind for e in session] for session in broken] == [[EventKind.ERROR]] * 2
        healthy = engine.open_session()
        healthy.push(make_frames(0))
        assert len(finals(list(healthy))) == 1
        healthy.close()
        assert engine.stats().pages_used == engine.stats().pages_reserved == 0


def test_closing_ends_every_session_and_the_executor() -> None:
    executor = FakeExecutor(make_protocol(), num_pages=2048, page_size=16)
    engine = make_engine(executor=executor, threaded=True)
    sessions = [engine.open_session() for _ in range(3)]
    read: list[list[Event]] = []
    readers = [
        threading.Thread(target=lambda s=session: read.append(list(s))) for session in sessions
    ]
    for reader in readers:
        reader.start()
    sessions[0].push(make_frames(0))
    engine.close()
    engine.close()
    for reader in readers:
        reader.join()
    assert len(read) == 3
    assert executor.closed
    with pytest.raises(SessionClosedError, match="engine was closed"):
        sessions[1].push(make_frames(0))
    with pytest.raises(SessionClosedError, match="engine was closed"):
        engine.open_session()
    sessions[2].close()


def test_an_engine_with_a_thread_is_not_driven_by_hand() -> None:
    with make_engine(threaded=True) as engine, pytest.raises(OptionError, match="thread"):
        engine.run_until_idle()


def test_figures_count_what_was_done() -> None:
    with make_engine(limits=LIMITS) as engine:
        session = engine.open_session(max_new_tokens=4)
        for turn in range(3):
            session.push(make_frames(turn))
            list(session)
        stats = engine.stats()
        assert (stats.sessions, stats.encoded_chunks) == (1, 3)
        assert stats.steps >= 3
        assert stats.mean_batch == 1.0
        assert stats.pages_used <= stats.pages_reserved <= stats.pages_total
        assert stats.tokens >= session.stats().context_tokens - 8
        assert session.stats().pages <= stats.pages_used
