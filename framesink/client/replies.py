"""What responses become: events as a client sees them."""

import time
from collections.abc import Sequence
from dataclasses import replace

from framesink.client.under_way import Pending
from framesink.runtime.events import Event, EventKind, ReplyTiming

LOST_REPLY = "The reply to this chunk, or the rest of it, was lost with the connection."


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
        pending.turn = event.turn + self._first_turn
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
            turn=pending.turn,
            lag=event.lag if pending.captured_at is None else now - pending.captured_at,
            timing=timing,
        )
        return self._last

    def begin_anew(self) -> None:
        """The next event comes from a new session, which counts its turns from the start."""
        self._first_turn = 0 if self._last is None else self._last.turn + 1

    def notice(self, text: str) -> Event:
        """An event that tells of something that concerns no chunk alone."""
        end = 0.0 if self._last is None else self._last.t1
        return Event(EventKind.DEGRADED, text, end, end, self._turn(), 0.0, final=False)

    def lost(self, pending: Pending, text: str) -> Event:
        """The last event of a chunk that gets no reply, or no whole one."""
        end = 0.0 if self._last is None else self._last.t1
        chunk = pending.request.chunk
        t0, t1 = (end, end) if chunk is None or chunk.span is None else chunk.span
        lag = 0.0 if pending.captured_at is None else time.monotonic() - pending.captured_at
        turn = self._turn() if pending.turn is None else pending.turn
        return Event(EventKind.DEGRADED, text, t0, t1, turn, lag, final=True)

    def _turn(self) -> int:
        return self._first_turn if self._last is None else self._last.turn


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
