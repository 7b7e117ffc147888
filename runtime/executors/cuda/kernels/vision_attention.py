"""The vision encoder's own kernels: RoPE, and attention within windows."""

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
    starts: Tensor,
    longest: int,
    heads: int,
    out: Tensor,
    output_format: OutputFormat,
) -> None:
    """Attention of rows within their window.

    `qkv` `[n, 3·heads·D]`, queries and keys rotated; D is at least 16. `starts` int32 `[W + 1]`:
    window w is rows `starts[w]` to `starts[w + 1]`, of which there are at most `longest`. `out`
    `[n, heads·D]`. Probabilities and results are rounded to the type of `qkv`.

    A window is one tile of keys, so softmax needs no second pass and windows that are cut off need
    no padding in memory. A head of 80 channels is 64 and 16, not 128.
    """
    head_dim = qkv.shape[1] // (3 * heads)
    first = 1 << (head_dim.bit_length() - 1)
    smoothing = output_format.smoothing
    _window_attention[(len(starts) - 1, heads)](
        qkv,
        starts,
        qkv if smoothing is None else smoothing,
        out,
        output_format.scale,
        _LOG2_E * head_dim**-0.5,
        HEADS=heads,
        LENGTH=max(_LEAST_TILE, triton.next_power_of_2(longest)),
        SIZE=head_dim,
        FIRST=first,
        REST=max(_LEAST_TILE, triton.next_power_of_2(head_dim - first)),
        SMOOTH=smoothing is not None,
        num_warps=4,
        **overlapping(qkv.device),
    )


# HALF and HEADS are constants, so that the compiler knows how far rows of 80 bytes are aligned.
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
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    exists = (head < HEADS) & (pair < HALF)
    # What nothing writes is read before the kernel ahead has ended.
    cos = tl.load(cosines + row * HALF + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(sines + row * HALF + pair, mask=pair < HALF, other=0.0)
    await_inputs(OVERLAP)
    # Queries and keys are two parts of three.
    address = qkv + row * (HEADS // 2 * 3 * 2 * HALF) + head * 2 * HALF + pair
    first = tl.load(address, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(address + HALF, mask=exists, other=0.0).to(tl.float32)
    tl.store(address, first * cos - second * sin, mask=exists)
    tl.store(address + HALF, second * cos + first * sin, mask=exists)


@triton.jit
def _window_attention(
    qkv,
    starts,
    smoothing,
    out,
    out_scale,
    score_scale,
    HEADS: tl.constexpr,
    LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    SMOOTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start = tl.load(starts + tl.program_id(0))
    size = tl.load(starts + tl.program_id(0) + 1) - start
    await_inputs(OVERLAP)
    place = tl.arange(0, LENGTH)
    row = (start + place).to(tl.int64)[:, None]
    exists = (place < size)[:, None]
    offset = tl.program_id(1) * SIZE
    query = qkv + row * (3 * HEADS * SIZE) + offset
    key = query + HEADS * SIZE
    value = key + HEADS * SIZE
    column = tl.arange(0, FIRST)[None, :]
    rest = FIRST + tl.arange(0, REST)[None, :]
    has_rest = exists & (rest < SIZE)
    # Everything is asked for before anything is waited for.
    queries = tl.load(query + column, mask=exists, other=0.0)
    keys = tl.load(key + column, mask=exists, other=0.0)
    if SIZE > FIRST:
        more_queries = tl.load(query + rest, mask=has_rest, other=0.0)
        more_keys = tl.load(key + rest, mask=has_rest, other=0.0)
        more_values = tl.load(value + rest, mask=has_rest, other=0.0)
    values = tl.load(value + column, mask=exists, other=0.0)
    scores = tl.dot(queries, tl.trans(keys))
    if SIZE > FIRST:
        scores = tl.dot(more_queries, tl.trans(more_keys), scores)
    scores = tl.where(place[None, :] < size, scores * score_scale, -float("inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    total = tl.sum(weights, axis=1)[:, None]
    weights = weights.to(qkv.dtype.element_ty)

    target = out + row * (HEADS * SIZE) + offset
    mixed = (tl.dot(weights, values) / total).to(qkv.dtype.element_ty).to(tl.float32)
    if SMOOTH:
        mixed *= tl.load(smoothing + offset + column)
    tl.store(target + column, encode(mixed, out_scale, out.dtype.element_ty), mask=exists)
    if SIZE > FIRST:
        mixed = (tl.dot(weights, more_values) / total).to(qkv.dtype.element_ty).to(tl.float32)
        if SMOOTH:
            mixed *= tl.load(smoothing + offset + rest, mask=rest < SIZE, other=0.0)
        tl.store(target + rest, encode(mixed, out_scale, out.dtype.element_ty), mask=has_rest)
