"""Which sequences share the next step: in-flight batching, earliest deadline first.

The scheduler knows ids and counts only. A decoding sequence takes part in every step, so a reply
never waits for another's prompt; prompts are cut into parts that fill what a step has room for, the
nearest deadline first (Liu and Layland, 1973). Deadlines grow with time, so nobody waits for ever.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """A sequence that has tokens to write.

    `deadline` is `time.monotonic()` by which it should be done. `tokens` are unwritten. A
    `decoding` sequence writes all of them in one step, a prompt in parts.
    """

    sequence: int
    deadline: float
    tokens: int
    decoding: bool


@dataclass(frozen=True, slots=True)
class Encoding:
    """A sequence whose chunk of `patches` ViT patches waits for the vision encoder."""

    sequence: int
    deadline: float
    patches: int


@dataclass(frozen=True, slots=True)
class Share:
    """What one sequence writes in a step."""

    sequence: int
    tokens: int


class Scheduler:
    """Divides steps among sequences. Holds limits and no state."""

    def __init__(
        self, *, prefill_budget: int, max_part: int, max_batch: int, patch_budget: int
    ) -> None:
        """A step takes at most `max_batch` sequences and `prefill_budget` prompt tokens, and at
        most `max_part` of one sequence. Before a step at most `patch_budget` patches are encoded,
        so that replies under way wait no longer than one large chunk takes."""
        self._prefill_budget = prefill_budget
        self._max_part = max_part
        self._max_batch = max_batch
        self._patch_budget = patch_budget

    def schedule_encoding(self, waiting: Iterable[Encoding]) -> list[int]:
        """The sequences whose chunks are encoded before the next step, at least one if any wait."""
        chosen: list[int] = []
        budget = self._patch_budget
        for item in sorted(waiting, key=lambda item: (item.deadline, item.sequence)):
            if chosen and item.patches > budget:
                break
            budget -= item.patches
            chosen.append(item.sequence)
        return chosen

    def schedule(self, work: Iterable[Work]) -> list[Share]:
        """The next step, decoding sequences first; empty if there is no work."""
        shares: list[Share] = []
        budget = self._prefill_budget
        for item in sorted(work, key=_urgency):
            tokens = min(item.tokens, self._max_part)
            if not item.decoding:
                tokens = min(tokens, budget)
                budget -= tokens
            if tokens > 0 and len(shares) < self._max_batch:
                shares.append(Share(item.sequence, tokens))
        return shares


def _urgency(work: Work) -> tuple[bool, float, int]:
    return (not work.decoding, work.deadline, work.sequence)
