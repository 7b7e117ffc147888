"""Starts a server for a bundle and waits until it is ready."""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from framesink.runtime.bundle import Bundle
from framesink.runtime.executors import choose_executor
from framesink.runtime.gpu import current_sm
from framesink.serving.endpoints import HealthEndpoint
from framesink.serving.errors import ServerDiedError, ServerError
from framesink.serving.layout import DRAINING, Layout
from framesink.serving.options import ModelContext, ServeOptions
from framesink.serving.server_process import ServerProcess
from framesink.serving.tritonserver import find_installation, server_command

GPU_EXECUTORS = ("cuda", "tensorrt", "tensorrt_llm")

_POLL_SECONDS = 0.1


class Launcher:
    """What it takes to start a server, once or again, in one private directory."""

    def __init__(
        self,
        bundle: Bundle,
        options: ServeOptions,
        directory: Path,
        write_log: Callable[[str], None],
    ) -> None:
        """Lays out `directory`, which must be empty and its owner's alone.

        `write_log` takes the models' structured log lines. Raises ServerError where this machine
        has no server.
        """
        from framesink.serving.model_config import model_configs

        self.options = options
        self.layout = Layout(directory)
        self._write_log = write_log
        self._key = secrets.token_hex(16)
        self._health = HealthEndpoint(options, self._key)
        self._shared_memory_prefix = f"framesink-{secrets.token_hex(8)}-"
        gpu = needs_gpu(bundle, options)
        self._installation = find_installation(self.layout.backends)
        self._command = server_command(
            self._installation,
            options,
            repository=self.layout.repository,
            key=self._key,
            shared_memory_prefix=self._shared_memory_prefix,
            gpu=gpu,
        )
        context = model_context(bundle, options, self.layout)
        configs = model_configs(bundle.manifest, context, gpu=gpu)
        self._processes = [name for name, config in configs.items() if config.backend]
        self.layout.write(configs)

    def launch(self, stopping: threading.Event) -> ServerProcess:
        """Start a server and return it when it is ready, or when `stopping` is set.

        Raises ServerError, with the reason if a model gave one, where it does not get ready, and
        ServerDiedError where it ends before.
        """
        self.layout.run_directory.reset()
        process = ServerProcess(
            self._installation,
            self._command,
            directory=self.layout.path,
            shared_memory_prefix=self._shared_memory_prefix,
            write_log=self._write_log,
        )
        try:
            self._wait_until_ready(process, stopping)
        except BaseException:
            process.kill()
            raise
        return process

    def make_unready(self) -> None:
        """Let the running server answer that it is not ready."""
        self.layout.add_draining_model()
        self._health.load_model(DRAINING)

    def _wait_until_ready(self, process: ServerProcess, stopping: threading.Event) -> None:
        deadline = time.monotonic() + self.options.start_seconds
        run_directory = self.layout.run_directory
        while not self._health.ready():
            failure, dead = run_directory.failure(), process.dead_part()
            if failure is not None:
                raise ServerError(failure)
            if dead is not None:
                raise ServerDiedError(f"{dead} did not start: {_reason(process.last_lines)}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"The server was not ready within {self.options.start_seconds:g} s; give it "
                    "more with --start-seconds."
                )
            if stopping.wait(_POLL_SECONDS):
                return
        process.watch_models(self._processes)


def needs_gpu(bundle: Bundle, options: ServeOptions) -> bool:
    """Whether the language model will run on a GPU."""
    if options.executor == "auto":
        return choose_executor(bundle)[0] in GPU_EXECUTORS
    # Without a GPU Triton would refuse the model; the model itself says better what is wrong.
    return options.executor in GPU_EXECUTORS and current_sm() is not None


def model_context(bundle: Bundle, options: ServeOptions, layout: Layout) -> ModelContext:
    """What the models of a server are told."""
    return ModelContext(
        bundle=bundle.directory.resolve(),
        run_directory=layout.run_directory.path,
        options=options,
    )


def _reason(lines: Sequence[str]) -> str:
    """What tells most of the last lines of a server that did not start."""
    telling = [line for line in lines if "failed to load '" in line]
    return (telling or list(lines) or ["it said nothing"])[-1]
