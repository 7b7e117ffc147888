"""The vision half of the CUDA executor over plain torch on the CPU."""

from pathlib import Path

import numpy as np
import pytest

from framesink.runtime.bundle import Bundle
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.base import FrameEncoder
from framesink.runtime.preprocess import frames_to_patches

torch = pytest.importorskip("torch", reason="the executor runs in torch")

# First of all: it says how kernels are run here.
from reference import triton_device  # noqa: E402, F401, I001
from reference import plain_kernels  # noqa: E402

from framesink.runtime.executors.cuda.vision_part import TOGETHER, VisionPart  # noqa: E402
from framesink.runtime.executors.cuda.weight_source import BundleWeights  # noqa: E402


# Cut-off windows; sizes that grow, shrink, and stay; a frame that has no pair.
SHAPES = [(2, 56, 84), (3, 200, 90), (2, 30, 40), (1, 112, 140)]


@pytest.mark.parametrize("count", [1, 2, 3, 13])
def test_chunks_together_are_those_of_onnx_runtime_alone(tiny_bundle: Path, count: int) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    manifest, cpu = bundle.manifest, torch.device("cpu")
    part = VisionPart(
        manifest.model.vision,
        manifest.preprocess,
        BundleWeights(bundle, cpu),
        dtype=torch.float32,
        device=cpu,
        operations=plain_kernels,
        clock=None,
    )
    assert isinstance(part, FrameEncoder)
    assert max(TOGETHER) < 13
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=2, threads=1)
    random = np.random.default_rng(count)
    for shape in SHAPES:
        chunks = [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(count)]
        prepared = [frames_to_patches(frames, manifest.preprocess) for frames in chunks]
        grid = prepared[0][1]
        found = part.encode_frames([part.hold_frames(frames) for frames in chunks], grid)
        assert len(found) == count
        for (patches, _), embeddings in zip(prepared, found, strict=True):
            expected = graph.encode_vision(patches, grid)
            # Frames of noise are resized within one level of 255.
            np.testing.assert_allclose(embeddings.numpy(), expected, atol=2e-3)
