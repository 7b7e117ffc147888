"""What a server is told when it starts, and what its models are told by it."""

import json
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from framesink.runtime.errors import OptionError
from framesink.runtime.load.ladder import DEFAULT_LADDER, Admission, Ladder

PARAMETER = "framesink"


def _require_ipv4(address: str) -> str:
    try:
        return str(IPv4Address(address))
    except ValueError as error:
        raise ValueError("the address to listen on must be an IPv4 address") from error


def _require_ladder(text: str) -> str:
    try:
        Ladder.parse(text)
    except OptionError as error:
        raise ValueError(str(error).rstrip(".")) from error
    return text


Port = Annotated[int, Field(ge=1, le=65535)]
Address = Annotated[str, AfterValidator(_require_ipv4)]
LadderText = Annotated[str, AfterValidator(_require_ladder)]


class ServeOptions(BaseModel):
    """How a bundle is served. Bytes, pixels and characters are upper limits of what a client may
    send; times are in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: Address = "127.0.0.1"
    grpc_port: Port = 8001
    http_port: Port = 8000
    metrics_port: Port = 8002
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_authority: Path | None = None

    executor: str = "auto"
    threads: PositiveInt | None = None
    max_sessions: PositiveInt | None = None
    num_pages: PositiveInt | None = None
    ensemble: bool = True

    admission: Admission = "check"
    wait_seconds: NonNegativeFloat = 0.0
    ladder: LadderText = DEFAULT_LADDER

    idle_seconds: PositiveFloat = 60.0
    resume_seconds: PositiveFloat = 10.0
    drain_seconds: PositiveFloat = 30.0
    start_seconds: PositiveFloat = 600.0
    max_pending_chunks: PositiveInt = 4
    max_pending_questions: PositiveInt = 8
    max_frames: PositiveInt = 64
    max_frame_bytes: PositiveInt = 8_000_000
    max_frame_pixels: PositiveInt = 8_847_360  # 4096 × 2160
    max_chunk_pixels: PositiveInt = 35_389_440  # four such frames
    max_query_characters: PositiveInt = 8192
    max_question_characters: PositiveInt = 2048
    max_previous_text_characters: PositiveInt = 65_536

    log_level: Literal["debug", "info", "warning", "error"] = "warning"

    @property
    def serves_ensemble(self) -> bool:
        """Whether the ensemble is served; TensorRT-LLM takes no embeddings from outside."""
        return self.ensemble and self.executor != "tensorrt_llm"

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("a TLS certificate and its key go together; give both or neither")
        if self.tls_client_authority is not None and self.tls_certificate is None:
            raise ValueError("checking clients' certificates needs a certificate of the server")
        return self


class ModelContext(BaseModel):
    """What a served model knows besides its requests.

    It travels as JSON in one parameter of the model's configuration. `run_directory` is private to
    the server and its models (`RunDirectory`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Path
    run_directory: Path
    options: ServeOptions

    @classmethod
    def from_model_config(cls, model_config: str) -> Self:
        """From the JSON that Triton's Python backend hands to `initialize` as `model_config`."""
        parameters: dict[str, Any] = json.loads(model_config)["parameters"]
        return cls.model_validate_json(parameters[PARAMETER]["string_value"])
