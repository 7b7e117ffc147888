"""How a client runs a session."""

from dataclasses import dataclass

from framesink.client.frames import FrameFormat, require_format
from framesink.runtime.errors import OptionError
from framesink.serving.contract import LANGUAGE_MODEL, STREAMING_VLM

_ROADS = (LANGUAGE_MODEL, STREAMING_VLM)


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """What the client decides by itself; the server knows nothing of it. Times are seconds.

    `model` is the road: `language_model`, or the ensemble `streaming_vlm`. Frames travel as
    `frame_format`, JPEG in `quality`. `max_in_flight` chunks are under way at once; `push` waits
    `push_timeout` for one of them to be answered and read. A lost connection is tried again for
    `reconnect_seconds`; 0 leaves that to `resume`. When a reply stays away for `quiet_seconds` the
    server is asked whether it still knows the session; after `reply_seconds` it is given up.
    """

    model: str = LANGUAGE_MODEL
    frame_format: FrameFormat = "jpeg"
    quality: int = 90
    max_in_flight: int = 2
    push_timeout: float = 60.0
    reconnect_seconds: float = 30.0
    quiet_seconds: float = 3.0
    reply_seconds: float = 120.0

    def __post_init__(self) -> None:
        """Raise OptionError for settings that make no sense."""
        if self.model not in _ROADS:
            raise OptionError(f"model={self.model!r} is not one of {', '.join(_ROADS)}.")
        require_format(self.frame_format, self.quality)
        if self.max_in_flight < 1:
            raise OptionError(f"max_in_flight={self.max_in_flight} must be at least 1.")
        for name in ("push_timeout", "quiet_seconds", "reply_seconds"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name}={getattr(self, name)} must be above 0.")
