"""What a server is configured with, and why one does not start."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from pydantic import ValidationError
from tritonclient.grpc import model_config_pb2 as triton

from framesink.cli.serve import serve
from framesink.runtime.bundle import Bundle
from framesink.serving import contract, tritonserver
from framesink.serving.endpoints import free_ports, require_free_ports
from framesink.serving.errors import ServerError
from framesink.serving.model_config import config_text, model_configs
from framesink.serving.options import ModelContext, ServeOptions
from framesink.serving.tritonserver import Installation, find_installation, server_command

SECRET = "0123abcd"


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check="sizes")


def configure(bundle: Bundle, *, gpu: bool = False, **options: Any) -> dict[str, Any]:
    """Every configuration, read back from its text."""
    context = ModelContext(
        bundle=bundle.directory, run_directory=Path("/run"), options=ServeOptions(**options)
    )
    configs = model_configs(bundle.manifest, context, gpu=gpu)
    return {
        name: text_format.Parse(config_text(config), triton.ModelConfig())
        for name, config in configs.items()
    }


def command_of(**options: Any) -> list[str]:
    installation = Installation(Path("/bin/tritonserver"), Path("/backends"), {})
    return server_command(
        installation,
        ServeOptions(**options),
        repository=Path("/models"),
        key=SECRET,
        shared_memory_prefix="prefix",
        gpu=False,
    )


def test_every_model_is_configured(bundle: Bundle) -> None:
    configs = configure(bundle)
    assert list(configs) == [model.name for model in contract.MODELS]
    assert {name for name, config in configs.items() if config.backend == "python"} == {
        "preprocess",
        "vision_encoder",
        "language_model",
        "postprocess",
    }
    decoupled = {
        name for name, config in configs.items() if config.model_transaction_policy.decoupled
    }
    assert decoupled == {"language_model"}
    assert all(config.max_batch_size == 0 for config in configs.values())


def test_sizes_come_from_the_manifest(bundle: Bundle) -> None:
    configs = configure(bundle)
    hidden = configs["vision_encoder"].parameters["hidden"].string_value
    assert hidden == str(bundle.manifest.model.text.hidden_size)
    patch_dim = configs["preprocess"].parameters["patch_dim"].string_value
    assert patch_dim == str(bundle.manifest.preprocess.patch_dim)


def test_steps_of_the_ensemble_fit_together(bundle: Bundle) -> None:
    """What a step reads was made before it, of the type and shape that it wants."""
    configs = configure(bundle)
    ensemble = configs["streaming_vlm"]
    made = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = configs[step.model_name]
        wanted = {tensor.name: tensor for tensor in model.input}
        given = {tensor.name: tensor for tensor in model.output}
        required = {name for name, tensor in wanted.items() if not tensor.optional}
        assert required <= set(step.input_map)
        for name, source in step.input_map.items():
            assert made[source] == (wanted[name].data_type, list(wanted[name].dims))
        for name, target in step.output_map.items():
            assert target not in made
            made[target] = (given[name].data_type, list(given[name].dims))
    for tensor in ensemble.output:
        assert made[tensor.name] == (tensor.data_type, list(tensor.dims))


def test_options_reach_the_models(bundle: Bundle) -> None:
    config = configure(bundle, idle_seconds=7.5, max_frames=3)["language_model"]
    batching = config.sequence_batching
    assert batching.max_sequence_idle_microseconds > 2 * 7_500_000
    # As the Python backend hands it over.
    value = config.parameters["framesink"].string_value
    said = json.dumps({"parameters": {"framesink": {"string_value": value}}})
    context = ModelContext.from_model_config(said)
    assert context.bundle == bundle.directory
    assert context.options == ServeOptions(idle_seconds=7.5, max_frames=3)


def test_the_language_model_alone_uses_a_gpu(bundle: Bundle) -> None:
    configs = configure(bundle, gpu=True)
    kinds = {
        name: triton.ModelInstanceGroup.Kind.Name(config.instance_group[0].kind)
        for name, config in configs.items()
        if config.instance_group
    }
    assert kinds.pop("language_model") == "KIND_GPU"
    assert set(kinds.values()) == {"KIND_CPU"}


@pytest.mark.parametrize("options", [{"ensemble": False}, {"executor": "tensorrt_llm"}])
def test_without_the_ensemble_sessions_are_served_alone(
    bundle: Bundle, options: dict[str, Any]
) -> None:
    assert list(configure(bundle, **options)) == ["language_model"]


def test_print_config_prints_what_will_be_served(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(serve, [str(tiny_bundle), "--print-config", "--max-sessions=3"])
    assert result.exit_code == 0, result.output
    parts = result.output.split("# ")[1:]
    printed = {}
    for part in parts:
        title, _, text = part.partition("\n")
        printed[title] = text_format.Parse(text, triton.ModelConfig())
    assert list(printed) == [f"{model.name}/config.pbtxt" for model in contract.MODELS]
    options = json.loads(
        printed["language_model/config.pbtxt"].parameters["framesink"].string_value
    )["options"]
    assert options["max_sessions"] == 3


def test_every_option_of_the_server_is_one_of_the_command() -> None:
    defaults = {parameter.name: parameter.default for parameter in serve.params}
    assert set(ServeOptions.model_fields) <= set(defaults)
    for name, field in ServeOptions.model_fields.items():
        assert field.default is None or defaults[name] == field.default


def test_listening_on_loopback_without_tls_unless_told() -> None:
    command = command_of()
    assert {argument for argument in command if "-address=" in argument} == {
        "--grpc-address=127.0.0.1",
        "--http-address=127.0.0.1",
        "--metrics-address=127.0.0.1",
    }
    assert not any("ssl" in argument for argument in command)


def test_tls_is_the_servers() -> None:
    command = command_of(tls_certificate="/c.pem", tls_key="/k.pem", tls_client_authority="/a.pem")
    assert {
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        "--grpc-server-cert=/c.pem",
        "--grpc-server-key=/k.pem",
        "--grpc-root-cert=/a.pem",
    } <= set(command)


@pytest.mark.parametrize("option", ["tls_certificate", "tls_key", "tls_client_authority"])
def test_half_a_tls_configuration_is_refused(option: str) -> None:
    with pytest.raises(ValidationError, match="certificate"):
        ServeOptions(**{option: "/x.pem"})


@pytest.mark.parametrize("address", ["localhost", "::1", "1.2.3", "127.0.0.1:80"])
def test_only_ipv4_addresses_are_listened_on(address: str) -> None:
    with pytest.raises(ValidationError, match="IPv4"):
        ServeOptions(address=address)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        grpc_port, http_port = free_ports(2)
        options = ServeOptions(grpc_port=grpc_port, http_port=http_port, metrics_port=taken)
        with pytest.raises(ServerError, match=rf"port {taken} of 127\.0\.0\.1.*--metrics-port"):
            require_free_ports(options)
    require_free_ports(options)


def test_one_port_for_two_purposes_is_refused() -> None:
    with pytest.raises(ServerError, match="a port each"):
        require_free_ports(ServeOptions(grpc_port=9000, http_port=9000))


def test_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tritonserver, "version", lambda name: {"numpy": "2.3.0"}[name])
    with pytest.raises(ServerError, match=r"numpy 2\.3\.0 .* install numpy 1\.26\.4"):
        find_installation(tmp_path / "backends")


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tritonserver, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match=r"install framesink\[triton\]"):
        find_installation(tmp_path / "backends", container=tmp_path / "nothing")


def make_container(root: Path, python: str) -> Path:
    """What framesink looks at in NVIDIA's container."""
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "tritonserver").touch()
    (root / "backends" / "python").mkdir(parents=True)
    stub = root / "backends" / "python" / tritonserver.STUB
    stub.write_bytes(b"\x7fELF\0libpython" + python.encode() + b".so.1.0\0")
    return root


def test_the_containers_server_comes_first(tmp_path: Path) -> None:
    release = f"{sys.version_info.major}.{sys.version_info.minor}"
    container = make_container(tmp_path / "opt", release)
    installation = find_installation(tmp_path / "backends", container)
    assert installation.binary == container / "bin" / "tritonserver"
    assert installation.backends == container / "backends"
    assert not (tmp_path / "backends").exists()


def test_a_container_for_another_python_is_refused(tmp_path: Path) -> None:
    container = make_container(tmp_path / "opt", "3.7")
    with pytest.raises(ServerError, match=r"runs Python 3\.7"):
        find_installation(tmp_path / "backends", container)
