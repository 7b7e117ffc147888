"""The CUDA executor on a GPU: the demo model says what it says in ONNX Runtime."""

import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import executor_sessions
from reference.triton_device import HAS_GPU

from framesink.build.options import BuildOptions
from framesink.build.pipeline import build_bundle
from framesink.build.reporter import SilentReporter
from framesink.calibration.agreement import Agreement, compare_executors
from framesink.calibration.recorded_turns import StreamSettings
from framesink.runtime.arrays import Float32Array, UInt8Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.base import Executor, SequenceInput
from framesink.runtime.policies import SinkWindow
from framesink.runtime.preprocess import resize_frames
from framesink.runtime.video.capture import ChunkStream
from framesink.runtime.video.chunk import Chunk
from framesink.runtime.video.source import open_source

DEMO = Path(__file__).parents[1] / "demo"
CHUNKS = 200
TOGETHER = 4
OFFSET = 13
FEW_CHUNKS = 40
# The share of replies that may differ from ONNX Runtime's, and by how much the likeliest token may
# lead, in logits, where a session first differs.
MOST_DIFFERING = {"fp16": 0.0, "int8": 0.005, "fp8": 0.01}
MOST_LEAD = 1.0
# Small enough that text is cut and moved from the first minute on.
POLICY = SinkWindow(sink_text=24, recent_text=40, vision_seconds=6, reply_turns=8)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="there is no NVIDIA GPU on this machine"),
    pytest.mark.skipif(not (DEMO / "model").is_dir(), reason="the demo model is not here"),
]


@pytest.fixture(scope="module", params=["fp16", "fp8", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's bundle in each precision, without plans."""
    output = tmp_path_factory.mktemp("demo") / "bundle"
    options: dict[str, Any] = {} if request.param == "fp16" else {"precision": request.param}
    build_bundle(
        BuildOptions(
            DEMO / "model",
            output,
            plans=False,
            judge=False,
            calibration_videos=(DEMO / "clip.mp4",) if options else (),
            max_streams=TOGETHER,
            max_context=4096,
            **options,
        ),
        SilentReporter(),
    )
    return output


@pytest.fixture(scope="module")
def clip(bundle: Path) -> list[UInt8Array]:
    """The clip's chunks, at the size the model sees them."""
    preprocess = Bundle.open(bundle).manifest.preprocess
    source = open_source(str(DEMO / "clip.mp4"))
    with ChunkStream(source, fps=preprocess.fps, realtime=False) as chunks:
        return [resize_frames(chunk.frames, preprocess) for chunk in chunks]


def engine_of(bundle: Path, executor: str) -> StreamingEngine:
    return StreamingEngine.load(
        bundle, executor, threaded=False, threads=min(8, os.cpu_count() or 1)
    )


def replies(
    engine: StreamingEngine, clip: list[UInt8Array], sessions: int
) -> list[list[tuple[int, ...]]]:
    """What sessions say, each beginning at another place of the clip. All of them have a chunk
    waiting before the engine works."""
    opened = [engine.open_session(POLICY) for _ in range(sessions)]
    said: list[list[tuple[int, ...]]] = [[] for _ in opened]
    for number in range(CHUNKS):
        for index, session in enumerate(opened):
            session.push(clip[(OFFSET * index + number) % len(clip)])
        engine.run_until_idle()
        for words, session in zip(said, opened, strict=True):
            words.append(list(session)[-1].tokens)
    for session in opened:
        assert session.stats().evicted_tokens > 0
        session.close()
    return said


class LeadRecorder:
    """Passes on to an executor, and writes down how far the likeliest token led, in logits, each
    time a session chose one."""

    def __init__(self, executor: Executor) -> None:
        self.name = executor.name
        self.page_size = executor.page_size
        self.num_pages = executor.num_pages
        self.encode_vision = executor.encode_vision
        self.close = executor.close
        self._executor = executor
        self._leads: dict[int, list[float]] = {}

    def step(self, batch: Sequence[SequenceInput]) -> Sequence[Float32Array | None]:
        """See Executor."""
        answers = self._executor.step(batch)
        for given, logits in zip(batch, answers, strict=True):
            if logits is not None:
                assert given.context.edition is not None
                second, first = np.partition(logits, -2)[-2:]
                self._leads.setdefault(given.context.edition[0], []).append(float(first - second))
        return answers

    def leads(self) -> list[list[float]]:
        """Of every session, in the order in which they were opened."""
        return [self._leads[number] for number in sorted(self._leads)]


def first_difference(expected: list[tuple[int, ...]], said: list[tuple[int, ...]]) -> int | None:
    """The place of the first token of a session's replies that differs, None if none does."""
    place = 0
    for theirs, ours in zip(expected, said, strict=True):
        if theirs != ours:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(theirs, ours, strict=False))
            return place + len(list(same))
        place += len(theirs)
    return None


def test_two_hundred_chunks_alone_and_together(bundle: Path, clip: list[UInt8Array]) -> None:
    """Every token of every reply, whoever shares its steps. With codes a few may differ from those
    of ONNX Runtime where words hardly lead (in INT8 one by 0.04): a last bit that differs becomes a
    whole code, and Hopper adds FP8 products with fewer bits than float32 has."""
    opened = Bundle.open(bundle)
    pages = TOGETHER * StreamSettings.from_bundle(opened).num_pages(opened.manifest.page_size)
    graphs, _ = create_executor(opened, "onnxruntime", num_pages=pages)
    recorder = LeadRecorder(graphs)
    with executor_sessions.engine_of(opened, recorder) as reference:
        expected = replies(reference, clip, TOGETHER)
    with engine_of(bundle, "cuda") as engine:
        alone = replies(engine, clip, 1)
        together = replies(engine, clip, TOGETHER)
        assert engine.stats().mean_batch > 1.5
    assert alone == together[:1]
    turns = [pair for pairs in map(zip, expected, together) for pair in pairs]
    differing = sum(ours != theirs for ours, theirs in turns)
    assert len(turns) == TOGETHER * CHUNKS
    assert differing <= MOST_DIFFERING[opened.manifest.language_model.precision] * len(turns)
    for theirs, ours, leads in zip(expected, together, recorder.leads(), strict=True):
        assert len(leads) == sum(map(len, theirs))
        place = first_difference(theirs, ours)
        # What comes after has another context.
        assert place is None or leads[place] < MOST_LEAD


def test_sessions_that_end_in_flight_leave_no_trace(bundle: Path, clip: list[UInt8Array]) -> None:
    """Others come and are closed in the middle of a prompt or a reply, whose pages are given to
    whoever is next while the GPU still works on them."""
    said: list[list[tuple[int, ...]]] = []
    for disturbed in (False, True):
        with engine_of(bundle, "cuda") as engine, engine.open_session(POLICY) as session:
            said.append([])
            for number in range(FEW_CHUNKS):
                session.push(clip[number % len(clip)])
                if disturbed:
                    other = engine.open_session(POLICY)
                    other.push(clip[(number + OFFSET) % len(clip)])
                    for _ in range(1 + number % 9):
                        engine._worker.run_once()
                    other.close()
                    engine.check_integrity()
                engine.run_until_idle()
                said[-1].append(list(session)[-1].tokens)
            assert session.stats().evicted_tokens > 0
    assert said[0] == said[1]


def test_weights_and_pages_in_bfloat16(bundle: Path, clip: list[UInt8Array]) -> None:
    """The likeliest token may be another than ONNX Runtime's where two are close."""
    import torch

    from framesink.runtime.executors.cuda import kernel_operations
    from framesink.runtime.executors.cuda.executor import CudaExecutor
    from framesink.runtime.executors.cuda.weight_source import BundleWeights

    opened = Bundle.open(bundle)
    manifest = opened.manifest
    settings = StreamSettings.from_bundle(opened)
    pages = settings.num_pages(manifest.page_size)
    reference, _ = create_executor(opened, "onnxruntime", num_pages=pages)
    device = torch.device("cuda", 0)
    candidate = CudaExecutor(
        manifest.model,
        manifest.preprocess,
        BundleWeights(opened, device),
        manifest.limits,
        num_pages=pages,
        page_size=manifest.page_size,
        dtype=torch.bfloat16,
        vision_dtype=torch.bfloat16,
        device=device,
        operations=kernel_operations,
    )
    chunks = (
        Chunk(clip[number], number, number + 1.0, (number, number + 0.5), 0.0)
        for number in range(FEW_CHUNKS)
    )
    turns = compare_executors(reference, {"bf16": candidate}, settings, chunks)["bf16"]
    agreement = Agreement.of(turns)
    assert agreement.tokens > FEW_CHUNKS
    assert agreement.top1 >= 0.98
    assert agreement.kl <= 0.02
