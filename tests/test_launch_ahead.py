"""Steps launched before the answers of the one before: nothing a session says or holds changes."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from fake.engine import (
    FEW_MERGES,
    LIMITS,
    MANY_MERGES,
    finals,
    make_engine,
    make_frames,
    make_protocol,
)
from fake.executor import FakeExecutor
from fake.launching import Answers, LaunchingFakeExecutor
from fake.lockstep import run_in_lockstep
from fake.token_list import TokenList
from hypothesis import given, settings
from hypothesis import strategies as st

from framesink.runtime.engine import StreamingEngine
from framesink.runtime.events import EventKind
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.policies import SinkWindow
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.session import Session

SAMPLED = SamplingParams(temperature=0.8, top_k=40, repetition_penalty=1.2, seed=5)


def launching_engine(
    *, vocabulary: int = MANY_MERGES, page_size: int = 16, prefill_budget: int = 64
) -> tuple[StreamingEngine, LaunchingFakeExecutor]:
    protocol = make_protocol(vocabulary)
    executor = LaunchingFakeExecutor(protocol, num_pages=8192, page_size=page_size)
    limits = LIMITS.model_copy(update={"max_prefill": prefill_budget})
    return make_engine(protocol=protocol, executor=executor, limits=limits), executor


@given(
    vocabulary=st.sampled_from([FEW_MERGES, MANY_MERGES]),
    windows=st.tuples(st.integers(1, 5), st.integers(2, 5)),
    text=st.tuples(st.integers(0, 9), st.integers(0, 12)),
    page_size=st.sampled_from([1, 4, 16]),
    prefill_budget=st.sampled_from([5, 17, 400]),
    max_new_tokens=st.integers(1, 9),
    previous=st.sampled_from(["", "The blue square leaves. " * 6]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_a_session_says_what_a_plain_token_list_says(
    vocabulary: int,
    windows: tuple[int, int],
    text: tuple[int, int],
    page_size: int,
    prefill_budget: int,
    max_new_tokens: int,
    previous: str,
    seed: int,
) -> None:
    """Every token depends on every row of its context, so a row that was guessed wrongly and not
    forgotten would show."""
    protocol = make_protocol(vocabulary)
    theirs = TokenList(protocol, *windows, *text, None, protocol.previous_words(previous))
    engine, executor = launching_engine(
        vocabulary=vocabulary, page_size=page_size, prefill_budget=prefill_budget
    )
    with engine:
        session = engine.open_session(
            SinkWindow(text[0], text[1], float(windows[0]), windows[1]),
            max_new_tokens=max_new_tokens,
            previous_text=previous,
        )
        run_in_lockstep(engine, session, theirs, max_new_tokens=max_new_tokens, seed=seed)
    assert (executor.guesses > 0) == (max_new_tokens > 1)


def alike(engine: StreamingEngine, seed: int, cancel: list[int | None]) -> list[object]:
    """Eight sessions over random chunks, some of which end at a random moment: all that each said,
    and how much each held after every turn."""
    random = np.random.default_rng(seed)
    said: list[list[object]] = [[] for _ in cancel]
    opened: list[Session | None] = [
        engine.open_session(
            SinkWindow(4, 8, 2.0, 3),
            "Commentate." if number % 2 else None,
            SAMPLED if number % 4 == 3 else None,
            max_new_tokens=int(random.integers(1, 9)),
        )
        for number in range(len(cancel))
    ]
    for turn in range(10):
        for number, session in enumerate(opened):
            frames = make_frames(seed + 100 * number + turn)
            if session is None:
                continue
            session.push(frames)
            if cancel[number] == turn:
                for _ in range(int(random.integers(1, 8))):
                    engine._worker.run_once()
                session.close()
                engine.check_integrity()
                opened[number] = None
        engine.run_until_idle()
        engine.check_integrity()
        for session, record in zip(opened, said, strict=True):
            if session is not None:
                stats = session.stats()
                record += [*finals(list(session)), stats.context_tokens, stats.pages]
    for session in opened:
        if session is not None:
            session.close()
    assert engine.stats().pages_used == engine.stats().pages_reserved == 0
    engine.check_integrity()
    return [tuple(record) for record in said]


@given(
    seed=st.integers(0, 1000),
    cancel=st.lists(st.none() | st.integers(0, 9), min_size=8, max_size=8),
    page_size=st.sampled_from([1, 4, 16]),
)
@settings(max_examples=20, deadline=None)
def test_many_sessions_of_which_some_end_in_flight(
    seed: int, cancel: list[int | None], page_size: int
) -> None:
    """With and without launching ahead: replies, contexts and pages are equal."""
    engine, executor = launching_engine(page_size=page_size)
    with engine:
        found = alike(engine, seed, cancel)
    protocol = make_protocol()
    plain = FakeExecutor(protocol, num_pages=8192, page_size=page_size)
    with make_engine(executor=plain) as engine:
        assert alike(engine, seed, cancel) == found
    assert executor.most_under_way == 2
    assert executor.guesses > 0


def test_sessions_of_threads_that_close_at_any_time() -> None:
    """The engine's own thread, while others open, push and close."""
    executor = LaunchingFakeExecutor(make_protocol(), num_pages=4096, page_size=4)
    expected: dict[int, list[tuple[int, ...]]] = {}
    with make_engine(page_size=4) as engine:
        for number in range(6):
            session = engine.open_session(SinkWindow(4, 8, 2.0, 3))
            expected[number] = []
            for turn in range(8):
                session.push(make_frames(100 * number + turn))
                expected[number] += finals(list(session))
    said: dict[int, list[tuple[int, ...]]] = {}
    with make_engine(executor=executor, threaded=True) as engine:

        def run(number: int) -> None:
            with engine.open_session(SinkWindow(4, 8, 2.0, 3)) as session:
                replies = []
                for turn in range(number + 3):
                    session.push(make_frames(100 * number + turn))
                    replies.append(next(event.tokens for event in session if event.final))
                said[number] = replies
                session.push(make_frames(7))  # left under way

        threads = [threading.Thread(target=run, args=[number]) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.stats().pages_used == engine.stats().sessions == 0
        engine.check_integrity()
    assert said == {number: replies[: number + 3] for number, replies in expected.items()}


class BreakingExecutor(LaunchingFakeExecutor):
    """Raises when the step of number `broken` is launched, or when it is collected."""

    def __init__(self, broken: int, when: str) -> None:
        super().__init__(make_protocol(), num_pages=2048, page_size=16)
        self._left = {"launch": broken, "collect": broken}[when]
        self._when = when

    def launch(self, batch: Sequence[SequenceInput]) -> object:
        """See LaunchingExecutor."""
        self._count("launch")
        return super().launch(batch)

    def collect(self, launched: object) -> Answers:
        """See LaunchingExecutor."""
        answers = super().collect(launched)
        self._count("collect")
        return answers

    def _count(self, what: str) -> None:
        if what == self._when:
            self._left -= 1
            if self._left == 0:
                raise RuntimeError("broken")


@pytest.mark.parametrize("when", ["launch", "collect"])
@pytest.mark.parametrize("broken", [2, 3, 4, 5])
def test_a_step_that_fails_ends_its_sessions_and_frees_their_pages(when: str, broken: int) -> None:
    with make_engine(executor=BreakingExecutor(broken, when)) as engine:
        session = engine.open_session(max_new_tokens=9)
        late = engine.open_session()
        session.push(make_frames(1))
        engine.run_until_idle()
        errors = [event for event in session if event.kind is EventKind.ERROR]
        assert [error.final for error in errors] == [True]
        assert "launching fake failed (RuntimeError: broken)" in errors[0].text
        engine.check_integrity()
        if not list(late):  # it has not shared the prefix's step
            late.push(make_frames(1))
            assert len(finals(list(late))) == 1
        late.close()
        assert engine.stats().pages_used == engine.stats().sessions == 0


def test_steps_are_counted_once_and_do_not_overlap() -> None:
    engine, executor = launching_engine()
    with engine:
        session = engine.open_session(max_new_tokens=9)
        for turn in range(4):
            session.push(make_frames(turn))
            list(session)
        stats = engine.stats()
        assert stats.steps == len(executor.batch_sizes)
        assert stats.last_step_seconds > 0
