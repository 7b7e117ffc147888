"""What may be watched in a torch forward, and what may be changed in it.

Linear layers go by the canonical names of their weights without `.weight`
(`framesink.runtime.models.weights`). Only rows of real tokens and patches are ever passed on.
"""

from typing import Protocol, TypeAlias

from torch import Tensor
from torch.nn import functional

# Cosines and sines `[n, D/2]` of n tokens: pair j is the channels j and j + D/2.
Rotary: TypeAlias = tuple[Tensor, Tensor]


class Taps(Protocol):
    """Watches. Tensors must neither be kept nor changed; `layer` counts decoder layers."""

    def linear_input(self, name: str, inputs: Tensor) -> None:
        """`inputs [n, in]` are about to go through the linear layer `name`."""
        ...

    def keys(self, layer: int, keys: Tensor, rotated: Tensor) -> None:
        """New keys `[n, Hkv, D]`: before RoPE and without the projection's bias, as they are
        stored, and `rotated`: after RoPE and with it."""
        ...

    def values(self, layer: int, values: Tensor) -> None:
        """New values `[n, Hkv, D]`, with the projection's bias."""
        ...


class Numerics(Protocol):
    """The arithmetic that quantization changes. An implementation that calculates as the quantized
    graphs do makes the same forward a simulation of them."""

    def linear(self, name: str, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`inputs [n, in]` through `weight [out, in]` and `bias [out]`: `[n, out]`."""
        ...

    def stored_keys(self, layer: int, keys: Tensor, bias: Tensor, rotary: Rotary) -> Tensor:
        """What the cache gives back for `keys [n, Hkv, D]` (before RoPE, without bias).

        `bias [Hkv, D]` is added and `rotary` turns them when they are read, as long as their
        positions do not change; both are here for caches that store keys in another form.
        """
        ...

    def stored_values(self, layer: int, values: Tensor) -> Tensor:
        """What the cache gives back for `values [n, Hkv, D]`."""
        ...


class PlainNumerics:
    """Calculates in the executor's type, unquantized. See `Numerics`."""

    def linear(
        self,
        name: str,  # noqa: ARG002
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """A plain linear layer."""
        return functional.linear(inputs, weight, bias)

    def stored_keys(
        self,
        layer: int,  # noqa: ARG002
        keys: Tensor,
        bias: Tensor,  # noqa: ARG002
        rotary: Rotary,  # noqa: ARG002
    ) -> Tensor:
        """The keys themselves."""
        return keys

    def stored_values(self, layer: int, values: Tensor) -> Tensor:  # noqa: ARG002
        """The values themselves."""
        return values


class SwitchedNumerics:
    """Calculates as `active` does, so that one executor can simulate one thing after another. See
    `Numerics`."""

    def __init__(self) -> None:
        self.active: Numerics = PlainNumerics()

    def linear(self, name: str, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Numerics`."""
        return self.active.linear(name, inputs, weight, bias)

    def stored_keys(self, layer: int, keys: Tensor, bias: Tensor, rotary: Rotary) -> Tensor:
        """See `Numerics`."""
        return self.active.stored_keys(layer, keys, bias, rotary)

    def stored_values(self, layer: int, values: Tensor) -> Tensor:
        """See `Numerics`."""
        return self.active.stored_values(layer, values)
