"""The sessions of a server's clients over one engine.

Requests come from Triton's thread and are only queued there. One event loop, in a thread of its
own, does everything else; what takes time (decoding frames, opening sessions) runs in a few worker
threads. There is no thread and no polling per session.
"""

import asyncio
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from framesink.runtime.engine import StreamingEngine
from framesink.serving import session_end
from framesink.serving.errors import ServingError, StatusCode
from framesink.serving.hosted_session import POLL_SECONDS, HostedSession, Surroundings
from framesink.serving.metrics import ServingMetrics
from framesink.serving.options import ServeOptions
from framesink.serving.parameters import read_opening
from framesink.serving.requests import RawRequest, SessionRequest, read_request
from framesink.serving.responder import Responder
from framesink.serving.session_end import End

REPORT_SECONDS = 1.0
FAREWELL_SECONDS = 1.0
CLOSING_SECONDS = 5.0
MAX_WORKERS = 4
# Sessions that ended are remembered, so that their clients are told why.
REMEMBERED_ENDS = 4096

_log = logging.getLogger(__name__)


class SessionHost:
    """Opens, feeds, ends and looks after sessions. `submit` may be called from any thread."""

    def __init__(
        self,
        engine: StreamingEngine,
        *,
        precision: str,
        options: ServeOptions,
        metrics: ServingMetrics,
        is_draining: Callable[[], bool] = lambda: False,
        on_drained: Callable[[], None] = lambda: None,
        on_broken: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`precision` is that of the language model.

        `is_draining` is asked several times a second whether the server is about to stop;
        `on_drained` is called once the last session has ended after that, `on_broken` when the
        engine has failed and will answer nothing more. The host owns the engine from now on.
        """
        self._engine = engine
        self._precision = precision
        self._options = options
        self._metrics = metrics
        self._is_draining = is_draining
        self._on_drained = on_drained
        self._on_broken = on_broken
        self._draining = False
        self._drained = False
        self._broken = False
        self._sessions: dict[int, HostedSession] = {}
        self._ends: OrderedDict[int, End] = OrderedDict()
        self._reporter = ThreadPoolExecutor(1, thread_name_prefix="framesink-metrics")
        self._report: Future[None] | None = None
        self._reported_at = 0.0
        workers = min(MAX_WORKERS, options.threads or os.cpu_count() or 1)
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="framesink-worker")
        self._surroundings = Surroundings(
            engine, options, metrics, self._workers, self._session_ended, asyncio.Lock()
        )
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete,
            args=[self._look_after()],
            name="framesink-sessions",
            daemon=True,
        )
        self._thread.start()

    def submit(self, raw: RawRequest, responder: Responder) -> None:
        """Queue a request. Returns at once; everything about it is told to `responder`."""
        self._loop.call_soon_threadsafe(self._receive, raw, responder)

    def close(self) -> None:
        """End all sessions, stop the threads and close the engine."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._workers.shutdown()
        self._engine.close()
        self._reporter.submit(self._metrics.flush)
        self._reporter.shutdown()

    def _receive(self, raw: RawRequest, responder: Responder) -> None:
        try:
            request = read_request(raw, self._options)
            session = self._sessions.get(request.session)
            if request.start:
                session = self._open(request, session)
            elif session is None:
                raise self._unknown(request.session)
            elif self._draining and not request.end:
                raise ServingError(session_end.DRAINED.code, session_end.DRAINED.sentence)
            session.receive(request, responder)
        except ServingError as error:
            self._metrics.refused(error.code)
            responder.fail(error.code, str(error))
        except Exception as error:  # whatever it is, it is this request's alone
            _log.exception("A request could not be read")
            self._metrics.refused(StatusCode.INTERNAL)
            sentence = f"The request could not be read ({type(error).__name__})."
            responder.fail(StatusCode.INTERNAL, sentence)

    def _open(self, request: SessionRequest, present: HostedSession | None) -> HostedSession:
        if present is not None:
            raise ServingError(
                StatusCode.ALREADY_EXISTS,
                f"The session {request.session} is open already; go on without START, or choose "
                "another sequence id.",
            )
        if self._draining:
            raise ServingError(session_end.DRAINED.code, session_end.DRAINED.sentence)
        most = self._engine.max_sessions
        if len(self._sessions) >= most:
            raise ServingError(
                StatusCode.UNAVAILABLE,
                f"{most} sessions are open, the most this server serves at once; try again later.",
            )
        opening = read_opening(
            request.parameters,
            defaults=self._engine.defaults,
            max_patches=self._engine.limits.max_patches,
            precision=self._precision,
            options=self._options,
        )
        self._ends.pop(request.session, None)
        session = HostedSession(request.session, opening, self._surroundings)
        self._sessions[request.session] = session
        return session

    def _unknown(self, number: int) -> ServingError:
        end = self._ends.get(number)
        if end is not None:
            return ServingError(end.later_code, end.sentence)
        return ServingError(
            StatusCode.NOT_FOUND, f"There is no session {number}; open one with START."
        )

    def _session_ended(self, session: HostedSession, end: End) -> None:
        del self._sessions[session.number]
        self._ends[session.number] = end
        if len(self._ends) > REMEMBERED_ENDS:
            self._ends.popitem(last=False)

    async def _look_after(self) -> None:
        """Everything that is not an answer to a request, until the host is closed."""
        while not self._stopping.is_set():
            try:
                self._check()
            except Exception:
                _log.exception("Looking after sessions failed")
            await asyncio.sleep(POLL_SECONDS)
        deadline = time.monotonic() + CLOSING_SECONDS
        while self._sessions and time.monotonic() < deadline:
            for session in list(self._sessions.values()):
                session.close(session_end.DRAINED)
            await asyncio.sleep(POLL_SECONDS / 10)

    def _check(self) -> None:
        now = time.monotonic()
        for session in list(self._sessions.values()):
            session.check(now)
        self._draining = self._draining or self._is_draining()
        if self._draining:
            self._drain()
        failure = self._engine.failure
        if failure is not None and not self._broken:
            self._broken = True
            _log.error("The engine failed: %s", failure)
            # Not before its last events have reached their clients.
            self._loop.call_later(FAREWELL_SECONDS, self._on_broken, failure)
        reporting = self._report is not None and not self._report.done()
        if now - self._reported_at >= REPORT_SECONDS and not reporting:
            self._reported_at = now
            fit = self._engine.capacity().streams
            self._metrics.state(len(self._sessions), self._engine.stats(), fit)
            self._report = self._reporter.submit(self._metrics.flush)

    def _drain(self) -> None:
        """Sessions end as soon as what waits in them is answered."""
        for session in list(self._sessions.values()):
            if not session.busy:
                session.close(session_end.DRAINED)
        if not self._sessions and not self._drained:
            self._drained = True
            _log.info("All sessions have ended; the server can stop")
            self._on_drained()
