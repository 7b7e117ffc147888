"""Attention on pages against dense attention in float64.

On a GPU in 16 bits; without one in Triton's interpreter, in float32.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from reference.paged_contexts import (
    THETA,
    PagedRows,
    Rows,
    Sizes,
    dense_attention,
    joined,
)
from reference.triton_device import DEVICE, HAS_GPU
from torch import Tensor

from framesink.runtime.arrays import AnyArray
from framesink.runtime.executors.cuda.kernels.append_rows import rotate_and_append
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.paged_decode import paged_decode
from framesink.runtime.executors.cuda.kernels.paged_prefill import paged_prefill
from framesink.runtime.executors.cuda.kernels.pages import LayerPages
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable
from framesink.runtime.executors.cuda.kernels.tiles import DeviceRows, DeviceTiles, TileTable

SMALL = Sizes(heads=6, key_heads=2, head_dim=32, page_size=8, sections=(4, 6, 6))
LARGE = Sizes(heads=28, key_heads=4, head_dim=128, page_size=16, sections=(16, 24, 24))
WIDE = Sizes(heads=4, key_heads=4, head_dim=64, page_size=32, sections=(8, 12, 12))
DTYPES = (torch.bfloat16, torch.float16) if HAS_GPU else (torch.float32,)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Triton's interpreter takes its time.
SPANS = 8 if HAS_GPU else 3
NEW_TOKENS = (150, 1, 9) if HAS_GPU else (24, 1, 5)
ALL_SIZES = [SMALL, WIDE, LARGE] if HAS_GPU else [SMALL, WIDE]
CASES = [(sizes, splits) for sizes in ALL_SIZES for splits in (1, 3, None)]
if not HAS_GPU:
    CASES = [(SMALL, 1), (SMALL, None), (WIDE, 3)]


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """A context, and new tokens after it that are the last of `rows`."""

    rows: Rows
    new: int

    @property
    def context(self) -> Rows:
        return self.rows.part(0, len(self.rows.slots) - self.new)

    @property
    def newest(self) -> Rows:
        return self.rows.part(len(self.rows.slots) - self.new, len(self.rows.slots))


def random_sequences(
    pool: PagedRows, generator: np.random.Generator, new_tokens: tuple[int, ...], spans: int
) -> list[Sequence]:
    """Sequences of text and vision spans in two lanes each, some evicted, some cut in the middle.
    All share their first span, whose last page the others' rows never join."""
    shared = pool.write("shared", int(generator.integers(1, 40)), vision=False)
    sequences = []
    for index, new in enumerate(new_tokens):
        kept = [shared]
        for turn in range(spans):
            vision = bool(turn % 2)
            size = int(generator.integers(2, 90))
            span = pool.write(f"{index} {vision}", size, vision=vision)
            fate = generator.random()
            if fate < 0.25:
                continue
            kept.append(span.part(size // 2, size) if fate < 0.5 and not vision else span)
        # What is new spans two spans and two lanes, if it is more than one token.
        head = new // 3
        if head:
            kept.append(pool.write(f"{index} True", head, vision=True))
        kept.append(pool.write(f"{index} False", new - head, vision=False))
        sequences.append(Sequence(joined(kept), new))
    return sequences


def tables_of(
    contexts: list[Rows], sizes: Sizes, generator: np.random.Generator
) -> list[TileTable]:
    """The tiles of several contexts, and of one that is empty."""
    tables = [TileTable(sizes.page_size) for _ in range(len(contexts) + 1)]
    for table, rows in zip(tables, contexts, strict=False):
        if len(rows.slots):
            order = generator.permutation(len(np.unique(rows.slots // sizes.page_size)))
            table.rebuild(rows.view(sizes.page_size, order))
    return tables


def stack(arrays: list[AnyArray]) -> Tensor:
    """Arrays of unlike lengths, filled up with what must not be read."""
    longest = max(len(array) for array in arrays) + 1
    stacked = np.full((len(arrays), longest, *arrays[0].shape[1:]), 1 << 30, np.int32)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return to_device(stacked)


def device_tiles(tables: list[TileTable]) -> DeviceTiles:
    """The tables in another order than the sequences they belong to."""
    stored = tables[::-1]
    return DeviceTiles(
        stack([table.bases[: table.count] for table in stored]),
        stack([table.slots[: table.count] for table in stored]),
        to_device(np.array([table.count for table in stored], np.int32)),
        to_device(np.arange(len(tables), dtype=np.int32)[::-1]),
    )


def device_rows(tables: list[TileTable]) -> DeviceRows:
    slots, bases = zip(*(table.rows() for table in tables), strict=True)
    counts = np.array([len(row) for row in slots], np.int32)
    return DeviceRows(stack(list(slots)), stack(list(bases)), to_device(counts))


def to_device(array: AnyArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


class Run:
    """Appends the new tokens of sequences and attends from them."""

    def __init__(
        self, sizes: Sizes, sequences: list[Sequence], pool: PagedRows, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(len(sequences))
        self.sizes, self.sequences, self.pool, self.dtype = sizes, sequences, pool, dtype
        # Rows that are padding come last; they belong to no sequence.
        self.newest = [sequence.newest for sequence in sequences]
        self.slots = np.concatenate([*(rows.slots for rows in self.newest), [-1]])
        self.bases = np.concatenate([*(rows.bases for rows in self.newest), [0]])
        self.positions = np.concatenate(
            [*(rows.positions for rows in self.newest), np.zeros((3, 1))], axis=1
        )
        count = len(self.slots)
        shape = (count, sizes.heads, sizes.head_dim)
        self.queries = torch.randn(shape, generator=generator, dtype=torch.float64)
        taken = torch.from_numpy(self.slots).long().clamp(min=0)
        self.qkv = torch.cat(
            [t.flatten(1) for t in (self.queries, pool.keys[taken], pool.values[taken])], dim=1
        ).to(DEVICE, dtype)
        self.rotary = RotaryTable.make(sizes.head_dim, THETA, sizes.sections, 4096, DEVICE)
        self.stored = tuple(stored.to(DEVICE) for stored in pool.stored(dtype))
        self.pages = LayerPages(*(stored.clone() for stored in self.stored))
        self.out = torch.full(
            (count, sizes.heads * sizes.head_dim), torch.nan, dtype=dtype, device=DEVICE
        )

    def erase_new_rows(self) -> None:
        slots = to_device(self.slots[:-1]).long()
        page, row = slots // self.sizes.page_size, slots % self.sizes.page_size
        self.pages.keys[page, :, row] = torch.nan
        self.pages.values[page, :, row] = torch.nan

    def append(self) -> None:
        rotate_and_append(
            self.qkv,
            self.rotary,
            to_device(self.positions.astype(np.int32)),
            to_device(self.bases.astype(np.int32)),
            to_device(self.slots.astype(np.int32)),
            self.pages,
        )

    def prefill(self, generator: np.random.Generator, splits: int | None) -> Tensor:
        lengths = [sequence.new for sequence in self.sequences]
        starts = np.cumsum([0, *lengths, 0]).astype(np.int32)
        paged_prefill(
            self.qkv,
            self.rotary,
            to_device(starts),
            max(lengths),
            device_rows(tables_of([s.context for s in self.sequences], self.sizes, generator)),
            self.pages,
            self.out,
            OutputFormat(self.dtype),
            splits,
        )
        return self.out[:-1].double().cpu()

    def decode(self, generator: np.random.Generator, splits: int | None) -> Tensor:
        paged_decode(
            self.qkv,
            self.rotary,
            device_tiles(tables_of([s.rows for s in self.sequences], self.sizes, generator)),
            self.pages,
            self.out,
            OutputFormat(self.dtype),
            splits,
        )
        return self.out.double().cpu()

    def reference(self) -> Tensor:
        parts, at = [], 0
        for sequence in self.sequences:
            queries = self.queries[at : at + sequence.new]
            positions = sequence.newest.positions
            parts.append(dense_attention(self.sizes, self.pool, queries, positions, sequence.rows))
            at += sequence.new
        return torch.cat(parts)


def make_run(
    sizes: Sizes, seed: int, dtype: torch.dtype, new_tokens: tuple[int, ...], spans: int
) -> tuple[Run, np.random.Generator]:
    generator = np.random.default_rng(seed)
    pool = PagedRows(sizes, 20 + 8 * spans * len(new_tokens), generator)
    sequences = random_sequences(pool, generator, new_tokens, spans)
    return Run(sizes, sequences, pool, dtype), generator


def assert_close(result: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    error = ((result - reference).norm() / reference.norm()).item()
    assert error < TOLERANCE[dtype]  # false for NaN too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "splits"), CASES)
def test_decode_attends_to_what_the_masks_show(
    sizes: Sizes, dtype: torch.dtype, splits: int | None
) -> None:
    run, generator = make_run(sizes, 1, dtype, (1, 1, 1), SPANS)
    run.erase_new_rows()
    run.append()
    result = run.decode(generator, splits)
    assert_close(result[:-1], run.reference(), dtype)
    assert not result[-1].any()  # a sequence that only fills up the batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "splits"), CASES)
def test_prefill_attends_to_the_context_and_to_itself_in_order(
    sizes: Sizes, dtype: torch.dtype, splits: int | None
) -> None:
    run, generator = make_run(sizes, 2, dtype, NEW_TOKENS, SPANS)
    run.erase_new_rows()
    run.append()
    assert_close(run.prefill(generator, splits), run.reference(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_first_prompt_has_no_context(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(3)
    pool = PagedRows(SMALL, 30, generator)
    rows = joined([pool.write("text", 21, vision=False)])
    run = Run(SMALL, [Sequence(rows, 21)], pool, dtype)
    run.append()
    assert_close(run.prefill(generator, None), run.reference(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", ALL_SIZES)
def test_rows_are_rotated_by_position_and_stored_by_place(sizes: Sizes, dtype: torch.dtype) -> None:
    run, _ = make_run(sizes, 4, dtype, (24, 3), 2)
    run.erase_new_rows()
    run.append()
    for pages, stored in zip((run.pages.keys, run.pages.values), run.stored, strict=True):
        torch.testing.assert_close(
            pages, stored, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True
        )
    rotated = [
        sizes.rotate(rows, run.positions[:, :-1].astype(np.int32)).flatten(1)
        for rows in (run.queries[:-1], run.pool.keys[run.slots[:-1]])
    ]
    values = run.pool.values[run.slots[:-1]].flatten(1)
    assert_close(run.qkv[:-1].double().cpu(), torch.cat([*rotated, values], dim=1), dtype)
