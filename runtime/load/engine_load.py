"""What an engine knows of its load: measured costs, the live streams, who waits to be one."""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from framesink.runtime.errors import FramesinkError
from framesink.runtime.load.admission import Entrance, LiveStreams
from framesink.runtime.load.capacity import predicted_load, streams_that_fit
from framesink.runtime.load.costs import CostMeter, WorkCosts
from framesink.runtime.load.declared import EngineCapacity, declared_shape, text_tokens
from framesink.runtime.load.ladder import RealTime
from framesink.runtime.load.ladder_control import LadderControl
from framesink.runtime.observer import EngineObserver, Observers
from framesink.runtime.preprocess import PreprocessConfig
from framesink.runtime.session_plan import SessionPlan
from framesink.runtime.stats import EngineStats

_log = logging.getLogger(__name__)

_Admitted = TypeVar("_Admitted")


class EngineLoad:
    """Safe from any thread. `observer` is what the engine's worker tells of its steps."""

    def __init__(
        self, observer: EngineObserver, preprocess: PreprocessConfig, *, measurable: bool
    ) -> None:
        """`observer` is told what happens for sessions of callers. Where steps are not told,
        nothing is `measurable`."""
        self.meter = CostMeter()
        self.observer = Observers(self.meter, observer)
        self._preprocess = preprocess
        self._streams = LiveStreams(lambda: self.meter.costs)
        self._entrance = Entrance()
        self._measured = not measurable
        self._measuring = threading.Lock()

    def costs_of_steps(self) -> WorkCosts | None:
        """What steps are divided by; None while costs are unknown or no session is live: then
        nothing is due, and the same input is divided the same way every time."""
        return self.meter.costs if self._streams.count else None

    def measure(self, rehearse: Callable[[], None], is_idle: Callable[[], bool]) -> None:
        """Learn costs from a rehearsal, the first time that nothing else runs; observers are not
        told of it. Who comes meanwhile waits for its end."""
        with self._measuring:
            if self._measured or self.meter.costs is not None or not is_idle():
                return
            self._measured = True
            self.observer.only_first = True
            try:
                rehearse()
            except FramesinkError as error:
                _log.warning("What work costs here could not be measured: %s", error)
            finally:
                self.observer.only_first = False

    def admit(self, attempt: Callable[[], _Admitted], real_time: RealTime | None) -> _Admitted:
        """What `attempt` returns; live sessions wait for it as they are told to."""
        if real_time is None:
            return attempt()
        return self._entrance.admit(attempt, real_time.wait)

    def enter(
        self, number: int, plan: SessionPlan, real_time: RealTime | None
    ) -> LadderControl | None:
        """Count a session, if it is live; its place on its ladder. Raises BusyError where there is
        no time for it."""
        if real_time is None:
            return None
        shape = declared_shape(plan, self._preprocess)
        self._streams.enter(number, shape, check=real_time.admission == "check")
        if real_time.ladder is None:
            return None
        return LadderControl(
            number,
            real_time.ladder,
            self._streams,
            self._preprocess,
            shape,
            text_tokens=text_tokens(plan),
        )

    def leave(self, number: int) -> None:
        """A session has ended."""
        self._streams.leave(number)
        self._entrance.changed()

    def close(self, reason: str) -> None:
        """Nobody enters any more, and nobody waits."""
        self._entrance.close(reason)

    def capacity(self, plan: SessionPlan, *, pages: int | None, limit: int) -> EngineCapacity:
        """How many sessions of `plan` fit into the time, into `pages` and under `limit`."""
        costs = self.meter.costs
        shape = declared_shape(plan, self._preprocess)
        return EngineCapacity(
            by_time=streams_that_fit(shape, costs) if costs else None,
            load=predicted_load([shape], costs) if costs else None,
            by_pages=None if pages is None else max(0, pages) // plan.pages,
            by_limit=limit,
        )

    def complete(self, stats: EngineStats) -> EngineStats:
        """The worker's figures with those of the load."""
        return replace(
            stats,
            predicted_load=self._streams.load(),
            rungs=self._streams.rungs(),
            queued=self._entrance.waiting,
            refused=self._entrance.refused,
        )
