"""What is quantized in a checkpoint, and which tensors each scheme has.

A quantized checkpoint carries its description in `framesink_quant.json`, beside ModelOpt's
`hf_quant_config.json`, which cannot say all of it. Everywhere the real value is code · scale;
scales are float32, finite and greater than 0.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.config import ModelConfig, TextConfig
from framesink.runtime.models.weights import (
    EMBEDDING,
    Shape,
    canonical_name,
    layer_name,
    model_weights,
)

QUANTIZATION_NAME = "framesink_quant.json"
INT4_GROUP = 128
FLOAT_DTYPES = ("float16", "bfloat16", "float32")
_SCALE = ("float32",)
_MAX_BYTES = 16_000_000


class LinearScheme(StrEnum):
    """How a linear layer's weight, and its input, are held.

    FP8 and INT8 are W8A8: weights per output channel, inputs by one static scale; INT8 may multiply
    its input by SmoothQuant's `pre_quant_scale` first. The others quantize the weight alone.
    """

    UNQUANTIZED = "16bit"
    FP8 = "fp8"
    INT8 = "int8"
    INT8_WEIGHT_ONLY = "int8_weight_only"
    INT4_WEIGHT_ONLY = "int4_weight_only"


class CacheScheme(StrEnum):
    """How K (before RoPE, without bias) and V are held in the pages."""

    UNQUANTIZED = "16bit"
    INT8 = "int8"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True)
class TensorRule:
    """A tensor that a scheme needs: the shapes and the dtypes (numpy's names) it may have."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Quantization:
    """What is quantized in a checkpoint.

    `linears` goes by canonical names without `.weight` (`model.layers.0.self_attn.q_proj`); a layer
    that is not named is not quantized. `int4_group` is how many inputs of an output channel share
    one scale.
    """

    linears: Mapping[str, LinearScheme] = field(default_factory=dict)
    cache: CacheScheme = CacheScheme.UNQUANTIZED
    int4_group: int = INT4_GROUP

    def scheme(self, linear: str) -> LinearScheme:
        """The scheme of a linear layer, by its canonical name."""
        return self.linears.get(linear, LinearScheme.UNQUANTIZED)

    def write(self, directory: Path) -> None:
        """Write `framesink_quant.json`."""
        description = _Description(
            linears={name: scheme.value for name, scheme in self.linears.items()},
            cache=self.cache.value,
            int4_group=self.int4_group,
        )
        text = json.dumps(description.model_dump(), indent=2)
        (directory / QUANTIZATION_NAME).write_text(text + "\n")


class _Description(BaseModel):
    """`framesink_quant.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    linears: dict[str, Literal["16bit", "fp8", "int8", "int8_weight_only", "int4_weight_only"]]
    cache: Literal["16bit", "int8", "fp8"]
    int4_group: Annotated[int, Field(ge=16, le=1024, multiple_of=16)] = INT4_GROUP


def read_quantization(directory: Path) -> Quantization | None:
    """What is quantized in a checkpoint directory; None where it has no `framesink_quant.json`.

    Raises CheckpointError if the file cannot be read or is malformed.
    """
    path = directory / QUANTIZATION_NAME
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
        description = _Description.model_validate_json(data)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:64] for part in first["loc"])
        raise CheckpointError(
            f"{path} is malformed at {place or 'its top'}: {first['msg']}; quantize the "
            "checkpoint again."
        ) from error
    return Quantization(
        linears={
            canonical_name(name): LinearScheme(scheme)
            for name, scheme in description.linears.items()
        },
        cache=CacheScheme(description.cache),
        int4_group=description.int4_group,
    )


def tensor_rules(
    config: ModelConfig, quantization: Quantization
) -> tuple[dict[str, TensorRule], dict[str, TensorRule]]:
    """The tensors that a checkpoint must have, and those it may have, by canonical name.

    Raises CheckpointError for a description that does not fit the model.
    """
    check_quantization(config, quantization)
    required = {
        name: TensorRule((shape,), FLOAT_DTYPES) for name, shape in model_weights(config).items()
    }
    required |= cache_tensors(config.text, quantization.cache)
    optional = optional_cache_tensors(config.text, quantization.cache)
    shapes = quantizable_linears(config)
    for name, scheme in quantization.linears.items():
        if scheme is not LinearScheme.UNQUANTIZED:
            required |= linear_tensors(name, scheme, shapes[name], quantization.int4_group)
            optional |= optional_linear_tensors(name, scheme, shapes[name])
    return required, optional


def linear_tensors(
    name: str, scheme: LinearScheme, shape: Shape, int4_group: int = INT4_GROUP
) -> dict[str, TensorRule]:
    """The tensors that hold a linear layer of shape `[out, in]`, bias apart, by name."""
    rows, columns = shape
    weight, scale = f"{name}.weight", weight_scale(name)
    per_row, per_tensor = TensorRule(((rows,),), _SCALE), TensorRule(((),), _SCALE)
    match scheme:
        case LinearScheme.FP8:
            return {
                weight: TensorRule((shape,), ("float8_e4m3fn",)),
                scale: TensorRule(((rows,), ()), _SCALE),
                input_scale(name): per_tensor,
            }
        case LinearScheme.INT8:
            return {
                weight: TensorRule((shape,), ("int8",)),
                scale: per_row,
                input_scale(name): per_tensor,
            }
        case LinearScheme.INT8_WEIGHT_ONLY:
            return {weight: TensorRule((shape,), ("int8",)), scale: per_row}
        case LinearScheme.INT4_WEIGHT_ONLY:
            return {
                weight: TensorRule(((rows, columns // 2),), ("uint8",)),
                scale: TensorRule(((rows, columns // int4_group),), _SCALE),
            }
        case LinearScheme.UNQUANTIZED:
            return {weight: TensorRule((shape,), FLOAT_DTYPES)}


def optional_linear_tensors(name: str, scheme: LinearScheme, shape: Shape) -> dict[str, TensorRule]:
    """The tensors that a linear layer of shape `[out, in]` may have or lack, by name."""
    if scheme is not LinearScheme.INT8:
        return {}
    return {pre_quant_scale(name): TensorRule(((shape[1],),), _SCALE)}


def cache_tensors(config: TextConfig, scheme: CacheScheme) -> dict[str, TensorRule]:
    """The scales of a quantized cache in every layer: per K channel, per V head."""
    if scheme is CacheScheme.UNQUANTIZED:
        return {}
    heads = config.num_key_value_heads
    rules: dict[str, TensorRule] = {}
    for index in range(config.num_hidden_layers):
        rules[k_channel_scale(index)] = TensorRule(((heads * config.head_dim,),), _SCALE)
        rules[v_head_scale(index)] = TensorRule(((heads,),), _SCALE)
    return rules


def optional_cache_tensors(config: TextConfig, scheme: CacheScheme) -> dict[str, TensorRule]:
    """The scales per rotary pair of K, for an executor that stores rotated keys."""
    if scheme is CacheScheme.UNQUANTIZED:
        return {}
    pairs = config.num_key_value_heads * config.head_dim // 2
    return {
        k_pair_scale(index): TensorRule(((pairs,),), _SCALE)
        for index in range(config.num_hidden_layers)
    }


def weight_scale(linear: str) -> str:
    """Name of a layer's weight scales, float32 `[out]`, `[]` (FP8 alone) or, in INT4,
    `[out, in/group]`."""
    return f"{linear}.weight_scale"


def input_scale(linear: str) -> str:
    """Name of the scale of a layer's input, float32 `[]`."""
    return f"{linear}.input_scale"


def pre_quant_scale(linear: str) -> str:
    """Name of SmoothQuant's factors on a layer's input, float32 `[in]`."""
    return f"{linear}.pre_quant_scale"


def k_channel_scale(index: int) -> str:
    """Name of a layer's key scales, float32 `[Hkv·D]`: keys before RoPE, without bias."""
    return f"{layer_name(index)}.self_attn.k_proj.k_channel_scale"


def k_pair_scale(index: int) -> str:
    """Name of a layer's key scales, float32 `[Hkv·D/2]`: the norm of each rotary pair, which bounds
    it under any rotation."""
    return f"{layer_name(index)}.self_attn.k_proj.k_pair_scale"


def v_head_scale(index: int) -> str:
    """Name of a layer's value scales, float32 `[Hkv]`."""
    return f"{layer_name(index)}.self_attn.v_proj.v_head_scale"


def quantizable_linears(config: ModelConfig) -> dict[str, Shape]:
    """Canonical name and shape `[out, in]` of every linear layer that a scheme may name.

    An output projection tied to the embedding is none: its weight is a table too.
    """
    return {
        name.removesuffix(".weight"): shape
        for name, shape in model_weights(config).items()
        if len(shape) == 2 and name != EMBEDDING
    }


def suits_int4(shape: Shape, int4_group: int = INT4_GROUP) -> bool:
    """Whether a linear layer of shape `[out, in]` can be held in INT4: TensorRT wants whole
    groups."""
    return shape[1] % int4_group == 0


def check_quantization(config: ModelConfig, quantization: Quantization) -> None:
    """Raise CheckpointError if a description does not fit a model: an unknown linear layer, or one
    whose size its scheme cannot hold."""
    linears = quantizable_linears(config)
    for name, scheme in quantization.linears.items():
        if name not in linears:
            raise CheckpointError(
                f"{QUANTIZATION_NAME} names {name[:128]!r}, which is no linear layer of this model "
                "that can be quantized."
            )
        if scheme is LinearScheme.INT4_WEIGHT_ONLY and not suits_int4(
            linears[name], quantization.int4_group
        ):
            raise CheckpointError(
                f"{name} has {linears[name][1]} inputs, which INT4 cannot hold in groups of "
                f"{quantization.int4_group}; use int8_weight_only for it."
            )
