"""framesink: live video through a vision-language model.

The public surface. Everything is imported on first use, so that `import framesink` costs nothing
and a host needs only the packages of the parts it calls.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framesink.runtime.engine import StreamingEngine
    from framesink.runtime.errors import FramesinkError
    from framesink.runtime.events import Event, EventKind
    from framesink.runtime.load.ladder import Ladder, RealTime, Rung
    from framesink.runtime.policies import FullAttention, SinkWindow, SlidingWindow
    from framesink.runtime.sampler import SamplingParams
    from framesink.runtime.session import Session
    from framesink.runtime.video.capture import ChunkStream
    from framesink.runtime.video.source import open_source

_HOMES = {
    "ChunkStream": "framesink.runtime.video.capture",
    "Event": "framesink.runtime.events",
    "EventKind": "framesink.runtime.events",
    "FramesinkError": "framesink.runtime.errors",
    "FullAttention": "framesink.runtime.policies",
    "Ladder": "framesink.runtime.load.ladder",
    "RealTime": "framesink.runtime.load.ladder",
    "Rung": "framesink.runtime.load.ladder",
    "SamplingParams": "framesink.runtime.sampler",
    "Session": "framesink.runtime.session",
    "SinkWindow": "framesink.runtime.policies",
    "SlidingWindow": "framesink.runtime.policies",
    "StreamingEngine": "framesink.runtime.engine",
    "open_source": "framesink.runtime.video.source",
}

__all__ = [
    "ChunkStream",
    "Event",
    "EventKind",
    "FramesinkError",
    "FullAttention",
    "Ladder",
    "RealTime",
    "Rung",
    "SamplingParams",
    "Session",
    "SinkWindow",
    "SlidingWindow",
    "StreamingEngine",
    "open_source",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'framesink' has no attribute {name!r}")
