"""A connection to one server: short calls that are answered or fail in time, and long streams."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc.service_pb2 import (
    ModelReadyRequest,
    ServerReadyRequest,
)
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from framesink.client.errors import (
    ClientError,
    RefusedError,
    ServerGoneError,
    ServerUnavailableError,
    SessionLostError,
)
from framesink.client.wire import Request, WireError, decode, encode
from framesink.runtime.errors import OptionError
from framesink.serving.contract import LANGUAGE_MODEL

_PLAIN, _TLS = "grpc://", "grpcs://"
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    # A server that is back is found soon; whether to try again is the session's decision.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),
)
_NOT_NOW = (None, "UNAVAILABLE", "INTERNAL", "CANCELLED")


@dataclass(frozen=True, slots=True)
class Tls:
    """Encryption: whom to trust, and who this client is. Files in PEM; None is the system's
    roots, and no certificate of one's own."""

    root_certificates: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """gRPC's form of it. Raises OptionError for a file that cannot be read."""

        def read(path: Path | None) -> bytes | None:
            try:
                return None if path is None else path.read_bytes()
            except OSError as error:
                raise OptionError(
                    f"{path} cannot be read ({error.strerror}); give a PEM file."
                ) from error

        return grpc.ssl_channel_credentials(
            read(self.root_certificates), read(self.private_key), read(self.certificate)
        )


class Connection:
    """A gRPC channel. Safe from any thread."""

    def __init__(self, url: str, *, timeout: float, tls: Tls | None = None) -> None:
        """`url` is `grpc://HOST:PORT`, `grpcs://HOST:PORT` or `HOST:PORT`; `timeout` bounds every
        short call, in seconds. Nothing is sent yet."""
        self.target = url.removeprefix(_PLAIN).removeprefix(_TLS).rstrip("/")
        host, _, port = self.target.rpartition(":")
        if not host or not port.isdecimal():
            raise OptionError(f"{url!r} is not grpc://HOST:PORT, such as grpc://localhost:8001.")
        self.timeout = timeout
        if tls is not None or url.startswith(_TLS):
            credentials = (tls or Tls()).credentials()
            self._channel = grpc.secure_channel(self.target, credentials, _OPTIONS)
        else:
            self._channel = grpc.insecure_channel(self.target, _OPTIONS)
        self._stub = GRPCInferenceServiceStub(self._channel)

    def ready(self) -> bool:
        """Whether the server takes sessions now. Raises ServerGoneError if nobody answers."""
        try:
            server = self._stub.ServerReady(ServerReadyRequest(), timeout=self.timeout)
            if not server.ready:
                return False
            model = ModelReadyRequest(name=LANGUAGE_MODEL)
            return bool(self._stub.ModelReady(model, timeout=self.timeout).ready)
        except grpc.RpcError as error:
            raise self.gone(error) from error

    def require_ready(self) -> None:
        """Raise ServerGoneError if nobody answers, ServerUnavailableError if not ready."""
        if not self.ready():
            raise ServerUnavailableError(
                f"The server at {self.target} is not ready: it is starting, recovering or "
                "stopping; try again in a moment.",
                "UNAVAILABLE",
            )

    def call(self, request: Request) -> None:
        """Send a request that brings no event, and wait until it is answered.

        Raises ServerUnavailableError where trying again may help, SessionLostError for a session
        the server does not know, RefusedError for what it does not take.
        """
        # Never with the header `triton_grpc_error`, which would tell the status of an error, and
        # always read to the end: Triton 2.51 can crash when it ends a stream by itself, and when a
        # stream is cancelled as it ends.
        call = self._stub.ModelStreamInfer(iter((encode(request),)), timeout=self.timeout)
        try:
            answers = [decode(message) for message in call]
        except grpc.RpcError as error:
            raise self.gone(error) from error
        if not answers:
            raise self.gone()
        for answer in answers:
            if answer.error is not None:
                raise _refusal(answer.error)

    def require_session(self, model: str, sequence_id: int) -> None:
        """Raise SessionLostError if the server does not know a session, and what `call` raises."""
        self.call(Request(model, "probe", sequence_id))

    def stream(self, messages: Iterator[Any]) -> Any:
        """A call that lasts as long as a session does: messages in, messages out."""
        return self._stub.ModelStreamInfer(messages)

    def gone(self, error: grpc.RpcError | None = None) -> ClientError:
        """The error to raise for a stream or a call that broke."""
        code, reason = ("UNAVAILABLE", "it ended the stream") if error is None else _status(error)
        return ServerGoneError(
            f"The server at {self.target} is gone or cannot be reached ({reason.rstrip('.')}); "
            "check the address and that it runs.",
            code,
        )

    def close(self) -> None:
        """End the channel and whatever runs over it."""
        self._channel.close()


def _status(error: grpc.RpcError) -> tuple[str, str]:
    """Name of the code, and the sentence."""
    code: grpc.StatusCode = error.code()
    return code.name, error.details() or code.name


def _refusal(error: WireError) -> ClientError:
    """The exception for an error that a model, or Triton itself, answered with."""
    code = error.code or "UNKNOWN"
    if error.session_unknown:
        return SessionLostError(error.sentence, code)
    if error.code in _NOT_NOW:
        return ServerUnavailableError(error.sentence, code)
    return RefusedError(error.sentence, code)
