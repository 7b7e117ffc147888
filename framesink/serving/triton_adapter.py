"""Between Triton's Python backend and framesink: requests, responses, metrics.

`pb_utils` is the module `triton_python_backend_utils`, which exists only inside the server's model
processes; it is handed in, so that everything here can be imported anywhere.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from framesink.runtime.arrays import AnyArray
from framesink.runtime.events import Event, EventKind
from framesink.serving import contract
from framesink.serving.errors import ServingError, StatusCode
from framesink.serving.metrics import Write
from framesink.serving.packing import NUMPY_TYPES, pack, unpack
from framesink.serving.requests import RawRequest, write_refusal

NO_TURN = -1
SEQUENCE_START = 1
SEQUENCE_END = 2

_log = logging.getLogger(__name__)


def read_raw_request(request: Any, model: str) -> RawRequest:
    """A request of Triton's, copied out of shared memory.

    Raises ServingError for one whose tensors cannot be read.
    """
    known = {tensor.name: tensor for tensor in contract.model(model).inputs}
    inputs: dict[str, AnyArray] = {}
    try:
        for given in request.inputs():
            tensor = known.get(given.name())
            if tensor is not None:
                values = np.array(given.as_numpy())
                inputs[tensor.name] = unpack(tensor, values) if tensor.packed else values
    except ValueError as error:
        raise ServingError(StatusCode.INVALID_ARGUMENT, str(error)) from error
    except Exception as error:  # damaged BYTES fail in whichever way they are damaged
        raise ServingError(
            StatusCode.INVALID_ARGUMENT, "A tensor of the request is damaged."
        ) from error
    flags = request.flags()
    return RawRequest(
        correlation_id=request.correlation_id(),
        start=bool(flags & SEQUENCE_START),
        end=bool(flags & SEQUENCE_END),
        parameters=request.parameters(),
        inputs=inputs,
    )


def make_tensor(pb_utils: Any, tensor: contract.Tensor, values: Any) -> Any:
    """An output tensor of the contract's type."""
    array: AnyArray = np.asarray(values, dtype=NUMPY_TYPES[tensor.data_type])
    return pb_utils.Tensor(tensor.name, pack(tensor, array) if tensor.packed else array)


def event_tensors(pb_utils: Any, event: Event) -> list[Any]:
    """The output tensors that carry an event."""
    values = {
        contract.TEXT: [event.text.encode()],
        contract.WORDS: event.words,
        contract.KIND: [event.kind.value.encode()],
        contract.VIDEO_SPAN: [event.t0, event.t1],
        contract.TURN: [event.turn],
        contract.LAG: [event.lag],
        contract.FINAL: [event.final],
        contract.ASKED: [] if event.question is None else [event.question.encode()],
        contract.TOKENS: event.tokens,
    }
    return [make_tensor(pb_utils, tensor, value) for tensor, value in values.items()]


def make_error(pb_utils: Any, code: StatusCode, sentence: str) -> Any:
    """An error of Triton's.

    The sentence ends with the status in brackets: on a stream, Triton tells the client the status
    only if it asks for it by a header that this version of the server does not survive.
    """
    triton_code = getattr(pb_utils.TritonError, code.value)
    return pb_utils.TritonError(f"{sentence} [{code.name}]", triton_code)


def asks_for_status(request: Any) -> bool:
    """Whether a request came with the header after which no model may answer with an error.

    The server hands it on as a parameter. Tritonserver 2.51 tells an error's status as asked for
    and does not survive that (a segmentation fault, seen after 7 to 800 errors).
    """
    return f'"{contract.STATUS_HEADER}"' in request.parameters()


class StatelessModel(ABC):
    """A model whose requests are answered one by one, each with one response.

    One with REFUSAL among its outputs leaves it to the model after it to refuse.
    """

    def __init__(self, pb_utils: Any, name: str) -> None:
        """`name` is the model's in the contract."""
        self._pb_utils = pb_utils
        self._model = contract.model(name)

    @abstractmethod
    def answer(self, raw: RawRequest) -> Mapping[contract.Tensor, Any]:
        """The outputs for a request. Raises ServingError for one that cannot be answered."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request; one that cannot be answered costs the others nothing."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            outputs = self.answer(read_raw_request(request, self._model.name))
            return self._response(outputs)
        except ServingError as error:
            refusal = error
        except Exception as error:
            _log.exception("A request of %s could not be answered", self._model.name)
            sentence = f"The request could not be answered ({type(error).__name__})."
            refusal = ServingError(StatusCode.INTERNAL, sentence)
        if contract.REFUSAL in self._model.outputs:
            return self._response({contract.REFUSAL: [write_refusal(refusal)]})
        if asks_for_status(request):
            return self._response({})
        triton_error = make_error(self._pb_utils, refusal.code, str(refusal))
        return self._pb_utils.InferenceResponse(error=triton_error)

    def _response(self, outputs: Mapping[contract.Tensor, Any]) -> Any:
        """A response; outputs that are left out are empty."""
        tensors = [
            make_tensor(self._pb_utils, tensor, outputs.get(tensor, self._empty(tensor)))
            for tensor in self._model.outputs
        ]
        return self._pb_utils.InferenceResponse(output_tensors=tensors)

    def _empty(self, tensor: contract.Tensor) -> AnyArray:
        shape = [size if isinstance(size, int) else 0 for size in tensor.shape]
        empty = b"" if tensor.data_type == "BYTES" else 0
        return np.full(shape, empty, NUMPY_TYPES[tensor.data_type])


class TritonResponder:
    """See `framesink.serving.responder.Responder`."""

    def __init__(self, pb_utils: Any, request: Any) -> None:
        self._pb_utils = pb_utils
        self._sender = request.get_response_sender()
        self._errors_as_events = asks_for_status(request)
        self._ended = False

    @property
    def cancelled(self) -> bool:
        """See Responder."""
        return not self._ended and bool(self._sender.is_cancelled())

    def send(self, event: Event, *, last: bool) -> None:
        """See Responder."""
        tensors = event_tensors(self._pb_utils, event)
        self._send(self._pb_utils.InferenceResponse(output_tensors=tensors), last=last)

    def finish(self) -> None:
        """See Responder."""
        self._send(None, last=True)

    def fail(self, code: StatusCode, sentence: str) -> None:
        """See Responder."""
        error = make_error(self._pb_utils, code, sentence)
        if self._errors_as_events:
            event = Event(EventKind.ERROR, error.message(), 0.0, 0.0, NO_TURN, 0.0, final=True)
            self.send(event, last=True)
        else:
            self._send(self._pb_utils.InferenceResponse(error=error), last=True)

    def _send(self, response: Any, *, last: bool) -> None:
        if self._ended:
            return
        self._ended = last
        arguments = [] if response is None else [response]
        flags = self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        try:
            self._sender.send(*arguments, flags=flags)
        except Exception:  # the request is gone in the server, too
            self._ended = True
            _log.exception("A response could not be sent")


class TritonMetricSink:
    """See `framesink.serving.metrics.MetricSink`. Metrics live as long as their sink."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils
        self._families: dict[str, Any] = {}
        self._metrics: list[Any] = []

    def counter(self, name: str, meaning: str, labels: Mapping[str, str]) -> Write:
        """See MetricSink."""
        family = self._family(name, meaning, self._pb_utils.MetricFamily.COUNTER)
        write: Write = self._keep(family.Metric(labels=dict(labels))).increment
        return write

    def gauge(self, name: str, meaning: str, labels: Mapping[str, str]) -> Write:
        """See MetricSink."""
        family = self._family(name, meaning, self._pb_utils.MetricFamily.GAUGE)
        write: Write = self._keep(family.Metric(labels=dict(labels))).set
        return write

    def _family(self, name: str, meaning: str, kind: Any) -> Any:
        if name not in self._families:
            self._families[name] = self._pb_utils.MetricFamily(
                name=name, description=meaning, kind=kind
            )
        return self._families[name]

    def _keep(self, metric: Any) -> Any:
        self._metrics.append(metric)
        return metric
