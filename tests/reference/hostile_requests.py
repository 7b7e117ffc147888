"""What hostile requests are made of: messages nobody checked, and how they have to be answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc.service_pb2 import ModelInferRequest

from framesink.serving import contract
from framesink.serving.packing import NUMPY_TYPES, pack

Content = tuple[str, str, Sequence[int], bytes]
"""Name, type, shape and bytes of a tensor."""

TENSORS = {tensor.name: tensor for model in contract.MODELS for tensor in model.inputs}
_FIELDS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


# How a regular expression ends that wants the status in brackets at the end of the sentence.
STATUS = r"\]$"


@dataclass(frozen=True, slots=True, eq=False)
class Attack:
    """A request and how it has to be answered.

    `refusal` is a regular expression of the sentence, None for a request that is unusual and does
    no harm. One that is not `sure` is damaged at random: it may be as good as any.
    """

    name: str
    message: ModelInferRequest
    refusal: str | None
    sure: bool = True

    @property
    def header(self) -> bool:
        """Whether the header that asks for the status may come with it.

        Only where framesink's sessions refuse it: other models answer with nothing then, and what
        Triton 2.51 itself refuses so ends it sooner or later.
        """
        refused_by_us = self.refusal is not None and self.refusal.endswith(STATUS)
        return refused_by_us and self.message.model_name in (
            contract.LANGUAGE_MODEL,
            contract.STREAMING_VLM,
        )

    @property
    def droppable(self) -> bool:
        """Whether it may be cancelled as well. A session whose request is cancelled before it is
        begun may be lost in Triton 2.51, so only requests of none are."""
        return "sequence_id" not in self.message.parameters


def ours(sentence: str, code: str = "INVALID_ARGUMENT") -> str:
    """A refusal by framesink's models: a sentence, and the status in brackets."""
    return rf"{sentence}[^\n]*\. \[{code}{STATUS}"


def array(name: str, values: Any) -> Content:
    """A tensor of the contract whose type, shape and bytes fit each other."""
    tensor = TENSORS[name]
    content = np.asarray(values, NUMPY_TYPES[tensor.data_type])
    if tensor.packed:
        content = pack(tensor, content)
    return name, tensor.wire_type, content.shape, content.tobytes()


def strings(name: str, *values: bytes) -> Content:
    """A BYTES tensor."""
    return name, "BYTES", [len(values)], join(*values)


def join(*values: bytes) -> bytes:
    """The bytes of a BYTES tensor."""
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


def message(model: str, tensors: Sequence[Content], **parameters: Any) -> ModelInferRequest:
    """A request as it travels."""
    request = ModelInferRequest(model_name=model, id="1")
    parameters = {"triton_enable_empty_final_response": True} | parameters
    for name, value in parameters.items():
        setattr(request.parameters[name], _FIELDS[type(value)], value)
    for name, data_type, shape, content in tensors:
        request.inputs.add(name=name, datatype=data_type, shape=shape)
        request.raw_input_contents.append(content)
    return request


@dataclass(frozen=True, slots=True)
class Attacker:
    """Chance, and a session of its own on one of the two roads."""

    rng: np.random.Generator
    model: str
    number: int

    def pick(self, values: Sequence[Any]) -> Any:
        """One of them."""
        return values[int(self.rng.integers(len(values)))]

    def new_number(self) -> int:
        """The number of a session nobody opened."""
        return int(self.rng.integers(1 << 40, (1 << 63) - 1))

    def attack(
        self,
        name: str,
        refusal: str | None,
        *tensors: Content,
        model: str = "",
        sure: bool = True,
        **parameters: Any,
    ) -> Attack:
        """A request of the session, with START or END where the parameters say so."""
        parameters = {"sequence_id": self.number} | parameters
        return Attack(name, message(model or self.model, tensors, **parameters), refusal, sure)

    def stray(
        self, name: str, refusal: str | None, model: str, *tensors: Content, sure: bool = True
    ) -> Attack:
        """A request of no session, to a model that knows none."""
        return Attack(name, message(model, tensors), refusal, sure)
