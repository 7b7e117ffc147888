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

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Partial attention of R rows (token · heads + head): `values` float32 `[R, splits, D]`, not
    divided by their sum, and `softmax` float32 `[R, splits, 2]`: maximum (of scores · log2 e) and
    sum."""

    values: Tensor
    softmax: Tensor

    @classmethod
    def empty(cls, rows: int, splits: int, head_dim: int, device: torch.device) -> Self:
        """Parts yet to be written."""
        return cls(
            torch.empty((rows, splits, head_dim), dtype=torch.float32, device=device),
            torch.empty((rows, splits, 2), dtype=torch.float32, device=device),
        )


def combine(parts: Parts, out: Tensor, output_format: OutputFormat) -> None:
    """Put parts together into `out` `[M, H·D]`. Rows without any context become 0."""
    rows, splits, head_dim = parts.values.shape
    smoothing = output_format.smoothing
    _combine[(rows,)](
        parts.values,
        parts.softmax,
        out,
        out if smoothing is None else smoothing,
        output_format.scale,
        out.shape[1] // head_dim,
        splits,
        SPLITS=triton.next_power_of_2(splits),
        HEAD_DIM=head_dim,
        SMOOTH=smoothing is not None,
        num_warps=4,
    )


@triton.jit
def _combine(
    values,
    softmax,
    out,
    smoothing,
    out_scale,
    heads,
    splits,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    channel = tl.arange(0, HEAD_DIM)
    exists = split < splits
    part = row * splits + split
    maximum = tl.load(softmax + 2 * part, mask=exists, other=-1e30)
    total = tl.load(softmax + 2 * part + 1, mask=exists, other=0.0)
    weight = tl.exp2(maximum - tl.max(maximum, axis=0))
    total = tl.sum(total * weight, axis=0)
    partial = tl.load(
        values + part[:, None] * HEAD_DIM + channel[None, :], mask=exists[:, None], other=0.0
    )
    whole = tl.sum(partial * weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    if SMOOTH:
        whole *= tl.load(smoothing + (row % heads) * HEAD_DIM + channel)
    codes = encode(whole, out_scale, out.dtype.element_ty)
    tl.store(out + row * HEAD_DIM + channel, codes)


@triton.jit
def tile_rows(
    tile_pages,
    tile_masks,
    tile,
    head,
    KEY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Where the rows of a tile begin in the pages (int64 `[TILE]`), and which of them count."""
    row = tl.arange(0, TILE)
    entry = tile * (TILE // PAGE) + row // PAGE
    page = tl.load(tile_pages + entry).to(tl.int64)
    visible = ((tl.load(tile_masks + entry) >> (row % PAGE)) & 1) != 0
    return ((page * KEY_HEADS + head) * PAGE + row % PAGE) * HEAD_DIM, visible
