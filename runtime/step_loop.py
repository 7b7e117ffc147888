"""The engine's loop body: begin turns, encode chunks, run one step, hand out its logits."""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from framesink.runtime.arrays import Float32Array, Int32Array
from framesink.runtime.encoding import ChunkEncoder, EncodingFigures
from framesink.runtime.errors import SessionClosedError, error_sentence
from framesink.runtime.executors.base import (
    ChoosingExecutor,
    Executor,
    SequenceInput,
)
from framesink.runtime.observer import EngineObserver, StepReport
from framesink.runtime.prefix import Prefix, PrefixCache
from framesink.runtime.scheduler import Scheduler, Share, Work
from framesink.runtime.sequence import Sequence

FINISHED = "The session was finished and takes no more input; open another."
CLOSED = "The session was closed; open another."


class Stepped(Protocol):
    """Whatever takes part in a step."""

    def next_input(self, count: int) -> SequenceInput:
        """The next `count` tokens to write."""
        ...

    def step_done(self, answer: Float32Array | int | None) -> None:
        """They are written."""
        ...


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
        self._chooser = executor if isinstance(executor, ChoosingExecutor) else None
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
        """One round: some chunks encoded and one step run. False if there was nothing to do."""
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
        """Write one step's tokens and hand out its logits."""
        members: dict[int, Sequence | Prefix] = {}
        work: list[Work] = []
        for sequence in self._open_sequences():
            prefix = sequence.prefix
            if not prefix.ready and prefix.number not in members:
                members[prefix.number] = prefix
                work.append(Work(prefix.number, float("-inf"), prefix.cache.unwritten, False))
            if sequence.tokens_to_write:
                members[sequence.number] = sequence
                work.append(
                    Work(
                        sequence.number,
                        sequence.deadline,
                        sequence.tokens_to_write,
                        sequence.decoding,
                    )
                )
        shares = self._scheduler.schedule(work)
        if not shares:
            return False
        batch = self._prepare(shares, members)
        started = time.monotonic()
        try:
            answers = self._run([given for _, given in batch])
        except Exception as error:
            sentence = error_sentence(f"A step of {self._executor.name} failed", error)
            for member, _ in batch:
                self._fail(member, sentence)
            return True
        self._count_step(batch, time.monotonic() - started)
        for (member, _), answer in zip(batch, answers, strict=True):
            try:
                member.step_done(answer)
            except Exception as error:
                self._fail(member, error_sentence("A step could not be used", error))
        return True

    def _run(self, batch: list[SequenceInput]) -> list[Float32Array | int | None]:
        """Every sequence's next token, or the logits it chooses from itself."""
        if self._chooser is not None:
            return self._chooser.step_and_choose(batch)
        return [*self._executor.step(batch)]

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

    def _count_step(
        self, batch: list[tuple[Sequence | Prefix, SequenceInput]], seconds: float
    ) -> None:
        figures = self.figures
        tokens = sum(given.token_ids.size for _, given in batch)
        figures.steps += 1
        figures.shares += len(batch)
        figures.tokens += tokens
        figures.step_seconds += seconds
        figures.last_step_seconds = seconds
        decoding = sum(isinstance(member, Sequence) and member.decoding for member, _ in batch)
        self._observer.stepped(StepReport(decoding, len(batch) - decoding, tokens, seconds))

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
