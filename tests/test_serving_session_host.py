"""Sessions of many clients over one engine, without Triton between them."""

import threading
from typing import Any

import numpy as np
import pytest
from fake.engine import make_frames
from fake.gated_host import GatedExecutor, alone, desk
from fake.host import Answer
from fake.waiting import WAIT_SECONDS

from framesink.runtime.preprocess import frames_to_patches
from framesink.serving.errors import StatusCode


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


def test_a_session_goes_on_from_what_was_said() -> None:
    with desk() as at:
        at.open(1, previous_text="A red star enters.", query="Commentate.")
        said = [at.chunk(1, number).tokens for number in range(3)]
        assert said == alone(range(3), previous_text="A red star enters.", query="Commentate.")
        assert said != alone(range(3), query="Commentate.")


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
