"""The CUDA executor over plain torch on the CPU: the same words as ONNX Runtime's graphs."""

import dataclasses
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.dense_policies import DenseSinkWindow
from reference.executor_sessions import engine_of, words
from reference.recording import RecordingExecutor
from reference.scenario import NUM_PAGES, Scenario

from framesink.runtime.bundle import Bundle
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import BundleError, CapacityError, FramesinkError
from framesink.runtime.events import EventKind
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.base import (
    ChoosingExecutor,
    ContextView,
    Executor,
    FrameEncoder,
    LaunchingExecutor,
    SequenceInput,
)
from framesink.runtime.executors.cuda.support import why_not_cuda
from framesink.runtime.manifest import Limits
from framesink.runtime.models.quantization import LinearScheme
from framesink.runtime.preprocess import patchify

torch = pytest.importorskip("torch", reason="the executor runs in torch")

# First of all: it says how kernels are run here.
from reference import triton_device  # noqa: E402, F401
from reference.cpu_executor import cpu_executor  # noqa: E402

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


def test_forty_chunks_with_evictions(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=NUM_PAGES, threads=1)
    expected, found = RecordingExecutor(graph), RecordingExecutor(cpu_executor(bundle))
    with engine_of(bundle, expected) as reference, engine_of(bundle, found) as ours:
        assert words(ours, EVICTING, 40) == words(reference, EVICTING, 40)


def test_sessions_together_over_frames_and_chosen_tokens(tiny_bundle: Path) -> None:
    """The way of an engine with a GPU: frames become patches there, tokens are chosen there, and
    prompts and replies of several sessions share steps."""
    bundle = Bundle.open(tiny_bundle, check="sizes")
    scenarios = [dataclasses.replace(EVICTING, seed=seed) for seed in range(3)]
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=NUM_PAGES, threads=1)
    executor = cpu_executor(bundle)
    assert isinstance(executor, ChoosingExecutor)
    assert isinstance(executor, FrameEncoder)
    said = []
    for engine in (engine_of(bundle, graph), engine_of(bundle, executor)):
        with engine, ExitStack() as stack:
            sessions = [stack.enter_context(other.open_session(engine)) for other in scenarios]
            for number in range(14):
                for scenario, session in zip(scenarios, sessions, strict=True):
                    session.push_chunk(scenario.chunk(number))
                engine.run_until_idle()
                said.append([list(session)[-1].tokens for session in sessions])
            assert engine.stats().mean_batch > 1.2
            assert all(session.stats().evicted_tokens > 0 for session in sessions)
    assert said[:14] == said[14:]


class WaitingExecutor:
    """Passes every call on, and is none that launches."""

    def __init__(self, executor: CudaExecutor) -> None:
        self.name = executor.name
        self.page_size = executor.page_size
        self.num_pages = executor.num_pages
        self.encode_vision = executor.encode_vision
        self.encode_frames = executor.encode_frames
        self.step = executor.step
        self.step_and_choose = executor.step_and_choose
        self.close = executor.close


@dataclasses.dataclass(frozen=True)
class Talk:
    """Sessions with replies of different `lengths`; the last is closed `rounds` rounds into chunk
    `closed`. `closing` ends replies instead of ` ...`."""

    lengths: tuple[int, ...]
    closed: int
    rounds: int
    closing: tuple[int, ...] = ()


def replies(bundle: Bundle, executor: Executor, talk: Talk) -> list[list[tuple[int, ...]]]:
    """What the sessions say to each chunk; pages are recounted on the way."""
    manifest, protocol = bundle.manifest, bundle.protocol()
    protocol.reply_closing = list(talk.closing) or protocol.reply_closing
    with StreamingEngine(
        executor,
        manifest.model,
        protocol,
        manifest.preprocess,
        manifest.streaming,
        manifest.limits,
        threaded=False,
    ) as engine:
        sessions = [
            dataclasses.replace(EVICTING, seed=seed, max_new_tokens=length).open_session(engine)
            for seed, length in enumerate(talk.lengths)
        ]
        said = []
        for number in range(6):
            for session in sessions:
                session.push_chunk(EVICTING.chunk(number))
            if number == talk.closed:
                for _ in range(talk.rounds):
                    engine._worker.run_once()
                sessions.pop().close()
                engine.check_integrity()
            engine.run_until_idle()
            engine.check_integrity()
            said.append([list(session)[-1].tokens for session in sessions])
        for session in sessions:
            session.close()
        assert engine.stats().pages_used == 0
    return said


@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    closed=st.integers(0, 5),
    rounds=st.integers(1, 8),
)
@settings(max_examples=4, deadline=None)
def test_launching_ahead_changes_nothing(
    tiny_bundle: Path, lengths: list[int], closed: int, rounds: int
) -> None:
    """Also where the model's commonest word may be the closing: rows that were guessed wrongly
    leave no trace in the tables on the device."""
    bundle = Bundle.open(tiny_bundle, check="sizes")
    launching = cpu_executor(bundle)
    assert isinstance(launching, LaunchingExecutor)
    waiting = WaitingExecutor(cpu_executor(bundle))
    assert not isinstance(waiting, LaunchingExecutor)
    talk = Talk(tuple(lengths), closed, rounds)
    said = replies(bundle, waiting, talk)
    assert replies(bundle, launching, talk) == said
    words = Counter(token for turn in said for reply in turn for token in reply)
    ((commonest, _),) = words.most_common(1) or [(0, 0)]
    held = dataclasses.replace(talk, closing=(commonest,))
    said = replies(bundle, WaitingExecutor(cpu_executor(bundle)), held)
    assert replies(bundle, cpu_executor(bundle), held) == said


def test_logits_that_are_not_finite_end_the_session(tiny_bundle: Path) -> None:
    """They are found a step later, when the next step has been launched on a choice that failed."""
    bundle = Bundle.open(tiny_bundle, check="sizes")
    executor = cpu_executor(bundle)
    with engine_of(bundle, executor) as engine, EVICTING.open_session(engine) as session:
        session.push_chunk(EVICTING.chunk(0))
        assert list(session)[-1].tokens
        executor._decode._model._weights.head.weights.weight.fill_(torch.nan)
        session.push_chunk(EVICTING.chunk(1))
        (error,) = list(session)
        assert (error.kind, error.final) == (EventKind.ERROR, True)
        assert "logits are not finite" in error.text
        assert engine.stats().pages_used == engine.stats().sessions == 0
        engine.check_integrity()


def test_each_part_has_its_own_type(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    patches, grid = patchify(EVICTING.frames(0), bundle.manifest.preprocess)
    whole, half = cpu_executor(bundle), cpu_executor(bundle, vision_dtype=torch.bfloat16)
    expected, found = (executor.encode_vision(patches, grid) for executor in (whole, half))
    assert (expected.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    with engine_of(bundle, half) as engine, EVICTING.open_session(engine) as session:
        session.push_chunk(EVICTING.chunk(0))
        assert list(session)[-1].tokens


def test_a_penalty_is_applied_on_the_host(tiny_bundle: Path) -> None:
    """Such a session is answered with logits, also beside one that is answered with tokens."""
    bundle = Bundle.open(tiny_bundle, check="sizes")
    penalised = dataclasses.replace(EVICTING, repetition_penalty=1.5)
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=NUM_PAGES, threads=1)
    said = []
    for engine in (engine_of(bundle, graph), engine_of(bundle, cpu_executor(bundle))):
        with engine, ExitStack() as stack:
            sessions = [
                stack.enter_context(scenario.open_session(engine))
                for scenario in (penalised, EVICTING)
            ]
            for number in range(6):
                for session in sessions:
                    session.push_chunk(EVICTING.chunk(number))
                engine.run_until_idle()
                said.append([list(session)[-1].tokens for session in sessions])
    assert said[:6] == said[6:]
    assert any(with_penalty != without for with_penalty, without in said)


def test_contexts_beyond_the_tables_are_refused(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    executor = cpu_executor(bundle)
    limit = 2 * bundle.manifest.limits.max_context
    nothing = ContextView(
        np.zeros(1, np.int32),
        np.zeros((3, 16), np.int32),
        np.zeros(16, np.bool_),
        np.zeros(16, np.int32),
        (0, 0),
    )

    def at(position: int, base: int) -> SequenceInput:
        return SequenceInput(
            np.array([5], np.int32),
            None,
            np.full((3, 1), position, np.int32),
            np.array([16], np.int32),
            nothing,
            True,
            np.array([base], np.int32),
        )

    assert executor.step([at(limit - 1, 0)])[0] is not None
    for position, base in ((limit, 0), (10, 10 - limit)):
        with pytest.raises(CapacityError, match="max_context"):
            executor.step([at(position, base)])


def test_more_sequences_than_rows_take_turns(tiny_bundle: Path) -> None:
    """The tables hold `max_streams` contexts; the least recently used one is sent anew."""
    bundle = Bundle.open(tiny_bundle, check="sizes")
    manifest = bundle.manifest
    few = Limits.model_validate({**manifest.limits.model_dump(), "max_streams": 1})
    narrow = dataclasses.replace(bundle, manifest=manifest.model_copy(update={"limits": few}))
    with engine_of(bundle, cpu_executor(narrow)) as ours:
        alternating = [EVICTING.open_session(ours) for _ in range(4)]
        found = []
        for number in range(5):
            for session in alternating:
                session.push_chunk(EVICTING.chunk(number))
                found.append(list(session)[-1].tokens)
    with engine_of(bundle, cpu_executor(bundle)) as ours, EVICTING.open_session(ours) as session:
        for number in range(5):
            session.push_chunk(EVICTING.chunk(number))
            assert found[4 * number : 4 * number + 4] == [list(session)[-1].tokens] * 4


def test_why_the_executor_cannot_run(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    for sm, sentence in ((None, "no usable NVIDIA GPU"), ("sm75", "older than sm80")):
        monkeypatch.setattr("framesink.runtime.executors.cuda.support.current_sm", lambda sm=sm: sm)
        with pytest.raises(FramesinkError, match=sentence):
            create_executor(bundle, "cuda", num_pages=8)
        executor, reason = create_executor(bundle, num_pages=8)
        assert sentence in reason
        executor.close()


def test_fp8_needs_a_gpu_that_has_it(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Bundle.open(tiny_bundle, check="sizes").manifest
    part = manifest.language_model.model_copy(update={"linears": {LinearScheme.FP8: 21}})
    quantized = manifest.model_copy(update={"language_model": part})
    monkeypatch.setattr("framesink.runtime.executors.cuda.support.current_sm", lambda: "sm86")
    assert "FP8 needs sm89" in (why_not_cuda(quantized) or "")
    assert "FP8" not in (why_not_cuda(manifest) or "")


def test_damaged_weights_are_refused(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    model = bundle.manifest.model
    wider = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=601))
    manifest = bundle.manifest.model_copy(update={"model": wider})
    with pytest.raises(BundleError, match="does not fit the manifest"):
        BundleWeights(dataclasses.replace(bundle, manifest=manifest), torch.device("cpu"))
    more = dataclasses.replace(model, text=dataclasses.replace(model.text, num_hidden_layers=9))
    manifest = bundle.manifest.model_copy(update={"model": more})
    with pytest.raises(BundleError, match="has no weight"):
        BundleWeights(dataclasses.replace(bundle, manifest=manifest), torch.device("cpu"))
