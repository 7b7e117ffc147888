"""Work over whole prompts: each session's turns are sent one by one, all sessions at once."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.errors import FramesinkError, SessionClosedError, error_sentence
from framesink.runtime.event_stream import EventStream
from framesink.runtime.manifest import Limits
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.observer import EngineObserver
from framesink.runtime.prompting.conversation import Conversation
from framesink.runtime.prompting.executor import Generation, PromptExecutor
from framesink.runtime.prompting.prompt import PromptWriter
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.session_input import SessionInput
from framesink.runtime.session_plan import SessionPlan
from framesink.runtime.stats import EngineStats, SessionStats
from framesink.runtime.step_loop import CLOSED, FINISHED


@dataclass(slots=True)
class _Request:
    """A reply under way: when it was begun and by when it must have ended
    (`time.monotonic()`), and whether it was cancelled."""

    generation: Generation
    prompt_tokens: int
    begun_at: float
    deadline: float
    cancelled: bool = False


@dataclass(slots=True)
class _Figures:
    """Counts since the start; times in seconds."""

    replies: int = 0
    tokens: int = 0
    at_once: int = 0
    seconds: float = 0.0
    last_seconds: float = 0.0


class Talk:
    """A conversation and its reply under way."""

    def __init__(self, conversation: Conversation) -> None:
        self.number = conversation.number
        self.conversation = conversation
        self.request: _Request | None = None

    @property
    def stats(self) -> SessionStats:
        """Figures of the session."""
        return self.conversation.stats


class PromptWorker:
    """See `framesink.runtime.worker.Worker`. A session has one reply under way at most.

    What goes wrong with a request ends its session alone. An executor that does not end a cancelled
    request has failed: `run_once` raises, which ends the engine.
    """

    page_size = 1
    takes_frames = True
    hold_frames: Callable[[UInt8Array], UInt8Array] | None = None
    takes_embeddings = False
    takes_embeddings = False

    def __init__(
        self,
        executor: PromptExecutor,
        model: ModelConfig,
        protocol: ChatProtocol,
        limits: Limits,
        observer: EngineObserver,
        *,
        wake: Callable[[], None],
    ) -> None:
        """`wake` is called from any thread when there is something to do."""
        self._executor = executor
        self._settings = executor.settings
        self._model = model
        self._protocol = protocol
        self._limits = limits
        self._observer = observer
        self._wake = wake
        self._writer = PromptWriter(protocol)
        self._talks: dict[int, Talk] = {}
        self._retiring: set[int] = set()
        self._stopped: str | None = None
        self._changed = threading.Condition()
        self._figures = _Figures()

    @property
    def sessions(self) -> int:
        """See Worker."""
        with self._changed:
            return len(self._talks)

    def admit(
        self,
        number: int,
        plan: SessionPlan,
        sampling: SamplingParams,
        source: SessionInput,
        events: EventStream,
    ) -> Talk:
        """See Worker; there are no pages to run out of."""
        conversation = Conversation(
            number,
            plan=plan,
            sampling=sampling,
            settings=self._settings,
            model=self._model,
            protocol=self._protocol,
            limits=self._limits,
            writer=self._writer,
            source=source,
            events=events,
            observer=self._observer,
        )
        talk = Talk(conversation)
        with self._changed:
            if self._stopped is not None:
                raise SessionClosedError(self._stopped)
            self._talks[number] = talk
        return talk

    def run_once(self) -> bool:
        """See Worker. Raises FramesinkError when the executor has failed."""
        self._begin_retirements()
        worked = False
        for talk in self._open_talks():
            worked = self._advance(talk) or worked
        return worked

    def patience(self) -> float | None:
        """See Worker: until the next reply is overdue."""
        deadlines = [talk.request.deadline for talk in self._open_talks() if talk.request]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def retire(self, number: int) -> None:
        """See Worker."""
        with self._changed:
            if number in self._talks:
                self._retiring.add(number)

    def run_retirements(self) -> None:
        """See Worker; replies under way are cancelled and waited for."""
        for talk in self._begin_retirements():
            if talk.request is not None:
                talk.request.generation.wait(self._settings.drain_seconds)
            self._advance(talk)

    def wait_until_gone(self, number: int) -> None:
        """See Worker."""
        with self._changed:
            self._changed.wait_for(lambda: number not in self._talks)

    def stop(self, reason: str, *, failed: bool) -> None:
        """See Worker; replies under way are cancelled, and waited for within limits."""
        with self._changed:
            self._stopped = reason
        talks = self._open_talks()
        for talk in talks:
            if failed:
                talk.conversation.fail(reason)
            talk.conversation.end(reason)
            self._cancel(talk)
        deadline = time.monotonic() + self._settings.drain_seconds
        for talk in talks:
            if talk.request is not None:
                talk.request.generation.wait(max(0.0, deadline - time.monotonic()))
            self._remove(talk)

    def stats(self) -> EngineStats:
        """See Worker: a step is a whole reply, a batch what was under way when it began. There are
        no pages."""
        figures = self._figures
        replies = max(1, figures.replies)
        return EngineStats(
            sessions=self.sessions,
            pages_used=0,
            pages_reserved=0,
            pages_total=0,
            steps=figures.replies,
            tokens=figures.tokens,
            encoded_chunks=0,
            mean_batch=figures.at_once / replies,
            mean_step_seconds=figures.seconds / replies,
            last_step_seconds=figures.last_seconds,
            mean_encode_seconds=0.0,
        )

    def check_integrity(self) -> None:
        """See Worker: nothing is held here that could be miscounted."""

    # Details.

    def _open_talks(self) -> list[Talk]:
        with self._changed:
            return list(self._talks.values())

    def _begin_retirements(self) -> list[Talk]:
        """End the conversations `retire` was called for; their replies may still be under way."""
        with self._changed:
            retiring = [self._talks[n] for n in self._retiring if n in self._talks]
            self._retiring.clear()
        for talk in retiring:
            talk.conversation.end(CLOSED)
            self._cancel(talk)
        return retiring

    def _advance(self, talk: Talk) -> bool:
        """Whatever can be done for one session now; whether there was anything."""
        if talk.request is not None:
            return self._follow(talk, talk.request)
        if talk.conversation.done:
            talk.conversation.end(FINISHED)
        if talk.conversation.ended:
            self._remove(talk)
            return True
        return self._begin(talk)

    def _begin(self, talk: Talk) -> bool:
        try:
            wanted = talk.conversation.begin_turn()
            if wanted is None:
                return False
            generation = self._executor.generate(wanted, self._wake)
        except Exception as error:  # whatever it is, it ends this session alone
            talk.conversation.fail(error_sentence("A turn could not begin", error))
            return True
        now = time.monotonic()
        deadline = now + self._settings.reply_seconds
        talk.request = _Request(generation, wanted.prompt.tokens, now, deadline)
        self._figures.at_once += sum(other.request is not None for other in self._open_talks())
        return True

    def _follow(self, talk: Talk, request: _Request) -> bool:
        ended = request.generation.ended  # first: what comes before the end is then there
        tokens = request.generation.take()
        if tokens and not talk.conversation.ended:
            talk.conversation.take(tokens)
            self._figures.tokens += len(tokens)
        if ended:
            self._finish(talk, request)
            return True
        if time.monotonic() >= request.deadline:
            self._overdue(talk, request)
            return True
        return bool(tokens)

    def _finish(self, talk: Talk, request: _Request) -> None:
        talk.request = None
        if talk.conversation.ended:
            return
        failure = request.generation.failure
        if failure is not None:
            talk.conversation.fail(failure)
            return
        talk.conversation.complete()
        figures = self._figures
        figures.replies += 1
        figures.tokens += request.prompt_tokens
        figures.last_seconds = time.monotonic() - request.begun_at
        figures.seconds += figures.last_seconds

    def _overdue(self, talk: Talk, request: _Request) -> None:
        settings = self._settings
        if request.cancelled:
            raise FramesinkError(
                f"{self._executor.name} did not end a cancelled request within "
                f"{settings.drain_seconds:g} s."
            )
        talk.conversation.fail(
            f"{self._executor.name} did not complete the reply within {settings.reply_seconds:g} s."
        )
        self._cancel(talk)

    def _cancel(self, talk: Talk) -> None:
        request = talk.request
        if request is not None and not request.cancelled:
            request.cancelled = True
            request.deadline = time.monotonic() + self._settings.drain_seconds
            request.generation.cancel()

    def _remove(self, talk: Talk) -> None:
        with self._changed:
            self._talks.pop(talk.number, None)
            self._changed.notify_all()
        talk.conversation.hang_up()
