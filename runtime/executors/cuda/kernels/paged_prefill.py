"""Attention of many new tokens: to the pages of their context, and causally to each other."""

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

# Rows (tokens · heads of one K/V head) per program.
_ROWS = 128
_PROGRAMS = 4
_MAX_SPLITS = 32


def paged_prefill(
    qkv: Tensor,
    new_keys: Tensor,
    rotary: RotaryTable,
    positions: Tensor,
    starts: Tensor,
    longest: int,
    tiles: DeviceTiles,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    output_format: OutputFormat,
    splits: int | None = None,
) -> None:
    """Attend from the new tokens of B sequences, packed one after another.

    `qkv` `[M, (H + 2·Hkv)·D]` and `new_keys` `[M, Hkv, D]` as `append_rows` took and left them;
    `positions` int32 `[3, M]`; `starts` int32 `[B+1]`: where each sequence begins, and the end;
    `longest`: no sequence has more new tokens. `tiles` are those of the contexts, without the new
    tokens, which attend to all of their tiles, and to each other in order. `out` `[M, H·D]`: rows
    beyond the last sequence's end are undefined.
    Contexts are split into `splits` parts, by default so many that they fill the GPU.
    """
    batch = len(starts) - 1
    _, key_heads, page_size, head_dim = k_pages.shape
    heads = out.shape[1] // head_dim
    group = heads // key_heads
    blocks = triton.cdiv(longest * group, _ROWS)
    if splits is None:
        splits = _prefill_splits(batch * key_heads * blocks, tiles.bases.shape[1], qkv.device)
    parts = Parts.empty(len(qkv) * heads, splits, head_dim, qkv.device)
    _paged_prefill[(blocks, splits, batch * key_heads)](
        qkv,
        new_keys,
        rotary.cos,
        rotary.sin,
        positions,
        starts,
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
        ROWS=_ROWS,
        KEY_HEADS=key_heads,
        HALF=head_dim // 2,
        PAGE=page_size,
        TILE=TILE_ROWS,
        TIME_END=rotary.time_end,
        HEIGHT_END=rotary.height_end,
        num_warps=8,
        num_stages=3,
    )
    combine(parts, out, output_format)


def _prefill_splits(programs: int, tiles: int, device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-_PROGRAMS * processors // programs), tiles, _MAX_SPLITS))


@triton.jit
def _rotated_queries(
    query,
    cosines,
    sines,
    positions,
    positions_stride,
    token,
    exists,
    base,
    score_scale,
    HALF: tl.constexpr,
    TIME_END: tl.constexpr,
    HEIGHT_END: tl.constexpr,
):
    """Both halves of the queries at `query` `[ROWS]`, rotated by their position minus `base`."""
    pair = tl.arange(0, HALF)[None, :]
    position = pair_positions(
        positions, positions_stride, token[:, None], pair, TIME_END, HEIGHT_END
    )
    angle = (position - base) * HALF + pair
    cos = tl.load(cosines + angle) * score_scale
    sin = tl.load(sines + angle) * score_scale
    address = query[:, None] + pair
    stored_first = tl.load(address, mask=exists[:, None], other=0.0)
    first = stored_first.to(tl.float32)
    second = tl.load(address + HALF, mask=exists[:, None], other=0.0).to(tl.float32)
    rotated_first = (first * cos - second * sin).to(stored_first.dtype)
    rotated_second = (second * cos + first * sin).to(stored_first.dtype)
    return rotated_first, rotated_second


@triton.jit
def _attend(scores, value, maximum, total, mixed):
    """One step of the softmax over tiles: `scores` `[ROWS, TILE]` with -inf where nothing is seen,
    `value` `[TILE, D]`."""
    highest = tl.maximum(maximum, tl.max(scores, axis=1))
    weights = tl.exp2(scores - highest[:, None])
    shrink = tl.exp2(maximum - highest)
    total = total * shrink + tl.sum(weights, axis=1)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * shrink[:, None])
    return highest, total, mixed


@triton.jit
def _paged_prefill(
    qkv,
    new_keys,
    cosines,
    sines,
    positions,
    starts,
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
    block = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    sequence = tl.program_id(2) // KEY_HEADS
    head = tl.program_id(2) % KEY_HEADS
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start
    if block * ROWS >= length * GROUP:
        return
    HEAD_DIM: tl.constexpr = 2 * HALF
    row = block * ROWS + tl.arange(0, ROWS)
    place = row // GROUP
    exists = place < length
    token = start + tl.where(exists, place, 0)
    pair = tl.arange(0, HALF)
    channel = tl.arange(0, HEAD_DIM)
    query = qkv + token.to(tl.int64) * qkv_stride + (head * GROUP + row % GROUP) * HEAD_DIM

    maximum = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, HEAD_DIM), tl.float32)

    # The new tokens, by their positions: base 0. The last part of the context takes them along.
    first, second = _rotated_queries(
        query, cosines, sines, positions, positions_stride, token, exists, 0, score_scale,
        HALF, TIME_END, HEIGHT_END,
    )  # fmt: skip
    seen = 0
    if split == splits - 1:
        seen = tl.minimum(length, tl.cdiv((block + 1) * ROWS, GROUP))
    key_row = KEY_HEADS * HEAD_DIM
    for begin in range(0, seen, TILE):
        other = begin + tl.arange(0, TILE)
        inside = other < length
        key = new_keys + (start + other[None, :]).to(tl.int64) * key_row + head * HEAD_DIM
        key = key + pair[:, None]
        scores = tl.dot(first, tl.load(key, mask=inside[None, :], other=0.0))
        scores = tl.dot(second, tl.load(key + HALF, mask=inside[None, :], other=0.0), scores)
        scores = tl.where(other[None, :] <= place[:, None], scores, float("-inf"))
        value = qkv + (start + other[:, None]).to(tl.int64) * qkv_stride
        value = value + ((GROUP + 1) * KEY_HEADS + head) * HEAD_DIM + channel[None, :]
        value = tl.load(value, mask=inside[:, None], other=0.0)
        maximum, total, mixed = _attend(scores, value, maximum, total, mixed)

    count = tl.load(tile_counts + sequence)
    share = tl.cdiv(count, splits)
    begin = sequence * tiles_stride + split * share
    end = sequence * tiles_stride + tl.minimum((split + 1) * share, count)
    rotated_for = 0
    for tile in range(begin, end):
        base = tl.load(tile_bases + tile)
        if base != rotated_for:
            first, second = _rotated_queries(
                query, cosines, sines, positions, positions_stride, token, exists, base,
                score_scale, HALF, TIME_END, HEIGHT_END,
            )  # fmt: skip
            rotated_for = base
        at, visible = tile_rows(tile_pages, tile_masks, tile, head, KEY_HEADS, HEAD_DIM, PAGE, TILE)
        key = k_pages + at[None, :] + pair[:, None]
        scores = tl.dot(first, tl.load(key, mask=visible[None, :], other=0.0))
        scores = tl.dot(second, tl.load(key + HALF, mask=visible[None, :], other=0.0), scores)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        value = v_pages + at[:, None] + channel[None, :]
        value = tl.load(value, mask=visible[:, None], other=0.0)
        maximum, total, mixed = _attend(scores, value, maximum, total, mixed)

    head_row = token.to(tl.int64) * (KEY_HEADS * GROUP) + head * GROUP + row % GROUP
    part = head_row * splits + split
    tl.store(softmax + 2 * part, maximum, mask=exists)
    tl.store(softmax + 2 * part + 1, total, mask=exists)
    tl.store(values + part[:, None] * HEAD_DIM + channel[None, :], mixed, mask=exists[:, None])
