"""Positions of span lists against transformers and against a recount from nothing."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.positions import mrope_positions

from framesink.runtime.arrays import Int32Array
from framesink.runtime.kv.positions import span_bases, text_span, vision_span
from framesink.runtime.kv.span import Span, SpanKind, SpanPart
from framesink.runtime.preprocess import Grid

START, END, PAD, WORD = 1, 2, 3, 4
MERGE = 2


@dataclass(frozen=True)
class Piece:
    """Text of `length` tokens cut to `[start, length)`, or the vision block of `grid`."""

    length: int = 0
    start: int = 0
    grid: Grid | None = None


texts = st.tuples(st.integers(1, 9), st.integers(0, 8)).map(
    lambda drawn: Piece(drawn[0], min(drawn[1], drawn[0] - 1))
)
grids = st.builds(Grid, st.integers(1, 4), st.integers(1, 5).map(lambda n: n * MERGE), st.just(6))
pieces = st.lists(texts | grids.map(lambda grid: Piece(grid=grid)), min_size=1, max_size=12)


def make_spans(chosen: list[Piece], time_step: float) -> list[Span]:
    spans = []
    for piece in chosen:
        if piece.grid is None:
            whole = text_span(SpanKind.REPLY, SpanPart.BODY, 0, [WORD] * piece.length)
            spans.append(whole.cut(piece.start, piece.length))
        else:
            tokens = [START, *[PAD] * piece.grid.tokens(MERGE), END]
            spans.append(vision_span(0, tokens, piece.grid, merge_size=MERGE, time_step=time_step))
    return spans


def positions_of(spans: list[Span]) -> Int32Array:
    bases, _ = span_bases(spans)
    return np.concatenate(
        [span.places + base for span, base in zip(spans, bases, strict=True)], axis=1
    )


@cache
def transformers_model() -> Any:
    """An object that carries what transformers' `get_rope_index` reads."""
    from types import SimpleNamespace

    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    vision = SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=2)
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    object.__setattr__(model, "config", SimpleNamespace(vision_config=vision))
    return model


@given(chosen=pieces, seconds_per_step=st.sampled_from([0.25, 0.4, 1.0, 1.3]))
@settings(max_examples=150, deadline=None)
def test_positions_equal_those_of_transformers(
    chosen: list[Piece], seconds_per_step: float
) -> None:
    """Where a grid's time does not outgrow its height and width: there transformers 5 lets the
    text after it begin at their extent, StreamingVLM and Qwen2-VL at the largest position + 1."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    pytest.importorskip("transformers", reason="the reference needs transformers")
    step = seconds_per_step * 2
    blocks = [piece.grid for piece in chosen if piece.grid is not None]
    assume(all(int((grid.t - 1) * step) < max(grid.h, grid.w) // MERGE for grid in blocks))
    assume(blocks)
    spans = make_spans(chosen, step)
    tokens = torch.tensor([[int(token) for span in spans for token in span.tokens]])
    expected, _ = transformers_model().get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == PAD).int() * 2,
        video_grid_thw=torch.tensor([(grid.t, grid.h, grid.w) for grid in blocks]),
        second_per_grid_ts=[seconds_per_step] * len(blocks),
    )
    assert np.array_equal(positions_of(spans), expected[:, 0].numpy())


@given(chosen=pieces, time_step=st.sampled_from([0.5, 1.0, 2.0, 7.5, 25.0]))
@settings(max_examples=150, deadline=None)
def test_positions_equal_a_recount_of_the_token_list(chosen: list[Piece], time_step: float) -> None:
    """Also where time outgrows height and width."""
    spans = make_spans(chosen, time_step)
    tokens = [int(token) for span in spans for token in span.tokens]
    blocks = [(p.grid.t, p.grid.h, p.grid.w) for p in chosen if p.grid is not None]
    expected = mrope_positions(
        tokens, blocks, video_pad=PAD, merge_size=MERGE, time_steps=[time_step] * len(blocks)
    )
    assert positions_of(spans).T.tolist() == [list(position) for position in expected]
    _, following = span_bases(spans)
    assert following == max(max(position) for position in expected) + 1


def test_a_wide_block_advances_by_its_width() -> None:
    """560×1008 pixels: 720 tokens, but 36 positions (and the two marks)."""
    grid = Grid(1, 40, 72)
    span = vision_span(0, [START, *[PAD] * 720, END], grid, merge_size=2, time_step=2.0)
    assert len(span) == 722
    assert span.advance == 36 + 2


def test_cutting_keeps_places_and_slots() -> None:
    span = text_span(SpanKind.REPLY, SpanPart.BODY, 3, [10, 11, 12, 13, 14])
    span = span.with_slots(np.array([5, 6, 7, 40], dtype=np.int32))
    tail = span.cut(2, 5)
    assert tail.tokens.tolist() == [12, 13, 14]
    assert tail.places.tolist() == [[2, 3, 4]] * 3
    assert tail.slots.tolist() == [7, 40]
    assert (tail.unwritten, tail.start_place, tail.advance) == (1, 2, 3)
    assert span.cut(0, 2).advance == 2
    with pytest.raises(ValueError, match="cannot cut"):
        span.cut(2, 2)


def test_vision_spans_are_not_divided() -> None:
    span = vision_span(0, [START, PAD, END], Grid(1, 2, 2), merge_size=2, time_step=2.0)
    with pytest.raises(ValueError, match="lives and dies whole"):
        span.cut(0, 1)
    with pytest.raises(ValueError, match="cannot hold 4 tokens"):
        vision_span(0, [START, PAD, PAD, END], Grid(1, 2, 2), merge_size=2, time_step=2.0)
