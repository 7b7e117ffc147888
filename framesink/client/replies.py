"""Requests under way, and what their responses become: events as a client sees them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from framesink.client.wire import Request, Response
from framesink.runtime.events import Event, EventKind, ReplyTiming

LOST_REPLY = "The reply to this chunk, or the rest of it, was lost with the connection."


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
    turn: int | None = None
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


def take_next(held: list[Response], pending: Mapping[str, Pending]) -> Response | None:
    """Take the first of the responses that may be heard now, None if there is none.

    Triton lets responses to requests of one stream overtake each other; those to a chunk, or to the
    end, are held until all chunks before it are answered. Errors are not: the answer before one may
    never come.
    """
    for place, response in enumerate(held):
        of = pending.get(response.request_id)
        waits = of is not None and (of.request.chunk is not None or of.request.end)
        if response.error is not None or not waits or not _before(response, pending):
            return held.pop(place)
    return None


def _before(response: Response, pending: Mapping[str, Pending]) -> bool:
    """Whether a chunk that was sent before the response's is not answered yet."""
    number = int(response.request_id)
    return any(
        other.request.chunk is not None and int(name) < number for name, other in pending.items()
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
