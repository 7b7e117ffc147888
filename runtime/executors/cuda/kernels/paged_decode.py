"""Attention of one new token per sequence, straight on the pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.attention_parts import (
    LOG2_E,
    Parts,
    add_tile,
    combine,
    row_offsets,
)
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping
from framesink.runtime.executors.cuda.kernels.pages import LayerPages
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable, turn
from framesink.runtime.executors.cuda.kernels.tiles import NO_SLOT, TILE_ROWS, DeviceTiles

# The smallest matrix product's rows.
_MIN_ROWS = 16
# Programs that run at once on one multiprocessor.
_PROGRAMS = 3
# With fewer parts than this, rounding them down would leave much of the GPU idle.
_MANY = 8
_WARPS = 4
_STAGES = 3


def paged_decode(
    qkv: Tensor,
    rotary: RotaryTable,
    tiles: DeviceTiles,
    pages: LayerPages,
    out: Tensor,
    output_format: OutputFormat,
    splits: int | None = None,
) -> None:
    """Attend from each sequence's newest token to its tiles, which include that token's own row.

    `qkv` `[B, (H + 2·Hkv)·D]` as `rotate_and_append` left it; `out` `[B, H·D]`. Every
    context is split into `splits` parts, by default so many that they fill the GPU. What is
    launched depends on shapes alone, so a CUDA graph can hold it.
    """
    batch = len(qkv)
    key_heads, head_dim = pages.key_heads, pages.head_dim
    heads = out.shape[1] // head_dim
    if splits is None:
        splits = _choose_splits(batch * key_heads, tiles.bases.shape[1], qkv.device)
    parts = Parts.empty(batch * heads, splits, head_dim, qkv.device)
    group = heads // key_heads
    _paged_decode[(batch, key_heads, splits)](
        qkv,
        rotary.cos,
        rotary.sin,
        tiles.bases,
        tiles.slots,
        tiles.counts,
        tiles.rows,
        pages.keys,
        pages.values,
        parts.values,
        parts.softmax,
        qkv.stride(0),
        tiles.bases.stride(0),
        LOG2_E / head_dim**0.5,
        GROUP=group,
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(group)),
        KEY_HEADS=key_heads,
        HALF=head_dim // 2,
        PAGE=pages.page_size,
        TILE=TILE_ROWS,
        NO_SLOT=NO_SLOT,
        num_warps=_WARPS,
        num_stages=_STAGES,
        **overlapping(qkv.device),
    )
    combine(parts, out, output_format)


def _choose_splits(rows: int, tiles: int, device: torch.device) -> int:
    """How many parts to split contexts of `tiles` tiles into, for `rows` sequences · K/V heads: so
    many that all programs run at once, or, if those would be few, in three full turns."""
    if device.type != "cuda":
        return min(tiles, 2)
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    together = _PROGRAMS * processors
    splits = together // rows if together >= _MANY * rows else 3 * together // rows
    return max(1, min(splits, tiles))


@triton.jit
def _paged_decode(
    qkv,
    cosines,
    sines,
    tile_bases,
    tile_slots,
    tile_counts,
    tile_rows,
    k_pages,
    v_pages,
    values,
    softmax,
    qkv_stride,
    tiles_stride,
    score_scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    NO_SLOT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    context = tl.load(tile_rows + sequence)
    count = tl.load(tile_counts + context)
    share = tl.cdiv(count, splits)
    begin = context * tiles_stride + split * share
    end = context * tiles_stride + tl.minimum((split + 1) * share, count)

    HEAD_DIM: tl.constexpr = 2 * HALF
    row = tl.arange(0, ROWS)
    pair = tl.arange(0, HALF)
    channel = tl.arange(0, HEAD_DIM)
    in_group = row < GROUP
    query = qkv + sequence.to(tl.int64) * qkv_stride + head * GROUP * HEAD_DIM
    query = query + row[:, None] * HEAD_DIM + pair[None, :]
    first = tl.load(query, mask=in_group[:, None], other=0.0).to(tl.float32) * score_scale
    second = tl.load(query + HALF, mask=in_group[:, None], other=0.0).to(tl.float32) * score_scale

    maximum = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    # What a tile is, is known one tile ahead, so that its keys and values can be prefetched.
    member = tl.arange(0, TILE)
    base = tl.load(tile_bases + begin, mask=begin < end, other=0)
    slots = tl.load(tile_slots + begin * TILE + member, mask=begin < end, other=NO_SLOT)
    for tile in range(begin, end):
        turned_first, turned_second = turn(
            first, second, cosines, sines, -base, pair[None, :], HALF
        )
        visible = slots != NO_SLOT
        at = row_offsets(slots, head, KEY_HEADS, HEAD_DIM, PAGE)
        more = tile + 1 < end
        following = tile_slots + (tile + 1) * TILE + member
        slots = tl.load(following, mask=more, other=NO_SLOT)
        base = tl.load(tile_bases + tile + 1, mask=more, other=0)
        key = k_pages + at[None, :] + pair[:, None]
        first_keys = tl.load(key, mask=visible[None, :], other=0.0)
        second_keys = tl.load(key + HALF, mask=visible[None, :], other=0.0)
        value = v_pages + at[:, None] + channel[None, :]
        value = tl.load(value, mask=visible[:, None], other=0.0)
        scores = tl.dot(turned_first.to(first_keys.dtype), first_keys)
        scores = tl.dot(turned_second.to(second_keys.dtype), second_keys, scores)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        maximum, total, mixed = add_tile(scores, value, maximum, total, mixed)

    head_row = (sequence * KEY_HEADS + head).to(tl.int64) * GROUP + row
    part = head_row * splits + split
    tl.store(softmax + 2 * part, maximum, mask=in_group)
    tl.store(softmax + 2 * part + 1, total, mask=in_group)
    tl.store(values + part[:, None] * HEAD_DIM + channel[None, :], mixed, mask=in_group[:, None])
