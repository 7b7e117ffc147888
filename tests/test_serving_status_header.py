"""A header that ends this version of Triton's server, on the real server: here it does not."""

import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

pytest.importorskip("pytriton", reason="the server's wheel is not installed")
from serving_server import RunningServer
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelStreamInferResponse
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from framesink.serving import contract
from framesink.serving.packing import pack

HEADER = ((contract.STATUS_HEADER, "true"),)
# Without the answer by events the server ends after 7 to 800 of them.
REFUSALS = 1200
NUMBERS = itertools.count(1 << 40)
PROCESSES = (contract.PREPROCESS, contract.VISION_ENCODER, contract.LANGUAGE_MODEL)


@pytest.fixture
def service(demo_server: RunningServer) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(demo_server.url) as channel:
        yield GRPCInferenceServiceStub(channel)


def bad_chunk(model: str) -> ModelInferRequest:
    """A whole session whose only frame is no picture."""
    request = ModelInferRequest(model_name=model, id="1")
    if model in (contract.LANGUAGE_MODEL, contract.STREAMING_VLM):
        request.parameters["sequence_id"].int64_param = next(NUMBERS)
        request.parameters["sequence_start"].bool_param = True
        request.parameters["sequence_end"].bool_param = True
    content = b"no picture"
    request.inputs.add(name=contract.FRAMES.name, datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(content).to_bytes(4, "little") + content)
    return request


def bad_patches() -> ModelInferRequest:
    """Patches that are not those of their grid."""
    request = ModelInferRequest(model_name=contract.VISION_ENCODER, id="1")
    patches, grid = np.zeros((1, 1176), np.float32), np.array([[1, 4, 4]], np.int32)
    for tensor, values in ((contract.PATCHES, patches), (contract.GRID, grid)):
        packed = pack(tensor, values)
        request.inputs.add(name=tensor.name, datatype=tensor.wire_type, shape=packed.shape)
        request.raw_input_contents.append(packed.tobytes())
    return request


def output(message: ModelStreamInferResponse, name: str) -> bytes:
    response = message.infer_response
    names = [tensor.name for tensor in response.outputs]
    return bytes(response.raw_output_contents[names.index(name)])


def test_a_refusal_with_the_header_is_an_event(service: GRPCInferenceServiceStub) -> None:
    for model in (contract.LANGUAGE_MODEL, contract.STREAMING_VLM):
        (message,) = service.ModelStreamInfer(iter([bad_chunk(model)]), metadata=HEADER)
        assert message.error_message == ""
        assert output(message, "KIND")[4:] == b"error"
        text = output(message, "TEXT")[4:].decode()
        assert text == "A frame is neither a JPEG nor a PNG file; send another. [INVALID_ARGUMENT]"
        assert output(message, "FINAL") == b"\1"


def test_a_refusal_without_it_is_an_error_message(service: GRPCInferenceServiceStub) -> None:
    for model in (contract.LANGUAGE_MODEL, contract.STREAMING_VLM):
        (message,) = service.ModelStreamInfer(iter([bad_chunk(model)]))
        assert message.error_message.endswith(
            "A frame is neither a JPEG nor a PNG file; send another. [INVALID_ARGUMENT]"
        )


def test_no_number_of_refusals_with_the_header_ends_the_server(
    demo_server: RunningServer, service: GRPCInferenceServiceStub
) -> None:
    processes = {name: demo_server.model_process(name).pid for name in PROCESSES}
    requests = [
        bad_chunk(contract.LANGUAGE_MODEL),
        bad_chunk(contract.STREAMING_VLM),
        bad_chunk(contract.PREPROCESS),
        bad_patches(),
    ]
    answers: Counter[str] = Counter()

    def send(number: int) -> None:
        request = requests[number % len(requests)]
        if request.parameters:
            request = bad_chunk(request.model_name)
        for message in service.ModelStreamInfer(iter([request]), metadata=HEADER, timeout=60):
            assert message.error_message == ""
            answers[request.model_name] += bool(message.infer_response.outputs)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(send, range(REFUSALS)))
    assert answers == {request.model_name: REFUSALS // len(requests) for request in requests}
    assert demo_server.ready()
    assert {name: demo_server.model_process(name).pid for name in PROCESSES} == processes
