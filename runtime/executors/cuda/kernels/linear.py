"""Linear layers over one-byte weights: FP8 and INT8 W8A8, for few rows and for many."""

from dataclasses import dataclass, field
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.activation import gated, silu_and_multiply
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat, encode
from framesink.runtime.executors.cuda.kernels.linear_tiling import (
    FEW_ROWS,
    LEAST_CHANNELS,
    MOST_ROW_TILES,
    Tiling,
    choose_tiling,
)
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping

# Scales of 1 are kept for multiples of so many rows.
_ONES = 4096
# From so many inputs on, the library is faster without scales of channels.
_DEEP = 8192
_BLOCK = 1024
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A linear layer on the GPU.

    `weight` `[N, K]`: 16-bit, or codes (float8_e4m3fn, int8). `scale` float32 `[N]`, for codes
    alone: what one unit of a product of codes is worth, the input's scale · the channel's. `bias`
    `[N]` of the type of the output, or None. A layer is used on one CUDA stream at a time.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    # How many parts of a sum are done, per tile of a product; every launch leaves zeros.
    arrivals: Tensor = field(init=False)

    def __post_init__(self) -> None:
        tiles = triton.cdiv(len(self.weight), LEAST_CHANNELS) * MOST_ROW_TILES
        arrivals = torch.zeros(tiles, dtype=torch.int32, device=self.weight.device)
        object.__setattr__(self, "arrivals", arrivals)


def linear(inputs: Tensor, weights: Weights, out: Tensor) -> None:
    """`out` `[M, N]` = `inputs` `[M, K]` · weightᵀ · scale + bias.

    `inputs` are of the type of the weight: codes for codes. Sums are float32, or int32 of INT8
    codes; each is taken in an order that depends on M, N and K alone.
    """
    if weights.scale is None:
        if weights.bias is None:
            torch.mm(inputs, weights.weight.t(), out=out)
        else:
            torch.addmm(weights.bias, inputs, weights.weight.t(), out=out)
        return
    rows, depth = inputs.shape
    if rows > FEW_ROWS and _library_takes(inputs, weights, out):
        _library_product(inputs, weights, weights.scale, out)
    else:
        tiling = choose_tiling(rows, len(weights.weight), depth, inputs.dtype, out.device)
        launch(inputs, weights, out, tiling)


def gated_linear(
    inputs: Tensor,
    weights: Weights,
    out: Tensor,
    output_format: OutputFormat,
    dtype: torch.dtype,
) -> None:
    """SwiGLU (arXiv 2002.05202): `out` `[M, I]` = silu(gate) · up of a `linear` whose `weights` are
    gate's above up's, `[2·I, K]`. `dtype` is that of the activations, to which all is rounded as by
    `linear` and `silu_and_multiply`; for few rows of codes both are one kernel."""
    rows, depth = inputs.shape
    channels = len(weights.weight)
    if weights.scale is not None and rows <= FEW_ROWS:
        tiling = choose_tiling(rows, channels, depth, inputs.dtype, out.device)
        launch(inputs, weights, out, tiling, Gate(output_format, dtype))
        return
    projected = torch.empty((rows, channels), dtype=dtype, device=out.device)
    linear(inputs, weights, projected)
    silu_and_multiply(projected, out, output_format)


def _library_takes(inputs: Tensor, weights: Weights, out: Tensor) -> bool:
    """Whether `torch._scaled_mm` can make this product; it is the faster one for many rows. With a
    scale per channel it writes bfloat16 alone, and it wants multiples of 16."""
    return (
        inputs.is_cuda
        and inputs.dtype is torch.float8_e4m3fn
        and out.dtype is torch.bfloat16
        and all(size % 16 == 0 for size in weights.weight.shape)
    )


def _library_product(inputs: Tensor, weights: Weights, scale: Tensor, out: Tensor) -> None:
    """A product of many rows of FP8 codes. `torch._scaled_mm` is a third slower for deep layers if
    it scales channels; there they are scaled afterwards."""
    rows, depth = inputs.shape
    deep = depth >= _DEEP
    ones = _ones(-(-rows // _ONES) * _ONES, inputs.device)
    torch._scaled_mm(
        inputs,
        weights.weight.t(),
        scale_a=ones[0, 0] if deep else ones[:rows],
        scale_b=ones[0, 0] if deep else scale[None, :],
        bias=None if deep else weights.bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=out,
    )
    if deep:
        _scale_channels[(rows, triton.cdiv(out.shape[1], _BLOCK))](
            out,
            scale,
            scale if weights.bias is None else weights.bias,
            out.shape[1],
            BLOCK=_BLOCK,
            HAS_BIAS=weights.bias is not None,
            num_warps=4,
            **overlapping(out.device),
        )


@cache
def _ones(rows: int, device: torch.device) -> Tensor:
    """The scales of inputs whose own scale is in the channels': float32 `[rows, 1]`."""
    return torch.ones((rows, 1), dtype=torch.float32, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """What ends a product of gate and up: the form of the output, and the activations' type."""

    output: OutputFormat
    dtype: torch.dtype


def launch(
    inputs: Tensor, weights: Weights, out: Tensor, tiling: Tiling, gate: Gate | None = None
) -> None:
    """As `linear` of codes, or `gated_linear`, in a given tiling. Raises ValueError for a sum in
    parts whose rows are more than `MOST_ROW_TILES` tiles hold."""
    rows, depth = inputs.shape
    channels = len(weights.weight)
    column_tiles = triton.cdiv(channels, tiling.channels)
    row_tiles = triton.cdiv(rows, tiling.rows)
    if tiling.splits > 1 and row_tiles > MOST_ROW_TILES:
        most = MOST_ROW_TILES * tiling.rows
        raise ValueError(f"a sum in parts has up to {most} rows in this tiling, not {rows}")
    sum_type = torch.int32 if weights.weight.dtype is torch.int8 else torch.float32
    share = triton.cdiv(triton.cdiv(depth, tiling.depth), tiling.splits) * tiling.depth
    smoothing = None if gate is None else gate.output.smoothing
    parts = out
    if tiling.splits > 1:
        parts = torch.empty((tiling.splits, rows, channels), dtype=sum_type, device=out.device)
    _linear[(column_tiles * row_tiles, tiling.splits)](
        inputs,
        weights.weight,
        weights.scale,
        weights.scale if weights.bias is None else weights.bias,
        weights.scale if smoothing is None else smoothing,
        out,
        parts,
        weights.arrivals,
        1.0 if gate is None else gate.output.scale,
        rows,
        channels,
        depth,
        share,
        ROWS=tiling.rows,
        CHANNELS=tiling.channels,
        DEPTH=tiling.depth,
        WHOLE_DEPTH=depth % tiling.depth == 0,
        SPLIT=tiling.splits > 1,
        ROW_TILES_TOGETHER=8,
        HAS_BIAS=weights.bias is not None,
        SUM_TYPE=tl.int32 if sum_type is torch.int32 else tl.float32,
        GATED=gate is not None,
        SMOOTH=smoothing is not None,
        VALUE_TYPE=_TYPES[out.dtype if gate is None else gate.dtype],
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **overlapping(out.device),
    )


@triton.jit(do_not_specialize=("rows",))
def _linear(
    inputs,
    weight,
    scale,
    bias,
    smoothing,
    out,
    parts,
    arrivals,
    out_scale,
    rows,
    channels,
    depth,
    share,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    ROW_TILES_TOGETHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    GATED: tl.constexpr,
    SMOOTH: tl.constexpr,
    VALUE_TYPE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # The weight is the left operand, so that its channels fill the 64 rows of a matrix instruction
    # however few the tokens are; the product is transposed on the way out.
    row_tiles = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    # Programs that run at the same time share tiles of the inputs and of the weight in the cache.
    band = tile // (ROW_TILES_TOGETHER * tl.cdiv(channels, CHANNELS))
    band_start = band * ROW_TILES_TOGETHER
    band_size = tl.minimum(row_tiles - band_start, ROW_TILES_TOGETHER)
    within = tile - band_start * tl.cdiv(channels, CHANNELS)
    row = (band_start + within % band_size) * ROWS + tl.arange(0, ROWS)
    has_row = row < rows
    if GATED:
        # Channels of gate, then the same ones of up.
        HALF: tl.constexpr = CHANNELS // 2
        member = tl.arange(0, CHANNELS)
        inner = (within // band_size) * HALF + member % HALF
        has_channel = inner < channels // 2
        channel = inner + member // HALF * (channels // 2)
        kept_channel = (within // band_size) * HALF + tl.arange(0, HALF)
        kept = kept_channel < channels // 2
    else:
        channel = (within // band_size) * CHANNELS + tl.arange(0, CHANNELS)
        has_channel = channel < channels
    step = tl.arange(0, DEPTH)
    start = split * share
    weight_row = weight + tl.where(has_channel, channel, 0).to(tl.int64)[:, None] * depth
    # Not at the end, where they would have to come through all the weights that are on their way.
    unit = tl.load(scale + channel, mask=has_channel, other=0.0)
    if HAS_BIAS:
        shift = tl.load(bias + channel, mask=has_channel, other=0.0)
    if SMOOTH:
        factors = tl.load(smoothing + kept_channel, mask=kept, other=0.0)
    await_inputs(OVERLAP)
    # A row that is not there is not read: all programs would ask for one cache line at a time.
    input_row = inputs + row.to(tl.int64)[None, :] * depth
    sums = tl.zeros((CHANNELS, ROWS), SUM_TYPE)
    for at in range(start, tl.minimum(start + share, depth), DEPTH):
        place = at + step
        if WHOLE_DEPTH:
            codes = tl.load(weight_row + place[None, :])
            activations = tl.load(input_row + place[:, None], mask=has_row[None, :], other=0.0)
        else:
            inside = place < depth
            codes = tl.load(weight_row + place[None, :], mask=inside[None, :], other=0.0)
            activations = tl.load(
                input_row + place[:, None], mask=inside[:, None] & has_row[None, :], other=0.0
            )
        sums = tl.dot(codes, activations, sums, out_dtype=SUM_TYPE)

    exists = has_channel[:, None] & has_row[None, :]
    place = row.to(tl.int64)[None, :] * channels + channel[:, None]
    last = True
    if SPLIT:
        splits = tl.num_programs(1)
        # Every program leaves its part; the last to arrive adds them up, in order.
        size = rows.to(tl.int64) * channels
        tl.store(parts + split * size + place, sums, mask=exists)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + tile, 1, sem="acq_rel")
        last = arrived == splits - 1
        if last:
            tl.store(arrivals + tile, 0)
            sums = tl.zeros((CHANNELS, ROWS), SUM_TYPE)
            for part in range(splits):
                sums += tl.load(
                    parts + part * size + place, mask=exists, other=0, cache_modifier=".cg"
                )
    if last:
        value = sums.to(tl.float32)
        value *= unit[:, None]
        if HAS_BIAS:
            value += shift.to(tl.float32)[:, None]
        if GATED:
            both = tl.reshape(value.to(VALUE_TYPE), (2, HALF, ROWS))
            gates, ups = tl.split(tl.permute(both, (1, 2, 0)))
            result = gated(gates, ups)
            if SMOOTH:
                result *= factors[:, None]
            target = row.to(tl.int64)[None, :] * (channels // 2) + kept_channel[:, None]
            codes = encode(result, out_scale, out.dtype.element_ty)
            tl.store(out + target, codes, mask=kept[:, None] & has_row[None, :])
        else:
            tl.store(out + place, value, mask=exists)


@triton.jit
def _scale_channels(
    out, scale, bias, size, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr
):
    await_inputs(OVERLAP)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < size
    place = out + tl.program_id(0).to(tl.int64) * size + column
    value = tl.load(place, mask=exists, other=0.0).to(tl.float32)
    value *= tl.load(scale + column, mask=exists, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(place, value, mask=exists)
