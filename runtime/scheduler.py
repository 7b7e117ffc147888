"""Which sequences share the next step: in-flight batching, earliest deadline first.

The scheduler knows ids, counts and what work costs. A decoding sequence takes part in every step,
so a reply never waits for another's prompt longer than one step takes; prompts are cut into parts
that fill what a step has room for, the nearest deadline first (Liu and Layland, 1973).

Where costs are known, they bound a step, too. Prompt parts hold replies up no longer than
`most_stall`, and neither a prompt nor a chunk takes time that a reply which is due earlier still
needs. What cannot be in time any more gives way to what can, as if it were due a grace later, but
only that far: so deadlines grow with time, and nobody waits for ever.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from framesink.runtime.load.costs import WorkCosts

# Longest that prompt parts and chunks may hold replies up, in seconds, if costs allow.
MOST_STALL = 0.25
# Of what a reply can spare, so much is given away in a step: what comes next may be due earlier.
SPARED = 0.5
# Smaller parts of prompts cost more than they write.
LEAST_PART = 16


@dataclass(frozen=True, slots=True)
class Work:
    """A sequence that has tokens to write.

    `deadline` is `time.monotonic()` by which it should be done. `tokens` are unwritten. A
    `decoding` sequence writes all of them in one step, a prompt in parts. At most `reply_tokens`
    steps of decoding follow. What is late anyway may take `grace` seconds longer.
    """

    sequence: int
    deadline: float
    tokens: int
    decoding: bool
    reply_tokens: int = 0
    grace: float = 0.0


@dataclass(frozen=True, slots=True)
class Encoding:
    """A sequence whose chunk of `patches` ViT patches waits for the vision encoder; see Work for
    the rest."""

    sequence: int
    deadline: float
    patches: int
    reply_tokens: int = 0
    grace: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """What one sequence writes in a step."""

    sequence: int
    tokens: int


class Scheduler:
    """Divides steps among sequences. Holds limits and no state."""

    def __init__(
        self,
        *,
        prefill_budget: int,
        max_part: int,
        max_batch: int,
        patch_budget: int,
        costs: Callable[[], WorkCosts | None] = lambda: None,
        most_stall: float = MOST_STALL,
        now: Callable[[], float] | None = None,
    ) -> None:
        """A step takes at most `max_batch` sequences and `prefill_budget` prompt tokens, and at
        most `max_part` of one sequence. Before a step at most `patch_budget` patches are encoded,
        so that replies under way wait no longer than one large chunk takes. `costs` are those of
        now, None while they are unknown; `now` is `time.monotonic` by default."""
        self._prefill_budget = prefill_budget
        self._max_part = max_part
        self._max_batch = max_batch
        self._patch_budget = patch_budget
        self._costs = costs
        self._most_stall = most_stall
        self._now = now or (lambda: time.monotonic())

    def schedule_encoding(
        self, waiting: Iterable[Encoding], replies: Iterable[Work] = ()
    ) -> list[int]:
        """The sequences whose chunks are encoded before the next step, at least one if any wait and
        none of the `replies` under way needs the time."""
        limits = self._limits([item for item in replies if item.decoding])
        chosen: list[int] = []
        budget = self._patch_budget
        for item in sorted(waiting, key=lambda item: (limits.due(item), item.sequence)):
            if (chosen and item.patches > budget) or not limits.take_chunk(item):
                break
            budget -= item.patches
            chosen.append(item.sequence)
        return chosen

    def schedule(self, work: Iterable[Work]) -> list[Share]:
        """The next step, decoding sequences first; empty if there is no work."""
        items = list(work)
        decoding = [item for item in items if item.decoding]
        prompts = [item for item in items if not item.decoding]
        limits = self._limits(decoding)
        decoding.sort(key=lambda item: (item.deadline, item.sequence))
        prompts.sort(key=lambda item: (limits.due(item), item.sequence))
        shares: list[Share] = []
        for item in decoding[: self._max_batch]:
            shares.append(Share(item.sequence, min(item.tokens, self._max_part)))
        budget = self._prefill_budget
        for item in prompts:
            if len(shares) == self._max_batch:
                break
            tokens = limits.take_prompt(item, min(item.tokens, self._max_part, budget))
            if tokens > 0:
                budget -= tokens
                shares.append(Share(item.sequence, tokens))
        return shares

    def _limits(self, decoding: list[Work]) -> "_StepLimits":
        return _StepLimits(decoding, self._costs(), self._most_stall, self._now())


class _StepLimits:
    """What time a step has beside its replies. Without costs there is as much as one likes."""

    def __init__(
        self, decoding: list[Work], costs: WorkCosts | None, most_stall: float, now: float
    ) -> None:
        self._costs = costs
        self._now = now
        self._spent = 0.0
        self._stall = math.inf
        self._step = 0.0
        self._replies: list[tuple[float, float]] = []
        if costs is None:
            return
        self._step = costs.step(len(decoding), 0)
        if decoding:
            # Not less than what makes a part worth its while.
            worth = costs.prefill.seconds(LEAST_PART) + costs.prefill.base
            self._stall = max(most_stall, worth)
        for item in decoding:
            due = self.due(item)
            slack = due - now - item.reply_tokens * self._step
            if slack >= 0:
                self._replies.append((due, slack))

    def due(self, item: Work | Encoding) -> float:
        """The deadline that it can meet, or else the one after its grace."""
        costs = self._costs
        if costs is None:
            return item.deadline
        needed = item.reply_tokens * self._step
        if isinstance(item, Encoding):
            needed += costs.vision.seconds(item.patches)
        elif not item.decoding:
            needed += costs.prefill.seconds(item.tokens)
        return item.deadline if self._now + needed <= item.deadline else item.deadline + item.grace

    def take_prompt(self, item: Work, most: int) -> int:
        """How many of at most `most` tokens of a prompt the step has time for; they are taken."""
        costs = self._costs
        if costs is None or most <= 0:
            return most
        left = min(self._stall, self._slack(item)) - self._spent - costs.prefill.base
        if left < 0:
            return 0
        tokens = most
        if costs.prefill.each * most > left:
            # Every part pays the base again: what fits into a later step is not cut in this one.
            if costs.prefill.seconds(most) <= self._stall:
                return 0
            tokens = int(left / costs.prefill.each)
        if tokens < min(most, LEAST_PART):
            return 0
        self._spent += costs.prefill.seconds(tokens)
        return tokens

    def take_chunk(self, item: Encoding) -> bool:
        """Whether the step has time for a chunk, which is then taken. The first may hold replies up
        as long as it takes: it cannot be cut."""
        if self._costs is None:
            return True
        spent = self._spent + self._costs.vision.seconds(item.patches)
        fits = spent <= self._slack(item) and (self._spent == 0 or spent <= self._stall)
        self._spent = spent if fits else self._spent
        return fits

    def _slack(self, item: Work | Encoding) -> float:
        """Seconds that all replies which are due before it give away."""
        due = self.due(item)
        least = min((slack for at, slack in self._replies if at < due), default=math.inf)
        return SPARED * least
