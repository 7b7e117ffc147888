"""Attention of one new token per sequence, straight on the pages, and its own row written.

The rows of a tile are the rows of the matrix products, and the query heads of one K/V head their
columns: the least that a matrix instruction takes are 16 rows, but 8 columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.attention_parts import LOG2_E, Parts, combine
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.key_bias import key_bias_scores
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping
from framesink.runtime.executors.cuda.kernels.pages import (
    LayerPages,
    converts_in_pairs,
    packed_place,
    positions_of,
    unpack,
    write_row,
)
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable, turn
from framesink.runtime.executors.cuda.kernels.tiles import (
    NO_SLOT,
    TILE_ROWS,
    DeviceTiles,
    NewRows,
)

# The fewest columns of a matrix product.
_MIN_HEADS = 8
_WARPS = 4
_STAGES = 2
# Programs that run at once on one multiprocessor, and their registers, so that they can.
_PROGRAMS = 4
_REGISTERS = 128
# What another part adds to the time, and the most parts.
_SPLIT_COST = 0.01
_MAX_SPLITS = 256


def paged_decode(
    qkv: Tensor,
    rotary: RotaryTable,
    rows: NewRows,
    tiles: DeviceTiles,
    pages: LayerPages,
    out: Tensor,
    output_format: OutputFormat,
    splits: int | None = None,
) -> None:
    """Write the row of each sequence's newest token, and attend from it to the sequence's tiles,
    which include that row.

    `qkv` `[B, (H + 2·Hkv)·D]` are the projections, the keys' without bias where pages hold codes;
    they are left as they are. `out` `[B, H·D]`. Every context is split into `splits` parts, by
    default so many that they fill the GPU. What is launched depends on shapes alone, so a CUDA
    graph can hold it.
    """
    batch = len(qkv)
    key_heads, head_dim, codes = pages.key_heads, pages.head_dim, pages.codes
    heads = out.shape[1] // head_dim
    if splits is None:
        splits = _choose_splits(batch * key_heads, tiles.bases.shape[1], qkv.device)
    splits = min(splits, tiles.bases.shape[1])
    parts = Parts.empty(batch * heads, splits, head_dim, qkv.device)
    group = heads // key_heads
    bias_scores = None
    if codes is not None:
        bias_scores = key_bias_scores(qkv, rotary, rows.positions, pages)
    _paged_decode[(batch, key_heads, splits)](
        qkv,
        rotary.cos,
        rotary.sin,
        rows.positions,
        rows.bases,
        rows.slots,
        tiles.rows,
        tiles.bases,
        tiles.slots,
        tiles.counts,
        pages.keys,
        pages.values,
        pages.keys if codes is None else codes.key_scale,
        pages.keys if codes is None else codes.value_scale,
        pages.keys if codes is None else codes.key_bias,
        pages.keys if codes is None else codes.places,
        bias_scores,
        parts.values,
        parts.softmax,
        pages.slots,
        qkv.stride(0),
        rows.positions.stride(0),
        tiles.bases.stride(0),
        len(rotary.cos),
        LOG2_E / head_dim**0.5,
        GROUP=group,
        HEADS=max(_MIN_HEADS, triton.next_power_of_2(group)),
        KEY_HEADS=key_heads,
        HALF=head_dim // 2,
        TILE=TILE_ROWS,
        NO_SLOT=NO_SLOT,
        TIME_END=rotary.time_end,
        HEIGHT_END=rotary.height_end,
        SCHEME=pages.scheme.value,
        IN_PAIRS=converts_in_pairs(qkv.device, pages.scheme),
        num_warps=_WARPS,
        num_stages=_STAGES,
        maxnreg=_REGISTERS,
        **overlapping(qkv.device),
    )
    combine(parts, out, output_format)


def _choose_splits(rows: int, tiles: int, device: torch.device) -> int:
    """How many parts to split contexts of up to `tiles` tiles into, for `rows` sequences · K/V
    heads: such that the programs fill the GPU's last turn too."""
    if device.type != "cuda":
        return 2
    together: int = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count

    def cost(splits: int) -> float:
        return -(-rows * splits // together) / splits * (1 + _SPLIT_COST * splits)

    return min(range(1, min(_MAX_SPLITS, tiles) + 1), key=cost)


@triton.jit(
    do_not_specialize=("positions_stride", "reach"),
    do_not_specialize_on_alignment=("positions", "bases", "new_slots", "tile_rows"),
)
def _paged_decode(
    qkv,
    cosines,
    sines,
    positions,
    bases,
    new_slots,
    tile_rows,
    tile_bases,
    tile_slots,
    tile_counts,
    k_pages,
    v_pages,
    key_scale,
    value_scale,
    key_bias,
    places,
    bias_scores,
    values,
    softmax,
    all_slots,
    qkv_stride,
    positions_stride,
    tiles_stride,
    reach,
    score_scale,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    NO_SLOT: tl.constexpr,
    TIME_END: tl.constexpr,
    HEIGHT_END: tl.constexpr,
    SCHEME: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    context = tl.load(tile_rows + sequence)
    count = tl.load(tile_counts + context)
    # A part is every so many tiles. Which are first does not depend on how many there are, so both
    # are read at once.
    tile_bases += context * tiles_stride
    tile_slots += context * tiles_stride * TILE

    HEAD_DIM: tl.constexpr = 2 * HALF
    WIDTH: tl.constexpr = HEAD_DIM if SCHEME == "16bit" else HALF
    # The type of the products: that of the pages, or in which codes are exact.
    INPUT: tl.constexpr = qkv.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 if tl.float32 == INPUT else tl.float16
    DTYPE: tl.constexpr = INPUT if SCHEME == "16bit" else EXACT
    query_head = tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    in_group = query_head < GROUP
    start = qkv + sequence.to(tl.int64) * qkv_stride
    query = start + head * GROUP * HEAD_DIM + query_head[None, :] * HEAD_DIM + pair[:, None]
    first = tl.load(query, mask=in_group[None, :], other=0.0).to(tl.float32) * score_scale
    second = tl.load(query + HALF, mask=in_group[None, :], other=0.0).to(tl.float32) * score_scale

    axis = tl.where(pair < TIME_END, 0, tl.where(pair < HEIGHT_END, 1, 2))
    position = tl.load(positions + axis * positions_stride + sequence)
    if SCHEME != "16bit":
        key_scales = tl.load(key_scale + head * HALF + pair)
        first *= key_scales[:, None]
        second *= key_scales[:, None]
    # The query at its own position, from which every tile turns it back.
    first, second = turn(first, second, cosines, sines, position[:, None], pair[:, None], HALF)
    maximum = tl.full((HEADS,), -1e30, tl.float32)
    # The sum of the softmax, a part for every row of a tile.
    totals = tl.zeros((TILE, HEADS), tl.float32)
    mixed = tl.zeros((HALF, HEADS), tl.float32)
    mixed_second = tl.zeros((HALF, HEADS), tl.float32)
    k_pages += head.to(tl.int64) * all_slots * WIDTH
    v_pages += head.to(tl.int64) * all_slots * WIDTH
    new_slot = tl.load(new_slots + sequence)
    # What a tile is, is known one tile ahead, so that its keys and values can be prefetched.
    member = tl.arange(0, TILE)
    base = tl.load(tile_bases + split)
    slots = tl.where(split < count, tl.load(tile_slots + split * TILE + member), NO_SLOT)
    if SCHEME != "16bit":
        # Where its rows stand is looked up by their slots, which are read one more tile ahead.
        place = tl.load(places + slots)
        following = split + splits
        later_slots = tile_slots + following * TILE + member
        later_slots = tl.load(later_slots, mask=following < count, other=NO_SLOT)
        table = (sequence * KEY_HEADS + head).to(tl.int64) * reach * (3 * HEADS)
        table = bias_scores + table + query_head[None, :]
    for tile in range(split, count, splits):
        turned_first, turned_second = turn(
            first, second, cosines, sines, -base, pair[:, None], HALF
        )
        visible = (slots != NO_SLOT) & (slots != new_slot)
        at = slots * WIDTH
        if SCHEME != "16bit":
            t, h, w = positions_of(place, base, reach)
            bias = tl.load(table + t[:, None] * (3 * HEADS))
            bias += tl.load(table + h[:, None] * (3 * HEADS) + HEADS)
            bias += tl.load(table + w[:, None] * (3 * HEADS) + 2 * HEADS)
            place = tl.load(places + later_slots)
            following = tile + 2 * splits
            later_slots = tile_slots + following * TILE + member
            later_slots = tl.load(later_slots, mask=following < count, other=NO_SLOT)
        following = tile + splits
        more = following < count
        slots = tl.load(tile_slots + following * TILE + member, mask=more, other=NO_SLOT)
        base = tl.load(tile_bases + following, mask=more, other=0)
        key = k_pages + at[:, None] + pair[None, :]
        value = v_pages + at[None, :] + pair[:, None]
        if SCHEME == "16bit":
            first_keys = tl.load(key, mask=visible[:, None], other=0.0)
            second_keys = tl.load(key + HALF, mask=visible[:, None], other=0.0)
            first_values = tl.load(value, mask=visible[None, :], other=0.0)
            second_values = tl.load(value + HALF, mask=visible[None, :], other=0.0)
        else:
            words = tl.load(key, mask=visible[:, None], other=0)
            first_keys, second_keys = unpack(words, SCHEME, IN_PAIRS)
            words = tl.load(value, mask=visible[None, :], other=0)
            first_values, second_values = unpack(words, SCHEME, IN_PAIRS)
        scores = tl.dot(first_keys.to(DTYPE), turned_first.to(DTYPE))
        scores = tl.dot(second_keys.to(DTYPE), turned_second.to(DTYPE), scores)
        if SCHEME != "16bit":
            scores += bias
        scores = tl.where(visible[:, None], scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, axis=0))
        weights = tl.exp2(scores - highest[None, :])
        shrink = tl.exp2(maximum - highest)
        maximum = highest
        totals = totals * shrink[None, :] + weights
        weights = weights.to(DTYPE)
        mixed = tl.dot(first_values.to(DTYPE), weights, mixed * shrink[None, :])
        mixed_second = tl.dot(second_values.to(DTYPE), weights, mixed_second * shrink[None, :])

    total = tl.sum(totals, axis=0)
    if split == splits - 1:
        # The new row: the part with the fewest tiles writes and adds it, the others pass it over.
        written = new_slot >= 0
        new_base = tl.load(bases + sequence)
        own_place = position - new_base
        new_key = start + (GROUP * KEY_HEADS + head) * HEAD_DIM + pair
        new_value = new_key + KEY_HEADS * HEAD_DIM
        first_key, second_key = turn(
            tl.load(new_key).to(tl.float32),
            tl.load(new_key + HALF).to(tl.float32),
            cosines,
            sines,
            own_place,
            pair,
            HALF,
        )
        first_value = tl.load(new_value).to(tl.float32)
        second_value = tl.load(new_value + HALF).to(tl.float32)
        if SCHEME == "16bit":
            key_scales = 1.0
            value_scales = 1.0
            score = tl.zeros((HEADS,), tl.float32)
        else:
            value_scales = tl.load(value_scale + head)
            own_bias = key_bias + head * HEAD_DIM + pair
            first_query = tl.load(query, mask=in_group[None, :], other=0.0).to(tl.float32)
            second_query = tl.load(query + HALF, mask=in_group[None, :], other=0.0).to(tl.float32)
            score = tl.sum(first_query * tl.load(own_bias)[:, None], axis=0)
            score += tl.sum(second_query * tl.load(own_bias + HALF)[:, None], axis=0)
            score *= score_scale
            new_place = packed_place(positions + sequence, positions_stride, new_base)
            tl.store(places + new_slot, new_place, mask=written & (head == 0))
        at_new = new_slot * WIDTH + pair
        first_key, second_key = write_row(
            k_pages + at_new, first_key, second_key, key_scales, written, HALF, SCHEME
        )
        first_value, second_value = write_row(
            v_pages + at_new, first_value, second_value, value_scales, written, HALF, SCHEME
        )
        turned_first, turned_second = turn(
            first, second, cosines, sines, -new_base, pair[:, None], HALF
        )
        score += tl.sum(turned_first * first_key[:, None], axis=0)
        score += tl.sum(turned_second * second_key[:, None], axis=0)
        score = tl.where(written, score, float("-inf"))
        highest = tl.maximum(maximum, score)
        weight = tl.exp2(score - highest)
        shrink = tl.exp2(maximum - highest)
        maximum = highest
        total = total * shrink + weight
        mixed = mixed * shrink[None, :] + weight[None, :] * first_value[:, None]
        mixed_second = mixed_second * shrink[None, :] + weight[None, :] * second_value[:, None]

    if SCHEME != "16bit":
        values_scale = tl.load(value_scale + head)
        mixed *= values_scale
        mixed_second *= values_scale
    head_row = (sequence * KEY_HEADS + head).to(tl.int64) * GROUP + query_head
    part = head_row * splits + split
    tl.store(softmax + 2 * part, maximum, mask=in_group)
    tl.store(softmax + 2 * part + 1, total, mask=in_group)
    target = values + part[None, :] * HEAD_DIM + pair[:, None]
    tl.store(target, mixed, mask=in_group[None, :])
    tl.store(target + HALF, mixed_second, mask=in_group[None, :])
