"""Where Triton Inference Server is on this machine, and how it is started.

Two installations are known: NVIDIA's container, and the wheel `nvidia-pytriton`, whose server runs
on machines without a GPU, too.
"""

import os
import re
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from framesink.serving.contract import STATUS_HEADER
from framesink.serving.errors import ServerError
from framesink.serving.options import ServeOptions

CONTAINER = Path("/opt/tritonserver")
STUB = "triton_python_backend_stub"
RESTRICTED_HEADER = "framesink-key"

# Health and metadata are all that HTTP serves: unlike gRPC it has no TLS here.
_RESTRICTED_HTTP = "inference,model-config,model-repository,shared-memory,statistics,trace,logging"
_RESTRICTED_GRPC = "model-config,model-repository,shared-memory,statistics,trace,logging"
# The process of a model must have imported framesink in this time; loading has no limit of its own.
_STUB_SECONDS = 120
# A client that is gone without a word is noticed after so many milliseconds.
_KEEPALIVE = (10_000, 5_000)


@dataclass(frozen=True, slots=True)
class Installation:
    """A server, its backends, and the variables its processes need."""

    binary: Path
    backends: Path
    environment: dict[str, str]


def find_installation(directory: Path, container: Path = CONTAINER) -> Installation:
    """The server of this machine: the container's, else the wheel's.

    The wheel's Python backend lacks its stub; links to all of it are made in `directory`. Raises
    ServerError when there is no server, or none for this Python and this numpy.
    """
    _require_numpy()
    if (container / "bin" / "tritonserver").is_file():
        _require_python(container / "backends" / "python" / STUB)
        return Installation(
            container / "bin" / "tritonserver", container / "backends", _environment()
        )
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(
            "There is no Triton Inference Server here; install framesink[triton], or use NVIDIA's "
            "container."
        )
    root = Path(spec.origin).parent / "tritonserver"
    release = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / release / STUB
    if not stub.is_file():
        raise ServerError(
            f"The Triton Inference Server of nvidia-pytriton has no Python {release} backend; use "
            "another Python, or NVIDIA's container."
        )
    python = directory / "python"
    python.mkdir(parents=True)
    for file in (*(root / "backends" / "python").iterdir(), stub):
        (python / file.name).symlink_to(file)
    # Otherwise the stub loads the system's libpython.
    libraries = [str(sysconfig.get_config_var("LIBDIR")), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = _environment()
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    return Installation(root / "bin" / "tritonserver", directory, environment)


def server_command(
    installation: Installation,
    options: ServeOptions,
    *,
    repository: Path,
    key: str,
    shared_memory_prefix: str,
    gpu: bool,
) -> list[str]:
    """The command line. `key` opens what is restricted: keep it secret."""
    time, timeout = _KEEPALIVE
    command = [
        str(installation.binary),
        f"--model-repository={repository}",
        f"--backend-directory={installation.backends}",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--disable-auto-complete-config",
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix}",
        f"--backend-config=python,stub-timeout-seconds={_STUB_SECONDS}",
        f"--grpc-address={options.address}",
        f"--grpc-port={options.grpc_port}",
        f"--http-address={options.address}",
        f"--http-port={options.http_port}",
        f"--metrics-address={options.address}",
        f"--metrics-port={options.metrics_port}",
        f"--allow-gpu-metrics={str(gpu).lower()}",
        f"--http-restricted-api={_RESTRICTED_HTTP}:{RESTRICTED_HEADER}={key}",
        f"--grpc-restricted-protocol={_RESTRICTED_GRPC}:{RESTRICTED_HEADER}={key}",
        f"--grpc-keepalive-time={time}",
        f"--grpc-keepalive-timeout={timeout}",
        "--grpc-keepalive-permit-without-calls=true",
        f"--grpc-header-forward-pattern={STATUS_HEADER}",
    ]
    if options.tls_certificate is not None:
        command += [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={options.tls_certificate}",
            f"--grpc-server-key={options.tls_key}",
        ]
    if options.tls_client_authority is not None:
        command += [
            "--grpc-use-ssl-mutual=true",
            f"--grpc-root-cert={options.tls_client_authority}",
        ]
    return command


def _environment() -> dict[str, str]:
    """This process's, with this Python first: it is the one that the models' processes run."""
    environment = dict(os.environ)
    paths = [str(Path(sys.executable).parent), environment.get("PATH", "")]
    environment["PATH"] = os.pathsep.join(filter(None, paths))
    return environment


def _require_numpy() -> None:
    try:
        installed = version("numpy")
    except PackageNotFoundError as error:
        raise ServerError("numpy is not installed; install framesink[triton].") from error
    if int(installed.partition(".")[0]) >= 2:
        raise ServerError(
            f"numpy {installed} is installed, with which Triton's Python backend sends empty "
            "tensors; install numpy 1.26.4, as framesink[triton] does."
        )


def _require_python(stub: Path) -> None:
    """The container's stub runs one release of Python: it must be this one."""
    try:
        releases = set(re.findall(rb"libpython(\d\.\d+)\.so", stub.read_bytes()))
    except OSError as error:
        raise ServerError(f"Triton's Python backend has no {stub}.") from error
    release = f"{sys.version_info.major}.{sys.version_info.minor}"
    if releases and release.encode() not in releases:
        wanted = ", ".join(sorted(name.decode() for name in releases))
        raise ServerError(
            f"Triton's Python backend runs Python {wanted} and this is Python {release}; install "
            "framesink there."
        )
