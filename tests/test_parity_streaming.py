"""The streamed, paged, evicting path against the dense reference, token for token."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from reference.comparison import assert_same_turn
from reference.dense_policies import DenseFullAttention, DenseSinkWindow, DenseSlidingWindow
from reference.dense_streaming import TurnRecord
from reference.parity import assert_events_tell, assert_parity, dense_stream
from reference.scenario import Scenario, recording_engine
from transformers import Qwen2_5_VLForConditionalGeneration

from framesink.runtime.tokenizer import Tokenizer

CHUNKS = 60
# The graphs compute in float32; logits are of the order of 20.
FLOAT32_TOLERANCE = 3e-4
FLOAT16_TOLERANCE = 0.15
QUERY = "Commentate on this video."
QUESTIONS = {5: "How many red circles are there?", 23: "Which colour?", 24: "And now?"}
SIZES = {0: (56, 84), 7: (84, 56), 8: (112, 112), 30: (56, 56), 41: (56, 84)}

BundleWithPages = Callable[..., Path]


@pytest.mark.parametrize(
    ("vision_turns", "reply_turns", "sink_text", "recent_text", "page_size"),
    [
        (4, 4, 12, 16, 4),
        (4, 4, 12, 16, 16),
        (2, 6, 12, 16, 4),
        (3, 9, 5, 40, 16),
        (8, 3, 12, 16, 4),
        (8, 3, 7, 9, 16),
        (5, 2, 0, 21, 4),
        (1, 2, 30, 0, 16),
        (16, 16, 512, 512, 16),
    ],
)
def test_sink_window(
    tiny_bundle_with_pages: BundleWithPages,
    tiny_model: Qwen2_5_VLForConditionalGeneration,
    vision_turns: int,
    reply_turns: int,
    sink_text: int,
    recent_text: int,
    page_size: int,
) -> None:
    """Replies move to the previous text, vision leaves, the middle of the previous text is cut."""
    records = assert_parity(
        tiny_bundle_with_pages(page_size),
        tiny_model,
        Scenario(DenseSinkWindow(vision_turns, reply_turns, sink_text, recent_text), query=QUERY),
        chunks=CHUNKS,
        tolerance=FLOAT32_TOLERANCE,
    )
    assert_varied(records)


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("token_budget", [1, 7, 16])
def test_chunked_prefill(
    tiny_bundle_with_pages: BundleWithPages,
    tiny_model: Qwen2_5_VLForConditionalGeneration,
    page_size: int,
    token_budget: int,
) -> None:
    """A prompt prefilled in small parts, cut inside vision blocks too."""
    assert_parity(
        tiny_bundle_with_pages(page_size),
        tiny_model,
        Scenario(DenseSinkWindow(3, 5, 12, 16), query=QUERY, questions=QUESTIONS, sizes=SIZES),
        chunks=25,
        tolerance=FLOAT32_TOLERANCE,
        token_budget=token_budget,
    )


@pytest.mark.parametrize(("vision_turns", "reply_turns"), [(4, 4), (3, 7), (7, 3)])
@pytest.mark.parametrize("placement", ["pinned", "first_turn"])
def test_questions_and_changes_of_resolution(
    tiny_bundle_with_pages: BundleWithPages,
    tiny_model: Qwen2_5_VLForConditionalGeneration,
    vision_turns: int,
    reply_turns: int,
    placement: str,
) -> None:
    scenario = Scenario(
        DenseSinkWindow(vision_turns, reply_turns, 12, 16),
        query=QUERY,
        query_placement=placement,
        questions=QUESTIONS,
        sizes=SIZES,
    )
    records = assert_parity(
        tiny_bundle_with_pages(4), tiny_model, scenario, chunks=CHUNKS, tolerance=FLOAT32_TOLERANCE
    )
    assert_varied(records)


def test_without_a_query(
    tiny_bundle_with_pages: BundleWithPages, tiny_model: Qwen2_5_VLForConditionalGeneration
) -> None:
    assert_parity(
        tiny_bundle_with_pages(16),
        tiny_model,
        Scenario(DenseSinkWindow(3, 4, 12, 16), max_new_tokens=3),
        chunks=CHUNKS,
        tolerance=FLOAT32_TOLERANCE,
    )


def test_a_repetition_penalty_counts_the_whole_retained_context(
    tiny_bundle_with_pages: BundleWithPages, tiny_model: Qwen2_5_VLForConditionalGeneration
) -> None:
    penalised, plain = (
        assert_parity(
            tiny_bundle_with_pages(16),
            tiny_model,
            Scenario(DenseSinkWindow(3, 4, 12, 16), query=QUERY, repetition_penalty=penalty),
            chunks=30,
            tolerance=FLOAT32_TOLERANCE,
        )
        for penalty in (1.3, 1.0)
    )
    assert [record.tokens for record in penalised] != [record.tokens for record in plain]


@pytest.mark.parametrize("page_size", [4, 16])
def test_sliding_window(
    tiny_bundle_with_pages: BundleWithPages,
    tiny_model: Qwen2_5_VLForConditionalGeneration,
    page_size: int,
) -> None:
    assert_parity(
        tiny_bundle_with_pages(page_size),
        tiny_model,
        Scenario(DenseSlidingWindow(4), query=QUERY, questions=QUESTIONS, sizes=SIZES),
        chunks=CHUNKS,
        tolerance=FLOAT32_TOLERANCE,
    )


def test_full_attention(
    tiny_bundle_with_pages: BundleWithPages, tiny_model: Qwen2_5_VLForConditionalGeneration
) -> None:
    assert_parity(
        tiny_bundle_with_pages(16),
        tiny_model,
        Scenario(DenseFullAttention(), query=QUERY, questions=QUESTIONS, sizes=SIZES),
        chunks=40,
        tolerance=FLOAT32_TOLERANCE,
    )


def test_a_closing_that_turns_out_to_be_words(
    tiny_bundle_with_pages: BundleWithPages,
    tiny_model: Qwen2_5_VLForConditionalGeneration,
) -> None:
    """` ...` in the middle of a reply is held back, written, taken back and written again."""
    scenario = Scenario(
        DenseSinkWindow(3, 4, 12, 16), query=QUERY, never=("<|im_end|>", "<|endoftext|>")
    )
    for page_size in (4, 16):
        records = assert_parity(
            tiny_bundle_with_pages(page_size),
            tiny_model,
            scenario,
            chunks=CHUNKS,
            tolerance=FLOAT32_TOLERANCE,
        )
    (closing,) = Tokenizer.from_directory(tiny_bundle_with_pages(4)).encode(" ...")
    assert sum(closing in record.tokens[:-1] for record in records) > 5
    assert any(record.tokens[-1] == closing for record in records)


@pytest.mark.parametrize("chunk_seconds", [0.5, 2.0])
def test_chunks_of_other_lengths_and_frame_rates(
    tiny_bundle_with_pages: BundleWithPages,
    tiny_model: Qwen2_5_VLForConditionalGeneration,
    chunk_seconds: float,
) -> None:
    """Vision blocks of several temporal steps, the odd frame completed, windows in seconds."""
    assert_parity(
        tiny_bundle_with_pages(4),
        tiny_model,
        Scenario(
            DenseSinkWindow(4, 6, 12, 16),
            query=QUERY,
            frame_counts={0: 4, 9: 3, 15: 2, 20: 1, 25: 4},
            chunk_seconds=chunk_seconds,
        ),
        chunks=40,
        tolerance=FLOAT32_TOLERANCE,
    )


def test_questions_after_the_video(
    tiny_bundle: Path, tiny_model: Qwen2_5_VLForConditionalGeneration
) -> None:
    """Once no chunk can come, a question is a turn without vision; the policy goes on as before."""
    scenario = Scenario(DenseSinkWindow(3, 2, 12, 16), query=QUERY)
    stream = dense_stream(scenario, tiny_model, Tokenizer.from_directory(tiny_bundle))
    with recording_engine(tiny_bundle) as (engine, recorder):
        session = scenario.open_session(engine)
        for number in range(6):
            session.push_chunk(scenario.chunk(number))
            said = list(session)[-1].tokens
            assert (
                list(said) == stream.chunk(scenario.frames(number), *scenario.times(number)).tokens
            )
        recorder.take()
        questions = ["How many?", "Which colour?"]
        for question in questions:
            session.ask(question)
        session.finish()
        events = list(session)
        steps = iter(recorder.take())
        for question in questions:
            record = stream.chunk(None, *scenario.times(5), question=question)
            assert_same_turn(
                stream,
                record,
                list(islice(steps, len(record.tokens))),
                tolerance=FLOAT32_TOLERANCE,
            )
            of_turn = [event for event in events if event.turn == record.turn]
            assert_events_tell(stream, record, of_turn, question)
        assert next(steps, None) is None
        assert engine.stats().pages_used == 0


def test_float16(
    tiny_bundle_with_pages: BundleWithPages, tiny_model: Qwen2_5_VLForConditionalGeneration
) -> None:
    """Graphs and pages in float16: logits within its tolerance, the same greedy token unless two
    are closer than that."""
    records = assert_parity(
        tiny_bundle_with_pages(16, "float16"),
        tiny_model,
        Scenario(DenseSinkWindow(3, 5, 12, 16), query=QUERY, questions=QUESTIONS, sizes=SIZES),
        chunks=CHUNKS,
        tolerance=FLOAT16_TOLERANCE,
        follow=True,
    )
    behind = [
        logits.max() - logits[token]
        for record in records
        for token, logits in zip(record.tokens, record.logits, strict=True)
    ]
    assert max(behind) < 2 * FLOAT16_TOLERANCE
    assert np.mean(np.array(behind) == 0.0) > 0.97


def assert_varied(records: list[TurnRecord]) -> None:
    """Replies of all kinds were compared: cut short, ended, silent, and different ones."""
    assert len({len(record.tokens) for record in records}) > 2
    assert len({tuple(record.tokens) for record in records}) >= len(records) // 3
