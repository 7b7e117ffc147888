"""What caption files have in common: refused before anything starts, flushed with every reply."""

import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from framesink.runtime.errors import OutputError
from framesink.runtime.events import Event, EventKind


class CaptionWriter(ABC):
    """Joins a session's events into replies and appends each to a text file when it ends.

    The file is opened when the writer is made, so that a target that cannot be written is known
    before a model is loaded, but its old content is kept until `start`. Every reply is flushed: a
    crash keeps what was said. Subclasses say how a reply is written.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises OutputError if the file cannot be written."""
        self.path = Path(path)
        self._pieces: list[str] = []
        self._latest: Event | None = None
        self._created = not self.path.exists()
        try:
            self._file: TextIO = self.path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise self._refusal(error) from error

    def header(self) -> str:
        """What the file begins with."""
        return ""

    @abstractmethod
    def reply(self, event: Event, text: str) -> str:
        """How a reply is written; `event` is its last, `text` is all it said."""

    @abstractmethod
    def notice(self, event: Event) -> str:
        """How an event of kind degraded or error is written."""

    def start(self) -> None:
        """Drop the old content, write the header. Raises OutputError if that fails."""
        self._created = False
        try:
            if self.path.is_file():
                self._file.truncate(0)
        except OSError as error:
            raise self._refusal(error) from error
        self._append(self.header())

    def write(self, event: Event) -> None:
        """Take the next event of a session. Raises OutputError if the file takes no more."""
        if event.kind in (EventKind.DEGRADED, EventKind.ERROR):
            if event.final:
                self._write_unfinished()
            self._append(self.notice(event))
            return
        self._pieces.append(event.text)
        self._latest = event
        if event.final:
            self._write_unfinished()

    def close(self) -> None:
        """Write a reply that was begun and close the file; idempotent.

        A file made by a writer that was never started is removed again.
        """
        if self._file.closed:
            return
        try:
            self._write_unfinished()
        finally:
            with suppress(OSError):  # every write was flushed, so nothing is lost here
                self._file.close()
            if self._created:
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _write_unfinished(self) -> None:
        if self._latest is None:
            return
        event, text = self._latest, "".join(self._pieces)
        self._latest, self._pieces = None, []
        self._append(self.reply(event, text))

    def _append(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> OutputError:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        return OutputError(
            f"The captions cannot be written to {self.path} ({reason}); give another file."
        )
