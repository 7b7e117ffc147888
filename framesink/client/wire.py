"""Requests and responses of framesink's models as messages of Triton's gRPC protocol."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from tritonclient.grpc import InferResult
from tritonclient.grpc.service_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelStreamInferResponse,
)

from framesink.client.errors import ResponseError
from framesink.runtime.arrays import AnyArray, UInt8Array
from framesink.runtime.errors import OptionError
from framesink.runtime.events import Event, EventKind
from framesink.serving import contract
from framesink.serving.packing import NUMPY_TYPES, pack, unpack

ParameterValue = str | int | float | bool

# What Triton puts before the sentence of a composing model.
_ENSEMBLE_PREFIX = f"in ensemble '{contract.STREAMING_VLM}', "
_CODE = re.compile(r"(.*) \[([A-Z_]+)\]", re.DOTALL)
# How Triton's sequence batcher refuses a request of a sequence that was never started, or is over.
_NO_START = "must specify the START flag"
_PYTHON_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
_FIELDS = {
    "string": "string_param",
    "integer": "int64_param",
    "number": "double_param",
    "boolean": "bool_param",
}


@dataclass(frozen=True, slots=True, eq=False)
class ChunkPayload:
    """A chunk as it travels: files or raw frames uint8 `[T, H, W, 3]`, and its seconds of video
    time, of each frame and from where to where, as far as they are known."""

    files: Sequence[bytes] = ()
    raw: UInt8Array | None = None
    timestamps: Sequence[float] = ()
    span: tuple[float, float] | None = None
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a session."""

    model: str
    request_id: str
    sequence_id: int
    start: bool = False
    end: bool = False
    chunk: ChunkPayload | None = None
    question: str | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """One response. `final` says that no other follows to this request; so it is with an error."""

    request_id: str
    event: Event | None
    final: bool
    error: "WireError | None" = None

    @property
    def is_last(self) -> bool:
        """Whether no other follows to this request."""
        return self.final or self.error is not None


@dataclass(frozen=True, slots=True)
class WireError:
    """An error as it travels: framesink's models end its sentence with the code in brackets, for
    Triton tells none. Without a code it is an error of Triton itself."""

    sentence: str
    code: str | None

    @classmethod
    def parse(cls, message: str) -> Self:
        """From the text of a response."""
        own = message.removeprefix(_ENSEMBLE_PREFIX)
        match = _CODE.fullmatch(own)
        return cls(own, None) if match is None else cls(match[1], match[2])

    @property
    def session_unknown(self) -> bool:
        """Whether the server knows nothing of the session, or nothing any more."""
        return self.code == "NOT_FOUND" or (self.code is None and _NO_START in self.sentence)

    @property
    def session_over(self) -> bool:
        """Whether no further request of the session can succeed."""
        return self.code in (None, "NOT_FOUND", "CANCELLED")


def require_parameters(parameters: Mapping[str, ParameterValue]) -> None:
    """Raise OptionError for a session parameter the contract does not know, or of a wrong type."""
    for name, value in parameters.items():
        known = contract.parameter(name)
        if known is None or known.moment != "start":
            names = ", ".join(p.name for p in contract.PARAMETERS if p.moment == "start")
            raise OptionError(f"A session has no parameter {name!r}; it has {names}.")
        wrong_type = not isinstance(value, _PYTHON_TYPES[known.type])  # type: ignore[arg-type]
        if wrong_type or (isinstance(value, bool) and known.type != "boolean"):
            raise OptionError(f"{name}={value!r} is not a {known.type}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise OptionError(f"{name}={value!r} is not a finite number.")


def encode(request: Request) -> ModelInferRequest:
    """The message for a request."""
    message = ModelInferRequest(model_name=request.model, id=request.request_id)
    message.parameters["sequence_id"].int64_param = request.sequence_id
    message.parameters["sequence_start"].bool_param = request.start
    message.parameters["sequence_end"].bool_param = request.end
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, value in request.parameters.items():
        known = contract.parameter(name)
        assert known is not None
        setattr(message.parameters[name], _FIELDS[known.type], value)
    tensors = _tensors(request)
    for tensor in contract.model(request.model).inputs:
        if tensor.name in tensors:
            shape, content = tensors[tensor.name]
            message.inputs.add(name=tensor.name, datatype=tensor.wire_type, shape=shape)
            message.raw_input_contents.append(content)
    return message


def decode(message: ModelStreamInferResponse) -> Response:
    """The response in a message. Raises ResponseError if the contract does not allow it."""
    response = message.infer_response
    if message.error_message:
        return Response(response.id, None, True, WireError.parse(message.error_message))
    final = response.parameters["triton_final_response"].bool_param
    return Response(response.id, _event(response) if response.outputs else None, final)


def _tensors(request: Request) -> dict[str, tuple[Sequence[int], bytes]]:
    """Shape and content of every input. Those without content travel with no rows: an ensemble
    passes no input on that is left out."""
    chunk = request.chunk or ChunkPayload()
    raw = np.empty((0, 0, 0, 3), np.uint8) if chunk.raw is None else chunk.raw
    arrays: dict[contract.Tensor, AnyArray] = {
        contract.RAW_FRAMES: raw,
        contract.TIMESTAMPS: np.asarray(chunk.timestamps, np.float64),
        contract.CHUNK_SPAN: np.asarray(chunk.span or (), np.float64),
    }
    packed = {tensor: pack(tensor, values) for tensor, values in arrays.items()}
    questions = () if request.question is None else (request.question.encode(),)
    tensors: dict[str, tuple[Sequence[int], bytes]] = {
        contract.FRAMES.name: ([len(chunk.files)], _strings(chunk.files)),
        contract.QUESTION.name: ([len(questions)], _strings(questions)),
        **{tensor.name: (values.shape, values.tobytes()) for tensor, values in packed.items()},
    }
    if request.model == contract.STREAMING_VLM:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if tensor[1]}


def _strings(values: Sequence[bytes]) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


def _event(response: ModelInferResponse) -> Event:
    result = InferResult(response)

    def read(tensor: contract.Tensor) -> AnyArray:
        try:
            values = result.as_numpy(tensor.name)
            if values is not None and tensor.packed:
                values = unpack(tensor, values)
        except Exception as error:  # whatever a damaged tensor makes of the parser
            raise _violation(f"a damaged {tensor.name}") from error
        if values is None or values.ndim != 1:
            raise _violation(f"no usable {tensor.name}")
        if values.dtype != NUMPY_TYPES[tensor.data_type] and values.size:
            raise _violation(f"a {tensor.name} of {values.dtype}")
        if isinstance(tensor.shape[0], int) and len(values) != tensor.shape[0]:
            raise _violation(f"a {tensor.name} of {len(values)} values")
        checked: AnyArray = values
        return checked

    t0, t1 = (float(value) for value in read(contract.VIDEO_SPAN))
    asked = read(contract.ASKED)
    try:
        kind = EventKind(read(contract.KIND)[0].decode())
        text = read(contract.TEXT)[0].decode()
        question = asked[0].decode() if len(asked) else None
    except ValueError as error:
        raise _violation("a text that cannot be read") from error
    return Event(
        kind=kind,
        text=text,
        t0=t0,
        t1=t1,
        turn=int(read(contract.TURN)[0]),
        lag=float(read(contract.LAG)[0]),
        final=bool(read(contract.FINAL)[0]),
        question=question,
        tokens=tuple(read(contract.TOKENS).tolist()),
        words=tuple(read(contract.WORDS).tolist()),
    )


def _violation(what: str) -> ResponseError:
    return ResponseError(
        f"The server sent {what}, which framesink's contract does not allow; use a client and a "
        "server of the same version."
    )
