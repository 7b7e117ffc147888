"""From logits to the next token.

The order and meaning of the steps are those of `transformers`' logits processors: repetition
penalty (arXiv 1909.05858), temperature, top-k, top-p (arXiv 1904.09751).
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from framesink.runtime.arrays import BoolArray, Float32Array, Int32Array
from framesink.runtime.errors import OptionError

IntpArray = NDArray[np.intp]

BLOCK = 512


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen.

    `temperature` 0 takes the likeliest token. `top_k` 0 and `top_p` 1 keep every token.
    `repetition_penalty` above 1 makes tokens of the retained context less likely. `seed` makes a
    session's choices repeatable. Raises OptionError for values outside of their ranges.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (0.0 <= self.temperature < float("inf")):
            raise OptionError(f"temperature={self.temperature} must be 0 or more, and finite.")
        if self.top_k < 0:
            raise OptionError(f"top_k={self.top_k} must be 0 (off) or a number of tokens.")
        if not (0.0 < self.top_p <= 1.0):
            raise OptionError(f"top_p={self.top_p} must be above 0 and at most 1 (off).")
        if not (0.0 < self.repetition_penalty < float("inf")):
            raise OptionError(
                f"repetition_penalty={self.repetition_penalty} must be above 0; 1 is off."
            )


class SeenTokens:
    """The different tokens of a retained context and of the reply to it, in the order they came.

    `mask` bool `[vocab]` says which they are.
    """

    def __init__(self, vocabulary: int) -> None:
        self.mask: BoolArray = np.zeros(vocabulary, dtype=np.bool_)
        self._tokens: Int32Array = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return self._tokens.size

    def add(self, tokens: Collection[int] | Int32Array) -> None:
        """More tokens."""
        given = np.unique(np.asarray(tokens, np.int32))
        new = given[~self.mask[given]]
        self.mask[new] = True
        self._tokens = np.concatenate([self._tokens, new])

    def after(self, count: int) -> Int32Array:
        """Those that came after the first `count`, int32."""
        return self._tokens[count:]


@dataclass(frozen=True, slots=True, eq=False)
class TokenChoice:
    """How a session chooses one token, for an executor that does it where its logits are.

    `params` and `suppressed` are those of its `Sampler`. `fraction`, in [0, 1), is the random
    number that a temperature above 0 needs, `seen` the tokens that a repetition penalty is for.
    """

    params: SamplingParams
    suppressed: frozenset[int]
    fraction: float = 0.0
    seen: SeenTokens | None = None

    @property
    def takes_likeliest(self) -> bool:
        """Whether it is the likeliest token that is not suppressed."""
        return self.params.temperature == 0.0 and self.seen is None


class Sampler:
    """Chooses the tokens of one session."""

    def __init__(self, params: SamplingParams, suppressed: Collection[int] = ()) -> None:
        """`suppressed` are token ids that are never chosen."""
        self.params = params
        self.suppressed = frozenset(suppressed)
        self._suppressed = np.asarray(sorted(suppressed), dtype=np.int64)
        self._random = np.random.default_rng(params.seed)
        # Numbers that are drawn and belong to tokens still to be chosen.
        self._fractions: deque[float] = deque()

    @property
    def needs_seen(self) -> bool:
        """Whether `sample` reads which tokens the context holds."""
        return self.params.repetition_penalty != 1.0

    def choice(self, seen: SeenTokens | None = None, *, ahead: int = 0) -> TokenChoice:
        """How the next token is chosen, or, for `ahead` 1, the one after it.

        `seen` are the tokens of the retained context, needed for a repetition penalty. A number
        that was drawn for a choice stays the token's, however often it is asked for, until
        `accept`.
        """
        return TokenChoice(
            self.params,
            self.suppressed,
            self._fraction(ahead) if self.params.temperature > 0.0 else 0.0,
            seen if self.needs_seen else None,
        )

    def accept(self) -> None:
        """The next token is chosen, as `choice` said. `sample` calls it itself."""
        if self._fractions:
            self._fractions.popleft()

    def sample(self, logits: Float32Array, seen: BoolArray | None = None) -> int:
        """The next token of logits float32 `[vocab]`.

        `seen` bool `[vocab]`: tokens of the retained context, needed for a repetition penalty.
        Raises ValueError for logits of which the largest is not a number.
        """
        drawing = self.params.temperature > 0.0
        token = self.token_at(self._fraction(0) if drawing else 0.0, logits, seen)
        self.accept()
        return token

    def token_at(self, fraction: float, logits: Float32Array, seen: BoolArray | None = None) -> int:
        """What `sample` takes for a random number `fraction`, in [0, 1)."""
        scores = self._scaled(logits, seen)
        if not np.isfinite(scores.max()):
            raise ValueError("the model's logits are not finite")
        if self.params.temperature == 0.0:
            return int(scores.argmax())
        kept = self._kept(scores)
        candidates = scores if kept is None else scores[kept]
        index = _draw(np.exp(candidates - candidates.max()), fraction)
        return index if kept is None else int(kept[index])

    def scores(self, logits: Float32Array, seen: BoolArray | None = None) -> Float32Array:
        """Logits after every step; tokens that cannot be chosen are at minus infinity."""
        scores = self._scaled(logits, seen)
        kept = self._kept(scores)
        if kept is None:
            return scores
        result = np.full_like(scores, -np.inf)
        result[kept] = scores[kept]
        return result

    def _fraction(self, ahead: int) -> float:
        """The random number of the next token, or of one `ahead` of it."""
        while len(self._fractions) <= ahead:
            self._fractions.append(self._random.random())
        return self._fractions[ahead]

    def _scaled(self, logits: Float32Array, seen: BoolArray | None) -> Float32Array:
        """Logits after penalty, suppression and temperature."""
        params = self.params
        scores = logits.astype(np.float32, copy=True)
        if seen is not None and self.needs_seen:
            scores[seen] = _penalised(scores[seen], params.repetition_penalty)
        scores[self._suppressed] = -np.inf
        if params.temperature > 0.0:
            scores /= np.float32(params.temperature)
        return scores

    def _kept(self, scores: Float32Array) -> IntpArray | None:
        """Ids of the tokens top-k and top-p leave, None for all."""
        params = self.params
        if params.temperature == 0.0:
            return None
        kept: IntpArray | None = None
        if 0 < params.top_k < scores.size:
            threshold = np.partition(scores, -params.top_k)[-params.top_k]
            kept = np.flatnonzero(scores >= threshold)
        if params.top_p < 1.0:
            nucleus = _nucleus(scores if kept is None else scores[kept], params.top_p)
            kept = nucleus if kept is None else kept[nucleus]
        return kept


def _draw(weights: Float32Array, fraction: float) -> int:
    """The index at which the running sum of `weights` exceeds `fraction`, in [0, 1), of the whole.

    First the block is found, then the index in it: one running sum over a whole vocabulary would
    take longer than everything else a token needs.
    """
    block_sums = np.add.reduceat(weights, np.arange(0, weights.size, BLOCK), dtype=np.float64)
    block_ends = block_sums.cumsum()
    target = fraction * block_ends[-1]
    block = int(np.searchsorted(block_ends[:-1], target, side="right"))
    start = block * BLOCK
    ends = weights[start : start + BLOCK].cumsum(dtype=np.float64)
    inside = target - (block_ends[block] - block_sums[block])
    # rounding must not lead to a token without weight at either end of the block
    inside = min(max(inside, 0.0), np.nextafter(ends[-1], 0.0))
    return start + int(np.searchsorted(ends, inside, side="right"))


def _penalised(scores: Float32Array, penalty: float) -> Float32Array:
    factor = np.float32(penalty)
    return np.where(scores < 0, scores * factor, scores / factor)


def _nucleus(scores: Float32Array, top_p: float) -> IntpArray:
    """Indices of the smallest set of likeliest tokens whose probability exceeds `top_p`.

    Tokens less likely than (1 - top_p) / size cannot add up to 1 - top_p together, so they are
    outside without being sorted.
    """
    weights = np.exp(scores - scores.max())
    total = float(weights.sum(dtype=np.float64))
    outside = (1.0 - top_p) * total
    likely = np.flatnonzero(weights > outside / weights.size)
    order = likely[np.argsort(-scores[likely], kind="stable")]
    before = np.concatenate([[0.0], weights[order].cumsum(dtype=np.float64)[:-1]])
    return np.sort(order[total - before > outside])
