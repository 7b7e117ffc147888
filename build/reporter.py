"""How a build tells what it is doing, and what it did."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from framesink.runtime.manifest import Manifest


class Reporter(Protocol):
    """Follows a build. Called from one thread."""

    def stage(self, name: str) -> None:
        """A stage begins; the one before it is over."""
        ...

    def progress(self, fraction: float, detail: str = "") -> None:
        """The running stage is this far (0 to 1); `detail` names what it is at."""
        ...

    def note(self, sentence: str) -> None:
        """Something a person should know while the build runs."""
        ...

    def log(self, line: str) -> None:
        """An ordinary message of a tool, for those who want all of them."""
        ...


class SilentReporter:
    """A reporter for callers who only want the result."""

    def stage(self, name: str) -> None:
        """Say nothing."""

    def progress(self, fraction: float, detail: str = "") -> None:
        """Say nothing."""

    def note(self, sentence: str) -> None:
        """Say nothing."""

    def log(self, line: str) -> None:
        """Say nothing."""


@dataclass(frozen=True, slots=True)
class StageResult:
    """What one stage took: seconds of wall time, and bytes of memory at its peak."""

    name: str
    seconds: float
    peak_memory: int


@dataclass(frozen=True, slots=True)
class BuildSummary:
    """A finished bundle, what it took, and what a person should know about it."""

    output: Path
    manifest: Manifest
    stages: tuple[StageResult, ...]
    notes: tuple[str, ...]
