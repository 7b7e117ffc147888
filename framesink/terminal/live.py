"""The live view: captions scroll up, the reply being said and a status line stay at the bottom."""

import threading

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from framesink.runtime.events import Event, EventKind
from framesink.terminal.figures import milliseconds, seconds
from framesink.terminal.view import NO_ANSWER, Status, clock, printable

_REFRESH_PER_SECOND = 12
_TIME_WIDTH = 15


class LiveView:
    """For terminals. Text appears token by token; a silent turn is a dim dot until the next one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._pieces: list[str] = []
        self._latest: Event | None = None
        self._status = Status()
        self._typed = ""
        self._closed = False
        self._live = Live(
            get_renderable=self._bottom,
            console=console,
            refresh_per_second=_REFRESH_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def event(self, event: Event) -> None:
        """See View."""
        if event.kind in (EventKind.DEGRADED, EventKind.ERROR):
            style = "bold red" if event.kind is EventKind.ERROR else "yellow"
            self._console.print(_row(event, Text(printable(event.text), style=style)))
            return
        with self._lock:
            self._pieces.append(event.text)
            self._latest = event
        if event.final:
            self._settle()

    def status(self, status: Status) -> None:
        """See View."""
        with self._lock:
            self._status = status

    def note(self, text: str) -> None:
        """See View."""
        self._console.print(Text(text, style="dim"))

    def typing(self, text: str) -> None:
        """See View."""
        with self._lock:
            self._typed = text

    def close(self) -> None:
        """See View."""
        if self._closed:
            return
        self._closed = True
        self._settle()
        self._live.stop()

    def _settle(self) -> None:
        """Print the reply for good; silence stays at the bottom."""
        with self._lock:
            event, text = self._latest, printable("".join(self._pieces))
            self._pieces = []
            if event is None or not (text or event.question):
                return
            self._latest = None
        self._console.print(_row(event, _said(event, text)))

    def _bottom(self) -> RenderableType:
        with self._lock:
            latest, text = self._latest, printable("".join(self._pieces))
            status, typed = self._status, self._typed
        lines: list[RenderableType] = []
        if latest is not None:
            said = _said(latest, text) if text else Text("·", style="dim")
            lines.append(_row(latest, said))
        if typed:
            lines.append(Text(f"ask> {printable(typed)}▏", style="bold cyan"))
        lines.append(_status_line(status))
        return Group(*lines)


def _row(event: Event, text: Text) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_column(width=_TIME_WIDTH, justify="right", style="dim", no_wrap=True)
    row.add_column(overflow="fold")
    row.add_row(clock(event.t0, event.t1), text)
    return row


def _said(event: Event, text: str) -> Text:
    if not event.question:
        return Text(text)
    question = Text(printable(event.question), style="cyan")
    return question.append(" → ", style="cyan").append(text or NO_ANSWER, style="bold green")


def _status_line(status: Status) -> Text:
    parts = [
        f"lag {seconds(status.lag)}",
        f"{status.fps:.1f} FPS",
        f"TTFT {milliseconds(status.ttft)}",
        f"ITL {milliseconds(status.itl)}",
        f"KV {status.pages_used}/{status.pages_total} pages",
        f"context {status.context_tokens:,} tokens",
        f"dropped {status.dropped_frames}",
    ]
    if status.rung:
        parts.append(f"degraded, rung {status.rung}")
    return Text(" │ ".join(parts), style="dim", no_wrap=True, overflow="ellipsis")
