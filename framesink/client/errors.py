"""What can go wrong between a client and its server, each kind by its own type."""

from framesink.runtime.errors import FramesinkError


class ClientError(FramesinkError):
    """Base of all. `code` is the gRPC status, such as "UNAVAILABLE"."""

    exit_code = 11

    def __init__(self, message: str, code: str = "UNKNOWN") -> None:
        super().__init__(message)
        self.code = code


class ServerUnavailableError(ClientError):
    """No server takes this now: it is loading, full, draining, or gone. Later it may."""

    exit_code = 12


class ServerGoneError(ServerUnavailableError):
    """The server cannot be reached, broke off, or stopped answering."""


class RefusedError(ClientError):
    """The server refused what was asked; the message is the server's sentence."""

    exit_code = 13


class SessionLostError(ClientError):
    """The server does not know the session any more: it restarted, or ended it for being idle."""

    exit_code = 14


class ResponseError(ClientError):
    """The server sent something that framesink's contract does not allow."""

    exit_code = 15
