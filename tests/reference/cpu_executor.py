"""The CUDA executor on the CPU: plain torch in the place of its kernels."""

import torch

from framesink.runtime.bundle import Bundle
from framesink.runtime.executors.cuda.executor import CudaExecutor
from framesink.runtime.executors.cuda.weight_source import BundleWeights

# First of all: it says how kernels are run here.
from reference import (
    plain_kernels,
    triton_device,  # noqa: F401
)
from reference.scenario import NUM_PAGES


def cpu_executor(
    bundle: Bundle, kind: type[CudaExecutor] = CudaExecutor, **options: object
) -> CudaExecutor:
    """In float32, so that only the order of sums differs from the graphs."""
    manifest = bundle.manifest
    given = {
        "weights": BundleWeights(bundle, torch.device("cpu")),
        "limits": manifest.limits,
        "num_pages": NUM_PAGES,
        "page_size": manifest.page_size,
        "dtype": torch.float32,
        "vision_dtype": torch.float32,
        "device": torch.device("cpu"),
        "operations": plain_kernels,
        **options,
    }
    return kind(manifest.model, manifest.preprocess, **given)  # type: ignore[arg-type]
