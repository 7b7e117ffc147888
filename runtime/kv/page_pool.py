"""The page pool: which K/V pages are free, and how many live rows each page holds.

Integers only; the rows themselves belong to the executor. A page is a block of `page_size` rows, a
slot is `page * page_size + row`. Page 0 is the null page: never given out, it pads block tables.
"""

import threading
from collections.abc import Iterable

import numpy as np

from framesink.runtime.arrays import Int32Array
from framesink.runtime.errors import BusyError, CapacityError

NULL_PAGE = 0


class Reservation:
    """A promise of pages to one holder; what it may take and what it has taken.

    `pages` is the most it may hold at once, `used` what it holds now.
    """

    __slots__ = ("label", "pages", "used")

    def __init__(self, pages: int, label: str) -> None:
        self.pages = pages
        self.label = label
        self.used = 0


class PagePool:
    """Allocates pages against reservations and counts live rows.

    A page is free when no row in it is live and no lane appends to it. Every page taken is counted
    against a reservation, and reservations never add up to more than the pool, so a holder within
    its reservation always gets its page. `reserve` and `cancel` may be called from any thread; all
    else from the engine's thread alone.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """`num_pages` counts the null page, as `Executor.num_pages` does."""
        if num_pages < 2 or page_size < 1:
            raise CapacityError(
                f"A pool of {num_pages} pages of {page_size} rows cannot hold anything; "
                "give it at least 2 pages of 1 row."
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self._live = np.zeros(num_pages, dtype=np.int32)
        self._open = np.zeros(num_pages, dtype=np.bool_)
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._holder: dict[int, Reservation] = {}
        self._reserved = 0
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Pages that can be given out."""
        return self.num_pages - 1

    @property
    def used(self) -> int:
        """Pages given out."""
        return self.capacity - len(self._free)

    @property
    def unreserved(self) -> int:
        """Pages nobody has reserved."""
        with self._lock:
            return self.capacity - self._reserved

    def reserve(self, pages: int, label: str) -> Reservation:
        """Promise `pages` to a holder called `label` in messages.

        Raises BusyError when they are not there now, with the size needed and how many such
        holders still fit, and CapacityError when the whole pool is smaller.
        """
        with self._lock:
            left = self.capacity - self._reserved
            if pages > left:
                kind = BusyError if pages <= self.capacity else CapacityError
                raise kind(
                    f"{label} needs {pages} pages of {self.page_size} rows, but {left} of the "
                    f"pool's {self.capacity} are unreserved, room for {left // pages} of that "
                    "size; use a smaller policy or a larger pool, or close a session."
                )
            self._reserved += pages
        return Reservation(pages, label)

    def cancel(self, reservation: Reservation) -> None:
        """End a reservation whose pages have all been given back."""
        if reservation.used:
            raise RuntimeError(f"{reservation.label} still holds {reservation.used} pages")
        with self._lock:
            self._reserved -= reservation.pages
        reservation.pages = 0

    def require(self, reservation: Reservation, pages: int) -> None:
        """Raise CapacityError if `pages` more would exceed the reservation."""
        if reservation.used + pages > reservation.pages:
            raise CapacityError(
                f"{reservation.label} needs {pages} more pages, but holds {reservation.used} of "
                f"its {reservation.pages} pages of {self.page_size} rows; close it, or use a "
                "policy that evicts more."
            )

    def open_page(self, reservation: Reservation) -> int:
        """Give out a page a lane appends to. Raises CapacityError beyond the reservation."""
        self.require(reservation, 1)
        page = self._free.pop()
        reservation.used += 1
        self._holder[page] = reservation
        self._open[page] = True
        return page

    def add_rows(self, page: int, rows: int) -> None:
        """Count `rows` new rows of an open page as live."""
        self._live[page] += rows

    def reopen_page(self, page: int) -> None:
        """Let a lane append to a page of its own again, after rows were taken back."""
        self._open[page] = True

    def close_page(self, page: int) -> None:
        """No lane appends to `page` any more."""
        self._open[page] = False
        self._free_if_unused(page)

    def retain(self, slots: Int32Array) -> None:
        """Count one more reference to each row; a freed page cannot be retained again."""
        pages, counts = np.unique(slots // self.page_size, return_counts=True)
        if not all(int(page) in self._holder for page in pages):
            raise RuntimeError("rows of a page that was never given out cannot be retained")
        self._live[pages] += counts.astype(np.int32)

    def release(self, slots: Int32Array) -> None:
        """Drop one reference to each row; pages without live rows return to the pool."""
        pages, counts = np.unique(slots // self.page_size, return_counts=True)
        left = self._live[pages] - counts
        if (left < 0).any():
            raise RuntimeError("more rows were released than were live")
        self._live[pages] = left
        for page in pages[left == 0]:
            self._free_if_unused(int(page))

    def _free_if_unused(self, page: int) -> None:
        if self._live[page] == 0 and not self._open[page]:
            self._holder.pop(page).used -= 1
            self._free.append(page)

    def check_integrity(self, live: Iterable[Int32Array]) -> None:
        """Recount everything from `live`, the slots of every span of every holder.

        Raises RuntimeError when a count, the free list or a reservation disagrees.
        """
        counted = np.zeros(self.num_pages, dtype=np.int64)
        for slots in live:
            counted += np.bincount(slots // self.page_size, minlength=self.num_pages)
        if not np.array_equal(counted, self._live):
            pages = np.flatnonzero(counted != self._live)[:8].tolist()
            raise RuntimeError(f"live rows were miscounted on pages {pages}")
        free = np.zeros(self.num_pages, dtype=np.bool_)
        free[self._free] = True
        if len(self._free) != int(free.sum()) or free[NULL_PAGE]:
            raise RuntimeError("the free list holds a page twice, or the null page")
        taken = (counted > 0) | self._open
        taken[NULL_PAGE] = True
        if (free == taken).any():
            pages = np.flatnonzero(free == taken)[:8].tolist()
            raise RuntimeError(f"pages {pages} are both free and taken, or neither")
        if set(self._holder) != set(np.flatnonzero(~free)[1:].tolist()):
            raise RuntimeError("pages and their holders disagree")
        used: dict[int, int] = {}
        for reservation in self._holder.values():
            used[id(reservation)] = used.get(id(reservation), 0) + 1
        for reservation in self._holder.values():
            count = used[id(reservation)]
            if reservation.used != count or count > reservation.pages:
                raise RuntimeError(
                    f"{reservation.label} holds {count} pages, counts {reservation.used} and "
                    f"may hold {reservation.pages}"
                )
