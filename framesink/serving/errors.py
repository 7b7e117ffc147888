"""What a client is refused with, and why a server does not start."""

from enum import StrEnum

from framesink.runtime.errors import FramesinkError


class StatusCode(StrEnum):
    """The gRPC status of a refusal, by the names of Triton's error codes."""

    INVALID_ARGUMENT = "INVALID_ARG"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    UNAVAILABLE = "UNAVAILABLE"
    UNSUPPORTED = "UNSUPPORTED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class ServingError(FramesinkError):
    """A request is refused: one sentence, and the status it is answered with."""

    def __init__(self, code: StatusCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class ServerError(FramesinkError):
    """The server cannot start, or has stopped by itself."""

    exit_code = 10


class ServerDiedError(ServerError):
    """The server ended before it was ready, and no model said why."""
