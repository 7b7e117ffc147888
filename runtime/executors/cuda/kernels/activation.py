"""Elementwise steps: the MLP's gate, and codes of a linear layer's input."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.formats import OutputFormat, encode
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping

_BLOCK = 1024


def silu_and_multiply(gate_up: Tensor, out: Tensor, output_format: OutputFormat) -> None:
    """SwiGLU (arXiv 2002.05202): `silu(gate) · up` of `gate_up` `[M, 2·I]`, gate first, into `out`
    `[M, I]`. Products are rounded to the type of `gate_up`, as the model's graph does."""
    _launch(_silu_and_multiply, gate_up, out, output_format)


def quantize(values: Tensor, out: Tensor, output_format: OutputFormat) -> None:
    """`values` `[M, n]` as codes `out` `[M, n]`."""
    _launch(_quantize, values, out, output_format)


def _launch(kernel: Any, values: Tensor, out: Tensor, output_format: OutputFormat) -> None:
    """One program for every row of `out` and every block of its columns."""
    tokens, size = out.shape
    smoothing = output_format.smoothing
    kernel[(tokens, triton.cdiv(size, _BLOCK))](
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


@triton.jit
def gated(gate, up):
    """`silu(gate) · up` in float32, rounded to the type of `gate` after either product."""
    dtype = gate.dtype
    wide = gate.to(tl.float32)
    wide = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
    return (wide * up.to(tl.float32)).to(dtype).to(tl.float32)


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
    gate = tl.load(gate_up + row * 2 * size + column, mask=exists, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=exists, other=0.0)
    value = gated(gate, up)
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
