"""What a view of a stream is, and the plain one: lines of text, no control characters."""

import unicodedata
from dataclasses import dataclass
from typing import Protocol, TextIO

from framesink.runtime.events import Event, EventKind

NO_ANSWER = "(no answer)"


@dataclass(frozen=True, slots=True)
class Status:
    """The moment's figures: times in seconds, None before there was a reply. `rung` is where the
    stream stands on its ladder, 0 in full quality."""

    lag: float | None = None
    fps: float = 0.0
    ttft: float | None = None
    itl: float | None = None
    pages_used: int = 0
    pages_total: int = 0
    context_tokens: int = 0
    dropped_frames: int = 0
    rung: int = 0


class View(Protocol):
    """Shows a stream. Used from one thread, `typing` from any."""

    def event(self, event: Event) -> None:
        """Show the next event of the session."""
        ...

    def status(self, status: Status) -> None:
        """Show the moment's figures."""
        ...

    def note(self, text: str) -> None:
        """Show a line that is not the model's: how it runs, a warning, the summary."""
        ...

    def typing(self, text: str) -> None:
        """Show a question that is being typed."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was; a reply that was begun is shown. Idempotent."""
        ...


def printable(text: str) -> str:
    """Text of a model or a user in one line, without anything that could steer a terminal."""
    spaced = " ".join(text.split())
    return "".join(
        character for character in spaced if unicodedata.category(character) not in ("Cc", "Cf")
    )


def clock(t0: float, t1: float) -> str:
    """A span of video time: seconds below a minute, minutes and hours above."""
    return f"{_clock(t0)}–{_clock(t1)}"


def _clock(time: float) -> str:
    tenths = round(time * 10)
    minutes, tenths = divmod(tenths, 600)
    if minutes == 0:
        return f"{tenths / 10:.1f}"
    hours, minutes = divmod(minutes, 60)
    short = f"{minutes}:{tenths / 10:04.1f}"
    return short if hours == 0 else f"{hours}:{minutes:02}:{tenths / 10:04.1f}"


class PlainView:
    """Captions as lines on one stream, notes on another: for pipes and files.

    Silence is not shown, except where a question was asked.
    """

    def __init__(self, captions: TextIO, notes: TextIO) -> None:
        self._captions = captions
        self._notes = notes
        self._pieces: list[str] = []
        self._latest: Event | None = None

    def event(self, event: Event) -> None:
        """See View."""
        if event.kind in (EventKind.DEGRADED, EventKind.ERROR):
            self.note(f"{event.kind.value}: {printable(event.text)}")
            return
        self._pieces.append(event.text)
        self._latest = event
        if event.final:
            self._show()

    def status(self, status: Status) -> None:
        """Not shown: a line that changes needs a terminal."""

    def note(self, text: str) -> None:
        """See View."""
        print(text, file=self._notes, flush=True)

    def typing(self, text: str) -> None:
        """Not shown: nobody types."""

    def close(self) -> None:
        """See View."""
        self._show()

    def _show(self) -> None:
        event, text = self._latest, printable("".join(self._pieces))
        self._latest, self._pieces = None, []
        if event is None or not (text or event.question):
            return
        if event.question:
            text = f"{printable(event.question)} → {text or NO_ANSWER}"
        print(f"[{clock(event.t0, event.t1)}] {text}", file=self._captions, flush=True)
