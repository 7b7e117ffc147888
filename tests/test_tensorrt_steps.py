"""A step as TensorRT plans take it: shapes within a profile, tables, masks, rows."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framesink.build.plans.profiles import language_model_profiles, pages_per_stream
from framesink.runtime.arrays import Int32Array
from framesink.runtime.executors.base import ContextView, SequenceInput
from framesink.runtime.executors.batching import group_by_size, pad_group
from framesink.runtime.executors.tensorrt.shapes import (
    PAGE_STEPS,
    choose_profile,
    filled_batch,
    filled_pages,
)
from framesink.runtime.manifest import Limits, TensorSpec
from framesink.runtime.models.config import TextConfig
from framesink.runtime.rope import MRopeTable

torch = pytest.importorskip("torch", reason="the executor keeps its memory in torch")

from framesink.runtime.executors.tensorrt.page_rows import row_places, write_rows  # noqa: E402
from framesink.runtime.executors.tensorrt.step_inputs import StepInputs  # noqa: E402

PAGE = 16
TEXT = TextConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(2, 3, 3),
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
INPUTS = (
    TensorSpec(name="inputs_embeds", dtype="float16", shape=("batch", "new", 16)),
    TensorSpec(name="cos_ctx", dtype="float16", shape=("batch", "context", 8)),
    TensorSpec(name="mask", dtype="float16", shape=("batch", 1, "new", "keys")),
    TensorSpec(name="block_table", dtype="int32", shape=("batch", "pages")),
    TensorSpec(name="last", dtype="int32", shape=("batch",)),
    TensorSpec(name="k_pages.0", dtype="float16", shape=("pool", 2, PAGE, 8)),
)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Limits, list[SequenceInput]]:
    """Limits, and a step of sequences within them."""
    context = draw(st.integers(PAGE, 2000))
    limits = Limits(
        max_streams=draw(st.integers(1, 20)),
        max_context=context,
        max_prefill=draw(st.integers(1, context)),
        max_patches=4,
    )
    most = pages_per_stream(limits, PAGE)
    sizes = draw(
        st.lists(
            st.tuples(
                st.one_of(st.just(1), st.integers(1, limits.max_prefill)), st.integers(1, most)
            ),
            min_size=1,
            max_size=limits.max_streams,
        )
    )
    return limits, [sequence(new, pages) for new, pages in sizes]


def sequence(new: int, pages: int) -> SequenceInput:
    rows = np.arange(new, dtype=np.int32)
    return SequenceInput(
        token_ids=rows,
        vision_embeddings=None,
        positions=np.tile(rows, (3, 1)),
        slots=rows,
        context=ContextView(
            block_table=np.zeros(pages, np.int32),
            positions=np.zeros((3, pages * PAGE), np.int32),
            valid=np.zeros(pages * PAGE, np.bool_),
        ),
        needs_logits=True,
    )


@settings(max_examples=150, deadline=None)
@given(steps())
def test_every_group_within_the_limits_has_its_profile(
    step: tuple[Limits, list[SequenceInput]],
) -> None:
    limits, batch = step
    profiles = language_model_profiles(INPUTS, limits, PAGE)
    largest = pages_per_stream(limits, PAGE)
    for members in group_by_size(batch, PAGE):
        pages = filled_pages(max(len(batch[m].context.block_table) for m in members), largest)
        group = pad_group(batch, members, PAGE, pages=pages)
        decodes = group.new_positions.shape[2] == 1
        count = filled_batch(len(members), limits.max_streams) if decodes else len(members)
        new = group.new_positions.shape[2]
        assert group.visible.shape == (len(members), pages * PAGE)
        shapes = {
            "inputs_embeds": (count, new, 16),
            "cos_ctx": (count, pages * PAGE, 8),
            "mask": (count, 1, new, pages * PAGE + new),
            "block_table": (count, pages),
            "last": (count,),
            "k_pages.0": (limits.max_streams * largest + 1, 2, PAGE, 8),
        }
        number = choose_profile(profiles, shapes)
        assert number is not None
        # With prompts of one token at most both profiles are one.
        if limits.max_prefill > 1:
            assert profiles[number].name == ("decode" if decodes else "prefill")
        for name, axis in [("block_table", 1), ("last", 0), ("k_pages.0", 0)]:
            beyond = list(shapes[name])
            beyond[axis] = profiles[number].inputs[name].maximum[axis] + 1
            assert choose_profile(profiles, {**shapes, name: tuple(beyond)}) is None


def test_more_new_tokens_than_a_prompt_part_may_have_fit_nowhere() -> None:
    limits = Limits(max_streams=2, max_context=64, max_prefill=8, max_patches=4)
    profiles = language_model_profiles(INPUTS, limits, PAGE)
    assert choose_profile(profiles, {"inputs_embeds": (1, 8, 16)}) == 0
    assert choose_profile(profiles, {"inputs_embeds": (1, 9, 16)}) is None
    assert choose_profile(profiles, {"inputs_embeds": (2, 1, 16)}) == 1
    assert choose_profile(profiles, {"inputs_embeds": (2, 1)}) is None
    assert choose_profile(profiles, {"another": (1,)}) is None


@given(st.integers(1, 3000), st.data())
def test_filling_up_makes_few_shapes(largest: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, largest))
    assert (
        size <= filled_pages(size, largest) <= min(largest, size + math.ceil(largest / PAGE_STEPS))
    )
    assert size <= filled_batch(size, largest) <= min(largest, max(2 * size, 1), size + 7)
    assert len({filled_pages(n, largest) for n in range(1, largest + 1)}) <= PAGE_STEPS
    beyond = largest + size
    assert filled_pages(beyond, largest) == filled_batch(beyond, largest) == beyond


# What is made on the device.


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tables_and_masks_are_those_of_the_host(dtype: str) -> None:
    random = np.random.default_rng(5)

    def random_sequence(new: int, pages: int) -> SequenceInput:
        plain = sequence(new, pages)
        reach = 9000  # more positions than the tables begin with
        positions = random.integers(0, reach, plain.context.positions.shape).astype(np.int32)
        return SequenceInput(
            token_ids=plain.token_ids,
            vision_embeddings=None,
            positions=random.integers(0, reach, (3, new)).astype(np.int32),
            slots=plain.slots,
            context=ContextView(
                block_table=random.integers(0, 9, pages).astype(np.int32),
                positions=positions,
                valid=random.random(pages * PAGE) < 0.7,
            ),
            needs_logits=True,
        )

    batch = [random_sequence(5, 2), random_sequence(4, 3)]
    group = pad_group(batch, (0, 1), PAGE, pages=4)
    found = StepInputs(TEXT, getattr(torch, dtype), torch.device("cpu")).make(group)
    table = MRopeTable(TEXT, dtype)
    expected = {
        "mask": group.mask(dtype),
        "block_table": group.block_table,
        "last": group.last,
        **dict(zip(("cos_new", "sin_new"), table.lookup(group.new_positions), strict=True)),
        **dict(zip(("cos_ctx", "sin_ctx"), table.lookup(group.context_positions), strict=True)),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].is_contiguous()
        np.testing.assert_array_equal(found[name].numpy(), values, err_msg=name)


def test_rows_go_to_their_slots_as_bytes() -> None:
    """FP8 codes of two sequences, one of them padded, into pages typed int8."""
    random = np.random.default_rng(1)
    slots: list[Int32Array] = [np.array([50, 17, 90], np.int32), np.array([33], np.int32)]
    batch = [sequence(3, 1), sequence(1, 1)]
    group = pad_group(
        [
            SequenceInput(one.token_ids, None, one.positions, where, one.context, needs_logits=True)
            for one, where in zip(batch, slots, strict=True)
        ],
        (0, 1),
        PAGE,
    )
    codes = random.standard_normal((2, 2, 3, 8)).astype(ml_dtypes.float8_e4m3fn)
    before = random.integers(-128, 128, (6, 2, PAGE, 8)).astype(np.int8)
    pool = torch.from_numpy(before.copy())
    rows = torch.from_numpy(codes.view(np.int8).copy())
    write_rows({"k_pages.3": pool}, {"k_new.3": rows}, row_places(group, PAGE))
    expected = before.copy()
    for number, where in enumerate(slots):
        for token, slot in enumerate(where):
            expected[slot // PAGE, :, slot % PAGE] = codes[number, :, token].view(np.int8)
    np.testing.assert_array_equal(pool.numpy(), expected)
