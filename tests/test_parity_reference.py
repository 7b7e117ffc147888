"""The dense streaming reference itself, against transformers and against a closed form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.dense_policies import DenseFullAttention, DenseSinkWindow, DenseSlidingWindow
from reference.dense_streaming import DenseStream, TurnRecord, patchify
from reference.frames import moving_frames
from reference.positions import mrope_positions
from transformers import Qwen2_5_VLForConditionalGeneration

from framesink.runtime.tokenizer import Tokenizer

# transformers computes norms and softmax in float32 whatever the weights are.
FLOAT32_INSIDE = 2e-5
SIZES = [(56, 84), (56, 84), (84, 56), (112, 112), (56, 56)]


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_directory(tiny_checkpoint)


def _frames(chunk: int) -> np.ndarray:
    height, width = SIZES[chunk % len(SIZES)]
    return moving_frames(chunk, height=height, width=width)


def test_streaming_without_eviction_is_one_forward_of_transformers(
    tiny_model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    stream = DenseStream(
        tiny_model, tokenizer, DenseFullAttention(), query="What happens?", max_new_tokens=6
    )
    records = [
        stream.chunk(_frames(i), i, i + 1.0, question="How many?" if i == 2 else None)
        for i in range(5)
    ]
    encoded = [patchify(_frames(i), merge=2) for i in range(5)]
    ids = torch.tensor([stream.ids])
    with torch.no_grad():
        output = tiny_model(
            input_ids=ids,
            pixel_values_videos=torch.cat([patches for patches, _ in encoded]),
            video_grid_thw=torch.tensor([grid for _, grid in encoded]),
            second_per_grid_ts=torch.full((5,), 1.0),
            mm_token_type_ids=2 * (ids == tiny_model.config.video_token_id).int(),
        )
    for record in records:
        for index, logits in enumerate(record.logits):
            whole = output.logits[0, len(record.prompt) - 1 + index].numpy()
            np.testing.assert_allclose(logits, whole, atol=FLOAT32_INSIDE)


def test_the_first_reply_is_what_generate_says(
    tiny_model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    stream = DenseStream(tiny_model, tokenizer, DenseFullAttention(), max_new_tokens=8)
    record = stream.chunk(_frames(0), 0.0, 1.0)
    patches, grid = patchify(_frames(0), merge=2)
    ids = torch.tensor([record.prompt])
    generated = tiny_model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([grid]),
        second_per_grid_ts=torch.tensor([1.0]),
        mm_token_type_ids=2 * (ids == tiny_model.config.video_token_id).int(),
        max_new_tokens=8,
        do_sample=False,
    )
    assert generated[0, len(record.prompt) :].tolist() == record.tokens


@given(
    blocks=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)),
        min_size=1,
        max_size=5,
    ),
    tail=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_positions_are_those_of_transformers(
    tiny_model: Qwen2_5_VLForConditionalGeneration,
    blocks: list[tuple[int, int, int, int]],
    tail: int,
) -> None:
    """As long as no grid is longer in time than in space: there transformers 5 lets the next text
    overlap the block, where StreamingVLM and earlier transformers go on after its largest place."""
    pad = tiny_model.config.video_token_id
    ids: list[int] = []
    grids = []
    for text, steps, height, width in blocks:
        steps = min(steps, 1 + (max(height, width) - 1) // 2)
        ids += [1] * text + [pad] * (steps * height * width)
        grids.append((steps, 2 * height, 2 * width))
    ids += [1] * tail
    tokens = torch.tensor([ids])
    expected, _ = tiny_model.model.get_rope_index(
        tokens,
        mm_token_type_ids=2 * (tokens == pad).int(),
        video_grid_thw=torch.tensor(grids),
        second_per_grid_ts=[1.0] * len(grids),
    )
    found = mrope_positions(ids, grids, video_pad=pad, merge_size=2, time_steps=[2.0] * len(grids))
    assert torch.tensor(found).T.tolist() == expected[:, 0].tolist()


def test_text_after_a_long_block_goes_on_after_its_largest_position() -> None:
    ids = [1, 9, 9, 9, 1]
    found = mrope_positions(ids, [(3, 2, 2)], video_pad=9, merge_size=2, time_steps=[2.0])
    assert found == [(0, 0, 0), (1, 1, 1), (3, 1, 1), (5, 1, 1), (6, 6, 6)]


def _closed_form(
    stream: DenseStream,
    records: list[TurnRecord],
    turn: int,
    *,
    vision: int,
    replies: int,
    sink: int,
    recent: int,
    extras: dict[int, str],
    pinned: str | None,
) -> list[int]:
    """The prompt of `turn`, written down at once from all replies, not edited turn by turn."""
    encode = stream.tokenizer.encode
    close = [stream.im_end, *encode("\n")]

    def opening(role: str) -> list[int]:
        return [stream.im_start, *encode(f"{role}\n")]

    ids = [*opening("system"), *encode("You are a helpful assistant."), *close]
    if pinned is not None:
        ids += [*opening("user"), *encode(pinned), *close]
    left = max(0, turn - replies + 1)
    moved = [token for record in records[:left] for token in stream.words(record.tokens)]
    if len(moved) > sink + recent:
        moved = moved[:sink] + moved[len(moved) - recent :]
    ids += [*opening("previous text"), *moved, *close]
    for number in range(max(0, turn - max(vision, replies) + 1), turn + 1):
        ids += opening("user")
        if number >= left:
            ids += encode(f"Time={number:.1f}-{number + 1:.1f}s")
        if number > turn - vision:
            height, width = SIZES[number % len(SIZES)]
            pads = [stream.video_pad] * (height * width // 28**2)
            ids += [stream.vision_start, *pads, stream.vision_end]
        ids += [*encode(extras.get(number, "")), *close]
        if number >= left:
            ids += opening("assistant")
            if number < turn:
                words = records[number].tokens
                ids += [token for token in words if token not in close[:1]] + close
    return ids


@pytest.mark.parametrize(
    ("vision", "replies", "sink", "recent", "placement"),
    [
        (4, 4, 5, 9, "pinned"),
        (2, 5, 12, 16, "first_turn"),
        (6, 3, 4, 4, "pinned"),
        (6, 2, 512, 512, "first_turn"),
        (1, 3, 0, 7, "pinned"),
        (3, 2, 7, 0, "first_turn"),
    ],
)
def test_what_is_retained_is_the_closed_form(
    tiny_model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Tokenizer,
    vision: int,
    replies: int,
    sink: int,
    recent: int,
    placement: str,
) -> None:
    query = "Commentate on this video."
    stream = DenseStream(
        tiny_model,
        tokenizer,
        DenseSinkWindow(vision, replies, sink, recent),
        query=query,
        query_placement=placement,
        max_new_tokens=5,
    )
    extras = {4: "How many?", 9: "Which colour?"}
    first = {0: query} if placement == "first_turn" else {}
    records: list[TurnRecord] = []
    for turn in range(14):
        record = stream.chunk(_frames(turn), turn, turn + 1.0, question=extras.get(turn))
        assert record.prompt == _closed_form(
            stream,
            records,
            turn,
            vision=vision,
            replies=replies,
            sink=sink,
            recent=recent,
            extras=extras | first,
            pinned=query if placement == "pinned" else None,
        )
        assert stream.dense.rows <= len(stream.ids)
        records.append(record)
    assert any(record.tokens[-1] == stream.im_end for record in records)
    assert any(record.tokens[-1] != stream.im_end for record in records)


def test_a_sliding_window_keeps_whole_turns_and_no_older_text(
    tiny_model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    stream = DenseStream(tiny_model, tokenizer, DenseSlidingWindow(3), max_new_tokens=4)
    for turn in range(7):
        stream.chunk(_frames(turn), turn, turn + 1.0)
        assert stream.ids.count(stream.vision_start) == min(turn + 1, 3)
        assert len(stream._blocks("assistant")) == min(turn + 1, 3)
        start, end = stream._previous_text()
        assert start == end


def test_replies_depend_on_what_is_seen(
    tiny_model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    """Else the parity tests would compare constants."""
    said = []
    for seed in range(2):
        stream = DenseStream(tiny_model, tokenizer, DenseFullAttention(), max_new_tokens=6)
        said.append(
            [stream.chunk(moving_frames(i, seed=seed), i, i + 1.0).tokens for i in range(4)]
        )
    assert said[0] != said[1]
    assert len({tuple(reply) for reply in said[0]}) > 2
