"""Whether the `cuda` executor can run a bundle here; imports nothing that may be missing."""

from importlib.util import find_spec

from framesink.runtime.gpu import current_sm
from framesink.runtime.manifest import Manifest
from framesink.runtime.models.quantization import LinearScheme

# Triton's kernels here want bf16 products and asynchronous copies.
MIN_SM = 80
MIN_SM_FP8 = 89
MIN_HEAD_DIM = 32


def why_not_cuda(manifest: Manifest) -> str | None:
    """What stands against it, as the end of a sentence; None if nothing does."""
    sm = current_sm()
    if sm is None:
        return "this machine has no usable NVIDIA GPU"
    if int(sm.removeprefix("sm")) < MIN_SM:
        return f"the GPU here is of {sm}, older than sm{MIN_SM}"
    parts = (manifest.language_model, manifest.vision_encoder)
    if int(sm.removeprefix("sm")) < MIN_SM_FP8 and any(
        LinearScheme.FP8 in p.linears for p in parts
    ):
        return f"the GPU here is of {sm}, and FP8 needs sm{MIN_SM_FP8}; build with int8"
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} is not installed; install framesink[cuda]"
    import torch

    if not torch.cuda.is_available():
        return "the torch that is installed was built without CUDA; install framesink[cuda]"
    head_dim = manifest.model.text.head_dim
    if head_dim < MIN_HEAD_DIM or head_dim & (head_dim - 1):
        return f"its kernels take no attention heads of {head_dim} channels"
    return None
