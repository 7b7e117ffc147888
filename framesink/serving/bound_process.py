"""Run a command that dies with whoever started it.

`python -m framesink.serving.bound_process PARENT COMMAND…` becomes COMMAND, and the kernel kills it
when the thread that started it ends, however it ends (Linux, prctl(2), PR_SET_PDEATHSIG).
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def bound_command(command: Sequence[str]) -> list[str]:
    """`command`, bound to this process."""
    return [sys.executable, "-m", __name__, str(os.getpid()), *command]


def main(arguments: Sequence[str]) -> None:
    """Become the command, unless the parent is gone already."""
    parent, *command = arguments
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == int(parent):
        os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
