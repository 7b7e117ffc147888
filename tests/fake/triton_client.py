"""What tests of the client have in common."""

import numpy as np

from framesink.client import Event, EventKind, SessionSettings

FRAME = np.random.default_rng(5).integers(0, 256, (2, 24, 32, 3), np.uint8)
PNG = SessionSettings(frame_format="png", quiet_seconds=0.2, reconnect_seconds=5.0)
WORDS = " one two"


def text_of(events: list[Event]) -> str:
    """What was said in events."""
    return "".join(event.text for event in events if event.kind is not EventKind.DEGRADED)
