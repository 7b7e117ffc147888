"""The language model over a paged K/V context as one ONNX graph.

Model: Qwen2.5-VL, `transformers` `models/qwen2_5_vl/modeling_qwen2_5_vl.py` (Qwen2_5_VLTextModel).
Inputs and outputs are described in docs/architecture.md, section Graphs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from framesink.build.graphs.layers import DATA_TYPES, GraphAuthor, WeightMap
from framesink.runtime.manifest import ComputeType
from framesink.runtime.models.config import ModelConfig, TextConfig
from framesink.runtime.models.quantization import (
    CacheScheme,
    Quantization,
    k_channel_scale,
    v_head_scale,
)
from framesink.runtime.models.weights import FINAL_NORM, layer_name, output_projection

# Types of a quantized cache's pages, and of the new rows.
_CODE_TYPES: Mapping[CacheScheme, tuple[ir.DataType, ir.DataType]] = {
    CacheScheme.INT8: (ir.DataType.INT8, ir.DataType.INT8),
    CacheScheme.FP8: (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN),
}


@dataclass(frozen=True, slots=True)
class _StepInputs:
    """What every layer shares: rotary tables of the new tokens and of all keys (context first,
    then new), the mask, and which page each head reads, `[B,Hkv,P]` into `[N·Hkv,page,D]`."""

    cos_new: ir.Value
    sin_new: ir.Value
    cos_all: ir.Value
    sin_all: ir.Value
    mask: ir.Value
    page_index: ir.Value


def author_language_model(
    config: ModelConfig,
    weights: WeightMap,
    *,
    compute_type: ComputeType,
    page_size: int,
    cache_type: ComputeType,
    quantization: Quantization | None = None,
) -> ir.Model:
    """Author the language model.

    `weights` holds the tensors named by `language_model_weights`, in any float type, or as
    `quantization` says. `compute_type` is the type of activations, tables, mask and logits;
    `cache_type` that of the K/V pages and of the new K/V rows, unless `quantization` has a cache
    scheme: INT8 pages and rows are int8; FP8 rows are float8_e4m3fn and their pages hold the same
    bytes typed int8, since no reader gathers FP8.
    """
    return _LanguageModelAuthor(
        config.text, weights, compute_type, page_size, cache_type, quantization
    ).author()


class _LanguageModelAuthor(GraphAuthor):
    def __init__(
        self,
        config: TextConfig,
        weights: WeightMap,
        compute_type: ComputeType,
        page_size: int,
        cache_type: ComputeType,
        quantization: Quantization | None,
    ) -> None:
        super().__init__("language_model", weights, compute_type, quantization)
        self.config = config
        self.page_size = page_size
        self.cache_type = DATA_TYPES[cache_type]

    @cached_property
    def _one(self) -> ir.Value:
        """The scale of codes whose real scales are applied apart."""
        return self.constant("one", np.ones((), np.float32))

    def author(self) -> ir.Model:
        config = self.config
        hidden = self.input("inputs_embeds", ("batch", "new", config.hidden_size))
        step = self._step_inputs()
        last = self.input("last", ("batch",), ir.DataType.INT32)
        for index in range(config.num_hidden_layers):
            with self.scope(f"layers.{index}"):
                hidden = self._decoder_layer(hidden, index, step)
        with self.scope("head"):
            # One row per sequence, before the widest matrix of the model.
            rows = self.op.Cast(self.op.Unsqueeze(last, [1]), to=ir.DataType.INT64)
            hidden = self.op.GatherND(hidden, rows, batch_dims=1)
            hidden = self.rms_norm(hidden, FINAL_NORM.removesuffix(".weight"), config.rms_norm_eps)
            projection = output_projection(config).removesuffix(".weight")
            logits = self.linear(hidden, projection, bias=False)
        self.output(logits, "logits", ("batch", config.vocab_size), self.compute_type)
        return self.finish()

    def _step_inputs(self) -> _StepInputs:
        half = self.config.head_dim // 2
        cos_new = self.input("cos_new", ("batch", "new", half))
        sin_new = self.input("sin_new", ("batch", "new", half))
        cos_context = self.input("cos_ctx", ("batch", "context", half))
        sin_context = self.input("sin_ctx", ("batch", "context", half))
        mask = self.input("mask", ("batch", 1, "new", "keys"))
        block_table = self.input("block_table", ("batch", "pages"), ir.DataType.INT32)
        heads = self.config.num_key_value_heads
        with self.scope("step"):
            # A page of the pool is heads × rows; numbering pages per head lets one Gather give
            # [B,Hkv,P,page,D], without a transpose of the whole context.
            first = self.op.Mul(self.op.Unsqueeze(block_table, [1]), heads)
            head = ir.tensor([[[h] for h in range(heads)]], dtype=ir.DataType.INT32, name="heads")
            page_index = self.op.Add(first, head)
            return _StepInputs(
                cos_new=cos_new,
                sin_new=sin_new,
                cos_all=self.op.Concat(cos_context, cos_new, axis=1),
                sin_all=self.op.Concat(sin_context, sin_new, axis=1),
                mask=mask,
                page_index=page_index,
            )

    def _decoder_layer(self, hidden: ir.Value, index: int, step: _StepInputs) -> ir.Value:
        name, epsilon = layer_name(index), self.config.rms_norm_eps
        normed = self.rms_norm(hidden, f"{name}.input_layernorm", epsilon)
        hidden = self.op.Add(hidden, self._self_attention(normed, index, step))
        normed = self.rms_norm(hidden, f"{name}.post_attention_layernorm", epsilon)
        return self.op.Add(hidden, self.gated_mlp(normed, f"{name}.mlp", bias=False))

    def _self_attention(self, hidden: ir.Value, index: int, step: _StepInputs) -> ir.Value:
        config, name = self.config, f"{layer_name(index)}.self_attn"
        heads, kv_heads, head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        with self.scope("self_attn"):
            query = self.split_heads(self.linear(hidden, f"{name}.q_proj"), heads, head_dim)
            key = self.linear(hidden, f"{name}.k_proj", bias=False)
            value = self.linear(hidden, f"{name}.v_proj")
            keys = self._through_cache(self.split_heads(key, kv_heads, head_dim), "k", index, step)
            values = self._through_cache(
                self.split_heads(value, kv_heads, head_dim), "v", index, step
            )
            # The bias of K is large and constant; keeping it out of the pages keeps their range.
            bias = self.op.Reshape(self.weight(f"{name}.k_proj.bias"), [1, kv_heads, 1, head_dim])
            keys = self.rotate(self.op.Add(keys, bias), step.cos_all, step.sin_all)
            query = self.rotate(query, step.cos_new, step.sin_new)
            attended = self.attention(query, keys, values, step.mask, head_dim)
            return self.linear(
                self.merge_heads(attended, heads * head_dim), f"{name}.o_proj", bias=False
            )

    def _through_cache(self, new: ir.Value, kind: str, index: int, step: _StepInputs) -> ir.Value:
        """The one place where K/V is read and written: emits the new rows `[B,Hkv,s,D]` as an
        output and returns context and new rows, `[B,Hkv,P·page+s,D]`, as later steps will read
        them (that is, through the cache type)."""
        heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        scheme = self.quantization.cache
        page_type, row_type = _CODE_TYPES.get(scheme, (self.cache_type, self.cache_type))
        pages = self.input(
            f"{kind}_pages.{index}", ("pool", heads, self.page_size, head_dim), page_type
        )
        with self.scope(f"{kind}_cache"):
            per_head = self.op.Reshape(pages, [-1, self.page_size, head_dim])
            gathered = self.op.Gather(per_head, step.page_index, axis=0)
            context = self.op.Reshape(gathered, [0, heads, -1, head_dim])
            if scheme is CacheScheme.UNQUANTIZED:
                stored = self._cast(new, self.cache_type)
                rows = self._cast(self.op.Concat(context, stored, axis=2), self.compute_type)
            else:
                scale = self._cache_scale(kind, index)
                stored = self.quantize(self.op.Div(new, scale), self._one, row_type)
                codes = self.op.DequantizeLinear(stored, self._one)
                codes = self.op.Concat(self._read_codes(context), codes, axis=2)
                rows = self.op.Mul(codes, scale)
        self.output(stored, f"{kind}_new.{index}", ("batch", heads, "new", head_dim), row_type)
        return rows

    def _cache_scale(self, kind: str, index: int) -> ir.Value:
        """Scales that fit `[B,Hkv,s,D]`: one per channel for K, one per head for V."""
        heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        if kind == "k":
            return self.op.Reshape(self.weight(k_channel_scale(index)), [1, heads, 1, head_dim])
        return self.op.Reshape(self.weight(v_head_scale(index)), [1, heads, 1, 1])

    def _read_codes(self, context: ir.Value) -> ir.Value:
        """The numbers that gathered codes stand for, in the compute type."""
        if self.quantization.cache is CacheScheme.INT8:
            return self.op.DequantizeLinear(context, self._one)
        return self.decode_fp8(context)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return value if self.cache_type == self.compute_type else self.op.Cast(value, to=dtype)
