"""A stand-in of a framesink server: Triton's gRPC service over scripted sessions, in this process.

It follows the contract as far as a client sees it: correlation ids, START and END, final flags,
codes of errors in brackets. Every chunk is answered with the words of `reply`.
"""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc.service_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelReadyResponse,
    ModelStreamInferResponse,
    ServerReadyResponse,
)
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from framesink.serving import contract
from framesink.serving.packing import NUMPY_TYPES, pack, unpack

REPLY = (" one", " two", "")


@dataclass
class StoredSession:
    parameters: dict[str, Any]
    chunks: list[dict[str, bytes]] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)


class FakeTriton(GRPCInferenceServiceServicer):
    """What a test may turn: `ready`; `refusal` of START, with its code in brackets or without;
    `bad_chunk`, the number of a session's chunk to refuse; `silent`, to take chunks and say
    nothing; `deaf`, to answer nothing at all; `overtaking`, to let the first response to a request
    come before the rest of those to the one before; `damage`, an output to leave out. `cancelled`
    tells of streams that a client did not end in order."""

    def __init__(self) -> None:
        self.ready = True
        self.refusal: str | None = None
        self.bad_chunk: int | None = None
        self.silent = self.deaf = self.overtaking = False
        self.damage: str | None = None
        self.sessions: dict[int, StoredSession] = {}
        self.ended: list[int] = []
        self.streams: list[grpc.ServicerContext] = []
        self.cancelled = threading.Event()
        self._server: grpc.Server | None = None
        self.port = 0

    def start(self) -> None:
        """Listen, after the first time on the same port again."""
        self._server = grpc.server(ThreadPoolExecutor(32), options=(("grpc.so_reuseport", 0),))
        add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        """Break all streams and stop listening."""
        assert self._server is not None
        self._server.stop(None).wait()

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def break_streams(self) -> None:
        """As a network would that loses its connections."""
        for context in self.streams:
            context.cancel()
        self.streams.clear()

    # Triton's protocol.

    def ServerReady(self, request: Any, context: Any) -> Any:
        return ServerReadyResponse(ready=self.ready)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return ModelReadyResponse(ready=self.ready)

    def ModelStreamInfer(
        self, requests: Iterator[ModelInferRequest], context: grpc.ServicerContext
    ) -> Iterator[ModelStreamInferResponse]:
        assert "triton_grpc_error" not in dict(context.invocation_metadata())
        self.streams.append(context)
        answers: queue.SimpleQueue[ModelStreamInferResponse | None] = queue.SimpleQueue()
        over = threading.Event()
        context.add_callback(over.set)
        reader = threading.Thread(target=self._read, args=(requests, answers, over), daemon=True)
        reader.start()
        while (answer := answers.get()) is not None:
            yield answer

    def _read(
        self, requests: Iterator[ModelInferRequest], answers: Any, over: threading.Event
    ) -> None:
        late: list[ModelStreamInferResponse] = []
        try:
            for request in requests:
                found = [] if self.deaf else list(self._answers(request))
                early = 1 if self.overtaking else len(found)
                for answer in (*found[:early], *late):
                    answers.put(answer)
                late = found[early:]
            # A cancelled stream's requests may end before it is known to be cancelled.
            if self.silent and over.wait(1.0):
                self.cancelled.set()
        except grpc.RpcError:
            self.cancelled.set()
        except Exception as error:
            answers.put(ModelStreamInferResponse(error_message=f"stand-in failed: {error!r}"))
        answers.put(None)

    def _answers(self, request: ModelInferRequest) -> Iterator[ModelStreamInferResponse]:
        parameters = {
            name: getattr(value, value.WhichOneof("parameter_choice"))
            for name, value in request.parameters.items()
        }
        number = parameters.pop("sequence_id")
        if parameters.pop("sequence_start"):
            if self.refusal is not None:
                yield _error(request, self.refusal)
                return
            self.sessions[number] = StoredSession(parameters)
        session = self.sessions.get(number)
        if session is None:
            yield _error(request, f"sequence {number} must specify the START flag")
            return
        inputs = {
            tensor.name: _values(tensor.name, raw)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
            if raw
        }
        if question := inputs.get("QUESTION"):
            session.questions.append(question[4:].decode())
        if "FRAMES" in inputs or "RAW_FRAMES" in inputs:
            session.chunks.append(inputs)
            if self.bad_chunk == len(session.chunks):
                yield _error(request, "This chunk is not to be shown. [INVALID_ARGUMENT]")
                return
            if self.silent:
                return
            yield from self._reply(request, session, inputs)
        if parameters.pop("sequence_end"):
            del self.sessions[number]
            self.ended.append(number)
        yield _response(request, None, final=True)

    def _reply(
        self, request: ModelInferRequest, session: StoredSession, inputs: dict[str, bytes]
    ) -> Iterator[ModelStreamInferResponse]:
        asked = session.questions.pop(0) if session.questions else None
        span = np.frombuffer(inputs.get("CHUNK_SPAN") or bytes(16), np.float64)
        for place, text in enumerate(REPLY):
            values: dict[str, Any] = {
                "TEXT": [text.encode()],
                "WORDS": [place] if text else [],
                "KIND": [b"answer" if asked else b"commentary"],
                "VIDEO_SPAN": span,
                "TURN": [len(session.chunks) - 1],
                "LAG": [0.5],
                "FINAL": [place == len(REPLY) - 1],
                "ASKED": [asked.encode()] if asked else [],
                "TOKENS": [0, 1, 9] if place == len(REPLY) - 1 else [],
            }
            if self.damage is not None:
                del values[self.damage]
            yield _response(request, values, final=False)


def _values(name: str, raw: bytes) -> bytes:
    """The values of a tensor of the language model, without the shape they are packed with."""
    inputs = {tensor.name: tensor for tensor in contract.model(contract.STREAMING_VLM).inputs}
    if not inputs[name].packed:
        return raw
    return unpack(inputs[name], np.frombuffer(raw, np.uint8)).tobytes()


def _error(request: ModelInferRequest, sentence: str) -> ModelStreamInferResponse:
    return ModelStreamInferResponse(
        error_message=sentence, infer_response=ModelInferResponse(id=request.id)
    )


def _response(
    request: ModelInferRequest, values: dict[str, Any] | None, final: bool
) -> ModelStreamInferResponse:
    response = ModelInferResponse(id=request.id, model_name=request.model_name)
    response.parameters["triton_final_response"].bool_param = final
    for tensor in contract.EVENT_OUTPUTS if values is not None else ():
        if values is None or tensor.name not in values:
            continue
        content = values[tensor.name]
        if tensor.data_type == "BYTES":
            raw = b"".join(len(value).to_bytes(4, "little") + value for value in content)
        else:
            array = np.asarray(content, NUMPY_TYPES[tensor.data_type])
            content = pack(tensor, array) if tensor.packed else array
            raw = content.tobytes()
        response.outputs.add(name=tensor.name, datatype=tensor.wire_type, shape=[len(content)])
        response.raw_output_contents.append(raw)
    return ModelStreamInferResponse(infer_response=response)
