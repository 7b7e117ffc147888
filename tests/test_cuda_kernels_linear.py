"""Linear layers of codes against float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from reference.triton_device import DEVICE, HAS_GPU
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.activation import silu_and_multiply
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.linear import (
    Gate,
    Weights,
    gated_linear,
    launch,
    linear,
)
from framesink.runtime.executors.cuda.kernels.linear_tiling import Tiling

DTYPES = (torch.bfloat16, torch.float16) if HAS_GPU else (torch.float32,)
# The matrix units of Hopper add FP8 products with fewer than float32's bits: 3e-3 at 18,944 inputs.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 5e-3}
# Rows, channels, depth: one row; a few; a prefill; none of them a multiple of a tile.
SHAPES = [(1, 192, 256), (3, 130, 208), (70, 130, 208)]
if HAS_GPU:
    SHAPES += [
        (1, 4608, 3584),
        (17, 3584, 18944),
        (40, 37888, 3584),
        (64, 512, 256),
        (65, 1000, 3424),
        (200, 3584, 18944),
        (384, 4608, 3584),
        (748, 3584, 18944),  # the library's product, scaled afterwards
        (748, 4608, 3584),
        (2880, 1280, 3424),
    ]
CODE_TYPES = (torch.int8, torch.float8_e4m3fn)


def codes(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((rows, columns), generator=generator)
    if dtype is torch.int8:
        return (values * 40).round().clamp(-128, 127).to(DEVICE, dtype)
    return (values * 100).clamp(-448, 448).to(dtype).to(DEVICE)


def error(result: Tensor, reference: Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm())


def case(
    shape: tuple[int, int, int], code_type: torch.dtype, dtype: torch.dtype, *, biased: bool
) -> tuple[Tensor, Weights, Tensor]:
    """Inputs, weights and the expected output in float64."""
    rows, channels, depth = shape
    inputs = codes(rows, depth, code_type, rows)
    generator = torch.Generator().manual_seed(channels)
    scale = ((torch.rand(channels, generator=generator) + 0.1) * 1e-5).to(DEVICE)
    bias = torch.randn(channels, generator=generator).to(DEVICE, dtype) if biased else None
    weights = Weights(codes(channels, depth, code_type, depth), scale, bias)
    expected = inputs.double() @ weights.weight.double().t() * scale.double()
    return inputs, weights, expected if bias is None else expected + bias.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("code_type", CODE_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_codes(
    shape: tuple[int, int, int], code_type: torch.dtype, dtype: torch.dtype
) -> None:
    for biased in (False, True):
        inputs, weights, expected = case(shape, code_type, dtype, biased=biased)
        for _ in range(2):  # the second finds the counters as the first left them
            out = torch.full(expected.shape, torch.nan, dtype=dtype, device=DEVICE)
            linear(inputs, weights, out)
            assert error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("code_type", CODE_TYPES)
@pytest.mark.parametrize("rows", [5, 37])
@pytest.mark.parametrize("splits", [2, 3])
def test_a_sum_in_parts_is_the_same_every_time(
    splits: int, rows: int, code_type: torch.dtype
) -> None:
    dtype = DTYPES[0]
    inputs, weights, expected = case((rows, 130, 640), code_type, dtype, biased=True)
    tiling = Tiling(channels=64, rows=16, depth=64, splits=splits)
    results = []
    for _ in range(20 if HAS_GPU else 2):
        out = torch.full(expected.shape, torch.nan, dtype=dtype, device=DEVICE)
        launch(inputs, weights, out, tiling)
        results.append(out)
    assert error(results[0], expected) < TOLERANCE[dtype]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("rows", [1, 5, 64, 70])
@pytest.mark.parametrize("code_type", CODE_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_in_one_product(rows: int, code_type: torch.dtype, dtype: torch.dtype) -> None:
    """Bit for bit what the product and the gate are one after the other; the interpreter adds
    floats in another order."""
    step = 0.0 if HAS_GPU or code_type is torch.int8 else 1e-4
    inner = 18944 if HAS_GPU else 96
    for biased in (False, True):
        inputs, weights, _ = case((rows, 2 * inner, 640), code_type, dtype, biased=biased)
        projected = torch.empty((rows, 2 * inner), dtype=dtype, device=DEVICE)
        linear(inputs, weights, projected)
        factors = torch.linspace(0.5, 2.0, inner, device=DEVICE)
        for form in (
            OutputFormat(dtype),
            OutputFormat(torch.int8, 0.02, factors),
            OutputFormat(torch.int8, 0.02),
        ):
            expected, out = torch.zeros((2, rows, inner), dtype=form.dtype, device=DEVICE)
            silu_and_multiply(projected, expected, form)
            gated_linear(inputs, weights, out, form, dtype)
            codes_apart = 1.0 if step and form.dtype is torch.int8 else step
            torch.testing.assert_close(
                out.float(), expected.float(), rtol=step, atol=codes_apart, check_dtype=False
            )
            assert expected.any()


def test_a_gate_of_odd_size_and_in_parts() -> None:
    dtype = DTYPES[0]
    inputs, weights, _ = case((5, 2 * 75, 640), torch.int8, dtype, biased=True)
    projected = torch.empty((5, 150), dtype=dtype, device=DEVICE)
    linear(inputs, weights, projected)
    expected, out = torch.zeros((2, 5, 75), dtype=dtype, device=DEVICE)
    silu_and_multiply(projected, expected, OutputFormat(dtype))
    tiling = Tiling(channels=64, rows=16, depth=128, splits=3)
    launch(inputs, weights, out, tiling, Gate(OutputFormat(dtype), dtype))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("biased", [False, True])
def test_weights_that_are_not_quantized(biased: bool) -> None:
    dtype = DTYPES[0]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn((5, 96), generator=generator).to(DEVICE, dtype)
    weight = torch.randn((64, 96), generator=generator).to(DEVICE, dtype)
    bias = torch.randn(64, generator=generator).to(DEVICE, dtype) if biased else None
    out = torch.full((5, 64), torch.nan, dtype=dtype, device=DEVICE)
    linear(inputs, Weights(weight, bias=bias), out)
    expected = inputs.double() @ weight.double().t()
    assert error(out, expected + bias.double() if bias is not None else expected) < 8e-3


def test_parts_of_more_rows_than_tiles_can_hold_are_refused() -> None:
    inputs, weights, expected = case((129, 130, 640), torch.int8, DTYPES[0], biased=False)
    out = torch.empty(expected.shape, dtype=DTYPES[0], device=DEVICE)
    with pytest.raises(ValueError, match="not 129"):
        launch(inputs, weights, out, Tiling(channels=64, rows=16, depth=64, splits=2))
