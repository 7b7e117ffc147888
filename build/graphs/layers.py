"""What both graphs are made of: inputs, weights, linear layers, norms, rotary, attention.

A quantized layer is standard QuantizeLinear and DequantizeLinear around the product: ONNX Runtime
computes exactly that, TensorRT fuses it into a product of codes.

Each helper emits native operators of opset 24 that ONNX Runtime executes and TensorRT compiles.
Nodes are named by the scope they were emitted in (`layers.0/self_attn/q_proj/MatMul_node_12`), so a
name in a viewer, a profile or a builder's message leads back to the code.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import onnx_ir as ir
from onnxscript import GraphBuilder

from framesink.runtime.arrays import Float32Array
from framesink.runtime.manifest import ComputeType
from framesink.runtime.models.quantization import (
    LinearScheme,
    Quantization,
    input_scale,
    pre_quant_scale,
    weight_scale,
)
from framesink.runtime.models.safetensors import TensorInfo

OPSET = 24
IR_VERSION = 12
DATA_TYPES: Mapping[str, ir.DataType] = {
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float32": ir.DataType.FLOAT,
}
CODE_TYPES: Mapping[str, ir.DataType] = {
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.INT4,
}
PRODUCER = "framesink"

# Schemes that quantize a layer's input, and the type of its codes.
_INPUT_CODES: Mapping[LinearScheme, ir.DataType] = {
    LinearScheme.FP8: ir.DataType.FLOAT8E4M3FN,
    LinearScheme.INT8: ir.DataType.INT8,
}

WeightMap: TypeAlias = Mapping[str, ir.ExternalTensor]
Dimension: TypeAlias = int | str


def external_weights(tensors: Mapping[str, TensorInfo]) -> dict[str, ir.ExternalTensor]:
    """Tensors of safetensors files as graph weights that only point at their bytes.

    Bytes (uint8) are pairs of INT4 codes, the first in the low nibble. A graph that uses the
    weights must be saved in the directory that holds the files. Tensors of other types are left
    out.
    """
    types = {**DATA_TYPES, **CODE_TYPES}
    return {
        name: ir.ExternalTensor(
            location=info.file.name,
            offset=info.offset,
            length=info.nbytes,
            dtype=types[info.dtype],
            shape=ir.Shape(_unpacked_shape(info)),
            name=name,
            base_dir=info.file.parent,
        )
        for name, info in tensors.items()
        if info.dtype in types
    }


def _unpacked_shape(info: TensorInfo) -> tuple[int, ...]:
    if info.dtype != "uint8":
        return info.shape
    return (*info.shape[:-1], 2 * info.shape[-1])


class Operators(Protocol):
    """ONNX operators by name: inputs are positional, attributes are keywords."""

    def __getattr__(self, name: str) -> Callable[..., ir.Value]: ...


class GraphAuthor:
    """Writes one graph. `weights` are emitted as they are and cast to `compute_type` in the graph
    where they differ from it (a reader folds that cast at load). Linear layers that `quantization`
    names have their codes and scales in `weights`."""

    def __init__(
        self,
        name: str,
        weights: WeightMap,
        compute_type: ComputeType,
        quantization: Quantization | None = None,
    ) -> None:
        self._graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)
        self._builder = GraphBuilder(self._graph)
        self._weights = weights
        self._emitted: dict[str, ir.Value] = {}
        self.op: Operators = self._builder.op
        self.compute_type = DATA_TYPES[compute_type]
        self.quantization = quantization or Quantization()

    def input(
        self, name: str, shape: tuple[Dimension, ...], dtype: ir.DataType | None = None
    ) -> ir.Value:
        """A graph input, of the compute type unless told otherwise; strings are dynamic."""
        value: ir.Value = self._builder.input(name, dtype or self.compute_type, shape)
        return value

    def output(
        self, value: ir.Value, name: str, shape: tuple[Dimension, ...], dtype: ir.DataType
    ) -> None:
        """Make a value a graph output."""
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape(shape)
        self._builder.add_output(value, name)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes emitted inside carry `name` in theirs."""
        self._builder.push_module(name)
        try:
            yield
        finally:
            self._builder.pop_module()

    def weight(self, name: str) -> ir.Value:
        """A weight in the compute type, emitted once."""
        if name not in self._emitted:
            tensor = self._weights[name]
            value = self._builder.initializer(tensor, name, qualify=False)
            if tensor.dtype != self.compute_type:
                value = self.op.Cast(value, to=self.compute_type)
            self._emitted[name] = value
        return self._emitted[name]

    def constant(self, name: str, values: Float32Array) -> ir.Value:
        """A small table of the graph's own, in the compute type."""
        tensor = ir.tensor(values.tolist(), dtype=self.compute_type, name=name)
        value: ir.Value = self._builder.initializer(tensor, name, qualify=False)
        return value

    def linear(self, x: ir.Value, name: str, *, bias: bool = True) -> ir.Value:
        """`x Wᵀ + b` over the last axis: the one place where a linear layer is emitted."""
        scheme = self.quantization.scheme(name)
        with self.scope(name.rpartition(".")[2]):
            if scheme in _INPUT_CODES:
                x = self._quantized_input(x, name, _INPUT_CODES[scheme])
            matrix = self.op.Transpose(self._matrix(name, scheme), perm=[1, 0])
            product = self.op.MatMul(x, matrix)
            return self.op.Add(product, self.weight(f"{name}.bias")) if bias else product

    def _matrix(self, name: str, scheme: LinearScheme) -> ir.Value:
        """The weight `[out, in]` of a linear layer, in the compute type."""
        if scheme is LinearScheme.UNQUANTIZED:
            return self.weight(f"{name}.weight")
        codes = self._builder.initializer(
            self._weights[f"{name}.weight"], f"{name}.weight", qualify=False
        )
        scale = self.weight(weight_scale(name))
        if scheme is LinearScheme.INT4_WEIGHT_ONLY:
            group = self.quantization.int4_group
            return self.op.DequantizeLinear(codes, scale, axis=1, block_size=group)
        # One scale per row; a scale for the whole matrix is a scalar, for which no axis counts.
        return self.op.DequantizeLinear(codes, scale, axis=0)

    def _quantized_input(self, x: ir.Value, name: str, code_type: ir.DataType) -> ir.Value:
        """A linear layer's input as its codes say it, after SmoothQuant's factors if it has any."""
        if pre_quant_scale(name) in self._weights:
            x = self.op.Mul(x, self.weight(pre_quant_scale(name)))
        scale = self.weight(input_scale(name))
        return self.op.DequantizeLinear(self.quantize(x, scale, code_type), scale)

    def quantize(self, x: ir.Value, scale: ir.Value, code_type: ir.DataType) -> ir.Value:
        """Codes of `x / scale`: nearest, ties to even, saturating."""
        return self.op.QuantizeLinear(x, scale, output_dtype=code_type)

    def decode_fp8(self, stored: ir.Value) -> ir.Value:
        """The E4M3 numbers whose bytes are typed int8: sign, 4 bits of exponent e, 3 of mantissa m,
        for m·2⁻⁹ where e is 0 and (8 + m)·2^(e−10) elsewhere.

        No operator of both readers gathers FP8, or declares bytes to be FP8 afterwards. Arithmetic
        is a third of the time of a table of 256 values, whose rows ONNX Runtime copies one by one.
        """
        code = self.op.Cast(stored, to=ir.DataType.FLOAT)
        negative = self.op.Cast(self.op.Less(code, 0.0), to=ir.DataType.FLOAT)
        magnitude = self.op.Add(code, self.op.Mul(negative, 128.0))
        # max(e, 1) - 1, and then m or 8 + m.
        doublings = self.op.Floor(self.op.Mul(self.op.Relu(self.op.Sub(magnitude, 8.0)), 1 / 8))
        significand = self.op.Sub(magnitude, self.op.Mul(doublings, 8.0))
        unit = self.op.Sub(2.0**-9, self.op.Mul(negative, 2.0**-8))
        power = self.op.Exp(self.op.Mul(doublings, math.log(2)))
        value = self.op.Mul(self.op.Mul(significand, unit), power)
        # float16 holds every E4M3 number: it takes away the rounding of Exp.
        exact = self.op.Cast(value, to=ir.DataType.FLOAT16)
        if self.compute_type == ir.DataType.FLOAT16:
            return exact
        return self.op.Cast(exact, to=self.compute_type)

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        """RMSNorm over the last axis; the mean square is taken in float32 (`stash_type`)."""
        with self.scope(name.rpartition(".")[2]):
            return self.op.RMSNormalization(
                x, self.weight(f"{name}.weight"), axis=-1, epsilon=epsilon, stash_type=1
            )

    def gated_mlp(self, x: ir.Value, name: str, *, bias: bool) -> ir.Value:
        """SwiGLU: `down(silu(gate(x)) · up(x))`."""
        with self.scope("mlp"):
            gate = self.linear(x, f"{name}.gate_proj", bias=bias)
            # Two operators: TensorRT makes six layers of Swish.
            activated = self.op.Mul(gate, self.op.Sigmoid(gate))
            product = self.op.Mul(activated, self.linear(x, f"{name}.up_proj", bias=bias))
            return self.linear(product, f"{name}.down_proj", bias=bias)

    def split_heads(self, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
        """`[B,s,heads·D]` to `[B,heads,s,D]`."""
        split = self.op.Reshape(x, [0, 0, heads, head_dim])
        return self.op.Transpose(split, perm=[0, 2, 1, 3])

    def merge_heads(self, x: ir.Value, width: int) -> ir.Value:
        """`[B,heads,s,D]` to `[B,s,heads·D]`; `width` is heads·D."""
        return self.op.Reshape(self.op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, width])

    def rotate(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        """Rotary embedding of `[B,heads,s,D]` by per-token tables `[B,s,D/2]`."""
        return self.op.RotaryEmbedding(x, cos, sin, interleaved=0)

    def attention(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        mask: ir.Value | None,
        head_dim: int,
    ) -> ir.Value:
        """Scaled dot-product attention of `[B,heads,s,D]`; fewer key than query heads means
        grouped queries. `mask` is added to the scores: `[B,1,s,keys]` of the compute type."""
        return self.op.Attention(query, key, value, mask, scale=head_dim**-0.5)

    def finish(self) -> ir.Model:
        """The whole model."""
        return ir.Model(self._graph, ir_version=IR_VERSION, producer_name=PRODUCER)
