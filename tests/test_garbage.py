"""The garbage collector passes over what is loaded, and over nothing that comes later."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from framesink.runtime.garbage import pass_over_what_is_loaded


class Knot:
    """Holds itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_loaded_is_passed_over() -> None:
    loaded = Knot()
    pass_over_what_is_loaded()
    assert gc.get_freeze_count() > 0
    assert not any(item is loaded for item in gc.get_objects())


def test_garbage_is_freed_before_and_after() -> None:
    before = weakref.ref(Knot())
    pass_over_what_is_loaded()
    assert before() is None
    after = weakref.ref(Knot())
    gc.collect()
    assert after() is None
