"""The vision encoder's own kernels: attention within windows, and RoPE for attention by frame."""

import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.formats import OutputFormat, encode
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping

# What the operands of a matrix instruction need.
_LEAST_TILE = 16
_LOG2_E = 1.4426950408889634


def rotate_heads(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Rotate queries and keys of `qkv` `[n, 3·heads·D]` in place, pair j of a head being its
    channels j and j + D/2, by `cos` and `sin` float32 `[n, D/2]`. Computed in float32."""
    half = cos.shape[1]
    _rotate_heads[(len(qkv),)](
        qkv,
        cos,
        sin,
        HEADS=2 * heads,
        HEADS_BLOCK=triton.next_power_of_2(2 * heads),
        HALF=half,
        HALF_BLOCK=triton.next_power_of_2(half),
        num_warps=4,
        **overlapping(qkv.device),
    )


def window_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    longest: int,
    heads: int,
    out: Tensor,
    output_format: OutputFormat,
) -> None:
    """Attention of rows within their window, queries and keys rotated as they are read.

    `qkv` `[n, 3·heads·D]`, `cos` and `sin` float32 `[n, D/2]` as in `rotate_heads`; `qkv` is left
    as it is. `starts` int32 `[W + 1]`: window w is rows `starts[w]` to `starts[w + 1]`, of which
    there are at most `longest`. `out` `[n, heads·D]`. Rotated rows, probabilities and results are
    rounded to the type of `qkv`.

    A window is one tile of keys, so softmax needs no second pass and windows that are cut off need
    no padding in memory.
    """
    half = cos.shape[1]
    smoothing = output_format.smoothing
    _window_attention[(len(starts) - 1, heads)](
        qkv,
        cos,
        sin,
        starts,
        qkv if smoothing is None else smoothing,
        out,
        output_format.scale,
        _LOG2_E * (2 * half) ** -0.5,
        HEADS=heads,
        LENGTH=max(_LEAST_TILE, triton.next_power_of_2(longest)),
        HALF=half,
        HALF_BLOCK=max(_LEAST_TILE, triton.next_power_of_2(half)),
        SMOOTH=smoothing is not None,
        num_warps=4,
        **overlapping(qkv.device),
    )


# HALF and HEADS are constants so that the compiler knows how far rows of 80 bytes are aligned.
@triton.jit
def _rotate_heads(
    qkv,
    cosines,
    sines,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    exists = (head < HEADS) & (pair < HALF)
    # Queries and keys are two parts of three.
    address = qkv + row * (HEADS // 2 * 3 * 2 * HALF) + head * 2 * HALF + pair
    first = tl.load(address, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(address + HALF, mask=exists, other=0.0).to(tl.float32)
    cos = tl.load(cosines + row * HALF + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(sines + row * HALF + pair, mask=pair < HALF, other=0.0)
    tl.store(address, first * cos - second * sin, mask=exists)
    tl.store(address + HALF, second * cos + first * sin, mask=exists)


@triton.jit
def _window_attention(
    qkv,
    cosines,
    sines,
    starts,
    smoothing,
    out,
    out_scale,
    score_scale,
    HEADS: tl.constexpr,
    LENGTH: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    start = tl.load(starts + tl.program_id(0))
    size = tl.load(starts + tl.program_id(0) + 1) - start
    place = tl.arange(0, LENGTH)
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    exists = (place < size)[:, None] & (pair < HALF)
    row = (start + place).to(tl.int64)[:, None]
    column = tl.program_id(1) * (2 * HALF) + pair
    cos = tl.load(cosines + row * HALF + pair, mask=exists, other=0.0)
    sin = tl.load(sines + row * HALF + pair, mask=exists, other=0.0)
    query = qkv + row * (3 * HEADS * 2 * HALF) + column
    key = query + HEADS * 2 * HALF
    value = key + HEADS * 2 * HALF
    # Halves of a head are read apart: each is a power of two or is filled up to one with zeros.
    query_first, query_second = _turned(query, exists, cos, sin, HALF)
    key_first, key_second = _turned(key, exists, cos, sin, HALF)
    scores = tl.dot(query_first, tl.trans(key_first))
    scores = tl.dot(query_second, tl.trans(key_second), scores)
    scores = tl.where(place[None, :] < size, scores * score_scale, -float("inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    total = tl.sum(weights, axis=1)[:, None]
    weights = weights.to(qkv.dtype.element_ty)
    for part in tl.static_range(2):
        offset = part * HALF
        mixed = tl.dot(weights, tl.load(value + offset, mask=exists, other=0.0)) / total
        mixed = mixed.to(qkv.dtype.element_ty).to(tl.float32)
        if SMOOTH:
            mixed *= tl.load(smoothing + column + offset, mask=pair < HALF, other=0.0)
        codes = encode(mixed, out_scale, out.dtype.element_ty)
        tl.store(out + row * (HEADS * 2 * HALF) + column + offset, codes, mask=exists)


@triton.jit
def _turned(heads, exists, cos, sin, HALF: tl.constexpr):
    """Both halves of a head's rows, rotated, in their own type."""
    first = tl.load(heads, mask=exists, other=0.0)
    second = tl.load(heads + HALF, mask=exists, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
