"""Number formats against plain loops and against ONNX Runtime's QuantizeLinear."""

import math
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from framesink.calibration.formats import (
    FP8,
    INT4,
    INT8,
    SMALLEST_AMAX,
    NumberFormat,
    clamp_dead,
    clipping_error,
    dequantize,
    expand_groups,
    group_amax,
    pack_int4,
    quantize,
    row_amax,
    scale_of,
    unpack_int4,
)

FORMATS = (FP8, INT8, INT4)
ONNX_TYPES = {
    "fp8": TensorProto.FLOAT8E4M3FN,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
}
finite = st.floats(-1e4, 1e4, width=32)
scales = st.floats(2.0**-20, 2.0**10, width=32)


def representable(number_format: NumberFormat) -> list[Fraction]:
    """Every number the format has, from the definition of its bits."""
    if number_format.is_integer:
        return [Fraction(code) for code in range(int(number_format.lowest), 1)] + [
            Fraction(code) for code in range(1, int(number_format.highest) + 1)
        ]
    numbers = set()
    for bits in range(127):  # S.1111.111 is NaN
        exponent, mantissa = bits >> 3, bits & 7
        number = (
            Fraction(mantissa, 8) * Fraction(1, 64)
            if exponent == 0
            else Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)
        )
        numbers |= {number, -number}
    return sorted(numbers)


@pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f.name)
@given(values=arrays(np.float32, 8, elements=finite), scale=scales)
def test_codes_are_the_nearest_numbers_of_the_format(
    number_format: NumberFormat, values: np.ndarray, scale: float
) -> None:
    numbers = representable(number_format)
    codes = quantize(values, scale, number_format).astype(np.float64)
    for value, code in zip(values / np.float32(scale), codes, strict=True):
        target = min(max(Fraction(float(value)), numbers[0]), numbers[-1])
        nearest = min(abs(target - number) for number in numbers)
        assert abs(target - Fraction(code)) == nearest


@cache
def onnx_session(name: str) -> onnxruntime.InferenceSession:
    """QuantizeLinear to the format and DequantizeLinear back, per tensor."""
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["code"]),
            helper.make_node("DequantizeLinear", ["code", "scale", "zero"], ["y"]),
        ],
        "round_trip",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor("zero", ONNX_TYPES[name], [], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    # Otherwise the pair might be optimised away.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f.name)
@settings(max_examples=60)
@given(values=arrays(np.float32, 64, elements=finite), scale=scales)
def test_a_round_trip_is_onnx_runtimes(
    number_format: NumberFormat, values: np.ndarray, scale: float
) -> None:
    scale_array = np.array(scale, dtype=np.float32)
    (expected,) = onnx_session(number_format.name).run(None, {"x": values, "scale": scale_array})
    found = dequantize(quantize(values, scale, number_format), scale)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("number_format", [INT8, INT4], ids=lambda f: f.name)
def test_integer_ties_go_to_the_even_code(number_format: NumberFormat) -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], dtype=np.float32)
    assert quantize(values, 1.0, number_format).tolist() == [0, 2, 2, 0, -2, -2]


def test_fp8_saturates_and_never_overflows_into_nan() -> None:
    values = np.array([449.0, 1e30, -1e30, np.inf, -np.inf], dtype=np.float32)
    codes = quantize(values, 1.0, FP8)
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    assert codes.astype(np.float32).tolist() == [448.0, 448.0, -448.0, 448.0, -448.0]


@pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f.name)
@given(weight=arrays(np.float32, (3, 16), elements=finite))
def test_an_absmax_scale_bounds_the_error_of_each_row(
    number_format: NumberFormat, weight: np.ndarray
) -> None:
    amax, _ = clamp_dead(row_amax(weight))
    scale = scale_of(amax, number_format)[:, None]
    error = np.abs(dequantize(quantize(weight, scale, number_format), scale) - weight)
    if number_format.is_integer:
        bound = np.broadcast_to(0.5 * scale, weight.shape)
    else:  # three bits of mantissa, and subnormals of 2^-9
        bound = np.maximum(np.abs(weight) * 2.0**-4, scale * 2.0**-10)
    assert np.all(error <= bound * 1.0001)


def test_dead_channels_are_raised_and_counted() -> None:
    amax, dead = clamp_dead(np.array([0.0, 1e-9, SMALLEST_AMAX, 2.0], dtype=np.float32))
    assert dead == 2
    assert amax.tolist() == [SMALLEST_AMAX, SMALLEST_AMAX, SMALLEST_AMAX, 2.0]
    for number_format in FORMATS:
        assert np.all(scale_of(amax, number_format).astype(np.float16) > 0)


@given(
    weight=arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=finite),
    group=st.integers(1, 10),
)
def test_group_maxima_are_those_of_a_loop(weight: np.ndarray, group: int) -> None:
    amax = group_amax(weight, group)
    rows, inputs = weight.shape
    assert amax.shape == (rows, math.ceil(inputs / group))
    for row in range(rows):
        for number in range(amax.shape[1]):
            members = weight[row, number * group : (number + 1) * group]
            assert amax[row, number] == max(abs(float(member)) for member in members)
    expanded = expand_groups(amax, group, inputs)
    assert expanded.shape == weight.shape
    assert np.all(np.abs(weight) <= expanded)


@given(codes=arrays(np.int8, st.tuples(st.integers(1, 5), st.just(6)), elements=st.integers(-8, 7)))
def test_int4_codes_pack_low_nibble_first_as_onnx_stores_them(codes: np.ndarray) -> None:
    packed = pack_int4(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == (len(codes), 3)
    tensor = helper.make_tensor("codes", TensorProto.INT4, codes.shape, packed.tobytes(), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), codes)
    np.testing.assert_array_equal(unpack_int4(packed), codes)


@given(values=arrays(np.float32, 32, elements=finite), amax=st.floats(0.1, 1e4))
def test_the_clipping_error_is_that_of_a_loop(values: np.ndarray, amax: float) -> None:
    scale = np.float32(amax) / np.float32(127)
    total = 0.0
    for value in values:
        code = min(max(round(float(np.float32(value / scale))), -128), 127)
        total += (float(value) - code * float(scale)) ** 2
    assert clipping_error(values, amax, INT8) == pytest.approx(total / 32, rel=1e-3, abs=1e-6)


def test_counts_weigh_the_clipping_error() -> None:
    values = np.array([0.3, 0.3, 0.3, 9.0], dtype=np.float32)
    distinct, counts = np.unique(values, return_counts=True)
    for amax in (1.0, 9.0):
        assert clipping_error(distinct, amax, FP8, counts) == pytest.approx(
            clipping_error(values, amax, FP8)
        )


def test_clipping_rare_outliers_can_pay() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    values[0] = 20.0
    assert clipping_error(values, 8.0, INT8) < clipping_error(values, 20.0, INT8)
