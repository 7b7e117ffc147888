"""Quantized graphs: what ONNX Runtime computes is the definition, and TensorRT compiles it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import ml_dtypes
import numpy as np
import onnx_ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from reference.compiling import compile_graph
from reference.graph_files import LANGUAGE_MODEL, VISION_ENCODER, load_executor, write_graphs
from reference.paged_stream import Conversation, PagedStream, make_conversation
from reference.quantized_checkpoint import load_quantized_model, write_quantized_checkpoint

from framesink.build.graphs.layers import GraphAuthor
from framesink.build.random_checkpoint import SIZES, write_random_checkpoint
from framesink.runtime.errors import BuildError
from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from framesink.runtime.manifest import ComputeType
from framesink.runtime.models.quantization import (
    CacheScheme,
    LinearScheme,
    quantizable_linears,
)
from framesink.runtime.preprocess import Grid

INT4_GROUP = 64
# Wide enough for weights to outweigh a plan's code: 30 M weights.
PLAN_CODE_BYTES = 7_000_000
WIDE = {
    **SIZES["tiny"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {**SIZES["tiny"]["vision_config"], "out_hidden_size": 1024},
}
# Quantization is not continuous: a value within float32's rounding of a tie may get the next code.
TOLERANCE = 1e-4
GRID = Grid(1, 6, 8)


@dataclass(frozen=True)
class Case:
    """What is quantized, and how."""

    linears: LinearScheme
    cache: CacheScheme = CacheScheme.UNQUANTIZED
    scalar_weight_scales: bool = False

    def write(self, source: Path, directory: Path) -> None:
        write_quantized_checkpoint(
            source,
            directory,
            self.linears,
            self.cache,
            scalar_weight_scales=self.scalar_weight_scales,
        )


CASES = [
    pytest.param(Case(LinearScheme.FP8), id="fp8"),
    pytest.param(Case(LinearScheme.FP8, scalar_weight_scales=True), id="fp8 per tensor"),
    pytest.param(Case(LinearScheme.INT8), id="int8"),
    pytest.param(Case(LinearScheme.INT8_WEIGHT_ONLY), id="int8 weight-only"),
    pytest.param(Case(LinearScheme.INT4_WEIGHT_ONLY), id="int4 weight-only"),
    pytest.param(Case(LinearScheme.UNQUANTIZED, CacheScheme.INT8), id="int8 cache"),
    pytest.param(Case(LinearScheme.UNQUANTIZED, CacheScheme.FP8), id="fp8 cache"),
    pytest.param(Case(LinearScheme.INT8, CacheScheme.INT8), id="int8 over an int8 cache"),
    pytest.param(Case(LinearScheme.FP8, CacheScheme.FP8), id="fp8 over an fp8 cache"),
]


@dataclass(frozen=True)
class Quantized:
    """A quantized executor and what float64 says by the definition."""

    case: Case
    executor: OnnxRuntimeExecutor
    talk: Conversation
    vision: NDArray[np.float64]


@pytest.fixture(scope="module", params=CASES)
def quantized(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Quantized]:
    import torch

    directory = tmp_path_factory.mktemp("quantized")
    request.param.write(tiny_checkpoint, directory / "checkpoint")
    model = load_quantized_model(tiny_checkpoint, directory / "checkpoint")
    talk = make_conversation(model, 1, GRID, before=9, after=14)
    with torch.no_grad():
        vision = model.model.visual(
            torch.from_numpy(talk.patches).double(),
            grid_thw=torch.tensor([[GRID.t, GRID.h, GRID.w]]),
        ).pooler_output.numpy()
    write_graphs(directory / "checkpoint", directory / "graphs", compute_type="float32")
    executor = load_executor(directory / "graphs", num_pages=32)
    yield Quantized(request.param, executor, talk, vision)
    executor.close()


def relative_error(actual: object, expected: NDArray[np.float64]) -> float:
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def test_vision_embeddings_follow_the_definition(quantized: Quantized) -> None:
    embeddings = quantized.executor.encode_vision(quantized.talk.patches, GRID)
    assert relative_error(embeddings, quantized.vision) < TOLERANCE


def test_paged_steps_follow_the_definition(quantized: Quantized) -> None:
    """A token sees the same rows in its own step as in every later one: however a conversation is
    cut into steps, the logits are those of one dense forward over rounded K and V."""
    stream = PagedStream(quantized.executor, quantized.talk, list(range(1, 32)), seed=0)
    for count in (7, 9, 1, 1, 5, 1):
        (logits,) = quantized.executor.step([stream.next(count)])
        assert relative_error(logits, stream.expected()) < TOLERANCE


def test_the_definition_differs_from_the_plain_model(
    quantized: Quantized, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """So that the agreement above means something."""
    write_graphs(tiny_checkpoint, tmp_path, compute_type="float32")
    plain = load_executor(tmp_path, num_pages=32)
    stream = PagedStream(plain, quantized.talk, list(range(1, 32)), seed=0)
    (logits,) = plain.step([stream.next(20)])
    assert relative_error(logits, stream.expected()) > 100 * TOLERANCE


def test_pages_hold_one_byte_a_number(quantized: Quantized) -> None:
    for pool in quantized.executor._pools.values():
        is_quantized = quantized.case.cache is not CacheScheme.UNQUANTIZED
        assert pool.dtype == (np.int8 if is_quantized else np.float32)


@pytest.mark.parametrize(
    ("cache", "pages", "rows"),
    [
        (CacheScheme.INT8, onnx_ir.DataType.INT8, onnx_ir.DataType.INT8),
        (CacheScheme.FP8, onnx_ir.DataType.INT8, onnx_ir.DataType.FLOAT8E4M3FN),
    ],
)
def test_the_graph_says_how_pages_are_typed(
    cache: CacheScheme,
    pages: onnx_ir.DataType,
    rows: onnx_ir.DataType,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    Case(LinearScheme.UNQUANTIZED, cache).write(tiny_checkpoint, tmp_path / "checkpoint")
    write_graphs(tmp_path / "checkpoint", tmp_path, compute_type="float16")
    graph = onnx_ir.load(tmp_path / LANGUAGE_MODEL).graph
    assert {v.dtype for v in graph.inputs if "_pages." in (v.name or "")} == {pages}
    assert {v.dtype for v in graph.outputs if "_new." in (v.name or "")} == {rows}


@pytest.mark.parametrize("compute_type", ["float16", "float32"])
def test_every_fp8_byte_is_read_exactly(compute_type: ComputeType, tmp_path: Path) -> None:
    author = GraphAuthor("bytes", {}, compute_type)
    stored = author.input("stored", (256,), onnx_ir.DataType.INT8)
    author.output(author.decode_fp8(stored), "values", (256,), author.compute_type)
    onnx_ir.save(author.finish(), tmp_path / "bytes.onnx")
    codes = np.arange(256, dtype=np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "bytes.onnx")
    (values,) = session.run(None, {"stored": codes.view(np.int8)})
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    numbers = np.isfinite(expected)
    assert numbers.sum() == 254
    np.testing.assert_array_equal(values[numbers], expected[numbers])


# TensorRT.


@pytest.mark.parametrize("case", CASES)
def test_tensorrt_compiles_both_graphs(case: Case, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Without a GPU, for every architecture that has the type, and without a warning that can mean
    wrong numbers."""
    pytest.importorskip("tensorrt_rtx")
    case.write(tiny_checkpoint, tmp_path / "checkpoint")
    opened = write_graphs(tmp_path / "checkpoint", tmp_path, compute_type="float16")
    has_fp8 = LinearScheme.FP8 is case.linears or CacheScheme.FP8 is case.cache
    targets = ("sm89", "sm120") if has_fp8 else ("sm80", "sm86", "sm89", "sm120")
    for name in (LANGUAGE_MODEL, VISION_ENCODER):
        compile_graph(tmp_path / name, opened.config, targets)


def test_tensorrt_has_no_fp8_for_ampere(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    Case(LinearScheme.FP8).write(tiny_checkpoint, tmp_path / "checkpoint")
    opened = write_graphs(tmp_path / "checkpoint", tmp_path, compute_type="float16")
    with pytest.raises(BuildError, match=r"cannot compile vision_encoder\.onnx.*fp8"):
        compile_graph(tmp_path / VISION_ENCODER, opened.config, ("sm80",))


@pytest.mark.parametrize(
    ("scheme", "bytes_per_weight"),
    [
        (LinearScheme.FP8, 1.0),
        (LinearScheme.INT8, 1.0),
        (LinearScheme.INT8_WEIGHT_ONLY, 1.0),
        (LinearScheme.INT4_WEIGHT_ONLY, 0.5),
    ],
)
def test_weights_stay_small_in_the_plan(
    scheme: LinearScheme, bytes_per_weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setitem(cast(dict[str, object], SIZES), "wide", WIDE)
    write_random_checkpoint("wide", tmp_path / "plain")
    write_quantized_checkpoint(
        tmp_path / "plain", tmp_path / "checkpoint", scheme, int4_group=INT4_GROUP
    )
    opened = write_graphs(tmp_path / "checkpoint", tmp_path, compute_type="float16")
    assert opened.quantization is not None
    plan = compile_graph(tmp_path / LANGUAGE_MODEL, opened.config, ("sm89",))
    shapes = quantizable_linears(opened.config)
    layers = [name for name in opened.quantization.linears if name.startswith("model.")]
    codes = sum(math.prod(shapes[name]) for name in layers)
    head = 2 * math.prod(shapes["lm_head"])
    # Of the other schemes' plans scales are a thousandth.
    scales = codes / INT4_GROUP * 2 if scheme is LinearScheme.INT4_WEIGHT_ONLY else 0
    assert plan.plan_bytes < codes * bytes_per_weight + head + scales + PLAN_CODE_BYTES
