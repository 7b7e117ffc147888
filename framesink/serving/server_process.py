"""One run of `tritonserver` and the processes of its models."""

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from framesink.serving.bound_process import bound_command
from framesink.serving.tritonserver import STUB, Installation

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_KEPT_LINES = 60
_KILL_SECONDS = 5.0


class ServerProcess:
    """A started server. Its structured log lines (JSON) are handed to `write_log`; of what else it
    prints, the last lines are kept to explain its end."""

    def __init__(
        self,
        installation: Installation,
        command: list[str],
        *,
        directory: Path,
        shared_memory_prefix: str,
        write_log: Callable[[str], None],
    ) -> None:
        self._shared_memory_prefix = shared_memory_prefix
        self._write_log = write_log
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process = subprocess.Popen(
            bound_command(command),
            cwd=directory,
            env=installation.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C is for the supervisor, which then ends the server in order.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="server-output", daemon=True)
        self._reader.start()
        self._models: dict[str, psutil.Process] = {}

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The last lines it printed, but for structured ones."""
        return tuple(self._lines)

    def find_models(self) -> None:
        """Find the processes of its models; from now on `dead_part` watches them."""
        for child in psutil.Process(self._process.pid).children(recursive=True):
            command = child.cmdline()
            if len(command) > 1 and Path(command[0]).name == STUB:
                self._models[Path(command[1]).parts[-3]] = child  # NAME/1/model.py

    def dead_part(self) -> str | None:
        """What of the server has died, None while all of it lives."""
        if self._process.poll() is not None:
            return f"The server ({_describe_end(self._process.returncode)})"
        for name, process in self._models.items():
            if not _runs(process):
                return f"The process of the model {name}"
        return None

    def kill(self) -> None:
        """End the server and its models at once, and free their shared memory."""
        # Its models are of its process group, unless they are dead.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        psutil.wait_procs(self._models.values(), timeout=_KILL_SECONDS)
        self._reader.join(_KILL_SECONDS)
        for region in SHARED_MEMORY.glob(f"{self._shared_memory_prefix}*"):
            region.unlink(missing_ok=True)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.startswith("{"):
                    self._write_log(line)
                elif line.strip():
                    self._lines.append(line.rstrip())


def _runs(process: psutil.Process) -> bool:
    try:
        runs: bool = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    return runs


def _describe_end(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    return f"killed by {signal.Signals(-status).name}"
