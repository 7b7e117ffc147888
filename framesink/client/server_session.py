"""A session as its server knows it: how it is opened, asked for, found again, and ended."""

import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from framesink.client.connection import Connection
from framesink.client.errors import ClientError, ServerUnavailableError, SessionLostError
from framesink.client.wire import ParameterValue, Request
from framesink.serving.contract import LANGUAGE_MODEL

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 2.0


class ServerSession:
    """`sequence_id` is Triton's correlation id; a new session in place of a lost one has another.

    Requests go to `model`. Every method answers, or fails, within the connection's timeout.
    """

    def __init__(
        self, connection: Connection, model: str, parameters: Mapping[str, ParameterValue]
    ) -> None:
        """Open a session. Raises what `Connection.require_ready` and `Connection.call` do."""
        self._connection = connection
        self._model = model
        self._parameters = parameters
        connection.require_ready()
        self.sequence_id = self._start(parameters)

    def require_known(self) -> None:
        """Raise SessionLostError if the server does not know it, and what `Connection.call` does.

        The server takes it for a sign of life. Triton forgets a session with its END, answered or
        not.
        """
        self._connection.require_session(self._model, self.sequence_id)

    def find(self, transcript: str, deadline: float, giving_up: threading.Event) -> bool:
        """Find it again, or open a new one that goes on from `transcript`; whether it is new.

        Tries until `deadline` (`time.monotonic()`), then raises ServerUnavailableError; raises
        RefusedError for a server that does not take it. When `giving_up` is set the next try is
        the last.
        """
        wait = _FIRST_WAIT_SECONDS
        while True:
            try:
                return self._try_to_find(transcript)
            except ServerUnavailableError:
                if time.monotonic() + wait >= deadline or giving_up.wait(wait):
                    raise
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)

    def end(self) -> None:
        """Free its pages at once. A server that is gone, or slow, does it by itself."""
        with suppress(ClientError):
            self._connection.call(Request(LANGUAGE_MODEL, "close", self.sequence_id, end=True))

    def _try_to_find(self, transcript: str) -> bool:
        self._connection.require_ready()
        try:
            self.require_known()
        except SessionLostError:
            said = {"previous_text": transcript} if transcript else {}
            self.sequence_id = self._start({**self._parameters, **said})
            return True
        return False

    def _start(self, parameters: Mapping[str, ParameterValue]) -> int:
        sequence_id = secrets.randbits(62) + 1
        self._connection.call(
            Request(self._model, "open", sequence_id, start=True, parameters=parameters)
        )
        return sequence_id
