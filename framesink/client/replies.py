"""Requests under way, and what their responses become: events as a client sees them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from framesink.client.wire import Request
from framesink.runtime.events import Event, EventKind, ReplyTiming


@dataclass(slots=True)
class Pending:
    """A request without its last response. Times are `time.monotonic()`."""

    request: Request
    sent_at: float
    captured_at: float | None = None
    holds_place: bool = False
    heard_at: float | None = None
    gaps: list[float] = field(default_factory=list)
    first_after: float = 0.0
    resent: bool = False


class Replies:
    """Makes events of what a server answers. Not safe for several threads.

    Turns are counted on through a change of servers. Lag and timing are those the client sees: from
    a frame's arrival and a chunk's `push` here to an event's arrival here.
    """

    def __init__(self) -> None:
        self._first_turn = 0
        self._last: Event | None = None

    def take(self, pending: Pending, event: Event) -> Event:
        """The event of a response, as the caller gets it."""
        now = time.monotonic()
        if event.kind is not EventKind.DEGRADED:
            if pending.heard_at is None:
                pending.first_after = now - pending.sent_at
            else:
                pending.gaps.append(now - pending.heard_at)
            pending.heard_at = now
        timing = None
        if event.final and pending.heard_at is not None:
            timing = ReplyTiming(pending.first_after, tuple(pending.gaps), now - pending.sent_at)
        self._last = replace(
            event,
            turn=event.turn + self._first_turn,
            lag=event.lag if pending.captured_at is None else now - pending.captured_at,
            timing=timing,
        )
        return self._last

    def begin_anew(self) -> None:
        """The next event comes from a new session, which counts its turns from the start."""
        self._first_turn = 0 if self._last is None else self._last.turn + 1

    def notice(self, text: str, concerned: Sequence[Pending]) -> Event:
        """An event that says why less was seen or said than asked for."""
        spans = [p.request.chunk.span for p in concerned if p.request.chunk is not None]
        known = [span for span in spans if span is not None]
        end = 0.0 if self._last is None else self._last.t1
        now = time.monotonic()
        waiting = [p.captured_at for p in concerned if p.captured_at is not None]
        return Event(
            kind=EventKind.DEGRADED,
            text=text,
            t0=known[0][0] if known else end,
            t1=known[-1][1] if known else end,
            turn=self._first_turn if self._last is None else self._last.turn,
            lag=now - waiting[-1] if waiting else 0.0,
            final=False,
        )


def places(requests: Sequence[Pending]) -> int:
    """How many places of chunks the requests hold."""
    return sum(pending.holds_place for pending in requests)


def may_be_sent_again(pending: Pending, anew: bool) -> bool:
    """Whether a request whose fate is unknown does more good than harm when it comes twice.

    An old session may have taken the chunk. A new one has taken nothing, but a request that was
    lost twice may be what brings the server down.
    """
    if pending.request.chunk is None:
        return True
    return anew and pending.heard_at is None and not pending.resent


def describe_loss(seconds: float, anew: bool, gone: Sequence[Pending]) -> str:
    """What is told of a connection that was lost for so long; `gone` are chunks it cost."""
    found = (
        "the server had lost the session, so a new one goes on from the words of the old, without "
        "what it saw"
        if anew
        else "the session goes on"
    )
    missing = f"; {len(gone)} chunks have no full reply" if gone else ""
    return f"The connection was lost and is back after {seconds:.1f} s: {found}{missing}."
