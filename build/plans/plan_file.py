"""Writing a plan of gigabytes past the page cache.

A plan comes in one go when the builder is done, at the moment the machine's memory is fullest.
Buffered writing then pays for finding and clearing pages that nobody will read; O_DIRECT does not.
"""

import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

_BLOCK = 16 << 20  # a multiple of every file system's block
# Linux alone has it, and not on every file system (tmpfs lacks it).
_DIRECT = getattr(os, "O_DIRECT", 0)


class PlanFile:
    """A file written once from front to back. Used as a context manager."""

    def __init__(self, path: Path) -> None:
        """Create or empty the file. Raises OSError if it cannot be, here and in `write`."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError:
            self._descriptor = os.open(path, flags, 0o666)
        self._block = mmap.mmap(-1, _BLOCK)  # page-aligned, as O_DIRECT wants it
        self._filled = 0

    def write(self, data: bytes) -> int:
        """Append `data`; how many bytes of it were taken: all."""
        rest = memoryview(data)
        while rest:
            taken = min(len(rest), _BLOCK - self._filled)
            self._block[self._filled : self._filled + taken] = rest[:taken]
            self._filled += taken
            rest = rest[taken:]
            if self._filled == _BLOCK:
                self._write_out()
        return len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None and self._filled:
                self._write_last()
        finally:
            os.close(self._descriptor)
            self._block.close()

    def _write_last(self) -> None:
        """The last block may be of any length, which O_DIRECT does not write."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        self._write_out()

    def _write_out(self) -> None:
        filled, self._filled = self._filled, 0
        with memoryview(self._block)[:filled] as block:
            written = 0
            while written < filled:
                written += os.write(self._descriptor, block[written:])
