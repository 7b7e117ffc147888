"""The CUDA executor's pages of codes: what they cost, beside those of ONNX Runtime's graphs."""

import dataclasses
from pathlib import Path

import pytest
import torch
from reference import triton_device  # noqa: F401
from reference.coded_bundle import build_coded_bundle
from reference.cpu_executor import cpu_executor
from reference.dense_policies import DenseSinkWindow
from reference.scenario import NUM_PAGES, Scenario

from framesink.calibration.agreement import Agreement, compare_executors
from framesink.calibration.recorded_turns import StreamSettings
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import CapacityError
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.cuda.paged_cache import page_bytes
from framesink.runtime.executors.cuda.weight_source import BundleWeights
from framesink.runtime.models.quantization import CacheScheme, Quantization

CHUNKS = 12


@pytest.mark.parametrize("scheme", [CacheScheme.INT8, CacheScheme.FP8])
def test_codes_cost_what_they_cost_the_graphs(
    tiny_checkpoint: Path, tmp_path: Path, scheme: CacheScheme
) -> None:
    """Codes of turned keys are others than the graphs' of keys before RoPE, and no worse: both are
    held against the same steps over 16-bit pages, through evictions."""
    bundle = build_coded_bundle(tiny_checkpoint, tmp_path, scheme)
    weights = BundleWeights(bundle, torch.device("cpu"))
    weights.quantization = Quantization()
    exact = cpu_executor(bundle, weights=weights)
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=NUM_PAGES, threads=1)
    settings = StreamSettings.from_bundle(bundle)
    short = {"sink_text": 8, "recent_text": 12, "vision_seconds": 4.0, "reply_turns": 5}
    settings = dataclasses.replace(settings, defaults=settings.defaults.model_copy(update=short))
    video = Scenario(DenseSinkWindow(8, 12, 4, 5), sizes={0: (56, 84), 5: (84, 56)})
    turns = compare_executors(
        exact,
        {"codes": cpu_executor(bundle), "graph": graph},
        settings,
        [video.chunk(number) for number in range(CHUNKS)],
    )
    codes, graphs = (Agreement.of(turns[name]) for name in ("codes", "graph"))
    assert 0 < codes.kl < 1.5 * graphs.kl
    assert codes.top1 > 0.85
    text = bundle.manifest.model.text
    halves = page_bytes(text, 16, torch.float16, CacheScheme.UNQUANTIZED) / 2
    assert page_bytes(text, 16, torch.float16, scheme) == halves + 16 * 8


def test_more_pages_than_kernels_address_are_refused(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    with pytest.raises(CapacityError, match=r"address up to \d+ pages"):
        cpu_executor(bundle, num_pages=1 << 30)
