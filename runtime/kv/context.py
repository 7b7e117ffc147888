"""What an executor may read: the block table and, for every slot in it, position and validity.

Built once a turn, when eviction has changed bases; during prefill and decode only the rows that
were written are added, so a step costs the same however long the context is.
"""

from itertools import count

import numpy as np

from framesink.runtime.arrays import BoolArray, Int32Array
from framesink.runtime.executors.base import ContextView
from framesink.runtime.kv.page_pool import NULL_PAGE

GROWTH_PAGES = 16
_numbers = count()


class Context:
    """The written rows of one sequence, laid out page by page.

    Pages stand in the order their first row is read, which is the same whatever pages the pool
    gave out: a session reads its context in the same order alone and among others.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._number = next(_numbers)
        self._changes = 0
        self._rows = 0
        self._rank: dict[int, int] = {}
        self._table: Int32Array = np.zeros(0, dtype=np.int32)
        self._positions: Int32Array = np.zeros((3, 0), dtype=np.int32)
        self._bases: Int32Array = np.zeros(0, dtype=np.int32)
        self._valid: BoolArray = np.zeros(0, dtype=np.bool_)
        self._reserve(GROWTH_PAGES)

    @property
    def pages(self) -> int:
        """Pages in the block table."""
        return len(self._rank)

    def rebuild(self, slots: Int32Array, positions: Int32Array, bases: Int32Array) -> None:
        """Forget everything and add these rows, given in logical order (see `append`)."""
        self._changes += 1
        self._rows = 0
        self._rank.clear()
        self._valid[:] = False
        self._positions[:] = 0
        self._bases[:] = 0
        self._table[:] = NULL_PAGE
        self.append(slots, positions, bases)

    def append(self, slots: Int32Array, positions: Int32Array, bases: Int32Array) -> None:
        """Add rows: `slots` int32 `[n]`, `positions` int32 `[3, n]`, `bases` int32 `[n]`."""
        if slots.size == 0:
            return
        self._rows += slots.size
        indices = self._indices(slots)
        self._positions[:, indices] = positions
        self._bases[indices] = bases
        self._valid[indices] = True

    def forget(self, slots: Int32Array) -> None:
        """Take the newest rows out again, and the pages at the table's end they leave empty."""
        if slots.size == 0:
            return
        self._changes += 1
        self._rows -= slots.size
        indices = self._indices(slots)
        self._valid[indices] = False
        self._positions[:, indices] = 0
        self._bases[indices] = 0
        while self._rank:
            page, rank = self._rank.popitem()
            if self._valid[rank * self._page_size : (rank + 1) * self._page_size].any():
                self._rank[page] = rank
                break
            self._table[rank] = NULL_PAGE

    def view(self) -> ContextView:
        """The context as an executor reads it; valid until the next change."""
        pages = max(1, len(self._rank))
        rows = pages * self._page_size
        return ContextView(
            block_table=self._table[:pages],
            positions=self._positions[:, :rows],
            valid=self._valid[:rows],
            bases=self._bases[:rows],
            edition=(self._number, self._changes),
            rows=self._rows,
        )

    def _indices(self, slots: Int32Array) -> Int32Array:
        """Where slots lie in the view; pages not seen before join the end of the table."""
        pages = slots // self._page_size
        heads = np.concatenate([[0], np.flatnonzero(pages[1:] != pages[:-1]) + 1])
        rank = self._rank
        ranks = [rank.setdefault(page, len(rank)) for page in pages[heads].tolist()]
        self._reserve(len(rank))
        table = np.asarray(ranks, dtype=np.int32)
        self._table[table] = pages[heads]
        lengths = np.concatenate([heads[1:], [slots.size]]) - heads
        return np.repeat(table, lengths) * self._page_size + slots % self._page_size

    def _reserve(self, pages: int) -> None:
        """Make room for `pages` pages, and some to come."""
        missing = pages - self._table.size
        if missing <= 0:
            return
        missing += max(GROWTH_PAGES, self._table.size // 2)
        rows = missing * self._page_size
        self._table = np.pad(self._table, (0, missing), constant_values=NULL_PAGE)
        self._positions = np.pad(self._positions, ((0, 0), (0, rows)))
        self._bases = np.pad(self._bases, (0, rows))
        self._valid = np.pad(self._valid, (0, rows))
