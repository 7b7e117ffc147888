"""Driving the engine and the dense reference through the same video."""

from collections.abc import Sequence
from pathlib import Path

from transformers import Qwen2_5_VLForConditionalGeneration

from framesink.runtime.events import Event, EventKind
from framesink.runtime.tokenizer import Tokenizer
from reference.comparison import assert_same_turn
from reference.dense_streaming import DenseStream, TurnRecord
from reference.scenario import NUM_PAGES, Scenario, recording_engine


def dense_stream(
    scenario: Scenario, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer
) -> DenseStream:
    """The reference of a scenario."""
    return DenseStream(
        model,
        tokenizer,
        scenario.policy,
        query=scenario.query,
        query_placement=scenario.query_placement,
        max_new_tokens=scenario.max_new_tokens,
        repetition_penalty=scenario.repetition_penalty,
        never=[tokenizer.special(name) for name in scenario.never],
    )


def assert_parity(
    bundle: Path,
    model: Qwen2_5_VLForConditionalGeneration,
    scenario: Scenario,
    *,
    chunks: int,
    tolerance: float,
    num_pages: int = NUM_PAGES,
    token_budget: int | None = None,
    follow: bool = False,
) -> list[TurnRecord]:
    """Stream the scenario through both and compare every turn.

    Retained tokens, positions, logits within `tolerance`, greedy tokens and final events must
    agree. With `follow` the reference says what the engine said, so that a near tie does not part
    them. Returns the reference's records, for a test to say that what it is about did happen.
    """
    stream = dense_stream(scenario, model, Tokenizer.from_directory(bundle))
    records = []
    with recording_engine(
        bundle, num_pages=num_pages, token_budget=token_budget, never=scenario.never
    ) as (engine, recorder):
        session = scenario.open_session(engine)
        for number in range(chunks):
            question = scenario.questions.get(number)
            if question is not None:
                session.ask(question)
            session.push_chunk(scenario.chunk(number))
            events = list(session)
            times = scenario.times(number)
            said = events[-1].tokens if follow else None
            record = stream.chunk(scenario.frames(number), *times, question=question, said=said)
            assert_same_turn(stream, record, recorder.take(), tolerance=tolerance)
            assert_events_tell(stream, record, events, question)
            assert (events[-1].t0, events[-1].t1) == times
            records.append(record)
    return records


def assert_events_tell(
    stream: DenseStream, record: TurnRecord, events: Sequence[Event], question: str | None
) -> None:
    """Raise AssertionError unless the events of one turn say what the reference said."""
    words = stream.words(record.tokens)
    text = stream.tokenizer.decode(words)
    final = events[-1]
    assert [event.final for event in events] == [False] * (len(events) - 1) + [True]
    assert {event.turn for event in events} == {record.turn}
    assert "".join(event.text for event in events) == text
    stops = (stream.im_end, stream.end_of_text)
    assert [token for token in final.tokens if token not in stops] == [
        token for token in record.tokens if token not in stops
    ]
    expected = EventKind.ANSWER if question is not None else EventKind.COMMENTARY
    assert final.kind is (expected if words else EventKind.SILENCE)
