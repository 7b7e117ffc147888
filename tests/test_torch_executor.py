"""The torch executor against the graph, and against the dense reference over an endless stream."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from reference.comparison import assert_same_turn
from reference.dense_policies import DenseSinkWindow
from reference.executor_sessions import engine_of
from reference.parity import dense_stream
from reference.recording import RecordingExecutor
from reference.scenario import NUM_PAGES, Scenario

from framesink.runtime.arrays import Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import CapacityError, CheckpointError
from framesink.runtime.executors import create_executor
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import Quantization

torch = pytest.importorskip("torch", reason="the executor runs in torch")

from framesink.calibration.torch_executor import TorchExecutor  # noqa: E402

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

EVICTING = Scenario(
    policy=DenseSinkWindow(4, 6, 7, 19),
    query="What happens?",
    questions={3: "How many?", 17: "Which colour?"},
    sizes={0: (56, 84), 11: (112, 112), 23: (84, 56)},
    max_new_tokens=5,
)


def test_forty_chunks_with_evictions_are_those_of_the_dense_reference(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tiny_model: "Qwen2_5_VLForConditionalGeneration",
) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    stream = dense_stream(EVICTING, tiny_model, bundle.tokenizer())
    recorder = RecordingExecutor(
        TorchExecutor(Checkpoint.open(tiny_checkpoint), num_pages=NUM_PAGES, page_size=4)
    )
    with engine_of(bundle, recorder) as engine:
        session = EVICTING.open_session(engine)
        for number in range(40):
            question = EVICTING.questions.get(number)
            if question is not None:
                session.ask(question)
            session.push_chunk(EVICTING.chunk(number))
            said = list(session)[-1].tokens
            record = stream.chunk(
                EVICTING.frames(number), *EVICTING.times(number), question=question, said=said
            )
            assert_same_turn(stream, record, recorder.take(), tolerance=5e-4)
        assert session.stats().evicted_tokens > 0


def test_logits_are_those_of_the_executed_graph(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=NUM_PAGES, threads=1)
    ours = TorchExecutor(Checkpoint.open(tiny_checkpoint), num_pages=NUM_PAGES)
    steps = []
    for executor in (graph, ours):
        recorder = RecordingExecutor(executor)
        with engine_of(bundle, recorder) as engine:
            session = EVICTING.open_session(engine)
            for number in range(6):
                session.push_chunk(EVICTING.chunk(number))
                list(session)
        steps.append(recorder.take())
    for expected, found in zip(*steps, strict=True):
        assert expected.new == found.new
        assert expected.tokens == found.tokens
        if expected.logits is None:
            assert found.logits is None
        else:
            np.testing.assert_allclose(found.logits, expected.logits, atol=5e-4)


def _logits(checkpoint: Path, bundle: Bundle, **options: object) -> list[Float32Array]:
    """Every step's logits over three chunks of the scenario."""
    recorder = RecordingExecutor(
        TorchExecutor(Checkpoint.open(checkpoint), num_pages=NUM_PAGES, **options)
    )
    with engine_of(bundle, recorder) as engine:
        session = EVICTING.open_session(engine)
        for number in range(3):
            session.push_chunk(EVICTING.chunk(number))
            list(session)
    return [step.logits for step in recorder.take() if step.logits is not None]


def test_weights_that_are_not_kept_give_the_same(
    tiny_checkpoint: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a large model's on a CPU, each converted when it is used."""
    bundle = Bundle.open(tiny_bundle, check="sizes")
    kept = _logits(tiny_checkpoint, bundle)
    monkeypatch.setattr("framesink.calibration.torch_weights.KEPT_BYTES", 0)
    for expected, found in zip(kept, _logits(tiny_checkpoint, bundle), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_types_are_near(
    tiny_checkpoint: Path, tiny_bundle: Path, dtype: str, tolerance: float
) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    expected = _logits(tiny_checkpoint, bundle)[0]
    found = _logits(tiny_checkpoint, bundle, dtype=getattr(torch, dtype))[0]
    assert found.dtype == np.float32
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0.0 < difference < tolerance


def test_pages_that_do_not_fit_into_memory(tiny_checkpoint: Path) -> None:
    with pytest.raises(CapacityError, match="GB"):
        TorchExecutor(Checkpoint.open(tiny_checkpoint), num_pages=10**10)


def test_a_quantized_checkpoint_is_refused(tiny_checkpoint: Path) -> None:
    checkpoint = dataclasses.replace(Checkpoint.open(tiny_checkpoint), quantization=Quantization())
    with pytest.raises(CheckpointError, match="16-bit checkpoints alone"):
        TorchExecutor(checkpoint, num_pages=8)
