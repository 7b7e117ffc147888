"""A context's keys and values, one row after another, as dense attention wants them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.attention_parts import row_offsets
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping
from framesink.runtime.executors.cuda.kernels.pages import LayerPages
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable, turn
from framesink.runtime.executors.cuda.kernels.tiles import DeviceRows

_BLOCK = 32


def gather_context(
    qkv: Tensor,
    rotary: RotaryTable,
    starts: Tensor,
    longest: int,
    rows: DeviceRows,
    pages: LayerPages,
) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hkv, R + longest, D]` of B sequences: the rows of the context, then the
    new tokens; what is beyond is not written. Keys are turned to their positions. See
    `paged_prefill` for the arguments."""
    batch = len(starts) - 1
    key_heads, head_dim = pages.key_heads, pages.head_dim
    room = rows.slots.shape[1] + longest
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
        keys,
        values,
        qkv.stride(0),
        rows.slots.stride(0),
        room,
        key_offset=qkv.shape[1] - 2 * key_heads * head_dim,
        BLOCK=_BLOCK,
        KEY_HEADS=key_heads,
        HALF=head_dim // 2,
        PAGE=pages.page_size,
        num_warps=4,
        **overlapping(qkv.device),
    )
    return keys, values


@triton.jit(do_not_specialize=("rows_stride", "room"))
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
    keys,
    values,
    qkv_stride,
    rows_stride,
    room,
    key_offset,
    BLOCK: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
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
    stored = row_offsets(slot, head, KEY_HEADS, HEAD_DIM, PAGE)[:, None] + pair
    fresh = (start + row - count).to(tl.int64) * qkv_stride + key_offset + head * HEAD_DIM
    fresh = fresh[:, None] + pair
    from_pages = older[:, None]
    from_qkv = newer[:, None]
    target = ((sequence * KEY_HEADS + head).to(tl.int64) * room + row)[:, None] * HEAD_DIM + pair

    first = tl.load(k_pages + stored, mask=from_pages, other=0.0).to(tl.float32)
    second = tl.load(k_pages + stored + HALF, mask=from_pages, other=0.0).to(tl.float32)
    first, second = turn(first, second, cosines, sines, base[:, None], pair, HALF)
    first += tl.load(qkv + fresh, mask=from_qkv, other=0.0).to(tl.float32)
    second += tl.load(qkv + fresh + HALF, mask=from_qkv, other=0.0).to(tl.float32)
    exists = (row < total)[:, None]
    tl.store(keys + target, first, mask=exists)
    tl.store(keys + target + HALF, second, mask=exists)

    fresh += KEY_HEADS * HEAD_DIM
    for half in tl.static_range(2):
        at = half * HALF
        value = tl.load(v_pages + stored + at, mask=from_pages, other=0.0)
        value += tl.load(qkv + fresh + at, mask=from_qkv, other=0.0)
        tl.store(values + target + at, value, mask=exists)
