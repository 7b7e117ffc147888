"""The kernels, as `framesink.runtime.executors.cuda.operations.Operations`."""

from framesink.runtime.executors.cuda.kernels.activation import (
    quantize,
    rotate_heads,
    silu_and_multiply,
)
from framesink.runtime.executors.cuda.kernels.append_rows import rotate_and_append
from framesink.runtime.executors.cuda.kernels.linear import linear
from framesink.runtime.executors.cuda.kernels.normalization import rms_norm
from framesink.runtime.executors.cuda.kernels.paged_decode import paged_decode
from framesink.runtime.executors.cuda.kernels.paged_prefill import paged_prefill

__all__ = [
    "linear",
    "paged_decode",
    "paged_prefill",
    "quantize",
    "rms_norm",
    "rotate_and_append",
    "rotate_heads",
    "silu_and_multiply",
]
