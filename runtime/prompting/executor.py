"""The border to an executor that is sent whole prompts: text and frames in, token ids out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from framesink.runtime.errors import OptionError
from framesink.runtime.prompting.prompt import Prompt
from framesink.runtime.sampler import SamplingParams


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """How sessions over whole prompts are run.

    The context is trimmed once in `trim_turns` turns, by so many turns at once: between two trims
    the prompt only grows at its end, so that what was computed for the last one can be used again.
    1 follows the policy turn by turn. A reply that is not complete after `reply_seconds` ends its
    session with an error; a cancelled one that has not ended after `drain_seconds` more is taken
    for the end of the executor.

    Raises OptionError for values that make no sense.
    """

    trim_turns: int = 1
    reply_seconds: float = 30.0
    drain_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.trim_turns < 1:
            raise OptionError(f"trim_turns={self.trim_turns} must be at least 1.")
        if not (self.reply_seconds > 0 and self.drain_seconds > 0):
            raise OptionError(
                f"reply_seconds={self.reply_seconds:g} and drain_seconds={self.drain_seconds:g} "
                "must be above 0."
            )


@dataclass(frozen=True, slots=True, eq=False)
class ReplyRequest:
    """One reply to be generated: at most `max_new_tokens` tokens, ended by any of `stop_tokens`.

    `session` names whose it is: what was computed for a session's prompts may be used again for
    later prompts of the same session alone.
    """

    session: str
    prompt: Prompt
    sampling: SamplingParams
    max_new_tokens: int
    stop_tokens: frozenset[int]


class Generation(Protocol):
    """A reply under way. Safe from any thread."""

    @property
    def ended(self) -> bool:
        """Whether nothing more comes and the executor has let go of the request."""
        ...

    @property
    def failure(self) -> str | None:
        """Once it has ended: why it did without being complete, in one sentence."""
        ...

    def take(self) -> list[int]:
        """The tokens that came since the last call."""
        ...

    def cancel(self) -> None:
        """Ask the executor to end it; it has `ended` when it did. May be called again."""
        ...

    def wait(self, seconds: float) -> bool:
        """Block until it has ended, for so long at most; whether it has."""
        ...


@runtime_checkable
class PromptExecutor(Protocol):
    """Generates replies to whole prompts, many at a time, and owns its K/V cache."""

    name: str
    settings: PromptSettings

    def generate(self, request: ReplyRequest, notify: Callable[[], None]) -> Generation:
        """Begin a reply, at once. `notify` is called from any thread when there is something new
        of it: tokens or its end. What goes wrong with the request is its `failure`."""
        ...

    def close(self) -> None:
        """End what is under way and free the GPU. May be called again."""
        ...
