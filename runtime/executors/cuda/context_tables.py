"""The contexts of a step's sequences on the GPU, kept from step to step.

A context is a list of tiles (see `framesink.runtime.executors.cuda.kernels.tiles`). The host holds
every sequence's list, the GPU a row of a table for each. A turn's first steps send whole lists; a
decode step changes one tile of each sequence, and only that travels.
"""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from framesink.runtime.errors import CapacityError
from framesink.runtime.executors.base import ContextView, SequenceInput
from framesink.runtime.executors.cuda.kernels.tiles import TILE_ROWS, DeviceTiles, TileTable
from framesink.runtime.executors.cuda.staging import Staging


@dataclass(slots=True)
class TrackedContext:
    """What is known of one sequence's context: its tiles, its row of the device's table, whether
    that row holds the tiles, and the lowest base among them."""

    tiles: TileTable
    row: int
    edition: tuple[int, int] | None = None
    sent: bool = False
    lowest_base: int = 0


class ContextTables:
    """One row per sequence, the least recently used given away first, and one row for padding."""

    def __init__(
        self, rows: int, tiles: int, page_size: int, reach: int, device: torch.device
    ) -> None:
        """Room for `rows` sequences of at most `tiles` tiles; no token may stand `reach` or more
        positions after the base of a row it reads."""
        self.entries = TILE_ROWS // page_size
        self.capacity = tiles
        self.padding_row = rows
        self._page_size = page_size
        self._reach = reach
        self._free = list(range(rows))
        self._tracked: OrderedDict[int, TrackedContext] = OrderedDict()

        def table(*shape: int) -> Tensor:
            return torch.zeros(rows + 1, *shape, dtype=torch.int32, device=device)

        self._bases = table(tiles)
        self._pages = table(tiles, self.entries)
        self._masks = table(tiles, self.entries)
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
        if tracked.edition != view.edition:
            tracked.tiles.rebuild(view)
            tracked.edition, tracked.sent = view.edition, False
            bases = tracked.tiles.bases[: tracked.tiles.count]
            tracked.lowest_base = int(bases.min(initial=0))
        return tracked

    def add_rows(self, tracked: TrackedContext, given: SequenceInput) -> int:
        """The rows that a step writes: later steps read them. Returns the last tile changed.

        Raises CapacityError for a context that is too long for the table or for its positions.
        """
        if given.bases is None:
            raise ValueError("a sequence needs the bases of its tokens")
        changed = tracked.tiles.append(given.slots, given.bases)
        tracked.lowest_base = min(tracked.lowest_base, int(given.bases.min()))
        reach = int(given.positions.max()) - tracked.lowest_base
        if tracked.tiles.count > self.capacity or reach >= self._reach:
            raise CapacityError(
                f"A context of {tracked.tiles.count} tiles and {reach} positions is longer than "
                f"the {self.capacity} tiles and {self._reach} positions the executor has room for; "
                "use a smaller policy, or build with a larger max_context."
            )
        return int(changed[-1])

    def send(self, tracked: TrackedContext, staging: Staging) -> "PendingTiles":
        """Stage a whole list of tiles; `PendingTiles.store` puts it into the table."""
        tiles = tracked.tiles
        tracked.sent = True
        count = tiles.count
        return PendingTiles(
            tracked.row,
            count,
            staging.put(tiles.bases[:count]),
            staging.put(tiles.pages[:count]),
            staging.put(tiles.masks[:count]),
        )

    def store(self, pending: "PendingTiles") -> None:
        """Put a list that has arrived into the table."""
        row, count = pending.row, pending.count
        self._bases[row, :count] = pending.bases
        self._pages[row, :count] = pending.pages
        self._masks[row, :count] = pending.masks
        self._counts[row : row + 1].fill_(count)

    def patch(
        self,
        rows: Tensor,
        tiles: Tensor,
        bases: Tensor,
        pages: Tensor,
        masks: Tensor,
        counts: Tensor,
    ) -> None:
        """Change one tile of each of B lists: `rows` and `tiles` int64 `[B]`, `bases` and `counts`
        int32 `[B]`, `pages` and `masks` int32 `[B, E]`. Can be captured in a graph."""
        self._bases[rows, tiles] = bases
        self._pages[rows, tiles] = pages
        self._masks[rows, tiles] = masks
        self._counts[rows] = counts

    def read(self, rows: Tensor) -> DeviceTiles:
        """The lists in rows int64 `[B]`. Can be captured in a graph."""
        return DeviceTiles(
            self._bases[rows], self._pages[rows], self._masks[rows], self._counts[rows]
        )

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
    pages: Tensor
    masks: Tensor
