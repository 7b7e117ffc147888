"""A context's keys and values, one row after another, as dense attention wants them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping
from framesink.runtime.executors.cuda.kernels.pages import (
    LayerPages,
    code_of,
    converts_in_pairs,
    positions_of,
    unpack,
)
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable
from framesink.runtime.executors.cuda.kernels.tiles import DeviceRows

_BLOCK = 16
_WARPS = 4
# Rows are filled up to a multiple of this.
ALIGNMENT = 128


def gather_context(
    qkv: Tensor,
    rotary: RotaryTable,
    starts: Tensor,
    longest: int,
    rows: DeviceRows,
    pages: LayerPages,
    value_codes: bool = False,
) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hkv, R + longest, D]` of B sequences: the rows of the context, then the
    new tokens, then zeros up to a multiple of `ALIGNMENT` rows; what is beyond is not written. Room
    is for such a multiple too. Keys are turned to their positions. See `paged_prefill` for the
    arguments.

    With `value_codes`, for FP8 pages alone, values are the codes themselves, float8_e4m3fn
    `[B, Hkv, D, R + longest]`: row 16·i + 8·e + 2·q + b stands at 16·i + 4·q + 2·e + b. So the two
    neighbours of every eight that a thread has of a matrix product's result are the four neighbours
    that it must have of the left side of the next product."""
    batch = len(starts) - 1
    key_heads, head_dim, codes = pages.key_heads, pages.head_dim, pages.codes
    room = triton.cdiv(rows.slots.shape[1] + longest, ALIGNMENT) * ALIGNMENT
    shape = (batch, key_heads, room, head_dim)
    keys = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    if value_codes:
        values = torch.empty(
            (batch, key_heads, head_dim, room), dtype=torch.float8_e4m3fn, device=qkv.device
        )
    else:
        values = torch.empty_like(keys)
    _gather_context[(triton.cdiv(room, _BLOCK), batch)](
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
        values.view(torch.uint8) if value_codes else values,
        pages.slots,
        qkv.stride(0),
        rows.slots.stride(0),
        room // ALIGNMENT,
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
        VALUE_CODES=value_codes,
        num_warps=_WARPS,
        **overlapping(qkv.device),
    )
    return keys, values


@triton.jit(
    do_not_specialize=("rows_stride", "aligned_room", "reach"),
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
    aligned_room,
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
    VALUE_CODES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    sequence = tl.program_id(1)
    start = tl.load(starts + sequence)
    count = tl.load(counts + sequence)
    total = count + tl.load(starts + sequence + 1) - start
    filled = tl.cdiv(total, ALIGNMENT) * ALIGNMENT
    if tl.program_id(0) * BLOCK >= filled:
        return
    room = aligned_room.to(tl.int64) * ALIGNMENT
    HEAD_DIM: tl.constexpr = 2 * HALF
    WIDTH: tl.constexpr = HEAD_DIM if SCHEME == "16bit" else HALF
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.arange(0, HALF)[None, :]
    listed = sequence.to(tl.int64) * rows_stride + row
    older = row < count
    slot = tl.load(slots + listed, mask=older, other=0)
    base = tl.load(bases + listed, mask=older, other=0)
    # All heads are turned alike.
    angle = tl.abs(base)[:, None] * HALF + pair
    cos = tl.load(cosines + angle)
    sin = tl.load(sines + angle)
    sin = tl.where(base[:, None] < 0, -sin, sin)
    if SCHEME != "16bit":
        t, h, w = positions_of(tl.load(places + slot, mask=older, other=0), base, reach)
        later = tl.where(pair < HEIGHT_END, h[:, None], w[:, None])
        angle = tl.where(pair < TIME_END, t[:, None], later) * HALF + pair
        bias_cos = tl.load(cosines + angle)
        bias_sin = tl.load(sines + angle)
    # Rows of the values that are stored at these rows.
    value_row = row
    value_slot = slot
    if VALUE_CODES:
        within = row % 16
        value_row = row - within + within // 2 % 2 * 8 + within // 4 * 2 + within % 2
        listed = sequence.to(tl.int64) * rows_stride + value_row
        value_slot = tl.load(slots + listed, mask=value_row < count, other=0)
    from_pages = older[:, None]
    from_qkv = ((row >= count) & (row < total))[:, None]
    values_from_pages = (value_row < count)[:, None]
    values_from_qkv = ((value_row >= count) & (value_row < total))[:, None]
    exists = (row < filled)[:, None]
    fresh = qkv + (start + row - count).to(tl.int64)[:, None] * qkv_stride + key_offset + pair
    fresh_values = qkv + (start + value_row - count).to(tl.int64)[:, None] * qkv_stride + key_offset
    fresh_values += KEY_HEADS * HEAD_DIM + pair
    for head in tl.static_range(KEY_HEADS):
        stored = (slot.to(tl.int64) + head * all_slots.to(tl.int64))[:, None] * WIDTH + pair
        if SCHEME == "16bit":
            first = tl.load(k_pages + stored, mask=from_pages, other=0.0).to(tl.float32)
            second = tl.load(k_pages + stored + HALF, mask=from_pages, other=0.0).to(tl.float32)
        else:
            words = tl.load(k_pages + stored, mask=from_pages, other=0)
            first, second = unpack(words, SCHEME, IN_PAIRS)
            scale = tl.load(key_scale + head * HALF + pair)
            first = tl.where(from_pages, first.to(tl.float32) * scale, 0.0)
            second = tl.where(from_pages, second.to(tl.float32) * scale, 0.0)
        first, second = first * cos - second * sin, second * cos + first * sin
        if SCHEME != "16bit":
            first_bias = tl.load(key_bias + head * HEAD_DIM + pair)
            second_bias = tl.load(key_bias + head * HEAD_DIM + HALF + pair)
            turned = first_bias * bias_cos - second_bias * bias_sin
            first += tl.where(from_pages, turned, 0.0)
            turned = second_bias * bias_cos + first_bias * bias_sin
            second += tl.where(from_pages, turned, 0.0)
        new = fresh + head * HEAD_DIM
        first += tl.load(new, mask=from_qkv, other=0.0).to(tl.float32)
        second += tl.load(new + HALF, mask=from_qkv, other=0.0).to(tl.float32)
        target = (sequence * KEY_HEADS + head) * room * HEAD_DIM
        at = target + row[:, None] * HEAD_DIM + pair
        tl.store(keys + at, first, mask=exists)
        tl.store(keys + at + HALF, second, mask=exists)

        stored = (value_slot.to(tl.int64) + head * all_slots.to(tl.int64))[:, None] * WIDTH + pair
        new = fresh_values + head * HEAD_DIM
        first = tl.load(new, mask=values_from_qkv, other=0.0).to(tl.float32)
        second = tl.load(new + HALF, mask=values_from_qkv, other=0.0).to(tl.float32)
        if VALUE_CODES:
            words = tl.load(v_pages + stored, mask=values_from_pages, other=0).to(tl.int32)
            scale = tl.load(value_scale + head)
            first_code = (words & 0xFF) | code_of(first / scale, SCHEME)
            second_code = ((words >> 8) & 0xFF) | code_of(second / scale, SCHEME)
            at = target + pair * room + row[:, None]
            tl.store(values + at, first_code.to(tl.uint8), mask=exists)
            tl.store(values + at + HALF * room, second_code.to(tl.uint8), mask=exists)
        else:
            if SCHEME == "16bit":
                stored = v_pages + stored
                first += tl.load(stored, mask=values_from_pages, other=0.0).to(tl.float32)
                second += tl.load(stored + HALF, mask=values_from_pages, other=0.0).to(tl.float32)
            else:
                words = tl.load(v_pages + stored, mask=values_from_pages, other=0)
                first_code, second_code = unpack(words, SCHEME, IN_PAIRS)
                scale = tl.load(value_scale + head)
                first_code = first_code.to(tl.float32) * scale
                first += tl.where(values_from_pages, first_code, 0.0)
                second_code = second_code.to(tl.float32) * scale
                second += tl.where(values_from_pages, second_code, 0.0)
            tl.store(values + at, first, mask=exists)
            tl.store(values + at + HALF, second, mask=exists)
