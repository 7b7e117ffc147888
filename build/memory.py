"""How much memory a stage of the build really takes."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

_SAMPLE_SECONDS = 0.02


def anonymous_memory(process: int | None = None) -> int:
    """Bytes of memory of a process (None: this one) that no file backs; 0 if it has ended.

    Weights are memory-mapped: their pages count in the resident size, but the system drops them as
    soon as memory is wanted.
    """
    try:
        text = Path(f"/proc/{process or 'self'}/status").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """Samples a process's anonymous memory while it is entered; `peak` is the largest seen."""

    def __init__(self, process: int | None = None) -> None:
        """Of process `process`, by default this one."""
        self.peak = 0
        self._process = process
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        with _uninterrupted():
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _uninterrupted():
            self._done.set()
            self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_memory(self._process))
            if self._done.wait(_SAMPLE_SECONDS):
                return


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C: inside of threading's own locks it would come out as a RuntimeError."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
