"""Work over pages: K/V rows stay where they were written, and steps are shared by all sessions."""

from collections.abc import Callable

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.errors import CapacityError
from framesink.runtime.event_stream import EventStream
from framesink.runtime.executors.base import Executor, FrameEncoder, TimedExecutor
from framesink.runtime.kv.page_pool import PagePool
from framesink.runtime.kv.sequence_cache import SequenceCache
from framesink.runtime.load.costs import WorkCosts
from framesink.runtime.manifest import Limits
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.observer import EngineObserver
from framesink.runtime.prefix import PrefixCache
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.sampler import Sampler, SamplingParams
from framesink.runtime.scheduler import Scheduler
from framesink.runtime.sequence import Sequence, SequenceOptions
from framesink.runtime.session_input import SessionInput
from framesink.runtime.session_plan import SessionPlan
from framesink.runtime.stats import EngineStats
from framesink.runtime.step_loop import StepLoop


class PagedWorker:
    """One executor, one page pool, one loop. See `framesink.runtime.worker.Worker`."""

    takes_embeddings = True

    def __init__(
        self,
        executor: Executor,
        model: ModelConfig,
        protocol: ChatProtocol,
        limits: Limits,
        observer: EngineObserver,
        costs: Callable[[], WorkCosts | None] = lambda: None,
    ) -> None:
        """`costs` are those that steps are divided by, None while nothing is due."""
        self.page_size = executor.page_size
        self.takes_frames = isinstance(executor, FrameEncoder)
        self._frame_encoder = executor if isinstance(executor, FrameEncoder) else None
        self._timed = executor if isinstance(executor, TimedExecutor) else None
        self._model = model
        self._protocol = protocol
        self._observer = observer
        self._pool = PagePool(executor.num_pages, executor.page_size)
        self._prefixes = PrefixCache(self._pool)
        scheduler = Scheduler(
            prefill_budget=limits.max_prefill,
            max_part=limits.max_prefill,
            max_batch=limits.max_streams,
            patch_budget=limits.max_patches,
            costs=costs,
        )
        self._loop = StepLoop(executor, self._prefixes, scheduler, observer)

    @property
    def hold_frames(self) -> Callable[[UInt8Array], UInt8Array] | None:
        """See Worker."""
        return None if self._frame_encoder is None else self._frame_encoder.hold_frames

    @property
    def sessions(self) -> int:
        """See Worker."""
        return self._loop.sessions

    def admit(
        self,
        number: int,
        plan: SessionPlan,
        sampling: SamplingParams,
        source: SessionInput,
        events: EventStream,
    ) -> Sequence:
        """Reserve all a session can need, or raise CapacityError and leave nothing behind."""
        reservation = self._pool.reserve(plan.pages, "A session of this policy")
        try:
            prefix = self._prefixes.acquire(plan.prefix)
        except CapacityError:
            self._pool.cancel(reservation)
            raise
        options = SequenceOptions(
            plan.policy,
            plan.profile,
            plan.max_new_tokens,
            plan.first_query,
            plan.previous_words,
            plan.leeway,
        )
        sequence = Sequence(
            number,
            cache=SequenceCache(self._pool, reservation),
            prefix=prefix,
            options=options,
            sampler=Sampler(sampling, self._protocol.suppressed_tokens),
            model=self._model,
            protocol=self._protocol,
            source=source,
            events=events,
            observer=self._observer,
        )
        self._loop.add(sequence)
        return sequence

    def run_once(self) -> bool:
        """See Worker."""
        return self._loop.run_once()

    def patience(self) -> float | None:
        """See Worker: all work is done in `run_once`."""
        return None

    def retire(self, number: int) -> None:
        """See Worker."""
        self._loop.retire(number)

    def run_retirements(self) -> None:
        """See Worker."""
        self._loop.run_retirements()

    def wait_until_gone(self, number: int) -> None:
        """See Worker."""
        self._loop.wait_until_gone(number)

    def stop(self, reason: str, *, failed: bool) -> None:
        """See Worker."""
        self._loop.stop(reason, failed=failed)

    def stats(self) -> EngineStats:
        """See Worker."""
        figures, encoding, pool = self._loop.figures, self._loop.encoding_figures, self._pool
        steps, chunks = max(1, figures.steps), max(1, encoding.chunks)
        return EngineStats(
            sessions=self._loop.sessions,
            pages_used=pool.used,
            pages_reserved=pool.capacity - pool.unreserved,
            pages_total=pool.capacity,
            steps=figures.steps,
            tokens=figures.tokens,
            encoded_chunks=encoding.chunks,
            mean_batch=figures.shares / steps,
            mean_step_seconds=figures.step_seconds / steps,
            last_step_seconds=figures.last_step_seconds,
            mean_encode_seconds=encoding.seconds / chunks,
            gpu_seconds=self._timed.gpu_seconds() if self._timed else {},
        )

    def check_integrity(self) -> None:
        """See Worker: every page is recounted."""
        self._pool.check_integrity(self._loop.live_slots())
