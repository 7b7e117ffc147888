"""The contexts of a step's sequences on the GPU, kept from step to step.

Decode steps read a context as a list of tiles (`framesink.runtime.executors.cuda.kernels.tiles`).
The host holds every sequence's list, the GPU a row of a table for each. A turn's first decode step
sends the whole list; the others change one tile of each sequence, and only that travels.
"""

from collections import OrderedDict
from collections.abc import Sequence
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
    """What is known of one sequence's context: its row of the device's tables, its tiles, of how
    many rows and of which edition they are, and whether the row holds them."""

    row: int
    tiles: TileTable
    edition: tuple[int, int] | None = None
    rows: int = 0
    sent: bool = False


class ContextTables:
    """One row per sequence, the least recently used given away first, and one row for padding.

    A step calls `take_rows` for its sequences first.
    """

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

    def take_rows(self, views: Sequence[ContextView]) -> list[int]:
        """The rows of a step's sequences, whose contexts are `views`. A sequence without one gets
        that of another that has not been in a step for longest.

        Raises CapacityError for more sequences than there are rows, ValueError for a view without
        an edition.
        """
        numbers = [_number(view) for view in views]
        for number in numbers:
            if number in self._tracked:
                self._tracked.move_to_end(number)
        if len(set(numbers)) > self.padding_row:
            raise CapacityError(
                f"A step has more than the {self.padding_row} sequences this executor was made for."
            )
        for number in numbers:
            if number not in self._tracked:
                row = self._free.pop() if self._free else self._tracked.popitem(last=False)[1].row
                self._tracked[number] = TrackedContext(row, TileTable(self._page_size))
        return [self._tracked[number].row for number in numbers]

    def knows(self, view: ContextView) -> bool:
        """Whether the sequence whose context `view` is has a row."""
        return view.edition is not None and view.edition[0] in self._tracked

    def row_of(self, view: ContextView) -> int:
        """The row of a sequence of the step."""
        return self._tracked[_number(view)].row

    def track(self, view: ContextView) -> TrackedContext:
        """The sequence whose context `view` is, its tiles brought up to date on the host."""
        tracked = self._tracked[_number(view)]
        rows = int(np.count_nonzero(view.valid)) if view.rows is None else view.rows
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

    def read(self, rows: Tensor) -> DeviceTiles:
        """The lists in rows int32 `[B]`, where they lie."""
        return DeviceTiles(self._bases, self._slots, self._counts, rows)


@dataclass(frozen=True, slots=True, eq=False)
class PendingTiles:
    """A list of tiles on its way to the table: int32 tensors that hold it once staging is sent."""

    row: int
    count: int
    bases: Tensor
    slots: Tensor


def _number(view: ContextView) -> int:
    if view.edition is None:
        raise ValueError("a context needs an edition to be kept on the GPU")
    return view.edition[0]
