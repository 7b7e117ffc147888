"""Where Triton kernels are tested: on the GPU, or without one in Triton's interpreter."""

import os
from pathlib import Path

import pytest

HAS_GPU = Path("/dev/nvidia0").exists()
if not HAS_GPU:
    # Read when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("torch", reason="the kernels take torch tensors")
pytest.importorskip("triton", reason="the kernels are written in the Triton language")

DEVICE = "cuda" if HAS_GPU else "cpu"
