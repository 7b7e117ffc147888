"""What decode and prefill attention share: parts of a context, and how they are put together.

A context is split over programs. Each leaves the part's weighted values and the maximum and sum of
its softmax, from which the whole is put together (flash-decoding; softmax as in arXiv 1805.02867).
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.formats import OutputFormat, encode
from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping

LOG2_E = 1.4426950408889634
# Values that one program puts together, and how many channels of a row if it has many parts.
_PROGRAM_SIZE = 8192
_FEW_SPLITS = 8
_CHANNELS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Partial attention of R rows (token · heads + head): `values` float32 `[R, splits, D]`, not
    divided by their sum, and `softmax` float32 `[R, splits, 2]`: maximum (of scores · log2 e) and
    sum. Where the sum is 0, values need not be written."""

    values: Tensor
    softmax: Tensor

    @classmethod
    def empty(cls, rows: int, splits: int, head_dim: int, device: torch.device) -> Self:
        """Parts yet to be written."""
        return cls(
            torch.empty((rows, splits, head_dim), dtype=torch.float32, device=device),
            torch.empty((rows, splits, 2), dtype=torch.float32, device=device),
        )


def most_blocks(tokens: int, longest: int, batch: int, group: int, block_rows: int) -> int:
    """How many blocks of `block_rows` rows (tokens · `group` heads of one K/V head) the new tokens
    of `batch` sequences are, at most: `tokens` together, no sequence more than `longest`."""
    each = triton.cdiv(longest * group, block_rows)
    return int(min(batch * each, triton.cdiv(tokens * group, block_rows) + batch))


def combine(parts: Parts, out: Tensor, output_format: OutputFormat) -> None:
    """Put parts together into `out` `[M, H·D]`. Rows without any context become 0."""
    rows, splits, head_dim = parts.values.shape
    smoothing = output_format.smoothing
    padded = triton.next_power_of_2(splits)
    # Few rows are spread over many programs, and many rows over few.
    channels = head_dim if padded <= _FEW_SPLITS else min(_CHANNELS, head_dim)
    together = max(1, _PROGRAM_SIZE // (padded * channels))
    _combine[(triton.cdiv(rows, together), head_dim // channels)](
        parts.values,
        parts.softmax,
        out,
        out if smoothing is None else smoothing,
        output_format.scale,
        rows,
        out.shape[1] // head_dim,
        splits,
        ROWS=together,
        SPLITS=padded,
        HEAD_DIM=head_dim,
        CHANNELS=channels,
        SMOOTH=smoothing is not None,
        num_warps=4,
        **overlapping(out.device),
    )


@triton.jit(do_not_specialize=("rows", "splits"))
def _combine(
    values,
    softmax,
    out,
    smoothing,
    out_scale,
    rows,
    heads,
    splits,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.arange(0, SPLITS)
    part = row.to(tl.int64)[:, None] * splits + split[None, :]
    exists = (row < rows)[:, None] & (split < splits)[None, :]
    maximum = tl.load(softmax + 2 * part, mask=exists, other=-1e30)
    total = tl.load(softmax + 2 * part + 1, mask=exists, other=0.0)
    weight = tl.exp2(maximum - tl.max(maximum, axis=1)[:, None])
    written = (total > 0.0)[:, :, None]
    total = tl.sum(total * weight, axis=1)[:, None]
    partial = tl.load(
        values + part[:, :, None] * HEAD_DIM + channel[None, None, :],
        mask=exists[:, :, None],
        other=0.0,
    )
    partial = tl.where(written, partial * weight[:, :, None], 0.0)
    whole = tl.sum(partial, axis=1) / tl.where(total > 0.0, total, 1.0)
    place = row[:, None] * HEAD_DIM + channel[None, :]
    if SMOOTH:
        whole *= tl.load(smoothing + place % (heads * HEAD_DIM))
    codes = encode(whole, out_scale, out.dtype.element_ty)
    tl.store(out + place, codes, mask=(row < rows)[:, None])


@triton.jit
def add_tile(scores, value, maximum, total, mixed):
    """One step of the softmax over tiles: `scores` `[ROWS, TILE]` with -inf where nothing is seen,
    `value` `[TILE, D]`."""
    highest = tl.maximum(maximum, tl.max(scores, axis=1))
    weights = tl.exp2(scores - highest[:, None])
    shrink = tl.exp2(maximum - highest)
    total = total * shrink + tl.sum(weights, axis=1)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * shrink[:, None])
    return highest, total, mixed
