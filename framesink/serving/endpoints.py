"""Where a server listens, and what it answers about its health."""

import http.client
import ipaddress
import socket

from framesink.serving.errors import ServerError
from framesink.serving.options import ServeOptions
from framesink.serving.tritonserver import RESTRICTED_HEADER

LOOPBACK = "127.0.0.1"

_PORT_OPTIONS = {
    "grpc_port": "--grpc-port",
    "http_port": "--http-port",
    "metrics_port": "--metrics-port",
}
_TIMEOUT_SECONDS = 5.0


def reachable_address(address: str) -> str:
    """The address by which this machine reaches what listens on `address`."""
    return LOOPBACK if ipaddress.ip_address(address).is_unspecified else address


def require_free_ports(options: ServeOptions) -> None:
    """Raises ServerError, in one sentence, for a port that cannot be listened on."""
    ports = [getattr(options, name) for name in _PORT_OPTIONS]
    if len(set(ports)) < len(ports):
        raise ServerError(f"gRPC, HTTP and metrics need a port each, not {ports}.")
    for name, option in _PORT_OPTIONS.items():
        port = getattr(options, name)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.address, port))
            except OSError as error:
                raise ServerError(
                    f"Cannot listen on port {port} of {options.address} ({error.strerror}); choose "
                    f"another with {option}."
                ) from error


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nothing listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class HealthEndpoint:
    """The HTTP side of a server."""

    def __init__(self, options: ServeOptions, key: str) -> None:
        """`key` opens what is restricted."""
        self._address = reachable_address(options.address)
        self._port = options.http_port
        self._key = key

    def ready(self) -> bool:
        """Whether the server says that it is ready."""
        return self._status("GET", "/v2/health/ready") == http.client.OK

    def load_model(self, name: str) -> None:
        """Ask the server to load a model, whatever comes of it."""
        self._status("POST", f"/v2/repository/models/{name}/load")

    def _status(self, method: str, path: str) -> int | None:
        connection = http.client.HTTPConnection(self._address, self._port, timeout=_TIMEOUT_SECONDS)
        try:
            body = "{}" if method == "POST" else None
            connection.request(method, path, body, {RESTRICTED_HEADER: self._key})
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
