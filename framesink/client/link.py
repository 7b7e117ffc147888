"""A session's link to its server: requests out, events in, and finding back after a loss.

It knows no waiting caller: `session.py` and `aio.py` wait, each in their own way.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress

from framesink.client.connection import Connection
from framesink.client.errors import (
    ClientError,
    RefusedError,
    ResponseError,
    ServerGoneError,
    SessionLostError,
)
from framesink.client.flow import Flow
from framesink.client.frames import OutgoingChunk
from framesink.client.replies import LOST_REPLY, Replies, describe_loss
from framesink.client.server_session import ServerSession
from framesink.client.settings import SessionSettings
from framesink.client.stream import RequestStream
from framesink.client.transcript import Transcript
from framesink.client.under_way import Pending, UnderWay, may_be_sent_again, places
from framesink.client.wire import ChunkPayload, ParameterValue, Request, Response, WireError
from framesink.runtime.errors import BacklogError, FramesinkError, SessionClosedError
from framesink.runtime.events import EventKind

_MAX_QUESTIONS = 8
_MAX_EVENTS = 1024
_TRANSCRIPT_CHARACTERS = 8_000
_JOIN_SECONDS = 2.0
# A busy server may be late with an answer; one that is late so often in a row is gone.
_LATE_ANSWERS = 3


class SessionLink:
    """Safe from any thread. `flow` holds the places for chunks and the events."""

    def __init__(
        self,
        connection: Connection,
        settings: SessionSettings,
        parameters: Mapping[str, ParameterValue],
    ) -> None:
        """Open a session on the server. Raises what ServerSession does."""
        self.settings = settings
        self.flow = Flow(settings.max_in_flight, _MAX_EVENTS)
        self._connection = connection
        self._transcript = Transcript(
            _TRANSCRIPT_CHARACTERS, str(parameters.get("previous_text", ""))
        )
        self._replies = Replies()
        self._lock = threading.Lock()
        self._probing = threading.Lock()
        self._closing = threading.Event()
        self._finishing = self._finished = False
        self._stream: RequestStream | None = None
        self._cause: ClientError | None = None
        self._under_way = UnderWay()
        self._unanswered: deque[str] = deque()
        self._late_answers = 0
        self._heard_at = self._asked_at = time.monotonic()
        self._session = ServerSession(connection, settings.model, parameters)
        with self._lock:
            self._open_stream()

    @property
    def sequence_id(self) -> int:
        """Triton's correlation id of now."""
        return self._session.sequence_id

    @property
    def transcript(self) -> str:
        """What was said so far."""
        with self._lock:
            return self._transcript.text

    # Out.

    def send_chunk(self, chunk: OutgoingChunk, question: str | None = None) -> None:
        """Send a chunk for which a place was taken, and a question with it.

        Compressing takes its time in the calling thread. Raises VideoError if that cannot be done,
        and what `send_question` raises.
        """
        began = time.monotonic()
        try:
            payload = chunk.payload(self.settings.frame_format, self.settings.quality)
            with self._lock:
                self._require_input()
                if question is not None:
                    self._add_question(question)
                request = self._request(chunk=payload, question=question)
                self._send(Pending(request, began, chunk.captured_at, holds_place=True))
        except FramesinkError:
            self.flow.return_places(1)
            raise

    def send_question(self, text: str) -> None:
        """Send a question. Raises BacklogError while too many are unanswered."""
        with self._lock:
            self._require_input()
            self._add_question(text)
            self._send(Pending(self._request(question=text), time.monotonic()))

    def send_finish(self) -> None:
        """Say that no more input comes."""
        with self._lock:
            if self._finishing or self.flow.ended:
                return
            self._finishing = True
            self._send(Pending(self._request(end=True), time.monotonic()))

    def cancel(self) -> None:
        """Give up what is under way; no event of it comes any more. After `finish` that is all."""
        if self._finishing:
            self.close()
            return
        self._drop(gently=False)
        with suppress(ClientError):  # or else the server would take the client for gone, and wait
            self._session.require_known()

    def _drop(self, *, gently: bool) -> None:
        """Have nothing more to do with what is under way.

        Gently is to let the stream end by itself, if it soon does: Triton 2.51 may crash when a
        stream is cancelled just as it ends.
        """
        with self._lock:
            stream, self._stream = self._stream, None
            given_up = self._under_way.take_all()
        self.flow.return_places(places(given_up))
        if stream is None:
            return
        if gently:
            stream.finish()
        if not (gently and stream.join(_JOIN_SECONDS)):
            stream.cancel()
            stream.join(_JOIN_SECONDS)

    def close(self) -> None:
        """End the session here and on the server, whose pages are then free."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            over = self.flow.ended
        if not over:
            self._session.end()
        self.flow.end(for_good=True)
        self._drop(gently=True)

    def resume(self) -> None:
        """Go on after a failure or an error event: in the same session if the server still has it,
        or else in a new one that starts from the transcript. Raises ClientError if it cannot."""
        with self._lock:
            if self._closing.is_set():
                raise SessionClosedError("The session was closed; open another.")
            if not self.flow.ended:
                return
            self._finishing = self._finished = False
            self.flow.pause()
        self._reattach(time.monotonic(), time.monotonic() + self.settings.reconnect_seconds, [])

    # In: called by the stream's thread.

    def received(self, stream: RequestStream, response: Response) -> None:
        """See Receiver."""
        with self._lock:
            if stream is not self._stream:
                return
            self._under_way.hold(response)
        while True:
            with self._lock:
                following = self._under_way.take_next()
            if following is None:
                return
            self._hear(stream, following)

    def _hear(self, stream: RequestStream, response: Response) -> None:
        """Make of a response what it is."""
        with self._lock:
            pending = self._under_way.hear(response) if stream is self._stream else None
            if pending is None:
                return
            self._heard_at = time.monotonic()
            self._finished |= pending.request.end and response.final and response.error is None
            # An ensemble may answer the last request before the last replies are through it.
            over = self._finished and not self._under_way
            event = response.event
            if event is not None:
                event = self._replies.take(pending, event)
                self._transcript.add(event)
                if event.final:
                    self._settle(event.question)
            returns_place = pending.holds_place and event is not None and event.final
            if returns_place:
                pending.holds_place = False
        if event is not None:
            self.flow.put(event, returns_place=returns_place)
            if event.final and event.kind is EventKind.ERROR:
                self._end()
                return
        if response.error is not None:
            self._refused(stream, pending, response.error)
        elif response.is_last:
            self.flow.return_places(pending.holds_place)
        if over:
            self._end()

    def broke(self, stream: RequestStream, error: ClientError) -> None:
        """See Receiver."""
        with self._lock:
            if stream is not self._stream:
                return
            self._stream = None
            cause, self._cause = self._cause or error, None
            lost = self._under_way.take_all()
            finished = self._finished
            if not finished:
                self.flow.pause()
        if finished:
            self._give_up(lost)
            return
        now = time.monotonic()
        try:
            if self.settings.reconnect_seconds <= 0 or isinstance(cause, ResponseError):
                raise cause
            self._reattach(now, now + self.settings.reconnect_seconds, lost)
        except Exception as failure:  # handed to the reader, who can act on it
            with self._lock:
                lost += self._under_way.take_all()
            self.flow.return_places(places(lost))
            self.flow.end(None if self._closing.is_set() else failure)

    def _refused(self, stream: RequestStream, pending: Pending, error: WireError) -> None:
        """One request was refused, or the session is over."""
        if self._closing.is_set():
            return
        if error.session_over:
            with self._lock:
                if stream is self._stream:
                    self._cause = SessionLostError(error.sentence, error.code or "UNKNOWN")
                    # It was not taken, so it may be sent again.
                    self._under_way.put_back(pending)
            stream.cancel()
            return
        if pending.request.end:
            self.flow.end(RefusedError(error.sentence, error.code or "UNKNOWN"))
            return
        with self._lock:
            self._settle(pending.request.question)
            if pending.holds_place:
                notice = self._replies.lost(pending, error.sentence)
            else:
                notice = self._replies.notice(error.sentence)
        self.flow.put(notice, returns_place=pending.holds_place)

    def _end(self) -> None:
        """The server has ended the session."""
        self.flow.end()
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.finish()

    # Losing and finding.

    def check_server(self) -> None:
        """Ask the server about a reply that stays away; called by whoever waits for one.

        A server that does not answer, or has forgotten the session, breaks the stream.
        """
        now = time.monotonic()
        with self._lock:
            stream = self._stream
            oldest = min((pending.sent_at for pending in self._under_way), default=now)
            silent = now - max(oldest, self._heard_at)
            if stream is None or silent < self.settings.quiet_seconds:
                return
            lost = self._under_way.take_all() if self._finished else None
        if lost is not None:
            self._give_up(lost)
            return
        if not self._probing.acquire(blocking=False):
            return
        try:
            if silent > self.settings.reply_seconds:
                raise ServerGoneError(
                    f"The server has not answered for {silent:.0f} s, though it knows the session; "
                    "open another."
                )
            if now - self._asked_at >= self.settings.quiet_seconds:
                if self._finishing:  # Triton forgets a sequence with its END, answered or not
                    self._connection.require_ready()
                else:
                    self._session.require_known()
                self._late_answers = 0
                self._asked_at = time.monotonic()
        except ClientError as error:
            self._late_answers += 1
            if error.code == "DEADLINE_EXCEEDED" and self._late_answers < _LATE_ANSWERS:
                return
            self._late_answers = 0
            with self._lock:
                if stream is self._stream:
                    self._cause = error
            stream.cancel()
        finally:
            self._probing.release()

    def _give_up(self, lost: list[Pending]) -> None:
        """The session is finished on the server; replies that have not come will not."""
        with self._lock:
            notices = [self._replies.lost(p, LOST_REPLY) for p in lost if p.holds_place]
        for notice in notices:
            self.flow.put(notice, returns_place=True)
        self._end()

    def _reattach(self, since: float, deadline: float, lost: list[Pending]) -> None:
        """Find the session again, or open another that goes on from the transcript."""
        anew = self._session.find(self.transcript, deadline, self._closing)
        if self._closing.is_set():
            self._session.end()  # perhaps another one than `close` has ended
            raise SessionClosedError("The session was closed.")
        again = [pending for pending in lost if may_be_sent_again(pending, anew)]
        gone = [pending for pending in lost if pending.holds_place and pending not in again]
        self.flow.reopen()
        if anew or gone:
            text = describe_loss(time.monotonic() - since, anew, gone)
            self.flow.put(self._replies.notice(text))
        for pending in gone:
            self.flow.put(self._replies.lost(pending, LOST_REPLY), returns_place=True)
        with self._lock:
            if anew:
                self._replies.begin_anew()
            self._heard_at = time.monotonic()
            self.flow.resume()
            self._open_stream()
            waiting = self._under_way.take_waiting()
            asked = [pending.request.question for pending in again + waiting]
            for text in self._unanswered if anew else ():
                if text not in asked:
                    self._send(Pending(self._request(question=text), time.monotonic()))
            for pending in again:
                pending.resent = True
            for pending in again + waiting:
                self._send(pending)

    # Details.

    def _require_input(self) -> None:
        self.flow.require_open()
        if self._finishing:
            raise SessionClosedError("The session was finished and takes no more input.")

    def _request(
        self, *, chunk: ChunkPayload | None = None, question: str | None = None, end: bool = False
    ) -> Request:
        """A request of this session; it gets its number when it is sent."""
        parameters: dict[str, ParameterValue] = {}
        if chunk is not None and chunk.dropped:
            parameters["dropped"] = chunk.dropped
        if end:
            parameters["finish"] = True
        return Request(
            self.settings.model,
            "",
            self.sequence_id,
            end=end,
            chunk=chunk,
            question=question,
            parameters=parameters,
        )

    def _add_question(self, text: str) -> None:
        """A question is about to be sent; the lock is held."""
        if len(self._unanswered) >= _MAX_QUESTIONS:
            raise BacklogError(
                f"{_MAX_QUESTIONS} questions wait for chunks to be answered with; push some."
            )
        self._unanswered.append(text)

    def _settle(self, question: str | None) -> None:
        """A question was answered or refused; the lock is held."""
        with suppress(ValueError):
            self._unanswered.remove(question or "")

    def _send(self, pending: Pending) -> None:
        """Send a request under the next number, in the session of now; the lock is held.

        While the connection is lost it waits.
        """
        if self.flow.paused:
            self._under_way.wait(pending)
            return
        request = self._under_way.send(pending, self.sequence_id)
        self._open_stream().send(request)

    def _open_stream(self) -> RequestStream:
        """The stream of now; the lock is held. Also without requests it tells of a server's end."""
        if self._stream is None:
            self._stream = RequestStream(self._connection, self)
        return self._stream
