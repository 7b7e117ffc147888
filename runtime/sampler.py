"""From logits to the next token.

The order and meaning of the steps are those of `transformers`' logits processors: repetition
penalty (arXiv 1909.05858), temperature, top-k, top-p (arXiv 1904.09751).
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from framesink.runtime.arrays import BoolArray, Float32Array
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


class Sampler:
    """Chooses the tokens of one session."""

    def __init__(self, params: SamplingParams, suppressed: Collection[int] = ()) -> None:
        """`suppressed` are token ids that are never chosen."""
        self.params = params
        self.suppressed = frozenset(suppressed)
        self._suppressed = np.asarray(sorted(suppressed), dtype=np.int64)
        self._random = np.random.default_rng(params.seed)

    @property
    def needs_seen(self) -> bool:
        """Whether `sample` reads which tokens the context holds."""
        return self.params.repetition_penalty != 1.0

    @property
    def takes_likeliest(self) -> bool:
        """Whether `sample` always takes the likeliest token that is not suppressed."""
        return self.params.temperature == 0.0 and not self.needs_seen

    def sample(self, logits: Float32Array, seen: BoolArray | None = None) -> int:
        """The next token of logits float32 `[vocab]`.

        `seen` bool `[vocab]`: tokens of the retained context, needed for a repetition penalty.
        Raises ValueError for logits of which the largest is not a number.
        """
        scores = self._scaled(logits, seen)
        if not np.isfinite(scores.max()):
            raise ValueError("the model's logits are not finite")
        if self.params.temperature == 0.0:
            return int(scores.argmax())
        kept = self._kept(scores)
        candidates = scores if kept is None else scores[kept]
        index = _draw(np.exp(candidates - candidates.max()), self._random.random())
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
