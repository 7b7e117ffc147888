"""From logits to the next token.

The order and meaning of the steps are those of `transformers`' logits processors: repetition
penalty (arXiv 1909.05858), temperature, top-k, top-p (arXiv 1904.09751).
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from framesink.runtime.arrays import BoolArray, Float32Array
from framesink.runtime.errors import OptionError


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
        self._suppressed = np.asarray(sorted(suppressed), dtype=np.int64)
        self._random = np.random.default_rng(params.seed)

    @property
    def needs_seen(self) -> bool:
        """Whether `sample` reads which tokens the context holds."""
        return self.params.repetition_penalty != 1.0

    def sample(self, logits: Float32Array, seen: BoolArray | None = None) -> int:
        """The next token of logits float32 `[vocab]`.

        `seen` bool `[vocab]`: tokens of the retained context, needed for a repetition penalty.
        Raises ValueError for logits of which the largest is not a number.
        """
        scores = self.scores(logits, seen)
        if not np.isfinite(scores.max()):
            raise ValueError("the model's logits are not finite")
        if self.params.temperature == 0.0:
            return int(scores.argmax())
        weights = np.exp(scores - scores.max(), dtype=np.float64)
        cumulative = weights.cumsum()
        drawn = self._random.random() * cumulative[-1]
        return int(np.searchsorted(cumulative[:-1], drawn, side="right"))

    def scores(self, logits: Float32Array, seen: BoolArray | None = None) -> Float32Array:
        """Logits after every step; tokens that cannot be chosen are at minus infinity."""
        params = self.params
        scores = logits.astype(np.float32, copy=True)
        if seen is not None and self.needs_seen:
            scores[seen] = _penalised(scores[seen], params.repetition_penalty)
        scores[self._suppressed] = -np.inf
        if params.temperature == 0.0:
            return scores
        scores /= np.float32(params.temperature)
        if 0 < params.top_k < scores.size:
            threshold = np.partition(scores, -params.top_k)[-params.top_k]
            scores[scores < threshold] = -np.inf
        if params.top_p < 1.0:
            scores[_outside_nucleus(scores, params.top_p)] = -np.inf
        return scores


def _penalised(scores: Float32Array, penalty: float) -> Float32Array:
    factor = np.float32(penalty)
    return np.where(scores < 0, scores * factor, scores / factor)


def _outside_nucleus(scores: Float32Array, top_p: float) -> BoolArray:
    """Tokens beyond the smallest set of likeliest tokens whose probability reaches `top_p`.

    Tokens less likely than (1 - top_p) / vocab cannot add up to 1 - top_p together, so they are
    outside without being sorted.
    """
    probabilities = np.exp(scores - scores.max(), dtype=np.float64)
    probabilities /= probabilities.sum()
    outside: BoolArray = probabilities <= (1.0 - top_p) / scores.size
    outside[scores.argmax()] = False
    candidates = np.flatnonzero(~outside)
    order = candidates[np.argsort(probabilities[candidates], kind="stable")]
    below = probabilities[outside].sum() + probabilities[order].cumsum()
    outside[order[:-1][below[:-1] <= 1.0 - top_p]] = True
    return outside
