"""Sessions over the fake executor: what they say, and what they say when something is wrong."""

import time
from itertools import groupby

import numpy as np
import pytest
from fake.engine import (
    FEW_MERGES,
    LIMITS,
    MANY_MERGES,
    fake_vision,
    finals,
    make_engine,
    make_frames,
    make_protocol,
)
from fake.lockstep import run_in_lockstep
from fake.token_list import TokenList
from hypothesis import given, settings
from hypothesis import strategies as st

from framesink.runtime.errors import (
    CapacityError,
    OptionError,
    SessionClosedError,
    VideoError,
)
from framesink.runtime.events import Event, EventKind
from framesink.runtime.policies import FullAttention, SinkWindow
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.video.chunk import Chunk


@given(
    vocabulary=st.sampled_from([FEW_MERGES, MANY_MERGES]),
    windows=st.tuples(st.integers(1, 5), st.integers(2, 5)),
    text=st.tuples(st.integers(0, 9), st.integers(0, 12)),
    page_size=st.sampled_from([1, 4, 16]),
    prefill_budget=st.sampled_from([5, 17, 400]),
    max_new_tokens=st.integers(1, 9),
    query=st.none() | st.just("Say what happens."),
    previous=st.sampled_from(["", "A red star enters.", "The blue square leaves. " * 6]),
    questions=st.sets(st.integers(0, 19), max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_a_session_says_what_a_plain_token_list_says(
    vocabulary: int,
    windows: tuple[int, int],
    text: tuple[int, int],
    page_size: int,
    prefill_budget: int,
    max_new_tokens: int,
    query: str | None,
    previous: str,
    questions: set[int],
    seed: int,
) -> None:
    """Every sampled token depends on every retained token, its position and all it ever saw, so
    equal replies mean equal contexts: through eviction, cuts, silences, closings that were none,
    replies cut short, questions, words said before, and prompts written in parts."""
    protocol = make_protocol(vocabulary)
    limits = LIMITS.model_copy(update={"max_prefill": prefill_budget})
    policy = SinkWindow(text[0], text[1], float(windows[0]), windows[1])
    theirs = TokenList(protocol, *windows, *text, query, protocol.previous_words(previous))
    with make_engine(protocol=protocol, page_size=page_size, limits=limits) as engine:
        session = engine.open_session(
            policy, query, max_new_tokens=max_new_tokens, previous_text=previous
        )
        run_in_lockstep(
            engine,
            session,
            theirs,
            max_new_tokens=max_new_tokens,
            seed=seed,
            questions=questions,
        )


def words_of(protocol: ChatProtocol, tokens: tuple[int, ...]) -> list[int]:
    """The words of a reply: no stop token, no closing."""
    words = [token for token in tokens if token not in protocol.stop_tokens]
    closing = protocol.reply_closing
    return words[: -len(closing)] if words[-len(closing) :] == closing else words


@pytest.mark.parametrize("vocabulary", [FEW_MERGES, MANY_MERGES])
def test_text_streams_without_the_closing(vocabulary: int) -> None:
    """The pieces of a turn make up its words; a reply without words is silence."""
    protocol = make_protocol(vocabulary)
    assert (len(protocol.reply_closing) == 1) == (vocabulary == MANY_MERGES)
    with make_engine(protocol=protocol) as engine:
        session = engine.open_session(max_new_tokens=8)
        kinds = set()
        pieces = []
        for turn in range(80):
            session.push(make_frames(turn))
            events = list(session)
            *before, last = events
            words = words_of(protocol, last.tokens)
            assert last.final
            assert not any(event.final or event.tokens or not event.text for event in before)
            assert "".join(event.text for event in events) == protocol.tokenizer.decode(words)
            assert (last.kind is EventKind.SILENCE) == (not words)
            assert {event.turn for event in events} == {turn}
            kinds.add(last.kind)
            pieces.append(len(events))
        assert kinds == {EventKind.COMMENTARY, EventKind.SILENCE}
        assert max(pieces) > 4


def test_times_are_those_of_the_chunk() -> None:
    with make_engine() as engine:
        session = engine.open_session()
        session.push(make_frames(0), t0=12.0, t1=12.5)
        session.push(make_frames(1))
        events = [event for event in session if event.final]
        assert [(event.t0, event.t1) for event in events] == [(12.0, 12.5), (12.5, 13.5)]
        for event in events:
            assert event.timing is not None
            assert len(event.timing.itl) == len(event.tokens) - 1
            assert event.timing.total >= event.timing.ttft > 0
            assert event.lag >= event.timing.total
        stats = session.stats()
        assert stats.turns == 2
        assert stats.last_ttft == events[-1].timing.ttft if events[-1].timing else False


def test_a_question_is_answered_in_the_next_chunks_turn() -> None:
    with make_engine() as engine:
        session = engine.open_session()
        session.ask("How many?")
        session.ask("Which colour?")
        assert list(session) == []
        for turn in range(3):
            session.push(make_frames(turn))
        events = list(session)
        asked = [next(group) for _, group in groupby(events, key=lambda event: event.turn)]
        assert [event.question for event in asked] == ["How many?", "Which colour?", None]
        kinds = {(e.turn, e.kind) for e in events if e.kind is not EventKind.SILENCE}
        assert {kind for turn, kind in kinds if turn < 2} <= {EventKind.ANSWER}
        assert {kind for turn, kind in kinds if turn == 2} <= {EventKind.COMMENTARY}


def test_questions_left_after_the_video_get_turns_without_vision() -> None:
    protocol = make_protocol()
    theirs = TokenList(protocol, 3, 16, 8, 12)
    with make_engine() as engine:
        session = engine.open_session()
        session.push(make_frames(0))
        session.ask("How many?")
        session.ask("Which colour?")
        session.finish()
        events = list(session)
        theirs.begin_turn((0.0, 1.0), *fake_vision(make_frames(0)), "How many?")
        expected = [theirs.reply(6)]
        theirs.begin_turn((0.0, 1.0), None, None, "Which colour?")
        expected.append(theirs.reply(6))
        assert [list(tokens) for tokens in finals(events)] == expected
        assert (events[-1].question, events[-1].t0, events[-1].t1) == ("Which colour?", 0.0, 1.0)
        assert engine.stats().sessions == 0
        assert engine.stats().pages_used == 0


def test_a_query_can_stand_in_the_first_turn_and_leave_with_it() -> None:
    """As StreamingVLM has it: the query is evicted when its turn is."""
    protocol = make_protocol()
    theirs = TokenList(protocol, 2, 2, 8, 12)
    with make_engine() as engine:
        session = engine.open_session(
            SinkWindow(8, 12, 2.0, 2), "Commentate.", query_placement="first_turn"
        )
        for turn in range(6):
            frames = make_frames(turn)
            session.push(frames)
            question = "Commentate." if turn == 0 else None
            theirs.begin_turn((turn, turn + 1.0), *fake_vision(frames), question)
            assert [list(tokens) for tokens in finals(list(session))] == [theirs.reply(6)]
        assert protocol.question("Commentate.")[0] not in theirs.tokens


def dropped_chunk(number: int, dropped: int) -> Chunk:
    t0 = float(number)
    return Chunk(make_frames(number), t0, t0 + 1, (t0, t0 + 0.5), time.monotonic(), dropped)


def test_a_session_says_when_frames_begin_to_be_dropped() -> None:
    with make_engine() as engine:
        session = engine.open_session()
        degraded = []
        for number, dropped in enumerate([0, 3, 1, 0, 2]):
            session.push_chunk(dropped_chunk(number, dropped))
            degraded += [e for e in session if e.kind is EventKind.DEGRADED]
        assert [event.turn for event in degraded] == [1, 4]
        assert "3 frames between 1.0 s and 2.0 s" in degraded[0].text
        assert not degraded[0].final
        assert session.stats().dropped_frames == 6


def test_input_is_refused_with_one_sentence() -> None:
    with make_engine() as engine:
        session = engine.open_session()
        with pytest.raises(CapacityError, match=r"4 frames makes 48 patches, .* at most 24"):
            engine.open_session(max_patches=24).push(make_frames(0, height=56, width=84, count=4))
        with pytest.raises(VideoError, match="uint8 RGB"):
            session.push(make_frames(0).astype(np.float32))
        with pytest.raises(VideoError, match="uint8 RGB"):
            session.push(make_frames(0)[..., :2])
        with pytest.raises(VideoError, match="without frames"):
            session.push([])
        with pytest.raises(VideoError, match="differ in size"):
            session.push([make_frames(0)[0], make_frames(0, height=56)[0]])
        with pytest.raises(VideoError, match="no length"):
            session.push(make_frames(0), t0=2.0, t1=2.0)
        with pytest.raises(CapacityError, match=r"question has \d+ tokens, .* room for 512"):
            session.ask("Why? " * 400)
        session.push(make_frames(0))
        assert len(finals(list(session))) == 1


def test_questions_wait_for_room_in_the_context() -> None:
    """Questions of more tokens than the context has room for at once are refused, and taken again
    when earlier ones have left."""
    with make_engine() as engine:
        session = engine.open_session(SinkWindow(8, 12, 2.0, 2))
        long = "Why is that? " * 40
        session.ask(long)
        with pytest.raises(CapacityError, match="Earlier questions still take"):
            session.ask(long)
        session.push(make_frames(0))
        list(session)
        with pytest.raises(CapacityError, match="Earlier questions still take"):
            session.ask(long)
        for turn in range(1, 3):
            session.push(make_frames(turn))
        list(session)
        session.ask(long)


def test_settings_that_cannot_work_are_refused() -> None:
    with make_engine() as engine:
        with pytest.raises(CapacityError, match=r"query of \d+ tokens does not fit the context"):
            engine.open_session(query="Say it. " * 3000)
        with pytest.raises(CapacityError, match=r"pages of 16 .* larger max_context"):
            engine.open_session(SinkWindow(vision_seconds=900.0))
        with pytest.raises(OptionError, match="max_new_tokens=0"):
            engine.open_session(max_new_tokens=0)
        with pytest.raises(OptionError, match="max_patches=10000"):
            engine.open_session(max_patches=10_000)
        with pytest.raises(OptionError, match="max_pending_chunks=0"):
            engine.open_session(max_pending_chunks=0)
        with pytest.raises(OptionError, match=r"vision_seconds=3 with chunks of 4 s"):
            engine.open_session(SinkWindow(vision_seconds=3.0), chunk_seconds=4.0)
        assert engine.stats().pages_reserved == 0


def test_full_attention_ends_with_an_error_event_when_full() -> None:
    limits = LIMITS.model_copy(update={"max_context": 640})
    with make_engine(limits=limits) as engine:
        session = engine.open_session(FullAttention())
        other = engine.open_session(SinkWindow(4, 4, 2.0, 2))
        events: list[Event] = []
        turns = 0
        while not events or events[-1].kind is not EventKind.ERROR:
            session.push(make_frames(turns))
            events += session
            turns += 1
            assert turns < 30
        assert turns > 5
        assert events[-1].final
        assert "context is full" in events[-1].text
        with pytest.raises(SessionClosedError, match="context is full"):
            session.push(make_frames(0))
        other.push(make_frames(0))
        assert len(finals(list(other))) == 1
        engine.check_integrity()


def test_a_closed_session_takes_nothing_and_holds_nothing() -> None:
    with make_engine() as engine:
        session = engine.open_session()
        session.push(make_frames(0))
        first = next(iter(session))
        session.push(make_frames(1))
        session.close()
        session.close()
        assert engine.stats().pages_used == engine.stats().pages_reserved == 0
        assert all(event.turn == first.turn for event in session)
        with pytest.raises(SessionClosedError, match="was closed"):
            session.push(make_frames(0))
        with pytest.raises(SessionClosedError, match="was closed"):
            session.ask("Why?")


def test_a_finished_session_takes_nothing_more() -> None:
    with make_engine() as engine:
        session = engine.open_session()
        session.push(make_frames(0))
        session.finish()
        with pytest.raises(SessionClosedError, match="finished"):
            session.push(make_frames(0))
        with pytest.raises(SessionClosedError, match="finished"):
            session.ask("Why?")
        assert len(finals(list(session))) == 1
