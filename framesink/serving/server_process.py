"""One run of `tritonserver` and the processes of its models."""

import logging
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import psutil

from framesink.serving.guardian import SIGNALLED, guarded_command
from framesink.serving.tritonserver import STUB, Installation

_KEPT_LINES = 20

_log = logging.getLogger(__name__)


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
        self._write_log = write_log
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process = subprocess.Popen(
            guarded_command(command, directory, shared_memory_prefix),
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
        self._models: dict[str, psutil.Process | None] = {}

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The last lines it printed, but for structured ones."""
        return tuple(self._lines)

    def watch_models(self, names: Collection[str]) -> None:
        """From now on `dead_part` watches the processes of these models, too."""
        found: dict[str, psutil.Process] = {}
        for child in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                command = child.cmdline()
                if len(command) > 1 and Path(command[0]).name == STUB:
                    found[Path(command[1]).parts[-3]] = child  # NAME/1/model.py
        self._models = {name: found.get(name) for name in names}

    def dead_part(self) -> str | None:
        """What of the server has died, None while all of it lives."""
        if self._process.poll() is not None:
            return f"The server ({_describe_end(self._process.returncode)})"
        for name, process in self._models.items():
            if process is None or not _runs(process):
                return f"The process of the model {name}"
        return None

    def kill(self) -> None:
        """End the server and its models at once; their shared memory is free when this returns."""
        self._process.terminate()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.startswith("{"):
                    self._write_log(line)
                elif line.strip():
                    self._lines.append(line.rstrip())
                    _log.debug("tritonserver: %s", line.rstrip())


def _runs(process: psutil.Process) -> bool:
    try:
        runs: bool = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    return runs


def _describe_end(status: int) -> str:
    if status <= SIGNALLED:
        return f"exit status {status}"
    return f"killed by {signal.Signals(status - SIGNALLED).name}"
