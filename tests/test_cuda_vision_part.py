"""The vision half of the CUDA executor: on a GPU as it is, without one over plain torch."""

from pathlib import Path

import numpy as np
import pytest

from framesink.runtime.bundle import Bundle
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.base import FrameEncoder
from framesink.runtime.preprocess import frames_to_patches

torch = pytest.importorskip("torch", reason="the executor runs in torch")

# First of all: it says how kernels are run here.
from reference.triton_device import DEVICE, HAS_GPU  # noqa: E402, I001
from reference import plain_kernels  # noqa: E402

from framesink.runtime.executors.cuda import kernel_operations  # noqa: E402
from framesink.runtime.executors.cuda.vision_part import TOGETHER, VisionPart  # noqa: E402
from framesink.runtime.executors.cuda.weight_source import BundleWeights  # noqa: E402

DTYPE = torch.float16 if HAS_GPU else torch.float32
# Frames of noise are resized within one level of 255.
TOLERANCE = 3e-2 if HAS_GPU else 2e-3
# Cut-off windows; sizes that grow, shrink, and stay; a frame that has no pair.
SHAPES = [(2, 56, 84), (3, 200, 90), (2, 30, 40), (1, 112, 140)]


@pytest.mark.parametrize("count", [1, 2, 3, 13])
def test_chunks_together_are_those_of_onnx_runtime_alone(tiny_bundle: Path, count: int) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    manifest, device = bundle.manifest, torch.device(DEVICE)
    part = VisionPart(
        manifest.model.vision,
        manifest.preprocess,
        BundleWeights(bundle, device),
        dtype=DTYPE,
        device=device,
        operations=kernel_operations if HAS_GPU else plain_kernels,
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
        part.join(found)
        for (patches, _), embeddings in zip(prepared, found, strict=True):
            expected = graph.encode_vision(patches, grid)
            error = np.abs(embeddings.float().cpu().numpy() - expected).max()
            assert error < TOLERANCE * max(1.0, np.abs(expected).max())
