"""Lanes: rows that will live about as long share pages, so that pages fill densely and empty whole.

Rows leave a lane in the order they came. A lane of n live rows in a row therefore touches at most
`pages_of_run(n)` pages.
"""

from enum import StrEnum

import numpy as np

from framesink.runtime.arrays import Int32Array
from framesink.runtime.kv.page_pool import PagePool, Reservation
from framesink.runtime.kv.span import NO_SLOTS, Span, SpanKind, SpanPart


class LaneName(StrEnum):
    """`text` may live for ever, `vision` for the vision window, `frame` (what wraps a turn) for
    the longer of both windows."""

    TEXT = "text"
    VISION = "vision"
    FRAME = "frame"


def lane_of(span: Span) -> LaneName:
    """The lane whose pages hold the span's rows."""
    if span.kind is SpanKind.VISION:
        return LaneName.VISION
    if span.kind in (SpanKind.USER, SpanKind.QUESTION):
        return LaneName.FRAME
    if span.kind is SpanKind.REPLY and span.part is not SpanPart.BODY:
        return LaneName.FRAME
    return LaneName.TEXT


def pages_of_run(rows: int, page_size: int) -> int:
    """Most pages that `rows` consecutive rows of a lane touch, wherever they begin."""
    return (rows + page_size - 2) // page_size + 1 if rows else 0


class Lane:
    """Appends rows to its own last page, then to a new one."""

    def __init__(self, pool: PagePool, reservation: Reservation) -> None:
        self._pool = pool
        self._reservation = reservation
        self._page: int | None = None
        self._row = 0

    def take(self, count: int) -> Int32Array:
        """Slots for the next `count` rows, each counted live once.

        Raises CapacityError when the reservation is spent; nothing is taken then.
        """
        if count == 0:
            return NO_SLOTS
        size = self._pool.page_size
        room = 0 if self._page is None else size - self._row
        missing = -(-max(0, count - room) // size)
        self._pool.require(self._reservation, missing)
        runs = []
        left = count
        while left:
            if self._page is None:
                self._page, self._row = self._pool.open_page(self._reservation), 0
            run = min(left, size - self._row)
            first = self._page * size + self._row
            runs.append(np.arange(first, first + run, dtype=np.int32))
            self._pool.add_rows(self._page, run)
            self._row += run
            left -= run
            if self._row == size:
                self._pool.close_page(self._page)
                self._page = None
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    def take_back(self, slots: Int32Array) -> None:
        """Undo the last `take`: the lane continues where these rows, its newest, began."""
        if slots.size == 0:
            return
        first_page, first_row = divmod(int(slots[0]), self._pool.page_size)
        if self._page is not None and (self._page != first_page or first_row == 0):
            page, self._page = self._page, None
            self._pool.close_page(page)
        if first_row > 0:
            self._pool.reopen_page(first_page)
            self._page, self._row = first_page, first_row
        self._pool.release(slots)

    def close(self) -> None:
        """Append nothing more; an unfilled last page stays taken while rows in it are live."""
        if self._page is not None:
            page, self._page = self._page, None
            self._pool.close_page(page)
