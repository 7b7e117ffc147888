"""Requests of sessions, as they arrive from the network and as they are understood.

Everything in a request is hostile until it was checked here. Reading a request is cheap; decoding
its frames is not, and is left to `prepare_chunk`, which runs in another thread.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from framesink.runtime.arrays import AnyArray, Float32Array, UInt8Array
from framesink.runtime.preprocess import Grid, PreprocessConfig
from framesink.runtime.session_plan import LAST_SECOND
from framesink.runtime.video.chunk import Chunk
from framesink.serving import contract
from framesink.serving.errors import ServingError, StatusCode
from framesink.serving.images import FrameLimits, check_raw_frames, decode_files
from framesink.serving.options import ServeOptions
from framesink.serving.parameters import Value, read_parameters, require_text

# A chunk may be that many times as long as the session's chunks, when it holds a backlog. A longer
# one would move positions further than any table of them should grow.
MAX_CHUNK_LENGTHS = 16
# Clients compute times in floating point.
TIME_TOLERANCE = 1e-3

Inputs = Mapping[str, AnyArray]


@dataclass(frozen=True, slots=True, eq=False)
class RawRequest:
    """A request as it arrives: the correlation id of its sequence, whether it starts and ends it,
    its parameters (a JSON object, or nothing), and its input tensors by name."""

    correlation_id: int | str
    start: bool
    end: bool
    parameters: str
    inputs: Inputs


@dataclass(frozen=True, slots=True, eq=False)
class SessionRequest:
    """A request whose form is right.

    `has_chunk` says that frames or embeddings came with it. A `finish` ends the session when all is
    answered, an `end` without it at once. `dropped` frames are missing before the chunk.
    """

    session: int
    start: bool
    end: bool
    finish: bool
    question: str | None
    has_chunk: bool
    dropped: int
    parameters: Mapping[str, Value]
    inputs: Inputs
    arrived_at: float


@dataclass(frozen=True, slots=True)
class Clock:
    """Where a session is in video time: seconds of the end of its last chunk, and the length of
    its chunks."""

    last_t1: float
    chunk_seconds: float


@dataclass(frozen=True, slots=True)
class Times:
    """Begin and end of a chunk in seconds of video time; NaN for what the request left out."""

    t0: float
    t1: float

    def within(self, clock: Clock) -> "Times":
        """With what was left out filled in.

        Raises ServingError for a chunk before the last one, or far longer than a chunk is.
        """
        t0 = clock.last_t1 if math.isnan(self.t0) else self.t0
        t1 = t0 + clock.chunk_seconds if math.isnan(self.t1) else self.t1
        if t0 < clock.last_t1 - TIME_TOLERANCE:
            raise _refusal(
                f"The chunk begins at {t0:.3f} s of video, before the end of the last one at "
                f"{clock.last_t1:.3f} s; time must not run backwards."
            )
        if t1 - t0 > MAX_CHUNK_LENGTHS * clock.chunk_seconds:
            raise _refusal(
                f"The chunk is {t1 - t0:g} s long, but chunks of this session last "
                f"{clock.chunk_seconds:g} s and at most {MAX_CHUNK_LENGTHS} times that."
            )
        return Times(t0, t1)


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedChunk:
    """A chunk the vision encoder has been through: embeddings float32 `[v, hidden]` of `grid`, made
    of `frames` frames."""

    embeddings: Float32Array
    grid: Grid
    times: Times
    frames: int


def read_request(raw: RawRequest, options: ServeOptions) -> SessionRequest:
    """A request whose form is right. Raises ServingError (INVALID_ARGUMENT) for any other."""
    session = read_session_id(raw)
    parameters = read_parameters(raw.parameters, options, start=raw.start, end=raw.end)
    question = _question(raw.inputs, options)
    encoded = (contract.EMBEDDINGS, contract.REFUSAL)
    has_chunk = has_frames(raw.inputs) or any(_filled(raw.inputs, tensor) for tensor in encoded)
    finish = bool(parameters.get("finish")) or has_chunk or question is not None
    return SessionRequest(
        session=session,
        start=raw.start,
        end=raw.end,
        finish=raw.end and finish,
        question=question,
        has_chunk=has_chunk,
        dropped=int(parameters.get("dropped", 0)),
        parameters=parameters,
        inputs=raw.inputs,
        arrived_at=time.monotonic(),
    )


def read_session_id(raw: RawRequest) -> int:
    """The session a request belongs to. Raises ServingError unless it is a number above 0."""
    number = raw.correlation_id
    if not isinstance(number, int) or number <= 0:
        raise _refusal("A session is named by a sequence id that is a whole number above 0.")
    return number


def prepare_chunk(
    request: SessionRequest, clock: Clock, limits: FrameLimits, config: PreprocessConfig
) -> Chunk | EmbeddedChunk:
    """The chunk of a request that has one; its files are decoded here.

    Raises ServingError (INVALID_ARGUMENT) for a chunk that cannot be used.
    """
    inputs = request.inputs
    if _filled(inputs, contract.REFUSAL):
        raise read_refusal(inputs[contract.REFUSAL.name])
    if _filled(inputs, contract.EMBEDDINGS):
        embedded = _embedded_chunk(inputs)
        times = embedded.times.within(clock)
        return EmbeddedChunk(embedded.embeddings, embedded.grid, times, embedded.frames)
    times, timestamps = read_times(inputs)
    times = times.within(clock)
    frames = read_frames(inputs, limits, config)
    require_timestamps(timestamps, len(frames))
    return Chunk(
        frames=frames,
        t0=times.t0,
        t1=times.t1,
        timestamps=tuple(timestamps) or _spread(times, len(frames)),
        captured_at=request.arrived_at,
        dropped=request.dropped,
    )


def read_frames(inputs: Inputs, limits: FrameLimits, config: PreprocessConfig) -> UInt8Array:
    """The frames of a request, decoded: uint8 `[T, H, W, 3]` RGB, raw ones of their own size.

    Raises ServingError (INVALID_ARGUMENT) for none, for both kinds, and for frames that cannot be
    used.
    """
    files, raw = inputs.get(contract.FRAMES.name), inputs.get(contract.RAW_FRAMES.name)
    if files is not None and files.size:
        if raw is not None and raw.size:
            raise _refusal("A request has FRAMES or RAW_FRAMES, not both.")
        return decode_files(_byte_strings(files, "FRAMES"), limits, config)
    if raw is None or not raw.size:
        raise _refusal("A chunk without frames cannot be shown to the model.")
    return check_raw_frames(raw, limits, config)


def has_frames(inputs: Inputs) -> bool:
    """Whether a request came with frames, encoded or raw."""
    return _filled(inputs, contract.FRAMES) or _filled(inputs, contract.RAW_FRAMES)


def read_times(inputs: Inputs) -> tuple[Times, list[float]]:
    """The times of a request's chunk, and its frames' timestamps, both as far as it has them.

    Raises ServingError (INVALID_ARGUMENT) for times that are not finite, negative, or run
    backwards.
    """
    timestamps = _seconds(inputs, contract.TIMESTAMPS)
    span = _seconds(inputs, contract.CHUNK_SPAN)
    if any(after < before for before, after in pairwise(timestamps)):
        raise _refusal("The timestamps of a chunk's frames must not run backwards.")
    if len(span) not in (0, 2):
        raise _refusal(f"CHUNK_SPAN has {len(span)} numbers; it must have two, or none.")
    if span:
        return _ordered(span[0], span[1]), timestamps
    return Times(timestamps[0] if timestamps else math.nan, math.nan), timestamps


def require_timestamps(timestamps: list[float], frames: int) -> None:
    """Raise ServingError unless there is one timestamp for each frame, or none at all."""
    if timestamps and len(timestamps) != frames:
        raise _refusal(f"{frames} frames came with {len(timestamps)} timestamps; send one each.")


def read_grid(values: AnyArray) -> Grid | None:
    """The grid in a GRID tensor, None in one without rows. Raises ServingError for another form."""
    if values.ndim != 2 or values.shape[1] != 3 or values.shape[0] > 1:
        raise _refusal(f"GRID must be of shape [1, 3], not {list(values.shape)}.")
    return Grid(*(int(value) for value in values[0])) if len(values) else None


def write_refusal(refusal: ServingError) -> bytes:
    """What a REFUSAL tensor holds: preprocessing leaves it to the language model to refuse, which
    knows the session."""
    return f"{refusal.code.name} {refusal}".encode()


def read_refusal(values: AnyArray) -> ServingError:
    """The error in a REFUSAL tensor. Raises ServingError for one that holds none."""
    text = _byte_strings(values, "REFUSAL")[0].decode(errors="replace")
    name, _, sentence = text.partition(" ")
    if name not in StatusCode.__members__ or not sentence:
        raise _refusal("REFUSAL is not as preprocess makes it.")
    return ServingError(StatusCode[name], sentence)


def _embedded_chunk(inputs: Inputs) -> EmbeddedChunk:
    if has_frames(inputs):
        raise _refusal("A request has frames or EMBEDDINGS, not both.")
    empty = np.empty((0, 3), np.int32)
    grid = read_grid(inputs.get(contract.GRID.name, empty))
    chunk = inputs.get(contract.CHUNK.name, np.empty(0))
    if grid is None or chunk.shape != (3,):
        raise _refusal("EMBEDDINGS need GRID and CHUNK, as the models before this one make them.")
    t0, t1, frames = (float(value) for value in chunk)
    if not (1 <= frames <= grid.patches):
        raise _refusal("CHUNK names a number of frames that its grid cannot have.")
    for value in (t0, t1):
        if not math.isnan(value):
            _require_second(value, "CHUNK")
    times = Times(t0, t1) if math.isnan(t0) or math.isnan(t1) else _ordered(t0, t1)
    return EmbeddedChunk(inputs[contract.EMBEDDINGS.name], grid, times, int(frames))


def _question(inputs: Inputs, options: ServeOptions) -> str | None:
    values = inputs.get(contract.QUESTION.name)
    if values is None or values.size == 0:
        return None
    if values.size > 1:
        raise _refusal(f"A request has {values.size} questions; ask them one by one.")
    (encoded,) = _byte_strings(values, "QUESTION")
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        raise _refusal("QUESTION is not valid UTF-8.") from error
    if not text.strip():
        raise _refusal("QUESTION is empty.")
    require_text("QUESTION", text, options.max_question_characters)
    return text


def _byte_strings(values: AnyArray, name: str) -> list[bytes]:
    items: list[bytes] = values.reshape(-1).tolist()
    if not all(isinstance(item, bytes) for item in items):
        raise _refusal(f"{name} must be of type BYTES.")
    return items


def _seconds(inputs: Inputs, tensor: contract.Tensor) -> list[float]:
    values = inputs.get(tensor.name)
    if values is None or values.size == 0:
        return []
    if values.dtype != np.float64 or values.ndim != 1:
        raise _refusal(f"{tensor.name} must be a list of FP64 numbers.")
    seconds: list[float] = values.tolist()
    for value in seconds:
        _require_second(value, tensor.name)
    return seconds


def _require_second(value: float, name: str) -> None:
    if not 0 <= value <= LAST_SECOND:
        raise _refusal(
            f"{name} holds {value:g}; a second of video is a number from 0 to {LAST_SECOND:.0f}."
        )


def _ordered(t0: float, t1: float) -> Times:
    if t1 <= t0:
        raise _refusal(f"A chunk from {t0:g} s to {t1:g} s has no length; its end must be later.")
    return Times(t0, t1)


def _spread(times: Times, frames: int) -> tuple[float, ...]:
    return tuple(times.t0 + (times.t1 - times.t0) * i / frames for i in range(frames))


def _filled(inputs: Inputs, tensor: contract.Tensor) -> bool:
    values = inputs.get(tensor.name)
    return values is not None and values.size > 0


def _refusal(sentence: str) -> ServingError:
    return ServingError(StatusCode.INVALID_ARGUMENT, sentence)
