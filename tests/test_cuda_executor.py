"""The CUDA executor over plain torch on the CPU: the same words as ONNX Runtime's graphs."""

from pathlib import Path

import pytest
from reference.dense_policies import DenseSinkWindow
from reference.recording import RecordingExecutor
from reference.scenario import NUM_PAGES, Scenario

from framesink.runtime.bundle import Bundle
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.base import Executor

torch = pytest.importorskip("torch", reason="the executor runs in torch")

# First of all: it says how kernels are run here.
from reference import triton_device  # noqa: E402, F401, I001
from reference import plain_kernels  # noqa: E402

from framesink.runtime.executors.cuda.executor import CudaExecutor  # noqa: E402
from framesink.runtime.executors.cuda.weight_source import BundleWeights  # noqa: E402

EVICTING = Scenario(
    policy=DenseSinkWindow(4, 6, 7, 19),
    query="What happens?",
    questions={3: "How many?", 17: "Which colour?"},
    sizes={0: (56, 84), 11: (112, 112), 23: (84, 56), 29: (56, 56)},
    frame_counts={0: 2, 29: 4},
    max_new_tokens=5,
)


def cpu_executor(bundle: Bundle, **options: object) -> CudaExecutor:
    """In float32, so that only the order of sums differs from the graphs."""
    manifest = bundle.manifest
    given = {
        "num_pages": NUM_PAGES,
        "page_size": manifest.page_size,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "operations": plain_kernels,
        **options,
    }
    weights = BundleWeights(bundle, torch.device("cpu"))
    return CudaExecutor(manifest.model, manifest.preprocess, weights, manifest.limits, **given)


def engine_of(bundle: Bundle, executor: Executor) -> StreamingEngine:
    manifest = bundle.manifest
    return StreamingEngine(
        executor,
        manifest.model,
        bundle.protocol(),
        manifest.preprocess,
        manifest.streaming,
        manifest.limits,
        threaded=False,
    )


def words(engine: StreamingEngine, scenario: Scenario, chunks: int) -> list[tuple[int, ...]]:
    """The tokens of every reply of one session."""
    said = []
    with scenario.open_session(engine) as session:
        for number in range(chunks):
            question = scenario.questions.get(number)
            if question is not None:
                session.ask(question)
            session.push_chunk(scenario.chunk(number))
            said.append(list(session)[-1].tokens)
        assert session.stats().evicted_tokens > 0
    return said


def test_forty_chunks_with_evictions(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=NUM_PAGES, threads=1)
    expected, found = RecordingExecutor(graph), RecordingExecutor(cpu_executor(bundle))
    with engine_of(bundle, expected) as reference, engine_of(bundle, found) as ours:
        assert words(ours, EVICTING, 40) == words(reference, EVICTING, 40)
