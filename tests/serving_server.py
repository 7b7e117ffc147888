"""A real server for tests: framesink's supervisor, Triton Inference Server, free ports."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from framesink.serving.endpoints import free_ports
from framesink.serving.options import ServeOptions
from framesink.serving.supervisor import Supervisor

# Small, so that what they bound can be waited for; large enough for a busy machine of two cores,
# whose sessions say the same however late they are.
QUICK = {
    "threads": 1,
    "max_sessions": 40,
    "idle_seconds": 5.0,
    "resume_seconds": 1.0,
    "admission": "none",
    "ladder": "none",
}


@dataclass(frozen=True)
class RunningServer:
    """A server that was ready when it was made."""

    supervisor: Supervisor

    @property
    def options(self) -> ServeOptions:
        return self.supervisor.options

    @property
    def url(self) -> str:
        """HOST:PORT of gRPC."""
        return f"127.0.0.1:{self.options.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.options.metrics_port}/metrics"

    def metrics(self) -> str:
        """The text of /metrics."""
        with urlopen(self.metrics_url, timeout=10) as answer:
            return answer.read().decode()

    def ready(self) -> bool:
        """What the server's own health endpoint says; False while nothing listens."""
        connection = HTTPConnection("127.0.0.1", self.options.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def model_process(self, name: str) -> psutil.Process:
        """The process of a model, such as language_model, of this server, which must be ready."""
        server = psutil.Process(self.supervisor.engine.process).parent()
        assert server is not None
        for process in server.children(recursive=True):
            if any(f"/models/{name}/1/" in part for part in process.cmdline()):
                return process
        raise LookupError(name)


@contextmanager
def start_server(bundle: Path, **options: Any) -> Iterator[RunningServer]:
    """A server on free ports, with the options of QUICK unless told otherwise."""
    grpc_port, http_port, metrics_port = free_ports(3)
    checked = ServeOptions(
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        **QUICK | options,
    )
    with Supervisor(bundle, checked) as supervisor:
        yield RunningServer(supervisor)
