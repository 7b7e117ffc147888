"""What goes in and out of every served model: the one table.

Server configuration, models, client, documentation and the contract test all read it. Only the
standard library is imported, so a client needs nothing else.
"""

from dataclasses import dataclass
from typing import Literal

PREPROCESS = "preprocess"
VISION_ENCODER = "vision_encoder"
LANGUAGE_MODEL = "language_model"
POSTPROCESS = "postprocess"
STREAMING_VLM = "streaming_vlm"

# By this gRPC header a client asks Triton for errors as the status of its stream. tritonserver 2.51
# crashes on it after some errors, so it is handed to the models as a request parameter, and a
# request that has it is refused by an event of kind `error`.
STATUS_HEADER = "triton_grpc_error"

DataType = Literal["BOOL", "UINT8", "INT32", "INT64", "FP32", "FP64", "BYTES"]
ParameterType = Literal["string", "integer", "number", "boolean"]
Moment = Literal["start", "any", "end"]

# Sizes that the bundle's manifest decides; every other named dimension changes per request.
PATCH_DIM = "patch_dim"
HIDDEN = "hidden"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output. A string in `shape` names a dimension that is not fixed here.

    `packed` tensors travel as UINT8 of one dimension: every dimension as an int64, then the values,
    all little-endian (`framesink.serving.packing`); nothing at all stands for no value. Declared
    shapes of several free dimensions, or of elements larger than a byte, can overflow in
    tritonserver 2.51 and end a model's process before any of its code has seen the request.
    """

    name: str
    data_type: DataType
    shape: tuple[int | str, ...]
    meaning: str
    optional: bool = False

    @property
    def packed(self) -> bool:
        """Whether shape and values travel together in bytes."""
        return self.data_type != "BYTES" and not all(isinstance(size, int) for size in self.shape)

    @property
    def wire_type(self) -> DataType:
        """Its type as Triton knows it."""
        return "UINT8" if self.packed else self.data_type

    @property
    def wire_dims(self) -> tuple[int, ...]:
        """Its shape as Triton knows it; -1 for a free dimension."""
        if self.packed:
            return (-1,)
        return tuple(size if isinstance(size, int) else -1 for size in self.shape)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A request parameter. `moment` says which requests of a sequence may carry it.

    A parameter left out has the bundle's streaming default, or the one its meaning names.
    """

    name: str
    type: ParameterType
    moment: Moment
    meaning: str


@dataclass(frozen=True, slots=True)
class Model:
    """A served model."""

    name: str
    meaning: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    decoupled: bool = False


FRAMES = Tensor(
    "FRAMES", "BYTES", ("frames",), "JPEG or PNG files, one per frame of the chunk", optional=True
)
RAW_FRAMES = Tensor(
    "RAW_FRAMES",
    "UINT8",
    ("raw_frames", "height", "width", 3),
    "RGB frames of the chunk, in place of FRAMES",
    optional=True,
)
TIMESTAMPS = Tensor(
    "TIMESTAMPS",
    "FP64",
    ("timestamps",),
    "seconds of video time of each frame; left out or empty: spread evenly over the chunk",
    optional=True,
)
CHUNK_SPAN = Tensor(
    "CHUNK_SPAN",
    "FP64",
    ("bounds",),
    "begin and end of the chunk in seconds of video time; left out or empty: from the first "
    "timestamp, or else the end of the chunk before it, for one chunk length",
    optional=True,
)
QUESTION = Tensor("QUESTION", "BYTES", ("questions",), "none or one question, UTF-8", optional=True)
PATCHES = Tensor("PATCHES", "FP32", ("patches", PATCH_DIM), "normalised ViT patches")
GRID = Tensor(
    "GRID", "INT32", ("grids", 3), "patch counts (time, rows, columns); no row without frames"
)
CHUNK = Tensor(
    "CHUNK",
    "FP64",
    ("chunk",),
    "begin and end of the chunk in seconds of video time (NaN for what the request did not name) "
    "and its number of frames; empty without frames",
)
REFUSAL = Tensor(
    "REFUSAL",
    "BYTES",
    ("refusals",),
    "none, or why the chunk cannot be used: a status and a sentence, for the language model to say",
)
EMBEDDINGS = Tensor("EMBEDDINGS", "FP32", ("tokens", HIDDEN), "one row per vision token")

TEXT = Tensor("TEXT", "BYTES", (1,), "the new piece of text, UTF-8, never a broken character")
WORDS = Tensor("WORDS", "INT32", ("words",), "ids of the tokens whose text this response adds")
KIND = Tensor("KIND", "BYTES", (1,), "commentary, answer, silence, degraded or error")
VIDEO_SPAN = Tensor("VIDEO_SPAN", "FP64", (2,), "seconds of video time that the reply is about")
TURN = Tensor("TURN", "INT64", (1,), "number of the turn within the session")
LAG = Tensor("LAG", "FP64", (1,), "now minus the end of the chunk being answered, in seconds")
FINAL = Tensor("FINAL", "BOOL", (1,), "whether the turn ends with this response")
ASKED = Tensor("ASKED", "BYTES", ("asked",), "the question being answered, or empty")
TOKENS = Tensor(
    "TOKENS", "INT32", ("sampled",), "with FINAL: all sampled token ids of the reply; else empty"
)

CHUNK_INPUTS = (FRAMES, RAW_FRAMES, TIMESTAMPS, CHUNK_SPAN)
PREPROCESSED = (PATCHES, GRID, CHUNK, REFUSAL)
ENCODED = (EMBEDDINGS, GRID, CHUNK, REFUSAL)
EVENT_OUTPUTS = (TEXT, WORDS, KIND, VIDEO_SPAN, TURN, LAG, FINAL, ASKED, TOKENS)


def _optional(tensor: Tensor) -> Tensor:
    return Tensor(tensor.name, tensor.data_type, tensor.shape, tensor.meaning, optional=True)


MODELS: tuple[Model, ...] = (
    Model(PREPROCESS, "frames to patches", CHUNK_INPUTS, PREPROCESSED),
    Model(VISION_ENCODER, "patches to embeddings", (PATCHES, GRID), (EMBEDDINGS,)),
    Model(
        LANGUAGE_MODEL,
        "sessions; takes frames itself, or what the two models before it made of them",
        (*CHUNK_INPUTS, *(_optional(tensor) for tensor in ENCODED), QUESTION),
        EVENT_OUTPUTS,
        decoupled=True,
    ),
    Model(
        POSTPROCESS,
        "token ids to text",
        EVENT_OUTPUTS,
        EVENT_OUTPUTS,
    ),
    Model(
        STREAMING_VLM,
        "the ensemble: sessions over all four",
        (*CHUNK_INPUTS, QUESTION),
        EVENT_OUTPUTS,
        decoupled=True,
    ),
)

PARAMETERS: tuple[Parameter, ...] = (
    Parameter("query", "string", "start", "a standing instruction, kept for ever; empty: none"),
    Parameter(
        "policy", "string", "start", "sink (default), sliding or full: what stays in the context"
    ),
    Parameter("sink_text", "integer", "start", "sink: first tokens of text kept"),
    Parameter("recent_text", "integer", "start", "sink: last tokens of text kept"),
    Parameter("vision_seconds", "number", "start", "sink, sliding: seconds of video kept"),
    Parameter("reply_turns", "integer", "start", "sink: replies kept in place"),
    Parameter("max_new_tokens", "integer", "start", "longest reply to one chunk"),
    Parameter("temperature", "number", "start", "0 takes the likeliest token"),
    Parameter("top_k", "integer", "start", "sample among so many tokens; 0 is off"),
    Parameter("top_p", "number", "start", "sample among the likeliest of this weight; 1 is off"),
    Parameter("repetition_penalty", "number", "start", "1 is off"),
    Parameter("seed", "integer", "start", "makes sampling repeatable"),
    Parameter("chunk_seconds", "number", "start", "length of a chunk in seconds of video time"),
    Parameter(
        "max_patches", "integer", "start", "most ViT patches of a chunk; fewer need fewer pages"
    ),
    Parameter(
        "precision",
        "string",
        "start",
        "language-model precisions the client accepts, with commas between; default any",
    ),
    Parameter(
        "previous_text",
        "string",
        "start",
        "what the session said before a crash; it stands before the first turn",
    ),
    Parameter(
        "ladder",
        "string",
        "start",
        "what is halved, rung by rung, when replies are late: frames, resolution, replies, with "
        "commas between; none: nothing; default the server's",
    ),
    Parameter(
        "dropped", "integer", "any", "frames the client dropped before this chunk; default 0"
    ),
    Parameter(
        "finish",
        "boolean",
        "end",
        "answer what waits before closing; default false: drop it",
    ),
)


def model(name: str) -> Model:
    """A model by its name. Raises KeyError for one that is not served."""
    return {served.name: served for served in MODELS}[name]


def parameter(name: str) -> Parameter | None:
    """A request parameter by its name, None for one that means nothing."""
    return {known.name: known for known in PARAMETERS}.get(name)
