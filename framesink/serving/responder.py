"""Where the answers to a request go."""

from typing import Protocol

from framesink.runtime.events import Event
from framesink.serving.errors import StatusCode


class Responder(Protocol):
    """The way back to the client of one request.

    Used from the host's thread alone. Nothing is sent after the last response, and nothing raises:
    a client that is gone is no error here.
    """

    @property
    def cancelled(self) -> bool:
        """Whether the client cancelled the request, or is gone."""
        ...

    def send(self, event: Event, *, last: bool) -> None:
        """Send an event; with `last` no other follows."""
        ...

    def finish(self) -> None:
        """End without an event."""
        ...

    def fail(self, code: StatusCode, sentence: str) -> None:
        """End with an error."""
        ...
