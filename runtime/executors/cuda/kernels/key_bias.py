"""What the bias of keys adds to scores, where pages hold keys without it.

The score of a query q with the bias b of a key at position p is qᵀ R(p) b. In M-RoPE (arXiv
2409.12191) each rotary pair turns by one of the three coordinates of p, so the score is a sum of
three numbers that depend on one coordinate each: qᵀ R(p) b = A_t[p_t] + A_h[p_h] + A_w[p_w]. With u
and v per pair, A[p] = Σ u cos(p θ) + v sin(p θ): a product with the rotary tables.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.attention_parts import LOG2_E
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping
from framesink.runtime.executors.cuda.kernels.pages import LayerPages
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable

# Query heads of one K/V head in a table, at least: 32 bytes are one access.
_MIN_HEADS = 8
_MIN_DEPTH = 16
_AXES = 3
_POSITIONS = 64
# Sequences of one program if there are many, programs that run at once on one multiprocessor, and
# the most for one table.
_SEQUENCES = 8
_PROGRAMS = 4
_MAX_BLOCKS = 32


def key_bias_scores(
    qkv: Tensor, rotary: RotaryTable, positions: Tensor, pages: LayerPages
) -> Tensor:
    """Tables of scores · log2 e for B new tokens, float32 `[B, Hkv, positions, 3, heads]`.

    `qkv` `[B, (H + 2·Hkv)·D]` is not turned yet; `positions` int32 `[3, B]`. Tables have the query
    heads of one K/V head, filled up to a power of two of at least 8, and are written up to the new
    token's own position. Raises ValueError for pages that hold keys with their bias.
    """
    if pages.codes is None:
        raise ValueError("these pages hold keys with their bias")
    batch, (key_heads, head_dim) = len(qkv), (pages.key_heads, pages.head_dim)
    group = qkv.shape[1] // (head_dim * key_heads) - 2
    heads = max(_MIN_HEADS, triton.next_power_of_2(group))
    reach = len(rotary.cos)
    table = torch.empty((batch, key_heads, reach, 3, heads), dtype=torch.float32, device=qkv.device)
    together = min(_SEQUENCES, triton.next_power_of_2(batch))
    groups = triton.cdiv(batch, together)
    blocks = _choose_blocks(key_heads * _AXES * groups, qkv.device)
    _key_bias_scores[(blocks, key_heads * _AXES, groups)](
        qkv,
        rotary.cos,
        rotary.sin,
        positions,
        pages.codes.key_bias,
        table,
        qkv.stride(0),
        positions.stride(0),
        batch,
        reach,
        LOG2_E / head_dim**0.5,
        GROUP=group,
        HEADS=heads,
        KEY_HEADS=key_heads,
        HALF=head_dim // 2,
        AXES=_AXES,
        TIME_END=rotary.time_end,
        HEIGHT_END=rotary.height_end,
        DEPTH=max(_MIN_DEPTH, triton.next_power_of_2(max(rotary.sections))),
        SEQUENCES=together,
        POSITIONS=_POSITIONS,
        num_warps=4,
        num_stages=1,
        **overlapping(qkv.device),
    )
    return table


def _choose_blocks(tables: int, device: torch.device) -> int:
    """How many programs share the positions of each of so many tables."""
    if device.type != "cuda":
        return 2
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(_MAX_BLOCKS, _PROGRAMS * processors // tables))


@triton.jit(
    do_not_specialize=("positions_stride", "batch"),
    do_not_specialize_on_alignment=("positions",),
)
def _key_bias_scores(
    qkv,
    cosines,
    sines,
    positions,
    key_bias,
    table,
    qkv_stride,
    positions_stride,
    batch,
    reach,
    score_scale,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    AXES: tl.constexpr,
    TIME_END: tl.constexpr,
    HEIGHT_END: tl.constexpr,
    DEPTH: tl.constexpr,
    SEQUENCES: tl.constexpr,
    POSITIONS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    head = tl.program_id(1) // AXES
    axis = tl.program_id(1) % AXES
    HEAD_DIM: tl.constexpr = 2 * HALF
    # The rotary pairs that turn by this axis.
    pair_start = tl.where(axis == 0, 0, tl.where(axis == 1, TIME_END, HEIGHT_END))
    pair_end = tl.where(axis == 0, TIME_END, tl.where(axis == 1, HEIGHT_END, HALF))
    pair = pair_start + tl.arange(0, DEPTH)
    turns = pair < pair_end
    row = tl.arange(0, SEQUENCES * HEADS)
    sequence = tl.program_id(2) * SEQUENCES + row // HEADS
    query_head = row % HEADS
    known = sequence < batch
    exists = known & (query_head < GROUP)
    wanted = exists[:, None] & turns[None, :]

    query = qkv + sequence.to(tl.int64) * qkv_stride + (head * GROUP + query_head) * HEAD_DIM
    query = query[:, None] + pair[None, :]
    first = tl.load(query, mask=wanted, other=0.0).to(tl.float32) * score_scale
    second = tl.load(query + HALF, mask=wanted, other=0.0).to(tl.float32) * score_scale
    own = tl.load(positions + axis * positions_stride + sequence, mask=known, other=0)
    own_angle = own[:, None] * HALF + pair[None, :]
    cos = tl.load(cosines + own_angle, mask=wanted, other=0.0)
    sin = tl.load(sines + own_angle, mask=wanted, other=0.0)
    first, second = first * cos - second * sin, second * cos + first * sin
    bias = key_bias + head * HEAD_DIM + pair
    first_bias = tl.load(bias, mask=turns, other=0.0)[None, :]
    second_bias = tl.load(bias + HALF, mask=turns, other=0.0)[None, :]
    along = first * first_bias + second * second_bias
    across = second * first_bias - first * second_bias

    # No row of a context is beyond the new token, on no axis.
    last = tl.max(own)
    for other in tl.static_range(AXES):
        found = tl.load(positions + other * positions_stride + sequence, mask=known, other=0)
        last = tl.maximum(last, tl.max(found))
    target = (sequence.to(tl.int64) * KEY_HEADS + head) * reach * (AXES * HEADS)
    target = table + (target + axis * HEADS + query_head)[:, None]
    for start in range(block * POSITIONS, last + 1, blocks * POSITIONS):
        position = start + tl.arange(0, POSITIONS)[None, :]
        inside = position <= last
        angle = position * HALF + pair[:, None]
        read = inside & turns[:, None]
        block_cos = tl.load(cosines + angle, mask=read, other=0.0)
        block_sin = tl.load(sines + angle, mask=read, other=0.0)
        scores = tl.dot(along, block_cos, input_precision="tf32x3")
        scores = tl.dot(across, block_sin, scores, input_precision="tf32x3")
        # Also of heads that only fill up: whole sectors need not be read from memory first.
        tl.store(target + position * (AXES * HEADS), scores, mask=known[:, None] & inside)
