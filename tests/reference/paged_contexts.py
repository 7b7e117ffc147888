"""Random contexts over pages, and attention to them in float64 without any page or tile."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.arrays import AnyArray, Int32Array
from framesink.runtime.executors.base import ContextView
from framesink.runtime.models.config import TextConfig
from framesink.runtime.rope import MRopeTable

THETA = 10_000.0


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """The sizes that attention has."""

    heads: int
    key_heads: int
    head_dim: int
    page_size: int
    sections: tuple[int, int, int]

    def rope(self) -> MRopeTable:
        """The host's rotary tables, in float32."""
        config = TextConfig(
            vocab_size=1,
            hidden_size=self.heads * self.head_dim,
            intermediate_size=1,
            num_hidden_layers=1,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_dim,
            rms_norm_eps=1e-6,
            rope_theta=THETA,
            mrope_section=self.sections,
            max_position_embeddings=1 << 15,
            tie_word_embeddings=False,
        )
        return MRopeTable(config, "float32")

    def rotate(self, rows: Tensor, positions: Int32Array, *, back: bool = False) -> Tensor:
        """`rows [n, heads, D]` in float64, turned by `positions [3, n]`, or turned back."""
        cos, sin = (torch.from_numpy(t).double()[:, None] for t in self.rope().lookup(positions))
        sin = -sin if back else sin
        first, second = rows.double().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a context in logical order: slots and bases int32 `[n]`, places int32 `[3, n]`."""

    slots: Int32Array
    bases: Int32Array
    places: Int32Array

    @property
    def positions(self) -> Int32Array:
        """M-RoPE positions, int32 `[3, n]`."""
        return self.places + self.bases

    def part(self, start: int, stop: int) -> "Rows":
        """Rows `[start, stop)`."""
        return Rows(self.slots[start:stop], self.bases[start:stop], self.places[:, start:stop])

    def view(self, page_size: int, order: AnyArray) -> ContextView:
        """What an executor is given; pages in the order of `order`, a permutation."""
        table = np.unique(self.slots // page_size).astype(np.int32)
        table = table[order[order < len(table)]]
        ranks = np.zeros(table.max(initial=0) + 1, np.int32)
        ranks[table] = np.arange(len(table))
        index = ranks[self.slots // page_size] * page_size + self.slots % page_size
        rows = len(table) * page_size
        positions, bases = np.zeros((3, rows), np.int32), np.zeros(rows, np.int32)
        valid = np.zeros(rows, np.bool_)
        positions[:, index], bases[index], valid[index] = self.positions, self.bases, True
        return ContextView(table, positions, valid, bases)


class PagedRows:
    """Pages of random rows that spans of several sequences lie in.

    `keys` (before RoPE) and `values` `[slots, Hkv, D]` are what belongs to each slot; a slot's
    place is set when it is given out.
    """

    def __init__(self, sizes: Sizes, pages: int, generator: np.random.Generator) -> None:
        self.sizes = sizes
        self.pages = pages
        self._generator = generator
        self._free = list(generator.permutation(np.arange(1, pages)).astype(int))
        self._open: dict[str, list[int]] = {}
        shape = (pages * sizes.page_size, sizes.key_heads, sizes.head_dim)
        self.keys = torch.from_numpy(generator.standard_normal(shape))
        self.values = torch.from_numpy(generator.standard_normal(shape))
        self.places = np.zeros((3, shape[0]), np.int32)
        self._written = np.zeros(shape[0], np.bool_)

    def write(self, lane: str, count: int, *, vision: bool) -> Rows:
        """The next `count` rows of a lane, as a span at base 0."""
        rows = self._open.setdefault(lane, [])
        while len(rows) < count:
            first = self._free.pop() * self.sizes.page_size
            rows += range(first, first + self.sizes.page_size)
        slots = np.array(rows[:count], np.int32)
        del rows[:count]
        places = np.tile(np.arange(count, dtype=np.int32), (3, 1))
        if vision:
            places = self._generator.integers(0, count, (3, count)).astype(np.int32)
            places[:, 0] = 0
        self.places[:, slots] = places
        self._written[slots] = True
        return Rows(slots, np.zeros(count, np.int32), places)

    @property
    def written(self) -> Int32Array:
        """The slots that were given out."""
        return np.flatnonzero(self._written).astype(np.int32)

    def stored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K rotated by place, and V `[Hkv, slots, D]`; NaN in rows never written, which must not be
        read."""
        return (
            self._paged(self.sizes.rotate(self.keys, self.places), dtype),
            self._paged(self.values, dtype),
        )

    def _paged(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        rows = rows.clone()
        rows[torch.from_numpy(~self._written)] = torch.nan
        return rows.transpose(0, 1).contiguous().to(dtype)


def joined(spans: list[Rows], start: int = 0) -> Rows:
    """Spans one after another, their bases such that each begins where the last ended."""
    bases = []
    for span in spans:
        base = start - int(span.places[0, 0])
        bases.append(np.full(len(span.slots), base, np.int32))
        start = base + int(span.places.max()) + 1
    return Rows(
        np.concatenate([span.slots for span in spans]),
        np.concatenate(bases),
        np.concatenate([span.places for span in spans], axis=1),
    )


def dense_attention(
    sizes: Sizes, pool: PagedRows, queries: Tensor, query_positions: Int32Array, rows: Rows
) -> Tensor:
    """Causal attention in float64: `queries [s, heads, D]` (before RoPE) are those of the last s of
    `rows`; returns `[s, heads · D]`."""
    new, total = len(queries), len(rows.slots)
    slots = torch.from_numpy(rows.slots).long()
    keys = sizes.rotate(pool.keys[slots], rows.positions)
    values = pool.values[slots].double()
    rotated = sizes.rotate(queries, query_positions)
    repeats = sizes.heads // sizes.key_heads
    keys, values = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
    scores = torch.einsum("shd,nhd->hsn", rotated, keys) / sizes.head_dim**0.5
    hidden = torch.ones(new, total, dtype=torch.bool).tril(total - new).logical_not()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hsn,nhd->shd", weights, values).flatten(1)
