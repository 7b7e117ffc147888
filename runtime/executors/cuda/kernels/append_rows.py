"""RoPE of new tokens, and their K/V rows written into their slots."""

import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping
from framesink.runtime.executors.cuda.kernels.pages import (
    LayerPages,
    packed_place,
    write_row,
)
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable, turn
from framesink.runtime.executors.cuda.kernels.tiles import NewRows


def rotate_and_append(
    qkv: Tensor,
    rotary: RotaryTable,
    rows: NewRows,
    pages: LayerPages,
) -> None:
    """Rotate queries and keys in place, and write keys and values into the pages of one layer.

    `qkv` `[M, (H + 2·Hkv)·D]` are the projections with their biases. Queries and keys are turned by
    their positions. The pages take keys turned by their place alone, position - base, and values.
    Rotations are computed in float32.

    Where pages hold codes, keys come without their bias, which is added, and keys and values in
    `qkv` become what their codes stand for.
    """
    key_heads, head_dim, codes = pages.key_heads, pages.head_dim, pages.codes
    heads = qkv.shape[1] // head_dim - 2 * key_heads
    group = heads // key_heads
    _rotate_and_append[(len(qkv), key_heads)](
        qkv,
        rotary.cos,
        rotary.sin,
        rows.positions,
        rows.bases,
        rows.slots,
        pages.keys,
        pages.values,
        pages.keys if codes is None else codes.key_scale,
        pages.keys if codes is None else codes.value_scale,
        pages.keys if codes is None else codes.key_bias,
        pages.keys if codes is None else codes.places,
        pages.slots,
        qkv.stride(0),
        rows.positions.stride(0),
        GROUP=group,
        ROWS=triton.next_power_of_2(group),
        KEY_HEADS=key_heads,
        HALF=head_dim // 2,
        TIME_END=rotary.time_end,
        HEIGHT_END=rotary.height_end,
        SCHEME=pages.scheme.value,
        num_warps=2,
        **overlapping(qkv.device),
    )


@triton.jit(
    do_not_specialize=("positions_stride",),
    do_not_specialize_on_alignment=("positions", "bases", "slots"),
)
def _rotate_and_append(
    qkv,
    cosines,
    sines,
    positions,
    bases,
    slots,
    k_pages,
    v_pages,
    key_scale,
    value_scale,
    key_bias,
    places,
    all_slots,
    qkv_stride,
    positions_stride,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TIME_END: tl.constexpr,
    HEIGHT_END: tl.constexpr,
    SCHEME: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    token = tl.program_id(0)
    head = tl.program_id(1)
    HEAD_DIM: tl.constexpr = 2 * HALF
    pair = tl.arange(0, HALF)
    axis = tl.where(pair < TIME_END, 0, tl.where(pair < HEIGHT_END, 1, 2))
    position = tl.load(positions + axis * positions_stride + token)
    cos = tl.load(cosines + position * HALF + pair)
    sin = tl.load(sines + position * HALF + pair)
    start = qkv + token.to(tl.int64) * qkv_stride

    row = tl.arange(0, ROWS)
    query = start + (head * GROUP + row[:, None]) * HEAD_DIM + pair[None, :]
    in_group = row[:, None] < GROUP
    first = tl.load(query, mask=in_group, other=0.0).to(tl.float32)
    second = tl.load(query + HALF, mask=in_group, other=0.0).to(tl.float32)
    tl.store(query, first * cos[None, :] - second * sin[None, :], mask=in_group)
    tl.store(query + HALF, second * cos[None, :] + first * sin[None, :], mask=in_group)

    key = start + (GROUP * KEY_HEADS + head) * HEAD_DIM + pair
    value = key + KEY_HEADS * HEAD_DIM
    first = tl.load(key).to(tl.float32)
    second = tl.load(key + HALF).to(tl.float32)
    slot = tl.load(slots + token)
    base = tl.load(bases + token)
    place = position - base
    written = slot >= 0
    row = head.to(tl.int64) * all_slots + slot
    place_cos = tl.load(cosines + place * HALF + pair)
    place_sin = tl.load(sines + place * HALF + pair)
    stored_first = first * place_cos - second * place_sin
    stored_second = second * place_cos + first * place_sin
    if SCHEME == "16bit":
        at = row * HEAD_DIM + pair
        write_row(k_pages + at, stored_first, stored_second, 1.0, written, HALF, SCHEME)
        tl.store(key, first * cos - second * sin)
        tl.store(key + HALF, second * cos + first * sin)
        first = tl.load(value).to(tl.float32)
        second = tl.load(value + HALF).to(tl.float32)
        write_row(v_pages + at, first, second, 1.0, written, HALF, SCHEME)
    else:
        at = row * HALF + pair
        scale = tl.load(key_scale + head * HALF + pair)
        first, second = write_row(
            k_pages + at, stored_first, stored_second, scale, written, HALF, SCHEME
        )
        # New tokens see each other as all later ones will see them.
        first, second = turn(first * scale, second * scale, cosines, sines, base, pair, HALF)
        bias = key_bias + head * HEAD_DIM + pair
        first_bias = tl.load(bias)
        second_bias = tl.load(bias + HALF)
        tl.store(key, first + first_bias * cos - second_bias * sin)
        tl.store(key + HALF, second + second_bias * cos + first_bias * sin)

        first = tl.load(value).to(tl.float32)
        second = tl.load(value + HALF).to(tl.float32)
        value_scales = tl.load(value_scale + head)
        first, second = write_row(v_pages + at, first, second, value_scales, written, HALF, SCHEME)
        tl.store(value, first * value_scales)
        tl.store(value + HALF, second * value_scales)
        packed = packed_place(positions + token, positions_stride, base)
        tl.store(places + slot, packed, mask=written & (head == 0))
