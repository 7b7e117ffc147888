"""A context's keys and values, one row after another, as dense attention wants them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping
from framesink.runtime.executors.cuda.kernels.pages import (
    LayerPages,
    converts_in_pairs,
    positions_of,
    unpack,
)
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable, turn
from framesink.runtime.executors.cuda.kernels.tiles import DeviceRows

_BLOCK = 32
# Rows are filled up to a multiple of this.
ALIGNMENT = 128


def gather_context(
    qkv: Tensor,
    rotary: RotaryTable,
    starts: Tensor,
    longest: int,
    rows: DeviceRows,
    pages: LayerPages,
) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hkv, R + longest, D]` of B sequences: the rows of the context, then the
    new tokens, then zeros up to a multiple of `ALIGNMENT` rows; what is beyond is not written. Room
    is for such a multiple too. Keys are turned to their positions. See `paged_prefill` for the
    arguments."""
    batch = len(starts) - 1
    key_heads, head_dim, codes = pages.key_heads, pages.head_dim, pages.codes
    room = triton.cdiv(rows.slots.shape[1] + longest, ALIGNMENT) * ALIGNMENT
    shape = (batch, key_heads, room, head_dim)
    keys = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    values = torch.empty_like(keys)
    _gather_context[(triton.cdiv(room, _BLOCK), key_heads, batch)](
        qkv,
        rotary.cos,
        rotary.sin,
        starts,
        rows.slots,
        rows.bases,
        rows.counts,
        pages.keys,
        pages.values,
        pages.keys if codes is None else codes.key_scale,
        pages.keys if codes is None else codes.value_scale,
        pages.keys if codes is None else codes.key_bias,
        pages.keys if codes is None else codes.places,
        keys,
        values,
        pages.slots,
        qkv.stride(0),
        rows.slots.stride(0),
        room,
        len(rotary.cos),
        key_offset=qkv.shape[1] - 2 * key_heads * head_dim,
        BLOCK=_BLOCK,
        ALIGNMENT=ALIGNMENT,
        KEY_HEADS=key_heads,
        HALF=head_dim // 2,
        TIME_END=rotary.time_end,
        HEIGHT_END=rotary.height_end,
        SCHEME=pages.scheme.value,
        IN_PAIRS=converts_in_pairs(qkv.device, pages.scheme),
        num_warps=4,
        **overlapping(qkv.device),
    )
    return keys, values


@triton.jit(
    do_not_specialize=("rows_stride", "room", "reach"),
    do_not_specialize_on_alignment=("starts", "slots", "bases", "counts"),
)
def _gather_context(
    qkv,
    cosines,
    sines,
    starts,
    slots,
    bases,
    counts,
    k_pages,
    v_pages,
    key_scale,
    value_scale,
    key_bias,
    places,
    keys,
    values,
    all_slots,
    qkv_stride,
    rows_stride,
    room,
    reach,
    key_offset,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TIME_END: tl.constexpr,
    HEIGHT_END: tl.constexpr,
    SCHEME: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(starts + sequence)
    count = tl.load(counts + sequence)
    total = count + tl.load(starts + sequence + 1) - start
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    older = row < count
    newer = (row >= count) & (row < total)
    HEAD_DIM: tl.constexpr = 2 * HALF
    pair = tl.arange(0, HALF)[None, :]
    listed = sequence.to(tl.int64) * rows_stride + row
    slot = tl.load(slots + listed, mask=older, other=0)
    base = tl.load(bases + listed, mask=older, other=0)
    WIDTH: tl.constexpr = HEAD_DIM if SCHEME == "16bit" else HALF
    stored = (head.to(tl.int64) * all_slots + slot)[:, None] * WIDTH + pair
    fresh = (start + row - count).to(tl.int64) * qkv_stride + key_offset + head * HEAD_DIM
    fresh = fresh[:, None] + pair
    from_pages = older[:, None]
    from_qkv = newer[:, None]
    target = ((sequence * KEY_HEADS + head).to(tl.int64) * room + row)[:, None] * HEAD_DIM + pair

    if SCHEME == "16bit":
        first = tl.load(k_pages + stored, mask=from_pages, other=0.0).to(tl.float32)
        second = tl.load(k_pages + stored + HALF, mask=from_pages, other=0.0).to(tl.float32)
        first, second = turn(first, second, cosines, sines, base[:, None], pair, HALF)
    else:
        words = tl.load(k_pages + stored, mask=from_pages, other=0)
        first, second = unpack(words, SCHEME, IN_PAIRS)
        scale = tl.load(key_scale + head * HALF + pair)
        first = tl.where(from_pages, first.to(tl.float32) * scale, 0.0)
        second = tl.where(from_pages, second.to(tl.float32) * scale, 0.0)
        first, second = turn(first, second, cosines, sines, base[:, None], pair, HALF)
        t, h, w = positions_of(tl.load(places + slot, mask=older, other=0), base, reach)
        later = tl.where(pair < HEIGHT_END, h[:, None], w[:, None])
        position = tl.where(pair < TIME_END, t[:, None], later)
        bias = key_bias + head * HEAD_DIM + pair
        first_bias, second_bias = turn(
            tl.load(bias), tl.load(bias + HALF), cosines, sines, position, pair, HALF
        )
        first += tl.where(from_pages, first_bias, 0.0)
        second += tl.where(from_pages, second_bias, 0.0)
    first += tl.load(qkv + fresh, mask=from_qkv, other=0.0).to(tl.float32)
    second += tl.load(qkv + fresh + HALF, mask=from_qkv, other=0.0).to(tl.float32)
    exists = (row < tl.cdiv(total, ALIGNMENT) * ALIGNMENT)[:, None]
    tl.store(keys + target, first, mask=exists)
    tl.store(keys + target + HALF, second, mask=exists)

    fresh += KEY_HEADS * HEAD_DIM
    first = tl.load(qkv + fresh, mask=from_qkv, other=0.0).to(tl.float32)
    second = tl.load(qkv + fresh + HALF, mask=from_qkv, other=0.0).to(tl.float32)
    if SCHEME == "16bit":
        first += tl.load(v_pages + stored, mask=from_pages, other=0.0).to(tl.float32)
        second += tl.load(v_pages + stored + HALF, mask=from_pages, other=0.0).to(tl.float32)
    else:
        words = tl.load(v_pages + stored, mask=from_pages, other=0)
        first_code, second_code = unpack(words, SCHEME, IN_PAIRS)
        scale = tl.load(value_scale + head)
        first += tl.where(from_pages, first_code.to(tl.float32) * scale, 0.0)
        second += tl.where(from_pages, second_code.to(tl.float32) * scale, 0.0)
    tl.store(values + target, first, mask=exists)
    tl.store(values + target + HALF, second, mask=exists)
