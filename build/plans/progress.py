"""The builder's nested phases as one fraction."""

import threading
from dataclasses import dataclass


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """Phases that TensorRT's progress monitor reports, from several threads.

    A phase of n steps is as far as its finished steps plus the progress of its open children, each
    of which stands for one step. The overall fraction never goes back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._fraction = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase is entered."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, index: int) -> None:
        """Step `index` (from 0) of a phase is complete."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = index + 1
            self._update()

    def finish(self, name: str) -> None:
        """A phase is left; the last one that has no parent completes the work."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None and not self._phases:
                self._fraction = 1.0

    @property
    def fraction(self) -> float:
        """How much is done, 0 to 1."""
        with self._lock:
            return self._fraction

    @property
    def current(self) -> str:
        """The innermost phase that is running, or an empty string."""
        with self._lock:
            return next(reversed(self._phases), "")

    def _update(self) -> None:
        roots = [name for name, phase in self._phases.items() if phase.parent is None]
        if roots:
            self._fraction = max(self._fraction, self._progress(roots[0]))

    def _progress(self, name: str) -> float:
        phase = self._phases[name]
        children = sum(
            self._progress(child) for child, other in self._phases.items() if other.parent == name
        )
        return min(1.0, (phase.done + min(children, 1.0)) / phase.steps)
