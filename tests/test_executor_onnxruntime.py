"""The ONNX Runtime executor against one dense forward of transformers."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference.graph_files import LANGUAGE_MODEL, load_executor, write_graphs
from reference.paged_stream import PAGE, Conversation, PagedStream, make_conversation

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BundleError, CapacityError, FramesinkError
from framesink.runtime.executors import create_executor, create_vision_encoder
from framesink.runtime.executors.base import ContextView, SequenceInput
from framesink.runtime.executors.batching import MAX_PADDING, group_by_size
from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from framesink.runtime.manifest import ComputeType
from framesink.runtime.preprocess import Grid

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

NUM_PAGES = 64
TOLERANCE: dict[str, float] = {"float32": 2e-5, "float16": 2e-2}


@pytest.fixture(scope="module", params=["float32", "float16", "float32 over float16 pages"])
def compute(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def executor(
    compute: str, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OnnxRuntimeExecutor]:
    compute_type: ComputeType = "float16" if compute == "float16" else "float32"
    cache_type: ComputeType = "float16" if "float16" in compute else "float32"
    directory = tmp_path_factory.mktemp("graphs")
    write_graphs(
        tiny_checkpoint, directory, compute_type=compute_type, cache_type=cache_type, page_size=PAGE
    )
    executor = load_executor(directory, num_pages=NUM_PAGES)
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def talks(tiny_model: "Qwen2_5_VLForConditionalGeneration") -> list[Conversation]:
    return [
        make_conversation(tiny_model, 1, Grid(1, 6, 8), before=9, after=14),
        make_conversation(tiny_model, 2, Grid(2, 4, 4), before=3, after=25),
        make_conversation(tiny_model, 3, Grid(1, 4, 2), before=17, after=6),
    ]


def tolerance(compute: str) -> float:
    return TOLERANCE["float16" if "float16" in compute else "float32"]


def assert_close(actual: object, expected: NDArray[np.float64], limit: float) -> None:
    difference = np.abs(np.asarray(actual) - expected).max()
    assert difference <= limit * np.abs(expected).max()


def test_paged_steps_equal_one_dense_forward(
    executor: OnnxRuntimeExecutor, talks: list[Conversation], compute: str
) -> None:
    """Prefill parts, decode steps, several sequences of unlike length in each step."""
    pages = np.random.default_rng(0).permutation(np.arange(1, NUM_PAGES)).tolist()
    streams = [PagedStream(executor, talk, pages, seed) for seed, talk in enumerate(talks)]
    plan = [(11, 2, 5), (8, 9, 1), (1, 1, 12), (1, 1, 1), (5, 1, 1), (1, 3, 1), (1, 1, 1)]
    for counts in plan:
        batch = [stream.next(count) for stream, count in zip(streams, counts, strict=True)]
        for stream, logits in zip(streams, executor.step(batch), strict=True):
            assert logits is not None
            assert logits.dtype == np.float32
            assert_close(logits, stream.expected(), tolerance(compute))


def test_a_sequence_is_told_the_same_alone_as_in_a_batch(
    executor: OnnxRuntimeExecutor, talks: list[Conversation], compute: str
) -> None:
    free = list(range(1, NUM_PAGES))
    alone = PagedStream(executor, talks[0], free, 0)
    first = executor.step([alone.next(20, needs_logits=False)])
    assert first == [None]
    (expected,) = executor.step([alone.next(1)])

    free = list(range(NUM_PAGES - 1, 0, -1))
    streams = [PagedStream(executor, talk, free, seed) for seed, talk in enumerate(talks)]
    executor.step([stream.next(20, needs_logits=False) for stream in streams])
    together = executor.step([stream.next(1) for stream in streams])
    assert expected is not None
    assert_close(together[0], expected.astype(np.float64), tolerance(compute))


def test_only_its_own_slots_are_written(
    executor: OnnxRuntimeExecutor, talks: list[Conversation]
) -> None:
    before = {name: pool.copy() for name, pool in executor._pools.items()}
    stream = PagedStream(executor, talks[0], [*range(NUM_PAGES - 1, 0, -3)], 0)
    executor.step([stream.next(6)])
    page, row = np.divmod(stream.slots[:6], PAGE)
    for name, pool in executor._pools.items():
        changed = (pool != before[name]).any(axis=(1, 3))
        expected = np.zeros_like(changed)
        expected[page, row] = True
        assert (changed <= expected).all()
        assert changed[page, row].all()


def test_vision_embeddings_must_match_their_placeholders(
    executor: OnnxRuntimeExecutor, talks: list[Conversation]
) -> None:
    stream = PagedStream(executor, talks[0], list(range(1, NUM_PAGES)), 0)
    part = stream.next(len(talks[0].ids))
    assert part.vision_embeddings is not None
    short = dataclasses.replace(part, vision_embeddings=part.vision_embeddings[:-1])
    with pytest.raises(ValueError, match="shape"):
        executor.step([short])


def test_auto_says_what_it_chose_and_why(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    executor, reason = create_executor(bundle, num_pages=8)
    assert executor.name == "onnxruntime"
    assert (executor.num_pages, executor.page_size) == (8, bundle.manifest.page_size)
    assert reason.startswith("onnxruntime on the CPU: ")
    assert "GPU" in reason
    executor.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [("tensorrt", "without TensorRT plans"), ("abacus", "unknown")],
)
def test_an_executor_that_is_not_there(tiny_bundle: Path, name: str, words: str) -> None:
    with pytest.raises(FramesinkError, match=words) as caught:
        create_executor(Bundle.open(tiny_bundle, check="sizes"), name, num_pages=8)
    assert "onnxruntime" in str(caught.value)


def test_pages_that_do_not_fit_into_memory(tiny_bundle: Path) -> None:
    with pytest.raises(CapacityError, match="GB"):
        create_executor(Bundle.open(tiny_bundle, check="sizes"), num_pages=10**10)


def test_a_graph_that_is_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_graphs(tiny_checkpoint, tmp_path, compute_type="float32")
    (tmp_path / LANGUAGE_MODEL).write_bytes(b"no graph")
    with pytest.raises(BundleError, match=re.escape(LANGUAGE_MODEL)):
        load_executor(tmp_path, num_pages=8)


def test_a_type_that_the_cpu_cannot_compute(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_graphs(tiny_checkpoint, tmp_path, compute_type="bfloat16")
    with pytest.raises(BundleError, match="onnx"):
        load_executor(tmp_path, num_pages=8)


@settings(deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 20) | st.just(1), st.integers(1, 40)), min_size=1, max_size=9
    )
)
def test_groups_cover_a_step_and_keep_padding_small(sizes: list[tuple[int, int]]) -> None:
    batch = [empty_sequence(new, pages) for new, pages in sizes]
    groups = list(group_by_size(batch, PAGE))
    assert sorted(place for group in groups for place in group) == list(range(len(batch)))
    for group in groups:
        lengths = [sizes[place][0] for place in group]
        assert set(lengths) == {1} or 1 not in lengths
        cells = [(new, new + pages * PAGE) for new, pages in (sizes[place] for place in group)]
        padded = (
            len(group)
            * max(lengths)
            * (max(lengths) + PAGE * max(sizes[place][1] for place in group))
        )
        assert padded <= (1 + MAX_PADDING) * sum(new * keys for new, keys in cells)


def empty_sequence(new: int, pages: int) -> SequenceInput:
    context = ContextView(
        np.zeros(pages, np.int32),
        np.zeros((3, pages * PAGE), np.int32),
        np.zeros(pages * PAGE, np.bool_),
    )
    slots = np.zeros(new, np.int32)
    return SequenceInput(slots, None, np.zeros((3, new), np.int32), slots, context, True)


def test_the_vision_encoder_alone_says_what_it_says_inside_an_executor(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    grid = Grid(2, 4, 6)
    patches = np.random.default_rng(3).standard_normal(
        (grid.patches, bundle.manifest.preprocess.patch_dim), dtype=np.float32
    )
    whole, _ = create_executor(bundle, num_pages=2, threads=1)
    alone = create_vision_encoder(bundle, threads=1)
    assert np.array_equal(alone.encode_vision(patches, grid), whole.encode_vision(patches, grid))
    alone.close()
    assert whole.encode_vision(patches, grid).shape == (12, bundle.manifest.model.text.hidden_size)
    with pytest.raises(FramesinkError, match="'cudnn' is unknown"):
        create_vision_encoder(bundle, "cudnn")
