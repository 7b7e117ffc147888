"""What a quantized K/V cache gives back, in the forms that can be chosen for keys.

Keys come as the projection makes them: before RoPE, without bias. Every form returns them that way,
so that the same attention reads all of them. A form that stores rotated keys rotates them by the
position they are written at and back again; that later evictions move them costs it nothing here.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from framesink.calibration.fake_rounding import fake_quantize
from framesink.calibration.formats import NumberFormat
from framesink.calibration.taps import Rotary
from framesink.calibration.torch_layers import rotate
from framesink.runtime.arrays import Float32Array


class KeyForm(Protocol):
    """One way to store the keys of one layer."""

    def stored(
        self, keys: Tensor, bias: Tensor, rotary: Rotary, number_format: NumberFormat
    ) -> Tensor:
        """What is read back for `keys [n, Hkv, D]`; see `Numerics.stored_keys`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class KeysPerChannel:
    """framesink's graphs: before RoPE, without bias, `scale` float32 `[Hkv·D]` per channel."""

    scale: Float32Array

    def stored(
        self,
        keys: Tensor,
        bias: Tensor,  # noqa: ARG002
        rotary: Rotary,  # noqa: ARG002
        number_format: NumberFormat,
    ) -> Tensor:
        """See `KeyForm`."""
        scale = torch.tensor(self.scale).to(keys).view(keys.shape[1:])
        return fake_quantize(keys, scale, number_format)


@dataclass(frozen=True, slots=True, eq=False)
class KeysPerPair:
    """For executors that store rotated keys: after RoPE, without bias, `scale` float32
    `[Hkv·D/2]` per rotary pair, whose norm bounds both of its channels under any rotation."""

    scale: Float32Array

    def stored(
        self,
        keys: Tensor,
        bias: Tensor,  # noqa: ARG002
        rotary: Rotary,
        number_format: NumberFormat,
    ) -> Tensor:
        """See `KeyForm`."""
        pairs = torch.tensor(self.scale).to(keys).view(keys.shape[1], -1)
        scale = torch.cat([pairs, pairs], dim=-1)
        return _turn_back(fake_quantize(rotate(keys, rotary), scale, number_format), rotary)


@dataclass(frozen=True, slots=True)
class KeysPerTensorRotated:
    """The usual form: after RoPE, with bias, one `scale` for all."""

    scale: float

    def stored(
        self, keys: Tensor, bias: Tensor, rotary: Rotary, number_format: NumberFormat
    ) -> Tensor:
        """See `KeyForm`."""
        rotated = rotate(keys + bias, rotary)
        return _turn_back(fake_quantize(rotated, self.scale, number_format), rotary) - bias


@dataclass(frozen=True, slots=True, eq=False)
class KeysPerChannelWithBias:
    """As `KeysPerChannel`, but with the projection's bias in what is quantized."""

    scale: Float32Array

    def stored(
        self,
        keys: Tensor,
        bias: Tensor,
        rotary: Rotary,  # noqa: ARG002
        number_format: NumberFormat,
    ) -> Tensor:
        """See `KeyForm`."""
        scale = torch.tensor(self.scale).to(keys).view(keys.shape[1:])
        return fake_quantize(keys + bias, scale, number_format) - bias


@dataclass(frozen=True, slots=True, eq=False)
class FakeCache:
    """A quantized cache: per layer a form for keys, and scales float32 `[Hkv]` (one per head) or
    `[1]` (one for all) for values."""

    number_format: NumberFormat
    key_forms: tuple[KeyForm, ...]
    value_scales: tuple[Float32Array, ...]

    def keys(self, layer: int, keys: Tensor, bias: Tensor, rotary: Rotary) -> Tensor:
        """See `Numerics.stored_keys`."""
        return self.key_forms[layer].stored(keys, bias, rotary, self.number_format)

    def values(self, layer: int, values: Tensor) -> Tensor:
        """See `Numerics.stored_values`."""
        scale = torch.tensor(self.value_scales[layer]).to(values).view(-1, 1)
        return fake_quantize(values, scale, self.number_format)


def _turn_back(rotated: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = rotary
    return rotate(rotated, (cos, -sin))
