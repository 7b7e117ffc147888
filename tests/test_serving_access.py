"""What a network client may do, and what it may not."""

import subprocess
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from serving_server import RunningServer, start_server
from tritonclient.utils import InferenceServerException

from framesink.client import ClientError, Tls, connect

FORBIDDEN_CALLS: dict[str, Callable[[triton.InferenceServerClient], object]] = {
    "load": lambda client: client.load_model("language_model"),
    "unload": lambda client: client.unload_model("language_model"),
    "repository": lambda client: client.get_model_repository_index(),
    "configuration": lambda client: client.get_model_config("language_model"),
    "statistics": lambda client: client.get_inference_statistics("language_model"),
    "shared memory": lambda client: client.register_system_shared_memory("a", "/a", 8),
    "shared memory status": lambda client: client.get_system_shared_memory_status(),
    "CUDA shared memory": lambda client: client.register_cuda_shared_memory("a", b"AAAA", 0, 8),
    "logging": lambda client: client.update_log_settings({"log_file": "/tmp/a"}),
    "tracing": lambda client: client.update_trace_settings(settings={"trace_file": "/tmp/a"}),
}
FORBIDDEN_PATHS = (
    ("POST", "/v2/models/language_model/infer"),
    ("POST", "/v2/models/language_model/generate_stream"),
    ("GET", "/v2/models/language_model/config"),
    ("GET", "/v2/models/language_model/stats"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/language_model/load"),
    ("POST", "/v2/repository/models/language_model/unload"),
    ("POST", "/v2/systemsharedmemory/region/a/register"),
    ("POST", "/v2/cudasharedmemory/region/a/register"),
    ("POST", "/v2/logging"),
    ("POST", "/v2/trace/setting"),
)


@pytest.mark.parametrize("what", FORBIDDEN_CALLS)
def test_what_grpc_does_not_give(demo_server: RunningServer, what: str) -> None:
    with triton.InferenceServerClient(demo_server.url) as client:
        with pytest.raises(InferenceServerException, match="restricted"):
            FORBIDDEN_CALLS[what](client)
        assert client.is_server_ready()


@pytest.mark.parametrize(("method", "path"), FORBIDDEN_PATHS)
def test_what_http_does_not_give(demo_server: RunningServer, method: str, path: str) -> None:
    connection = HTTPConnection("127.0.0.1", demo_server.options.http_port, timeout=10)
    connection.request(method, path, "{}" if method == "POST" else None)
    answer = connection.getresponse()
    assert (answer.status, b"restricted" in answer.read()) == (403, True)
    connection.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a certificate of it for 127.0.0.1 with its key."""
    directory = tmp_path_factory.mktemp("certificates")
    new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    commands = (
        f"{new} -subj /CN=authority -keyout authority.key -out authority.pem",
        f"{new} -subj /CN=server -addext subjectAltName=IP:127.0.0.1 "
        "-CA authority.pem -CAkey authority.key -keyout server.key -out server.pem",
    )
    for command in commands:
        subprocess.run(command.split(), cwd=directory, check=True, capture_output=True)
    return directory


@pytest.fixture(scope="module")
def tls_server(demo_bundle: Path, certificates: Path) -> Iterator[RunningServer]:
    """A server that wants certificates of its clients, too."""
    pytest.importorskip("pytriton", reason="nvidia-pytriton carries the server")
    with start_server(
        demo_bundle,
        ensemble=False,
        tls_certificate=certificates / "server.pem",
        tls_key=certificates / "server.key",
        tls_client_authority=certificates / "authority.pem",
    ) as server:
        yield server


def test_a_session_over_tls(tls_server: RunningServer, certificates: Path) -> None:
    tls = Tls(
        root_certificates=certificates / "authority.pem",
        certificate=certificates / "server.pem",
        private_key=certificates / "server.key",
    )
    with connect(f"grpcs://{tls_server.url}", tls=tls) as client, client.session() as session:
        session.push(np.full((2, 112, 112, 3), 90, np.uint8))
        session.finish()
        assert [event.final for event in session][-1]


@pytest.mark.parametrize("scheme", ["grpc", "grpcs"])
def test_without_a_certificate_nobody_comes_in(
    tls_server: RunningServer, certificates: Path, scheme: str
) -> None:
    tls = Tls(root_certificates=certificates / "authority.pem") if scheme == "grpcs" else None
    with (
        pytest.raises(ClientError),
        connect(f"{scheme}://{tls_server.url}", tls=tls) as client,
    ):
        client.session()
