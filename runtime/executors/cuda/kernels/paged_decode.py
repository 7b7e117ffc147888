"""Attention of one new token per sequence, straight on the pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.attention_parts import (
    LOG2_E,
    Parts,
    combine,
    tile_rows,
)
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable, pair_positions
from framesink.runtime.executors.cuda.kernels.tiles import TILE_ROWS, DeviceTiles

# The smallest matrix product's rows.
_MIN_ROWS = 16
# Programs per multiprocessor, over which contexts are split.
_PROGRAMS = 2
_MAX_SPLITS = 64


def paged_decode(
    qkv: Tensor,
    rotary: RotaryTable,
    positions: Tensor,
    tiles: DeviceTiles,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    output_format: OutputFormat,
    splits: int | None = None,
) -> None:
    """Attend from each sequence's newest token to its tiles, which include that token's own row.

    `qkv` `[B, (H + 2·Hkv)·D]` with queries first; `positions` int32 `[3, B]`; `k_pages` and
    `v_pages` `[N, Hkv, page, D]`; `out` `[B, H·D]`. Every context is split into `splits` parts, by
    default so many that they fill the GPU. What is launched depends on shapes alone, so a CUDA
    graph can hold it.
    """
    batch = len(qkv)
    _, key_heads, page_size, head_dim = k_pages.shape
    heads = out.shape[1] // head_dim
    if splits is None:
        splits = decode_splits(batch * key_heads, tiles.bases.shape[1], qkv.device)
    parts = Parts.empty(batch * heads, splits, head_dim, qkv.device)
    group = heads // key_heads
    _paged_decode[(batch, key_heads, splits)](
        qkv,
        rotary.cos,
        rotary.sin,
        positions,
        tiles.bases,
        tiles.pages,
        tiles.masks,
        tiles.counts,
        k_pages,
        v_pages,
        parts.values,
        parts.softmax,
        qkv.stride(0),
        positions.stride(0),
        tiles.bases.stride(0),
        LOG2_E / head_dim**0.5,
        GROUP=group,
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(group)),
        KEY_HEADS=key_heads,
        HALF=head_dim // 2,
        PAGE=page_size,
        TILE=TILE_ROWS,
        TIME_END=rotary.time_end,
        HEIGHT_END=rotary.height_end,
        num_warps=4,
        num_stages=3,
    )
    combine(parts, out, output_format)


def decode_splits(rows: int, tiles: int, device: torch.device) -> int:
    """How many parts to split contexts of `tiles` tiles into, for `rows` sequences · K/V heads."""
    if device.type != "cuda":
        return min(tiles, 2)
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-_PROGRAMS * processors // rows)
    return max(1, min(wanted, tiles, _MAX_SPLITS))


@triton.jit
def _paged_decode(
    qkv,
    cosines,
    sines,
    positions,
    tile_bases,
    tile_pages,
    tile_masks,
    tile_counts,
    k_pages,
    v_pages,
    values,
    softmax,
    qkv_stride,
    positions_stride,
    tiles_stride,
    score_scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    TIME_END: tl.constexpr,
    HEIGHT_END: tl.constexpr,
):
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    count = tl.load(tile_counts + sequence)
    share = tl.cdiv(count, splits)
    begin = sequence * tiles_stride + split * share
    end = sequence * tiles_stride + tl.minimum((split + 1) * share, count)

    HEAD_DIM: tl.constexpr = 2 * HALF
    row = tl.arange(0, ROWS)
    pair = tl.arange(0, HALF)
    channel = tl.arange(0, HEAD_DIM)
    in_group = row < GROUP
    query = qkv + sequence.to(tl.int64) * qkv_stride + head * GROUP * HEAD_DIM
    query = query + row[:, None] * HEAD_DIM + pair[None, :]
    first = tl.load(query, mask=in_group[:, None], other=0.0).to(tl.float32) * score_scale
    second = tl.load(query + HALF, mask=in_group[:, None], other=0.0).to(tl.float32) * score_scale
    position = pair_positions(positions, positions_stride, sequence, pair, TIME_END, HEIGHT_END)

    maximum = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for tile in range(begin, end):
        start, visible = tile_rows(
            tile_pages, tile_masks, tile, head, KEY_HEADS, HEAD_DIM, PAGE, TILE
        )
        angle = (position - tl.load(tile_bases + tile)) * HALF + pair
        cos = tl.load(cosines + angle)[None, :]
        sin = tl.load(sines + angle)[None, :]
        key = k_pages + start[None, :] + pair[:, None]
        first_keys = tl.load(key, mask=visible[None, :], other=0.0)
        second_keys = tl.load(key + HALF, mask=visible[None, :], other=0.0)
        rotated_first = (first * cos - second * sin).to(first_keys.dtype)
        rotated_second = (second * cos + first * sin).to(first_keys.dtype)
        scores = tl.dot(rotated_first, first_keys)
        scores = tl.dot(rotated_second, second_keys, scores)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(maximum - highest)
        total = total * shrink + tl.sum(weights, axis=1)
        value = tl.load(
            v_pages + start[:, None] + channel[None, :], mask=visible[:, None], other=0.0
        )
        mixed = tl.dot(weights.to(value.dtype), value, mixed * shrink[:, None])
        maximum = highest

    head_row = (sequence * KEY_HEADS + head).to(tl.int64) * GROUP + row
    part = head_row * splits + split
    tl.store(softmax + 2 * part, maximum, mask=in_group)
    tl.store(softmax + 2 * part + 1, total, mask=in_group)
    tl.store(values + part[:, None] * HEAD_DIM + channel[None, :], mixed, mask=in_group[:, None])
