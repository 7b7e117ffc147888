"""Writing the K/V rows of new tokens into their slots."""

import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable, pair_positions


def append_rows(
    qkv: Tensor,
    rotary: RotaryTable,
    positions: Tensor,
    bases: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    new_keys: Tensor | None = None,
) -> None:
    """Write keys, rotated by their place, and values into the pages of one layer.

    `qkv` `[M, (H + 2·Hkv)·D]` are the projections with their biases; `positions` int32 `[3, M]`,
    `bases` and `slots` int32 `[M]`; a token of slot -1 has no row to write. `k_pages` and `v_pages`
    are `[N, Hkv, page, D]`. `new_keys` `[M, Hkv, D]`, if given, takes the keys rotated by their
    position, for `paged_prefill`. Rotations are computed in float32.
    """
    tokens = len(slots)
    _, key_heads, page_size, head_dim = k_pages.shape
    key_offset = qkv.shape[1] - 2 * key_heads * head_dim
    _append_rows[(tokens, key_heads)](
        qkv,
        rotary.cos,
        rotary.sin,
        positions,
        bases,
        slots,
        k_pages,
        v_pages,
        k_pages if new_keys is None else new_keys,
        qkv.stride(0),
        positions.stride(0),
        key_offset,
        KEY_HEADS=key_heads,
        HALF=head_dim // 2,
        PAGE=page_size,
        TIME_END=rotary.time_end,
        HEIGHT_END=rotary.height_end,
        KEEP_KEYS=new_keys is not None,
        num_warps=1,
    )


@triton.jit
def _append_rows(
    qkv,
    cosines,
    sines,
    positions,
    bases,
    slots,
    k_pages,
    v_pages,
    new_keys,
    qkv_stride,
    positions_stride,
    key_offset,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    TIME_END: tl.constexpr,
    HEIGHT_END: tl.constexpr,
    KEEP_KEYS: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1)
    pair = tl.arange(0, HALF)
    position = pair_positions(positions, positions_stride, token, pair, TIME_END, HEIGHT_END)
    slot = tl.load(slots + token)
    key = qkv + token.to(tl.int64) * qkv_stride + key_offset + head * 2 * HALF + pair
    value = key + KEY_HEADS * 2 * HALF
    first = tl.load(key).to(tl.float32)
    second = tl.load(key + HALF).to(tl.float32)
    if KEEP_KEYS:
        cos = tl.load(cosines + position * HALF + pair)
        sin = tl.load(sines + position * HALF + pair)
        kept = new_keys + (token.to(tl.int64) * KEY_HEADS + head) * 2 * HALF + pair
        tl.store(kept, first * cos - second * sin)
        tl.store(kept + HALF, second * cos + first * sin)
    if slot >= 0:
        place = position - tl.load(bases + token)
        cos = tl.load(cosines + place * HALF + pair)
        sin = tl.load(sines + place * HALF + pair)
        page = (slot // PAGE).to(tl.int64)
        row = ((page * KEY_HEADS + head) * PAGE + slot % PAGE) * 2 * HALF + pair
        tl.store(k_pages + row, first * cos - second * sin)
        tl.store(k_pages + row + HALF, second * cos + first * sin)
        tl.store(v_pages + row, tl.load(value))
        tl.store(v_pages + row + HALF, tl.load(value + HALF))
