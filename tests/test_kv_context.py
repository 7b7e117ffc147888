"""The executor's view of a context against a dictionary of rows."""

import copy

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from framesink.runtime.arrays import Int32Array
from framesink.runtime.executors.base import ContextView
from framesink.runtime.kv.context import Context

PAGE_SIZE = 4


def rows_of(slots: list[int], first: int) -> tuple[Int32Array, Int32Array, Int32Array]:
    """Slots with positions and bases that are all different."""
    count = np.arange(first, first + len(slots), dtype=np.int32)
    return np.array(slots, dtype=np.int32), np.stack([count, count + 1000, count + 2000]), -count


def check(context: Context, expected: dict[int, tuple[list[int], int]]) -> None:
    """The view holds exactly the expected rows, each page once."""
    view = context.view()
    assert view.bases is not None
    assert len(set(view.block_table.tolist())) == view.block_table.size >= 1
    slots = (view.block_table[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(-1)
    found = {
        int(slots[index]): (view.positions[:, index].tolist(), int(view.bases[index]))
        for index in np.flatnonzero(view.valid)
    }
    assert found == expected
    assert view.rows == len(expected)
    assert not view.positions[:, ~view.valid].any()


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_rows_come_and_go(data: st.DataObject) -> None:
    context = Context(PAGE_SIZE)
    expected: dict[int, tuple[list[int], int]] = {}
    free = list(range(PAGE_SIZE, PAGE_SIZE * 60))
    counter = 1
    seen: dict[tuple[int, int], ContextView] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.sampled_from(["append", "append", "forget", "rebuild"]))
        if kind == "forget":
            count = data.draw(st.integers(0, len(expected)))
            gone = list(expected)[len(expected) - count :]
            context.forget(np.array(gone, dtype=np.int32))
            for slot in gone:
                del expected[slot]
            free = gone + free
        else:
            count = data.draw(st.integers(0, min(40, len(free))))
            chosen = data.draw(st.permutations(free)) if kind == "rebuild" else free
            slots = chosen[:count]
            if kind == "rebuild":
                free += list(expected)
                expected.clear()
                context.rebuild(*rows_of(slots, counter))
            else:
                context.append(*rows_of(slots, counter))
            free = [slot for slot in free if slot not in set(slots)]
            _, positions, bases = rows_of(slots, counter)
            for index, slot in enumerate(slots):
                expected[slot] = (positions[:, index].tolist(), int(bases[index]))
            counter += count
        check(context, expected)
        view = context.view()
        assert view.edition is not None
        if view.edition in seen:
            check_kept(seen[view.edition], view)
        # a copy: a view is valid until the next change
        seen[view.edition] = copy.deepcopy(view)


def check_kept(before: ContextView, after: ContextView) -> None:
    """Every row of `before` is where it was."""
    assert before.bases is not None
    assert after.bases is not None
    rows = np.flatnonzero(before.valid)
    assert after.valid[rows].all()
    pages = rows // PAGE_SIZE
    np.testing.assert_array_equal(before.block_table[pages], after.block_table[pages])
    np.testing.assert_array_equal(before.positions[:, rows], after.positions[:, rows])
    np.testing.assert_array_equal(before.bases[rows], after.bases[rows])


def test_contexts_have_editions_of_their_own() -> None:
    assert Context(PAGE_SIZE).view().edition != Context(PAGE_SIZE).view().edition


def test_pages_stand_in_the_order_they_are_read() -> None:
    """Whatever pages the pool gave out: a context reads the same alone and among others."""
    context = Context(PAGE_SIZE)
    context.rebuild(*rows_of([36, 37, 8, 9, 38, 20], 1))
    assert context.view().block_table.tolist() == [9, 2, 5]
    context.append(*rows_of([21, 12], 7))
    assert context.view().block_table.tolist() == [9, 2, 5, 3]


def test_pages_left_empty_at_the_end_are_dropped() -> None:
    context = Context(PAGE_SIZE)
    context.rebuild(*rows_of([8, 9], 1))
    context.append(*rows_of([10, 11, 40], 3))
    context.forget(np.array([11, 40], dtype=np.int32))
    assert context.view().block_table.tolist() == [2]
    context.append(*rows_of([60], 6))
    assert context.view().block_table.tolist() == [2, 15]


def test_an_empty_context_shows_the_null_page() -> None:
    view = Context(PAGE_SIZE).view()
    assert view.block_table.tolist() == [0]
    assert not view.valid.any()
