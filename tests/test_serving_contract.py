"""What the running server says of its models is what the contract says."""

import pytest
import tritonclient.grpc as triton
from serving_server import RunningServer

from framesink.runtime.bundle import Bundle
from framesink.serving import contract


@pytest.fixture
def client(demo_server: RunningServer):
    with triton.InferenceServerClient(demo_server.url) as client:
        yield client


@pytest.fixture
def sizes(demo_server: RunningServer) -> dict[str, int]:
    manifest = Bundle.open(demo_server.supervisor.bundle_directory).manifest
    return {
        "patch_dim": manifest.preprocess.patch_dim,
        "hidden": manifest.model.text.hidden_size,
    }


@pytest.mark.parametrize("model", contract.MODELS, ids=lambda model: model.name)
def test_metadata_is_the_contract(
    client: triton.InferenceServerClient, sizes: dict[str, int], model: contract.Model
) -> None:
    metadata = client.get_model_metadata(model.name)
    assert client.is_model_ready(model.name)
    for said, meant in ((metadata.inputs, model.inputs), (metadata.outputs, model.outputs)):
        found = {(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in said}
        expected = {
            (
                tensor.name,
                tensor.data_type,
                tuple(
                    size if isinstance(size, int) else sizes.get(size, -1) for size in tensor.shape
                ),
            )
            for tensor in meant
        }
        assert found == expected
