"""One client's session: its requests in order, its events to the requests they answer.

Everything here runs in the host's event loop; what takes time is handed to its workers, one piece
of a session at a time, so that requests keep their order and no session takes all workers.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor as Workers
from dataclasses import dataclass
from typing import TypeVar

from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import BusyError, FramesinkError, SessionClosedError
from framesink.runtime.events import Event, EventKind
from framesink.runtime.load.ladder import RealTime
from framesink.runtime.session import Session
from framesink.serving import session_end
from framesink.serving.errors import ServingError, StatusCode
from framesink.serving.images import FrameLimits
from framesink.serving.log_format import SessionLog
from framesink.serving.metrics import ServingMetrics
from framesink.serving.options import ServeOptions
from framesink.serving.parameters import Opening
from framesink.serving.requests import Clock, EmbeddedChunk, SessionRequest, prepare_chunk
from framesink.serving.responder import Responder
from framesink.serving.session_end import End, EndReason

# How often a host calls `check`; a client that is gone is found within that time.
POLL_SECONDS = 0.1

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all sessions of a host share. `ended` is called once for each that is over. `entrance`
    is held by the one that is next to be opened."""

    engine: StreamingEngine
    options: ServeOptions
    metrics: ServingMetrics
    workers: Workers
    ended: Callable[["HostedSession", End], None]
    entrance: asyncio.Lock


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    request: SessionRequest
    responder: Responder


class HostedSession:
    """A session of the engine and the requests of its client.

    A request with a chunk is answered by the events of the chunk's turn, one with a question alone
    at once, one that finishes the session by the events that belong to no other, when all is
    answered, one that ends it when its pages are free.
    """

    def __init__(self, number: int, opening: Opening, surroundings: Surroundings) -> None:
        """`number` is the sequence's correlation id."""
        self.number = number
        self._opening = opening
        self._around = surroundings
        self._log = SessionLog(_log, number)
        self._limits = FrameLimits.of(surroundings.options, opening.max_patches)
        self._clock = Clock(0.0, opening.chunk_seconds)
        self._session: Session | None = None
        self._inbox: deque[_Waiting] = deque()
        self._handling: Responder | None = None
        self._arrived = asyncio.Event()
        # Who waits for which turn's events; None for one that is gone.
        self._answers: dict[int, Responder | None] = {}
        self._pushed = 0
        self._tail: Responder | None = None
        self._closers: list[Responder] = []
        self._finishing = False
        self._end: End | None = None
        self._over = False
        self._latest: Responder | None = None
        self._latest_at = self._active_at = time.monotonic()
        self._abandoned_at: float | None = None
        self._tasks = [asyncio.create_task(self._work())]

    # What the host calls.

    @property
    def busy(self) -> bool:
        """Whether a request waits for an answer."""
        return bool(self._handling or self._inbox or self._answers or self._tail)

    def receive(self, request: SessionRequest, responder: Responder) -> None:
        """Take a request, or refuse it."""
        self._latest, self._latest_at = responder, time.monotonic()
        self._active_at, self._abandoned_at = self._latest_at, None
        if request.end and not request.finish:
            self._closers.append(responder)
            self.close(session_end.CLOSED)
        elif self._end is not None or self._finishing:
            end = self._end or session_end.FINISHED
            self._refuse(responder, end.later_code, end.sentence)
        elif not (request.start or request.end or request.has_chunk or request.question):
            responder.finish()
        elif self._has_room(request, responder):
            self._finishing = request.finish
            self._inbox.append(_Waiting(request, responder))
            self._arrived.set()

    def close(self, end: End) -> None:
        """End at once. Who waits is told why as soon as the pages are free."""
        if self._end is None:
            self._end = end
            if self._session is not None:
                self._session.close(wait=False)

    def check(self, now: float) -> None:
        """Look after clients that are gone; called every POLL_SECONDS."""
        options = self._around.options
        self._look_for_client(now)
        if self._abandoned_at is not None and now - self._abandoned_at > options.resume_seconds:
            self.close(session_end.abandoned(options.resume_seconds))
        if not self.busy and now - self._active_at > options.idle_seconds:
            self.close(session_end.idle(options.idle_seconds))

    # Requests, one after the other.

    async def _work(self) -> None:
        try:
            await self._open()
            while self._end is None and not (self._finishing and not self._inbox):
                while not self._inbox:
                    self._arrived.clear()
                    await self._arrived.wait()
                waiting = self._inbox.popleft()
                self._handling = waiting.responder
                await self._handle(waiting.request, waiting.responder)
                self._handling = None
        except ServingError as error:
            self._around.metrics.refused(error.code)
            self._finish_up(session_end.refused(error.code, str(error)))
        except Exception as error:
            self._log.exception("A request could not be handled")
            end = session_end.failed(f"a request could not be handled ({type(error).__name__}).")
            self.close(end)
            if self._session is None:
                self._finish_up(end)

    async def _open(self) -> None:
        self._around.metrics.session_waits(1)
        try:
            async with self._around.entrance:  # first come, first served
                session = await self._enter()
        finally:
            self._around.metrics.session_waits(-1)
        self._session = session
        self._around.metrics.session_opened()
        self._log.info("The session was opened")
        self._tasks.append(asyncio.create_task(self._read(session)))
        if self._end is not None:
            session.close(wait=False)

    async def _enter(self) -> Session:
        """The engine's session. Where it has no room it is asked again, as long as the options
        say."""
        deadline = self._active_at + self._around.options.wait_seconds
        while True:
            try:
                # Closed is the engine: the session cannot be yet.
                return await self._run(self._open_session, closed=StatusCode.UNAVAILABLE)
            except ServingError as error:
                if error.code is not StatusCode.UNAVAILABLE:
                    raise
                if time.monotonic() >= deadline:
                    self._around.metrics.session_refused()
                    raise
            if self._end is not None:
                raise ServingError(self._end.code, self._end.sentence)
            await asyncio.sleep(POLL_SECONDS)

    def _open_session(self) -> Session:
        opening, options = self._opening, self._around.options
        return self._around.engine.open_session(
            opening.policy,
            opening.query,
            opening.sampling,
            max_new_tokens=opening.max_new_tokens,
            max_pending_chunks=options.max_pending_chunks + 1,
            chunk_seconds=opening.chunk_seconds,
            max_patches=opening.max_patches,
            previous_text=opening.previous_text,
            real_time=RealTime(admission=options.admission, ladder=opening.ladder),
        )

    async def _handle(self, request: SessionRequest, responder: Responder) -> None:
        turn = self._pushed
        try:
            if request.has_chunk:
                self._answers[turn] = responder
                if request.finish:
                    self._tail = responder
                await self._run(lambda: self._push(request))
                self._pushed += 1
                self._around.metrics.chunk_taken()
            elif request.question is not None:
                question = request.question
                await self._run(lambda: self._engine_session.ask(question))
            if request.question is not None:
                self._around.metrics.question_taken()
        except ServingError as error:
            self._answers.pop(turn, None)
            self._tail = None
            if self._end is not None:  # it was ended meanwhile, which may be why
                responder.fail(self._end.code, self._end.sentence)
            else:
                self._refuse(responder, error.code, str(error))
        else:
            if request.finish and not request.has_chunk:
                self._tail = responder
            elif not request.has_chunk:
                responder.finish()
        if request.finish:
            self._engine_session.finish()

    def _push(self, request: SessionRequest) -> None:
        """Decode and push a chunk (a worker's thread)."""
        session, engine = self._engine_session, self._around.engine
        chunk = prepare_chunk(request, self._clock, self._limits, engine.preprocess)
        if isinstance(chunk, EmbeddedChunk):
            t0, t1 = chunk.times.t0, chunk.times.t1
            session.push_embeddings(
                chunk.embeddings,
                chunk.grid,
                t0=t0,
                t1=t1,
                frames=chunk.frames,
                question=request.question,
                captured_at=request.arrived_at,
                block=False,
            )
        else:
            t1 = chunk.t1
            session.push_chunk(chunk, question=request.question, block=False)
        self._clock = Clock(t1, self._clock.chunk_seconds)

    async def _run(
        self, work: Callable[[], _Result], closed: StatusCode = StatusCode.NOT_FOUND
    ) -> _Result:
        """Do `work` in a worker's thread; the engine's refusals become ServingErrors, of status
        `closed` where something is closed."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._around.workers, work)
        except ServingError:
            raise
        except BusyError as error:
            raise ServingError(StatusCode.UNAVAILABLE, str(error)) from error
        except SessionClosedError as error:
            raise ServingError(closed, str(error)) from error
        except FramesinkError as error:
            raise ServingError(StatusCode.INVALID_ARGUMENT, str(error)) from error

    # Events, to the requests they answer.

    async def _read(self, session: Session) -> None:
        end = session_end.FINISHED
        try:
            async for event in session:
                self._route(event)
                if event.kind is EventKind.ERROR:
                    end = session_end.failed(event.text)
        except Exception as error:
            self._log.exception("An event could not be handed on")
            end = session_end.failed(f"an event could not be handed on ({type(error).__name__}).")
            session.close(wait=False)
        self._finish_up(self._end or end)

    def _route(self, event: Event) -> None:
        if event.final:
            # Clients that are gone by now are looked for before they are said to be answered.
            self._look_for_client(time.monotonic())
        responder = self._answers.get(event.turn)
        gone = event.turn in self._answers and responder is None
        if event.final:
            self._around.metrics.reply_ended(event)
            self._answers.pop(event.turn, None)
            self._active_at = time.monotonic()
        if gone:
            return
        if responder is None:
            responder = self._tail
        if responder is not None:
            responder.send(event, last=event.final and responder is not self._tail)

    # The end.

    def _finish_up(self, end: End) -> None:
        """Tell everybody who waits; the session is over."""
        if self._over:
            return
        self._over, self._end = True, end
        content = [*self._closers]
        if self._tail is not None and end.reason is EndReason.FINISHED:
            content.append(self._tail)
        waiting = [*self._answers.values(), *(item.responder for item in self._inbox)]
        waiting += [self._handling, self._tail]
        for responder in {id(each): each for each in waiting if each is not None}.values():
            if responder not in content:
                responder.fail(end.code, end.sentence)
        for responder in content:
            responder.finish()
        self._answers.clear()
        self._inbox.clear()
        self._closers.clear()
        self._handling = self._tail = None
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        if self._session is not None:
            self._log.info("The session ended (%s)", end.reason)
            self._around.metrics.session_ended(end.reason)
        self._around.ended(self, end)

    # Details.

    @property
    def _engine_session(self) -> Session:
        assert self._session is not None
        return self._session

    def _has_room(self, request: SessionRequest, responder: Responder) -> bool:
        """Whether the request may wait; it is refused if not."""
        if request.start or (request.end and not request.has_chunk):
            return True
        options = self._around.options
        waiting = [item.request.has_chunk for item in self._inbox]
        chunks = len(self._answers) + sum(waiting)
        if request.has_chunk and chunks >= options.max_pending_chunks:
            sentence = (
                f"{chunks} chunks of this session wait for their answers already, the most this "
                "server queues; wait for one before sending another."
            )
        elif not request.has_chunk and len(waiting) - sum(waiting) > options.max_pending_questions:
            sentence = (
                f"More than {options.max_pending_questions} questions of this session wait "
                "already; ask again later."
            )
        else:
            return True
        self._refuse(responder, StatusCode.UNAVAILABLE, sentence)
        return False

    def _refuse(self, responder: Responder, code: StatusCode, sentence: str) -> None:
        self._around.metrics.refused(code)
        self._log.info("A request was refused (%s): %s", code, sentence)
        responder.fail(code, sentence)

    def _look_for_client(self, now: float) -> None:
        """Answer requests that were cancelled; their events go nowhere from now on.

        They mean that the client is gone, unless another request has come since, on a new
        connection.
        """
        waiting = [*self._answers.values(), self._tail]
        distinct = {id(each): each for each in waiting if each is not None}.values()
        cancelled = [responder for responder in distinct if responder.cancelled]
        if not cancelled:
            return
        for responder in cancelled:
            responder.fail(StatusCode.CANCELLED, "The request was cancelled.")
        for turn, answer in self._answers.items():
            self._answers[turn] = None if answer in cancelled else answer
        if self._tail in cancelled:
            self._tail = None
        if self._latest in cancelled or self._latest_at < now - 2 * POLL_SECONDS:
            self._abandoned_at = now
