"""The weights of a checkpoint as real numbers, whether they are quantized or not."""

import numpy as np

from framesink.calibration.formats import dequantize, expand_groups, unpack_int4
from framesink.runtime.arrays import Float32Array
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import LinearScheme, pre_quant_scale, weight_scale


def read_weight(checkpoint: Checkpoint, name: str, rows: slice = slice(None)) -> Float32Array:
    """A weight, or some of its rows, in float32, by its canonical name.

    That of a quantized linear layer is what its codes stand for; SmoothQuant's factors on the
    layer's input are moved into it.
    """
    stored = checkpoint.read(name)[rows]
    linear = name.removesuffix(".weight")
    quantization = checkpoint.quantization
    if quantization is None or quantization.scheme(linear) is LinearScheme.UNQUANTIZED:
        return stored.astype(np.float32)
    scales = checkpoint.read(weight_scale(linear))
    scales = scales[rows] if scales.ndim else scales
    if quantization.scheme(linear) is LinearScheme.INT4_WEIGHT_ONLY:
        stored = unpack_int4(stored)
        scales = expand_groups(scales, quantization.int4_group, stored.shape[1])
    elif scales.ndim:
        scales = scales[:, None]
    weight = dequantize(stored, scales)
    if pre_quant_scale(linear) in checkpoint.tensors:
        weight *= checkpoint.read(pre_quant_scale(linear))
    return weight
