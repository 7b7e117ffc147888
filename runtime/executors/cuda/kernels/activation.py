"""Elementwise steps: the MLP's gate, codes of a linear layer's input, the vision encoder's RoPE."""

import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.formats import OutputFormat, encode
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping

_BLOCK = 1024


def silu_and_multiply(gate_up: Tensor, out: Tensor, output_format: OutputFormat) -> None:
    """SwiGLU (arXiv 2002.05202): `silu(gate) · up` of `gate_up` `[M, 2·I]`, gate first, into `out`
    `[M, I]`. Products are rounded to the type of `gate_up`, as the model's graph does."""
    tokens, size = out.shape
    smoothing = output_format.smoothing
    _silu_and_multiply[(tokens, triton.cdiv(size, _BLOCK))](
        gate_up,
        gate_up if smoothing is None else smoothing,
        out,
        size,
        output_format.scale,
        BLOCK=_BLOCK,
        SMOOTH=smoothing is not None,
        num_warps=4,
        **overlapping(out.device),
    )


def quantize(values: Tensor, out: Tensor, output_format: OutputFormat) -> None:
    """`values` `[M, n]` as codes `out` `[M, n]`."""
    tokens, size = out.shape
    smoothing = output_format.smoothing
    _quantize[(tokens, triton.cdiv(size, _BLOCK))](
        values,
        values if smoothing is None else smoothing,
        out,
        size,
        output_format.scale,
        BLOCK=_BLOCK,
        SMOOTH=smoothing is not None,
        num_warps=4,
        **overlapping(out.device),
    )


def rotate_heads(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Rotate queries and keys of `qkv` `[n, 3·heads·D]` in place, pair j of a head being its
    channels j and j + D/2, by `cos` and `sin` float32 `[n, D/2]`. Computed in float32."""
    half = cos.shape[1]
    _rotate_heads[(len(qkv),)](
        qkv,
        cos,
        sin,
        qkv.stride(0),
        2 * heads,
        half,
        HEADS=triton.next_power_of_2(2 * heads),
        HALF=triton.next_power_of_2(half),
        num_warps=4,
        **overlapping(qkv.device),
    )


@triton.jit
def _silu_and_multiply(
    gate_up,
    smoothing,
    out,
    size,
    out_scale,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < size
    stored = tl.load(gate_up + row * 2 * size + column, mask=exists, other=0.0)
    gate = stored.to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=exists, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(stored.dtype).to(tl.float32)
    value = (gate * up).to(stored.dtype).to(tl.float32)
    if SMOOTH:
        value *= tl.load(smoothing + column, mask=exists, other=0.0)
    tl.store(out + row * size + column, encode(value, out_scale, out.dtype.element_ty), mask=exists)


@triton.jit
def _quantize(
    values,
    smoothing,
    out,
    size,
    out_scale,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    start = tl.program_id(0).to(tl.int64) * size
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < size
    value = tl.load(values + start + column, mask=exists, other=0.0).to(tl.float32)
    if SMOOTH:
        value *= tl.load(smoothing + column, mask=exists, other=0.0)
    tl.store(out + start + column, encode(value, out_scale, out.dtype.element_ty), mask=exists)


@triton.jit
def _rotate_heads(
    qkv,
    cosines,
    sines,
    qkv_stride,
    heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    exists = (head < heads) & (pair < half)
    address = qkv + row * qkv_stride + head * 2 * half + pair
    first = tl.load(address, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(address + half, mask=exists, other=0.0).to(tl.float32)
    cos = tl.load(cosines + row * half + pair, mask=pair < half, other=0.0)
    sin = tl.load(sines + row * half + pair, mask=pair < half, other=0.0)
    tl.store(address, first * cos - second * sin, mask=exists)
    tl.store(address + half, second * cos + first * sin, mask=exists)
