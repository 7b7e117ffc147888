"""The demo model on the demo clip: streamed from its bundle, and densely from its checkpoint."""

from pathlib import Path

import numpy as np
import pytest
from reference.dense_policies import DenseSinkWindow
from reference.scenario import Scenario

from framesink.build.options import BuildOptions
from framesink.build.pipeline import build_bundle
from framesink.build.reporter import SilentReporter
from framesink.runtime.arrays import UInt8Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.preprocess import resize_frames
from framesink.runtime.video.capture import ChunkStream
from framesink.runtime.video.source import open_source

MODEL = Path(__file__).parents[1] / "demo" / "model"
CLIP = Path(__file__).parents[1] / "demo" / "clip.mp4"
CHUNKS = 60
TOLERANCE = {"float32": 2e-3, "float16": 0.3}

pytestmark = pytest.mark.skipif(
    not (MODEL.is_dir() and CLIP.is_file()), reason="the demo model is not in this checkout"
)


@pytest.fixture(scope="module", params=["float32", "float16"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo's bundle without plans, executed in each type."""
    output = tmp_path_factory.mktemp("demo") / "bundle"
    options = BuildOptions(MODEL, output, plans=False, executed_type=request.param)
    build_bundle(options, SilentReporter())
    return Bundle.open(output)


@pytest.fixture(scope="module")
def clip(bundle: Bundle) -> list[UInt8Array]:
    """The clip's chunks, at the size the model sees them."""
    preprocess = bundle.manifest.preprocess
    source = open_source(str(CLIP))
    with ChunkStream(source, fps=preprocess.fps, realtime=False) as chunks:
        return [resize_frames(chunk.frames, preprocess) for chunk in chunks]


def scenario(bundle: Bundle, clip: list[UInt8Array], policy: DenseSinkWindow) -> Scenario:
    """The clip, played again and again, with two questions."""
    return Scenario(
        policy,
        query=bundle.manifest.streaming.query or "Say what happens.",
        questions={12: "How many shapes are there?", 41: "What entered last?"},
        video=lambda chunk: clip[chunk % len(clip)],
        max_new_tokens=bundle.manifest.streaming.max_new_tokens,
    )


@pytest.mark.parametrize("small", [False, True], ids=["defaults", "small windows"])
def test_sixty_chunks_of_the_clip(bundle: Bundle, clip: list[UInt8Array], small: bool) -> None:
    """Every token the same, with the bundle's own windows and with ones that cut everything.

    In float16 the reference follows what was said, and would have said it too but for near ties.
    """
    from reference.dense_model import load_model
    from reference.parity import assert_parity

    defaults = bundle.manifest.streaming
    policy = DenseSinkWindow(
        vision_turns=round(defaults.vision_seconds / defaults.chunk_seconds),
        reply_turns=defaults.reply_turns,
        sink_text=defaults.sink_text,
        recent_text=defaults.recent_text,
    )
    if small:
        policy = DenseSinkWindow(vision_turns=4, reply_turns=6, sink_text=12, recent_text=20)
    executed = bundle.manifest.language_model.executed.compute_type
    records = assert_parity(
        bundle.directory,
        load_model(MODEL),
        scenario(bundle, clip, policy),
        chunks=CHUNKS,
        tolerance=TOLERANCE[executed],
        follow=executed == "float16",
    )
    assert len({tuple(record.tokens) for record in records}) > 5
    chosen = [
        int(logits.argmax()) == token
        for record in records
        for token, logits in zip(record.tokens, record.logits, strict=True)
    ]
    assert np.mean(chosen) > 0.98
