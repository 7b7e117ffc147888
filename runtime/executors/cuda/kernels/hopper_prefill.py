"""Attention of many new tokens on Hopper, its pipeline written out in Gluon.

Three groups of warps share a multiprocessor, as in FlashAttention-3 (arXiv 2407.08608): one copies
tiles of keys and values, two multiply, 64 rows each, so that one makes its softmax while the other
multiplies; and the values of a tile are multiplied beside the softmax of the tile after it.
`tile_shares.py` says which tiles a multiprocessor takes.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from framesink.runtime.executors.cuda.kernels.attention_parts import LOG2_E, Parts, most_blocks
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping
from framesink.runtime.executors.cuda.kernels.tile_shares import (
    BLOCK_ROWS,
    TILE_KEYS,
    next_segment,
    own_share,
)

HEAD_DIM = 128
# Rows of one group of warps, and how many tiles of keys and of values are held at once.
_GROUP_ROWS = gl.constexpr(64)
_STAGES = gl.constexpr(2)
_CHANNELS = gl.constexpr(HEAD_DIM)
_WARPS = 4
# Registers of a thread: of the launch, and of those that multiply and copy.
_REGISTERS = 168
_MULTIPLYING = gl.constexpr(240)
_COPYING = gl.constexpr(24)
# The most parts that a block of rows is cut into.
_MAX_SPLITS = 32
_TYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}
# Weights of FP8 products are up to two to this: codes end at 448, and small ones vanish.
_LIFT = gl.constexpr(8.0)
_await_inputs = gluon.jit(await_inputs.fn)


def pays(qkv: Tensor, longest: int, batch: int, head_dim: int, heads: int, key_heads: int) -> bool:
    """Whether this kernel takes such prompts, and is faster: few tokens are better attended from in
    smaller tiles. See `attend` for the arguments."""
    if qkv.dtype.itemsize != 2 or head_dim != HEAD_DIM:
        return False
    programs = torch.cuda.get_device_properties(qkv.device).multi_processor_count
    group = heads // key_heads
    blocks = key_heads * most_blocks(len(qkv), longest, batch, group, BLOCK_ROWS.value)
    return 2 * blocks >= int(programs)


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    longest: int,
    counts: Tensor,
    heads: int,
    splits: int | None = None,
    value_scale: Tensor | None = None,
) -> Parts:
    """Attend from new tokens to gathered contexts, in at most `splits` parts (two at least).

    `keys` and `values` `[B, Hkv, R, 128]`, R a multiple of 128, as `gather_context` returns them;
    `counts` int32 `[B]`: rows of contexts without new tokens. For the rest see `paged_prefill`.
    Parts that a row was not cut into have a sum of 0, and values that were not written.

    `values` may be FP8 codes as `gather_context` lays them out, under `value_scale`, float32
    `[Hkv]`. Their products are made in FP8, weights rounded to it too.
    """
    batch, key_heads, room, head_dim = keys.shape
    group = heads // key_heads
    programs = torch.cuda.get_device_properties(qkv.device).multi_processor_count
    if splits is None:
        blocks = key_heads * most_blocks(len(qkv), longest, batch, group, BLOCK_ROWS.value)
        splits = min(triton.cdiv(programs, blocks) + 1, _MAX_SPLITS)
    splits = max(splits, 2)
    parts = Parts.empty(len(qkv) * heads, splits, head_dim, qkv.device)
    _attend[(programs,)](
        qkv,
        _tiled(keys, [TILE_KEYS.value, HEAD_DIM]),
        _tiled(
            values,
            [TILE_KEYS.value, HEAD_DIM] if value_scale is None else [HEAD_DIM, TILE_KEYS.value],
        ),
        starts,
        counts,
        parts.values,
        parts.softmax,
        parts.softmax if value_scale is None else value_scale,
        qkv.stride(0),
        room,
        batch,
        splits,
        LOG2_E / head_dim**0.5,
        GROUP=group,
        KEY_HEADS=key_heads,
        num_warps=_WARPS,
        maxnreg=_REGISTERS,
        **overlapping(qkv.device),
    )
    return parts


def _tiled(matrices: Tensor, tile: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(tile, _TYPES[matrices.dtype])
    return TensorDescriptor.from_tensor(matrices.flatten(0, -2), tile, layout)


@gluon.jit(
    do_not_specialize=("room", "batch", "splits"),
    do_not_specialize_on_alignment=("starts", "counts", "value_scale"),
)
def _attend(
    qkv,
    keys,
    values,
    starts,
    counts,
    mixed_parts,
    softmax_parts,
    value_scale,
    qkv_stride,
    room,
    batch,
    splits,
    score_scale,
    GROUP: gl.constexpr,
    KEY_HEADS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    _await_inputs(OVERLAP)
    dtype: gl.constexpr = keys.dtype
    QUERIES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_GROUP_ROWS, _CHANNELS], dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [2, _GROUP_ROWS, _CHANNELS], QUERIES)
    k_tiles = gl.allocate_shared_memory(dtype, [_STAGES, TILE_KEYS, _CHANNELS], keys.layout)
    shape: gl.constexpr = [_STAGES, values.block_type.shape[0], values.block_type.shape[1]]
    v_tiles = gl.allocate_shared_memory(values.dtype, shape, values.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    for stage in gl.static_range(_STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        # Both groups that multiply are done with it.
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)

    work = (starts, counts, batch, splits)
    tiles = (k_tiles, v_tiles, k_full, k_empty, v_full, v_empty)
    inputs = (qkv, qkv_stride, score_scale)
    outputs = (mixed_parts, softmax_parts, value_scale)
    gl.warp_specialize(
        [
            (_multiply, (work, inputs, outputs, queries, tiles, 0, GROUP, KEY_HEADS)),
            (_multiply, (work, inputs, outputs, queries, tiles, 1, GROUP, KEY_HEADS)),
            (_copy, (work, keys, values, room, tiles, GROUP, KEY_HEADS)),
        ],
        [4, 1],
        [_MULTIPLYING, _COPYING],
    )


@gluon.jit
def _copy(work, keys, values, room, tiles, GROUP: gl.constexpr, KEY_HEADS: gl.constexpr):
    """Copy tiles in the order in which `_multiply` wants them, as far ahead as there is room."""
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = tiles
    at, end, share = own_share(work, GROUP, KEY_HEADS)
    slot = 0
    # A new barrier passes for one whose phase 1 is over.
    phase = 1
    while at < end:
        sequence, head, _, first, amount, _, _, at = next_segment(
            work, at, end, share, GROUP, KEY_HEADS
        )
        matrix = sequence * KEY_HEADS + head
        for tile in range(amount):
            row = (first + tile) * TILE_KEYS
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), keys.block_type.nbytes)
            tma.async_copy_global_to_shared(
                keys, [matrix * room + row, 0], k_full.index(slot), k_tiles.index(slot)
            )
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), values.block_type.nbytes)
            if values.dtype == gl.float8e4nv:
                place = [matrix * _CHANNELS, row]
            else:
                place = [matrix * room + row, 0]
            tma.async_copy_global_to_shared(values, place, v_full.index(slot), v_tiles.index(slot))
            slot, phase = _advance(slot, phase)


@gluon.jit
def _multiply(
    work,
    inputs,
    outputs,
    queries,
    tiles,
    WARP_GROUP: gl.constexpr,
    GROUP: gl.constexpr,
    KEY_HEADS: gl.constexpr,
):
    """Attend from half of the rows of each block."""
    starts, counts, _, splits = work
    qkv, qkv_stride, score_scale = inputs
    mixed_parts, softmax_parts, value_scale = outputs
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = tiles
    dtype: gl.constexpr = qkv.dtype.element_ty
    CODES: gl.constexpr = v_tiles.dtype == gl.float8e4nv
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KEYS, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, _CHANNELS, 32 if CODES else 16]
    )
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, PRODUCT)
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    query_tile = queries.index(WARP_GROUP)
    at, end, share = own_share(work, GROUP, KEY_HEADS)
    slot = _STAGES - 1
    phase = 1
    while at < end:
        sequence, head, block, first, amount, part, parts_end, at = next_segment(
            work, at, end, share, GROUP, KEY_HEADS
        )
        start = gl.load(starts + sequence)
        length = gl.load(starts + sequence + 1) - start
        count = gl.load(counts + sequence)
        first_row = block * BLOCK_ROWS + WARP_GROUP * _GROUP_ROWS

        row = first_row + gl.arange(0, _GROUP_ROWS, gl.SliceLayout(1, LOADED))
        channel = gl.arange(0, _CHANNELS, gl.SliceLayout(0, LOADED))
        token = (start + gl.where(row // GROUP < length, row // GROUP, 0)).to(gl.int64)
        query = qkv + token * qkv_stride + (head * GROUP + row % GROUP) * _CHANNELS
        query = gl.load(query[:, None] + channel[None, :])
        query = (query * score_scale).to(dtype)
        # All warps are done with the block before.
        gl.thread_barrier()
        query_tile.store(query)
        fence_async_shared()

        row = first_row + gl.arange(0, _GROUP_ROWS, OF_ROWS)
        place = row // GROUP
        exists = place < length
        visible_end = count + gl.minimum(place + 1, length)
        # Tiles that the block's first row sees whole need no mask.
        plain = (count + gl.minimum(block * BLOCK_ROWS // GROUP + 1, length)) // TILE_KEYS - first
        plain = gl.maximum(gl.minimum(plain, amount), 1)

        slot, phase = _advance(slot, phase)
        mbarrier.wait(k_full.index(slot), phase)
        scores = _begin_scores(query_tile, k_tiles.index(slot), PRODUCT)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        scores = _mask(scores, first, visible_end, PRODUCT)
        maximum = gl.maximum(gl.max(scores, 1), -1e30)
        exponentials = _exponentials(scores, maximum, CODES)
        total = gl.sum(exponentials, 1)
        mixed = gl.zeros([_GROUP_ROWS, _CHANNELS], gl.float32, MIXED)
        next_slot, next_phase = _advance(slot, phase)
        mbarrier.wait(k_full.index(next_slot), next_phase, pred=amount > 1)
        state = (_kept(exponentials, dtype, MIXED, CODES), maximum, total, mixed, slot, phase)
        for tile in range(1, plain):
            state = _add_tile(
                state, query_tile, first + tile, tile + 1 < amount, visible_end, tiles, dtype, False
            )
        for tile in range(plain, amount):
            state = _add_tile(
                state, query_tile, first + tile, tile + 1 < amount, visible_end, tiles, dtype, True
            )
        kept, maximum, total, mixed, slot, phase = state
        weights = _weights(kept, MIXED, CODES)
        mbarrier.wait(v_full.index(slot), phase)
        mixed = _begin_values(weights, v_tiles.index(slot), mixed)
        mixed = warpgroup_mma_wait(0, deps=(mixed,))
        mbarrier.arrive(v_empty.index(slot), count=1)

        token = (start + gl.where(exists, place, 0)).to(gl.int64)
        result = (token * (KEY_HEADS * GROUP) + head * GROUP + row % GROUP) * splits
        softmax = softmax_parts + 2 * (result + part)
        gl.store(softmax, maximum, mask=exists)
        gl.store(softmax + 1, total, mask=exists)
        for _ in range(part + 1, parts_end):
            softmax += 2
            gl.store(softmax, gl.full_like(maximum, -1e30), mask=exists)
            gl.store(softmax + 1, gl.zeros_like(total), mask=exists)
        if CODES:
            mixed *= gl.load(value_scale + head)
        channel = gl.arange(0, _CHANNELS, gl.SliceLayout(0, MIXED))
        result = gl.convert_layout(result + part, gl.SliceLayout(1, MIXED))
        exists = gl.convert_layout(exists, gl.SliceLayout(1, MIXED))
        target = mixed_parts + result[:, None] * _CHANNELS + channel[None, :]
        gl.store(target, mixed, mask=exists[:, None])


@gluon.jit
def _add_tile(
    state,
    query_tile,
    tile,
    more,
    visible_end,
    tiles,
    dtype: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Multiply keys of this tile and values of the tile before, and make the tile's softmax beside
    the latter. The tile's keys are there already; where there are `more`, the next one's are
    awaited."""
    kept, maximum, total, mixed, slot, phase = state
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = tiles
    CODES: gl.constexpr = v_tiles.dtype == gl.float8e4nv
    PRODUCT: gl.constexpr = maximum.type.layout.parent
    MIXED: gl.constexpr = mixed.type.layout
    k_slot, k_phase = _advance(slot, phase)
    later_slot, later_phase = _advance(k_slot, k_phase)
    weights = _weights(kept, MIXED, CODES)
    scores = _begin_scores(query_tile, k_tiles.index(k_slot), PRODUCT)
    mbarrier.wait(v_full.index(slot), phase)
    mixed = _begin_values(weights, v_tiles.index(slot), mixed)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(k_slot), count=1)
    if MASKED:
        scores = _mask(scores, tile, visible_end, PRODUCT)
    highest = gl.maximum(maximum, gl.max(scores, 1))
    exponentials = _exponentials(scores, highest, CODES)
    shrink = gl.exp2(maximum - highest)
    total = total * shrink + gl.sum(exponentials, 1)
    # This wait has a loop in it, over which the compiler does not move the softmax: without it, it
    # would await the product first.
    mbarrier.wait(k_full.index(later_slot), later_phase, pred=more)
    mixed, exponentials = warpgroup_mma_wait(0, deps=(mixed, exponentials))
    mbarrier.arrive(v_empty.index(slot), count=1)
    mixed = mixed * gl.convert_layout(shrink, gl.SliceLayout(1, MIXED))[:, None]
    return _kept(exponentials, dtype, MIXED, CODES), highest, total, mixed, k_slot, k_phase


@gluon.jit
def _begin_scores(query_tile, k_tile, PRODUCT: gl.constexpr):
    zeros = gl.zeros([_GROUP_ROWS, TILE_KEYS], gl.float32, PRODUCT)
    return warpgroup_mma(query_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _begin_values(weights, v_tile, mixed):
    if v_tile.dtype == gl.float8e4nv:
        v_tile = v_tile.permute((1, 0))
    return warpgroup_mma(weights, v_tile, mixed, is_async=True)


@gluon.jit
def _exponentials(scores, maximum, CODES: gl.constexpr):
    if CODES:
        maximum = maximum - _LIFT
    return gl.exp2(scores - maximum[:, None])


@gluon.jit
def _kept(exponentials, dtype: gl.constexpr, MIXED: gl.constexpr, CODES: gl.constexpr):
    """The weights of a tile until its values are multiplied. Bytes would be kept one by one."""
    if CODES:
        kept = exponentials
    else:
        kept = gl.convert_layout(exponentials.to(dtype), gl.DotOperandLayout(0, MIXED, 2))
    return kept


@gluon.jit
def _weights(kept, MIXED: gl.constexpr, CODES: gl.constexpr):
    """The left side of the product with values, which a thread has in its registers already."""
    if CODES:
        # In the order in which `gather_context` stores rows.
        kept = gl.reshape(kept, [_GROUP_ROWS, TILE_KEYS // 16, 2, 4, 2])
        kept = gl.reshape(gl.permute(kept, [0, 1, 3, 2, 4]), [_GROUP_ROWS, TILE_KEYS])
        kept = gl.convert_layout(kept, gl.DotOperandLayout(0, MIXED, 4), assert_trivial=True)
        kept = gl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,r,r,r,r",
            [kept],
            dtype=gl.float8e4nv,
            is_pure=False,
            pack=4,
        )
    return kept


@gluon.jit
def _mask(scores, tile, visible_end, PRODUCT: gl.constexpr):
    key = tile * TILE_KEYS + gl.arange(0, TILE_KEYS, gl.SliceLayout(0, PRODUCT))
    return gl.where(key[None, :] < visible_end[:, None], scores, float("-inf"))


@gluon.jit
def _advance(slot, phase):
    """The slot after this one, and the phase its barriers will be in."""
    wraps = slot == _STAGES - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)
