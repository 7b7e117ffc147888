"""The page pool and its lanes: every row counted, every page accounted for, at every moment."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from framesink.runtime.arrays import Int32Array
from framesink.runtime.errors import CapacityError
from framesink.runtime.kv.lane import Lane, pages_of_run
from framesink.runtime.kv.page_pool import NULL_PAGE, PagePool

PAGES, PAGE_SIZE = 24, 4


class PoolMachine(RuleBasedStateMachine):
    """Two holders with a lane each take, share, give back and take back rows at random."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES + 1, PAGE_SIZE)
        self.reservations = [self.pool.reserve(PAGES // 2, f"Holder {i}") for i in range(2)]
        self.lanes = [Lane(self.pool, reservation) for reservation in self.reservations]
        self.taken: list[list[Int32Array]] = [[], []]
        self.shared: list[Int32Array] = []

    @rule(who=st.integers(0, 1), count=st.integers(1, 13))
    def take(self, who: int, count: int) -> None:
        held_before = self.reservations[who].used
        try:
            slots = self.lanes[who].take(count)
        except CapacityError:
            assert self.reservations[who].used == held_before
            assert held_before + -(-count // PAGE_SIZE) > PAGES // 2
            return
        assert slots.size == count
        assert (slots // PAGE_SIZE != NULL_PAGE).all()
        self.taken[who].append(slots)

    @rule(who=st.integers(0, 1))
    def release_oldest(self, who: int) -> None:
        if self.taken[who]:
            self.pool.release(self.taken[who].pop(0))

    @rule(who=st.integers(0, 1))
    def take_back_newest(self, who: int) -> None:
        """A lane that took its rows back goes on where they began, in a page of any number if they
        began one: that page is free meanwhile. Shared rows stay."""
        if not self.taken[who] or any(self.taken[who][-1] is slots for slots in self.shared):
            return
        slots = self.taken[who].pop()
        used = self.pool.used
        self.lanes[who].take_back(slots)
        begun = set((slots[slots % PAGE_SIZE == 0] // PAGE_SIZE).tolist())
        assert self.pool.used == used - len(begun)
        again = self.lanes[who].take(slots.size)
        assert again[0] % PAGE_SIZE == slots[0] % PAGE_SIZE
        assert again[0] == slots[0] or slots[0] // PAGE_SIZE in begun
        self.lanes[who].take_back(again)

    @precondition(lambda self: any(self.taken))
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        everything = [slots for taken in self.taken for slots in taken]
        slots = data.draw(st.sampled_from(everything))
        self.pool.retain(slots)
        self.shared.append(slots)

    @precondition(lambda self: self.shared)
    @rule()
    def unshare(self) -> None:
        self.pool.release(self.shared.pop())

    @invariant()
    def everything_is_counted(self) -> None:
        mine = [slots for taken in self.taken for slots in taken]
        self.pool.check_integrity([*mine, *self.shared])
        rows = np.concatenate([np.empty(0, np.int32), *mine])
        assert np.unique(rows).size == rows.size
        assert self.pool.used == sum(reservation.used for reservation in self.reservations)

    def teardown(self) -> None:
        for lane in self.lanes:
            lane.close()
        for slots in [*self.shared, *self.taken[0], *self.taken[1]]:
            self.pool.release(slots)
        assert self.pool.used == 0
        for reservation in self.reservations:
            self.pool.cancel(reservation)
        assert self.pool.unreserved == PAGES


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_reservations_never_exceed_the_pool() -> None:
    pool = PagePool(11, 16)
    pool.reserve(4, "A session")
    with pytest.raises(CapacityError, match=r"needs 7 pages of 16 rows, but 6 of the pool's 10"):
        pool.reserve(7, "A session")
    second = pool.reserve(6, "A session")
    pool.cancel(second)
    assert pool.unreserved == 6


def test_a_reservation_ends_only_when_its_pages_are_back() -> None:
    pool = PagePool(11, 16)
    reservation = pool.reserve(4, "A session")
    lane = Lane(pool, reservation)
    slots = lane.take(3)
    with pytest.raises(RuntimeError, match="still holds 1 pages"):
        pool.cancel(reservation)
    pool.release(slots)
    lane.close()
    pool.cancel(reservation)
    assert pool.used == 0


def test_integrity_finds_what_is_wrong() -> None:
    pool = PagePool(11, 16)
    lane = Lane(pool, pool.reserve(4, "A session"))
    slots = lane.take(20)
    pool.check_integrity([slots])
    with pytest.raises(RuntimeError, match="miscounted"):
        pool.check_integrity([slots[1:]])
    with pytest.raises(RuntimeError, match="more rows were released"):
        pool.release(np.concatenate([slots, slots[:1]]))
    with pytest.raises(RuntimeError, match="never given out"):
        pool.retain(np.array([16 * 9], dtype=np.int32))


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_run_of_rows_touches_no_more_pages_than_stated(page_size: int) -> None:
    for rows in range(60):
        touched = [
            len({row // page_size for row in range(start, start + rows)})
            for start in range(page_size)
        ]
        assert pages_of_run(rows, page_size) == max(touched)
