"""Video time: what a container or a clock says becomes strictly increasing seconds."""

import math

NUDGE_SECONDS = 1e-3
DISCONTINUITY_SECONDS = 1.0
LARGEST_GAP_SECONDS = 3600.0
FALLBACK_FPS = 25.0
_LARGEST_SECONDS = 1e9


class Timeline:
    """Cleans the timestamps of one source, in the order its frames come.

    Good timestamps pass unchanged. A missing or repeated one is placed one frame after the frame
    before it. A step back of less than a second is taken for disorder: the frame is placed just
    after the one before it, and the following ones are believed again. A longer step back (joined
    streams) or a step forward of more than an hour is taken for a new origin: from there on the
    differences are believed and the values are not.
    """

    def __init__(self, fps: float = 0.0) -> None:
        """`fps` is the nominal frame rate; it stands in where timestamps are missing."""
        self.frame_seconds = 1.0 / (fps if math.isfinite(fps) and fps > 0 else FALLBACK_FPS)
        self._offset = 0.0
        self._last: float | None = None
        self._last_raw = math.nan

    def place(self, raw: float) -> float:
        """Seconds of video time of the next frame, whose source says `raw` seconds."""
        placed = self._first(raw) if self._last is None else self._following(raw, self._last)
        self._last, self._last_raw = placed, raw
        return placed

    def _first(self, raw: float) -> float:
        if not _is_time(raw):
            return 0.0
        if not 0 <= raw <= LARGEST_GAP_SECONDS:
            self._offset = -raw
        return raw + self._offset

    def _following(self, raw: float, last: float) -> float:
        next_frame = last + self.frame_seconds
        if not _is_time(raw) or raw == self._last_raw:
            return next_frame
        placed = raw + self._offset
        if -DISCONTINUITY_SECONDS < placed - last <= 0:
            return last + NUDGE_SECONDS
        if not 0 < placed - last <= LARGEST_GAP_SECONDS:
            self._offset = next_frame - raw
            return next_frame
        return placed


def _is_time(raw: float) -> bool:
    return math.isfinite(raw) and abs(raw) < _LARGEST_SECONDS
