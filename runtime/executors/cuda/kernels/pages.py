"""The pages of one layer, as kernels take them, and their codes.

One-byte pages hold words of two codes, which the GPU moves and transposes like 16-bit numbers: the
low byte is channel i of a row, the high byte channel i + D/2, its partner in RoPE.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.models.quantization import CacheScheme

PLACE_BITS = tl.constexpr(21)
_PLACE_MASK = tl.constexpr((1 << 21) - 1)
# `cvt.rn.f16x2.e4m3x2` is there from here on.
_FP8_CONVERSIONS = (8, 9)


@dataclass(frozen=True, slots=True, eq=False)
class PageCodes:
    """What the codes of one-byte pages stand for.

    Keys are code · `key_scale`, float32 `[Hkv, D/2]`, one for both channels of a rotary pair, so
    that it holds under any rotation; values code · `value_scale`, float32 `[Hkv]`. Keys are without
    `key_bias`, float32 `[Hkv, D]`, the bias of their projection, which is accounted for where they
    are read. That takes the rows' `places` (t, h, w), `PLACE_BITS` bits each of an int64,
    `[slots]`, which are the same in every layer.
    """

    scheme: CacheScheme
    key_scale: Tensor
    value_scale: Tensor
    key_bias: Tensor
    places: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerPages:
    """Keys, turned by their places, and values of one layer, head by head, a row per slot.

    Without `codes` they are `[Hkv, slots, D]` in the compute type, keys with the bias of their
    projection. With `codes` they are words int16 `[Hkv, slots, D/2]`, and the projection leaves the
    keys' bias out.
    """

    keys: Tensor
    values: Tensor
    codes: PageCodes | None = None

    @property
    def key_heads(self) -> int:
        """How many heads keys and values have."""
        return int(self.keys.shape[0])

    @property
    def slots(self) -> int:
        """Rows of all pages."""
        return int(self.keys.shape[1])

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return int(self.keys.shape[2]) * (1 if self.codes is None else 2)

    @property
    def scheme(self) -> CacheScheme:
        """How rows are held."""
        return CacheScheme.UNQUANTIZED if self.codes is None else self.codes.scheme


@cache
def converts_in_pairs(device: torch.device, scheme: CacheScheme) -> bool:
    """Whether the GPU turns two codes at a time into float16."""
    if device.type != "cuda":
        return False
    return scheme is CacheScheme.INT8 or (
        torch.cuda.get_device_capability(device) >= _FP8_CONVERSIONS
    )


@triton.jit
def write_row(row, first, second, scale, written, HALF: tl.constexpr, SCHEME: tl.constexpr):
    """Write both halves of a key or a value, float32, to `row` (where it begins, plus the pairs) if
    it is `written`. Returns what now stands there, float32: values, or the numbers that codes are,
    to be multiplied by `scale`."""
    if SCHEME == "16bit":
        first_kept = first.to(row.dtype.element_ty)
        second_kept = second.to(row.dtype.element_ty)
        tl.store(row, first_kept, mask=written)
        tl.store(row + HALF, second_kept, mask=written)
    else:
        first_code = code_of(first / scale, SCHEME)
        second_code = code_of(second / scale, SCHEME)
        tl.store(row, ((second_code << 8) | first_code).to(tl.int16), mask=written)
        first_kept = _number_of(first_code, SCHEME)
        second_kept = _number_of(second_code, SCHEME)
    return first_kept.to(tl.float32), second_kept.to(tl.float32)


@triton.jit
def code_of(value, SCHEME: tl.constexpr):
    """Codes, each in the low byte of an int32, of float32 values that were divided by their scales:
    to the nearest, ties to even, saturating."""
    # Adding 1.5 · 2²³ leaves no bits for a fraction: the sum is rounded to a whole number.
    ROUND: tl.constexpr = 12582912.0
    if SCHEME == "int8":
        # With 128 added, which is how `unpack` wants them.
        code = (tl.clamp(value, -128.0, 127.0) + ROUND - ROUND).to(tl.int32) + 128
    else:
        magnitude = tl.minimum(tl.abs(value), 448.0)
        bits = magnitude.to(tl.int32, bitcast=True)
        # Three bits of mantissa, and an exponent that is less by 120; below 2⁻⁶ whole 2⁻⁹.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = (magnitude * 512.0 + ROUND - ROUND).to(tl.int32)
        code = tl.where(magnitude < 0.015625, small, normal) | tl.where(value < 0.0, 0x80, 0)
    return code


@triton.jit
def unpack(words, SCHEME: tl.constexpr, IN_PAIRS: tl.constexpr):
    """The codes of words as numbers, float16, exactly: the low bytes', and the high bytes'."""
    if IN_PAIRS:
        # A register holds two words; each instruction makes two numbers.
        if SCHEME == "fp8":
            first, second = tl.inline_asm_elementwise(
                """{
                .reg .b16 low, high;
                .reg .b32 t;
                prmt.b32 t, $2, 0, 0x4420;
                cvt.u16.u32 low, t;
                cvt.rn.f16x2.e4m3x2 $0, low;
                prmt.b32 t, $2, 0, 0x4431;
                cvt.u16.u32 high, t;
                cvt.rn.f16x2.e4m3x2 $1, high;
                }""",
                "=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            # 0x64cc is 1024 + cc in float16; what is added is -1152.
            first, second = tl.inline_asm_elementwise(
                """{
                .reg .b32 low, high, offset;
                mov.b32 offset, 0xe480e480;
                prmt.b32 low, $2, 0x64646464, 0x4240;
                prmt.b32 high, $2, 0x64646464, 0x4341;
                add.rn.f16x2 $0, low, offset;
                add.rn.f16x2 $1, high, offset;
                }""",
                "=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        wide = words.to(tl.int32)
        first = _number_of(wide & 0xFF, SCHEME)
        second = _number_of((wide >> 8) & 0xFF, SCHEME)
    return first, second


@triton.jit
def _number_of(code, SCHEME: tl.constexpr):
    """The number a code is, float16, exactly."""
    if SCHEME == "fp8":
        # As float16 the same bits have an exponent that is less by 8.
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        number = bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    else:
        number = (code - 128).to(tl.float16)
    return number.to(tl.float16)


@triton.jit
def positions_of(places, base, end):
    """Positions t, h, w, int32, of rows with `places` and of `base`. What is no row's place leads
    to some position within `[0, end)` all the same."""
    later = places >> PLACE_BITS
    t = (places & _PLACE_MASK).to(tl.int32) + base
    h = (later & _PLACE_MASK).to(tl.int32) + base
    w = (later >> PLACE_BITS).to(tl.int32) + base
    return _within(t, end), _within(h, end), _within(w, end)


@triton.jit
def _within(position, end):
    return tl.minimum(tl.maximum(position, 0), end - 1)


@triton.jit
def packed_place(positions, stride, base):
    """The place of a token whose position on axis a is at `positions` + a · `stride`."""
    t = (tl.load(positions) - base).to(tl.int64)
    h = (tl.load(positions + stride) - base).to(tl.int64)
    w = (tl.load(positions + 2 * stride) - base).to(tl.int64)
    return (((w << PLACE_BITS) | h) << PLACE_BITS) | t
