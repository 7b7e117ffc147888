"""The two ends of a decode step: the tokens that go in, and those that come out."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.base import NEXT_TOKEN
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping
from framesink.runtime.executors.cuda.kernels.tiles import TILE_ROWS, DeviceTiles

# The choice among logits of which the largest is not a number.
NOT_FINITE = -1
_HIDDEN = 1024
_LOGITS = 2048
_NOWHERE = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class TileChanges:
    """How B contexts change by their newest rows, one tile each: which `tiles` int32 `[B]`, their
    `bases` int32 `[B]` and `slots` int32 `[64, B]`, and how many tiles there are now, `counts`
    int32 `[B]`. All are of one stride."""

    tiles: Tensor
    bases: Tensor
    slots: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Choosing:
    """What is kept for choosing tokens of a vocabulary: `allowed` uint8 `[vocab]` is 0 for tokens
    that are never chosen, and `last_tokens` int32 `[R]` takes the choice of each context. Used on
    one CUDA stream at a time."""

    allowed: Tensor
    last_tokens: Tensor
    # How many parts of a row are searched; every launch leaves zeros.
    arrivals: Tensor

    @classmethod
    def make(cls, vocabulary: int, contexts: int, device: torch.device) -> "Choosing":
        """All tokens are allowed."""
        return cls(
            torch.ones(vocabulary, dtype=torch.uint8, device=device),
            torch.zeros(contexts, dtype=torch.int32, device=device),
            torch.zeros(contexts, dtype=torch.int32, device=device),
        )


def begin_step(
    tokens: Tensor,
    last_tokens: Tensor,
    embedding: Tensor,
    tiles: DeviceTiles,
    changes: TileChanges,
    hidden: Tensor,
) -> None:
    """Apply `changes` to the contexts `tiles.rows`, and write the embeddings of `tokens` int32
    `[B]` into `hidden` `[B, n]`, rows of `embedding` `[vocab, n]`.

    A token that is `NEXT_TOKEN` is the context's entry of `last_tokens` int32 `[R]`.
    """
    batch, size = hidden.shape
    _begin_step[(batch, triton.cdiv(size, _HIDDEN))](
        tokens,
        last_tokens,
        embedding,
        tiles.rows,
        tiles.bases,
        tiles.slots,
        tiles.counts,
        changes.tiles,
        changes.bases,
        changes.slots,
        changes.counts,
        hidden,
        size,
        tiles.bases.stride(0),
        changes.slots.stride(0),
        TILE=TILE_ROWS,
        NEXT_TOKEN=NEXT_TOKEN,
        BLOCK=_HIDDEN,
        num_warps=4,
        **overlapping(hidden.device),
    )


def choose_likeliest(logits: Tensor, rows: Tensor, choosing: Choosing, tokens: Tensor) -> None:
    """Write the likeliest allowed token of each row of `logits` `[B, vocab]` into `tokens` int32
    `[B]` and into the last tokens of the contexts `rows` int32 `[B]`; of equals the lowest.

    `NOT_FINITE` where the largest logit is not a number. B is at most the number of contexts.
    """
    batch, vocabulary = logits.shape
    splits = triton.cdiv(vocabulary, _LOGITS)
    values = torch.empty((batch, splits), dtype=torch.float32, device=logits.device)
    places = torch.empty((batch, splits), dtype=torch.int32, device=logits.device)
    _choose_likeliest[(splits, batch)](
        logits,
        choosing.allowed,
        rows,
        values,
        places,
        choosing.arrivals,
        choosing.last_tokens,
        tokens,
        vocabulary,
        splits,
        SPLITS=triton.next_power_of_2(splits),
        BLOCK=_LOGITS,
        NOT_FINITE=NOT_FINITE,
        NOWHERE=_NOWHERE,
        num_warps=4,
        **overlapping(logits.device),
    )


@triton.jit(
    do_not_specialize=("slots_stride",),
    do_not_specialize_on_alignment=(
        "tokens",
        "rows",
        "new_tiles",
        "new_bases",
        "new_slots",
        "new_counts",
    ),
)
def _begin_step(
    tokens,
    last_tokens,
    embedding,
    rows,
    bases,
    slots,
    counts,
    new_tiles,
    new_bases,
    new_slots,
    new_counts,
    hidden,
    size,
    tiles_stride,
    slots_stride,
    TILE: tl.constexpr,
    NEXT_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    sequence = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.load(rows + sequence)
    token = tl.load(tokens + sequence)
    if token == NEXT_TOKEN:
        # A choice that failed is fed as any token: its step is thrown away.
        token = tl.maximum(tl.load(last_tokens + row), 0)
    column = part * BLOCK + tl.arange(0, BLOCK)
    exists = column < size
    value = tl.load(embedding + token.to(tl.int64) * size + column, mask=exists, other=0.0)
    tl.store(hidden + sequence.to(tl.int64) * size + column, value, mask=exists)
    if part == 0:
        place = row.to(tl.int64) * tiles_stride + tl.load(new_tiles + sequence)
        member = tl.arange(0, TILE)
        tl.store(bases + place, tl.load(new_bases + sequence))
        tl.store(
            slots + place * TILE + member, tl.load(new_slots + member * slots_stride + sequence)
        )
        tl.store(counts + row, tl.load(new_counts + sequence))


@triton.jit(do_not_specialize_on_alignment=("rows",))
def _choose_likeliest(
    logits,
    allowed,
    rows,
    values,
    places,
    arrivals,
    last_tokens,
    tokens,
    vocabulary,
    splits,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    NOWHERE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    split = tl.program_id(0)
    sequence = tl.program_id(1)
    place = split * BLOCK + tl.arange(0, BLOCK)
    exists = place < vocabulary
    permitted = tl.load(allowed + place, mask=exists, other=0) != 0
    start = logits + sequence.to(tl.int64) * vocabulary
    value = tl.load(start + place, mask=exists, other=0.0).to(tl.float32)
    # What is not a number wins, as infinity does.
    value = tl.where(value == value, value, float("inf"))
    value = tl.where(permitted, value, float("-inf"))
    best = tl.max(value, axis=0)
    where = tl.min(tl.where(value == best, place, NOWHERE), axis=0)
    tl.store(values + sequence * splits + split, best)
    tl.store(places + sequence * splits + split, where)
    # The last program to arrive looks through all parts.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals + sequence, 1, sem="acq_rel")
    if arrived == splits - 1:
        tl.store(arrivals + sequence, 0)
        part = tl.arange(0, SPLITS)
        known = part < splits
        at = sequence * splits + part
        found = tl.load(values + at, mask=known, other=float("-inf"), cache_modifier=".cg")
        tokens_found = tl.load(places + at, mask=known, other=NOWHERE, cache_modifier=".cg")
        largest = tl.max(found, axis=0)
        token = tl.min(tl.where(found == largest, tokens_found, NOWHERE), axis=0)
        finite = (largest > float("-inf")) & (largest < float("inf"))
        token = tl.where(finite, token, NOT_FINITE)
        tl.store(tokens + sequence, token)
        tl.store(last_tokens + tl.load(rows + sequence), token)
