"""One gRPC stream of a session: requests go out in order, responses are read by a thread."""

import queue
import threading
from typing import Any, Protocol

import grpc

from framesink.client.connection import Connection
from framesink.client.errors import ClientError
from framesink.client.wire import Request, Response, decode, encode


class Receiver(Protocol):
    """Whom a stream tells what comes; called from the stream's thread."""

    def received(self, stream: "RequestStream", response: Response) -> None:
        """A response came."""
        ...

    def broke(self, stream: "RequestStream", error: ClientError) -> None:
        """The stream has ended; `error` is why."""
        ...


class RequestStream:
    """Lasts until it is cancelled or breaks. Safe from any thread."""

    def __init__(self, connection: Connection, receiver: Receiver) -> None:
        self._connection = connection
        self._receiver = receiver
        # Bounded by the session, which lets only so many chunks be under way.
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = connection.stream(iter(self._outgoing.get, None))
        # A daemon, so that a program may end with its sessions open.
        self._thread = threading.Thread(target=self._read, name="framesink client", daemon=True)
        self._thread.start()

    def send(self, request: Request) -> None:
        """Send a request; if the stream is broken its receiver learns of it."""
        self._outgoing.put(encode(request))

    def finish(self) -> None:
        """Send no more; the stream ends by itself when everything is answered."""
        self._outgoing.put(None)

    def cancel(self) -> None:
        """End at once; the server learns that nobody waits for its answers."""
        self._call.cancel()
        self.finish()

    def join(self, timeout: float) -> bool:
        """Wait for the end; whether it has come. Not for the stream's own thread."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _read(self) -> None:
        failure = self._connection.gone()
        try:
            for message in self._call:
                self._receiver.received(self, decode(message))
        except grpc.RpcError as error:
            failure = self._connection.gone(error)
        except ClientError as error:
            failure = error
            self.cancel()
        finally:
            self.finish()
            self._receiver.broke(self, failure)
