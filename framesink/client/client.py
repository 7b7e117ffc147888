"""A server's client: where sessions come from."""

import threading
import weakref
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from framesink.client.connection import Connection, Tls
from framesink.client.link import SessionLink
from framesink.client.session import Session
from framesink.client.settings import SessionSettings
from framesink.client.wire import require_parameters
from framesink.runtime.errors import SessionClosedError


class SessionParameters(TypedDict, total=False):
    """What the server is told of a session; see `framesink.serving.contract` for the meanings."""

    policy: str
    sink_text: int
    recent_text: int
    vision_seconds: float
    reply_turns: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    chunk_seconds: float
    max_patches: int
    precision: str
    previous_text: str
    ladder: str


class Client:
    """Opens sessions on one server, all over one connection. Safe from any thread."""

    def __init__(self, connection: Connection) -> None:
        """Made by `connect`."""
        self._connection = connection
        self._links: weakref.WeakSet[SessionLink] = weakref.WeakSet()
        self._opening = threading.Lock()
        self._closed = False

    def ready(self) -> bool:
        """Whether the server takes sessions now. Raises ServerGoneError if nobody answers."""
        return self._connection.ready()

    def session(
        self,
        query: str | None = None,
        *,
        settings: SessionSettings | None = None,
        **parameters: Unpack[SessionParameters],
    ) -> Session:
        """Open a session; what is left out is the default of the server's bundle.

        Raises ServerGoneError if nobody answers, ServerUnavailableError if the server is not ready,
        full or draining, RefusedError for parameters it does not take, OptionError for those that
        make no sense.
        """
        return Session(self.open_link(query, settings, parameters))

    def open_link(
        self, query: str | None, settings: SessionSettings | None, parameters: SessionParameters
    ) -> SessionLink:
        """What `session` wraps."""
        given: dict[str, Any] = dict(parameters)
        if query is not None:
            given["query"] = query
        require_parameters(given)
        if self._closed:
            raise SessionClosedError("The client was closed; connect again.")
        link = SessionLink(self._connection, settings or SessionSettings(), given)
        with self._opening:
            self._links.add(link)
        return link

    def close(self) -> None:
        """Close all sessions and the connection."""
        self._closed = True
        with self._opening:
            links = list(self._links)
        for link in links:
            link.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def connect(url: str, *, timeout: float = 10.0, tls: Tls | None = None) -> Client:
    """A client of the server at `grpc://HOST:PORT`, or `grpcs://HOST:PORT` with TLS.

    `timeout` bounds every short exchange with it, in seconds. Raises ServerGoneError if nobody
    answers there, OptionError for an address that is none.
    """
    connection = Connection(url, timeout=timeout, tls=tls)
    try:
        connection.ready()
    except BaseException:
        connection.close()
        raise
    return Client(connection)
