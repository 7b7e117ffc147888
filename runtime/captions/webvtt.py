"""WebVTT: captions a video player shows.

Source: https://www.w3.org/TR/webvtt1/.
"""

import re
from pathlib import Path

from framesink.runtime.captions.writer import CaptionWriter
from framesink.runtime.events import Event

_SHORTEST_CUE_MS = 1
_LINE_BREAKS = re.compile(r"[\r\n\u2028\u2029\f\v]+")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def escape(text: str) -> str:
    """Cue text for any string: markup is escaped, blank lines and control characters are gone."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    lines = (_CONTROLS.sub("", line).strip() for line in _LINE_BREAKS.split(text))
    return "\n".join(line for line in lines if line)


def timestamp(milliseconds: int) -> str:
    """`HH:MM:SS.mmm`; hours grow as needed."""
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}.{milliseconds:03}"


class WebVttWriter(CaptionWriter):
    """One cue per reply that says something, over the video time it is about.

    An answer is preceded by its question in italics. Cues start no earlier than the one before, as
    the format demands.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises OutputError if the file cannot be written."""
        super().__init__(path)
        self._last_start = 0

    def header(self) -> str:
        """See CaptionWriter."""
        return "WEBVTT\n"

    def reply(self, event: Event, text: str) -> str:
        """A cue, or nothing for silence."""
        cue = escape(text)
        if not cue:
            return ""
        question = escape(event.question or "")
        if question:
            cue = f"<i>{question}</i>\n{cue}"
        start = max(round(event.t0 * 1000), self._last_start)
        end = max(round(event.t1 * 1000), start + _SHORTEST_CUE_MS)
        self._last_start = start
        return f"\n{timestamp(start)} --> {timestamp(end)}\n{cue}\n"

    def notice(self, event: Event) -> str:
        """A comment: players do not show it."""
        return f"\nNOTE {event.kind.value} at {timestamp(round(event.t0 * 1000))}\n" + (
            f"{escape(event.text)}\n" if event.text.strip() else ""
        )
