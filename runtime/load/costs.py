"""What work costs on this machine, learned from the steps it has run.

Three kinds of work, each a base and a price per unit: a chunk in the vision encoder by its patches,
a part of a prompt by its tokens, the replies of a step by their number. Parts and replies that
share a step may take less than apart.

What was seen is kept by size, in powers of two, so that what a rare size has taught is not
forgotten while another is common. Sizes are averaged with less weight for what is old, and what
something else held up is cut off (winsorized; Huber, 1964). The prices are fitted to the averages
by least squares of relative errors, with a little ridge (Hoerl and Kennard, 1970) for what they
cannot tell apart. No price is below 0.
"""

import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from framesink.runtime.observer import NullObserver, StepReport

# Observations of one size that are averaged, and those of all sizes after which an average weighs
# half as much.
AVERAGED = 16
HALF_LIFE = 4096
# An observation further from the average, relative to that, counts as if it were this far.
FURTHEST = 0.5
# Errors of what takes less are told apart no better.
LEAST_SECONDS = 1e-4
RIDGE = 1e-3
# Prices are fitted anew after so many observations, fewer in the beginning.
REFIT = 32
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
    """What work costs. `vision` is of a chunk by ViT patches, `prefill` of a part of a prompt by
    tokens, `decode` of a step's replies by sequences; `round` are the seconds that the host adds to
    a step, `saved` those that a step with prompt parts and replies takes less than two."""

    vision: LinearCost
    prefill: LinearCost
    decode: LinearCost
    round: float = 0.0
    saved: float = 0.0

    def step(self, decoding: int, prompt_tokens: int, parts: int = 1) -> float:
        """Seconds of a step that writes a token of `decoding` replies, and `prompt_tokens` in so
        many parts of prompts."""
        seconds = self.round + self.decode.seconds(decoding)
        if prompt_tokens > 0:
            seconds += self.prefill.base * parts + self.prefill.each * prompt_tokens
        return seconds - (self.saved if decoding > 0 and prompt_tokens > 0 else 0.0)


class CostMeter(NullObserver):
    """Learns costs as an engine's observer. `costs` may be read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._steps = _Fit(5)
            self._chunks = _Fit(2)
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
        parts = report.prefilling if prompt else 0
        shared = report.decoding > 0 and parts > 0
        row = (float(report.decoding > 0), report.decoding, parts, prompt, -float(shared))
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
        decode_base, decode_each, prefill_base, prefill_each, saved = self._steps.prices.tolist()
        vision_base, vision_each = self._chunks.prices.tolist()
        hidden = sorted(self._hidden)
        kept = hidden[: len(hidden) - int(TRIMMED * len(hidden))]
        self._costs = WorkCosts(
            vision=LinearCost(vision_base, vision_each),
            prefill=LinearCost(prefill_base, prefill_each),
            decode=LinearCost(decode_base, decode_each),
            round=sum(kept) / len(kept) if kept else 0.0,
            saved=min(saved, decode_base),
        )


@dataclass(slots=True)
class _Size:
    """Observations of about one size: their average, how many it is of, and when the last one was
    made."""

    row: NDArray[np.float64]
    seconds: float
    count: int = 1
    last: int = 0

    def add(self, row: tuple[float, ...], seconds: float) -> None:
        """One more."""
        self.count = min(self.count + 1, AVERAGED)
        furthest = FURTHEST * max(self.seconds, LEAST_SECONDS)
        near = min(max(seconds, self.seconds - furthest), self.seconds + furthest)
        self.row += (np.array(row) - self.row) / self.count
        self.seconds += (near - self.seconds) / self.count


@dataclass(slots=True)
class _Fit:
    """Prices of a few kinds of units, from what lots of them took together."""

    kinds: int
    prices: NDArray[np.float64] = field(init=False)
    _sizes: dict[tuple[int, ...], _Size] = field(default_factory=dict)
    _seen: int = 0
    _fitted: int = 0

    def __post_init__(self) -> None:
        self.prices = np.zeros(self.kinds)

    def add(self, row: tuple[float, ...], seconds: float) -> bool:
        """Note how long a lot took; whether the prices are new."""
        self._seen += 1
        key = tuple(int(abs(units)).bit_length() for units in row)
        size = self._sizes.get(key)
        if size is None:
            size = self._sizes[key] = _Size(np.array(row, dtype=np.float64), seconds)
        else:
            size.add(row, seconds)
        size.last = self._seen
        if self._seen - self._fitted < min(REFIT, max(1, self._seen // 2)):
            return False
        self._fitted = self._seen
        self._solve()
        return True

    def _solve(self) -> None:
        """Fit the prices, none below 0: what would be is set to 0, the lowest first."""
        sizes = list(self._sizes.values())
        rows = np.array([size.row for size in sizes])
        seconds = np.array([size.seconds for size in sizes])
        ages = np.array([self._seen - size.last for size in sizes])
        counts = np.array([size.count for size in sizes])
        weights = counts * 0.5 ** (ages / HALF_LIFE) / np.maximum(seconds, LEAST_SECONDS) ** 2
        products = (rows * weights[:, None]).T @ rows
        answers = rows.T @ (weights * seconds)
        lengths = np.sqrt(np.diagonal(products))
        prices = np.zeros(self.kinds)
        free = [kind for kind in range(self.kinds) if lengths[kind] > 0]
        while free:
            across = np.ix_(free, free)
            scaled = products[across] / np.outer(lengths[free], lengths[free])
            found = np.linalg.solve(
                scaled + RIDGE * np.eye(len(free)), answers[free] / lengths[free]
            )
            if found.min() >= 0:
                prices[free] = found / lengths[free]
                break
            free.pop(int(found.argmin()))
        self.prices = prices
