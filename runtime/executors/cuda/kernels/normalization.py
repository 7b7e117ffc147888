"""RMSNorm of the residual stream, and the codes of what the next linear layer reads."""

import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.formats import OutputFormat, encode
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping


def rms_norm(
    hidden: Tensor,
    weight: Tensor,
    epsilon: float,
    out: Tensor,
    output_format: OutputFormat,
    delta: Tensor | None = None,
) -> None:
    """Root-mean-square norm of `hidden` `[M, n]` over its last axis into `out` `[M, n]`.

    `delta` `[M, n]`, if given, is added to `hidden` in place first. The mean is taken in float32
    and products are rounded to the type of `hidden`, as the model's graph does
    (arXiv 1910.07467).
    """
    tokens, size = hidden.shape
    smoothing = output_format.smoothing
    block = triton.next_power_of_2(size)
    _rms_norm[(tokens,)](
        hidden,
        hidden if delta is None else delta,
        weight,
        hidden if smoothing is None else smoothing,
        out,
        size,
        epsilon,
        output_format.scale,
        BLOCK=block,
        ADD=delta is not None,
        SMOOTH=smoothing is not None,
        num_warps=min(16, max(1, block // 512)),
        **overlapping(hidden.device),
    )


@triton.jit
def _rms_norm(
    hidden,
    delta,
    weight,
    smoothing,
    out,
    size,
    epsilon,
    out_scale,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    SMOOTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    exists = column < size
    # While the kernel before ends: since the last step these have left the cache.
    factor = tl.load(weight + column, mask=exists, other=0.0)
    if SMOOTH:
        smoothing_factor = tl.load(smoothing + column, mask=exists, other=0.0)
    await_inputs(OVERLAP)
    value = tl.load(hidden + start + column, mask=exists, other=0.0)
    dtype = value.dtype
    if ADD:
        value = (value + tl.load(delta + start + column, mask=exists, other=0.0)).to(dtype)
        tl.store(hidden + start + column, value, mask=exists)
    value = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / size + epsilon)
    value = (
        ((value * inverse).to(dtype).to(tl.float32) * factor.to(tl.float32))
        .to(dtype)
        .to(tl.float32)
    )
    if SMOOTH:
        value *= smoothing_factor
    tl.store(out + start + column, encode(value, out_scale, out.dtype.element_ty), mask=exists)
