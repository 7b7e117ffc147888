"""Contexts as attention kernels read them: tiles of rows that share one base.

A key is stored rotated by its place, and a query is rotated back, once per tile, by the tile's
base; so all rows of a tile must have the same base. Attention does not depend on the order of rows:
the rows of one base are packed into tiles wherever they lie.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from framesink.runtime.arrays import Int32Array
from framesink.runtime.executors.base import ContextView

if TYPE_CHECKING:
    from torch import Tensor

TILE_ROWS = 64
# A slot of the null page, which holds no rows.
NO_SLOT = 0
_INITIAL_TILES = 64


@dataclass(frozen=True, slots=True, eq=False)
class NewRows:
    """New tokens of a step on the GPU: M-RoPE `positions` int32 `[3, m]`; `bases` and `slots` int32
    `[m]`, slot -1 for a token that has no row to write."""

    positions: "Tensor"
    bases: "Tensor"
    slots: "Tensor"

    def part(self, tokens: slice) -> "NewRows":
        """Some of the tokens, without a copy."""
        return NewRows(self.positions[:, tokens], self.bases[tokens], self.slots[tokens])


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTiles:
    """The tiles of R contexts on the GPU, padded to T, and which of those B sequences have.

    `bases` int32 `[R, T]`. `slots` int32 `[R, T, 64]`: the rows of each tile, `NO_SLOT` where it
    has none. `counts` int32 `[R]`: how many tiles a context has, 0 for that of a sequence that only
    fills up the batch. `rows` int32 `[B]`: each sequence's context.
    """

    bases: "Tensor"
    slots: "Tensor"
    counts: "Tensor"
    rows: "Tensor"


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRows:
    """The rows of B contexts on the GPU, in any order, padded to R.

    `slots` and `bases` int32 `[B, R]`, `counts` int32 `[B]`: how many rows a context has.
    """

    slots: "Tensor"
    bases: "Tensor"
    counts: "Tensor"


class TileTable:
    """The tiles of one sequence's context, on the host.

    `bases` int32 `[T]` and `slots` int32 `[T, 64]` as in `DeviceTiles`; the first `count` tiles are
    in use.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._open: dict[int, int] = {}
        self._places: dict[int, int] = {}
        self.count = 0
        self.bases: Int32Array = np.zeros(_INITIAL_TILES, np.int32)
        self.slots: Int32Array = np.full((_INITIAL_TILES, TILE_ROWS), NO_SLOT, np.int32)

    def rebuild(self, view: ContextView) -> None:
        """Take over a context as it is now. Raises ValueError for a view without bases."""
        if view.bases is None:
            raise ValueError("a context without bases cannot be read by tiles")
        rows = np.flatnonzero(view.valid)
        slots = view.block_table[rows // self._page_size] * self._page_size
        slots += (rows % self._page_size).astype(np.int32)
        order = np.argsort(view.bases[rows], kind="stable")
        self._fill(slots[order], view.bases[rows][order])

    def rows(self) -> tuple[Int32Array, Int32Array]:
        """Slots and bases of all rows, int32 `[n]` each."""
        slots = self.slots[: self.count]
        held = slots != NO_SLOT
        return slots[held], np.repeat(self.bases[: self.count], held.sum(axis=1))

    def append(self, slots: Int32Array, bases: Int32Array) -> list[int]:
        """Add rows: `slots` int32 `[n]`, `bases` int32 `[n]`. Returns the tiles that changed."""
        changed: dict[int, None] = {}
        ends = [*(np.flatnonzero(bases[1:] != bases[:-1]) + 1).tolist(), len(slots)]
        start = 0
        for end in ends:
            while start < end:
                base = int(bases[start])
                place = self._open.get(base, 0)
                if place % TILE_ROWS == 0:
                    place = self._new_tile(base) * TILE_ROWS
                run = slots[start : min(end, start + TILE_ROWS - place % TILE_ROWS)]
                self.slots.flat[place : place + len(run)] = run
                self._places.update(zip(run.tolist(), range(place, place + len(run)), strict=True))
                self._open[base] = place + len(run)
                changed[place // TILE_ROWS] = None
                start += len(run)
        return list(changed)

    def forget(self, slots: Int32Array) -> list[int]:
        """Take appended rows out again, and return the tiles that changed. Their places stay empty
        until the next `rebuild`. Raises KeyError for a row that was not appended since the last."""
        places = [self._places.pop(slot) for slot in slots.tolist()]
        self.slots.flat[places] = NO_SLOT
        return list(dict.fromkeys(place // TILE_ROWS for place in places))

    def _fill(self, slots: Int32Array, bases: Int32Array) -> None:
        """Pack rows that are sorted by base."""
        starts = np.flatnonzero(np.concatenate([[True], bases[1:] != bases[:-1]])[: len(bases)])
        sizes = np.diff(np.concatenate([starts, [len(bases)]]))
        tiles = -(-sizes // TILE_ROWS)
        first = np.cumsum(tiles) - tiles
        places = np.repeat(first * TILE_ROWS - starts, sizes) + np.arange(len(bases))
        self.count = int(tiles.sum())
        self._reserve(self.count)
        self.slots[:] = NO_SLOT
        self.bases[: self.count] = np.repeat(bases[starts], tiles)
        self.slots.flat[places] = slots
        ends = first * TILE_ROWS + sizes
        self._open = dict(zip(bases[starts].tolist(), ends.tolist(), strict=True))
        self._places = {}

    def _new_tile(self, base: int) -> int:
        tile = self.count
        self._reserve(tile + 1)
        self.bases[tile] = base
        self.slots[tile] = NO_SLOT
        self.count += 1
        return tile

    def _reserve(self, tiles: int) -> None:
        """Make room for `tiles` tiles, and some to come."""
        missing = tiles - len(self.bases)
        if missing <= 0:
            return
        missing += len(self.bases) // 2
        self.bases = np.pad(self.bases, (0, missing))
        self.slots = np.pad(self.slots, ((0, missing), (0, 0)), constant_values=NO_SLOT)
