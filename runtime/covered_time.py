"""How much time a set of spans covers."""

from collections.abc import Iterable


class CoveredTime:
    """The length of a union of spans, which come roughly in the order of their begins."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._until = float("-inf")

    def add(self, spans: Iterable[tuple[float, float]]) -> None:
        """Count spans (begin, end), in seconds, that do not begin before those of earlier calls; of
        one that does, what lies before the end of all others is not counted."""
        for begin, end in sorted(spans):
            self.seconds += max(0.0, end - max(begin, self._until))
            self._until = max(self._until, end)
