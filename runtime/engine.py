"""The engine: one executor, one page pool, one loop, many sessions."""

import logging
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BusyError, OptionError
from framesink.runtime.event_stream import EventStream
from framesink.runtime.executors.base import Executor
from framesink.runtime.executors.tensorrt_llm.options import TensorRTLLMOptions
from framesink.runtime.load.declared import EngineCapacity
from framesink.runtime.load.engine_load import EngineLoad
from framesink.runtime.load.ladder import RealTime
from framesink.runtime.load.ladder_control import LadderControl
from framesink.runtime.load.rehearsal import rehearse
from framesink.runtime.manifest import Limits, StreamingDefaults
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.observer import EngineObserver, NullObserver
from framesink.runtime.paged_worker import PagedWorker
from framesink.runtime.policies import Policy
from framesink.runtime.prefix import prefix_pages
from framesink.runtime.preprocess import PreprocessConfig
from framesink.runtime.prompting.executor import PromptExecutor
from framesink.runtime.prompting.worker import PromptWorker
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.session import Session
from framesink.runtime.session_input import SessionInput
from framesink.runtime.session_plan import (
    OFFLINE_LEEWAY,
    QueryPlacement,
    SessionPlan,
    SessionPlanner,
)
from framesink.runtime.stats import EngineStats, SessionStats
from framesink.runtime.worker import Work, Worker

REHEARSAL_SECONDS = 0.8

_log = logging.getLogger(__name__)


class StreamingEngine:
    """Runs many sessions over one executor.

    With `threaded`, one thread of its own does all the work; otherwise nothing runs by itself and
    `run_until_idle` does it in the calling thread, in the same order every time.
    """

    def __init__(
        self,
        executor: Executor | PromptExecutor,
        model: ModelConfig,
        protocol: ChatProtocol,
        preprocess: PreprocessConfig,
        defaults: StreamingDefaults,
        limits: Limits,
        *,
        threaded: bool = True,
        max_sessions: int | None = None,
        executor_reason: str = "",
        observer: EngineObserver | None = None,
    ) -> None:
        """The engine closes `executor` when it is closed itself.

        At most `max_sessions` are open at once, and never more than `limits.max_streams`.
        `executor_reason` says which executor was chosen and why. `observer` is told of every step.
        """
        self.threaded = threaded
        self.executor_reason = executor_reason
        self._executor = executor
        self.model = model
        self.protocol = protocol
        self.preprocess = preprocess
        self.defaults = defaults
        self.limits = limits
        self.max_sessions = min(limits.max_streams, max_sessions or limits.max_streams)
        self._numbers = 0
        self._opening = threading.Lock()
        self._wake = threading.Event()
        self._load = EngineLoad(
            observer or NullObserver(),
            preprocess,
            measurable=not isinstance(executor, PromptExecutor),
        )
        self._worker = self._make_worker(executor)
        self._planner = SessionPlanner(protocol, model, limits, defaults, self._worker.page_size)
        self._stopping = False
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._work, name="framesink", daemon=True)
            self._thread.start()

    @classmethod
    def load(
        cls,
        bundle: Path | str | Bundle,
        executor: str = "auto",
        *,
        max_sessions: int | None = None,
        num_pages: int | None = None,
        threads: int | None = None,
        threaded: bool = True,
        observer: EngineObserver | None = None,
        tensorrt_llm: TensorRTLLMOptions | None = None,
    ) -> "StreamingEngine":
        """An engine for a bundle, opened or by its directory.

        `executor` names one or is "auto". `num_pages` sizes the page pool, by default for
        `max_sessions` contexts of full length. `threads` are the executor's CPU threads.
        `tensorrt_llm` sets up the executor of that name, and is refused with any other. Raises
        BundleError for a bundle that is damaged or not for this machine, CapacityError for a pool
        that does not fit it, and what the executor's own loading raises.
        """
        from framesink.runtime.executors import create_executor, create_prompt_executor

        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        manifest = bundle.manifest
        limits = manifest.limits
        sessions = min(limits.max_streams, max_sessions or limits.max_streams)
        if num_pages is None:
            num_pages = sessions * -(-limits.max_context // manifest.page_size) + 1
        chosen: Executor | PromptExecutor
        if executor == "tensorrt_llm":
            settings = tensorrt_llm or TensorRTLLMOptions()
            chosen, reason = create_prompt_executor(bundle, settings, max_sessions=sessions)
        elif tensorrt_llm is not None:
            raise OptionError(
                f"Settings of tensorrt_llm mean nothing to the executor {executor[:64]!r}; leave "
                "them out, or use that executor."
            )
        else:
            chosen, reason = create_executor(bundle, executor, num_pages=num_pages, threads=threads)
        return cls(
            chosen,
            manifest.model,
            bundle.protocol(),
            manifest.preprocess,
            manifest.streaming,
            limits,
            threaded=threaded,
            max_sessions=sessions,
            executor_reason=reason,
            observer=observer,
        )

    def open_session(
        self,
        policy: Policy | None = None,
        query: str | None = None,
        sampling: SamplingParams | None = None,
        *,
        max_new_tokens: int | None = None,
        query_placement: QueryPlacement = "pinned",
        max_pending_chunks: int = 2,
        chunk_seconds: float | None = None,
        max_patches: int | None = None,
        previous_text: str = "",
        real_time: RealTime | None = None,
    ) -> Session:
        """Open a session; what is left out is the bundle's default, an empty `query` is none.

        `query_placement` "first_turn" puts the query where StreamingVLM does, to leave with the
        first turn. At most `max_pending_chunks` wait in its queue. `chunk_seconds` is how long
        chunks are, `max_patches` how many ViT patches one makes at most; both size the session.
        `previous_text` is what was said before, by a session that this one goes on with: it stands
        in `previous text` from the start, as much of it as the policy keeps.

        `real_time` is for a session whose chunks come as they happen: it may be refused, or wait,
        where this machine has no time for it, and degrades when its replies are late. Without it
        nothing is due at any time.

        Raises BusyError when too many sessions are open, too few pages are free, or there is no
        time for another live session; CapacityError when the query is longer than the context, or
        the policy's worst case does not fit the context or the pool; OptionError for settings that
        make no sense; SessionClosedError when the engine is closed.
        """
        if max_pending_chunks < 1:
            raise OptionError(f"max_pending_chunks={max_pending_chunks} must be at least 1.")
        plan = self._planner.plan(
            policy,
            query,
            query_placement,
            chunk_seconds=chunk_seconds,
            max_new_tokens=max_new_tokens,
            max_patches=max_patches,
            previous_text=previous_text,
        )
        if real_time is None:
            plan = replace(plan, leeway=OFFLINE_LEEWAY)
        source = SessionInput(max_pending_chunks, plan.profile.question_rows, wake=self._wake.set)
        source.set_context_questions(len(plan.first_query))

        def admit() -> tuple[Work, EventStream, LadderControl | None]:
            return self._admit(plan, sampling or default_sampling(self.defaults), source, real_time)

        if real_time is not None and real_time.admission == "check":
            self.measure_costs()
        work, events, ladder = self._load.admit(admit, real_time)
        self._wake.set()
        return Session(
            work.number,
            driver=self,
            source=source,
            events=events,
            read_stats=lambda: _session_stats(work, ladder),
            protocol=self.protocol,
            preprocess=self.preprocess,
            hidden_size=self.model.text.hidden_size,
            chunk_seconds=plan.profile.chunk_seconds,
            max_patches=plan.max_patches,
            takes_frames=self._worker.takes_frames,
            hold_frames=self._worker.hold_frames,
            takes_embeddings=self._worker.takes_embeddings,
            ladder=ladder,
        )

    def measure_costs(self, seconds: float = REHEARSAL_SECONDS) -> None:
        """Learn what work costs here from a few turns of sessions of black frames.

        Does nothing where costs are known already, sessions are open (whose steps will tell), or
        the executor tells nothing of its steps. Observers are not told of it.
        """
        self._load.measure(
            partial(
                rehearse,
                self.open_session,
                self._load.meter,
                self._planner.plan(),
                self.preprocess,
                self.protocol,
                seconds=seconds,
            ),
            is_idle=lambda: self._worker.sessions == 0,
        )

    def capacity(self) -> EngineCapacity:
        """How many live sessions of the bundle's default kind fit, as far as costs are known.

        Raises CapacityError if not even one has room in the context.
        """
        plan, total = self._planner.plan(), self._worker.stats().pages_total
        shared = prefix_pages(plan.prefix, self._worker.page_size)
        return self._load.capacity(
            plan,
            pages=total - shared if total else None,
            limit=self.max_sessions,
        )

    def run_once(self) -> bool:
        """Do one round of work, in the calling thread: encode some chunks, run one step. Whether
        there was anything to do.

        Raises OptionError on an engine with a thread of its own.
        """
        if self.threaded:
            raise OptionError("This engine has a thread of its own; open it with threaded=False.")
        return self._run_round()

    def run_until_idle(self) -> bool:
        """Do all there is to do, in the calling thread; whether there was anything.

        Raises OptionError on an engine with a thread of its own.
        """
        worked = False
        while True:
            self._wake.clear()
            if self.run_once():
                worked = True
            elif (patience := self._worker.patience()) is not None:
                self._wake.wait(patience)
            else:
                return worked

    def retire(self, number: int, *, wait: bool = True) -> None:
        """End a session and free its pages; with `wait` they are free when this returns."""
        self._worker.retire(number)
        if self.threaded:
            self._wake.set()
            if wait:
                self._worker.wait_until_gone(number)
        else:
            self._worker.run_retirements()

    def stats(self) -> EngineStats:
        """Figures of now."""
        return self._load.complete(self._worker.stats())

    @property
    def failure(self) -> str | None:
        """What ended the engine's thread, in one sentence; None while it works."""
        return self._failure

    def check_integrity(self) -> None:
        """Recount every page while nothing runs. Raises RuntimeError where a count is wrong."""
        self._worker.check_integrity()

    def close(self) -> None:
        """End every session, stop the thread and free the executor. May be called again."""
        if self._stopping:
            return
        self._stopping = True
        self._load.close("The engine was closed.")
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._worker.stop("The engine was closed.", failed=False)
        self._executor.close()

    def __enter__(self) -> "StreamingEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _make_worker(self, executor: Executor | PromptExecutor) -> Worker:
        model, protocol, limits = self.model, self.protocol, self.limits
        if isinstance(executor, PromptExecutor):
            return PromptWorker(
                executor, model, protocol, limits, self._load.observer, wake=self._wake.set
            )
        return PagedWorker(
            executor, model, protocol, limits, self._load.observer, self._load.costs_of_steps
        )

    def _admit(
        self,
        plan: SessionPlan,
        sampling: SamplingParams,
        source: SessionInput,
        real_time: RealTime | None,
    ) -> tuple[Work, EventStream, LadderControl | None]:
        """Reserve all a session can need, or raise CapacityError and leave nothing behind."""
        with self._opening:
            if self._worker.sessions >= self.max_sessions:
                raise BusyError(
                    f"{self.max_sessions} sessions are open, the most this engine serves at once; "
                    "close one first."
                )
            self._numbers += 1
            number = self._numbers
            ladder = self._load.enter(number, plan, real_time)
            events = EventStream(
                replied=ladder.ended if ladder else None, ended=partial(self._load.leave, number)
            )
            try:
                return (self._worker.admit(number, plan, sampling, source, events), events, ladder)
            except BaseException:
                self._load.leave(number)
                raise

    def _run_round(self) -> bool:
        started = time.monotonic()
        worked = self._worker.run_once()
        if worked:
            self._load.meter.round_done(time.monotonic() - started)
        return worked

    def _work(self) -> None:
        """The engine's thread."""
        try:
            while not self._stopping:
                self._wake.clear()
                if not self._run_round():
                    self._wake.wait(self._worker.patience())
        except BaseException as error:
            _log.exception("The engine's loop failed")
            sentence = f"The engine failed ({type(error).__name__}: {error}); load it again."
            self._failure = sentence
            self._worker.stop(sentence, failed=True)


def _session_stats(work: Work, ladder: LadderControl | None) -> SessionStats:
    return work.stats if ladder is None else replace(work.stats, rung=ladder.rung)


def default_sampling(defaults: StreamingDefaults) -> SamplingParams:
    """How a bundle's tokens are chosen unless a session says otherwise."""
    return SamplingParams(
        temperature=defaults.temperature,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        repetition_penalty=defaults.repetition_penalty,
    )
