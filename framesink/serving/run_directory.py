"""The private directory through which a server and its models talk.

Nothing of it can be reached from the network. Its files:

- `drain`: made by the supervisor. New sessions are refused and open ones come to their end.
- `drained`: made by the language model once no session is left.
- `engine.json`: written by the language model when it is loaded: what it runs on.
- `failure`: written by a model that cannot be loaded: why, in one sentence.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

_DRAIN = "drain"
_DRAINED = "drained"
_ENGINE = "engine.json"
_FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the language model runs on: the executor and why it was chosen (one sentence), the
    sessions and pages it has room for, how many live streams fit (one sentence), and its process
    id."""

    executor_reason: str
    max_sessions: int
    num_pages: int
    capacity: str
    process: int


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory of one run of a server."""

    path: Path

    @property
    def draining(self) -> bool:
        """Whether the server is about to stop."""
        return (self.path / _DRAIN).exists()

    def drain(self) -> None:
        """Tell the models that the server is about to stop."""
        (self.path / _DRAIN).touch()

    @property
    def drained(self) -> bool:
        """Whether every session has ended since `drain`."""
        return (self.path / _DRAINED).exists()

    def report_drained(self) -> None:
        """Tell the supervisor that every session has ended."""
        (self.path / _DRAINED).touch()

    def report_engine(self, report: EngineReport) -> None:
        """Tell the supervisor what the language model runs on."""
        self._write(_ENGINE, json.dumps(asdict(report)))

    def engine(self) -> EngineReport | None:
        """What the language model reported, None before it has."""
        text = self._read(_ENGINE)
        return None if text is None else EngineReport(**json.loads(text))

    def report_failure(self, sentence: str) -> None:
        """Tell the supervisor why a model cannot be loaded."""
        self._write(_FAILURE, sentence)

    def failure(self) -> str | None:
        """Why a model could not be loaded, None if none said so."""
        return self._read(_FAILURE)

    def reset(self) -> None:
        """Forget what an earlier run of the models reported."""
        for name in (_ENGINE, _FAILURE, _DRAINED):
            (self.path / name).unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)

    def _read(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
