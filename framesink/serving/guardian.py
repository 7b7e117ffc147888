"""Between the supervisor and the server: whoever of them dies, the rest is cleared away.

`python -m framesink.serving.guardian PARENT DIRECTORY PREFIX COMMAND…` runs the server and ends as
it does. It ends the server and its models, and removes their shared memory, when the server ends,
when it is told to (SIGTERM), and when its parent has ended, however that ended. Models cannot see
to that themselves: those that wait for an answer of a dead server hold Python's lock for ever.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

# A server that a signal ended has this exit status plus the signal's number, as in a shell.
SIGNALLED = 128

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
# prctl(2): the signal that the kernel sends when the thread that started this process ends, and
# whether processes whose parent has ended become children of this one.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def guarded_command(command: Sequence[str], directory: Path, prefix: str) -> list[str]:
    """`command`, guarded for the calling process.

    `directory` is removed if this process does not live to do it, files of shared memory whose
    names begin with `prefix` in any case.
    """
    return [sys.executable, "-m", __name__, str(os.getpid()), str(directory), prefix, *command]


class Guardian:
    """Runs one command in a process group of its own, for the process `parent`."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._process: subprocess.Popen[bytes] | None = None
        self._told_to_end = False
        self._parent_ended = False
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGHUP, self._end_orphaned)
        library = ctypes.CDLL(None)
        library.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
        if self.orphaned:  # since before the kernel was asked to tell
            self._told_to_end = True

    @property
    def orphaned(self) -> bool:
        """Whether the parent is gone, or about to be: the kernel tells before its last thread has
        ended."""
        return self._parent_ended or os.getppid() != self._parent

    def run(self, command: Sequence[str]) -> int:
        """Run the command until it ends or is ended; returns its exit status when all that it
        started is gone, with the memory it held."""
        self._process = subprocess.Popen(command, start_new_session=True)
        if self._told_to_end:  # before there was a process to end
            self._kill()
        status = self._process.wait()
        self._kill()  # what it leaves behind
        with suppress(ChildProcessError):
            while True:
                os.wait()
        return status

    def _end(self, _signal: int, _frame: FrameType | None) -> None:
        self._told_to_end = True
        self._kill()

    def _end_orphaned(self, number: int, frame: FrameType | None) -> None:
        self._parent_ended = True
        self._end(number, frame)

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """See the head of this file."""
    parent, directory, prefix, *command = arguments
    guardian = Guardian(int(parent))
    status = guardian.run(command)
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)
    if guardian.orphaned:
        shutil.rmtree(directory, ignore_errors=True)
    return status if status >= 0 else SIGNALLED - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
