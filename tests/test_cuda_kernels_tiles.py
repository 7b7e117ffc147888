"""Tiles against the rows they were made of."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framesink.runtime.executors.base import ContextView
from framesink.runtime.executors.cuda.kernels.tiles import NO_SLOT, TILE_ROWS, TileTable

PAGE = 8


def rows_of(table: TileTable) -> list[tuple[int, int]]:
    """Slot and base of every row, sorted."""
    slots, bases = table.rows()
    return sorted(zip(slots.tolist(), bases.tolist(), strict=True))


def tiles_of(table: TileTable, rows: dict[int, int]) -> set[int]:
    """The tiles that hold rows, base by slot."""
    used = table.slots[: table.count]
    return {int(tile) for slot in rows for tile in np.flatnonzero((used == slot).any(axis=1))}


def view_of(rows: dict[int, int], page_size: int) -> ContextView:
    """A context of rows, base by slot."""
    pages = sorted({slot // page_size for slot in rows}, key=lambda page: -page) or [0]
    bases = np.zeros(len(pages) * page_size, np.int32)
    valid = np.zeros(len(bases), np.bool_)
    for slot, base in rows.items():
        index = pages.index(slot // page_size) * page_size + slot % page_size
        bases[index], valid[index] = base, True
    positions = np.zeros((3, len(bases)), np.int32)
    return ContextView(np.array(pages, np.int32), positions, valid, bases)


CONTEXTS = st.dictionaries(st.integers(PAGE, 40 * PAGE - 1), st.integers(-3, 3), max_size=200)


@given(CONTEXTS)
def test_tiles_hold_every_row_once_under_its_base(rows: dict[int, int]) -> None:
    table = TileTable(PAGE)
    table.rebuild(view_of(rows, PAGE))
    assert rows_of(table) == sorted(rows.items())
    # Read as a kernel reads it: every row of a tile under the tile's base.
    found = [
        (slot, base)
        for base, slots in zip(table.bases.tolist(), table.slots.tolist(), strict=True)
        for slot in slots
        if slot != NO_SLOT
    ]
    assert sorted(found) == sorted(rows.items())


@given(CONTEXTS, CONTEXTS)
def test_appended_rows_join_those_of_a_rebuild(
    older: dict[int, int], newer: dict[int, int]
) -> None:
    newer = {slot: base for slot, base in newer.items() if slot not in older}
    table = TileTable(PAGE)
    table.rebuild(view_of(older, PAGE))
    slots, bases = np.array(list(newer), np.int32), np.array(list(newer.values()), np.int32)
    changed = table.append(slots, bases)
    assert rows_of(table) == sorted((older | newer).items())
    assert len(changed) == len(set(changed))
    assert tiles_of(table, newer) == set(changed)
    assert set(table.forget(slots)) == set(changed)
    assert rows_of(table) == sorted(older.items())


@pytest.mark.parametrize("page_size", [8, 16, 32])
def test_rows_of_one_base_fill_whole_tiles(page_size: int) -> None:
    """As many tiles as a dense context needs, whichever way its rows came."""
    slots = np.arange(page_size, page_size + 5 * TILE_ROWS, dtype=np.int32)
    bases = np.full(slots.size, 7, np.int32)
    appended, rebuilt = TileTable(page_size), TileTable(page_size)
    for slot, base in zip(slots, bases, strict=True):
        appended.append(slot[None], base[None])
    rebuilt.rebuild(view_of(dict(zip(slots.tolist(), bases.tolist(), strict=True)), page_size))
    assert appended.count == rebuilt.count == 5
    assert rows_of(appended) == rows_of(rebuilt)
    assert (appended.slots[:5] != NO_SLOT).all()


def test_a_rebuilt_table_forgets_what_it_held() -> None:
    table = TileTable(PAGE)
    table.rebuild(view_of({slot: slot % 3 for slot in range(PAGE, 300)}, PAGE))
    table.rebuild(view_of({PAGE: 5}, PAGE))
    assert rows_of(table) == [(PAGE, 5)]
    table.append(np.array([PAGE + 1], np.int32), np.array([5], np.int32))
    assert table.count == 1


def test_a_context_without_bases_is_refused() -> None:
    view = view_of({PAGE: 1}, PAGE)
    with pytest.raises(ValueError, match="without bases"):
        TileTable(PAGE).rebuild(ContextView(view.block_table, view.positions, view.valid))
