"""A step's sequences as padded host arrays: what a graph over a paged context is fed with.

Everything here is integers, masks and positions; no weights and no K/V.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from framesink.runtime.arrays import AnyArray, BoolArray, Int32Array
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.models.vision_segments import MASKED

NULL_PAGE = 0
# Padding may cost this share of a group's attention work; beyond it the group is split.
MAX_PADDING = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class PaddedGroup:
    """B sequences of a step, padded to s new tokens and P pages.

    `members` are their places in the step. `block_table` int32 `[B, P]` (padded with the null
    page), `context_positions` int32 `[3, B, P·page]`, `new_positions` int32 `[3, B, s]`, `last`
    int32 `[B]`: row of each sequence's last new token. `visible` bool `[B, P·page]`: context rows
    that its new tokens may look at. The new rows that are no padding are `rows` (sequence and
    token, int `[2, T]`), and go to `slots` int32 `[T]`.
    """

    members: tuple[int, ...]
    block_table: Int32Array
    context_positions: Int32Array
    new_positions: Int32Array
    visible: BoolArray
    last: Int32Array
    rows: tuple[AnyArray, AnyArray]
    slots: Int32Array

    def mask(self, dtype: DTypeLike) -> AnyArray:
        """`[B, 1, s, P·page+s]`: 0 where a new token may look, `MASKED` elsewhere; a row of padding
        sees itself, so that its softmax is finite."""
        (count, context), new = self.visible.shape, self.new_positions.shape[2]
        mask: AnyArray = np.empty((count, 1, new, context + new), dtype)
        mask[..., :context] = np.where(self.visible[:, None, None], 0.0, MASKED)
        mask[..., context:] = np.where(np.tri(new, dtype=np.bool_), 0.0, MASKED)
        return mask


def group_by_size(batch: Sequence[SequenceInput], page_size: int) -> Iterator[tuple[int, ...]]:
    """Places of sequences that are run together: decode steps apart from prefill parts, and in
    each only as many of like size as keep padding below `MAX_PADDING`."""
    sizes = [
        (len(sequence.token_ids), len(sequence.context.block_table) * page_size)
        for sequence in batch
    ]
    order = sorted(range(len(batch)), key=lambda place: sizes[place])
    group: list[int] = []
    for place in order:
        candidate = [*group, place]
        if group and not _fits_together([sizes[member] for member in candidate]):
            yield tuple(group)
            candidate = [place]
        group = candidate
    if group:
        yield tuple(group)


def _fits_together(sizes: Sequence[tuple[int, int]]) -> bool:
    new = max(size[0] for size in sizes)
    context = max(size[1] for size in sizes)
    if new > 1 and min(size[0] for size in sizes) == 1:
        return False
    padded = len(sizes) * new * (context + new)
    return padded <= (1 + MAX_PADDING) * sum(n * (c + n) for n, c in sizes)


def pad_group(
    batch: Sequence[SequenceInput], members: tuple[int, ...], page_size: int, *, pages: int = 1
) -> PaddedGroup:
    """Lay out the sequences of one group over at least `pages` pages."""
    sequences = [batch[place] for place in members]
    lengths = np.array([len(sequence.token_ids) for sequence in sequences], np.int32)
    count, new = len(sequences), int(lengths.max())
    pages = max(pages, *(len(sequence.context.block_table) for sequence in sequences))
    context = pages * page_size

    block_table = np.full((count, pages), NULL_PAGE, np.int32)
    context_positions = np.zeros((3, count, context), np.int32)
    new_positions = np.zeros((3, count, new), np.int32)
    visible = np.zeros((count, context), np.bool_)
    for row, sequence in enumerate(sequences):
        view = sequence.context
        block_table[row, : len(view.block_table)] = view.block_table
        context_positions[:, row, : view.positions.shape[1]] = view.positions
        new_positions[:, row, : lengths[row]] = sequence.positions
        visible[row, : len(view.valid)] = view.valid
    return PaddedGroup(
        members=members,
        block_table=block_table,
        context_positions=context_positions,
        new_positions=new_positions,
        visible=visible,
        last=lengths - 1,
        rows=(
            np.repeat(np.arange(count), lengths),
            np.concatenate([np.arange(n) for n in lengths]),
        ),
        slots=np.concatenate([sequence.slots for sequence in sequences]),
    )
