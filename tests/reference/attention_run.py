"""New tokens of random sequences over pages: appended, and attended from, by the kernels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.arrays import AnyArray
from framesink.runtime.executors.cuda.kernels.append_rows import rotate_and_append
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.paged_decode import paged_decode
from framesink.runtime.executors.cuda.kernels.paged_prefill import paged_prefill
from framesink.runtime.executors.cuda.kernels.pages import LayerPages, PageCodes
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable
from framesink.runtime.executors.cuda.kernels.tiles import (
    DeviceRows,
    DeviceTiles,
    NewRows,
    TileTable,
)
from framesink.runtime.models.quantization import CacheScheme
from reference.paged_contexts import (
    THETA,
    PagedRows,
    Rows,
    Sizes,
    dense_attention,
    joined,
)
from reference.triton_device import DEVICE
from reference.unpacked_rows import read_rows, write_rows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Bias of a key's channels, and of one pair of each head, as in Qwen2.5 far beyond what varies.
BIAS, LARGE_BIAS = 2.0, 30.0


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
        self,
        sizes: Sizes,
        sequences: list[Sequence],
        pool: PagedRows,
        dtype: torch.dtype,
        scheme: CacheScheme = CacheScheme.UNQUANTIZED,
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
        self.pages = LayerPages(*(stored.to(DEVICE) for stored in pool.stored(dtype)))
        self.bias = torch.zeros(sizes.key_heads, sizes.head_dim)
        if scheme is not CacheScheme.UNQUANTIZED:
            self.bias = torch.randn(self.bias.shape, generator=generator) * BIAS
            self.bias[:, sizes.head_dim // 2 - 3] = LARGE_BIAS
            self.pages = self._coded_pages(scheme, generator)
        self.out = torch.full(
            (count, sizes.heads * sizes.head_dim), torch.nan, dtype=dtype, device=DEVICE
        )

    def _coded_pages(self, scheme: CacheScheme, generator: torch.Generator) -> LayerPages:
        """Codes of every row, under random scales."""
        sizes, pool = self.sizes, self.pool
        shape = (sizes.key_heads, pool.pages * sizes.page_size, sizes.head_dim // 2)
        step = 4.0 / (127.0 if scheme is CacheScheme.INT8 else 448.0)
        scales = torch.rand(sizes.key_heads, sizes.head_dim // 2 + 1, generator=generator) + 0.5
        codes = PageCodes(
            scheme,
            (step * scales[:, 1:]).to(DEVICE),
            (step * scales[:, 0]).to(DEVICE),
            self.bias.to(DEVICE),
            torch.zeros(pool.pages * sizes.page_size, dtype=torch.int64, device=DEVICE),
        )
        keys, values = (torch.zeros(shape, dtype=torch.int16, device=DEVICE) for _ in range(2))
        pages = LayerPages(keys, values, codes)
        places = pool.places[:, pool.written]
        turned = sizes.rotate(pool.keys[pool.written], places)
        rows = (turned, pool.values[pool.written], torch.from_numpy(places))
        write_rows(pages, to_device(pool.written), *(t.to(DEVICE) for t in rows))
        return pages

    def read(self, slots: AnyArray) -> tuple[Tensor, Tensor]:
        """Keys and values float64 `[n, Hkv, D]` that the pages hold in `slots`; keys are turned by
        their places, and without bias if they are codes."""
        keys, values = read_rows(self.pages, to_device(slots))
        return keys.double().cpu(), values.double().cpu()

    def held(self) -> tuple[Tensor, ...]:
        """All that the pages hold of rows that were given out: keys, values, and places if they are
        kept, float64."""
        codes, written = self.pages.codes, self.pool.written
        places = () if codes is None else (codes.places.cpu()[written].double(),)
        return (*self.read(written), *places)

    def take_over(self, slots: AnyArray) -> None:
        """Let the reference attend to what the pages hold in `slots`."""
        keys, values = self.read(slots)
        places = self.pool.places[:, slots]
        self.pool.keys[slots] = self.sizes.rotate(keys, places, back=True) + self.bias
        self.pool.values[slots] = values

    def erase_new_rows(self) -> None:
        """Fill what `append` will write with what would be seen."""
        slots = to_device(self.slots[:-1]).long()
        nothing = torch.nan if self.pages.codes is None else 0x7F7F
        self.pages.keys[:, slots] = nothing
        self.pages.values[:, slots] = nothing
        if self.pages.codes is not None:
            self.pages.codes.places[slots] = 0

    @property
    def new_rows(self) -> NewRows:
        """The new tokens, and one that only fills up."""
        arrays = (self.positions, self.bases, self.slots)
        return NewRows(*(to_device(array.astype(np.int32)) for array in arrays))

    def append(self) -> None:
        rotate_and_append(self.qkv, self.rotary, self.new_rows, self.pages)

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
            self.new_rows,
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
    sizes: Sizes,
    seed: int,
    dtype: torch.dtype,
    new_tokens: tuple[int, ...],
    spans: int,
    scheme: CacheScheme = CacheScheme.UNQUANTIZED,
) -> tuple[Run, np.random.Generator]:
    generator = np.random.default_rng(seed)
    pool = PagedRows(sizes, 20 + 8 * spans * len(new_tokens), generator)
    sequences = random_sequences(pool, generator, new_tokens, spans)
    return Run(sizes, sequences, pool, dtype, scheme), generator


def assert_close(result: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    error = ((result - reference).norm() / reference.norm()).item()
    assert error < TOLERANCE[dtype]  # false for NaN too
