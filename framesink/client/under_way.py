"""Requests of a session that have not been answered, and responses that came before their turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from framesink.client.wire import Request, Response


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


class UnderWay:
    """What was sent, by its number, and what waits for a connection. Not safe for several threads.

    Numbers are counted on through a change of servers.
    """

    def __init__(self) -> None:
        self._sent: dict[str, Pending] = {}
        self._waiting: list[Pending] = []
        self._held: list[Response] = []
        self._requests = 0

    def __iter__(self) -> Iterator[Pending]:
        """What was sent and has no last response."""
        return iter(self._sent.values())

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, pending: Pending, sequence_id: int) -> Request:
        """The request under the next number, in the session `sequence_id`: it counts as sent."""
        self._requests += 1
        pending.request = replace(
            pending.request, request_id=str(self._requests), sequence_id=sequence_id
        )
        self._sent[pending.request.request_id] = pending
        return pending.request

    def put_back(self, pending: Pending) -> None:
        """A request that had its last response counts as sent after all."""
        self._sent[pending.request.request_id] = pending

    def wait(self, pending: Pending) -> None:
        """Keep a request until there is a connection."""
        self._waiting.append(pending)

    def take_waiting(self) -> list[Pending]:
        """Those that waited, in order; they wait no longer."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def take_all(self) -> list[Pending]:
        """All that was sent or waits, in the order it was sent; nothing is under way any more."""
        sent = sorted(self._sent.values(), key=lambda pending: int(pending.request.request_id))
        self._sent.clear()
        self._held.clear()
        return [*sent, *self.take_waiting()]

    def hear(self, response: Response) -> Pending | None:
        """The request of a response, None if it is not under way. With its last it is no more."""
        if response.is_last:
            return self._sent.pop(response.request_id, None)
        return self._sent.get(response.request_id)

    def hold(self, response: Response) -> None:
        """Keep a response until `take_next` finds that it may be heard."""
        self._held.append(response)

    def take_next(self) -> Response | None:
        """Take the first of the responses that may be heard now, None if there is none.

        Triton lets responses to requests of one stream overtake each other; those to a chunk, or to
        the end, are held until all chunks before it are answered. Errors are not: the answer before
        one may never come.
        """
        for place, response in enumerate(self._held):
            pending = self._sent.get(response.request_id)
            waits = pending is not None and (
                pending.request.chunk is not None or pending.request.end
            )
            if response.error is not None or not waits or not self._before(response):
                return self._held.pop(place)
        return None

    def _before(self, response: Response) -> bool:
        """Whether a chunk that was sent before the response's is not answered yet."""
        number = int(response.request_id)
        return any(
            other.request.chunk is not None and int(name) < number
            for name, other in self._sent.items()
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
