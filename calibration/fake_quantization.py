"""Quantized arithmetic simulated in torch: values are rounded to codes and back, products are not.

This is the definition that quantized graphs must agree with: QuantizeLinear, DequantizeLinear and a
product of the dequantized values. The code of a value depends on its scale alone, so what differs
between readers is the order in which products are summed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from framesink.calibration.fake_cache import FakeCache
from framesink.calibration.fake_rounding import fake_quantize, scales
from framesink.calibration.formats import FP8, INT4, INT8
from framesink.calibration.taps import PlainNumerics, Rotary
from framesink.calibration.torch_weights import KEPT_BYTES
from framesink.runtime.arrays import Float32Array
from framesink.runtime.models.quantization import INT4_GROUP, LinearScheme

_WEIGHT_FORMATS = {
    LinearScheme.FP8: FP8,
    LinearScheme.INT8: INT8,
    LinearScheme.INT8_WEIGHT_ONLY: INT8,
    LinearScheme.INT4_WEIGHT_ONLY: INT4,
}


@dataclass(frozen=True, slots=True, eq=False)
class FakeLinear:
    """How one linear layer is quantized.

    `input_scale` is there for W8A8 schemes. `pre_quant_scale` float32 `[in]` multiplies inputs
    before they are quantized, and divides the weight's columns (SmoothQuant, arXiv 2211.10438).
    Weights are scaled by the largest magnitude of each output channel, for INT4 of each
    `int4_group` inputs of it.
    """

    scheme: LinearScheme
    input_scale: float | None = None
    pre_quant_scale: Float32Array | None = None
    int4_group: int = INT4_GROUP

    def weight(self, weight: Tensor) -> Tensor:
        """The weight `[out, in]` after quantization in float32, for smoothed inputs."""
        weight = weight.float()
        if self.pre_quant_scale is not None:
            weight = weight / self._smoothing(weight)
        number_format = _WEIGHT_FORMATS[self.scheme]
        int4 = self.scheme is LinearScheme.INT4_WEIGHT_ONLY
        groups = torch.split(weight, self.int4_group if int4 else weight.shape[1], dim=1)
        rounded = [
            fake_quantize(
                group, scales(group.abs().amax(dim=1, keepdim=True), number_format), number_format
            )
            for group in groups
        ]
        return torch.cat(rounded, dim=1)

    def inputs(self, inputs: Tensor) -> Tensor:
        """Inputs `[n, in]` after smoothing and quantization."""
        if self.pre_quant_scale is not None:
            inputs = inputs * self._smoothing(inputs)
        if self.input_scale is None:
            return inputs
        return fake_quantize(inputs, self.input_scale, _WEIGHT_FORMATS[self.scheme])

    def _smoothing(self, like: Tensor) -> Tensor:
        return torch.tensor(self.pre_quant_scale).to(like)


class FakeQuantization(PlainNumerics):
    """`Numerics` of a quantized model over its 16-bit checkpoint.

    Each weight is quantized when it is first used, and kept as `TorchWeights` keeps weights: in
    the processor's memory only as many as a small model has.
    """

    def __init__(self, linears: Mapping[str, FakeLinear], cache: FakeCache | None = None) -> None:
        """`linears` goes by canonical names without `.weight`; others stay as they are."""
        self._linears = linears
        self._cache = cache
        self._weights: dict[str, Tensor] = {}
        self._kept_bytes = 0

    def linear(self, name: str, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Numerics`."""
        fake = self._linears.get(name)
        if fake is None or fake.scheme is LinearScheme.UNQUANTIZED:
            return functional.linear(inputs, weight, bias)
        return functional.linear(fake.inputs(inputs), self._weight(name, fake, weight), bias)

    def stored_keys(self, layer: int, keys: Tensor, bias: Tensor, rotary: Rotary) -> Tensor:
        """See `Numerics`."""
        return keys if self._cache is None else self._cache.keys(layer, keys, bias, rotary)

    def stored_values(self, layer: int, values: Tensor) -> Tensor:
        """See `Numerics`."""
        return values if self._cache is None else self._cache.values(layer, values)

    def _weight(self, name: str, fake: FakeLinear, weight: Tensor) -> Tensor:
        if name in self._weights:
            return self._weights[name]
        quantized = fake.weight(weight).to(weight.dtype)
        if quantized.device.type != "cpu" or self._kept_bytes + quantized.nbytes <= KEPT_BYTES:
            self._weights[name] = quantized
            self._kept_bytes += quantized.nbytes
        return quantized
