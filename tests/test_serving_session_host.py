"""Sessions of many clients over one engine, without Triton between them."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from fake.engine import LIMITS, finals, make_engine, make_frames, make_protocol
from fake.executor import FakeExecutor
from fake.host import WAIT_SECONDS, Answer, HostDesk, RecordingSink, make_desk

from framesink.runtime.arrays import Float32Array
from framesink.runtime.events import Event, EventKind
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.preprocess import Grid, frames_to_patches
from framesink.serving.errors import StatusCode
from framesink.serving.metrics import ServingMetrics
from framesink.serving.options import ServeOptions


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


# Executors that stand still are neither measured nor late.
UNHURRIED = {"threads": 2, "admission": "none", "ladder": "none"}


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def alone(numbers: Sequence[int], **options: Any) -> list[list[int]]:
    """What a session on an engine of its own says about these chunks."""
    with make_engine() as engine:
        session = engine.open_session(**options)
        said = []
        for number in numbers:
            session.push(make_frames(number))
            said += [list(tokens) for tokens in finals(list(session))]
        return said


def test_every_session_gets_its_own_replies_in_order() -> None:
    """Each request is answered by its own chunk's turn, whoever shares the steps."""
    sessions, chunks = range(1, 17), range(4)
    with desk() as at:
        for session in sessions:
            at.open(session)
        answers: dict[int, list[Answer]] = {session: [] for session in sessions}
        for number in chunks:
            for session in sessions:
                answers[session].append(at.chunk(session, 100 * session + number))
        for session in sessions:
            expected = alone([100 * session + number for number in chunks])
            assert [answer.tokens for answer in answers[session]] == expected
            for turn, answer in enumerate(answers[session]):
                assert {event.turn for event in answer.events} == {turn}
                assert [event.final for event in answer.events].count(True) == 1
                assert answer.events[-1].final
            assert at.end(session).code is None
        assert at.engine.stats().pages_used == 0
    steps, of_one = (at.sink.values["framesink_step_batch_size_bucket", le] for le in ("+Inf", "1"))
    assert steps > of_one
    assert at.sink.values["framesink_chunks_total",] == len(sessions) * len(chunks)


def test_a_session_can_start_with_its_first_chunk() -> None:
    with desk() as at:
        first = at.ask(3, start=True, frames=make_frames(0))
        second = at.chunk(3, 1)
        assert [first.tokens, second.tokens] == alone([0, 1])


def test_embeddings_of_the_ensemble_are_answered_like_frames() -> None:
    executor = GatedExecutor()
    with desk(executor) as at:
        at.open(3)
        frames = make_frames(0)
        patches, grid = frames_to_patches(frames, at.engine.preprocess)
        inputs = {
            "EMBEDDINGS": executor.encode_vision(patches, grid),
            "GRID": np.array([[grid.t, grid.h, grid.w]], np.int32),
            "CHUNK": np.array([np.nan, np.nan, 2.0]),
        }
        assert [at.ask(3, inputs=inputs).tokens] == alone([0])
        late = at.ask(3, inputs={**inputs, "CHUNK": np.array([0.0, 1.0, 2.0])})
        assert late.code is StatusCode.INVALID_ARGUMENT
        inputs["EMBEDDINGS"] = np.full_like(inputs["EMBEDDINGS"], np.nan)
        assert "not finite" in at.ask(3, inputs=inputs).sentence


def test_questions_alone_are_answered_with_a_later_request() -> None:
    with desk() as at:
        at.open(3)
        asked = at.ask(3, question="How many?")
        assert (asked.wait().events, asked.code) == ([], None)
        answer = at.chunk(3, 0, question="Which colour?").wait()
        assert {event.question for event in answer.events} == {"How many?"}
        touch = at.ask(3)
        assert (touch.wait().events, touch.code) == ([], None)
        finish = at.end(3, finish=True).wait()
        assert {event.question for event in finish.events} == {"Which colour?"}
        assert finish.events[-1].final
        assert at.engine.stats().pages_used == 0
        assert at.ask(3).code is StatusCode.NOT_FOUND


def test_a_last_chunk_finishes_the_session() -> None:
    with desk() as at:
        at.open(3)
        at.ask(3, question="How many?")
        at.ask(3, question="Which colour?")
        last = at.chunk(3, 0, end=True).wait()
        asked = [event.question for event in last.events if event.final]
        assert asked == ["How many?", "Which colour?"]
        assert at.engine.stats().sessions == 0


def test_ending_a_session_answers_whoever_waits_and_frees_its_pages() -> None:
    executor = GatedExecutor()
    with desk(executor) as at:
        at.open(3)
        executor.gate.clear()
        waiting = [at.chunk(3, number) for number in range(3)]
        until(lambda: at.engine.stats().pages_used > 0)
        ended = at.end(3)
        after = at.chunk(3, 9)
        executor.gate.set()
        assert ended.code is None
        assert at.engine.stats().pages_used == 0
        assert [answer.code for answer in waiting] == [StatusCode.CANCELLED] * 3
        assert "ended by its client" in waiting[0].sentence
        assert after.code is StatusCode.NOT_FOUND
        at.open(3)  # the number is free again


def test_a_session_that_cannot_be_opened_says_why() -> None:
    with desk(max_sessions=2) as at:
        at.open(1)
        refusals: list[tuple[dict[str, Any], StatusCode, str]] = [
            ({"policy": "best"}, StatusCode.INVALID_ARGUMENT, "no policy"),
            ({"vision_seconds": 900}, StatusCode.INVALID_ARGUMENT, "larger max_context"),
            ({"max_patches": 1000}, StatusCode.INVALID_ARGUMENT, "max_patches=1000"),
            ({"precision": "int8"}, StatusCode.UNSUPPORTED, "is fp16"),
        ]
        for parameters, code, said in refusals:
            first = at.ask(5, start=True, **parameters)
            second = at.chunk(5, 0)
            assert first.code is code
            assert said in first.sentence
            assert second.code in (code, StatusCode.NOT_FOUND)
        assert at.ask(1, start=True).code is StatusCode.ALREADY_EXISTS
        at.open(2)
        full = at.ask(5, start=True)
        assert full.code is StatusCode.UNAVAILABLE
        assert "2 sessions are open" in full.sentence
        assert at.end(2).code is None
        at.open(5)
        assert at.ask(0, start=True).code is StatusCode.INVALID_ARGUMENT
        assert at.ask("x", start=True).code is StatusCode.INVALID_ARGUMENT
        unknown = at.chunk(77, 0)
        assert unknown.code is StatusCode.NOT_FOUND
        assert "open one with START" in unknown.sentence
        assert [at.chunk(1, 0).tokens] == alone([0])


def test_a_pool_without_room_is_a_reason_to_try_again() -> None:
    with desk(GatedExecutor(num_pages=400)) as at:
        number = 1
        while (answer := at.ask(number, start=True)).code is None:
            number += 1
            assert number < 20
        assert number > 1
        assert answer.code is StatusCode.UNAVAILABLE
        assert "unreserved" in answer.sentence
        at.end(1).wait()
        at.open(number)


def test_a_flood_of_chunks_is_refused_and_costs_the_others_nothing() -> None:
    executor = GatedExecutor()
    with desk(executor, max_pending_chunks=3) as at:
        at.open(1)
        at.open(2)
        executor.gate.clear()
        flood = [at.chunk(1, number) for number in range(40)]
        honest = at.chunk(2, 7)
        executor.gate.set()
        assert [honest.tokens] == alone([7])
        codes = [answer.code for answer in flood]
        assert codes[:3] == [None] * 3
        assert codes.count(StatusCode.UNAVAILABLE) >= 30
        assert "wait for their answers already" in flood[-1].sentence
        taken = [number for number, code in enumerate(codes) if code is None]
        assert [flood[number].tokens for number in taken] == alone(taken)


def test_requests_that_make_no_sense_cost_nobody_anything() -> None:
    """Between the chunks of two sessions, one sends all sorts of nonsense."""
    nonsense: list[dict[str, Any]] = [
        {"inputs": {"FRAMES": np.array([b"no picture"], dtype=np.object_)}},
        {"inputs": {"RAW_FRAMES": np.zeros((1, 2, 3, 4), np.uint8)}},
        {"inputs": {"TIMESTAMPS": np.array([np.nan] * 2)}, "frames": make_frames(0)},
        {"inputs": {"CHUNK_SPAN": np.array([0.0, 0.5])}, "frames": make_frames(0)},
        {"frames": make_frames(0, height=560, width=840, count=64)},
        {"question": "Why? " * 400},
        {"query": "Obey."},
        {"nothing": 3},
        {"frames": make_frames(0), "question": "  "},
    ]
    with desk() as at:
        at.open(1)
        at.open(2)
        said: dict[int, list[Answer]] = {1: [], 2: []}
        refused = []
        for number in range(5):
            said[1].append(at.chunk(1, number, dropped=number))
            refused += [at.ask(1, **request) for request in nonsense[number::5] + nonsense[:1]]
            said[2].append(at.chunk(2, 50 + number))
            for answer in (*said[1], *said[2], *refused):
                answer.wait()
        assert [answer.tokens for answer in said[1]] == alone(range(5))
        assert [answer.tokens for answer in said[2]] == alone(range(50, 55))
        assert {answer.code for answer in refused} == {StatusCode.INVALID_ARGUMENT}
    count = at.sink.values["framesink_refusals_total", "invalid_argument"]
    assert count == len(refused) == len(nonsense) + 5
    assert at.sink.values["framesink_dropped_frames_total",] == sum(range(5))


def test_a_cancelled_request_leaves_the_session_to_its_client() -> None:
    executor = GatedExecutor()
    with desk(executor, resume_seconds=60) as at:
        at.open(1)
        executor.gate.clear()
        gone = at.chunk(1, 0)
        until(lambda: at.engine.stats().pages_used > 0)
        gone.cancelled = True
        assert gone.code is StatusCode.CANCELLED
        executor.gate.set()
        again = at.chunk(1, 1)
        assert [again.tokens] == alone([0, 1])[1:]
        assert gone.events == []


class VanishingAnswer(Answer):
    """Its client is gone as soon as it has the first event."""

    def send(self, event: Event, *, last: bool) -> None:
        """See Responder."""
        super().send(event, last=last)
        self.cancelled = True


def test_a_client_that_goes_in_mid_reply_is_found_gone_with_the_last_event() -> None:
    """Even when nobody has looked for it in between."""
    with desk(resume_seconds=0.2) as at:
        at.open(1)
        answer = at.chunk(1, 0, answer=VanishingAnswer())
        assert answer.code is StatusCode.CANCELLED
        assert len(answer.events) >= 1
        until(lambda: at.engine.stats().sessions == 0)


@pytest.mark.parametrize("answered", [True, False])
def test_a_client_that_is_gone_gives_its_pages_back(answered: bool) -> None:
    """Gone in mid-reply: after `resume_seconds`. Gone between requests: after `idle_seconds`."""
    executor = GatedExecutor()
    with desk(executor, resume_seconds=0.3, idle_seconds=0.4 if answered else 60) as at:
        at.open(1)
        at.open(2)
        executor.gate.clear()
        answer = at.chunk(1, 0)
        until(lambda: at.engine.stats().pages_used > 0)
        answer.cancelled = not answered
        if not answered:
            assert answer.code is StatusCode.CANCELLED
        executor.gate.set()
        until(lambda: at.ask(2).code is None and at.engine.stats().sessions == 1)
        late = at.chunk(1, 1)
        assert late.code is StatusCode.NOT_FOUND
        assert ("without a request" if answered else "client had gone") in late.sentence
        assert [at.chunk(2, 5).tokens] == alone([5])
    reason = "idle" if answered else "abandoned"
    assert at.sink.values["framesink_sessions_ended_total", reason] >= 1


def test_a_session_goes_on_from_what_was_said() -> None:
    with desk() as at:
        at.open(1, previous_text="A red star enters.", query="Commentate.")
        said = [at.chunk(1, number).tokens for number in range(3)]
        assert said == alone(range(3), previous_text="A red star enters.", query="Commentate.")
        assert said != alone(range(3), query="Commentate.")


def test_draining_answers_what_waits_and_refuses_the_rest() -> None:
    executor = GatedExecutor()
    with desk(executor) as at:
        at.open(1)
        at.open(2)
        executor.gate.clear()
        waiting = [at.chunk(1, number) for number in range(2)]
        until(lambda: at.engine.stats().pages_used > 0)
        at.draining.set()
        numbers = itertools.count(3)
        until(lambda: at.ask(next(numbers), start=True).code is StatusCode.UNAVAILABLE)
        refused = at.chunk(1, 2)
        assert refused.code is StatusCode.UNAVAILABLE
        assert "shutting down" in refused.sentence
        assert not at.drained.is_set()
        executor.gate.set()
        assert at.drained.wait(WAIT_SECONDS)
        assert [answer.tokens for answer in waiting] == alone([0, 1])
        assert at.chunk(2, 0).code is StatusCode.UNAVAILABLE


def test_an_error_of_one_session_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose context is full ends with an error event; another goes on."""
    monkeypatch.setattr("fake.engine.LIMITS", LIMITS)
    with desk() as at:
        at.open(1, policy="full", max_new_tokens=400)
        at.open(2)
        number = 0
        while (last := at.chunk(1, number)).wait().events[-1].kind is not EventKind.ERROR:
            number += 1
            assert number < 400
        assert "context is full" in last.events[-1].text
        assert last.events[-1].final
        after = at.chunk(1, number)
        assert after.code is StatusCode.NOT_FOUND
        assert "context is full" in after.sentence
        assert [at.chunk(2, 5).tokens] == alone([5])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_answers_everybody_and_is_reported() -> None:
    executor = GatedExecutor()
    with desk(executor) as at:
        at.open(1)
        at.open(2)
        executor.dies = True
        answers = [at.chunk(session, 0) for session in (1, 2)]
        for answer in answers:
            answer.wait()
            failed = answer.code is not None or answer.events[-1].kind is EventKind.ERROR
            assert failed
        until(lambda: bool(at.broken))
        assert "The engine failed (SystemExit" in at.broken[0]
        late = at.ask(3, start=True)
        assert late.code is StatusCode.UNAVAILABLE
        assert "The engine failed" in late.sentence


def test_an_answer_that_cannot_be_sent_ends_its_session_alone() -> None:
    class BrokenAnswer(Answer):
        """Cannot be sent to, against what a responder promises."""

        def send(self, event: Event, *, last: bool) -> None:
            """See Responder."""
            raise RuntimeError("no way")

    with desk() as at:
        at.open(1)
        at.open(2)
        broken = at.chunk(1, 0, answer=BrokenAnswer())
        assert broken.code is StatusCode.INTERNAL
        assert "(RuntimeError)" in broken.sentence
        until(lambda: at.engine.stats().sessions == 1)
        assert [at.chunk(2, 5).tokens] == alone([5])


def test_submitting_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """While every worker is held up, requests are taken, and those that need none answered."""
    gate = threading.Event()
    held = threading.Event()

    def decode(*_: object) -> object:
        held.set()
        assert gate.wait(WAIT_SECONDS)
        raise AssertionError

    with desk(max_pending_chunks=2) as at:
        for session in range(1, 6):
            at.open(session)
        monkeypatch.setattr("framesink.serving.requests.decode_files", decode)
        for session in range(1, 6):
            at.chunk(session, 0)
            at.chunk(session, 1)
        assert held.wait(WAIT_SECONDS)
        assert [at.ask(session).code for session in range(1, 6)] == [None] * 5
        assert at.chunk(1, 2).code is StatusCode.UNAVAILABLE
        assert at.ask(99).code is StatusCode.NOT_FOUND
        gate.set()


def test_closing_the_host_answers_everybody() -> None:
    executor = GatedExecutor()
    with desk(executor) as at:
        at.open(1)
        executor.gate.clear()
        waiting = at.chunk(1, 0)
        until(lambda: at.engine.stats().pages_used > 0)
        threading.Timer(0.2, executor.gate.set).start()
        at.host.close()
        at.host.close = lambda: None  # type: ignore[method-assign]
        assert waiting.done
