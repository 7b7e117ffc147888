"""Request parameters from clients: typed and bounded, or refused with one sentence."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from framesink.runtime.engine import default_sampling
from framesink.runtime.errors import FramesinkError
from framesink.runtime.load.ladder import Ladder
from framesink.runtime.manifest import StreamingDefaults
from framesink.runtime.policies import FullAttention, Policy, SinkWindow, SlidingWindow
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.session_plan import LAST_SECOND
from framesink.serving import contract
from framesink.serving.errors import ServingError, StatusCode
from framesink.serving.options import ServeOptions

Value = str | int | float | bool

# Triton's own, which reach the models with the client's.
RESERVED_PREFIX = "triton_"
MAX_COUNT = 1 << 31
# Outside of these a number cannot be meant, and arithmetic with it could overflow.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "sink_text": (0, MAX_COUNT),
    "recent_text": (0, MAX_COUNT),
    "vision_seconds": (0.01, LAST_SECOND),
    "reply_turns": (0, MAX_COUNT),
    "max_new_tokens": (1, MAX_COUNT),
    "temperature": (0.0, 100.0),
    "top_k": (0, MAX_COUNT),
    "top_p": (1e-6, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "seed": (0, (1 << 63) - 1),
    "chunk_seconds": (0.05, 60.0),
    "max_patches": (1, MAX_COUNT),
    "dropped": (0, MAX_COUNT),
}
TEMPERATURE_STEP = 0.01
# A character takes at most so many in JSON; the other parameters are short.
JSON_LENGTH = 12
MAX_OTHER_PARAMETERS = 65_536


@dataclass(frozen=True, slots=True)
class Opening:
    """What a session is to be opened with, as `StreamingEngine.open_session` takes it."""

    policy: Policy
    query: str
    sampling: SamplingParams
    max_new_tokens: int
    chunk_seconds: float
    max_patches: int
    previous_text: str
    ladder: Ladder | None


def read_parameters(
    text: str, options: ServeOptions, *, start: bool, end: bool
) -> dict[str, Value]:
    """The parameters of a request, given as Triton hands them over: one JSON object, or nothing.

    Raises ServingError (INVALID_ARGUMENT) for one that is unknown, of a wrong type, out of its
    bounds, or not for this request, and for all of them where they are longer than they can be.
    """
    characters = options.max_query_characters + options.max_previous_text_characters
    if len(text) > JSON_LENGTH * characters + MAX_OTHER_PARAMETERS:
        raise _refusal(
            f"The request's parameters have {len(text)} characters, more than the longest query "
            "and previous text need; make them shorter."
        )
    try:
        given = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise _refusal("The request's parameters are not valid JSON.") from error
    if not isinstance(given, dict):
        raise _refusal("The request's parameters are not an object of names and values.")
    values: dict[str, Value] = {}
    for name, value in given.items():
        if name.startswith(RESERVED_PREFIX):
            continue
        known = contract.parameter(name)
        if known is None:
            names = ", ".join(parameter.name for parameter in contract.PARAMETERS)
            raise _refusal(f"There is no parameter {name[:64]!r}; there are {names}.")
        if (known.moment == "start" and not start) or (known.moment == "end" and not end):
            place = "opens" if known.moment == "start" else "ends"
            raise _refusal(f"The parameter {name} belongs to the request that {place} a session.")
        values[name] = _typed(known, value)
    return values


def read_opening(
    values: Mapping[str, Value],
    *,
    defaults: StreamingDefaults,
    max_patches: int,
    precision: str,
    options: ServeOptions,
) -> Opening:
    """What the parameters of a START request ask for; the bundle's `defaults` fill the rest in.

    `max_patches` is the most the bundle takes a chunk, `precision` that of its language model.
    Raises ServingError: INVALID_ARGUMENT for settings that make no sense, UNSUPPORTED for a
    precision the server does not have.
    """
    _require_precision(str(values.get("precision", "")), precision)
    query = str(values.get("query", defaults.query or ""))
    _require_length("query", query, options.max_query_characters)
    previous = str(values.get("previous_text", ""))
    _require_length("previous_text", previous, options.max_previous_text_characters)
    try:
        return Opening(
            policy=_policy(values, defaults),
            query=query,
            sampling=_sampling(values, default_sampling(defaults)),
            max_new_tokens=int(values.get("max_new_tokens", defaults.max_new_tokens)),
            chunk_seconds=float(values.get("chunk_seconds", defaults.chunk_seconds)),
            max_patches=int(values.get("max_patches", max_patches)),
            previous_text=previous,
            ladder=Ladder.parse(str(values.get("ladder", options.ladder))),
        )
    except FramesinkError as error:
        raise _refusal(str(error)) from error


def require_text(name: str, text: str, most: int) -> None:
    """Raise ServingError unless a text from a client can be encoded and is not too long."""
    _require_length(name, text, most)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refusal(f"{name} is not valid Unicode text.") from error


def _typed(parameter: contract.Parameter, value: object) -> Value:
    name = parameter.name
    if parameter.type == "string" and isinstance(value, str):
        require_text(name, value, MAX_COUNT)
        return value
    if parameter.type == "boolean" and isinstance(value, bool):
        return value
    whole = parameter.type == "integer"
    if parameter.type in ("integer", "number") and _is_number(value, whole=whole):
        least, most = BOUNDS[name]
        assert isinstance(value, int | float)
        if not least <= value <= most:
            raise _refusal(f"{name}={value:g} must be from {least:g} to {most:g}.")
        return value
    raise _refusal(f"{name}={str(value)[:64]!r} must be of type {parameter.type}.")


def _is_number(value: object, *, whole: bool) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return True
    return not whole and isinstance(value, float) and math.isfinite(value)


def _policy(values: Mapping[str, Value], defaults: StreamingDefaults) -> Policy:
    name = str(values.get("policy", "sink"))
    vision_seconds = float(values.get("vision_seconds", defaults.vision_seconds))
    if name == "sliding":
        return SlidingWindow(vision_seconds)
    if name == "full":
        return FullAttention()
    if name != "sink":
        raise _refusal(f"There is no policy {name[:64]!r}; there are sink, sliding and full.")
    return SinkWindow(
        sink_text=int(values.get("sink_text", defaults.sink_text)),
        recent_text=int(values.get("recent_text", defaults.recent_text)),
        vision_seconds=vision_seconds,
        reply_turns=int(values.get("reply_turns", defaults.reply_turns)),
    )


def _sampling(values: Mapping[str, Value], defaults: SamplingParams) -> SamplingParams:
    temperature = float(values.get("temperature", defaults.temperature))
    if 0 < temperature < TEMPERATURE_STEP:
        raise _refusal(f"temperature={temperature:g} must be 0, or at least {TEMPERATURE_STEP:g}.")
    seed = values.get("seed")
    return SamplingParams(
        temperature=temperature,
        top_k=int(values.get("top_k", defaults.top_k)),
        top_p=float(values.get("top_p", defaults.top_p)),
        repetition_penalty=float(values.get("repetition_penalty", defaults.repetition_penalty)),
        seed=None if seed is None else int(seed),
    )


def _require_precision(accepted: str, precision: str) -> None:
    names = [name.strip() for name in accepted.split(",") if name.strip()]
    if names and precision not in names:
        raise ServingError(
            StatusCode.UNSUPPORTED,
            f"The language model here is {precision}, and the client accepts "
            f"{', '.join(names)[:64]} alone.",
        )


def _require_length(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise _refusal(
            f"{name} has {len(text)} characters, but this server takes at most {most}; "
            "make it shorter."
        )


def _refusal(sentence: str) -> ServingError:
    return ServingError(StatusCode.INVALID_ARGUMENT, sentence)
