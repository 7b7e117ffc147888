"""What does an engine's work: the border between sessions and how their replies are computed."""

from collections.abc import Callable
from typing import Protocol

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.event_stream import EventStream
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.session_input import SessionInput
from framesink.runtime.session_plan import SessionPlan
from framesink.runtime.stats import EngineStats, SessionStats


class Work(Protocol):
    """One session's share of the work."""

    @property
    def number(self) -> int:
        """The session's number."""
        ...

    @property
    def stats(self) -> SessionStats:
        """Its figures as of its last turn."""
        ...


class Worker(Protocol):
    """Works on all open sessions.

    `run_once` belongs to the engine's thread; `admit`, `retire`, `wait_until_gone`, `stats` and
    `sessions` may be called from any. `page_size` is the grain in which the room that a session
    needs is counted, in tokens. `takes_frames` says that chunks must come as frames, not as
    patches, `takes_embeddings` that they may come as a vision encoder's answer.
    """

    page_size: int
    takes_frames: bool
    takes_embeddings: bool

    @property
    def hold_frames(self) -> Callable[[UInt8Array], UInt8Array] | None:
        """What keeps frames of any size until they are encoded, if they may be of any (see
        `FrameEncoder`)."""
        ...

    @property
    def sessions(self) -> int:
        """Sessions that have not ended."""
        ...

    def admit(
        self,
        number: int,
        plan: SessionPlan,
        sampling: SamplingParams,
        source: SessionInput,
        events: EventStream,
    ) -> Work:
        """Work on a session from now on.

        Raises CapacityError where there is no room for what it can need, OptionError for a way of
        sampling that is not to be had here, SessionClosedError after `stop`.
        """
        ...

    def run_once(self) -> bool:
        """One round of whatever there is to do; False if there was nothing."""
        ...

    def patience(self) -> float | None:
        """Seconds after which `run_once` may have something to do without being woken; None if
        nothing is under way elsewhere."""
        ...

    def retire(self, number: int) -> None:
        """End a session soon, if it has not ended yet."""
        ...

    def run_retirements(self) -> None:
        """End the sessions `retire` was called for, now. Belongs to the engine's thread."""
        ...

    def wait_until_gone(self, number: int) -> None:
        """Block until a session has ended and what it held is free."""
        ...

    def stop(self, reason: str, *, failed: bool) -> None:
        """End every session, with an error event if `failed`, and take no others."""
        ...

    def stats(self) -> EngineStats:
        """Figures of now."""
        ...

    def check_integrity(self) -> None:
        """Recount what is held while nothing runs. Raises RuntimeError where a count is wrong."""
        ...
