"""Trim a context in steps: the policy's own choice, made for several turns at once."""

from collections.abc import Sequence

from framesink.runtime.kv.span import Span
from framesink.runtime.policies import Policy, TurnProfile


def trim(
    policy: Policy, spans: Sequence[Span], turn: int, profile: TurnProfile, step: int
) -> list[Span]:
    """The spans to keep when `turn` is about to begin.

    As long as the policy would keep everything, everything stays. When it would not, what it will
    drop within the next `step - 1` turns goes at once, so that in these the context only grows. It
    is never more than the policy's own, and the turn before this one stays as the policy keeps it.
    Raises what `policy.select` raises.
    """
    kept = policy.select(spans, turn, profile)
    if _same(kept, spans):
        return kept
    last = [span for span in kept if span.turn == turn - 1]
    for ahead in range(step - 1, 0, -1):
        further = policy.select(spans, turn + ahead, profile)
        if _same([span for span in further if span.turn == turn - 1], last):
            return further
    return kept


def _same(some: Sequence[Span], others: Sequence[Span]) -> bool:
    return len(some) == len(others) and all(
        one is other for one, other in zip(some, others, strict=True)
    )
