"""What an engine tells whoever keeps figures of it, as it happens."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step: how many sequences decoded in it, how many prompt parts it wrote, the tokens of
    both, and the seconds it took: from its launch, or the end of the step before if that came
    later, to its end."""

    decoding: int
    prefilling: int
    tokens: int
    seconds: float


class EngineObserver(Protocol):
    """Called in the engine's thread, between steps: it must return at once and never raise."""

    def stepped(self, report: StepReport) -> None:
        """A step was run."""
        ...

    def encoded(self, patches: int, seconds: float) -> None:
        """A chunk of `patches` ViT patches went through the vision encoder."""
        ...

    def turn_began(self, session: int, *, evicted_tokens: int, dropped_frames: int) -> None:
        """A session began a turn: so many tokens left its context, so many frames are missing."""
        ...


class Observers:
    """Tells several, in order. With `only_first` the others are told nothing."""

    def __init__(self, *observers: EngineObserver) -> None:
        self.only_first = False
        self._observers = observers

    def stepped(self, report: StepReport) -> None:
        """See EngineObserver."""
        for observer in self._told():
            observer.stepped(report)

    def encoded(self, patches: int, seconds: float) -> None:
        """See EngineObserver."""
        for observer in self._told():
            observer.encoded(patches, seconds)

    def turn_began(self, session: int, *, evicted_tokens: int, dropped_frames: int) -> None:
        """See EngineObserver."""
        for observer in self._told():
            observer.turn_began(
                session, evicted_tokens=evicted_tokens, dropped_frames=dropped_frames
            )

    def _told(self) -> tuple[EngineObserver, ...]:
        return self._observers[:1] if self.only_first else self._observers


class NullObserver:
    """Keeps no figures."""

    def stepped(self, report: StepReport) -> None:
        """See EngineObserver."""

    def encoded(self, patches: int, seconds: float) -> None:
        """See EngineObserver."""

    def turn_began(self, session: int, *, evicted_tokens: int, dropped_frames: int) -> None:
        """See EngineObserver."""
