"""The tensors that hold one quantized linear layer, written block by block."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from framesink.calibration.formats import (
    FP8,
    INT4,
    INT8,
    NumberFormat,
    clamp_dead,
    expand_groups,
    group_amax,
    pack_int4,
    quantize,
    row_amax,
    scale_of,
)
from framesink.calibration.weight_blocks import row_blocks, tensor_amax
from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.models.checkpoint import MIN_SCALE, Checkpoint
from framesink.runtime.models.quantization import (
    INT4_GROUP,
    LinearScheme,
    input_scale,
    linear_tensors,
    pre_quant_scale,
    weight_scale,
)
from framesink.runtime.models.safetensors_writer import TensorLayout

WEIGHT_FORMATS: Mapping[LinearScheme, NumberFormat] = {
    LinearScheme.FP8: FP8,
    LinearScheme.INT8: INT8,
    LinearScheme.INT8_WEIGHT_ONLY: INT8,
    LinearScheme.INT4_WEIGHT_ONLY: INT4,
}


@dataclass(slots=True, eq=False)
class LinearEncoder:
    """Quantizes the linear layer `name` of a 16-bit checkpoint.

    `input_scale` is there for W8A8 schemes. `factors` float32 `[in]` are SmoothQuant's, by which
    the weight is divided; they are stored only if `explicit`. `rows` float32 `[out]` multiply the
    layer's outputs. With `per_tensor` an FP8 weight has one scale for all. `dead_rows` counts, once
    the layer is written, the output channels (INT4: groups) whose weights are as good as 0.
    """

    checkpoint: Checkpoint
    name: str
    scheme: LinearScheme
    input_scale: float | None = None
    factors: Float32Array | None = None
    explicit: bool = False
    rows: Float32Array | None = None
    per_tensor: bool = False
    dead_rows: int = field(default=0, init=False)

    def layout(self) -> dict[str, TensorLayout]:
        """Dtypes and shapes of the tensors that `blocks` yields, in its order."""
        shape = self.checkpoint.info(f"{self.name}.weight").shape
        rules = linear_tensors(self.name, self.scheme, shape, INT4_GROUP)
        layout = {name: (rule.dtypes[0], rule.shapes[0]) for name, rule in rules.items()}
        if self.per_tensor and self.scheme is LinearScheme.FP8:
            layout[weight_scale(self.name)] = ("float32", ())
        if self.factors is not None and self.explicit:
            layout[pre_quant_scale(self.name)] = ("float32", self.factors.shape)
        return layout

    def blocks(self) -> Iterator[tuple[str, AnyArray]]:
        """Tensor names and blocks of them, in the layout's order.

        Raises CheckpointError if a weight is NaN or infinite.
        """
        scales: list[Float32Array] = []
        for codes, scale in self._encoded_rows():
            yield f"{self.name}.weight", codes
            scales.append(scale)
        if self.per_tensor and self.scheme is LinearScheme.FP8:
            yield weight_scale(self.name), scales[0]
        else:
            yield weight_scale(self.name), self._scaled_rows(np.concatenate(scales))
        if self.input_scale is not None:
            yield input_scale(self.name), np.array(self.input_scale, dtype=np.float32)
        if self.factors is not None and self.explicit:
            yield pre_quant_scale(self.name), self.factors

    def _encoded_rows(self) -> Iterator[tuple[AnyArray, Float32Array]]:
        number_format = WEIGHT_FORMATS[self.scheme]
        weight = f"{self.name}.weight"
        whole: Float32Array | None = None
        if self.per_tensor and self.scheme is LinearScheme.FP8:
            whole = scale_of(tensor_amax(self.checkpoint, weight, self.factors), number_format)
        for block in row_blocks(self.checkpoint, weight, self.factors):
            if whole is not None:
                yield quantize(block, whole, number_format), whole
            elif self.scheme is LinearScheme.INT4_WEIGHT_ONLY:
                scale = self._scale(group_amax(block, INT4_GROUP), number_format)
                spread = expand_groups(scale, INT4_GROUP, block.shape[1])
                yield pack_int4(quantize(block, spread, number_format)), scale
            else:
                scale = self._scale(row_amax(block), number_format)
                yield quantize(block, scale[:, None], number_format), scale

    def _scale(self, amax: Float32Array, number_format: NumberFormat) -> Float32Array:
        clamped, dead = clamp_dead(amax)
        self.dead_rows += dead
        return scale_of(clamped, number_format)

    def _scaled_rows(self, scales: Float32Array) -> Float32Array:
        """The weight's scales, with the factors on the layer's outputs in them."""
        if self.rows is None:
            return scales
        rows = self.rows if scales.ndim == 1 else self.rows[:, None]
        multiplied: Float32Array = np.maximum(scales * rows, np.float32(MIN_SCALE))
        return multiplied
