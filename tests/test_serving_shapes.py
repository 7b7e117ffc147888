"""Declared shapes that overflow, on the real server: refused, and no process ends of them."""

import itertools

import grpc
import pytest

pytest.importorskip("pytriton", reason="the server's wheel is not installed")
from serving_server import RunningServer
from tritonclient.grpc.service_pb2 import ModelInferRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from framesink.serving import contract

NUMBERS = itertools.count(1 << 41)
# Products and byte counts of these overflow in 64 bits, often to what was sent.
SIZES = (-1, -2, 1 << 31, 1 << 61, 1 << 62, (1 << 63) - 1)
SHAPES = [[size] for size in SIZES] + [[1 << 31, 1 << 31, 4, 3], [1 << 62, 4], [-2, -28, 56, 3]]
PROCESSES = tuple(model.name for model in contract.MODELS if model.name != contract.STREAMING_VLM)
CONTENTS = (b"", bytes(64), (1 << 62).to_bytes(8, "little") * 4)


def lying(model: contract.Model, tensor: contract.Tensor, shape: list[int]) -> ModelInferRequest:
    """A request in which one tensor declares `shape`."""
    request = ModelInferRequest(model_name=model.name, id="1")
    if model.decoupled:
        request.parameters["sequence_id"].int64_param = next(NUMBERS)
        request.parameters["sequence_start"].bool_param = True
        request.parameters["sequence_end"].bool_param = True
    for given in model.inputs:
        if given is not tensor and not given.optional:
            fixed = [max(0, size) for size in given.wire_dims]
            request.inputs.add(name=given.name, datatype=given.wire_type, shape=fixed)
            request.raw_input_contents.append(b"")
    request.inputs.add(name=tensor.name, datatype=tensor.wire_type, shape=shape)
    return request


@pytest.mark.parametrize("model", contract.MODELS, ids=lambda model: model.name)
def test_no_declared_shape_ends_a_process(
    demo_server: RunningServer, model: contract.Model
) -> None:
    processes = {name: demo_server.model_process(name).pid for name in PROCESSES}
    with grpc.insecure_channel(demo_server.url) as channel:
        service = GRPCInferenceServiceStub(channel)
        refused = 0
        for tensor, shape, content in itertools.product(model.inputs, SHAPES, CONTENTS):
            request = lying(model, tensor, shape)
            request.raw_input_contents.append(content)
            for message in service.ModelStreamInfer(iter([request]), timeout=60):
                refused += bool(message.error_message)
        assert refused == len(model.inputs) * len(SHAPES) * len(CONTENTS)
        packed = [tensor for tensor in model.inputs if tensor.packed and tensor.optional]
        for tensor, content in itertools.product(packed, CONTENTS[1:]):
            request = lying(model, tensor, [len(content)])
            request.raw_input_contents.append(content)
            for message in service.ModelStreamInfer(iter([request]), timeout=60):
                assert message.infer_response.id == "1" or message.error_message
    assert demo_server.ready()
    assert {name: demo_server.model_process(name).pid for name in PROCESSES} == processes
