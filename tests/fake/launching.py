"""The fake executor as one that works elsewhere: steps are launched, answers come later."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fake.executor import FakeExecutor
from framesink.runtime.arrays import Float32Array
from framesink.runtime.executors.base import NEXT_TOKEN, SequenceInput
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.sampler import Sampler, TokenChoice

Answers = list[Float32Array | int | None]
MOST_UNDER_WAY = 2


@dataclass(frozen=True, eq=False)
class Launched:
    """A step under way: whose it is, and what it will answer."""

    contexts: set[int]
    answers: Answers


class LaunchingFakeExecutor(FakeExecutor):
    """Chooses tokens itself, and keeps them to itself until they are collected.

    Raises AssertionError where launching or collecting breaks the rules, as for a token asked for
    that no step under way has chosen. `most_under_way` and `guesses` count what was made use of.
    """

    name = "launching fake"

    def __init__(self, protocol: ChatProtocol, *, num_pages: int, page_size: int) -> None:
        super().__init__(protocol, num_pages=num_pages, page_size=page_size)
        self.most_under_way = 0
        self.guesses = 0
        self._under_way: deque[Launched] = deque()
        self._chosen: dict[int, int] = {}

    def launch(self, batch: Sequence[SequenceInput]) -> object:
        """See LaunchingExecutor."""
        assert len(self._under_way) < MOST_UNDER_WAY
        chosen = self._chosen
        known = [self._named(given) for given in batch]
        answers: Answers = []
        for given, logits in zip(known, self.step(known), strict=True):
            number = _context_number(given)
            chosen.pop(number, None)
            if logits is None or given.choice is None:
                answers.append(logits)
                continue
            chosen[number] = _chosen(given.choice, logits, fed=int(given.token_ids[-1]))
            answers.append(chosen[number])
        launched = Launched({_context_number(given) for given in batch}, answers)
        self._under_way.append(launched)
        self.most_under_way = max(self.most_under_way, len(self._under_way))
        return launched

    def collect(self, launched: object) -> Answers:
        """See LaunchingExecutor."""
        oldest = self._under_way.popleft()
        assert launched is oldest, "steps must be collected in the order they were launched"
        return oldest.answers

    def step_and_choose(self, batch: Sequence[SequenceInput]) -> Answers:
        """See ChoosingExecutor."""
        return self.collect(self.launch(batch))

    def _named(self, given: SequenceInput) -> SequenceInput:
        """The input with the token that was chosen in the step before."""
        if NEXT_TOKEN not in given.token_ids:
            return given
        assert given.token_ids.tolist() == [NEXT_TOKEN]
        number = _context_number(given)
        (latest,) = self._under_way
        assert number in latest.contexts, "the token before is known to whoever asks for it"
        self.guesses += 1
        return replace(given, token_ids=np.array([self._chosen[number]], np.int32))


def _chosen(choice: TokenChoice, logits: Float32Array, fed: int) -> int:
    """What the session's own sampler would choose; who asks may not know yet what was fed."""
    seen = None
    if choice.seen is not None:
        seen = choice.seen.mask.copy()
        seen[fed] = True
    return Sampler(choice.params, choice.suppressed).token_at(choice.fraction, logits, seen)


def _context_number(given: SequenceInput) -> int:
    assert given.context.edition is not None
    return given.context.edition[0]
