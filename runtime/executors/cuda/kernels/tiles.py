"""Contexts as attention kernels read them: tiles of rows that share one base.

A key is stored rotated by its place, and a query is rotated, once per tile, by its position minus
the tile's base; so all rows of a tile must have the same base. Attention does not depend on the
order of rows. A page whose rows have several bases is therefore listed once for each of them, with
a bit mask of the rows that count, and the entries of one base are packed into tiles.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from framesink.runtime.arrays import AnyArray, Int32Array
from framesink.runtime.executors.base import ContextView

if TYPE_CHECKING:
    from torch import Tensor

TILE_ROWS = 64
PAGE_SIZES = (8, 16, 32)
_INITIAL_TILES = 64


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTiles:
    """The tiles of B sequences on the GPU, padded to T.

    `bases` int32 `[B, T]`. `pages` int32 `[B, T, E]`: the pages of a tile's E entries. `masks`
    int32 `[B, T, E]`: bit r says whether row r of that page counts. `counts` int32 `[B]`: how many
    tiles a sequence has, 0 for one that only fills up the batch.
    """

    bases: "Tensor"
    pages: "Tensor"
    masks: "Tensor"
    counts: "Tensor"


class TileTable:
    """The tiles of one sequence's context, on the host.

    `bases` int32 `[T]`, `pages` and `masks` int32 `[T, E]` as in `DeviceTiles`; the first `count`
    tiles are in use. The entries that fill up a tile have mask 0 and the null page.
    """

    def __init__(self, page_size: int) -> None:
        """Raises ValueError for a page size that is not in `PAGE_SIZES`."""
        if page_size not in PAGE_SIZES:
            raise ValueError(f"tiles are made of pages of {PAGE_SIZES} rows, not of {page_size}")
        self._page_size = page_size
        self._entries = TILE_ROWS // page_size
        self._places: dict[tuple[int, int], int] = {}
        self._free: dict[int, int] = {}
        self.count = 0
        self.bases: Int32Array = np.zeros(_INITIAL_TILES, np.int32)
        self.pages: Int32Array = np.zeros((_INITIAL_TILES, self._entries), np.int32)
        self.masks: Int32Array = np.zeros((_INITIAL_TILES, self._entries), np.int32)

    def rebuild(self, view: ContextView) -> None:
        """Take over a context as it is now. Raises ValueError for a view without bases."""
        if view.bases is None:
            raise ValueError("a context without bases cannot be read by tiles")
        rows = np.flatnonzero(view.valid)
        slots = view.block_table[rows // self._page_size] * self._page_size
        pages, bases, masks = self._runs(slots + rows % self._page_size, view.bases[rows])
        # Both are int32: one sortable number per entry.
        keys, inverse = np.unique((bases.astype(np.int64) << 32) | pages, return_inverse=True)
        merged = np.zeros(len(keys), np.int64)
        np.bitwise_or.at(merged, inverse, masks)
        self._fill((keys >> 32).astype(np.int32), (keys & 0xFFFFFFFF).astype(np.int32), merged)

    def append(self, slots: Int32Array, bases: Int32Array) -> list[int]:
        """Add rows: `slots` int32 `[n]`, `bases` int32 `[n]`. Returns the tiles that changed."""
        changed = []
        for page, base, mask in self._listed_runs(slots, bases):
            place = self._places.get((base, page))
            if place is None:
                place = self._take_entry(base)
                self._places[base, page] = place
                self.pages.flat[place] = page
            self.masks.flat[place] |= mask
            changed.append(place // self._entries)
        return list(dict.fromkeys(changed))

    def forget(self, slots: Int32Array, bases: Int32Array) -> list[int]:
        """Take rows out again, and return the tiles that changed. Entries stay until the next
        `rebuild`, if with nothing to read. Raises KeyError for a row that is not there."""
        changed = []
        for page, base, mask in self._listed_runs(slots, bases):
            place = self._places[base, page]
            self.masks.flat[place] &= ~np.int32(mask)
            changed.append(place // self._entries)
        return list(dict.fromkeys(changed))

    def _runs(self, slots: AnyArray, bases: AnyArray) -> tuple[AnyArray, AnyArray, AnyArray]:
        """Page, base and mask of every run of rows that share page and base."""
        if slots.size == 0:
            return slots, bases, slots
        pages, rows = slots // self._page_size, slots % self._page_size
        changes = (pages[1:] != pages[:-1]) | (bases[1:] != bases[:-1])
        heads = np.concatenate([[0], np.flatnonzero(changes) + 1])
        masks = np.bitwise_or.reduceat(np.int64(1) << rows.astype(np.int64), heads)
        return pages[heads], bases[heads], masks

    def _listed_runs(self, slots: Int32Array, bases: Int32Array) -> list[tuple[int, int, int]]:
        pages, heads, masks = self._runs(slots, bases)
        wrapped = masks.astype(np.int64).astype(np.uint32).view(np.int32)
        return list(zip(pages.tolist(), heads.tolist(), wrapped.tolist(), strict=True))

    def _fill(self, bases: Int32Array, pages: Int32Array, masks: AnyArray) -> None:
        """Pack entries that are sorted by base."""
        starts = np.flatnonzero(np.concatenate([[True], bases[1:] != bases[:-1]])[: len(bases)])
        sizes = np.diff(np.concatenate([starts, [len(bases)]]))
        tiles = -(-sizes // self._entries)
        first = np.cumsum(tiles) - tiles
        places = np.repeat(first * self._entries - starts, sizes) + np.arange(len(bases))
        self.count = int(tiles.sum())
        self._reserve(self.count)
        self.pages[:] = 0
        self.masks[:] = 0
        self.bases[: self.count] = np.repeat(bases[starts], tiles)
        self.pages.flat[places] = pages
        self.masks.flat[places] = masks.astype(np.uint32).view(np.int32)
        keys = zip(bases.tolist(), pages.tolist(), strict=True)
        self._places = dict(zip(keys, places.tolist(), strict=True))
        ends = first * self._entries + sizes
        self._free = dict(zip(bases[starts].tolist(), ends.tolist(), strict=True))

    def _take_entry(self, base: int) -> int:
        """The next unused entry of a base: in its last tile, or in a new one."""
        place = self._free.get(base, 0)
        if place % self._entries == 0:
            self._reserve(self.count + 1)
            place = self.count * self._entries
            self.bases[self.count] = base
            self.pages[self.count] = 0
            self.masks[self.count] = 0
            self.count += 1
        self._free[base] = place + 1
        return place

    def _reserve(self, tiles: int) -> None:
        """Make room for `tiles` tiles, and some to come."""
        missing = tiles - len(self.bases)
        if missing <= 0:
            return
        missing += len(self.bases) // 2
        self.bases = np.pad(self.bases, (0, missing))
        self.pages = np.pad(self.pages, ((0, missing), (0, 0)))
        self.masks = np.pad(self.masks, ((0, missing), (0, 0)))
