"""Errors a caller can act on: one clear sentence, and the exit code the command line ends with."""

import logging

_log = logging.getLogger(__name__)


class FramesinkError(Exception):
    """Base of every error framesink raises on purpose; the message is one sentence for a person."""

    exit_code = 1


class OptionError(FramesinkError):
    """An option has a value that cannot be used."""

    exit_code = 2


class CheckpointError(FramesinkError):
    """A checkpoint directory is missing, truncated, of an unknown architecture, or inconsistent."""

    exit_code = 3


class BundleError(FramesinkError):
    """An engine bundle is missing, damaged, or made for another machine."""

    exit_code = 4


class VideoError(FramesinkError):
    """A video source is missing, empty, unreadable, or stopped delivering."""

    exit_code = 5


class CapacityError(FramesinkError):
    """Something does not fit: context, page pool, memory, disk, or the number of sessions."""

    exit_code = 6


class BusyError(CapacityError):
    """There is no room now, but there will be: trying again later may succeed."""


class BacklogError(BusyError):
    """A session's input queue is full."""


class BuildError(FramesinkError):
    """Authoring, compiling or writing an engine failed."""

    exit_code = 7


class VerificationError(FramesinkError):
    """A bundle disagrees with its checkpoint by more than it may."""

    exit_code = 8


class OutputError(FramesinkError):
    """A file the user asked for cannot be written."""

    exit_code = 9


class SessionClosedError(FramesinkError):
    """A session was used after it was closed."""


def error_sentence(what: str, error: Exception) -> str:
    """One sentence for a session's error event; surprises are logged with their traceback."""
    if isinstance(error, FramesinkError):
        return str(error)
    _log.error("%s", what, exc_info=error)
    return f"{what} ({type(error).__name__}: {error})."
