"""The kernels, as `framesink.runtime.executors.cuda.operations.Operations`."""

from framesink.runtime.executors.cuda.kernels.activation import quantize
from framesink.runtime.executors.cuda.kernels.append_rows import rotate_and_append
from framesink.runtime.executors.cuda.kernels.frames import frames_to_patches
from framesink.runtime.executors.cuda.kernels.linear import gated_linear, linear
from framesink.runtime.executors.cuda.kernels.normalization import rms_norm
from framesink.runtime.executors.cuda.kernels.paged_decode import paged_decode
from framesink.runtime.executors.cuda.kernels.paged_prefill import paged_prefill
from framesink.runtime.executors.cuda.kernels.step_tokens import begin_step, choose_likeliest
from framesink.runtime.executors.cuda.kernels.vision_attention import rotate_heads, window_attention

__all__ = [
    "begin_step",
    "choose_likeliest",
    "frames_to_patches",
    "gated_linear",
    "linear",
    "paged_decode",
    "paged_prefill",
    "quantize",
    "rms_norm",
    "rotate_and_append",
    "rotate_heads",
    "window_attention",
]
