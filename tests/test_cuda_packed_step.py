"""The integers of steps with prompt parts, against the sequences they were made of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the integers are copied by torch")

# First of all: it says how kernels are run here.
from reference import triton_device  # noqa: E402, F401

from framesink.runtime.arrays import Int32Array  # noqa: E402
from framesink.runtime.errors import CapacityError  # noqa: E402
from framesink.runtime.executors.base import ContextView, SequenceInput  # noqa: E402
from framesink.runtime.executors.cuda.decode import NO_SLOT  # noqa: E402
from framesink.runtime.executors.cuda.packed_step import (  # noqa: E402
    PackedStep,
    StepShapes,
)
from framesink.runtime.executors.cuda.staging import Staging  # noqa: E402

CPU = torch.device("cpu")
PAGE = 4
CONTEXT = 40
PADDING_ROW = 77


def sequence(random: np.random.Generator, tokens: int, *, wanted: bool) -> SequenceInput:
    """Random tokens after a context of random rows of random pages."""
    pages = int(random.integers(1, CONTEXT // PAGE))

    def integers(*shape: int) -> Int32Array:
        return random.integers(1, 1000, shape).astype(np.int32)

    context = ContextView(
        integers(pages),
        integers(3, pages * PAGE),
        random.random(pages * PAGE) < 0.6,
        integers(pages * PAGE),
        (0, 0),
    )
    return SequenceInput(
        token_ids=integers(tokens),
        vision_embeddings=None,
        positions=integers(3, tokens),
        slots=integers(tokens),
        context=context,
        needs_logits=wanted,
        bases=integers(tokens),
    )


@given(
    decoding=st.integers(0, 9),
    parts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_step_is_what_its_sequences_are(decoding: int, parts: list[int], seed: int) -> None:
    """In a block that held another step before; what fills the shape up belongs to nobody."""
    random = np.random.default_rng(seed)
    shapes = StepShapes(sequences=16, tokens=400)
    staging = Staging(16 * 2 * CONTEXT + 8 * shapes.most_tokens, CPU)
    decodes = [sequence(random, 1, wanted=True) for _ in range(decoding)]
    prompts = [sequence(random, length, wanted=bool(random.integers(2))) for length in parts]
    shape = shapes.smallest(decodes, prompts)
    assert shape in list(shapes)
    contexts = list(range(decoding + sum(given.needs_logits for given in prompts)))
    packed = PackedStep(shape, staging, answers=16, context=CONTEXT)
    room = (shape.tokens - shape.decoding) // shape.parts
    others = [sequence(random, room, wanted=True) for _ in range(shape.parts)]
    packed.clear(PADDING_ROW)
    packed.fill([], others, [5] * len(others), PAGE)
    staging.send(packed.integers)
    packed.clear(PADDING_ROW)
    packed.fill(decodes, prompts, contexts, PAGE)
    staging.send(packed.integers)

    starts = packed.starts.tolist()
    for index, single in enumerate(decodes):
        assert packed.rows.slots[index] == single.slots[0]
        assert packed.rows.positions[:, index].tolist() == single.positions[:, 0].tolist()
        assert packed.rows.bases[index] == single.bases[0]
        assert packed.last[index] == index
    asked = decoding
    for index, prompt in enumerate(prompts):
        begin, end = starts[index], starts[index + 1]
        assert packed.tokens[begin:end].tolist() == prompt.token_ids.tolist()
        place = slice(shape.decoding + begin, shape.decoding + end)
        assert packed.rows.slots[place].tolist() == prompt.slots.tolist()
        assert packed.rows.bases[place].tolist() == prompt.bases.tolist()
        assert packed.rows.positions[:, place].tolist() == prompt.positions.tolist()
        if prompt.needs_logits:
            assert packed.last[asked] == place.stop - 1
            asked += 1
        view = prompt.context
        rows = np.arange(len(view.block_table) * PAGE)
        slots = view.block_table[rows // PAGE] * PAGE + rows % PAGE
        count = int(packed.context.counts[index])
        assert packed.context.slots[index, :count].tolist() == slots[view.valid].tolist()
        assert packed.context.bases[index, :count].tolist() == view.bases[view.valid].tolist()
    assert asked == len(contexts)
    assert packed.last_contexts[:asked].tolist() == contexts
    assert set(packed.last_contexts[asked:].tolist()) <= {PADDING_ROW}
    assert set(starts[len(prompts) :]) == {sum(parts)}
    assert packed.context.counts[len(prompts) :].sum() == 0
    real = [*range(decoding), *range(shape.decoding, shape.decoding + sum(parts))]
    padding = np.setdiff1d(np.arange(shape.tokens), real)
    assert set(packed.rows.slots[padding].tolist()) <= {NO_SLOT}


def test_a_step_gets_the_smallest_shape_and_none_too_small() -> None:
    shapes = StepShapes(sequences=29, tokens=1024)
    random = np.random.default_rng(0)
    sizes = [(decoding, tokens) for decoding in (0, 1, 8, 9, 29) for tokens in (1, 100, 748, 1024)]
    for decoding, tokens in sizes:
        decodes = [sequence(random, 1, wanted=True) for _ in range(decoding)]
        shape = shapes.smallest(decodes, [sequence(random, tokens, wanted=True)])
        fitting = [
            other
            for other in shapes
            if other.decoding >= decoding and other.tokens - other.decoding >= tokens
        ]
        assert shape in fitting
        assert shape.parts == min(other.parts for other in fitting) == 1
        assert shape.tokens == min(other.tokens for other in fitting)
    with pytest.raises(CapacityError, match="larger than the executor was made for, 29 and"):
        shapes.smallest([], [sequence(random, 1100, wanted=True)])
    many = [sequence(random, 1, wanted=True) for _ in range(30)]
    with pytest.raises(CapacityError, match="A step of 30 sequences"):
        shapes.smallest([], many)
