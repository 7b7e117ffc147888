"""A checkpoint quantized with random scales, and the same in transformers, written from the
definition: real value = code · scale, weights and inputs rounded to codes, K and V too."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import (
    CacheScheme,
    LinearScheme,
    Quantization,
    quantizable_linears,
)
from framesink.runtime.models.safetensors_writer import SafetensorsWriter
from framesink.runtime.models.weights import canonical_name

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

# Small enough that every linear layer of the tiny checkpoint has whole groups.
TINY_INT4_GROUP = 16
LARGEST = {
    LinearScheme.FP8: 448,
    LinearScheme.INT8: 127,
    LinearScheme.INT8_WEIGHT_ONLY: 127,
    LinearScheme.INT4_WEIGHT_ONLY: 7,
}
UNTOUCHED = ("lm_head", "visual.merger.mlp.0", "visual.merger.mlp.2")


def write_quantized_checkpoint(
    source: Path,
    directory: Path,
    scheme: LinearScheme,
    cache: CacheScheme = CacheScheme.UNQUANTIZED,
    *,
    int4_group: int = TINY_INT4_GROUP,
    scalar_weight_scales: bool = False,
    least_range: float = 1.0,
    seed: int = 0,
) -> Quantization:
    """Quantize every layer of a checkpoint but the head and the merger.

    Weight scales are absolute maxima, per channel or (FP8) per tensor; scales of inputs, K and V
    are drawn at random, so that some values saturate, K and V never within `least_range`. In every
    second INT8 layer the inputs are first multiplied by random factors.
    """
    random = np.random.default_rng(seed)
    plain = Checkpoint.open(source)
    layers = [name for name in quantizable_linears(plain.config) if name not in UNTOUCHED]
    if scheme is LinearScheme.UNQUANTIZED:
        layers = []
    quantization = Quantization(dict.fromkeys(layers, scheme), cache, int4_group)
    tensors: dict[str, NDArray[np.generic]] = {
        name: np.asarray(plain.read(name)) for name in plain.names()
    }
    for number, name in enumerate(layers):
        weight = tensors[f"{name}.weight"].astype(np.float32)
        if scheme in (LinearScheme.FP8, LinearScheme.INT8):
            range_end = random.uniform(2, 5)
            tensors[f"{name}.input_scale"] = np.array(range_end / LARGEST[scheme], np.float32)
        if scheme is LinearScheme.INT8 and number % 2:
            factors = random.uniform(0.5, 2, weight.shape[1]).astype(np.float32)
            tensors[f"{name}.pre_quant_scale"] = factors
            weight = weight / factors
        group = int4_group if scheme is LinearScheme.INT4_WEIGHT_ONLY else weight.shape[1]
        groups = weight.reshape(len(weight), -1, group)
        scale = np.abs(groups).max(axis=2) / LARGEST[scheme]
        if scalar_weight_scales:
            scale = np.full_like(scale, scale.max())
        codes = to_codes(groups / scale[..., None], scheme).reshape(weight.shape)
        if scheme is LinearScheme.INT4_WEIGHT_ONLY:
            nibbles = codes.view(np.uint8) & 15
            codes = nibbles[:, 0::2] + 16 * nibbles[:, 1::2]
        elif scalar_weight_scales:
            scale = scale[0, 0]
        else:
            scale = scale[:, 0]
        tensors[f"{name}.weight"] = codes
        tensors[f"{name}.weight_scale"] = np.asarray(scale, np.float32)
    if cache is not CacheScheme.UNQUANTIZED:
        text = plain.config.text
        heads, largest = text.num_key_value_heads, 127 if cache is CacheScheme.INT8 else 448
        for index in range(text.num_hidden_layers):
            attention = f"model.layers.{index}.self_attn"
            k_ends = random.uniform(least_range, least_range + 5, heads * text.head_dim)
            v_ends = random.uniform(least_range, least_range + 3, heads)
            scales = {"k_proj.k_channel_scale": k_ends, "v_proj.v_head_scale": v_ends}
            for name, ends in scales.items():
                tensors[f"{attention}.{name}"] = (ends / largest).astype(np.float32)
    directory.mkdir(parents=True)
    shutil.copy(source / "config.json", directory)
    layout = {name: (value.dtype.name, value.shape) for name, value in tensors.items()}
    with SafetensorsWriter(directory / "model.safetensors", layout) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    quantization.write(directory)
    return quantization


def to_codes(values: NDArray[np.float32], scheme: LinearScheme) -> NDArray[np.generic]:
    """Nearest codes of values within range; INT4 ones as int8."""
    if scheme is LinearScheme.FP8:
        return values.astype(ml_dtypes.float8_e4m3fn)
    return np.rint(values).astype(np.int8)


def load_quantized_model(source: Path, quantized: Path) -> "Qwen2_5_VLForConditionalGeneration":
    """The plain checkpoint `source` in transformers in float64, with every linear layer that is
    quantized in `quantized`, and K and V, replaced by the definition."""
    import torch

    from reference.dense_model import load_model

    model = load_model(source)
    checkpoint = Checkpoint.open(quantized)
    quantization = checkpoint.quantization
    assert quantization is not None

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(checkpoint.read(name)).astype(np.float64))

    def forward(name: str, bias: "torch.Tensor | None", x: "torch.Tensor") -> "torch.Tensor":
        scheme = quantization.scheme(name)
        x = x * factors[name] if name in factors else x
        if scheme in (LinearScheme.FP8, LinearScheme.INT8):
            x = rounded(x, read(f"{name}.input_scale"), scheme is LinearScheme.FP8)
        y = x @ weights[name].T
        is_fp8 = quantization.cache is CacheScheme.FP8
        if quantization.cache is CacheScheme.UNQUANTIZED:
            return y if bias is None else y + bias
        if name.endswith("k_proj"):
            return rounded(y, read(f"{name}.k_channel_scale"), is_fp8) + bias
        if name.endswith("v_proj"):
            per_head = read(f"{name}.v_head_scale")
            scale = per_head.repeat_interleave(y.shape[-1] // len(per_head))
            return rounded(y + bias, scale, is_fp8)
        return y if bias is None else y + bias

    weights: dict[str, torch.Tensor] = {}
    factors: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        name = canonical_name(path)
        scheme = quantization.scheme(name)
        weights[name] = module.weight
        if scheme is LinearScheme.INT4_WEIGHT_ONLY:
            packed = np.asarray(checkpoint.read(f"{name}.weight")).astype(np.int64)
            codes = np.stack([packed % 16, packed // 16], axis=-1).reshape(len(packed), -1)
            signed = torch.from_numpy(np.where(codes > 7, codes - 16, codes).astype(np.float64))
            scale = read(f"{name}.weight_scale")
            weights[name] = signed * scale.repeat_interleave(quantization.int4_group, dim=1)
        elif scheme is not LinearScheme.UNQUANTIZED:
            scale = read(f"{name}.weight_scale")
            weights[name] = read(f"{name}.weight") * (scale[:, None] if scale.ndim else scale)
        if f"{name}.pre_quant_scale" in checkpoint.tensors:
            factors[name] = read(f"{name}.pre_quant_scale")
        module.forward = lambda x, name=name, bias=module.bias: forward(name, bias, x)
    return model


def rounded(x: "torch.Tensor", scale: "torch.Tensor", is_fp8: bool) -> "torch.Tensor":
    """`x` as its codes of 8 bits say it, saturating."""
    import torch

    if is_fp8:
        codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)
    else:
        codes = (x / scale).round().clamp(-128, 127)
    return codes * scale
