"""Rounding to the codes of a number format and back, in torch: the arithmetic of
`framesink.calibration.formats` on any device."""

import torch
from torch import Tensor

from framesink.calibration.formats import SMALLEST_AMAX, NumberFormat


def fake_quantize(values: Tensor, scale: Tensor | float, number_format: NumberFormat) -> Tensor:
    """`values` rounded to the nearest code under `scale` (broadcast, above 0), ties to even,
    saturating, and back, in the type of `values`."""
    scaled = (values / scale).clamp(number_format.lowest, number_format.highest)
    if number_format.is_integer:
        codes = scaled.round()
    else:
        codes = scaled.to(torch.float8_e4m3fn).to(values.dtype)
    return codes * scale


def scales(amax: Tensor, number_format: NumberFormat) -> Tensor:
    """The scales that map each absolute maximum onto the highest code; dead ones are clamped."""
    return amax.clamp(min=SMALLEST_AMAX) / number_format.highest
