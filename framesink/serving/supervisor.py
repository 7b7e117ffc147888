"""Starts a server, watches it, starts it again when a part of it dies, and ends it in order.

A model process that dies leaves Triton answering *ready*, its requests in flight never end, and
loading the model again does not change that. So whatever part dies, the whole server is ended at
once: connections break, which clients see, and nothing listens until it is ready again.
"""

import logging
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from framesink.runtime.bundle import Bundle
from framesink.runtime.manifest import Manifest
from framesink.serving.endpoints import require_free_ports
from framesink.serving.errors import ServerDiedError, ServerError
from framesink.serving.launcher import Launcher
from framesink.serving.options import ServeOptions
from framesink.serving.run_directory import EngineReport
from framesink.serving.server_process import ServerProcess

_WATCH_SECONDS = 0.1
# What was answered last needs this long to reach its clients.
_FLUSH_SECONDS = 1.0
# So often in a row may a server that had been ready end while it is started again.
RESTART_ATTEMPTS = 10

_log = logging.getLogger(__name__)


class Supervisor:
    """A server of one bundle. Use as a context manager: leaving it ends the server."""

    def __init__(
        self,
        bundle: Path | str,
        options: ServeOptions,
        *,
        write_log: Callable[[str], None] | None = None,
    ) -> None:
        """`write_log` takes the structured log lines of the models, by default to stderr.

        Raises BundleError for a bundle that cannot be used.
        """
        self.options = options
        self._bundle = Bundle.open(bundle)
        self._write_log = write_log or _write_to_stderr
        self._directory = tempfile.TemporaryDirectory(prefix="framesink-serve-")
        self._launcher: Launcher | None = None
        self._thread: threading.Thread | None = None
        self._failure: ServerError | None = None
        self._settled = threading.Event()  # ready for the first time, or ended
        self._draining = threading.Event()
        self._stopping = threading.Event()
        self._ended = threading.Event()

    def start(self) -> None:
        """Start the server and wait until it is ready.

        Raises ServerError when it cannot start: no server here, a port that is taken, a model that
        does not load.
        """
        require_free_ports(self.options)
        self._launcher = Launcher(
            self._bundle, self.options, Path(self._directory.name), self._write_log
        )
        self._thread = threading.Thread(
            target=self._run, args=(self._launcher,), name="framesink-supervisor", daemon=True
        )
        self._thread.start()
        self._settled.wait()
        self.raise_failure()

    @property
    def bundle_directory(self) -> Path:
        """The bundle that is served."""
        return self._bundle.directory

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle that is served."""
        return self._bundle.manifest

    @property
    def engine(self) -> EngineReport:
        """What the language model runs on now. Raises ServerError while none is loaded."""
        report = None
        if self._launcher is not None:
            report = self._launcher.layout.run_directory.engine()
        if report is None:
            raise ServerError("The server's language model is not loaded.")
        return report

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the server to end; whether it did within `seconds`."""
        return self._ended.wait(seconds)

    def raise_failure(self) -> None:
        """Raises the ServerError that ended the server, if one did."""
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """Become not ready, take no new session, and wait until what waits is answered and every
        session has been ended, for `drain_seconds` at most. `close` must follow."""
        if self._launcher is None:
            return
        self._draining.set()
        run_directory = self._launcher.layout.run_directory
        run_directory.drain()
        self._launcher.make_unready()
        deadline = time.monotonic() + self.options.drain_seconds
        while not run_directory.drained and time.monotonic() < deadline:
            if self._ended.wait(_WATCH_SECONDS):
                return
        self._ended.wait(_FLUSH_SECONDS)

    def close(self) -> None:
        """End the server. May be called again."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, launcher: Launcher) -> None:
        """The whole life of the server, whose processes die with the thread that starts them."""
        try:
            process = launcher.launch(self._stopping)
            self._settled.set()
            try:
                while not self._stopping.wait(_WATCH_SECONDS):
                    dead = process.dead_part()
                    if dead is not None:
                        process = self._recover(launcher, process, dead)
            finally:
                process.kill()
        except ServerError as error:
            self._failure = error
        except Exception as error:
            _log.exception("The server cannot be watched")
            self._failure = ServerError(
                f"The server cannot be watched any more ({type(error).__name__}: {error})."
            )
        finally:
            self._ended.set()
            self._settled.set()

    def _recover(self, launcher: Launcher, process: ServerProcess, dead: str) -> ServerProcess:
        """Start the server anew, however often: a client may be what ends it."""
        if self._draining.is_set():
            raise ServerError(f"{dead} died while the last sessions were answered.")
        since = time.monotonic()
        last_lines = "\n".join(process.last_lines)
        _log.error("%s died; the server is started again.\n%s", dead, last_lines)
        process.kill()
        for attempt in range(1, RESTART_ATTEMPTS + 1):
            try:
                process = launcher.launch(self._stopping)
                break
            except ServerDiedError:  # it listens a moment before it is known to be ready
                if attempt == RESTART_ATTEMPTS:
                    raise
        _log.warning("The server is ready again after %.1f s.", time.monotonic() - since)
        return process


def _write_to_stderr(line: str) -> None:
    with suppress(OSError):  # nobody reads it; the server goes on
        sys.stderr.write(line)
        sys.stderr.flush()
