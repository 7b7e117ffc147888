"""Attention of many new tokens: to the rows of their context, and causally to each other.

Every program of a prefill reads the same context, and turning keys or queries in its inner loop
costs more than the products do. So the context is gathered once per layer, its keys turned to their
positions, and read by dense attention (FlashAttention-2, arXiv 2307.08691). New tokens of all heads
of one K/V head are rows of one tile. Hopper has a kernel of its own, `hopper_prefill.py`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from framesink.runtime.executors.cuda.kernels.attention_parts import (
    LOG2_E,
    Parts,
    add_tile,
    combine,
    most_blocks,
)
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.gather_context import gather_context
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping
from framesink.runtime.executors.cuda.kernels.pages import LayerPages
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable
from framesink.runtime.executors.cuda.kernels.tiles import DeviceRows
from framesink.runtime.models.quantization import CacheScheme

# Rows (tokens · heads of one K/V head) and keys per program.
_ROWS = 64
_KEYS = 64
_WARPS = 4
_STAGES = 3
# Programs that run at once on one multiprocessor, and the most parts a context is split into.
_PROGRAMS = 2
_MAX_SPLITS = 32
# What another part adds to the time.
_SPLIT_COST = 0.1
# The GPU that `hopper_prefill` is made for, and the release of Triton.
_HOPPER = (9, 0)
_GLUON_RELEASE = "3.6."


def paged_prefill(
    qkv: Tensor,
    rotary: RotaryTable,
    starts: Tensor,
    longest: int,
    rows: DeviceRows,
    pages: LayerPages,
    out: Tensor,
    output_format: OutputFormat,
    splits: int | None = None,
) -> None:
    """Attend from the new tokens of B sequences, packed one after another.

    `qkv` `[M, (H + 2·Hkv)·D]` as `rotate_and_append` left it; `starts` int32 `[B+1]`: where each
    sequence begins, and the end; `longest`: no sequence has more new tokens. `rows` are those of
    the contexts, without the new tokens, which attend to all of them, and to each other in order.
    `out` `[M, H·D]`: rows beyond the last sequence's end are undefined. Contexts are split into
    `splits` parts (on Hopper: at most so many, two at least), by default so that they fill the GPU.
    """
    heads = out.shape[1] // pages.head_dim
    if _is_hopper(qkv.device):
        # Gluon is experimental: other releases of Triton may lack these modules.
        from framesink.runtime.executors.cuda.kernels import hopper_prefill

        batch = len(starts) - 1
        if hopper_prefill.pays(qkv, longest, batch, pages.head_dim, heads, pages.key_heads):
            fp8 = pages.scheme is CacheScheme.FP8
            keys, values = gather_context(qkv, rotary, starts, longest, rows, pages, fp8)
            scale = pages.codes.value_scale if fp8 and pages.codes else None
            parts = hopper_prefill.attend(
                qkv, keys, values, starts, longest, rows.counts, heads, splits, scale
            )
            combine(parts, out, output_format)
            return
    keys, values = gather_context(qkv, rotary, starts, longest, rows, pages)
    parts = _attend(qkv, keys, values, starts, longest, rows.counts, heads, splits)
    combine(parts, out, output_format)


@cache
def _is_hopper(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and tuple(torch.cuda.get_device_capability(device)) == _HOPPER
        and triton.__version__.startswith(_GLUON_RELEASE)
    )


def _attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    longest: int,
    counts: Tensor,
    heads: int,
    splits: int | None,
) -> Parts:
    """Attend from new tokens to gathered contexts. See `hopper_prefill.attend`."""
    batch, key_heads, room, head_dim = keys.shape
    group = heads // key_heads
    blocks = triton.cdiv(longest * group, _ROWS)
    if splits is None:
        busy = key_heads * most_blocks(len(qkv), longest, batch, group, _ROWS)
        splits = _choose_splits(busy, room, qkv.device)
    parts = Parts.empty(len(qkv) * heads, splits, head_dim, qkv.device)
    _paged_prefill[(blocks, splits, batch * key_heads)](
        qkv,
        _tiled(keys),
        _tiled(values),
        starts,
        counts,
        parts.values,
        parts.softmax,
        qkv.stride(0),
        room,
        LOG2_E / head_dim**0.5,
        GROUP=group,
        ROWS=_ROWS,
        KEYS=_KEYS,
        KEY_HEADS=key_heads,
        HEAD_DIM=head_dim,
        num_warps=_WARPS,
        num_stages=_STAGES,
        **overlapping(qkv.device),
    )
    return parts


def _tiled(rows: Tensor) -> TensorDescriptor:
    """`[B, Hkv, rows, D]` as what the GPU's copy engine reads tiles from (plain loads before
    Hopper)."""
    head_dim = rows.shape[-1]
    return TensorDescriptor.from_tensor(rows.view(-1, head_dim), [_KEYS, head_dim])


def _choose_splits(programs: int, room: int, device: torch.device) -> int:
    """How many parts to split contexts into: such that `programs` · parts fill the GPU's last turn
    too."""
    if device.type != "cuda":
        return 2
    together: int = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count

    def cost(splits: int) -> float:
        return -(-programs * splits // together) / splits * (1 + _SPLIT_COST * splits)

    return min(range(1, max(1, min(_MAX_SPLITS, room // (2 * _KEYS))) + 1), key=cost)


@triton.jit(do_not_specialize=("room",), do_not_specialize_on_alignment=("starts", "counts"))
def _paged_prefill(
    qkv,
    keys,
    values,
    starts,
    counts,
    mixed_parts,
    softmax_parts,
    qkv_stride,
    room,
    score_scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    block = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    sequence = tl.program_id(2) // KEY_HEADS
    head = tl.program_id(2) % KEY_HEADS
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start
    if block * ROWS >= length * GROUP:
        return
    row = block * ROWS + tl.arange(0, ROWS)
    place = row // GROUP
    exists = place < length
    token = (start + tl.where(exists, place, 0)).to(tl.int64)
    channel = tl.arange(0, HEAD_DIM)
    key = tl.arange(0, KEYS)
    query = qkv + token * qkv_stride + (head * GROUP + row % GROUP) * HEAD_DIM
    query = tl.load(query[:, None] + channel[None, :])
    dtype: tl.constexpr = qkv.dtype.element_ty
    query = (query * score_scale).to(dtype)

    maximum = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    count = tl.load(counts + sequence)
    # What the last row of this block sees, cut into parts of whole tiles.
    seen = count + tl.minimum(length, tl.cdiv((block + 1) * ROWS, GROUP))
    share = tl.cdiv(tl.cdiv(seen, KEYS), splits) * KEYS
    begin = split * share
    end = tl.minimum(begin + share, seen)
    # Tiles of context alone need no mask.
    plain_end = tl.maximum(begin, tl.minimum(end, count // KEYS * KEYS))
    rows = tl.program_id(2) * room
    # A tile's scores are begun before the softmax of the tile ahead, and calculated beside it.
    scores = tl.dot(query, keys.load([rows + begin, 0]).T)
    for at in range(begin, plain_end, KEYS):
        following = tl.dot(query, keys.load([rows + at + KEYS, 0]).T)
        value = values.load([rows + at, 0])
        maximum, total, mixed = add_tile(scores, value, maximum, total, mixed)
        scores = following
    for at in range(plain_end, end, KEYS):
        visible = (at + key)[None, :] <= tl.minimum(count + place, end - 1)[:, None]
        scores = tl.dot(query, keys.load([rows + at, 0]).T)
        scores = tl.where(visible, scores, float("-inf"))
        value = values.load([rows + at, 0])
        maximum, total, mixed = add_tile(scores, value, maximum, total, mixed)

    part = (token * (KEY_HEADS * GROUP) + head * GROUP + row % GROUP) * splits + split
    tl.store(softmax_parts + 2 * part, maximum, mask=exists)
    tl.store(softmax_parts + 2 * part + 1, total, mask=exists)
    place_of_part = mixed_parts + part[:, None] * HEAD_DIM + channel[None, :]
    tl.store(place_of_part, mixed, mask=exists[:, None])
