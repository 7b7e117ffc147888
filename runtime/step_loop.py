"""The engine's loop body: begin turns, encode chunks, launch a step, hand out another's answers.

An executor that can is kept busy: the next step is launched before the answers of the one before it
are waited for, as vLLM's asynchronous scheduling and SGLang's overlap scheduler do. Its sequences
then take part with tokens that the executor alone knows (see Sequence). What the host does for a
step it does while the executor works on another.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from framesink.runtime.arrays import Int32Array
from framesink.runtime.encoding import ChunkEncoder, EncodingFigures
from framesink.runtime.errors import SessionClosedError, error_sentence
from framesink.runtime.executors.base import Executor, SequenceInput
from framesink.runtime.observer import EngineObserver, StepReport
from framesink.runtime.prefix import Prefix, PrefixCache
from framesink.runtime.scheduler import Scheduler, Share, Work
from framesink.runtime.sequence import Sequence
from framesink.runtime.step_driver import StepDriver

FINISHED = "The session was finished and takes no more input; open another."
CLOSED = "The session was closed; open another."


@dataclass(frozen=True, slots=True, eq=False)
class StepUnderWay:
    """A launched step: who is in it, how many of them decode, how many tokens it writes, when its
    launch began, and what the executor knows it by."""

    members: list[Sequence | Prefix]
    decoding: int
    tokens: int
    began: float
    launched: object


@dataclass(slots=True)
class LoopFigures:
    """Counts since the start; times in seconds."""

    steps: int = 0
    shares: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    last_step_seconds: float = 0.0


class StepLoop:
    """Works on all open sequences. `run_once` belongs to the engine's thread; `add`, `retire` and
    `sessions` may be called from any."""

    def __init__(
        self,
        executor: Executor,
        prefixes: PrefixCache,
        scheduler: Scheduler,
        observer: EngineObserver,
    ) -> None:
        self.figures = LoopFigures()
        self._executor = executor
        self._driver = StepDriver(executor)
        self._under_way: StepUnderWay | None = None
        self._step_ended = 0.0
        self._prefixes = prefixes
        self._scheduler = scheduler
        self._observer = observer
        self._encoder = ChunkEncoder(executor, scheduler, observer, self._fail)
        self._sequences: dict[int, Sequence] = {}
        self._retiring: set[int] = set()
        self._stopped: str | None = None
        self._changed = threading.Condition()

    @property
    def encoding_figures(self) -> EncodingFigures:
        """What encoding has come to."""
        return self._encoder.figures

    @property
    def sessions(self) -> int:
        """Sequences that have not ended."""
        with self._changed:
            return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Work on a sequence from now on. Raises SessionClosedError after `stop`."""
        with self._changed:
            if self._stopped is not None:
                raise SessionClosedError(self._stopped)
            self._sequences[sequence.number] = sequence

    def retire(self, number: int) -> None:
        """End a sequence before the next step, if it has not ended yet."""
        with self._changed:
            if number in self._sequences:
                self._retiring.add(number)

    def wait_until_gone(self, number: int) -> None:
        """Block until a sequence has ended and its pages are free."""
        with self._changed:
            self._changed.wait_for(lambda: number not in self._sequences)

    def stop(self, reason: str, *, failed: bool) -> None:
        """End every sequence, with an error event if `failed`, and take no others."""
        with self._changed:
            self._stopped = reason
            for sequence in list(self._sequences.values()):
                if failed:
                    sequence.fail(reason)
                self._remove(sequence, reason)

    def live_slots(self) -> Iterable[Int32Array]:
        """The slots of every span of everyone, for the pool's integrity check."""
        with self._changed:
            sequences = list(self._sequences.values())
        for prefix in {sequence.prefix.number: sequence.prefix for sequence in sequences}.values():
            yield from (span.slots for span in prefix.cache.spans)
        for sequence in sequences:
            yield from (span.slots for span in sequence.cache.spans)

    def run_once(self) -> bool:
        """One round: some chunks encoded, one step launched, one collected. False if there was
        nothing to do."""
        self.run_retirements()
        begun = [self._begin(sequence) for sequence in self._open_sequences()]
        encoded = self._encoder.run(self._open_sequences())
        for sequence in self._open_sequences():
            self._make_room(sequence)
        stepped = self._step()
        return any(begun) or encoded or stepped

    def run_retirements(self) -> None:
        """End the sequences `retire` was called for."""
        with self._changed:
            retiring = [self._sequences[n] for n in self._retiring if n in self._sequences]
            self._retiring.clear()
        for sequence in retiring:
            self._remove(sequence, CLOSED)

    def _open_sequences(self) -> list[Sequence]:
        with self._changed:
            return list(self._sequences.values())

    def _begin(self, sequence: Sequence) -> bool:
        if sequence.done:
            self._remove(sequence, FINISHED)
            return True
        if not sequence.waiting:
            return False
        try:
            return sequence.begin_turn()
        except Exception as error:  # whatever it is, it ends this session alone
            self._fail(sequence, error_sentence("A turn could not begin", error))
            return True

    def _make_room(self, sequence: Sequence) -> None:
        try:
            sequence.make_room()
        except Exception as error:  # whatever it is, it ends this session alone
            self._fail(sequence, error_sentence("A turn could not begin", error))

    def _step(self) -> bool:
        """Launch a step, then hand out the answers of the one launched before it, or of the same if
        the executor has run it already. Whether there was one of either."""
        members, work = self._work()
        shares = self._scheduler.schedule(work)
        launched = self._launch(shares, members)
        if not self._driver.launches_ahead:
            collected = launched
        else:
            collected, self._under_way = self._under_way, launched
        if collected is not None:
            self._collect(collected)
        return bool(shares) or collected is not None

    def _work(self) -> tuple[dict[int, Sequence | Prefix], list[Work]]:
        """Who has tokens to write."""
        members: dict[int, Sequence | Prefix] = {}
        work: list[Work] = []
        for sequence in self._open_sequences():
            prefix = sequence.prefix
            if not prefix.ready and prefix.number not in members:
                members[prefix.number] = prefix
                work.append(Work(prefix.number, float("-inf"), prefix.cache.unwritten, False))
            tokens = sequence.tokens_to_write
            if tokens:
                members[sequence.number] = sequence
                work.append(
                    Work(
                        sequence.number,
                        sequence.deadline,
                        tokens,
                        sequence.decoding,
                        sequence.reply_tokens,
                        sequence.chunk_seconds,
                    )
                )
        return members, work

    def _launch(
        self, shares: list[Share], members: dict[int, Sequence | Prefix]
    ) -> StepUnderWay | None:
        """Launch the next step, if there is anything to write. Who cannot take part ends."""
        began = time.monotonic()
        batch = self._prepare(shares, members)
        if not batch:
            return None
        decoding = sum(isinstance(member, Sequence) and member.decoding for member, _ in batch)
        try:
            launched = self._driver.launch([given for _, given in batch])
            for member, _ in batch:
                member.launched()
        except Exception as error:
            self._fail_all([member for member, _ in batch], error)
            return None
        tokens = sum(given.token_ids.size for _, given in batch)
        return StepUnderWay([member for member, _ in batch], decoding, tokens, began, launched)

    def _collect(self, step: StepUnderWay) -> None:
        """Wait for a step and hand out its answers. Who has ended meanwhile gets none."""
        try:
            answers = self._driver.collect(step.launched)
        except Exception as error:
            self._fail_all(step.members, error)
            return
        self._count_step(step)
        for member, answer in zip(step.members, answers, strict=True):
            if member.ended:
                continue
            try:
                member.step_done(answer)
            except Exception as error:
                self._fail(member, error_sentence("A step could not be used", error))

    def _prepare(
        self, shares: list[Share], members: dict[int, Sequence | Prefix]
    ) -> list[tuple[Sequence | Prefix, SequenceInput]]:
        """Pages and inputs for the step; who gets none of either ends."""
        batch: list[tuple[Sequence | Prefix, SequenceInput]] = []
        for share in shares:
            member = members[share.sequence]
            try:
                batch.append((member, member.next_input(share.tokens)))
            except Exception as error:
                self._fail(member, error_sentence("A step could not be prepared", error))
        return batch

    def _count_step(self, step: StepUnderWay) -> None:
        """A step takes from its launch, or the end of the one before it, to its end."""
        now = time.monotonic()
        seconds = now - max(step.began, self._step_ended)
        self._step_ended = now
        figures = self.figures
        figures.steps += 1
        figures.shares += len(step.members)
        figures.tokens += step.tokens
        figures.step_seconds += seconds
        figures.last_step_seconds = seconds
        prefilling = len(step.members) - step.decoding
        self._observer.stepped(StepReport(step.decoding, prefilling, step.tokens, seconds))

    def _fail_all(self, members: list[Sequence | Prefix], error: Exception) -> None:
        sentence = error_sentence(f"A step of {self._executor.name} failed", error)
        for member in members:
            if not member.ended:
                self._fail(member, sentence)

    def _fail(self, member: Sequence | Prefix, sentence: str) -> None:
        """End a sequence, or all who share a prefix, with an error event."""
        if isinstance(member, Prefix):
            self._prefixes.discard(member)
            for sequence in self._open_sequences():
                if sequence.prefix is member:
                    self._fail(sequence, sentence)
            return
        member.fail(sentence)
        self._remove(member, sentence)

    def _remove(self, sequence: Sequence, reason: str) -> None:
        sequence.end(reason)
        self._prefixes.release(sequence.prefix)
        with self._changed:
            del self._sequences[sequence.number]
            self._changed.notify_all()
        sequence.hang_up()
