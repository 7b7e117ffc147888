"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable
from typing import Any

WAIT_SECONDS = 60.0


def until(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> None:
    """Wait for what must come about; fails if it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
