"""Requests from the network: what they are understood as, and what is refused."""

import json
import math
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framesink.runtime.arrays import AnyArray
from framesink.runtime.manifest import StreamingDefaults
from framesink.runtime.policies import FullAttention, SinkWindow, SlidingWindow
from framesink.runtime.preprocess import Grid, PreprocessConfig
from framesink.runtime.video.chunk import Chunk
from framesink.serving import contract
from framesink.serving.errors import ServingError, StatusCode
from framesink.serving.images import FrameLimits
from framesink.serving.options import ServeOptions
from framesink.serving.parameters import BOUNDS, Opening, read_opening, read_parameters
from framesink.serving.requests import (
    Clock,
    EmbeddedChunk,
    RawRequest,
    SessionRequest,
    prepare_chunk,
    read_request,
    write_refusal,
)

OPTIONS = ServeOptions(
    max_frames=4,
    max_query_characters=20,
    max_question_characters=30,
    max_previous_text_characters=40,
)
CONFIG = PreprocessConfig(min_pixels=28 * 28, max_pixels=56 * 84)
LIMITS = FrameLimits.of(OPTIONS, max_patches=96)
CLOCK = Clock(last_t1=10.0, chunk_seconds=1.0)
DEFAULTS = StreamingDefaults(query="Commentate.", temperature=0.5, max_new_tokens=7)


def raw(
    inputs: Mapping[str, AnyArray] | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    correlation_id: int | str = 7,
    start: bool = False,
    end: bool = False,
) -> RawRequest:
    return RawRequest(correlation_id, start, end, json.dumps(parameters or {}), inputs or {})


def texts(*values: str | bytes) -> AnyArray:
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    return np.array(encoded, dtype=np.object_)


def files(count: int = 2, seed: int = 0) -> AnyArray:
    random = np.random.default_rng(seed)
    frames = random.integers(0, 256, (count, 28, 56, 3), dtype=np.uint8)
    return texts(*[bytes(cv2.imencode(".png", frame)[1]) for frame in frames])


def read(request: RawRequest) -> SessionRequest:
    return read_request(request, OPTIONS)


def prepare(inputs: Mapping[str, AnyArray], clock: Clock = CLOCK, **given: Any) -> Any:
    return prepare_chunk(read(raw(inputs, given)), clock, LIMITS, CONFIG)


def refused(request: RawRequest, code: StatusCode = StatusCode.INVALID_ARGUMENT) -> str:
    with pytest.raises(ServingError) as caught:
        prepare_chunk(read(request), CLOCK, LIMITS, CONFIG)
    assert caught.value.code is code
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert len(sentence) < 400
    assert "\n" not in sentence
    return sentence


def open_with(**parameters: Any) -> Opening:
    values = read_parameters(json.dumps(parameters), OPTIONS, start=True, end=False)
    return read_opening(values, defaults=DEFAULTS, max_patches=96, precision="fp8", options=OPTIONS)


def test_a_request_says_what_it_is() -> None:
    touch = read(raw())
    assert (touch.has_chunk, touch.question, touch.finish) == (False, None, False)
    chunk = read(raw({"FRAMES": files(), "QUESTION": texts("Wo ist er?")}, {"dropped": 3}))
    assert (chunk.has_chunk, chunk.question, chunk.dropped) == (True, "Wo ist er?", 3)
    empty = {"FRAMES": texts(), "RAW_FRAMES": np.zeros((0, 0, 0, 3), np.uint8)}
    assert not read(raw({**empty, "QUESTION": texts(), "TIMESTAMPS": np.zeros(0)})).has_chunk
    assert not read(raw(end=True)).finish
    assert read(raw({}, {"finish": True}, end=True)).finish
    assert read(raw({"QUESTION": texts("Why?")}, end=True)).finish


@pytest.mark.parametrize("correlation_id", [0, -3, "name", ""])
def test_a_session_has_a_number(correlation_id: int | str) -> None:
    assert "whole number above 0" in refused(raw(correlation_id=correlation_id))


def test_the_times_of_a_chunk_are_those_named_or_follow_the_last_one() -> None:
    span, stamps = np.array([12.0, 13.5]), np.array([12.0, 12.75])
    named = prepare({"FRAMES": files(), "CHUNK_SPAN": span, "TIMESTAMPS": stamps})
    assert isinstance(named, Chunk)
    assert (named.t0, named.t1, named.timestamps) == (12.0, 13.5, (12.0, 12.75))
    stamped = prepare({"FRAMES": files(), "TIMESTAMPS": stamps})
    assert (stamped.t0, stamped.t1) == (12.0, 13.0)
    following = prepare({"FRAMES": files()}, dropped=2)
    assert (following.t0, following.t1, following.dropped) == (10.0, 11.0, 2)
    assert following.timestamps == (10.0, 10.5)
    frames = np.zeros((1, 28, 28, 3), np.uint8)
    assert np.array_equal(prepare({"RAW_FRAMES": frames}).frames, frames)


def test_times_that_make_no_sense_are_refused() -> None:
    def times(**tensors: list[float]) -> str:
        arrays = {name: np.array(values, np.float64) for name, values in tensors.items()}
        return refused(raw({"FRAMES": files(), **arrays}))

    assert "holds nan" in times(TIMESTAMPS=[math.nan, 1.0])
    assert "holds inf" in times(CHUNK_SPAN=[1.0, math.inf])
    assert "holds -1" in times(CHUNK_SPAN=[-1.0, 1.0])
    assert "holds 1e+09" in times(TIMESTAMPS=[1e9, 1e9])
    assert "run backwards" in times(TIMESTAMPS=[12.0, 11.0])
    assert "must have two" in times(CHUNK_SPAN=[12.0])
    assert "no length" in times(CHUNK_SPAN=[12.0, 12.0])
    assert "no length" in times(CHUNK_SPAN=[13.0, 12.0])
    assert "before the end of the last one at 10.000" in times(CHUNK_SPAN=[9.0, 10.0])
    assert "before the end of the last one" in times(TIMESTAMPS=[9.0, 9.5])
    assert "at most 16 times" in times(CHUNK_SPAN=[10.0, 50.0])
    assert "2 frames came with 3 timestamps" in times(TIMESTAMPS=[10.0, 10.3, 10.6])
    single = np.array([10.0, 10.5], np.float32)
    assert "FP64" in refused(raw({"FRAMES": files(), "TIMESTAMPS": single}))


def test_frames_that_cannot_be_used_are_refused() -> None:
    frames = np.zeros((2, 28, 28, 3), np.uint8)
    assert "not both" in refused(raw({"FRAMES": files(), "RAW_FRAMES": frames}))
    assert "5 frames, but this server takes 1 to 4" in refused(raw({"FRAMES": files(5)}))
    assert "BYTES" in refused(raw({"FRAMES": np.array(["text"], dtype=np.object_)}))
    assert "BYTES" in refused(raw({"FRAMES": np.zeros(3, np.int32)}))
    assert "neither a JPEG nor a PNG" in refused(raw({"FRAMES": texts(b"hello")}))


def embedded(**changes: AnyArray) -> dict[str, AnyArray]:
    inputs: dict[str, AnyArray] = {
        "EMBEDDINGS": np.zeros((2, 4), np.float32),
        "GRID": np.array([[1, 2, 4]], np.int32),
        "CHUNK": np.array([12.0, 13.0, 2.0]),
    }
    return {**inputs, **changes}


def test_embeddings_come_with_their_grid_and_times() -> None:
    chunk = prepare(embedded())
    assert isinstance(chunk, EmbeddedChunk)
    assert (chunk.grid, chunk.frames, chunk.times.t0) == (Grid(1, 2, 4), 2, 12.0)
    chunk = prepare(embedded(CHUNK=np.array([math.nan, math.nan, 2.0])))
    assert (chunk.times.t0, chunk.times.t1) == (10.0, 11.0)
    chunk = prepare(embedded(CHUNK=np.array([12.5, math.nan, 2.0])))
    assert (chunk.times.t0, chunk.times.t1) == (12.5, 13.5)
    for changes, said in [
        ({"GRID": np.zeros((0, 3), np.int32)}, "need GRID and CHUNK"),
        ({"GRID": np.zeros((2, 3), np.int32)}, "shape"),
        ({"GRID": np.zeros(3, np.int32)}, "shape"),
        ({"CHUNK": np.zeros(0)}, "need GRID and CHUNK"),
        ({"CHUNK": np.array([1.0, 2.0, math.nan])}, "number of frames"),
        ({"CHUNK": np.array([12.0, 13.0, 1e9])}, "number of frames"),
        ({"CHUNK": np.array([12.0, math.inf, 2.0])}, "holds inf"),
        ({"CHUNK": np.array([13.0, 12.0, 2.0])}, "no length"),
        ({"CHUNK": np.array([3.0, 4.0, 2.0])}, "run backwards"),
        ({"FRAMES": files()}, "not both"),
    ]:
        assert said in refused(raw(embedded(**changes)))  # type: ignore[arg-type]


def test_what_preprocess_refuses_is_refused_with_its_status() -> None:
    refusal = write_refusal(ServingError(StatusCode.UNSUPPORTED, "Frames of ü are not taken."))
    request = raw({"REFUSAL": texts(refusal)})
    assert read(request).has_chunk
    assert refused(request, StatusCode.UNSUPPORTED) == "Frames of ü are not taken."
    assert not read(raw({"REFUSAL": texts()})).has_chunk
    for forged in (b"", b"\xff\xff", b"GONE Away.", b"NOT_FOUND"):
        assert "not as preprocess makes it" in refused(raw({"REFUSAL": texts(forged)}))


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (texts("One?", "Two?"), "one by one"),
        (texts(b"\xff\xfe"), "valid UTF-8"),
        (texts("   "), "empty"),
        (texts("Why? " * 7), "35 characters"),
        (np.array([3], np.int64), "BYTES"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(question: AnyArray, said: str) -> None:
    assert said in refused(raw({"QUESTION": question}))


def test_a_session_is_opened_with_what_was_asked_for_and_the_defaults_of_the_bundle() -> None:
    opening = open_with()
    assert opening.policy == SinkWindow(512, 512, 16.0, 16)
    assert (opening.query, opening.previous_text) == ("Commentate.", "")
    assert (opening.max_new_tokens, opening.max_patches) == (7, 96)
    assert opening.sampling.temperature == 0.5
    opening = open_with(
        policy="sink", sink_text=5, vision_seconds=4, reply_turns=3, query="", temperature=0,
        top_k=9, top_p=0.5, repetition_penalty=1.5, seed=11, chunk_seconds=0.5, max_patches=24,
        previous_text="A star.", max_new_tokens=3, precision="int8, fp8",
    )  # fmt: skip
    assert opening.policy == SinkWindow(5, 512, 4.0, 3)
    assert (opening.query, opening.previous_text) == ("", "A star.")
    sampling = opening.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 9, 0.5)
    assert (sampling.repetition_penalty, sampling.seed) == (1.5, 11)
    assert (opening.chunk_seconds, opening.max_patches, opening.max_new_tokens) == (0.5, 24, 3)
    assert open_with(policy="sliding", vision_seconds=5).policy == SlidingWindow(5.0)
    assert open_with(policy="full").policy == FullAttention()


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"policy": "none"}, "no policy 'none'"),
        ({"max_new_token": 3}, "no parameter 'max_new_token'"),
        ({"max_new_tokens": "3"}, "must be of type integer"),
        ({"max_new_tokens": 3.5}, "must be of type integer"),
        ({"max_new_tokens": True}, "must be of type integer"),
        ({"max_new_tokens": 1 << 60}, "must be from 1 to"),
        ({"reply_turns": 1}, "keeps 1 turns"),
        ({"chunk_seconds": 1e-300}, "must be from 0.05"),
        ({"vision_seconds": math.inf}, "must be of type number"),
        ({"temperature": math.nan}, "must be of type number"),
        ({"temperature": 1e-30}, "at least 0.01"),
        ({"temperature": -1}, "must be from 0 to"),
        ({"seed": -1}, "must be from 0"),
        ({"query": 3}, "must be of type string"),
        ({"query": "x" * 21}, "query has 21 characters"),
        ({"query": "\ud800"}, "valid Unicode"),
        ({"previous_text": "x" * 41}, "previous_text has 41 characters"),
        ({"finish": True}, "belongs to the request that ends"),
        ({"dropped": -1}, "must be from 0"),
        ({"query": None}, "must be of type string"),
        ({"query": ["a"]}, "must be of type string"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ServingError, match=said.replace("(", r"\(")) as caught:
        open_with(**parameters)
    assert caught.value.code is StatusCode.INVALID_ARGUMENT
    assert str(caught.value).endswith(".")


def test_a_precision_the_client_does_not_accept_is_unsupported() -> None:
    with pytest.raises(ServingError, match="is fp8, and the client accepts fp16, bf16") as caught:
        open_with(precision="fp16, bf16")
    assert caught.value.code is StatusCode.UNSUPPORTED


def test_parameters_belong_to_their_requests() -> None:
    with pytest.raises(ServingError, match="belongs to the request that opens"):
        read(raw({}, {"query": "Look."}))
    read(raw({}, {"triton_enable_empty_final_response": True}))
    for text in ("[1]", "{", "3", '{"a": ' * 10_000):
        with pytest.raises(ServingError, match="parameters are not"):
            read_parameters(text, OPTIONS, start=True, end=False)
    with pytest.raises(ServingError, match="make them shorter"):
        read_parameters(json.dumps({"query": "x" * 1_000_000}), OPTIONS, start=True, end=False)
    longest = json.dumps({"query": "\U0001f600" * 20, "previous_text": "\U0001f600" * 40})
    assert len(read_parameters(longest, OPTIONS, start=True, end=False)) == 2
    assert read_parameters("", OPTIONS, start=True, end=False) == {}


def test_every_number_of_the_contract_is_bounded() -> None:
    numbers = {p.name for p in contract.PARAMETERS if p.type in ("integer", "number")}
    assert numbers == set(BOUNDS)


ARRAYS = st.one_of(
    st.lists(st.floats(width=64), max_size=4).map(lambda v: np.array(v, np.float64)),
    st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=4).map(
        lambda v: np.array(v, np.int32)
    ),
    st.lists(st.binary(max_size=12), max_size=3).map(lambda v: texts(*v)),
    st.tuples(*[st.integers(0, 3)] * 4).map(lambda s: np.zeros(s, np.uint8)),
    st.tuples(st.integers(0, 2), st.integers(0, 4)).map(lambda s: np.zeros(s, np.int32)),
    st.just(np.array(3.0)),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
NAMES = st.sampled_from([parameter.name for parameter in contract.PARAMETERS])


@given(
    inputs=st.dictionaries(
        st.sampled_from([tensor.name for tensor in contract.model("language_model").inputs]),
        ARRAYS,
        max_size=5,
    ),
    parameters=st.dictionaries(NAMES, JSON, max_size=3),
    number=st.integers() | st.text(max_size=3),
    flags=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=300, deadline=None)
def test_whatever_comes_is_understood_or_refused(
    inputs: dict[str, AnyArray],
    parameters: dict[str, Any],
    number: int | str,
    flags: tuple[bool, bool],
) -> None:
    """Nothing but a ServingError comes out of any request."""
    start, end = flags
    request = RawRequest(number, start, end, json.dumps(parameters), inputs)
    try:
        understood = read(request)
        if start:
            read_opening(
                understood.parameters,
                defaults=DEFAULTS,
                max_patches=96,
                precision="fp8",
                options=OPTIONS,
            )
        if understood.has_chunk:
            prepare_chunk(understood, CLOCK, LIMITS, CONFIG)
    except ServingError as error:
        assert str(error).endswith(".")  # noqa: PT017
