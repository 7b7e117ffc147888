"""Pages of codes on a GPU: the demo model's steps beside those of ONNX Runtime."""

from pathlib import Path

import pytest
from reference.triton_device import HAS_GPU

from framesink.build.footage import Footage
from framesink.build.gate import DEFAULT_GATE
from framesink.build.options import BuildOptions
from framesink.build.pipeline import build_bundle
from framesink.build.reporter import SilentReporter
from framesink.build.verify_executor import verify_executor
from framesink.calibration.recipe import CachePrecision
from framesink.runtime.bundle import Bundle

DEMO = Path(__file__).parents[1] / "demo"
# Evictions begin after 16.
CHUNKS = 40

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="there is no NVIDIA GPU on this machine"),
    pytest.mark.skipif(not (DEMO / "model").is_dir(), reason="the demo model is not here"),
]


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_steps_beside_those_of_the_graphs(tmp_path: Path, precision: CachePrecision) -> None:
    """Codes of turned keys are others than the graphs', and mean the same."""
    options = BuildOptions(
        DEMO / "model",
        tmp_path / "bundle",
        plans=False,
        judge=False,
        precision="fp16",
        kv_precision=precision,
        calibration_videos=(DEMO / "clip.mp4",),
        max_streams=4,
        max_context=4096,
    )
    build_bundle(options, SilentReporter())
    bundle = Bundle.open(tmp_path / "bundle")
    # Of the generated scene the model is unsure: there the codes of either change some tokens.
    for videos in ((DEMO / "clip.mp4",), ()):
        report = verify_executor(bundle, "cuda", Footage.whole(videos, CHUNKS))
        report.check(DEFAULT_GATE)
        assert report.same_codes is not None
