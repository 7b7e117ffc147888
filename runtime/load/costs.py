"""What work costs on this machine, learned from the steps it has run.

Three kinds of work, each a base and a price per unit: a chunk in the vision encoder by its patches,
the prompt parts of a step by their tokens, the replies of a step by their number. They are fitted
by exponentially weighted least squares of relative errors (Haykin, Adaptive Filter Theory, chapter
10), with Huber's weights (1964) against steps that something else held up, and a little ridge
(Hoerl and Kennard, 1970) for what the steps so far cannot tell apart. No price is below 0.
"""

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from framesink.runtime.observer import NullObserver, StepReport

# Samples after which an observation weighs half as much as a new one.
STEP_HALF_LIFE = 512
CHUNK_HALF_LIFE = 64
# An observation further from what was expected, relative to that, weighs less in proportion.
HUBER = 0.5
# Errors of what takes less are told apart no better.
LEAST_SECONDS = 1e-4
RIDGE = 1e-3
# Observations are folded in by so many, fewer in the beginning: a fit takes longer than a note.
FOLD = 32
# Rounds whose time beyond their parts' is averaged, and the share of the longest that is left out.
ROUNDS = 256
TRIMMED = 0.05


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds that a piece of work takes: `base`, and `each` for every unit of it."""

    base: float
    each: float

    def seconds(self, units: float) -> float:
        """Seconds for `units`; nothing takes no time."""
        return self.base + self.each * units if units > 0 else 0.0


@dataclass(frozen=True, slots=True)
class WorkCosts:
    """What work costs. `vision` is of a chunk by ViT patches, `prefill` of a step's prompt parts by
    tokens, `decode` of a step's replies by sequences; `round` are the seconds that the host adds to
    a step."""

    vision: LinearCost
    prefill: LinearCost
    decode: LinearCost
    round: float = 0.0

    def step(self, decoding: int, prompt_tokens: int) -> float:
        """Seconds of a step that writes a token of `decoding` replies and so much of prompts."""
        return self.round + self.decode.seconds(decoding) + self.prefill.seconds(prompt_tokens)


class CostMeter(NullObserver):
    """Learns costs as an engine's observer. `costs` may be read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._steps = _Fit(4, STEP_HALF_LIFE)
            self._chunks = _Fit(2, CHUNK_HALF_LIFE)
            self._hidden: deque[float] = deque(maxlen=ROUNDS)
            self._reported = 0.0
            self._stepped = False
            self._decoded = self._prefilled = False
            self._costs: WorkCosts | None = None

    @property
    def costs(self) -> WorkCosts | None:
        """What work costs; None before there was a prompt and a decode step."""
        return self._costs

    def stepped(self, report: StepReport) -> None:
        """See EngineObserver."""
        prompt = max(0, report.tokens - report.decoding) if report.prefilling else 0
        row = (float(report.decoding > 0), report.decoding, float(prompt > 0), prompt)
        with self._lock:
            self._reported += report.seconds
            self._stepped = True
            self._decoded = self._decoded or report.decoding > 0
            self._prefilled = self._prefilled or prompt > 0
            if self._steps.add(row, report.seconds):
                self._publish()

    def encoded(self, patches: int, seconds: float) -> None:
        """See EngineObserver."""
        with self._lock:
            self._reported += seconds
            if self._chunks.add((1.0, patches), seconds):
                self._publish()

    def round_done(self, seconds: float) -> None:
        """A round of the engine took `seconds`; what its parts did not report was the host's."""
        with self._lock:
            if self._stepped:
                self._hidden.append(max(0.0, seconds - self._reported))
            self._reported, self._stepped = 0.0, False

    def _publish(self) -> None:
        if not (self._decoded and self._prefilled):
            return
        decode_base, decode_each, prefill_base, prefill_each = self._steps.prices.tolist()
        vision_base, vision_each = self._chunks.prices.tolist()
        hidden = sorted(self._hidden)
        kept = hidden[: len(hidden) - int(TRIMMED * len(hidden))]
        self._costs = WorkCosts(
            vision=LinearCost(vision_base, vision_each),
            prefill=LinearCost(prefill_base, prefill_each),
            decode=LinearCost(decode_base, decode_each),
            round=sum(kept) / len(kept) if kept else 0.0,
        )


class _Fit:
    """Prices of a few kinds of units, from what lots of them took together."""

    def __init__(self, kinds: int, half_life: int) -> None:
        self.prices: NDArray[np.float64] = np.zeros(kinds)
        self._decay = 0.5 ** (1.0 / half_life)
        self._products: NDArray[np.float64] = np.zeros((kinds, kinds))
        self._answers: NDArray[np.float64] = np.zeros(kinds)
        self._rows: list[tuple[float, ...]] = []
        self._seconds: list[float] = []
        self._seen = 0

    def add(self, row: tuple[float, ...], seconds: float) -> bool:
        """Note how long a lot took; whether the prices are new."""
        self._rows.append(row)
        self._seconds.append(seconds)
        self._seen += 1
        if len(self._rows) < min(FOLD, max(1, self._seen // 2)):
            return False
        self._fold()
        return True

    def _fold(self) -> None:
        rows = np.array(self._rows, dtype=np.float64)
        seconds = np.array(self._seconds)
        self._rows.clear()
        self._seconds.clear()
        expected = rows @ self.prices
        scale = np.maximum(np.where(expected > 0, expected, seconds), LEAST_SECONDS)
        surprise = np.abs(seconds - scale) / scale
        weights = np.minimum(1.0, HUBER / np.maximum(surprise, HUBER)) / scale**2
        weights *= self._decay ** np.arange(len(rows) - 1, -1, -1)
        faded = self._decay ** len(rows)
        self._products = self._products * faded + (rows * weights[:, None]).T @ rows
        self._answers = self._answers * faded + rows.T @ (weights * seconds)
        self.prices = self._solve()

    def _solve(self) -> NDArray[np.float64]:
        """The prices, none below 0: what would be is set to 0, the lowest first."""
        prices = np.zeros(len(self._answers))
        sizes = np.sqrt(np.diagonal(self._products))
        free = [kind for kind in range(len(prices)) if sizes[kind] > 0]
        while free:
            across = np.ix_(free, free)
            scaled = self._products[across] / np.outer(sizes[free], sizes[free])
            found = np.linalg.solve(
                scaled + RIDGE * np.eye(len(free)), self._answers[free] / sizes[free]
            )
            if found.min() >= 0:
                prices[free] = found / sizes[free]
                break
            free.pop(int(found.argmin()))
        return prices
