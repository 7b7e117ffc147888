"""Why sessions end, and what their clients are told."""

from dataclasses import dataclass
from enum import StrEnum

from framesink.serving.errors import StatusCode


class EndReason(StrEnum):
    """Why a session ended."""

    FINISHED = "finished"
    CLOSED = "closed"
    IDLE = "idle"
    ABANDONED = "abandoned"
    DRAINED = "drained"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class End:
    """How a session ended: the status and the sentence for whoever still waits for an answer."""

    reason: EndReason
    code: StatusCode
    sentence: str

    @property
    def later_code(self) -> StatusCode:
        """The status for requests that come afterwards, with the same sentence."""
        unavailable = self.code is StatusCode.UNAVAILABLE
        return StatusCode.UNAVAILABLE if unavailable else StatusCode.NOT_FOUND


FINISHED = End(
    EndReason.FINISHED,
    StatusCode.CANCELLED,
    "The session was finished and everything in it answered; start another.",
)
CLOSED = End(
    EndReason.CLOSED, StatusCode.CANCELLED, "The session was ended by its client; start another."
)
DRAINED = End(
    EndReason.DRAINED,
    StatusCode.UNAVAILABLE,
    "The server is shutting down; start the session again on another server, or later.",
)


def idle(seconds: float) -> End:
    """Nothing was sent for `seconds`."""
    return End(
        EndReason.IDLE,
        StatusCode.NOT_FOUND,
        f"The session was ended after {seconds:g} s without a request; start another.",
    )


def abandoned(seconds: float) -> End:
    """Its client was gone for `seconds`."""
    return End(
        EndReason.ABANDONED,
        StatusCode.NOT_FOUND,
        f"The session was ended {seconds:g} s after its client had gone; start another.",
    )


def failed(sentence: str) -> End:
    """The engine ended it with an error."""
    return End(
        EndReason.FAILED, StatusCode.INTERNAL, f"The session ended with an error: {sentence}"
    )


def refused(code: StatusCode, sentence: str) -> End:
    """It was never opened."""
    return End(EndReason.FAILED, code, sentence)
