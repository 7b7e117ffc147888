"""A session on a server, for threads: what a caller holds in hand."""

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from framesink.client.flow import backlog
from framesink.client.frames import OutgoingChunk
from framesink.client.link import SessionLink
from framesink.runtime.arrays import UInt8Array
from framesink.runtime.events import Event
from framesink.runtime.video.chunk import Chunk


class Session:
    """Frames in, events out. Safe to use from any thread; iterate it from one.

    Iterating yields events as they come and ends when, after `finish`, everything is answered, or
    after an error event, or after `close`; it raises ClientError when the server is lost for good.
    Nothing here waits longer than the settings say, except iterating while nobody pushes.
    """

    def __init__(self, link: SessionLink) -> None:
        """Made by `Client.session`."""
        self._link = link

    @property
    def sequence_id(self) -> int:
        """Triton's correlation id; another one after the server lost the session."""
        return self._link.sequence_id

    @property
    def transcript(self) -> str:
        """What was said so far: of a long session its beginning and its end."""
        return self._link.transcript

    # In.

    def push(
        self,
        frames: UInt8Array | Sequence[UInt8Array],
        timestamps: Sequence[float] | None = None,
        *,
        t0: float | None = None,
        t1: float | None = None,
        question: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Send one chunk of frames, uint8 RGB `[T, H, W, 3]` or T frames `[H, W, 3]`, and a
        question with it.

        `timestamps`, and `t0` and `t1` together, are seconds of video time; what is left out the
        server fills in: the chunk follows the one before it. Waits for a place among the chunks
        under way, for `timeout` seconds at most (by default the settings'). Raises BacklogError
        when there was none, SessionClosedError or ClientError when the session is over, VideoError
        for frames or times that make no sense.
        """
        self._push(OutgoingChunk.of_frames(frames, timestamps, t0, t1), question, timeout)

    def push_chunk(
        self, chunk: Chunk, *, question: str | None = None, timeout: float | None = None
    ) -> None:
        """Send one chunk; see `push`."""
        self._push(OutgoingChunk.of_chunk(chunk), question, timeout)

    def ask(self, text: str) -> None:
        """Ask a question: it joins the next chunk, whose events are then of kind `answer`.

        Raises BacklogError while too many are unanswered, SessionClosedError or ClientError when
        the session is over.
        """
        self._link.send_question(text)

    def finish(self) -> None:
        """Say that no more input comes. What waits is still answered; then iteration ends and the
        session's pages are free."""
        self._link.send_finish()

    def cancel(self) -> None:
        """Give up the replies under way: no event of theirs comes any more, and chunks that the
        server has not taken are dropped. The session goes on."""
        self._link.cancel()

    def resume(self) -> None:
        """Go on after the server was lost for good, or ended the session: in the same session if
        the server still has it, or else in a new one that starts from the transcript.

        Tries for the settings' `reconnect_seconds`; raises ClientError if that is not enough.
        """
        self._link.resume()

    def close(self) -> None:
        """End at once: drop what waits and free the session's pages. May be called again."""
        self._link.close()

    def _push(self, chunk: OutgoingChunk, question: str | None, timeout: float | None) -> None:
        link = self._link
        limit = link.settings.push_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        left = limit
        while not link.flow.wait(link.flow.take_place, min(left, link.settings.quiet_seconds)):
            left = deadline - time.monotonic()
            if left <= 0:
                raise backlog(limit)
            link.check_server()
        link.send_chunk(chunk, question)

    # Out.

    def next_event(self, timeout: float) -> Event | None:
        """The next event, or None if none came in `timeout` seconds.

        Raises EOFError after the last one, ClientError when the server is lost for good.
        """
        link, deadline = self._link, time.monotonic() + timeout
        while True:
            event = link.flow.poll()
            left = deadline - time.monotonic()
            if event is not None or left <= 0:
                return event
            if not link.flow.wait(link.flow.readable, min(left, link.settings.quiet_seconds)):
                link.check_server()

    def __iter__(self) -> Iterator[Event]:
        while True:
            try:
                event = self.next_event(self._link.settings.quiet_seconds)
            except EOFError:
                return
            if event is not None:
                yield event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
