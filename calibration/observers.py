"""How the range of a tensor is chosen from what was seen of it: the observer."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from framesink.calibration.formats import NumberFormat, clipping_error

# Of all magnitudes seen: the share that the percentile observer keeps whole.
PERCENTILE = 99.99
# The ranges that the MSE observer tries, as fractions of the largest magnitude.
MSE_CANDIDATES = np.linspace(0.01, 1.0, 100)


class Observer(StrEnum):
    """ABSMAX keeps every value seen, PERCENTILE all but the largest few, MSE the range under which
    the mean squared error of the quantized values is least."""

    ABSMAX = "absmax"
    PERCENTILE = "percentile"
    MSE = "mse"


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """How often each magnitude was seen: `counts` int64 `[bins]` of equal bins over [0, `limit`];
    `amax` is the largest magnitude, at most `limit`."""

    counts: NDArray[np.int64]
    limit: float
    amax: float

    @property
    def centers(self) -> NDArray[np.float32]:
        """The middle of each bin."""
        bins = len(self.counts)
        return ((np.arange(bins) + 0.5) * (self.limit / bins)).astype(np.float32)

    def percentile(self, percent: float) -> float:
        """The magnitude that `percent` of the values do not exceed, within a bin's width."""
        cumulated = np.cumsum(self.counts)
        if cumulated[-1] == 0:
            return 0.0
        wanted = percent / 100.0 * cumulated[-1]
        bin_index = int(np.searchsorted(cumulated, wanted))
        before = cumulated[bin_index - 1] if bin_index else 0
        inside = (wanted - before) / self.counts[bin_index]
        width = self.limit / len(self.counts)
        return float(min((bin_index + inside) * width, self.amax))

    def least_error_amax(self, number_format: NumberFormat) -> float:
        """The range under which the values, as far as bins tell them apart, are quantized with the
        least mean squared error."""
        if self.amax == 0.0:
            return 0.0
        seen = self.counts > 0
        values, counts = self.centers[seen], self.counts[seen]
        # A bin's centre may lie above the largest value in it.
        values = np.minimum(values, np.float32(self.amax))
        candidates = self.amax * MSE_CANDIDATES
        errors = [clipping_error(values, float(amax), number_format, counts) for amax in candidates]
        return float(candidates[int(np.argmin(errors))])

    def range(self, observer: Observer, number_format: NumberFormat) -> float:
        """The largest magnitude that is to be represented, by the given observer."""
        match observer:
            case Observer.ABSMAX:
                return self.amax
            case Observer.PERCENTILE:
                return self.percentile(PERCENTILE)
            case Observer.MSE:
                return self.least_error_amax(number_format)
