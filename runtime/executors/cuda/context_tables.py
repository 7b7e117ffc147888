"""The contexts of a step's sequences on the GPU, kept from step to step.

Decode steps read a context as a list of tiles (`framesink.runtime.executors.cuda.kernels.tiles`).
The host holds every sequence's list, the GPU a row of a table for each. A turn's first decode step
sends the whole list; the others change one tile of each sequence, and only that travels.
"""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.errors import CapacityError
from framesink.runtime.executors.base import ContextView, SequenceInput
from framesink.runtime.executors.cuda.kernels.tiles import TILE_ROWS, DeviceTiles, TileTable
from framesink.runtime.executors.cuda.staging import Staging


@dataclass(slots=True)
class TrackedContext:
    """What is known of one sequence's context: its tiles, of how many rows and of which edition
    they are, its row of the device's table, and whether that row holds them."""

    tiles: TileTable
    row: int
    edition: tuple[int, int] | None = None
    rows: int = 0
    sent: bool = False


class ContextTables:
    """One row per sequence, the least recently used given away first, and one row for padding."""

    def __init__(self, rows: int, tiles: int, page_size: int, device: torch.device) -> None:
        """Room for `rows` sequences of at most `tiles` tiles."""
        self.capacity = tiles
        self.padding_row = rows
        self._page_size = page_size
        self._free = list(range(rows))
        self._tracked: OrderedDict[int, TrackedContext] = OrderedDict()

        def table(*shape: int) -> Tensor:
            return torch.zeros(rows + 1, *shape, dtype=torch.int32, device=device)

        self._bases = table(tiles)
        self._slots = table(tiles, TILE_ROWS)
        self._counts = table()

    def track(self, view: ContextView, in_use: Collection[int]) -> TrackedContext:
        """The sequence whose context `view` is, its tiles brought up to date on the host.

        `in_use` are the rows of the step's other sequences.
        """
        if view.edition is None:
            raise ValueError("a context needs an edition to be kept on the GPU")
        number = view.edition[0]
        tracked = self._tracked.get(number)
        if tracked is None:
            tracked = TrackedContext(TileTable(self._page_size), self._give_row(in_use))
            self._tracked[number] = tracked
        self._tracked.move_to_end(number)
        rows = int(np.count_nonzero(view.valid))
        if tracked.edition != view.edition or tracked.rows != rows:
            tracked.tiles.rebuild(view)
            tracked.edition, tracked.rows, tracked.sent = view.edition, rows, False
        return tracked

    def add_row(self, tracked: TrackedContext, given: SequenceInput) -> int:
        """The row that a decode step writes: it and later steps read it. Returns its tile.

        Raises CapacityError for a context that is too long for the table.
        """
        assert given.bases is not None
        (tile,) = tracked.tiles.append(given.slots, given.bases)
        tracked.rows += 1
        if tracked.tiles.count > self.capacity:
            raise CapacityError(
                f"A context lies in {tracked.tiles.count} tiles and the executor has room for "
                f"{self.capacity}; use a smaller policy, or build with a larger max_context."
            )
        return tile

    def send(self, tracked: TrackedContext, staging: Staging) -> "PendingTiles":
        """Stage a whole list of tiles; `PendingTiles.store` puts it into the table."""
        tiles = tracked.tiles
        tracked.sent = True
        count = tiles.count
        return PendingTiles(
            tracked.row,
            count,
            staging.put(tiles.bases[:count]),
            staging.put(tiles.slots[:count]),
        )

    def store(self, pending: "PendingTiles") -> None:
        """Put a list that has arrived into the table."""
        row, count = pending.row, pending.count
        self._bases[row, :count] = pending.bases
        self._slots[row, :count] = pending.slots
        self._counts[row : row + 1].fill_(count)

    def patch(
        self, rows: Tensor, tiles: Tensor, bases: Tensor, slots: Tensor, counts: Tensor
    ) -> None:
        """Change one tile of each of B lists: `rows` and `tiles` int64 `[B]`, `bases` and `counts`
        int32 `[B]`, `slots` int32 `[B, TILE_ROWS]`. Can be captured in a graph."""
        self._bases[rows, tiles] = bases
        self._slots[rows, tiles] = slots
        self._counts[rows] = counts

    def read(self, rows: Tensor) -> DeviceTiles:
        """The lists in rows int32 `[B]`, where they lie."""
        return DeviceTiles(self._bases, self._slots, self._counts, rows)

    def _give_row(self, in_use: Collection[int]) -> int:
        if self._free:
            return self._free.pop()
        for number, tracked in self._tracked.items():
            if tracked.row not in in_use:
                del self._tracked[number]
                return tracked.row
        raise CapacityError(
            f"A step has more than the {self.padding_row} sequences this executor was made for."
        )


@dataclass(frozen=True, slots=True, eq=False)
class PendingTiles:
    """A list of tiles on its way to the table: int32 tensors that hold it once staging is sent."""

    row: int
    count: int
    bases: Tensor
    slots: Tensor
