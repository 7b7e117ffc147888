"""The CUDA executor's pages of codes: what they cost, beside those of ONNX Runtime's graphs."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from reference import triton_device  # noqa: F401
from reference.cpu_executor import cpu_executor
from reference.dense_policies import DenseSinkWindow
from reference.quantized_checkpoint import write_quantized_checkpoint
from reference.scenario import NUM_PAGES, Scenario

from framesink.build.options import BuildOptions
from framesink.build.pipeline import build_bundle
from framesink.build.reporter import SilentReporter
from framesink.calibration.agreement import Agreement, compare_executors
from framesink.calibration.recorded_turns import StreamSettings
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import CapacityError
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.cuda.paged_cache import page_bytes
from framesink.runtime.executors.cuda.weight_source import BundleWeights
from framesink.runtime.models.companion_files import companion_files
from framesink.runtime.models.quantization import CacheScheme, LinearScheme, Quantization

CHUNKS = 12


def build(checkpoint: Path, directory: Path, scheme: CacheScheme) -> Bundle:
    """A bundle of the tiny checkpoint with a cache of codes that hold all its keys and values."""
    write_quantized_checkpoint(
        checkpoint, directory / "checkpoint", LinearScheme.UNQUANTIZED, scheme, least_range=4.0
    )
    for file in companion_files(checkpoint):
        shutil.copy(file, directory / "checkpoint")
    options = BuildOptions(
        directory / "checkpoint",
        directory / "bundle",
        plans=False,
        executed_type="float32",
        max_streams=2,
        max_context=1024,
    )
    build_bundle(options, SilentReporter())
    return Bundle.open(directory / "bundle", check="sizes")


@pytest.mark.parametrize("scheme", [CacheScheme.INT8, CacheScheme.FP8])
def test_codes_cost_what_they_cost_the_graphs(
    tiny_checkpoint: Path, tmp_path: Path, scheme: CacheScheme
) -> None:
    """Codes of turned keys are others than the graphs' of keys before RoPE, and no worse: both are
    held against the same steps over 16-bit pages, through evictions."""
    bundle = build(tiny_checkpoint, tmp_path, scheme)
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
