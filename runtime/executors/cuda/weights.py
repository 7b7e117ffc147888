"""The weights of both parts as the GPU runs them: layers that share an input are one matrix.

q, k and v become one product, gate and up another. Quantized layers keep their codes; 16-bit ones,
and those whose scheme has no kernel here, are held in the compute type.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.linear import Weights
from framesink.runtime.executors.cuda.layers import Linear
from framesink.runtime.executors.cuda.weight_source import WeightSource
from framesink.runtime.models.config import TextConfig, VisionConfig
from framesink.runtime.models.quantization import (
    LinearScheme,
    input_scale,
    pre_quant_scale,
    weight_scale,
)
from framesink.runtime.models.weights import (
    EMBEDDING,
    FINAL_NORM,
    MERGER,
    PATCH_EMBED,
    block_name,
    layer_name,
    output_projection,
)

# Matrix units want inner sizes of whole tiles; an MLP's inner size may be padded with zeros.
INNER_MULTIPLE = 32
_CODES = (LinearScheme.FP8, LinearScheme.INT8)


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLayer:
    """One layer of the language model."""

    input_norm: Tensor
    qkv: Linear
    output: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, eq=False)
class LanguageModelWeights:
    """The language model."""

    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    final_norm: Tensor
    head: Linear


@dataclass(frozen=True, slots=True, eq=False)
class VisionBlock:
    """One block of the vision encoder."""

    attention_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, eq=False)
class VisionEncoderWeights:
    """The vision encoder."""

    patch_embedding: Linear
    blocks: tuple[VisionBlock, ...]
    merger_norm: Tensor
    merger_inner: Linear
    merger_outer: Linear


def load_language_model(
    source: WeightSource, config: TextConfig, dtype: torch.dtype
) -> LanguageModelWeights:
    """The language model's weights; `dtype` is the compute type."""
    loader = _Loader(source, dtype)
    layers = []
    for index in range(config.num_hidden_layers):
        name = layer_name(index)
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        layers.append(
            DecoderLayer(
                input_norm=loader.plain(f"{name}.input_layernorm.weight"),
                qkv=loader.linear([f"{attention}.{part}_proj" for part in "qkv"]),
                output=loader.linear([f"{attention}.o_proj"]),
                post_attention_norm=loader.plain(f"{name}.post_attention_layernorm.weight"),
                gate_up=loader.gate_up(mlp),
                down=loader.down(mlp),
            )
        )
    embedding = loader.plain(EMBEDDING)
    head = output_projection(config).removesuffix(".weight")
    return LanguageModelWeights(
        embedding=embedding,
        layers=tuple(layers),
        final_norm=loader.plain(FINAL_NORM),
        head=_finish(_Part(LinearScheme.UNQUANTIZED, embedding))
        if config.tie_word_embeddings
        else loader.linear([head]),
    )


def load_vision_encoder(
    source: WeightSource, config: VisionConfig, dtype: torch.dtype
) -> VisionEncoderWeights:
    """The vision encoder's weights; `dtype` is the compute type."""
    loader = _Loader(source, dtype)
    blocks = []
    for index in range(config.depth):
        name = block_name(index)
        blocks.append(
            VisionBlock(
                attention_norm=loader.plain(f"{name}.norm1.weight"),
                qkv=loader.linear([f"{name}.attn.qkv"]),
                output=loader.linear([f"{name}.attn.proj"]),
                mlp_norm=loader.plain(f"{name}.norm2.weight"),
                gate_up=loader.gate_up(f"{name}.mlp"),
                down=loader.down(f"{name}.mlp"),
            )
        )
    return VisionEncoderWeights(
        patch_embedding=loader.linear([PATCH_EMBED.removesuffix(".weight")]),
        blocks=tuple(blocks),
        merger_norm=loader.plain(f"{MERGER}.ln_q.weight"),
        merger_inner=loader.linear([f"{MERGER}.mlp.0"]),
        merger_outer=loader.linear([f"{MERGER}.mlp.2"]),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One linear layer, or several that share an input, one below the other.

    `weight` `[out, in]`: in the compute type, or codes in float8_e4m3fn or int8. Of codes the rest
    is there too: `weight_scale` float32 `[out]`, `input_scale` float32 `[]` and, if inputs are
    multiplied before they are quantized, `smoothing` float32 `[in]`.
    """

    scheme: LinearScheme
    weight: Tensor
    bias: Tensor | None = None
    weight_scale: Tensor | None = None
    input_scale: Tensor | None = None
    smoothing: Tensor | None = None


class _Loader:
    """Reads layers and joins those that share an input."""

    def __init__(self, source: WeightSource, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype

    def plain(self, name: str) -> Tensor:
        return self._source.get(name).to(self._dtype)

    def linear(self, names: Sequence[str]) -> Linear:
        """The layers `names`, one below the other."""
        return _finish(self._join([self._read(name) for name in names]))

    def gate_up(self, mlp: str) -> Linear:
        """Gate above up, each padded to whole tiles of outputs."""
        parts = [self._read(f"{mlp}.{part}_proj") for part in ("gate", "up")]
        return _finish(self._join([_pad_outputs(part) for part in parts]))

    def down(self, mlp: str) -> Linear:
        """Down, padded to whole tiles of inputs."""
        return _finish(_pad_inputs(self._read(f"{mlp}.down_proj")))

    def _read(self, name: str) -> _Part:
        scheme = self._source.quantization.scheme(name)
        bias = self._source.find(f"{name}.bias")
        bias = None if bias is None else bias.to(self._dtype)
        # The kernel of a patch embedding is a matrix over flattened patches.
        weight = self._source.get(f"{name}.weight").flatten(1)
        if scheme is LinearScheme.UNQUANTIZED:
            return _Part(scheme, weight.to(self._dtype), bias)
        scale = self._source.get(weight_scale(name))
        if scheme not in _CODES:
            weight = _dequantized(weight, scale).to(self._dtype)
            return _Part(LinearScheme.UNQUANTIZED, weight, bias)
        smoothing = self._source.find(pre_quant_scale(name))
        return _Part(
            scheme,
            weight,
            bias,
            weight_scale=scale.expand(len(weight)).contiguous(),
            input_scale=self._source.get(input_scale(name)),
            smoothing=smoothing,
        )

    def _join(self, parts: Sequence[_Part]) -> _Part:
        """Several layers of one input as one; what cannot share its input's codes is
        dequantized."""
        first = parts[0]
        if len(parts) == 1:
            return first
        if not _share_input(parts):
            parts = [self._without_codes(part) for part in parts]
            first = parts[0]
        coded = first.weight_scale is not None
        return _Part(
            first.scheme,
            _concatenate([part.weight for part in parts]),
            None if first.bias is None else torch.cat([part.bias for part in parts]),
            weight_scale=torch.cat([part.weight_scale for part in parts]) if coded else None,
            # One range for one input: the widest that any of them was given.
            input_scale=torch.stack([part.input_scale for part in parts]).amax() if coded else None,
            smoothing=first.smoothing,
        )

    def _without_codes(self, part: _Part) -> _Part:
        """The layer in the compute type; smoothing becomes part of its weight."""
        if part.weight_scale is None:
            return part
        weight = _dequantized(part.weight, part.weight_scale)
        if part.smoothing is not None:
            weight = weight * part.smoothing
        return _Part(LinearScheme.UNQUANTIZED, weight.to(self._dtype), part.bias)


def _finish(part: _Part) -> Linear:
    """The layer as the kernels take it."""
    if part.weight_scale is None or part.input_scale is None:
        form = OutputFormat(part.weight.dtype)
        return Linear(Weights(part.weight, None, part.bias), form)
    form = OutputFormat(part.weight.dtype, part.input_scale.item(), part.smoothing)
    return Linear(Weights(part.weight, part.weight_scale * part.input_scale, part.bias), form)


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Rows one below the other; torch cannot join FP8 tensors as such."""
    dtype = parts[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(list(parts))
    return torch.cat([part.view(torch.uint8) for part in parts]).view(dtype)


def _pad_outputs(part: _Part) -> _Part:
    """The layer with outputs of 0 added up to a multiple of `INNER_MULTIPLE`."""
    missing = -len(part.weight) % INNER_MULTIPLE
    if not missing:
        return part
    dtype = part.weight.dtype
    storage = torch.uint8 if dtype.itemsize == 1 else dtype
    return replace(
        part,
        weight=functional.pad(part.weight.view(storage), (0, 0, 0, missing)).view(dtype),
        bias=None if part.bias is None else functional.pad(part.bias, (0, missing)),
        weight_scale=None
        if part.weight_scale is None
        else functional.pad(part.weight_scale, (0, missing), value=1.0),
    )


def _pad_inputs(part: _Part) -> _Part:
    """The layer with inputs that do not matter added up to a multiple of `INNER_MULTIPLE`."""
    missing = -part.weight.shape[1] % INNER_MULTIPLE
    if not missing:
        return part
    dtype = part.weight.dtype
    storage = torch.uint8 if dtype.itemsize == 1 else dtype
    return replace(
        part,
        weight=functional.pad(part.weight.view(storage), (0, missing)).view(dtype),
        smoothing=None
        if part.smoothing is None
        else functional.pad(part.smoothing, (0, missing), value=1.0),
    )


def _share_input(parts: Sequence[_Part]) -> bool:
    """Whether the layers' inputs are quantized in one way, but for the width of the range."""
    first = parts[0]
    for part in parts[1:]:
        if part.scheme is not first.scheme:
            return False
        if (part.smoothing is None) != (first.smoothing is None):
            return False
        if part.smoothing is not None and not torch.equal(part.smoothing, first.smoothing):
            return False
    return True


def _dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """Float32 `[out, in]` of codes and their scales, `[out]`, `[]`, or `[out, in/group]` where two
    INT4 codes lie in a byte, the first in its low half."""
    if scale.dim() < 2:
        return codes.float() * scale[:, None] if scale.dim() else codes.float() * scale
    halves = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(1).to(torch.int8)
    signed = torch.where(halves > 7, halves - 16, halves)
    return signed.float() * scale.repeat_interleave(signed.shape[1] // scale.shape[1], dim=1)
