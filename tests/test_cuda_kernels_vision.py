"""The vision encoder's kernels against the same in float64."""

import numpy as np
import pytest
import torch
from reference.triton_device import DEVICE, HAS_GPU
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.activation import quantize
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.vision_attention import rotate_heads, window_attention

DTYPES = (torch.bfloat16, torch.float16) if HAS_GPU else (torch.float32,)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HEADS = 16 if HAS_GPU else 3
WINDOWS = [[64] * 45, [64, 32, 64, 8, 4, 16, 1, 64], [4], [12, 16, 16]]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def error(result: Tensor, reference: Tensor) -> float:
    difference = result.double().cpu() - reference.double().cpu()
    return float(difference.norm() / reference.double().norm().cpu())


def rotated(qkv: Tensor, angles: Tensor, heads: int) -> Tensor:
    """Float64 `[n, 3, heads, D]`, values as they are."""
    rows = qkv.double().view(len(qkv), 3, heads, 2, -1)
    turned = torch.complex(rows[:, :2, :, 0], rows[:, :2, :, 1])
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    result = rows.clone()
    result[:, :2, :, 0], result[:, :2, :, 1] = turned.real, turned.imag
    return result.flatten(3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_heads(dtype: torch.dtype) -> None:
    heads, half = 3, 40
    qkv = random(7, 3 * heads * 2 * half, dtype=dtype)
    angles = torch.arange(7 * half, device=DEVICE).view(7, half).double()
    expected = rotated(qkv, angles, heads)
    rotate_heads(qkv, angles.cos().float(), angles.sin().float(), heads)
    assert error(qkv, expected.flatten(1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("half", [40, 16, 10])
@pytest.mark.parametrize("sizes", WINDOWS if HAS_GPU else WINDOWS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_within_windows(dtype: torch.dtype, sizes: list[int], half: int) -> None:
    count = sum(sizes)
    qkv = random(count, 3 * HEADS * 2 * half, dtype=dtype)
    given = qkv.clone()
    angles = random(count, half, dtype=torch.float64, seed=1) * 3
    starts = torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32, device=DEVICE)
    out = torch.full((count, HEADS * 2 * half), torch.nan, dtype=dtype, device=DEVICE)
    cos, sin = angles.cos().float(), angles.sin().float()
    window_attention(qkv, cos, sin, starts, max(sizes), HEADS, out, OutputFormat(dtype))
    assert torch.equal(qkv, given)
    query, key, value = rotated(qkv, angles, HEADS).unbind(1)
    for window in torch.split(torch.arange(count, device=DEVICE), sizes):
        scores = torch.einsum("ihd,jhd->hij", query[window], key[window]) * (2 * half) ** -0.5
        expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value[window]).flatten(1)
        assert error(out[window], expected) < TOLERANCE[dtype]

    for scale, smoothing in ((0.02, None), (0.03, random(out.shape[1], dtype=torch.float32).abs())):
        form = OutputFormat(torch.int8, scale, smoothing)
        codes, expected_codes = (torch.empty_like(out, dtype=torch.int8) for _ in range(2))
        window_attention(qkv, cos, sin, starts, max(sizes), HEADS, codes, form)
        quantize(out, expected_codes, form)
        assert torch.equal(codes, expected_codes)
