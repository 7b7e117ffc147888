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
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable, turn

# Query heads of one K/V head in a table, at least: 32 bytes are one access.
_MIN_HEADS = 8
_POSITIONS = 64
# Programs for one K/V head, and sequences of one program if there are many.
_BLOCKS = 32
_SEQUENCES = 2


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
    blocks = _BLOCKS if qkv.device.type == "cuda" else 2
    _key_bias_scores[(blocks, key_heads, triton.cdiv(batch, together))](
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
        TIME_END=rotary.time_end,
        HEIGHT_END=rotary.height_end,
        SEQUENCES=together,
        POSITIONS=_POSITIONS,
        num_warps=4,
        num_stages=1,
        **overlapping(qkv.device),
    )
    return table


@triton.jit(do_not_specialize=("batch",))
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
    TIME_END: tl.constexpr,
    HEIGHT_END: tl.constexpr,
    SEQUENCES: tl.constexpr,
    POSITIONS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    head = tl.program_id(1)
    # A row is a query head on one axis; with a fourth, of nothing, their number is a power of two.
    AXES: tl.constexpr = 4
    HEAD_DIM: tl.constexpr = 2 * HALF
    row = tl.arange(0, SEQUENCES * AXES * HEADS)
    sequence = tl.program_id(2) * SEQUENCES + row // (AXES * HEADS)
    axis = row // HEADS % AXES
    query_head = row % HEADS
    pair = tl.arange(0, HALF)
    pair_axis = tl.where(pair < TIME_END, 0, tl.where(pair < HEIGHT_END, 1, 2))
    exists = (sequence < batch) & (query_head < GROUP) & (axis < 3)
    turns = exists[:, None] & (axis[:, None] == pair_axis[None, :])
    query = qkv + sequence.to(tl.int64) * qkv_stride + (head * GROUP + query_head) * HEAD_DIM
    query = query[:, None] + pair[None, :]
    first = tl.load(query, mask=turns, other=0.0).to(tl.float32) * score_scale
    second = tl.load(query + HALF, mask=turns, other=0.0).to(tl.float32) * score_scale
    own = positions + pair_axis[None, :] * positions_stride + sequence[:, None]
    own = tl.load(own, mask=turns, other=0)
    first, second = turn(first, second, cosines, sines, own, pair[None, :], HALF)
    bias = key_bias + head * HEAD_DIM + pair
    first_bias = tl.load(bias)[None, :]
    second_bias = tl.load(bias + HALF)[None, :]
    along = first * first_bias + second * second_bias
    across = second * first_bias - first * second_bias

    known = sequence < batch
    last = tl.max(tl.load(positions + sequence, mask=known, other=0))
    for other in tl.static_range(1, 3):
        found = tl.load(positions + other * positions_stride + sequence, mask=known, other=0)
        last = tl.maximum(last, tl.max(found))
    target = (sequence.to(tl.int64) * KEY_HEADS + head) * reach * (3 * HEADS)
    target = table + (target + axis * HEADS + query_head)[:, None]
    for start in range(block * POSITIONS, last + 1, blocks * POSITIONS):
        position = start + tl.arange(0, POSITIONS)[None, :]
        inside = position <= last
        angle = position * HALF + pair[:, None]
        cos = tl.load(cosines + angle, mask=inside, other=0.0)
        sin = tl.load(sines + angle, mask=inside, other=0.0)
        scores = tl.dot(along, cos, input_precision="tf32x3")
        scores = tl.dot(across, sin, scores, input_precision="tf32x3")
        tl.store(target + position * (3 * HEADS), scores, mask=exists[:, None] & inside)
