"""The vision encoder's kernels against the same in float64."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from reference.triton_device import DEVICE, HAS_GPU
from torch import Tensor

from framesink.runtime.arrays import Float32Array, UInt8Array
from framesink.runtime.executors.cuda.kernels.activation import quantize
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.frames import frames_to_patches
from framesink.runtime.executors.cuda.kernels.vision_attention import rotate_heads, window_attention
from framesink.runtime.executors.cuda.patches import Patchifier
from framesink.runtime.preprocess import Grid, PreprocessConfig, patchify

DTYPES = (torch.bfloat16, torch.float16) if HAS_GPU else (torch.float32,)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HEADS = 16 if HAS_GPU else 3
# OpenCV's cubic filter has whole weights where it is built without IPP.
CUBIC_MAY_DIFFER = 1e-3 if cv2.ipp.useIPP() else 0.1
WINDOWS = [[64] * 45, [64, 32, 64, 8, 4, 16, 1, 64], [4], [12, 16, 16]]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def error(result: Tensor, reference: Tensor) -> float:
    difference = result.double().cpu() - reference.double().cpu()
    return float(difference.norm() / reference.double().norm().cpu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_heads(dtype: torch.dtype) -> None:
    heads, half = 3, 40
    qkv = random(7, 3 * heads * 2 * half, dtype=dtype)
    angles = torch.arange(7 * half, device=DEVICE).view(7, half).double()
    rows = qkv.double().view(len(qkv), 3, heads, 2, -1)
    turned = torch.complex(rows[:, :2, :, 0], rows[:, :2, :, 1])
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    expected = rows.clone()
    expected[:, :2, :, 0], expected[:, :2, :, 1] = turned.real, turned.imag
    rotate_heads(qkv, angles.cos().float(), angles.sin().float(), heads)
    assert error(qkv, expected.flatten(1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [80, 32, 20])
@pytest.mark.parametrize("sizes", WINDOWS if HAS_GPU else WINDOWS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_within_windows(dtype: torch.dtype, sizes: list[int], head_dim: int) -> None:
    count = sum(sizes)
    qkv = random(count, 3 * HEADS * head_dim, dtype=dtype)
    given = qkv.clone()
    starts = torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32, device=DEVICE)
    out = torch.full((count, HEADS * head_dim), torch.nan, dtype=dtype, device=DEVICE)
    window_attention(qkv, starts, max(sizes), HEADS, out, OutputFormat(dtype))
    assert torch.equal(qkv, given)
    query, key, value = qkv.double().view(count, 3, HEADS, head_dim).unbind(1)
    for window in torch.split(torch.arange(count, device=DEVICE), sizes):
        scores = torch.einsum("ihd,jhd->hij", query[window], key[window]) * head_dim**-0.5
        expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value[window]).flatten(1)
        assert error(out[window], expected) < TOLERANCE[dtype]

    for scale, smoothing in ((0.02, None), (0.03, random(out.shape[1], dtype=torch.float32).abs())):
        form = OutputFormat(torch.int8, scale, smoothing)
        codes, expected_codes = (torch.empty_like(out, dtype=torch.int8) for _ in range(2))
        window_attention(qkv, starts, max(sizes), HEADS, codes, form)
        quantize(out, expected_codes, form)
        assert torch.equal(codes, expected_codes)


def host_patches(frames: UInt8Array, size: tuple[int, int]) -> tuple[Float32Array, Grid]:
    """Patches of one chunk, resized to `size` by OpenCV."""
    shrinks = size[0] * size[1] < frames.shape[1] * frames.shape[2]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    resized = [cv2.resize(frame, size[::-1], interpolation=how) for frame in frames]
    return patchify(np.stack(resized), PreprocessConfig())


def device_patches(frames: UInt8Array, grid: Grid) -> Float32Array:
    """Patches of chunks `[N, T, H, W, 3]`, by the kernel."""
    config = PreprocessConfig()
    shape = (len(frames) * grid.patches, config.patch_dim)
    out = torch.full(shape, torch.nan, device=DEVICE)
    operations = SimpleNamespace(frames_to_patches=frames_to_patches)
    patchifier = Patchifier(config, operations, torch.device(DEVICE))  # type: ignore[arg-type]
    patchifier.fill(torch.from_numpy(frames).to(DEVICE), grid, out)
    return out.cpu().numpy()


def drawn_frames(*shape: int) -> UInt8Array:
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


def drawn_sizes(count: int) -> list[tuple[int, int]]:
    random = np.random.default_rng(1)
    return [(int(h), int(w)) for h, w in random.integers(15, 120, (count, 2))]


# Twice and three times the size, larger and smaller on one side, and sizes at random.
SOURCES = [(56, 112), (84, 168), (24, 80), (40, 50), (28, 60), (35, 60), (20, 30)]


@pytest.mark.parametrize("source", SOURCES + drawn_sizes(60 if HAS_GPU else 3))
def test_frames_are_resized_as_the_host_does(source: tuple[int, int]) -> None:
    """Against OpenCV, in levels of 8 bits: mostly the same, never two apart."""
    target = (28, 56)
    frames = drawn_frames(1, *source)
    expected, grid = host_patches(frames, target)
    deviation = np.repeat(PreprocessConfig().std, expected.shape[1] // 3)
    levels = np.abs(device_patches(frames[None], grid) - expected) * 255 * deviation
    cubic = target[0] * target[1] >= source[0] * source[1]
    assert levels.max() < 1.01
    assert (levels > 0.5).mean() < (CUBIC_MAY_DIFFER if cubic else 1e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_patches_of_several_chunks(count: int) -> None:
    """Frames that need no resizing, bit for bit; a missing frame is the last of its own chunk."""
    frames = drawn_frames(2, count, 56, 84)
    expected = [host_patches(chunk, (56, 84)) for chunk in frames]
    found = device_patches(frames, expected[0][1])
    assert np.array_equal(found, np.concatenate([patches for patches, _ in expected]))
