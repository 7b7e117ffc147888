"""Norms, activations and codes against the same in float64.

On a GPU in 16 bits; without one in Triton's interpreter, in float32 and without FP8, which it
rounds wrongly where the exponent changes.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference.triton_device import DEVICE, HAS_GPU
from torch import Tensor

from framesink.calibration.formats import FP8, INT8, NumberFormat, quantize
from framesink.runtime.executors.cuda.kernels import activation
from framesink.runtime.executors.cuda.kernels.activation import silu_and_multiply
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.normalization import rms_norm

DTYPES = (torch.bfloat16, torch.float16) if HAS_GPU else (torch.float32,)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 256), (3, 3584), (5, 1000)]
NEEDS_GPU = pytest.mark.skipif(not HAS_GPU, reason="Triton's interpreter rounds FP8 wrongly")
FORMATS = [
    (torch.int8, INT8),
    pytest.param(torch.float8_e4m3fn, FP8, marks=NEEDS_GPU),
]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def error(result: Tensor, reference: Tensor) -> float:
    difference = result.double().cpu() - reference.double().cpu()
    return float(difference.norm() / reference.double().norm().cpu())


def normed(hidden: Tensor, weight: Tensor) -> Tensor:
    wide = hidden.double()
    return wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_of_a_sum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    hidden, delta = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight = random(shape[1], dtype=dtype, seed=2)
    total = hidden + delta
    out = torch.full_like(hidden, torch.nan)
    rms_norm(hidden, weight, 1e-6, out, OutputFormat(dtype), delta)
    assert torch.equal(hidden, total)
    assert error(out, normed(total, weight)) < TOLERANCE[dtype]
    rms_norm(hidden, weight, 1e-6, out, OutputFormat(dtype))
    assert torch.equal(hidden, total)
    assert error(out, normed(total, weight)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gate(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = random(shape[0], 2 * shape[1], dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    out = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    silu_and_multiply(gate_up, out, OutputFormat(dtype))
    assert error(out, gate / (1 + (-gate).exp()) * up) < TOLERANCE[dtype]


def expected_codes(
    values: Tensor, output_format: OutputFormat, number_format: NumberFormat
) -> Tensor:
    """Codes as calibration makes them, widened."""
    wide = values.float().cpu()
    if output_format.smoothing is not None:
        wide = wide * output_format.smoothing.float().cpu()
    codes = quantize(wide.numpy(), output_format.scale, number_format)
    return torch.from_numpy(codes.astype(np.float32))


def assert_same_codes(codes: Tensor, expected: Tensor) -> None:
    """All but a few that lie on the border of two; those differ by one."""
    found = codes.float().cpu()
    assert torch.isfinite(found).all()
    differ = found != expected
    assert differ.float().mean() < 2e-3
    assert ((found - expected).abs()[differ] <= expected.abs()[differ].clamp(min=8) / 8).all()


@pytest.mark.parametrize(("code_type", "number_format"), FORMATS)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_every_kernel(
    dtype: torch.dtype, smooth: bool, code_type: torch.dtype, number_format: NumberFormat
) -> None:
    rows, size = 5, 1000
    smoothing = random(size, dtype=torch.float32, seed=5).abs() + 0.5 if smooth else None
    # Some values are beyond the highest code.
    output_format = OutputFormat(code_type, 2.0 / (127 if code_type is torch.int8 else 448))
    output_format = OutputFormat(code_type, output_format.scale, smoothing)
    plain = OutputFormat(dtype)
    values = random(rows, 2 * size, dtype=dtype)
    hidden, weight = values[:, :size].contiguous(), random(size, dtype=dtype, seed=3)
    kernels: list[Callable[[Tensor, OutputFormat], None]] = [
        lambda out, form: activation.quantize(hidden, out, form),
        lambda out, form: silu_and_multiply(values, out, form),
        lambda out, form: rms_norm(hidden, weight, 1e-6, out, form),
    ]
    for kernel in kernels:
        unquantized = torch.empty((rows, size), dtype=dtype, device=DEVICE)
        kernel(unquantized, plain)
        codes = torch.empty((rows, size), dtype=code_type, device=DEVICE)
        kernel(codes, output_format)
        expected = expected_codes(unquantized, output_format, number_format)
        assert expected.max() == number_format.highest
        assert_same_codes(codes, expected)
